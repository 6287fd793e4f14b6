"""fuse_low_rank: up-projections inside the sparse products."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.fx import GraphModule

import slope_compile as slope
from graphs import ALL, Chain, Siblings, attribute_graph, checked_run, context, nodes, rows
from slope_compile.kernels import ops
from slope_compile.passes.low_rank import ADD
from slope_compile.passes.normalize import LINEAR
from slope_compile.passes.pipeline import run_passes
from slope_compile.schedule import adapters_of
from tolerances import assert_same

LOW_RANK = ("fuse", "fuse_low_rank")


def with_adapters(module: nn.Module, **fields: Any) -> nn.Module:
    """The module prepared, its adapters on and not zero."""
    slope.sparsify_(module, slope.SlopeConfig(**{**ALL, "adapter_rank": 2, **fields}))
    slope.set_adapters(module, True)
    for adapter in adapters_of(module):
        nn.init.normal_(adapter.B)
    return module


def rewritten(module: nn.Module, *inputs: torch.Tensor, fusions: tuple[str, ...] = LOW_RANK) -> tuple[GraphModule, int]:
    """The module's graph after all passes, and how many sums were fused."""
    graph_module = attribute_graph(module, *inputs)
    within = context(graph_module)
    within.fusions = frozenset(fusions)
    run_passes(graph_module, within)
    return graph_module, within.report.changes.get("fuse_low_rank", 0)


@pytest.mark.parametrize("make", [lambda: Chain(8, 12, 8), Siblings], ids=["chain", "siblings"])
def test_every_up_projection_goes_inside(make: Any) -> None:
    module, x = with_adapters(make()), rows(3, 8)
    layers = len(adapters_of(module))
    graph_module, changes = rewritten(module, x)
    assert changes == layers
    products = nodes(graph_module, ops.linear)
    assert [len(n.args) for n in products] == [10] * layers
    # What is left are down-projections.
    assert all(n.args[1] is not p.args[9] for n in nodes(graph_module, LINEAR) for p in products)
    assert_same(checked_run(graph_module, x), module(x))


def test_gradients_are_those_of_the_module() -> None:
    module, x = with_adapters(Chain(8, 12, 8)), rows(2, 3, 8)
    graph_module, _ = rewritten(module, x)
    expected = torch.autograd.grad(module(x).square().sum(), list(module.parameters()))
    named = dict(graph_module.named_parameters())
    found = torch.autograd.grad(graph_module(x).square().sum(), [named[name] for name, _ in module.named_parameters()])
    for a, b in zip(found, expected, strict=True):
        assert_same(a, b)


def test_off_by_name() -> None:
    module, x = with_adapters(Chain(8, 12, 8)), rows(3, 8)
    graph_module, changes = rewritten(module, x, fusions=("fuse",))
    assert changes == 0
    assert [len(n.args) for n in nodes(graph_module, ops.linear)] == [8, 8]
    assert_same(checked_run(graph_module, x), module(x))


def test_without_adapters_there_is_nothing_to_do() -> None:
    module, x = Chain(8, 12, 8), rows(3, 8)
    slope.sparsify_(module, slope.SlopeConfig(first_dense=False, heads_dense=False))
    assert rewritten(module, x)[1] == 0


class Residual(nn.Module):
    """A sum whose other side is no adapter, and one that somebody else reads too."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8, dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.layer(x)
        return y + x * 0.5


def test_other_sums_stay() -> None:
    module, x = with_adapters(Residual()), rows(3, 8)
    graph_module, changes = rewritten(module, x)
    assert changes == 1
    assert len(nodes(graph_module, ADD)) == 1
    assert_same(checked_run(graph_module, x), module(x))
