"""Plots of results, as PNG files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks import gpu_plots, panels, select
from benchmarks.records import Record

_PARTS = ("weights", "metadata", "gradients", "moments")


def draw(records: Sequence[Record], folder: Path) -> list[Path]:
    """Draw everything there is something for; return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    layers = select.ok(records, *select.PRODUCTS)
    for (suite, dtype, threads), group in select.grouped(layers, select.setting).items():
        written.append(folder / f"speedup-{suite}-{dtype}-t{threads}.png")
        _speedups(group, select.titled(suite, dtype, threads)).savefig(written[-1], dpi=120)
    if rows := select.ok(records, "train"):
        written.append(folder / "memory.png")
        _memory(rows).savefig(written[-1], dpi=120)
    for name, figure in gpu_plots.pictures(records).items():
        written.append(folder / name)
        figure.savefig(written[-1], dpi=120)
    return written


def _speedups(records: Sequence[Record], title: str) -> Figure:
    """Speed-up over eager dense against tokens: one panel a product, one line a shape, quartiles as a band."""
    figure = Figure(figsize=(13, 7.5), layout="constrained")
    grid = figure.subplots(2, 3, sharex=True, sharey=True)
    for axes, (column, (product, contender)) in zip(grid.flat, select.COLUMNS.items(), strict=True):
        rows = [record for record in records if record["name"] == product]
        lines = {
            shape: [(r["facts"]["shape"]["M"], select.speedup(r, contender)) for r in group]
            for shape, group in select.grouped(rows, select.shape).items()
        }
        panels.speedups(axes, column, lines)
    grid[0, 0].legend(title="N x K", fontsize="small")
    figure.supxlabel("tokens")
    figure.supylabel("times faster than dense")
    figure.suptitle(title)
    return figure


def _memory(records: Sequence[Record]) -> Figure:
    """Training state of whole models as a share of the dense one's, stacked by what it is for."""
    bars: dict[tuple[str, str], dict[str, float]] = {}
    for record in records:
        model = f"{record['facts']['model']}\n{record['facts']['dtype']}"
        whole = sum(_parts(record, "dense").values())
        for contender in ("dense", select.ours(record)):
            name = contender.replace("slope_", "SLoPe\n").replace("_", "-")
            bars[model, name] = {part: count / whole for part, count in _parts(record, contender).items()}
    figure = Figure(figsize=(max(6.0, 0.9 * len(bars)), 5), layout="constrained")
    axes: Any = figure.subplots()
    labels = [f"{contender}\n{model}" for model, contender in bars]
    base = [0.0] * len(bars)
    for part in next(iter(bars.values())):
        heights = [parts[part] for parts in bars.values()]
        axes.bar(labels, heights, bottom=base, label=part)
        base = [below + height for below, height in zip(base, heights, strict=True)]
    axes.set_ylabel("share of dense")
    axes.set_title("Training state")
    axes.tick_params(axis="x", labelsize="x-small")
    axes.legend(fontsize="small")
    return figure


def _parts(record: Record, contender: str) -> dict[str, int]:
    linears = select.state_bytes(record, contender, "linears")
    others = sum(sum(select.state_bytes(record, contender, group).values()) for group in ("adapters", "rest"))
    return {f"sparse linears: {part}": linears[part] for part in _PARTS} | {"everything else": others}
