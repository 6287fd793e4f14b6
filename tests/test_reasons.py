"""Every reason for which a linear stays dense, triggered; the report and the README name the way out of each."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import slope_compile as slope
from graphs import exported
from prepared import blocks
from slope_compile import cost
from slope_compile.config import SlopeConfig
from slope_compile.report import WAYS_OUT, Reason, Report

ROOT = Path(__file__).resolve().parents[1]


class Weird(nn.Module):
    """Linears of every kind that stay dense (and one that does not)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 8)
        self.first, self.shared, self.excluded, self.parametrized, self.sliced, self.replaced, self.good = (
            nn.Linear(8, 8) for _ in range(7)
        )
        self.odd, self.whole, self.plain = nn.Linear(8, 6), nn.Linear(6, 8), nn.Linear(8, 8)
        self.moe: Any = nn.Module()
        self.moe.gate, self.moe.experts = nn.Linear(8, 4), nn.Module()
        self.moe.experts.up = nn.Parameter(torch.randn(4, 8, 8))
        self.complex = nn.Linear(8, 8, dtype=torch.complex64)
        self.lm_head = nn.Linear(8, 16, bias=False)
        self.tied = nn.Linear(8, 16, bias=False)
        self.tied.weight = self.embedding.weight
        self.again = self.shared
        parametrizations.weight_norm(self.parametrized)
        replaced: Any = self.replaced
        replaced.forward = lambda x: F.linear(x, self.replaced.weight)

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = self.first(self.embedding(ids))
        x = self.again(self.shared(x)) + self.excluded(x) + self.parametrized(x) + self.replaced(x)
        x = self.whole(self.odd(self.good(x)))
        x = x + F.linear(x, self.sliced.weight[:8].tanh()) + self.plain(x)
        x = torch.bmm(x.expand(4, *x.shape[-2:]), self.moe.experts.up) + self.moe.gate(x).sum()
        return self.lm_head(x), self.tied(x)


def graph_report(module: nn.Module, *args: Any, **fields: Any) -> Report:
    settings = {"first_dense": False, "heads_dense": False, **fields}
    program = slope.transform(exported(module, *args), SlopeConfig(**settings))
    report = program.graph_module.meta["slope_report"]
    assert isinstance(report, Report)
    return report


@functools.cache
def reasons_of_a_model() -> Report:
    return slope.sparsify_(Weird(), SlopeConfig(exclude=("excluded",)))


@functools.cache
def reasons_of_a_graph() -> Report:
    """With a linear in a branch, one whose weight is an input, a computed one, and one that reads a part."""

    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.good, self.branch, self.computed = (nn.Linear(8, 8) for _ in range(3))

        def forward(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            x = self.good(x) + F.linear(x, w) + F.linear(x, self.computed.weight.tanh())
            y: torch.Tensor = torch.cond(x.sum() > 0, lambda x: self.branch(x), lambda x: x.clone(), (x,))
            return y

    return graph_report(Graph(), torch.randn(2, 8), torch.randn(8, 8))


@functools.cache
def bare_product() -> Report:
    class Scores(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.good, self.positions, self.head = nn.Linear(8, 8), nn.Parameter(torch.randn(12, 8)), nn.Linear(12, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.head((self.good(x) @ self.positions.T).softmax(-1))
            return y

    return explained(Scores(), torch.randn(2, 8))


@functools.cache
def unprofitable() -> Report:
    program = exported(blocks(), torch.randn(2, 8))
    device = cost.Device("slow", peak=1e12, sparse_peak=1e3, bandwidth=1e12)
    with pytest.raises(slope.ConversionError) as error:
        slope.transform(program, SlopeConfig(first_dense=False, heads_dense=False), device=device)
    assert WAYS_OUT[Reason.UNPROFITABLE] in str(error.value)
    return Report([slope.Decision("0", False, Reason.UNPROFITABLE, detail=str(error.value))])


@functools.cache
def not_called() -> Report:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = blocks(), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.used(x)
            return y

    return explained(Unused(), torch.randn(2, 8))


def explained(model: nn.Module, *args: Any) -> Report:
    found = slope.explain(model, *args)
    for facts in found.linears:
        assert facts.sparse or f"{facts.reason.value}: to change it, {facts.way_out}" in str(found)
    return Report([slope.Decision(f.path, f.sparse, f.reason, detail=f.why) for f in found.linears])


@functools.cache
def frozen() -> Report:
    with torch.no_grad(), torch._inductor.config.patch(freezing=True):
        return explained(blocks(), torch.randn(2, 8))


@functools.cache
def a_subclass() -> Report:
    class Wrapped(nn.Parameter):
        pass

    model: Any = blocks()
    model[2].weight = Wrapped(model[2].weight.detach())
    return slope.sparsify_(model)


@functools.cache
def fused_operator() -> Report:
    class Native(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.good, self.qkv, self.out = nn.Linear(8, 8), nn.Linear(8, 24), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x, weights = self.good(x), (self.qkv.weight, self.qkv.bias, self.out.weight, self.out.bias)
            native: Any = torch._native_multi_head_attention
            result: torch.Tensor = native(x, x, x, 8, 2, *weights, None, True)[0]
            return result

    with torch.no_grad():
        return explained(Native().eval(), torch.randn(2, 3, 8))


REASON_CASES: dict[Reason, tuple[Callable[[], Report], str]] = {
    Reason.FIRST: (reasons_of_a_model, "first"),
    Reason.HEAD: (reasons_of_a_model, "lm_head"),
    Reason.ROUTER: (reasons_of_a_model, "moe.gate"),
    Reason.EXPERTS: (reasons_of_a_model, "moe.experts.up"),
    Reason.EXCLUDED: (reasons_of_a_model, "excluded"),
    Reason.TIED: (reasons_of_a_model, "tied"),
    Reason.SHARED: (reasons_of_a_model, "shared"),
    Reason.SHAPE: (reasons_of_a_model, "whole"),
    Reason.DTYPE: (reasons_of_a_model, "complex"),
    Reason.PARAMETRIZED: (reasons_of_a_model, "parametrized"),
    Reason.FORWARD_REPLACED: (reasons_of_a_model, "replaced"),
    Reason.SUBCLASS: (a_subclass, "2"),
    Reason.COMPUTED: (reasons_of_a_graph, "tanh"),
    Reason.BARE: (bare_product, "positions"),
    Reason.NOT_CONSTANT: (reasons_of_a_graph, "w"),
    Reason.FROZEN: (frozen, ""),
    Reason.HIGHER_ORDER: (reasons_of_a_graph, "p_branch_weight"),
    Reason.FUSED_OPERATOR: (fused_operator, "qkv"),
    Reason.EAGER: (not_called, "unused"),
    Reason.UNPROFITABLE: (unprofitable, "0"),
}
"""Reason -> (a report that has it, the linear that it is about; "" where a graph names it as it likes)."""
SPARSE = {Reason.SELECTED, Reason.PREPARED, Reason.ALREADY_SPARSE}


@pytest.mark.parametrize("reason", REASON_CASES, ids=lambda reason: reason.name)
def test_reason(reason: Reason) -> None:
    make, path = REASON_CASES[reason]
    report = make()
    decision = next(d for d in report if d.weight == path or (not path and d.reason is reason))
    assert decision.weight
    assert (decision.reason, decision.sparse) == (reason, False)
    assert decision.way_out == WAYS_OUT[reason]
    text = str(report)
    assert f"{reason.value}: to change it, {decision.way_out}" in text
    assert decision.why.split("\n")[0] in text


def test_every_reason_has_a_case_and_every_refusal_a_way_out() -> None:
    assert REASON_CASES.keys() | SPARSE == set(Reason)
    assert WAYS_OUT.keys() == REASON_CASES.keys()


def test_the_ways_out_are_in_the_json_of_an_explanation() -> None:
    found = json.loads(slope.explain(blocks(), torch.randn(2, 8)).to_json())
    assert [one["way_out"] for one in found["linears"]] == [WAYS_OUT[Reason.FIRST], "", "", WAYS_OUT[Reason.HEAD]]


def test_the_readme_lists_them() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = [f"| {reason.value} | {WAYS_OUT[reason]} |" for reason in WAYS_OUT]
    assert "\n".join(rows) in text, "\n".join(rows)


def test_the_readme_lists_the_public_names() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8").split("## Public names")[1].split("## Limits")[0]
    assert [name for name in slope.__all__ if f"`{name}`" not in text] == []
