"""The pipeline: all passes in their order on whole graphs, checks between them, and how their errors arrive."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, symbolic_trace
from torch.fx.passes.infra.pass_base import PassBase, PassResult
from torch.utils.checkpoint import checkpoint

import slope_compile as slope
from graphs import ALL, Siblings, attribute_graph, checked_run, context, dynamo_graph, nodes, rows
from masked import masks_of_prepared
from slope_compile.config import SlopeConfig
from slope_compile.dense_weights import DynamoWeights
from slope_compile.kernels import ops
from slope_compile.options import EXPORT_FUSIONS
from slope_compile.passes import pipeline
from slope_compile.passes.context import Context
from slope_compile.passes.graph import is_addmm, regions
from slope_compile.passes.normalize import LINEAR
from slope_compile.passes.pipeline import PIPELINE, run_passes
from slope_compile.report import Reason
from slope_compile.schedule import adapters_of
from tolerances import assert_same

FIELDS: dict[str, Any] = dict(ALL)

ORDER = ["decompose", "normalize", "select", "low_rank", "sparsify", "fuse"]
"""The passes that run unless asked otherwise."""
DENSE_CHANGES = dict(zip(ORDER, (0, 5, 5, 0, 5, 0), strict=True))


class Mixed(nn.Module):
    """Every pass has work to do: a spelled-out product, siblings, and in a checkpointed body another linear."""

    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        self.siblings = Siblings(8)
        self.last = nn.Linear(8, 16, dtype=torch.float64)
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> Tensor:
        x = self.siblings(x)
        y: Tensor = checkpoint(self.spelled, x, use_reentrant=False) if self.checkpointed else self.spelled(x)
        return y

    def spelled(self, x: Tensor) -> Tensor:
        return torch.tanh(x) @ self.last.weight.t() + self.last.bias


def with_adapters(module: nn.Module) -> nn.Module:
    """Prepared, with adapters that are on and not zero."""
    slope.sparsify_(module, SlopeConfig(**FIELDS, adapter_rank=2))
    slope.set_adapters(module, True)
    for adapter in adapters_of(module):
        nn.init.normal_(adapter.B)
    return module


def whole(function: Callable[..., Any], *inputs: Any) -> tuple[GraphModule, list[Any], Context]:
    """The pipeline on a graph from Dynamo; the inputs include those that were added."""
    config = SlopeConfig(**FIELDS)
    done = []

    def work(graph_module: GraphModule, real: list[Any]) -> None:
        weights = DynamoWeights(graph_module, real, config)
        within = Context(config, weights, EXPORT_FUSIONS)
        run_passes(graph_module, within)
        weights.commit(prepared=False)
        done.append((within, [get() for get in weights.extra]))

    graph_module, real = dynamo_graph(function, *inputs, work=work)
    within, extra = done[0]
    return graph_module, [*real, *extra], within


def check(graph_module: GraphModule, within: Context) -> None:
    """What the passes have to have done to ``Mixed`` with adapters."""
    assert list(within.report.changes) == ORDER
    assert [within.report.changes[name] for name in ("select", "low_rank", "sparsify")] == [5, 5, 5]
    assert within.report.changes["fuse"] == 1
    assert [d.reason for d in within.report] == [Reason.PREPARED] * 5
    assert len(nodes(graph_module, ops.linear)) == 5
    assert len(nodes(graph_module, LINEAR)) == 5 + 3, "five up-projections; one down-projection for q, k, v; two others"
    assert not nodes(graph_module, ops.expand)
    assert not [n for region in regions(graph_module) for n in region.graph.nodes if is_addmm(n)]


def test_order() -> None:
    assert [make.name for make in PIPELINE] == [*ORDER, "fuse_siblings", "fuse_low_rank"]


def test_exported_graph() -> None:
    module, x = with_adapters(Mixed()), rows(3, 8)
    graph_module = attribute_graph(module, x)
    within = context(graph_module)
    assert run_passes(graph_module, within) is graph_module, "in place"
    check(graph_module, within)
    assert_same(checked_run(graph_module, x), module(x))


@pytest.mark.parametrize("checkpointed", [pytest.param(False, id="plain"), pytest.param(True, id="checkpointed")])
def test_graph_from_dynamo(checkpointed: bool) -> None:
    module, x = with_adapters(Mixed(checkpointed)), rows(3, 8)
    graph_module, inputs, within = whole(module, x)
    check(graph_module, within)
    assert len(regions(graph_module)) == 1 + checkpointed
    assert_same(checked_run(graph_module, *inputs)[0], module(x))


@pytest.mark.parametrize("checkpointed", [pytest.param(False, id="plain"), pytest.param(True, id="checkpointed")])
def test_dense_graph_from_dynamo(checkpointed: bool) -> None:
    """The weights are pruned when all is done, with the masks that ``sparsify_`` picks."""
    module, x = Mixed(checkpointed), rows(3, 8)
    prepared = copy.deepcopy(module)
    slope.sparsify_(prepared, SlopeConfig(**FIELDS))
    masks = masks_of_prepared(prepared)
    graph_module, inputs, within = whole(module, x)
    assert within.report.changes == DENSE_CHANGES
    assert {path: module.get_parameter(f"{path}.weight") != 0 for path in masks}.keys() == masks.keys()
    assert all(torch.equal(module.get_parameter(f"{path}.weight") != 0, mask) for path, mask in masks.items())
    assert_same(checked_run(graph_module, *inputs)[0], prepared(x))


def test_symbolic_trace() -> None:
    """A graph without fake values, in which a linear is the call of a module."""
    module, x = Mixed(), rows(3, 8)
    graph_module = symbolic_trace(module)
    within = context(graph_module)
    run_passes(graph_module, within)
    assert within.report.changes == DENSE_CHANGES
    prepared = copy.deepcopy(module)
    slope.sparsify_(prepared, SlopeConfig(**FIELDS))
    assert_same(checked_run(graph_module, x), prepared(x))


def test_graph_without_linears() -> None:
    graph_module = symbolic_trace(nn.Tanh())
    before = str(graph_module.graph)
    within = context(graph_module)
    run_passes(graph_module, within)
    assert within.report.changes == dict.fromkeys(ORDER, 0)
    assert len(within.report) == 0
    assert str(graph_module.graph) == before


@pytest.mark.parametrize("prepared", [pytest.param(False, id="dense"), pytest.param(True, id="prepared")])
def test_second_run_changes_nothing(prepared: bool) -> None:
    """And says of every product that it has been rewritten already."""
    module, x = with_adapters(Mixed()) if prepared else Mixed(), rows(3, 8)
    graph_module = attribute_graph(module, x)
    run_passes(graph_module, context(graph_module))
    graph_module.recompile()
    expected, before = graph_module(x), str(graph_module.graph)
    state = {name: tensor.clone() for name, tensor in graph_module.state_dict().items()}
    within = context(graph_module, exclude=(".*",))  # the adapters' factors are parameters, and linears by now
    run_passes(graph_module, within)
    assert within.report.changes == dict.fromkeys(ORDER, 0)
    assert [d.reason for d in within.report.sparse] == [Reason.ALREADY_SPARSE] * 5
    assert str(graph_module.graph) == before
    assert all(torch.equal(tensor, state[name]) for name, tensor in graph_module.state_dict().items())
    graph_module.recompile()
    assert torch.equal(graph_module(x), expected)


# --- errors ----------------------------------------------------------------------------------------------------------


class Failing(PassBase):
    """Raises, or leaves the graph broken."""

    name = "failing"
    error: BaseException | None = None

    def __init__(self, context: Context) -> None:
        pass

    def call(self, graph_module: GraphModule) -> PassResult:
        if self.error is not None:
            raise self.error
        (product,) = nodes(graph_module, LINEAR)
        product.args = (product, *product.args[1:])  # reads itself
        return PassResult(graph_module, True)


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> type[Failing]:
    """A pass that fails, after the first of the pipeline."""
    monkeypatch.setattr(pipeline, "PIPELINE", (PIPELINE[0], Failing, *PIPELINE[1:]))
    monkeypatch.setattr(Failing, "error", None)
    return Failing


SLOPE_ERRORS = [slope.ConfigError("b.c: use 2:4"), slope.ConversionError("b.c: use 2:4"), slope.SlopeError("b.c")]


@pytest.mark.parametrize("error", [pytest.param(error, id=type(error).__name__) for error in SLOPE_ERRORS])
def test_an_error_of_ours_arrives_as_it_was_raised(failing: type[Failing], error: Exception) -> None:
    failing.error = error
    graph_module = attribute_graph(nn.Linear(8, 8), torch.randn(2, 8))
    with pytest.raises(type(error)) as caught:
        run_passes(graph_module, context(graph_module))
    assert caught.value is error
    assert caught.value.__cause__ is None, "the manager's own words are not shown above the message"
    assert caught.value.__suppress_context__


def test_the_cause_of_an_error_of_ours_is_kept(failing: type[Failing]) -> None:
    cause, error = KeyError("layers"), slope.ConversionError("no such layer")
    error.__cause__ = cause
    failing.error = error
    graph_module = attribute_graph(nn.Linear(8, 8), torch.randn(2, 8))
    with pytest.raises(slope.ConversionError) as caught:
        run_passes(graph_module, context(graph_module))
    assert caught.value is error
    assert caught.value.__cause__ is cause


def test_any_other_error_says_in_which_pass(failing: type[Failing]) -> None:
    failing.error = ZeroDivisionError("inside")
    graph_module = attribute_graph(nn.Linear(8, 8), torch.randn(2, 8))
    with pytest.raises(Exception, match="'Failing' pass") as caught:
        run_passes(graph_module, context(graph_module))
    assert caught.value.__cause__ is failing.error


def test_an_interrupt_is_not_caught(failing: type[Failing]) -> None:
    failing.error = KeyboardInterrupt()
    graph_module = attribute_graph(nn.Linear(8, 8), torch.randn(2, 8))
    with pytest.raises(KeyboardInterrupt):
        run_passes(graph_module, context(graph_module))


def test_a_broken_graph_is_noticed_behind_the_pass_that_broke_it(failing: type[Failing]) -> None:
    graph_module = attribute_graph(nn.Linear(8, 8), torch.randn(2, 8))
    with pytest.raises(Exception, match="'Failing' pass") as caught:
        run_passes(graph_module, context(graph_module))
    assert "before it has been defined" in str(caught.value.__cause__)


def test_an_error_of_ours_through_torch_compile(failing: type[Failing]) -> None:
    """Dynamo wraps what a backend raises: its message holds ours, and the weights are as they were."""
    failing.error = slope.ConversionError("b.c: use 2:4")
    module = Mixed()
    before = copy.deepcopy(module.state_dict())
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as caught:
        torch.compile(module, backend=slope.slope, options={"compiler": "eager"})(rows(3, 8))
    assert caught.value.inner_exception is failing.error
    assert "b.c: use 2:4" in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
