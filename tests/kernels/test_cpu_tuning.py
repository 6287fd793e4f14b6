"""The measured choice between the 2:4 kernels and dense products, and the rule where nothing was measured."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from slope_compile.kernels import (
    cpu_build,
    cpu_calls,
    cpu_library,
    cpu_ops,
    cpu_products,
    cpu_rules,
    cpu_tuning,
    dense_copies,
    measured,
    reference,
)
from slope_compile.kernels.cpu_library import CpuLibrary
from slope_compile.kernels.cpu_tuning import Entry, Table
from slope_compile.lowering import OR_COPY, lowering
from slope_compile.pattern import Pattern


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No table of this machine is read or written."""
    monkeypatch.setattr("slope_compile.kernels.cache_files.cache_folder", lambda: tmp_path)
    cpu_tuning.load.cache_clear()
    yield
    cpu_tuning.load.cache_clear()


@pytest.fixture
def library() -> CpuLibrary:
    found = cpu_library.load()
    if found is None:
        pytest.skip("no CPU library: no C++ compiler, or switched off")
    return found


def test_the_rule_without_measurements() -> None:
    assert cpu_rules.sparse("forward", 1, 768, 768, torch.float32, "avx2")
    assert cpu_rules.sparse("grad_input", 512, 768, 768, torch.float16, "avx512")
    assert cpu_rules.sparse("grad_weight", 8, 768, 768, torch.float32, "portable")
    assert not cpu_rules.sparse("grad_weight", 16, 768, 768, torch.float32, "portable")
    assert cpu_rules.sparse("grad_weight", 64, 768, 768, torch.float32, "portable")
    for isa in ("avx2", "avx512"):
        assert cpu_rules.sparse("grad_weight", 16, 768, 768, torch.float32, isa)
    # Dense bfloat16 has instructions of its own there.
    for M in (1, 64, 512):
        for op in ("forward", "grad_input", "grad_input_columns", "grad_weight"):
            assert cpu_rules.sparse(op, M, 768, 768, torch.bfloat16, "avx512_bf16")
    assert cpu_rules.sparse("forward", 512, 768, 768, torch.bfloat16, "avx2")


def test_what_was_measured_decides() -> None:
    entries = (
        Entry("forward", "float32", 1, 768, 768, 2.0),
        Entry("forward", "float32", 64, 768, 768, 0.5),
        Entry("forward", "float32", 1024, 768, 768, 1.5),
    )
    cpu_tuning.save(Table(torch.get_num_threads(), entries), "avx2")
    # The nearest number of tokens by ratio: 8 lies as near to 1 as to 64.
    for M, expected in ((1, True), (7, True), (9, False), (200, False), (300, True), (10**6, True), (0, True)):
        assert cpu_rules.sparse("forward", M, 768, 768, torch.float32, "avx2") is expected, M
    # What was not measured goes by the rule: other products, dtypes, levels.
    assert cpu_rules.sparse("grad_input", 64, 768, 768, torch.float32, "avx2")
    assert cpu_rules.sparse("forward", 64, 768, 768, torch.bfloat16, "avx2")
    assert cpu_rules.sparse("forward", 64, 768, 768, torch.float32, "portable")


def test_the_nearest_weight_decides() -> None:
    entries = tuple(
        Entry("forward", "float32", tokens, N, K, speedup)
        for N, K, speedup in ((768, 768, 2.0), (4096, 4096, 0.5), (768, 3072, 0.6))
        for tokens in (1, 64)
    )
    cpu_tuning.save(Table(torch.get_num_threads(), entries), "avx2")
    for N, K, expected in (
        (768, 768, True), (64, 64, True), (1000, 700, True), (0, 768, True),
        (4096, 4096, False), (11008, 4096, False), (768, 3072, False), (700, 2500, False),
    ):  # fmt: skip
        for M in (1, 100):
            assert cpu_rules.sparse("forward", M, N, K, torch.float32, "avx2") is expected, (M, N, K)


def test_what_was_decided_is_remembered_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "MOST", 3)
    table = Table(1, (Entry("forward", "float32", 64, 768, 768, 0.5),))
    for _ in range(2):
        for M in range(10):
            assert table.sparse("forward", M, 768, 768, torch.float32) is False
            assert table.sparse("forward", M, 768, 768, torch.bfloat16) is None
            assert len(table._answers) <= 3


def test_a_table_holds_for_the_kernels_that_it_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """New kernels, or another model of CPU with the same features, are measured anew."""
    entries = (Entry("forward", "float32", 64, 768, 768, 0.5),)
    cpu_tuning.save(Table(torch.get_num_threads(), entries), "avx2")
    assert not cpu_rules.sparse("forward", 64, 768, 768, torch.float32, "avx2")

    def found() -> bool:
        cpu_tuning.load.cache_clear()
        return cpu_tuning.load("avx2", torch.get_num_threads()) is not None

    assert found()
    with monkeypatch.context() as patch:
        patch.setattr(cpu_build, "cpu_model", lambda: "another CPU")
        assert not found()
    sources = shutil.copytree(cpu_build.SOURCE.parent, tmp_path / "csrc")
    monkeypatch.setattr(cpu_build, "SOURCE", sources / cpu_build.SOURCE.name)
    assert found(), "the same in another place"
    header = sources / "product.h"
    header.write_text(header.read_text() + "// changed\n")
    assert not found()


def test_another_number_of_threads_is_another_table() -> None:
    threads = torch.get_num_threads()
    cpu_tuning.save(Table(threads + 1, (Entry("forward", "float32", 64, 768, 768, 0.1),)), "avx2")
    assert cpu_rules.sparse("forward", 64, 768, 768, torch.float32, "avx2")


@pytest.mark.parametrize("text", ["", "{}", '{"threads": 1, "entries": [{"op": "forward"}]}'])
def test_a_damaged_table_is_said_and_ignored(text: str, caplog: pytest.LogCaptureFixture) -> None:
    cpu_tuning.table_path("avx2", torch.get_num_threads()).write_text(text)
    with caplog.at_level(logging.WARNING, "slope_compile"):
        assert cpu_rules.sparse("forward", 64, 768, 768, torch.float32, "avx2")
        assert cpu_rules.sparse("forward", 64, 768, 768, torch.float32, "avx2")
    (record,) = caplog.records
    assert "slope-compile tune" in record.getMessage()


def test_measuring(library: CpuLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_tuning, "TOKENS", (1, 20))
    monkeypatch.setattr(cpu_tuning, "SHAPES", ((16, 24),))
    monkeypatch.setattr(cpu_tuning, "SLOW_SECONDS", 60.0)
    entries = list(cpu_tuning.measure(library))
    assert {(e.op, e.dtype, e.tokens, e.N, e.K) for e in entries} == {
        (op, dtype, tokens, 16, 24) for op in cpu_tuning.OPS for dtype in cpu_tuning.DTYPES for tokens in (1, 20)
    }
    assert all(0 < e.speedup < float("inf") for e in entries)
    path = cpu_tuning.save(Table(3, tuple(entries)), library.isa)
    assert path == cpu_tuning.table_path(library.isa, 3)
    assert cpu_tuning.load(library.isa, 3) == Table(3, tuple(entries))


def test_slow_products_are_not_measured_with_more_tokens(
    library: CpuLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_tuning, "TOKENS", (1, 20))
    monkeypatch.setattr(cpu_tuning, "SHAPES", ((16, 24), (24, 16)))
    monkeypatch.setattr(cpu_tuning, "SLOW_SECONDS", 0.0)
    assert {e.tokens for e in cpu_tuning.measure(library)} == {1}


def test_both_ways_agree(library: CpuLibrary) -> None:
    """Whatever is chosen, the numbers are the same to rounding."""
    problem = cpu_tuning._Problem(24, 36, torch.float32)
    for op in cpu_tuning.OPS:
        kernel, dense = problem.ways(library, op, 9)
        a, b = kernel(), dense()
        assert isinstance(a, torch.Tensor)
        assert isinstance(b, torch.Tensor)
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_the_choice_reaches_the_operators(library: CpuLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[bool] = []
    for name in ("forward", "grad_input", "grad_weight"):
        original = getattr(cpu_products, name)

        def watched(
            lib: CpuLibrary, sparse: bool, *args: torch.Tensor, original: object = original, **low_rank: None
        ) -> torch.Tensor:
            chosen.append(sparse)
            assert callable(original)
            result: torch.Tensor = original(lib, sparse, *args, **low_rank)
            return result

        monkeypatch.setattr(cpu_products, name, watched)
    p = cpu_tuning._Problem(16, 24, torch.float32)
    x, grad = p.numbers(32, 24), p.numbers(32, 16)
    for speedup in (2.0, 0.5):
        entries = tuple(Entry(op, "float32", 32, 16, 24, speedup) for op in cpu_tuning.OPS)
        cpu_tuning.save(Table(torch.get_num_threads(), entries), library.isa)
        cpu_ops.linear(x, p.values, p.pattern, None, 2, 4)
        cpu_ops.grad_input(grad, p.values, p.pattern, 2, 4)
        cpu_ops.grad_input_columns(grad, p.values, p.pattern, p.column_mask, 2, 4)
        cpu_ops.grad_weight(grad, x, p.pattern, 2, 4)
    assert chosen == [True] * 4 + [False] * 4


# --- copies ---------------------------------------------------------------------------------------------


@pytest.fixture
def copies_win(library: CpuLibrary) -> Iterator[None]:
    """A machine on which a copy of the dense weight was measured to be faster, for 32 tokens and not for one."""
    entries = (
        Entry("forward", "float32", 1, 16, 24, 2.0, over_copy=0.96),
        Entry("forward", "float32", 32, 16, 24, 2.0, over_copy=0.5),
    )
    cpu_tuning.save(Table(torch.get_num_threads(), entries), library.isa)
    dense_copies.forget()
    yield
    dense_copies.forget()


class Forward:
    """Forward products of one weight, as operators or as compiled code calls them."""

    def __init__(self, direct: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        self.direct = direct
        self.p = cpu_tuning._Problem(16, 24, torch.float32)
        self.kernels = 0
        original = cpu_products.forward

        def counted(*args: Any, **kwargs: Any) -> torch.Tensor:
            self.kernels += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(cpu_products, "forward", counted)

    def ways(self, times: int, M: int = 32) -> str:
        """What computed each of some products: k(ernel) or c(opy).  Every result is checked."""
        found = ""
        for _ in range(times):
            x, bias, down, up = (self.p.numbers(*s) for s in ((M, 24), (16,), (M, 3), (16, 3)))
            before = self.kernels
            if self.direct:
                y = cpu_calls.linear_low_rank(
                    x, self.p.values, self.p.pattern, down, up, bias, out=torch.full((M, 16), torch.nan)
                )
            else:
                y = cpu_ops.linear(x, self.p.values, self.p.pattern, bias, 2, 4, down=down, up=up)
            weight = reference.expand(self.p.values, self.p.pattern, 2, 4)
            torch.testing.assert_close(y, x @ weight.t() + bias + down @ up.t(), rtol=1e-5, atol=1e-5)
            found += "k" if self.kernels > before else "c"
        return found


@pytest.fixture(params=["operators", "compiled code"])
def forward(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Forward:
    return Forward(request.param == "compiled code", monkeypatch)


@pytest.mark.usefixtures("copies_win")
def test_a_copy_serves_a_weight_that_does_not_change(forward: Forward) -> None:
    assert forward.ways(5) == "kkccc"
    assert forward.ways(2, M=1) == "kk", "a near tie is none"
    forward.p.values.mul_(2)
    assert forward.ways(4) == "kkcc"


@pytest.mark.usefixtures("copies_win")
@pytest.mark.parametrize("gradient", ["grad_input", "grad_input_columns", "grad_weight"])
def test_training_keeps_no_copy(forward: Forward, gradient: str) -> None:
    """Not over micro-batches, of which each is computed and recomputed."""
    p, x, grad, dx, dv = forward.p, torch.randn(32, 24), torch.randn(32, 16), torch.empty(32, 24), torch.empty(16, 12)
    calls: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "grad_input": (
            lambda: cpu_ops.grad_input(grad, p.values, p.pattern, 2, 4),
            lambda: cpu_calls.grad_input(grad, p.values, p.pattern, out=dx),
        ),
        "grad_input_columns": (
            lambda: cpu_ops.grad_input_columns(grad, p.values, p.pattern, p.column_mask, 2, 4),
            lambda: cpu_calls.grad_input_columns(grad, p.values, p.pattern, p.column_mask, out=dx),
        ),
        "grad_weight": (
            lambda: cpu_ops.grad_weight(grad, x, p.pattern, 2, 4),
            lambda: cpu_calls.grad_weight(grad, x, p.pattern, out=dv),
        ),
    }
    for _ in range(3):
        assert forward.ways(2) == "kk"
        calls[gradient][forward.direct]()
    assert forward.ways(3) == "kkc"
    calls[gradient][forward.direct]()
    assert dense_copies.count() == 0


def test_nobody_gets_a_copy_unasked(library: CpuLibrary, forward: Forward) -> None:
    assert forward.ways(5) == "kkkkk"
    cpu_tuning.save(Table(torch.get_num_threads(), (Entry("forward", "float32", 32, 16, 24, 2.0),)), library.isa)
    assert forward.ways(5) == "kkkkk"
    assert dense_copies.count() == 0


@pytest.mark.usefixtures("copies_win")
def test_what_runs_is_said(library: CpuLibrary) -> None:
    kernel = f"2:4 kernel, {library.isa}"
    for op, M, expected in (
        ("forward", 32, kernel + OR_COPY),
        ("forward", 1, kernel),
        ("grad_input", 32, kernel),
    ):
        assert lowering(op, M, 16, 24, torch.float32, torch.device("cpu"), Pattern(2, 4)) == expected


def test_copies_are_measured_when_asked_for(library: CpuLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_tuning, "TOKENS", (1, 20))
    monkeypatch.setattr(cpu_tuning, "SHAPES", ((16, 24),))
    for asked in (True, False):
        for entry in cpu_tuning.measure(library, asked):
            assert (entry.over_copy is not None and entry.over_copy > 0) == (asked and entry.op == "forward")
