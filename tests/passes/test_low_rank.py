"""low_rank: the product with ``S + s B A`` distributed, in both orientations and across the boundary of a body."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from graphs import attribute_graph, checked_run, context, dynamo_graph, nodes, rows, weight_node
from slope_compile.config import SlopeConfig
from slope_compile.dense_weights import DynamoWeights
from slope_compile.kernels import ops
from slope_compile.options import EXPORT_FUSIONS
from slope_compile.passes.context import Context, Selection
from slope_compile.passes.graph import META, is_addmm, is_expand, strip_transposes
from slope_compile.passes.low_rank import ADD, DOWN, MUL, DistributeLowRank
from slope_compile.passes.normalize import LINEAR, Normalize
from slope_compile.passes.select import Select
from tolerances import assert_same

N, K, R = 12, 8, 2


class Adapted(nn.Module):
    """A weight with an adapter, dense or expanded, as a linear's ``[N, K]`` or a Conv1D's ``[K, N]``."""

    pattern: Tensor

    def __init__(self, scale: float, transposed: bool = False, prepared: bool = False) -> None:
        super().__init__()
        self.scale, self.transposed, self.prepared = scale, transposed, prepared
        shape = (N, K // 2) if prepared else (K, N) if transposed else (N, K)
        self.weight = nn.Parameter(rows(*shape))
        self.A, self.B, self.bias = (nn.Parameter(rows(*size)) for size in ((R, K), (N, R), (N,)))
        self.register_buffer("pattern", torch.full((N, 1), 0b00111001, dtype=torch.uint8))

    def adapted(self) -> Tensor:
        weight: Tensor = self.weight
        if self.prepared:
            weight = ops.expand(weight, self.pattern, 2, 4)
            weight = weight.t() if self.transposed else weight
        if self.transposed:
            return torch.addmm(weight, self.A.t(), self.B.t(), alpha=self.scale)
        return torch.addmm(weight, self.B, self.A, alpha=self.scale)

    def forward(self, x: Tensor) -> Tensor:
        if self.transposed:
            return torch.addmm(self.bias, x, self.adapted())
        return F.linear(x, self.adapted(), self.bias)


def selected(graph_module: GraphModule, within: Context) -> Context:
    """Everything that comes before the pass under test."""
    Normalize(within)(graph_module)
    Select(within)(graph_module)
    return within


SCALES = [pytest.param(1.0, id="scale_1"), pytest.param(0.25, id="scale_quarter"), pytest.param(3.0, id="scale_3")]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("transposed", [pytest.param(False, id="linear"), pytest.param(True, id="conv1d")])
@pytest.mark.parametrize("prepared", [pytest.param(False, id="dense"), pytest.param(True, id="prepared")])
def test_product_is_distributed(scale: float, transposed: bool, prepared: bool) -> None:
    module, x = Adapted(scale, transposed, prepared), rows(5, K)
    graph_module = attribute_graph(module, x)
    within = selected(graph_module, context(graph_module))
    result = DistributeLowRank(within)(graph_module)
    assert result is not None
    assert result.modified
    assert within.report.changes["low_rank"] == 1
    assert not any(is_addmm(n) for n in graph_module.graph.nodes), "the weight's sum is gone"
    assert len(nodes(graph_module, LINEAR)) == 3
    (main,) = (n for n in nodes(graph_module, LINEAR) if isinstance(n.meta.get(META), Selection))
    base, flipped = strip_transposes(weight_node(main))
    assert is_expand(base) if prepared else base.op == "get_attr"
    assert flipped is (transposed and not prepared), "what is prepared is expanded as [N, K] already"
    (down,) = (n for n in nodes(graph_module, LINEAR) if n.meta.get(META) == DOWN)
    assert down.meta["val"].shape == (5, R)
    assert_same(checked_run(graph_module, x), module(x))


def test_scale_is_a_multiplication_not_an_argument_of_add() -> None:
    """``add(a, x @ w, alpha=s)`` compiled by Inductor loses alpha (torch 2.11 to 2.13): silently wrong numbers."""
    module, x = Adapted(0.25), rows(5, K)
    graph_module = attribute_graph(module, x)
    DistributeLowRank(selected(graph_module, context(graph_module)))(graph_module)
    (add,) = nodes(graph_module, ADD)
    assert add.kwargs.get("alpha", 1) == 1
    assert len(add.args) == 2
    (mul,) = nodes(graph_module, MUL)
    assert mul.args[1] == 0.25


@pytest.mark.slow
def test_scale_survives_inductor() -> None:
    module, x = Adapted(0.25), rows(5, K)
    graph_module = attribute_graph(module, x)
    DistributeLowRank(selected(graph_module, context(graph_module)))(graph_module)
    graph_module.recompile()
    with torch.no_grad():
        assert_same(torch.compile(graph_module)(x), module(x))


def test_gradients_are_those_of_the_sum() -> None:
    module, x = Adapted(0.5, transposed=True), rows(5, K)
    graph_module = attribute_graph(module, x)
    DistributeLowRank(selected(graph_module, context(graph_module)))(graph_module)
    graph_module.recompile()
    expected = torch.autograd.grad(module(x).square().sum(), list(module.parameters()))
    named = dict(graph_module.named_parameters())
    found = torch.autograd.grad(
        graph_module(x).square().sum(), [named[name] for name, _ in module.named_parameters()]
    )
    for a, b in zip(found, expected, strict=True):
        assert_same(a, b)


def weight_outside(module: Adapted) -> Callable[[Tensor], Tensor]:
    """The weight's sum is computed before a checkpointed function, the product inside."""

    def forward(x: Tensor) -> Tensor:
        weight = module.adapted()
        product = torch.matmul if module.transposed else F.linear
        y = checkpoint(product, x, weight, use_reentrant=False)
        assert isinstance(y, Tensor)
        return y

    return forward


def weight_inside(module: Adapted) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        y = checkpoint(module, x, use_reentrant=False)
        assert isinstance(y, Tensor)
        return y

    return forward


@pytest.mark.parametrize(
    "function", [pytest.param(weight_inside, id="inside"), pytest.param(weight_outside, id="outside")]
)
@pytest.mark.parametrize("transposed", [pytest.param(False, id="linear"), pytest.param(True, id="conv1d")])
@pytest.mark.parametrize("prepared", [pytest.param(False, id="dense"), pytest.param(True, id="prepared")])
def test_inside_a_body(
    function: Callable[[Adapted], Callable[[Tensor], Tensor]], transposed: bool, prepared: bool
) -> None:
    module, x = Adapted(0.5, transposed, prepared), rows(5, K)
    forward = function(module)
    graph_module, inputs = dynamo_graph(forward, x)
    config = SlopeConfig(first_dense=False, heads_dense=False)
    within = selected(graph_module, Context(config, DynamoWeights(graph_module, inputs, config), EXPORT_FUSIONS))
    DistributeLowRank(within)(graph_module)
    assert within.report.changes["low_rank"] == 1
    assert not nodes(graph_module, torch.addmm), "nor is the sum left outside, as an operand that nobody reads"
    assert all(n.graph is not graph_module.graph for n in nodes(graph_module, LINEAR))
    assert_same(checked_run(graph_module, *inputs)[0], forward(x))


def test_linear_that_was_not_selected_keeps_its_sum() -> None:
    module, x = Adapted(0.5), rows(5, K)
    graph_module = attribute_graph(module, x)
    within = selected(graph_module, context(graph_module, include=()))
    result = DistributeLowRank(within)(graph_module)
    assert result is not None
    assert not result.modified
    assert within.report.changes["low_rank"] == 0
    assert len(nodes(graph_module, torch.ops.aten.addmm.default)) == 1


def test_weight_without_an_adapter_is_left_alone() -> None:
    graph_module = attribute_graph(nn.Linear(K, N), torch.randn(2, K))
    within = selected(graph_module, context(graph_module))
    before = str(graph_module.graph)
    result = DistributeLowRank(within)(graph_module)
    assert result is not None
    assert not result.modified
    assert str(graph_module.graph) == before
