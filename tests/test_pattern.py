"""``Pattern``: parsing, and the two lengths."""

from __future__ import annotations

import pytest

from slope_compile.errors import ConfigError, SlopeError
from slope_compile.pattern import GROUPS, Pattern


@pytest.mark.parametrize(("keep", "group"), [(k, g) for g in GROUPS for k in range(1, g)])
def test_text_round_trip(keep: int, group: int) -> None:
    nm = Pattern.parse(f"{keep}:{group}")
    assert (nm.keep, nm.group) == (keep, group)
    assert str(nm) == f"{keep}:{group}"
    assert nm.density == keep / group


@pytest.mark.parametrize(
    "text",
    ["", "2", "2:", ":4", "2:4:8", "a:b", "-2:4", "2.0:4", " 2:4", "2/4", None, 24, ("2", "4")],
    ids=repr,
)
def test_text_that_is_no_pattern(text: object) -> None:
    with pytest.raises(ConfigError, match="expected kept:group such as '2:4', got"):
        Pattern.parse(text)


@pytest.mark.parametrize("text", ["0:4", "4:4", "5:4", "1:3", "2:16", "1:1"])
def test_pattern_without_a_reference(text: str) -> None:
    with pytest.raises(ConfigError, match=f"{text} is not supported; the group must be one of 2, 4, 8"):
        Pattern.parse(text)


def test_errors_are_ours_and_are_value_errors() -> None:
    assert issubclass(ConfigError, SlopeError)
    assert issubclass(ConfigError, ValueError)


@pytest.mark.parametrize(("text", "dense", "compressed"), [("2:4", 36, 18), ("1:2", 18, 9), ("2:8", 72, 18)])
def test_lengths(text: str, dense: int, compressed: int) -> None:
    nm = Pattern.parse(text)
    assert nm.compressed(dense) == compressed
    assert nm.dense(compressed) == dense


def test_patterns_are_values() -> None:
    assert Pattern(2, 4) == Pattern.parse("2:4")
    assert len({Pattern(2, 4), Pattern.parse("2:4"), Pattern(2, 8)}) == 2
    with pytest.raises(AttributeError):
        Pattern(2, 4).keep = 3  # type: ignore[misc]
