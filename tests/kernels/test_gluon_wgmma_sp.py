"""The ``wgmma.sp`` kernel on the executor of ``gluon_cpu``: mistakes in the kernel must be noticed.

``tests/gpu/test_gluon_products.py`` checks its results, with a GPU and without.
"""

from __future__ import annotations

import pytest
import torch

from gluon_cpu import Executor, Hazard
from problems import Shape, draw
from slope_compile.kernels import gluon_products
from slope_compile.kernels.gluon_configs import WgmmaSp
from slope_compile.pattern import Pattern

SMALL = WgmmaSp(2, 4, 8, 3)
"""64 tokens, 128 outputs."""


STAGED = 128
"""Groups of a pattern that goes through shared memory.  With 124 groups each thread loads its own bits."""


def error(executor: Executor, monkeypatch: pytest.MonkeyPatch, M: int = 9, groups: int = 124, splits: int = 1) -> float:
    """Largest error of a product over several tiles, with each stage used more than twice and a rest of a block."""
    monkeypatch.setattr(gluon_products, "_wgmma_kernels", lambda: executor)
    p = draw(Pattern(2, 4), Shape((M,), 130, groups), torch.bfloat16)
    t, b = torch.randn(M, 150).bfloat16(), torch.randn(130, 150).bfloat16()
    y = gluon_products.wgmma_sp(p.x, p.values, p.pattern, p.bias, (t, b), SMALL, splits)
    truth = p.x.double() @ p.weight.double().t() + p.bias.double() + t.double() @ b.double().t()
    return float((y.double() - truth).abs().nan_to_num(torch.inf).max())


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize(("M", "groups"), [(7, 4), (16, 32), (20, 36), (9, 124), (9, STAGED), (9, 16 * 7)])
def test_the_kernel_as_it_is(M: int, groups: int, splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gluon_products, "_kernels", lambda: Executor("gluon_mma_sp"))
    assert error(Executor("gluon_wgmma_sp"), monkeypatch, M, groups, splits) < 0.4


def test_each_split_adds_the_adapter_once(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = ("gl.where(gl.program_id(1) == 0, gl.cdiv(R, 64), 0)", "gl.cdiv(R, 64)")
    monkeypatch.setattr(gluon_products, "_kernels", lambda: Executor("gluon_mma_sp"))
    assert error(Executor("gluon_wgmma_sp", (wrong,)), monkeypatch, splits=2) > 1


HAZARDS = {
    "no wait for an even block": ("p_ring, p_even, q_even, even, phase", "p_ring, p_even, q_even, even, phase ^ 1"),
    "no wait for an odd block": ("p_ring, p_odd, q_odd, odd, phase", "p_ring, p_odd, q_odd, odd, phase ^ 1"),
    "no wait for a block": ("    mbarrier.wait(ready.index(stage), phase)\n    if PIECE", "    if PIECE"),
    "the phase of the round before": ("phase = gl.where(odd == 0, phase ^ 1, phase)", "pass"),
    "a phase too early": ("    phase = 0\n", "    phase = 1\n"),
    "refilled a stage too early": (
        "v_ring, before, pm, pn, first + ahead, more", "v_ring, even, pm, pn, first + ahead, more"
    ),
    "refilled before its group is done": (
        '"\\nwgmma.wait_group.sync.aligned 1;\\n}"', '"\\nwgmma.wait_group.sync.aligned 2;\\n}"'
    ),
    "refilled without a barrier": ("        barrier()\n        before", "        before"),
    "refilled without a barrier after an odd block": (
        "        barrier()\n        ahead = k + STAGES", "        ahead = k + STAGES"
    ),
    "refilled too late": ("ahead = k - 1 + STAGES", "ahead = k + 1 + STAGES"),
    "waits for bytes that do not come": ("BM * 128 + BN * 64", "BM * 128 + BN * 64 + 64"),
    "expects what is not copied": ("BM * 128 + BN * 64, pred=wanted", "BM * 128 + BN * 64"),
    "values without a mbarrier of their own": (
        "    load_tile(v_desc, [pn * BN, block * 16], ready.index(stage), v_ring.index(stage), pred=wanted)\n", ""
    ),
    "mbarriers without a fence": ("    fence_async_shared()\n", ""),
    "mbarriers without a barrier": ("    fence_async_shared()\n    barrier()\n", "    fence_async_shared()\n"),
    "mbarriers not made": ("        mbarrier.init(ready.index(i), count=1)\n", "        pass\n"),
    "mbarriers not invalidated": ("        mbarrier.invalidate(ready.index(i))\n", "        pass\n"),
    "mbarriers invalidated while others wait": ("    barrier()\n    return acc\n", "    return acc\n"),
    "mbarriers invalidated too late": (
        "        mbarrier.invalidate(ready.index(i))\n    barrier()\n", "        mbarrier.invalidate(ready.index(i))\n"
    ),
    "sums used while a group is under way": (
        '"wgmma.wait_group.sync.aligned 0;", LAST', '"wgmma.wait_group.sync.aligned 1;", LAST'
    ),
    "stages reused without a barrier": ("their memory is reused afterwards.\n    barrier()\n", "their\n"),
    "the adapter's tokens not waited for": (
        "        mbarrier.wait(ready.index(stage), phase)\n        at", "        at"
    ),
    "instructions without a group": ('join([*text, "wgmma.commit_group.sync.aligned;"])', "join(text)"),
    "registers without a fence": ('"wgmma.fence.sync.aligned;",', ""),
    "pattern not masked": ("in_q = p_row + 8 < N", "in_q = p_row < N"),
    "pattern not masked past K": (
        "            p_even = pattern_word(p_at, in_p, left, 2)\n",
        "            p_even = pattern_word(p_at, in_p, left + 64, 2)\n",
    ),
    "metadata out of order": ("((both ^ 0x11111111) << 3)", "(both << 3)"),
    "adapter not masked": ("in_b & (rest > 16)", "in_b"),
    "shared memory outside the ring": ("stage * (BM * 128)", "stage * (BM * 256)"),
    "staged: no wait for the first pattern": ("    wait_for_copies(STAGES - 2)\n", ""),
    "staged: no barrier for the first pattern": (
        "    wait_for_copies(STAGES - 2)\n    barrier()\n", "    wait_for_copies(STAGES - 2)\n"
    ),
    "staged: the pattern waited for a block too late": ("wait_for_copies(STAGES - 3)", "wait_for_copies(STAGES - 2)"),
    "staged: the pattern not waited for": ("wait_for_copies(STAGES - 3)", "pass"),
    "staged: a pattern refilled twice": ("copy_async(p_ring.index(before)", "copy_async(p_ring.index(even)"),
    "staged: a pattern's rows not masked": ("mask=in_p & (ahead < left)", "mask=ahead < left"),
    "staged: a pattern not masked past K": ("mask=in_p & (ahead < left)", "mask=in_p"),
    "staged: copies under way when memory is used anew": ("wait_for_copies(0)", "pass"),
}  # fmt: skip


def _groups(name: str) -> int:
    return STAGED if name.startswith("staged") else 124


@pytest.mark.parametrize("name", HAZARDS)
def test_the_executor_notices_what_is_right_by_chance(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Hazard):
        error(Executor("gluon_wgmma_sp", (HAZARDS[name],)), monkeypatch, groups=_groups(name))


MISTAKES = {
    "selectors of the other step": ("tile, {e}, {step}, 1", "tile, {e}, 0, 1"),
    "values of the other step": ("_registers(P * (1 + step) + mt * Q, 4), f", "_registers(P + mt * Q, 4), f"),
    "values of the other 64 rows": ("_registers(P * (1 + step) + mt * Q, 4), f", "_registers(P * (1 + step), 4), f"),
    "selectors of the other 64 rows": ('f"${3 * P + mt * Q}"', 'f"${3 * P}"'),
    "tokens of the other step": ('f"add.u32 low, low, {units};"', '"add.u32 low, low, 0;"'),
    "eights of tokens in another place": ("0x40000040", "0x40000020"),
    "metadata of the other rows": ("selectors(p, q)", "selectors(q, p)"),
    "selectors of another block": ("p_odd, q_odd, odd, phase", "p_even, q_odd, odd, phase"),
    "selectors not refreshed": ("            p_even = pattern_word(p_at, in_p, left, 2)\n", ""),
    "staged: selectors of another block": (
        "pattern_of_block(p_ring.index(stage)", "pattern_of_block(p_ring.index(gl.where(stage == 0, 0, stage - 1))"
    ),
    "staged: the pattern of another block": ("p_at + ahead, mask", "p_at + (ahead - 1), mask"),
    "staged: selectors of another lane": ("(16 * axis(4, 6, L))", "(16 * (axis(4, 6, L) ^ 1))"),
    "the stage of another block": ("+ stage * (BM * 128)", "+ (stage ^ 1) * (BM * 128)"),
    "the adapter's registers in another order": ("[b0, b1, b2, b3, at, acc]", "[b0, b2, b1, b3, at, acc]"),
    "the adapter's rows exchanged": ("row = p_row + 8 * axis(2, 7, L)", "row = p_row + 8 - 8 * axis(2, 7, L)"),
    "the adapter's words exchanged": ("word = t + 4 * axis(2, 2, L)", "word = t + 4 - 4 * axis(2, 2, L)"),
    "the adapter's second part again": ("        b_at += 32\n", ""),
    "another bias": ("out = row + 8 * axis", "out = row % 16 + 8 * axis"),
    "the adapter's tokens in the wrong stage": (
        "into = stage\n", "into = gl.where(stage == 0, STAGES - 1, stage - 1)\n"
    ),
    "too few blocks": ("range(0, blocks, 2)", "range(0, blocks - 2, 2)"),
    "narrow rows stored as wide": ("    if WIDE:\n", "    if True:\n"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_the_executor_computes_by_lane_and_register(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        assert error(Executor("gluon_wgmma_sp", (MISTAKES[name],)), monkeypatch, groups=_groups(name)) > 1
    except Hazard:
        assert name in ("too few blocks", "the stage of another block")  # noticed before a number is wrong
