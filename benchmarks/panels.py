"""A panel of a picture: how many times faster, against tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

Points = Iterable[tuple[int, Mapping[str, float]]]
"""(tokens, median and low and high of the ratio), in any order."""


def speedups(axes: Any, title: str, lines: Mapping[str, Points]) -> None:
    """One line for each entry, quartiles as a band, both axes logarithmic."""
    for label, points in lines.items():
        ordered = sorted(points, key=lambda point: point[0])
        tokens = [count for count, _ in ordered]
        (line,) = axes.plot(tokens, [s["median"] for _, s in ordered], marker="o", markersize=3, label=label)
        low, high = ([s[side] for _, s in ordered] for side in ("low", "high"))
        axes.fill_between(tokens, low, high, color=line.get_color(), alpha=0.15)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_title(title)
    axes.grid(alpha=0.3)
