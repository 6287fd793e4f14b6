"""The measured choice between the 2:4 kernels and dense products, and the rule where nothing was measured."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from slope_compile.kernels import cpu_library, cpu_ops, cpu_products, cpu_rules, cpu_tuning
from slope_compile.kernels.cpu_library import CpuLibrary
from slope_compile.kernels.cpu_tuning import Entry, Table


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No table of this machine is read or written."""
    monkeypatch.setattr("slope_compile.kernels.cpu_build.cache_folder", lambda: tmp_path)
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
    monkeypatch.setattr(cpu_tuning, "MOST_DECIDED", 3)
    table = Table(1, (Entry("forward", "float32", 64, 768, 768, 0.5),))
    for _ in range(2):
        for M in range(10):
            assert table.sparse("forward", M, 768, 768, torch.float32) is False
            assert table.sparse("forward", M, 768, 768, torch.bfloat16) is None
            assert len(table._decided) <= 3


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
