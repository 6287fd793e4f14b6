"""Adapter nodes of a transformed graph: inserted and removed without a trace, in the bodies of other graphs too."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import slope_compile as slope
from graphs import attribute_graph, checked_run
from slope_compile.adapter_nodes import has_adapters, set_adapter_nodes
from slope_compile.kernels import ops
from slope_compile.passes.graph import regions
from tolerances import assert_same

RANK, SCALE = 2, 0.7
# Exact gradients, so that differences of the output can be their oracle.
CONFIG = slope.SlopeConfig(
    adapter_rank=RANK, adapter_scale=SCALE, first_dense=False, heads_dense=False, backward="exact"
)


class Net(nn.Module):
    """A block that runs under a context manager, which an exported graph keeps as a graph in the graph."""

    def __init__(self, context: Callable[[], AbstractContextManager[object]] | None) -> None:
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)
        self.double()
        self.context = context

    def forward(self, x: Tensor) -> Tensor:
        if self.context is None:
            return self._block(x)
        with self.context():
            y = self._block(x)
        return y * 2

    def _block(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(torch.tanh(self.up(x)) * self.gate(x))
        return y


CONTEXTS = {
    "plain": None,
    "no_grad": torch.no_grad,
    # float64 is not cast; what matters is that the operator is there.
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}
every_context = pytest.mark.parametrize("context", CONTEXTS)


def graph_of(context: str) -> tuple[GraphModule, Tensor]:
    x = torch.randn(5, 8, dtype=torch.float64)
    return slope.transform(attribute_graph(Net(CONTEXTS[context]), x), CONFIG), x


def draw_B(graph: GraphModule) -> None:
    with torch.no_grad():
        for name, parameter in graph.named_parameters():
            if name.endswith("_adapter_B"):
                parameter.normal_()


def expected(graph: GraphModule, x: Tensor, adapted: bool) -> Tensor:
    """The net written out, with dense weights made of the graph's state."""

    def linear(path: str, x: Tensor) -> Tensor:
        values, pattern = graph.get_parameter(f"{path}.weight_values"), graph.get_buffer(f"{path}.weight_pattern")
        weight = torch.zeros(values.shape[0], values.shape[1] * 2, dtype=torch.float64)
        bits = torch.stack([(pattern[:, k // 8] >> (k % 8)) & 1 for k in range(weight.shape[1])], dim=1).bool()
        weight[bits] = values.detach().flatten()
        if adapted:
            A, B = (graph.get_parameter(f"{path}.weight_adapter_{name}").detach() for name in "AB")
            weight = weight + SCALE * B @ A
        return x @ weight.t() + graph.get_parameter(f"{path}.bias").detach()

    return linear("down", torch.tanh(linear("up", x)) * linear("gate", x))


@every_context
def test_on_and_off(context: str) -> None:
    graph, x = graph_of(context)
    draw_B(graph)
    factor = 1 if context == "plain" else 2
    entered = [region for region in regions(graph) if region.parent is not None and region.entered]
    assert bool(entered) == (context != "plain")
    codes = [region.module.code for region in regions(graph)]
    assert has_adapters(graph)
    for _ in range(2):
        assert_same(graph(x).detach(), factor * expected(graph, x, adapted=False))
        assert set_adapter_nodes(graph, True) == 3
        assert_same(graph(x).detach(), factor * expected(graph, x, adapted=True))
        assert_same(checked_run(graph, x).detach(), graph(x).detach())
        assert set_adapter_nodes(graph, False) == 3
        assert [region.module.code for region in regions(graph)] == codes


@every_context
def test_a_switch_that_is_none(context: str) -> None:
    graph, _ = graph_of(context)
    for on in (False, True):
        set_adapter_nodes(graph, on)
        codes = [region.module.code for region in regions(graph)]
        assert set_adapter_nodes(graph, on) == 3
        assert [region.module.code for region in regions(graph)] == codes


def test_gradients_reach_factors_and_activations() -> None:
    graph, x = graph_of("plain")
    draw_B(graph)
    slope.set_adapters(graph, True)
    x.requires_grad_()
    graph(x).square().sum().backward()
    named = {name: p for name, p in graph.named_parameters() if "_adapter_" in name}
    assert len(named) == 6
    for name, parameter in named.items():
        index = (0, 1)
        before = float(parameter.detach()[index])
        losses = []
        for shift in (1e-6, -1e-6):
            with torch.no_grad():
                parameter[index] = before + shift
                losses.append(float(expected(graph, x.detach(), adapted=True).square().sum()))
                parameter[index] = before
        assert parameter.grad is not None
        assert float(parameter.grad[index]) == pytest.approx((losses[0] - losses[1]) / 2e-6, rel=1e-5), name


def test_the_scale_survives_another_dtype() -> None:
    """It is stored as bits: ``module.bfloat16()`` would round a floating buffer."""
    graph, _ = graph_of("plain")
    slope.set_adapters(graph.bfloat16(), True)
    assert len([n for n in graph.graph.nodes if n.args[1:2] == (SCALE,)]) == 3


def test_graphs_without_adapters() -> None:
    x = torch.randn(5, 8, dtype=torch.float64)
    dense = attribute_graph(Net(None), x)
    sparse = slope.transform(dense, slope.SlopeConfig(first_dense=False, heads_dense=False))
    assert len([n for n in sparse.graph.nodes if n.target is ops.linear]) == 3
    for graph in (dense, sparse):
        assert not has_adapters(graph)
        assert set_adapter_nodes(graph, True) == 0
