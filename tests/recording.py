"""What the backend does with a graph, recorded: what came in, what went to the compiler, and the decisions between.

The backend is the real one: its two calls, of the passes and of the compiler, are watched and go through.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx import GraphModule, Node

import slope_compile as slope
from slope_compile import _inductor
from slope_compile.kernels import ops
from slope_compile.passes import pipeline
from slope_compile.passes.context import Context

DENSE_PRODUCTS = (
    torch.nn.functional.linear,
    torch._C._nn.linear,
    torch.ops.aten.linear.default,
    torch.addmm,
    torch.ops.aten.addmm.default,
    torch.mm,
    torch.matmul,
)
"""Every form in which a linear of the models here arrives or stays."""


LINEARS = DENSE_PRODUCTS[:3]


def _reads_parameter(node: Node) -> bool:
    def below(source: Node) -> Node:
        while source.op != "placeholder" and len(source.all_input_nodes) == 1 and source.op.startswith("call_"):
            source = source.all_input_nodes[0]
        return source

    found = [below(source).meta.get("example_value") for source in node.all_input_nodes]
    return any(isinstance(v, nn.Parameter) and v.dim() == 2 for v in found)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    """No compiled code of an earlier test; a test module imports this name to get it."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def targets(module: GraphModule) -> collections.Counter[Any]:
    """How often each target is called, in the bodies of higher-order operators too."""
    graphs = [m.graph for m in module.modules() if isinstance(m, GraphModule)]
    return collections.Counter(n.target for graph in graphs for n in graph.nodes if n.op.startswith("call_"))


@dataclasses.dataclass(frozen=True)
class Compilation:
    """One graph on its way through the backend."""

    before: collections.Counter[Any]
    """Targets in the graph from Dynamo."""
    after: collections.Counter[Any]
    """Targets in the graph handed to the compiler."""
    module: GraphModule
    """That graph."""
    report: slope.Report
    compiler: str
    patches: dict[str, Any]
    inputs: tuple[Any, ...] = ()
    """What it was compiled for."""
    calls: list[tuple[Any, ...]] = dataclasses.field(default_factory=list)
    """What it was called with: a graph of prepared weights serves all blocks that are alike."""

    @property
    def sparse(self) -> int:
        """Products with compressed weights."""
        return self.after[ops.linear]

    @property
    def dense(self) -> int:
        """Linears that were left dense."""
        return sum(self.after[target] for target in DENSE_PRODUCTS)

    @property
    def dense_linears(self) -> int:
        """Products left that are linears by name, or read a matrix that is a parameter; without those of adapters."""
        found = 0
        for graph in [m.graph for m in self.module.modules() if isinstance(m, GraphModule)]:
            for node in graph.nodes:
                if node.op.startswith("call_") and node.meta.get("slope") != "down_projection":
                    found += node.target in LINEARS or (node.target in DENSE_PRODUCTS and _reads_parameter(node))
        return found


class Recording(list[Compilation]):
    """The compilations so far."""

    @property
    def sparse(self) -> int:
        return sum(one.sparse for one in self)

    @property
    def dense(self) -> int:
        return sum(one.dense for one in self)

    @property
    def sparse_paths(self) -> list[str]:
        return [d.weight for one in self for d in one.report.sparse]

    @property
    def reasons(self) -> dict[str, slope.Reason]:
        """The reason for each linear that was left dense."""
        return {d.weight: d.reason for one in self for d in one.report.dense}


def record(monkeypatch: pytest.MonkeyPatch, compile_it: bool = True) -> Recording:
    """Record every compilation of this test.

    Args:
        monkeypatch: the test's.
        compile_it: False to run the rewritten graphs as they are, whatever compiler was asked for.
    """
    recording = Recording()
    run_passes, compile_graph = pipeline.run_passes, _inductor.compile_graph
    pending: list[tuple[collections.Counter[Any], slope.Report]] = []

    def watched_passes(module: GraphModule, context: Context) -> GraphModule:
        before = targets(module)
        result = run_passes(module, context)
        pending.append((before, context.report))
        return result

    def watched_compiler(
        module: GraphModule, inputs: Sequence[Any], compiler: str, patches: dict[str, Any]
    ) -> Callable[..., Any]:
        before, report = pending.pop()
        one = Compilation(before, targets(module), module, report, compiler, dict(patches), tuple(inputs))
        recording.append(one)
        call = compile_graph(module, inputs, *((compiler, patches) if compile_it else ("eager", {})))

        def watched_call(*arguments: Any) -> Any:
            one.calls.append(arguments)
            return call(*arguments)

        return watched_call

    monkeypatch.setattr("slope_compile.backend.run_passes", watched_passes)
    monkeypatch.setattr("slope_compile.backend.compile_graph", watched_compiler)
    return recording


def compiled(model: nn.Module, compiler: str = "aot_eager", **arguments: Any) -> Any:
    """``torch.compile`` with our backend; ``options`` are added to the compiler's name.

    "aot_eager" runs everything but Inductor's code generation, in a tenth of the time.
    """
    options: dict[str, Any] = {"compiler": compiler, **arguments.pop("options", {})}
    return torch.compile(model, backend=slope.slope, options=options, **arguments)


def compiled_way(
    way: str, dense: nn.Module, compiler: str = "aot_eager", fields: Mapping[str, Any] | None = None, **arguments: Any
) -> tuple[nn.Module, Any]:
    """A copy of a dense model and its compiled form, by way A or B with these fields of SlopeConfig."""
    model, fields = copy.deepcopy(dense), dict(fields or {})
    if way == "A":
        return model, compiled(model, compiler, options=fields, **arguments)
    slope.sparsify_(model, slope.SlopeConfig(**fields))
    return model, compiled(model, compiler, **arguments)


every_way = pytest.mark.parametrize(
    "way", [pytest.param("A", id="A_dense"), pytest.param("B", id="B_prepared")]
)
