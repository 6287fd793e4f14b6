"""The ``mma.sp`` kernel without a GPU: that its executor notices mistakes, its choice, and its machine code.

Its results are checked in ``tests/gpu/test_gluon_products.py``, here as there.  All builds:
``python tests/gluon_offline.py``.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from gluon_cpu import Executor, Hazard, mma_sp, mma_sp_source
from gluon_offline import Build, Result, compile_offline
from problems import Shape, draw
from slope_compile.kernels import gluon_configs, gluon_products, gpu_ops, gpu_self_test
from slope_compile.kernels.gluon_configs import MMA_SP, MmaSp
from slope_compile.pattern import Pattern
from triton_offline import SHARED_MEMORY

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_results_of_others() -> None:
    gpu_self_test.mma_sp_passes.cache_clear()


def error(executor: Executor, monkeypatch: pytest.MonkeyPatch, groups: int = 80, splits: int = 1) -> float:
    """Largest error of a product with whole blocks and a rest of one, over several tiles."""
    monkeypatch.setattr(gluon_products, "_kernels", lambda: executor)
    p = draw(Pattern(2, 4), Shape((20,), 70, groups), torch.bfloat16)
    y = gluon_products.forward(p.x, p.values, p.pattern, p.bias, MmaSp(1, 2, 1, 2, 3), splits)
    truth = p.x.double() @ p.weight.double().t() + p.bias.double()
    return float((y.double() - truth).abs().nan_to_num(torch.inf).max())


@pytest.mark.parametrize("groups", [80, 81])
@pytest.mark.parametrize("splits", [1, 2])
def test_the_kernel_as_it_is(groups: int, splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert error(Executor(mma_sp_source()), monkeypatch, groups, splits) < 0.2


HAZARDS = {
    "wait for one copy less": ("wait_group(STAGES - 2)", "wait_group(STAGES - 1)"),
    "no wait": ("async_copy.wait_group(STAGES - 2)", "pass"),
    "no barrier": ("        barrier()\n", ""),
    "refilled too early": ("gl.where(stage == 0, STAGES - 1, stage - 1)", "stage"),
    "refilled too late": ("gl.where(stage == 0, STAGES - 1, stage - 1)", "gl.where(stage < 2, stage + 1, 0)"),
    "shared memory reused with copies under way": ("async_copy.wait_group(0)", "pass"),
    "shared memory reused without a barrier": ("\n    barrier()\n", "\n"),
    "tokens not masked": ("mask=in_x & (x_word < K // 2 - k * 32)[None, :] & (i", "mask=(i"),
    "features not masked": ("in_v & (v_word < K // 4 - ahead * 16)[None, :] & more", "in_v"),
    "pattern not masked": ("in_q = p_row + 8 < N", "in_q = p_row < N"),
    "metadata out of order": ("((both ^ 0x11111111) << 3)", "(both << 3)"),
}


@pytest.mark.parametrize("name", HAZARDS)
def test_the_executor_notices_what_is_right_by_chance(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Hazard):
        error(Executor(mma_sp_source(), (HAZARDS[name],)), monkeypatch)


MISTAKES = {
    "registers of A in another order": ("(7, 1, 2), (2, 1, 2), (4, 1, NT)", "(2, 1, 2), (7, 1, 2), (4, 1, NT)"),
    "lanes in another order": ("[(6, 1, 4), (3, 1, 8)]", "[(3, 1, 8), (6, 1, 4)]"),
    "metadata of the other rows": ("_selectors(p | (q << 16))", "_selectors(q | (p << 16))"),
    "selectors of the other step": ('MMA + "0x1;"', 'MMA + "0x0;"'),
    "values of the other step": ("[a1, b1, e, acc]", "[a0, b1, e, acc]"),
    "tokens of the other step": ("[a1, b1, e, acc]", "[a1, b0, e, acc]"),
    "the second step counts alone": ("[a1, b1, e, acc]", "[a1, b1, e, acc * 0.0]"),
    "selectors of the block before": ("        p_at += 8 // PER\n", ""),
    "results of two lanes exchanged": ("(4, 5, 6, 7, 0, 1, 2, 3)", "(4, 5, 7, 6, 0, 1, 2, 3)"),
    "another bias": ("out = pn * BN + 16 * (mt", "out = 16 * (mt"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_the_executor_computes_by_lane_and_register(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        assert error(Executor(mma_sp_source(), (MISTAKES[name],)), monkeypatch) > 1
    except Hazard:
        assert "lanes" in name or "registers" in name  # also metadata in the wrong lanes are not in order


def test_the_instruction_is_that_of_the_manual() -> None:
    """Operands placed by hand: one row of W with the patterns in turn, one token, found where the manual says."""
    pairs = list(itertools.combinations(range(4), 2))
    for row, token in ((0, 0), (5, 3), (13, 7)):
        dense = torch.zeros(16, 32, dtype=torch.float64)
        a = torch.zeros(1, 32, 8, dtype=torch.bfloat16)
        b = torch.zeros(1, 32, 8, dtype=torch.bfloat16)
        words = [0x44444444] * 32  # 0 and 1 in every group
        group, upper = row % 8, row // 8
        for j in range(8):  # groups of four columns
            low, high = pairs[(j + row) % 6]
            lane = 4 * group + j % 4
            for position, column in enumerate((low, high)):
                dense[row, 4 * j + column] = 10 * j + position + 1
                a[0, lane, 4 * (j // 4) + 2 * upper + position] = 10 * j + position + 1
            shift = 4 * (j % 4) + 16 * upper
            holder = 4 * group + j // 4
            words[holder] = words[holder] & ~(15 << shift) | (low | high << 2) << shift
        x = torch.arange(32, dtype=torch.float64) % 7 - 3
        for k in range(32):
            b[0, 4 * token + k % 8 // 2, 2 * (k // 8) + k % 2] = float(x[k])
        c = torch.ones(1, 32, 4)
        e = torch.tensor([words], dtype=torch.uint32).view(torch.int32)
        d = mma_sp(a.view(torch.int32), b.view(torch.int32), e, c, 0, torch.bfloat16)
        expected = torch.ones(1, 32, 4)
        expected[0, 4 * group + token // 2, 2 * upper + token % 2] += float(dense[row] @ x)
        assert torch.equal(d, expected)


def test_metadata_that_are_not_ascending_are_refused() -> None:
    words = torch.zeros(1, 32, 4, dtype=torch.int32)
    with pytest.raises(Hazard):
        mma_sp(words, words, words[..., 0], words.float(), 0, torch.float16)


def test_the_self_test_notices_a_wrong_kernel(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for fault, said in ((MISTAKES["selectors of the other step"], "is wrong"), (HAZARDS["no wait"], "does not run")):
        gpu_self_test.mma_sp_passes.cache_clear()
        executor = Executor(mma_sp_source(), (fault,))
        monkeypatch.setattr(gluon_products, "_kernels", lambda executor=executor: executor)
        with caplog.at_level(logging.WARNING):
            assert not gpu_self_test.mma_sp_passes(CPU, torch.bfloat16, MMA_SP[0])
        assert said in caplog.text
        assert "is not used" in caplog.text


def test_what_may_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(gpu_ops, "available", lambda device: True)
    monkeypatch.setattr(gpu_self_test, "mma_sp_passes", lambda device, dtype, config: config != MMA_SP[0])
    assert gpu_ops.mma_sp_choices(1, cuda, torch.bfloat16) == MMA_SP[1:4]
    assert gpu_ops.mma_sp_choices(4096, cuda, torch.float16) == MMA_SP[1:]
    assert gpu_ops.mma_sp_choices(4096, cuda, torch.float32) == ()
    assert gpu_ops.mma_sp_choices(4096, CPU, torch.bfloat16) == ()
    monkeypatch.setattr(gpu_ops, "available", lambda device: False)
    assert gpu_ops.mma_sp_choices(4096, cuda, torch.bfloat16) == ()


def test_nothing_takes_it_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: Tensor, **named: object) -> Tensor:
        raise AssertionError

    taken = SimpleNamespace(forward=lambda x, *rest: x)
    monkeypatch.setattr(gluon_products, "forward", refused)
    monkeypatch.setattr(gpu_ops, "triton_products", taken)
    monkeypatch.setattr(gpu_ops, "usable", lambda *args: True)
    monkeypatch.setattr(gpu_ops, "_sparse", lambda *args: True)
    p = draw(Pattern(2, 4), Shape((1,), 64, 16), torch.bfloat16)
    assert gpu_ops.linear(p.x, p.values, p.pattern, p.bias, 2, 4) is p.x


@pytest.mark.parametrize(("M", "config"), [(1, 0), (8, 0), (9, 2), (16, 2), (17, 4), (33, 5), (65, 7), (9999, 7)])
def test_the_default_configuration(M: int, config: int) -> None:
    assert gluon_configs.default(M) is MMA_SP[config]


def test_how_many_programs_share_a_sum() -> None:
    assert gluon_configs.splits(1, 4096, 4096, MMA_SP[0], 132) == 4  # 64 programs for 132 processors
    assert gluon_configs.splits(16, 64, 8192, MMA_SP[2], 132) == 16  # 8 blocks each
    assert gluon_configs.splits(16, 64, 64, MMA_SP[2], 132) == 1
    assert gluon_configs.splits(16, 1 << 20, 4096, MMA_SP[2], 132) == 1
    assert gluon_configs.splits(17, 64, 8192, MMA_SP[4], 132) == 1


@pytest.mark.parametrize(
    "build",
    [
        Build(MMA_SP[-1], torch.bfloat16, 80, aligned=True),
        Build(MMA_SP[-1], torch.float16, 90, aligned=True, split=True),
        Build(MMA_SP[-2], torch.bfloat16, 120, aligned=False),
        Build(MMA_SP[0], torch.bfloat16, 90, aligned=False, ones=True),
        Build(None, torch.float16, 80, aligned=False),
    ],
    ids=str,
)
def test_machine_code(build: Build) -> None:
    pytest.importorskip("triton")
    assert not compile_offline(build).problems(build)


def test_bad_machine_code_is_noticed() -> None:
    build = Build(MMA_SP[0], torch.bfloat16, 80, aligned=True)
    good = Result(0, 64, 1024, sparse=2, other=0, copies=4, unfilled=0, narrow=0, ldmatrix=4, loop=90)
    assert good.problems(build) == []
    for bad in (
        {"spills": 1}, {"shared": SHARED_MEMORY[80] + 1}, {"sparse": 1}, {"other": 1}, {"copies": 0}, {"unfilled": 1},
        {"narrow": 1}, {"ldmatrix": 3},
    ):  # fmt: skip
        assert len(dataclasses.replace(good, **bad).problems(build)) == 1
