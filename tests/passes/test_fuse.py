"""fuse: the down-projections of siblings become one product."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils.checkpoint import checkpoint

import slope_compile as slope
from graphs import ALL, Chain, Siblings, attribute_graph, checked_run, context, dynamo_graph, nodes, rows
from slope_compile.config import SlopeConfig
from slope_compile.dense_weights import DynamoWeights
from slope_compile.options import EXPORT_FUSIONS
from slope_compile.passes.context import Context
from slope_compile.passes.graph import value
from slope_compile.passes.normalize import LINEAR
from slope_compile.passes.pipeline import run_passes
from slope_compile.schedule import adapters_of
from tolerances import assert_same

CAT, SLICE = torch.ops.aten.cat.default, torch.ops.aten.slice.Tensor


def with_adapters(module: nn.Module, **fields: Any) -> nn.Module:
    """The module prepared, its adapters on and not zero."""
    slope.sparsify_(module, SlopeConfig(**{**ALL, "adapter_rank": 2, **fields}))
    slope.set_adapters(module, True)
    for adapter in adapters_of(module):
        nn.init.normal_(adapter.B)
    return module


def downs(graph_module: GraphModule) -> list[tuple[int, ...]]:
    """Shapes of the factors of the products that are down-projections (rank below width)."""
    factors = [n.args[1] for n in nodes(graph_module, LINEAR)]
    values = [value(n) for n in factors if isinstance(n, torch.fx.Node)]
    shapes = [tuple(v.shape) for v in values]
    return [shape for shape in shapes if shape[0] < shape[1]]


def test_siblings_share_one_down_projection() -> None:
    module, x = with_adapters(Siblings()), rows(3, 8)
    graph_module = attribute_graph(module, x)
    within = run_all(graph_module)
    assert within.report.changes["fuse"] == 1
    assert sorted(downs(graph_module)) == [(2, 8), (6, 8)], "one for q, k and v; one for out"
    assert len(nodes(graph_module, CAT)) == 1
    assert len(nodes(graph_module, SLICE)) == 3
    assert_same(checked_run(graph_module, x), module(x))


def run_all(graph_module: GraphModule, **fields: Any) -> Context:
    within = context(graph_module, **fields)
    run_passes(graph_module, within)
    return within


def test_ranks_may_differ() -> None:
    ranks = (slope.Override(path="k", adapter_rank=3), slope.Override(path="v", adapter_rank=1))
    module, x = with_adapters(Siblings(), overrides=ranks), rows(2, 3, 8)
    graph_module = attribute_graph(module, x)
    run_all(graph_module)
    assert sorted(downs(graph_module)) == [(2, 8), (6, 8)]
    assert [n.args[2:] for n in nodes(graph_module, SLICE)] == [(0, 2), (2, 5), (5, 6)]
    assert_same(checked_run(graph_module, x), module(x))


def test_gradients_of_the_factors_are_their_own() -> None:
    module, x = with_adapters(Siblings()), rows(3, 8)
    graph_module = attribute_graph(module, x)
    run_all(graph_module)
    graph_module.recompile()
    expected = torch.autograd.grad(module(x).square().sum(), list(module.parameters()))
    named = dict(graph_module.named_parameters())
    found = torch.autograd.grad(
        graph_module(x).square().sum(), [named[name] for name, _ in module.named_parameters()]
    )
    for a, b in zip(found, expected, strict=True):
        assert_same(a, b)


@pytest.mark.parametrize(
    "module",
    [
        pytest.param(lambda: with_adapters(Chain(8, 8, 8)), id="no_siblings"),
        pytest.param(lambda: Siblings(), id="no_adapters"),
    ],
)
def test_nothing_to_fuse(module: Callable[[], nn.Module]) -> None:
    x = rows(3, 8)
    graph_module = attribute_graph(module(), x)
    within = run_all(graph_module)
    assert within.report.changes["fuse"] == 0
    assert not nodes(graph_module, CAT)


def test_products_of_different_activations_stay_apart() -> None:
    class Two(Siblings):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.q(x) + self.k(x + 1) + self.v(x) + self.out(x + 1)
            return y

    module, x = with_adapters(Two()), rows(3, 8)
    graph_module = attribute_graph(module, x)
    within = run_all(graph_module)
    assert within.report.changes["fuse"] == 1
    assert sorted(downs(graph_module)) == [(2, 8), (2, 8), (4, 8)]
    assert_same(checked_run(graph_module, x), module(x))


def test_inside_a_checkpointed_body() -> None:
    module, x = with_adapters(Siblings()), rows(3, 8)

    def forward(x: Tensor) -> Tensor:
        y = checkpoint(module, x, use_reentrant=False)
        assert isinstance(y, Tensor)
        return y

    graph_module, inputs = dynamo_graph(forward, x)
    config = SlopeConfig(first_dense=False)
    within = Context(config, DynamoWeights(graph_module, inputs, config), EXPORT_FUSIONS)
    run_passes(graph_module, within)
    assert within.report.changes["fuse"] == 1
    (cat,) = nodes(graph_module, CAT)
    assert cat.graph is not graph_module.graph
    assert_same(checked_run(graph_module, *inputs)[0], module(x))


def test_last_dimension_is_split_whatever_the_batch_is() -> None:
    """With a symbolic batch the parts are still slices of features."""
    module = with_adapters(Siblings())
    dynamic = ({0: torch.export.Dim("batch")},)
    program = slope.transform(torch.export.export(module, (rows(3, 8),), dynamic_shapes=dynamic))
    assert len(nodes(program.graph_module, CAT)) == 1
    for batch in (1, 5):
        x = rows(batch, 8)
        assert_same(program.module()(x), module(x))
