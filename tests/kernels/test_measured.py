"""What the tables of measurements share: the nearest entry, and answers that are remembered."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from slope_compile.kernels import measured
from slope_compile.kernels.measured import Memo, nearest


@dataclasses.dataclass(frozen=True)
class Entry:
    op: str
    dtype: str
    sizes: tuple[int, int, int]


ENTRIES = (
    Entry("forward", "float32", (1, 64, 64)),
    Entry("forward", "float32", (64, 64, 64)),
    Entry("forward", "float32", (1, 4096, 64)),
    Entry("grad_weight", "bfloat16", (1, 64, 64)),
)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [((7, 64, 64), 0), ((9, 64, 64), 1), ((0, 64, 64), 0), ((1, 500, 64), 0), ((1, 520, 64), 2), ((1, 1 << 20, 1), 2)],
)
def test_the_nearest_entry_by_ratios(sizes: tuple[int, int, int], expected: int) -> None:
    assert nearest(ENTRIES, "forward", *sizes, torch.float32) is ENTRIES[expected]


def test_other_products_and_dtypes_are_no_neighbours() -> None:
    assert nearest(ENTRIES, "grad_weight", 1, 64, 64, torch.bfloat16) is ENTRIES[3]
    assert nearest(ENTRIES, "grad_weight", 1, 64, 64, torch.float32) is None
    assert nearest((), "forward", 1, 64, 64, torch.float32) is None


def test_an_answer_is_looked_up_once() -> None:
    """No answer is an answer too."""
    memo, asked = Memo(), []

    def find(case: int) -> None:
        asked.append(case)

    for _ in range(3):
        assert memo.ask(find, 1) is None
        assert memo.ask(find, 2) is None
    assert asked == [1, 2]


def test_it_does_not_grow_without_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "MOST", 4)
    memo = Memo()
    for case in range(20):
        assert memo.ask(lambda case: 2 * case, case) == 2 * case
        assert len(memo) <= 4


@pytest.mark.parametrize("moment", range(8))
def test_another_thread_may_forget_everything_at_any_moment(moment: int) -> None:
    """Each look into the memory hashes the case: the answers are cleared at one of those moments."""
    memo, looks = Memo(), 0

    class Case(str):
        def __hash__(self) -> int:
            nonlocal looks
            looks += 1
            if looks == moment:
                memo._answers.clear()
            return 0

    for _ in range(3):
        assert memo.ask(lambda case: "answer", Case("case")) == "answer"
