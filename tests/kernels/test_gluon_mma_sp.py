"""The ``mma.sp`` kernel on the executor of ``gluon_cpu``: mistakes in the kernel must be noticed.

``tests/gpu/test_gluon_products.py`` checks its results, with a GPU and without.
"""

from __future__ import annotations

import pytest
import torch

from gluon_cpu import Executor, Hazard
from problems import Shape, draw
from slope_compile.kernels import gluon_products
from slope_compile.kernels.gluon_configs import MmaSp
from slope_compile.pattern import Pattern


def error(executor: Executor, monkeypatch: pytest.MonkeyPatch, groups: int = 80, splits: int = 1) -> float:
    """Largest error of a product with whole blocks and a rest of one, over several tiles."""
    monkeypatch.setattr(gluon_products, "_kernels", lambda: executor)
    p = draw(Pattern(2, 4), Shape((20,), 70, groups), torch.bfloat16)
    t, b = torch.randn(20, 40).bfloat16(), torch.randn(70, 40).bfloat16()
    y = gluon_products.mma_sp(p.x, p.values, p.pattern, p.bias, (t, b), MmaSp(1, 2, 1, 2, 3), splits)
    truth = p.x.double() @ p.weight.double().t() + p.bias.double() + t.double() @ b.double().t()
    return float((y.double() - truth).abs().nan_to_num(torch.inf).max())


BY_THE_BYTE = 81
"""Groups of a pattern whose rows do not begin at words; each thread loads its own bits."""


@pytest.mark.parametrize("groups", [80, BY_THE_BYTE])
@pytest.mark.parametrize("splits", [1, 2])
def test_the_kernel_as_it_is(groups: int, splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert error(Executor("gluon_mma_sp"), monkeypatch, groups, splits) < 0.3


HAZARDS = {
    "wait for one copy less": ("wait_for_copies(STAGES - 2)", "wait_for_copies(STAGES - 1)"),
    "no wait": ("wait_for_copies(STAGES - 2)", "pass"),
    "no barrier": ("        barrier()\n", ""),
    "refilled too early": ("gl.where(stage == 0, STAGES - 1, stage - 1)", "stage"),
    "refilled too late": ("gl.where(stage == 0, STAGES - 1, stage - 1)", "gl.where(stage < 2, stage + 1, 0)"),
    "shared memory reused with copies under way": ("wait_for_copies(0)", "pass"),
    "shared memory reused without a barrier": ("\n    barrier()\n", "\n"),
    "tokens not masked": ("of_x = in_x & (x_word < K // 2 - block * 32)[None, :] &", "of_x ="),
    "features not masked": ("in_v & (v_word < K // 4 - block * 16)[None, :] & wanted", "in_v"),
    "pattern not masked by the byte": ("in_q = p_row + 8 < N", "in_q = p_row < N"),
    "pattern not masked": ("index(into), P + p_at, mask=in_p & more", "index(into), P + p_at, mask=more"),
    "pattern not masked past K": ("index(into), P + p_at, mask=in_p & more", "index(into), P + p_at, mask=in_p"),
    "pattern of a stage that is being filled": ("p_ring.index(stage), MT", "p_ring.index(into), MT"),
    "metadata out of order": ("((both ^ 0x11111111) << 3)", "(both << 3)"),
    "adapter not masked": ("(a_word + 8 < left)", "(a_word < left)"),
}


@pytest.mark.parametrize("name", HAZARDS)
def test_the_executor_notices_what_is_right_by_chance(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Hazard):
        error(Executor("gluon_mma_sp", (HAZARDS[name],)), monkeypatch, BY_THE_BYTE if "byte" in name else 80)


MISTAKES = {
    "registers of A in another order": ("(7, 1, 2), (2, 1, 2), (4, 1, NT)", "(2, 1, 2), (7, 1, 2), (4, 1, NT)"),
    "lanes in another order": ("[(6, 1, 4), (3, 1, 8)]", "[(3, 1, 8), (6, 1, 4)]"),
    "metadata of the other rows": ("selectors(p, q)", "selectors(q, p)"),
    "selectors of the other step": ('MMA + "0x1;"', 'MMA + "0x0;"'),
    "values of the other step": ("[a1, b1, e, acc]", "[a0, b1, e, acc]"),
    "tokens of the other step": ("[a1, b1, e, acc]", "[a1, b0, e, acc]"),
    "the second step counts alone": ("[a1, b1, e, acc]", "[a1, b1, e, acc * 0.0]"),
    "selectors of the block before by the byte": ("            P += 8 // PIECE\n", ""),
    "selectors of another block": (
        "            P += 1\n        commit_copies()\n        X += 32\n        V += 16\n\n",
        "        commit_copies()\n",
    ),
    "selectors of another lane": ("(16 * axis(4, 6, L))", "(16 * (axis(4, 6, L) ^ 1))"),
    "selectors of the other rows": ("p, q = gl.split(", "q, p = gl.split("),
    "results of two lanes exchanged": ("(4, 5, 6, 7, 0, 1, 2, 3)", "(4, 5, 7, 6, 0, 1, 2, 3)"),
    "another bias": ("out = row + 8 * axis", "out = row % 32 + 8 * axis"),
    "the adapter's second half twice": ("[second, b, acc]", "[first, b, acc]"),
    "the adapter's halves exchanged": ("{$8,$9}", "{$10,$11}"),
    "the adapter's rows exchanged": ("row = first_row + 8 * r0", "row = first_row + 8 - 8 * r0"),
    "the adapter's tokens of another tile": ("t_tile = T + (pm * BM).to(gl.int64) * (R // 2)", "t_tile = T + 0"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_the_executor_computes_by_lane_and_register(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        groups = BY_THE_BYTE if "byte" in name else 80
        assert error(Executor("gluon_mma_sp", (MISTAKES[name],)), monkeypatch, groups) > 1
    except Hazard:
        assert "lanes" in name or "registers" in name  # also metadata in the wrong lanes are not in order


def test_each_split_adds_the_adapter_once(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = ("gl.where(gl.program_id(1) == 0, gl.cdiv(R, 32), 0)", "gl.cdiv(R, 32)")
    assert error(Executor("gluon_mma_sp", (wrong,)), monkeypatch, splits=3) > 1
