"""The report as text: what a reader sees of the decisions."""

from __future__ import annotations

import pytest

from slope_compile.config import SlopeConfig
from slope_compile.report import Decision, Reason, Report, decision_about


def report(*patterns: str) -> Report:
    found = Report()
    for i, pattern in enumerate(patterns):
        reason = Reason.SELECTED if pattern else Reason.HEAD
        found.add(Decision(f"layers.{i}", bool(pattern), reason, (8, 16), pattern, "exact" if pattern else ""))
    return found


def test_one_row_for_each_linear_and_the_totals() -> None:
    header, _, first, second, total, way_out = str(report("2:4", "")).splitlines()
    assert header.split() == ["weight", "N", "x", "K", "pattern", "backward", "reason"]
    assert first.split() == ["layers.0", "8x16", "2:4", "exact", "selected"]
    assert second.split() == ["layers.1", "8x16", "dense", "output", "head"]
    assert total == "1 of 2 linears sparse"
    assert way_out.startswith("output head: to change it, ")


@pytest.mark.parametrize("patterns", [("2:8", "2:4"), ("1:4", "2:8", "")])
def test_patterns_without_kernels_are_named(patterns: tuple[str, ...]) -> None:
    (last,) = [line for line in str(report(*patterns)).splitlines() if "kernels exist" in line]
    others = sorted({p for p in patterns if p not in ("", "2:4")})
    assert last.startswith(f"{', '.join(others)}: kernels exist for 2:4 alone")
    assert "no time" in last


def test_pattern_and_backward_are_those_of_a_sparse_layer() -> None:
    settings = SlopeConfig(pattern="1:2").layer("a")
    sparse = decision_about("a", (6, 8), settings, Reason.SELECTED, node="linear")
    assert sparse == Decision("a", True, Reason.SELECTED, (6, 8), "1:2", "double_pruned", "linear")
    assert decision_about("a", (7, 8), settings, Reason.SELECTED).backward == "exact"
    assert decision_about("a", (6, 8), settings, Reason.HEAD) == Decision("a", False, Reason.HEAD, (6, 8))
