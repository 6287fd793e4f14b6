"""Plots of the suites kernels, memory and quality."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from benchmarks import kernel_tables, panels, select
from benchmarks.cases import DTYPES
from benchmarks.memory_state import total
from benchmarks.records import Record
from slope_compile.cost import DenseLayer

_KINDS = ("weights", "metadata", "gradients", "moments")


def pictures(records: Sequence[Record]) -> dict[str, Figure]:
    """File name -> picture, for what there is something for."""
    found: dict[str, Figure] = {}
    kernels = [r for r in records if r["suite"] == "kernels" and r["status"] == "ok"]
    for dtype, group in select.grouped(
        select.ok(kernels, *select.PRODUCTS, "low_rank"), lambda r: r["facts"]["dtype"]
    ).items():
        found[f"kernels-fastest-{dtype}.png"] = _fastest(group, dtype)
        if any("limits" in r["facts"] for r in group):
            found[f"roofline-{dtype}.png"] = _roofline(group, dtype)
    if rows := select.ok(records, "memory"):
        found["memory-models.png"] = _memory(rows)
    if rows := select.ok(records, "quality"):
        found["quality.png"] = _quality(rows)
    return found


def _fastest(records: Sequence[Record], dtype: str) -> Figure:
    """The fastest 2:4 way against the best dense one: a panel a product, a line a shape, quartiles as a band."""
    figure = Figure(figsize=(13, 7.5), layout="constrained")
    grid = figure.subplots(2, 3, sharex=True, sharey=True)
    for axes, (family, found) in zip(grid.flat, kernel_tables.families(records).items(), strict=False):
        lines = {
            shape: [(r["facts"]["shape"]["M"], kernel_tables.ratio(r, _fastest_of(r, family))) for r in group]
            for shape, group in select.grouped(found, select.shape).items()
        }
        panels.speedups(axes, family, lines)
    grid.flat[-1].set_axis_off()
    grid.flat[-1].legend(*grid[0, 0].get_legend_handles_labels(), title="N x K", fontsize="x-small", ncols=2)
    figure.supxlabel("tokens")
    figure.supylabel("times faster than the best dense")
    figure.suptitle(f"Fastest 2:4 way of each product, {dtype}")
    return figure


def _fastest_of(record: Record, family: str) -> str:
    return kernel_tables.fastest(record, kernel_tables.contenders(record, family))


def _roofline(records: Sequence[Record], dtype: str) -> Figure:
    """Forward and input gradient under the device's measured limits; the work is counted as the dense product's."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes: Any = figure.subplots()
    known = next(r["facts"]["limits"] for r in records if "limits" in r["facts"])
    marks = {"dense": ("o", "tab:blue"), "fastest 2:4": ("^", "tab:orange")}
    for family in ("forward", "grad_input, double-pruned"):
        for record in kernel_tables.families(records).get(family, []):
            size = record["facts"]["shape"]
            layer = DenseLayer(size["N"], size["K"], DTYPES[dtype].itemsize)
            (work,) = layer.dense_forward(size["M"]).works
            chosen = {
                "dense": kernel_tables.best_dense(record),
                "fastest 2:4": _fastest_of(record, family),
            }
            for what, name in chosen.items():
                marker, color = marks[what]
                intensity = float(work.flops) / float(work.moved)
                achieved = float(work.flops) / record["seconds"][name]["median"]
                axes.plot(intensity, achieved / 1e12, marker, color=color, markersize=4, alpha=0.6)
    low, high = axes.get_xlim()
    grid = [low * (high / low) ** (i / 200) if low > 0 else high * 10 ** (-4 + 4 * i / 200) for i in range(201)]
    for label, peak, moved in (
        ("dense limit", known["flops"], 1.0),
        ("2:4 limit (9/16 of the bytes, twice the rate)", 2 * known["flops"], 16 / 9),
    ):
        style = "-" if peak == known["flops"] else "--"
        axes.plot(grid, [min(peak, moved * x * known["bandwidth"]) / 1e12 for x in grid], style, color="gray",
                  label=label)  # fmt: skip
    for what, (marker, color) in marks.items():
        axes.plot([], [], marker, color=color, label=what)
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte of the dense product", ylabel="TFLOP/s (of dense)")
    axes.set_title(f"Forward and input gradient under measured limits, {dtype}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return figure


def _memory(records: Sequence[Record]) -> Figure:
    """Training state of whole models as a share of dense: sparse linears by kind, adapters, everything else."""
    rows = [r for r in records if r["facts"]["dtype"] == "bfloat16"] or list(records)
    bars = [(r["facts"]["model"], name) for r in rows for name in r["facts"]["state"] if "inference" not in name]
    bars.sort(key=lambda bar: bar[1] != "dense")
    bars.sort(key=lambda bar: bar[0])
    states = {r["facts"]["model"]: r["facts"]["state"] for r in rows}
    figure = Figure(figsize=(max(6.0, 0.6 * len(bars)), 5), layout="constrained")
    axes: Any = figure.subplots()
    parts: dict[str, list[float]] = {f"sparse linears: {kind}": [] for kind in _KINDS}
    parts |= {"adapters": [], "everything else": []}
    for model, name in bars:
        state, whole = states[model][name], total(states[model]["dense"])
        for kind in _KINDS:
            parts[f"sparse linears: {kind}"].append(state["linears"][kind] / whole)
        parts["adapters"].append(total(state, "adapters") / whole)
        parts["everything else"].append(total(state, "rest") / whole)
    base = [0.0] * len(bars)
    for part, heights in parts.items():
        axes.bar(range(len(bars)), heights, bottom=base, label=part)
        base = [below + height for below, height in zip(base, heights, strict=True)]
    names = [f"{name.replace('slope', 'SLoPe').replace('_r', ' r ')}\n{model}" for model, name in bars]
    axes.set_xticks(range(len(bars)), names, rotation=90, fontsize="x-small")
    axes.set_ylabel("share of dense")
    axes.set_title("Training state of whole models")
    figure.legend(loc="outside right upper", fontsize="x-small")
    return figure


def _quality(records: Sequence[Record]) -> Figure:
    """Training loss by variant, each curve the mean over seeds of means over a tenth of the run."""
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes: Any = figure.subplots()
    for variant, group in select.grouped(records, lambda r: r["facts"]["variant"]).items():
        curves = [r["facts"]["curve"] for r in group]
        mean = [sum(values) / len(values) for values in zip(*curves, strict=False)]
        axes.plot([(i + 1) / len(mean) for i in range(len(mean))], mean, marker=".", label=variant)
    axes.set(xlabel="share of the run", ylabel="training loss (nats per byte)", title="Short pretraining runs")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return figure
