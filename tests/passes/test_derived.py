"""Weights that come from a parameter without being it: each has a decision that names the parameter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import slope_compile as slope
from graphs import attribute_graph, context, rows
from slope_compile.passes.normalize import Normalize
from slope_compile.passes.select import Select
from slope_compile.report import Reason, Report


class Experts(nn.Module):
    """Three experts ``[3, 8, 8]`` and a table of positions ``[1, 4, 8]``, read by ``product``."""

    def __init__(self, product: str) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(3, 8, 8, dtype=torch.float64))
        self.positions = nn.Parameter(torch.randn(1, 4, 8, dtype=torch.float64))
        self.product = product

    def forward(self, x: Tensor) -> Tensor:
        if self.product == "bmm":
            return torch.bmm(x.expand(3, 4, 8), self.experts.transpose(1, 2))
        if self.product == "einsum":
            return torch.einsum("tk,enk->etn", x, self.experts)
        if self.product == "matmul":
            return x @ self.experts.mT
        if self.product == "slices":
            return F.linear(x, self.experts[0]) + F.linear(x, self.experts[2])
        return torch.matmul(x, self.positions.mT)


def decided(module: nn.Module, x: Tensor) -> Report:
    graph = attribute_graph(module, x)
    within = context(graph)
    for make in (Normalize, Select):
        make(within)(graph)
    return within.report


@pytest.mark.parametrize(("product", "decisions"), [("bmm", 1), ("einsum", 1), ("matmul", 1), ("slices", 2)])
def test_experts_in_one_tensor_have_a_decision(product: str, decisions: int) -> None:
    report = decided(Experts(product), rows(4, 8))
    assert [(d.weight, d.reason, d.shape) for d in report] == [("experts", Reason.EXPERTS, (3, 8, 8))] * decisions
    assert all("experts that are linears of their own become sparse" in d.detail for d in report)


def test_a_table_with_three_dimensions_is_no_set_of_experts() -> None:
    assert len(decided(Experts("positions"), rows(4, 8))) == 0


class Parts(nn.Module):
    """A packed weight, whose halves are linears."""

    def __init__(self) -> None:
        super().__init__()
        self.packed = nn.Linear(8, 16, bias=False, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        up, gate = self.packed.weight.chunk(2)
        return F.linear(x, up) * F.linear(x, gate)


@pytest.mark.parametrize("prepared", [False, True])
def test_a_part_of_a_parameter_is_named_after_it(prepared: bool) -> None:
    model = Parts()
    if prepared:
        slope.sparsify_(model, slope.SlopeConfig(first_dense=False, heads_dense=False))
    report = decided(model, rows(4, 8))
    assert [(d.weight, d.reason) for d in report] == [("packed", Reason.COMPUTED)] * 2
    assert all("give the part a linear of its own" in d.why for d in report)


def test_any_other_computation_goes_by_the_name_of_its_node() -> None:
    class Computed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(8, 8, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, torch.tanh(self.w))

    (decision,) = decided(Computed(), rows(4, 8))
    assert (decision.weight, decision.reason, decision.detail) == ("tanh", Reason.COMPUTED, "")
