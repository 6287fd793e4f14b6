"""barriers: products that something between them keeps apart are not joined, and compute what they did."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import slope_compile as slope
from graphs import ALL, Siblings, rows
from recording import Recording, compiled, record
from recording import fresh_dynamo as fresh_dynamo
from slope_compile.passes.barriers import is_barrier
from slope_compile.passes.pipeline import FUSIONS
from slope_compile.schedule import adapters_of
from tolerances import assert_same

CAT = torch.ops.aten.cat.default
MANY = 64
"""Tokens for which joining products of width 8 pays."""
Between = Callable[[Tensor, Tensor], Any]


class Interrupted(Siblings):
    """Two siblings with something between them that sees their activation and the first one's product."""

    def __init__(self, between: Between) -> None:
        super().__init__()
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        x = x + 1
        q = self.q(x)
        self.between(x, q)
        y: Tensor = q * self.k(x) + x
        return y


def prepared(module: nn.Module, adapters: bool) -> nn.Module:
    """With adapters that are on and not zero, or without."""
    fields: dict[str, Any] = {**ALL, "adapter_rank": 2 if adapters else 0}
    slope.sparsify_(module, slope.SlopeConfig(**fields))
    for adapter in adapters_of(module):
        nn.init.normal_(adapter.B)
        adapter.enabled = True
    return module


def joined(recording: Recording) -> int:
    """Concatenations in what was compiled: of factors, or of values, patterns and biases."""
    return sum(one.after[CAT] for one in recording)


both_fusions = pytest.mark.parametrize("adapters", [True, False], ids=["fuse", "fuse_siblings"])

def _set_item(x: Tensor, q: Tensor) -> None:
    x[:1] = q[:1]


WRITES: dict[str, Between] = {
    "method": lambda x, q: x.add_(q),
    "operator": lambda x, q: operator.imul(x, q),  # type: ignore[no-untyped-call]
    "item": _set_item,
    "view": lambda x, q: x.view(-1).mul_(2),
    "out": lambda x, q: torch.add(x, q, out=x),
    "inplace": lambda x, q: F.relu(x, inplace=True),
    "inplace_by_position": lambda x, q: F.hardtanh(x, -0.5, 0.5, True),
    "aten": lambda x, q: torch.ops.aten.mul_.Tensor(x, q),
}


@both_fusions
@pytest.mark.parametrize("between", WRITES.values(), ids=WRITES)
def test_a_write_between_siblings(between: Between, adapters: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    recording = record(monkeypatch)
    module, x = prepared(Interrupted(between), adapters), rows(MANY, 8)
    with torch.no_grad():
        found = compiled(module, "eager", fullgraph=True, options={"fusions": FUSIONS})(x)
        assert_same(found, module(x))
    assert joined(recording) == 0


READS: dict[str, Between] = {
    "nothing": lambda x, q: None,
    "sum": lambda x, q: x + q,
    "relu": lambda x, q: F.relu(x),
    "not_inplace": lambda x, q: F.hardtanh(x, -0.5, 0.5, False),
}


@both_fusions
@pytest.mark.parametrize("between", READS.values(), ids=READS)
def test_what_only_reads_keeps_nobody_apart(between: Between, adapters: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Reader(Interrupted):
        def forward(self, x: Tensor) -> Tensor:
            q = self.q(x)
            read = self.between(x, q)
            y: Tensor = q * self.k(x)
            return y if read is None else y + read

    recording = record(monkeypatch)
    module, x = prepared(Reader(between), adapters), rows(MANY, 8)
    with torch.no_grad():
        found = compiled(module, "eager", fullgraph=True, options={"fusions": FUSIONS})(x)
        assert_same(found, module(x))
    assert joined(recording) > 0


class Modes(Siblings):
    """The first sibling in a mode of its own."""

    def __init__(self, mode: Callable[[], Any], dtype: torch.dtype) -> None:
        super().__init__(dtype=dtype)
        self.mode = mode

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        with self.mode():
            q = self.q(x)
        return q, self.k(x)


def gradients(tensors: Iterable[Tensor]) -> list[Tensor | None]:
    return [tensor.grad for tensor in tensors]


@both_fusions
def test_gradients_that_are_off_for_a_sibling(adapters: bool) -> None:
    module, x = prepared(Modes(torch.no_grad, torch.float64), adapters), rows(MANY, 8)
    run = compiled(module, "eager", fullgraph=True, options={"fusions": FUSIONS})
    run(x)[1].square().sum().backward()
    found = gradients(module.parameters())
    module.zero_grad()
    module(x)[1].square().sum().backward()
    expected = gradients(module.parameters())
    assert any(grad is not None for grad in expected)
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None and theirs is not None:
            assert_same(mine, theirs)


@both_fusions
def test_autocast_for_a_sibling(adapters: bool) -> None:
    module = prepared(Modes(lambda: torch.autocast("cpu", torch.bfloat16), torch.float32), adapters)
    x = rows(MANY, 8, dtype=torch.float32)
    with torch.no_grad():
        q, k = compiled(module, "eager", fullgraph=True, options={"fusions": FUSIONS})(x)
        assert q.dtype == torch.bfloat16
        assert_same(k, module(x)[1])


def test_a_call_for_its_effect_in_a_graph_without_values() -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    effect = graph.call_function(print, (x,))
    read = graph.call_function(torch.sin, (x,))
    graph.output(read)
    assert is_barrier(effect)
    assert not is_barrier(read)
