"""Small graphs for the tests of the passes: how they are captured, run, and checked node by node."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule, Interpreter, Node

import slope_compile as slope
from slope_compile._dynamo import working_copy
from slope_compile.options import EXPORT_FUSIONS
from slope_compile.passes.context import Context
from slope_compile.passes.graph import Region, regions, value
from slope_compile.program import AttributeWeights

ALL = {"first_dense": False, "heads_dense": False, "backward": "exact"}
"""Fields of SlopeConfig for graphs so small that every linear would be a first one or a head."""


def exported(
    module: nn.Module, *inputs: Any, strict: bool = False, dynamic_shapes: Any = None
) -> ExportedProgram:
    """``torch.export`` of a module."""
    return torch.export.export(module, inputs, strict=strict, dynamic_shapes=dynamic_shapes)


def attribute_graph(module: nn.Module, *inputs: Any) -> GraphModule:
    """A graph whose weights are attributes and whose nodes carry fake values."""
    graph_module = exported(module, *inputs).module()
    assert isinstance(graph_module, GraphModule)
    return graph_module


def dynamo_graph(
    function: Callable[..., Any], *inputs: Any, work: Callable[[GraphModule, list[Any]], object] | None = None
) -> tuple[GraphModule, list[Any]]:
    """The graph that Dynamo makes of a function, as a copy to work on, and its real inputs.

    ``work`` is done on both while Dynamo is still running: only then can the module behind a graph be found.
    """
    caught: list[tuple[GraphModule, list[Any]]] = []

    def catch(graph_module: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        caught.append((working_copy(graph_module), list(example_inputs)))
        if work is not None:
            work(*caught[-1])
        return graph_module.forward

    torch._dynamo.reset()
    torch.compile(function, backend=catch, fullgraph=True)(*inputs)
    (found,) = caught
    return found


def context(graph_module: GraphModule, **fields: Any) -> Context:
    """A context for a graph whose weights are attributes."""
    config = slope.SlopeConfig(**{**ALL, **fields})
    return Context(config, AttributeWeights(graph_module), EXPORT_FUSIONS)


def nodes(graph_module: GraphModule, target: Any) -> list[Node]:
    """Every call of a target, in bodies too."""
    return [
        node
        for region in regions(graph_module)
        for node in region.graph.nodes
        if node.op.startswith("call_") and node.target is target
    ]


def weight_node(linear: Node) -> Node:
    """What a linear reads as its weight."""
    node = linear.args[1]
    assert isinstance(node, Node)
    return node


def checked_run(graph_module: GraphModule, *inputs: Any) -> Any:
    """Run a graph node by node: it is valid, and the fake value of each node is true of what it really computes.

    Bodies of higher-order operators are checked with the operands they are called with.
    """
    graph_module.recompile()
    for region in regions(graph_module):
        region.graph.lint()
    bodies: dict[Node | None, Region] = {region.call: region for region in regions(graph_module) if region.entered}
    return _Checked(graph_module, bodies).run(*inputs)


class _Checked(Interpreter):
    def __init__(self, module: GraphModule, bodies: Mapping[Node | None, Region]) -> None:
        super().__init__(module)
        self.bodies = bodies
        self.carries_values = any(value(node) is not None for node in module.graph.nodes)

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        body = self.bodies.get(n)
        if body is not None:
            operands = [self.env[body.bindings[p]] for p in body.graph.nodes if p in body.bindings]
            with _surroundings(n):
                _Checked(body.module, self.bodies).run(*operands)
        if self.carries_values and isinstance(result, Tensor):
            fake = value(n)
            assert isinstance(fake, Tensor), f"{n.format_node()} carries no value"
            assert [_number(size) for size in fake.shape] == list(result.shape), f"shape of {n.format_node()}"
            assert fake.dtype == result.dtype, f"{n.format_node()}: {fake.dtype}, computed {result.dtype}"
        return result


def _number(size: Any) -> int:
    """A size, or the example behind a symbolic one."""
    return int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)


def _surroundings(call: Node) -> Any:
    """The autocast state in which a body runs."""
    if "autocast" in str(call.target):
        device, dtype, enabled = call.args[:3]
        return torch.autocast(str(device), dtype, enabled=bool(enabled))  # type: ignore[arg-type]
    return torch.autocast("cpu", enabled=False)


def lifted_inputs(program: ExportedProgram, *inputs: Any) -> list[Any]:
    """What the graph module of an exported program takes: its state, then the user's inputs."""
    state = [
        (program.state_dict | program.constants)[spec.target]
        for spec in program.graph_signature.input_specs
        if spec.target is not None
    ]
    return [*state, *inputs]


class Parameters(nn.Module):
    """A module with a weight and a bias that a function reads: ``function(x, w, b)``."""

    def __init__(self, function: Callable[..., Tensor], *weight: int, bias: int = 16) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(*weight, dtype=torch.float64))
        self.b = nn.Parameter(torch.randn(bias, dtype=torch.float64))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.w, self.b)


class Chain(nn.Module):
    """Linears one after the other, with a nonlinearity between them."""

    def __init__(self, *sizes: int, dtype: torch.dtype = torch.float64, bias: bool = True) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(K, N, bias=bias, dtype=dtype) for K, N in itertools.pairwise(sizes))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


class Siblings(nn.Module):
    """Three linears of the same activation, and one of their combination."""

    def __init__(self, width: int = 8, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(width, width, dtype=dtype) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(torch.tanh(self.q(x)) * self.k(x) + self.v(x))
        return y


def rows(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random activations."""
    return torch.randn(*shape, dtype=dtype)
