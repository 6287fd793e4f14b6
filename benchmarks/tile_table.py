"""What every tile of every GPU kernel took once (``results/tiles-*.json``), as a table of each way's best tile."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tabulate

from benchmarks import select

WAYS = ("expanded", "dense_and_compressed", "triton", "mma_sp", "wgmma_sp", "recompressed")
"""First words of the contenders' names, up to an underscore or a space after them."""
TITLES = {
    "forward": "forward",
    "grad_input": "input gradient, exact",
    "grad_input_columns": "input gradient, double-pruned",
    "grad_weight": "weight gradient",
}
HEADERS = (
    "product", "M", "N", "K", "dense, us", "expanded + dense", "Triton", "mma.sp", "wgmma.sp", "with columns made anew",
)  # fmt: skip


def section(path: Path, form: str) -> str:
    """The file as Markdown."""
    data = json.loads(path.read_text(encoding="utf-8"))
    lines = select.provenance([{"environment": data["machine"], "date": data["date"], "command": ""}])[:-1]
    limits = data["limits"]
    measured = f"{limits['dense_flops'] / 1e12:.0f} TFLOP/s dense, {limits['copy_bytes'] / 1e12:.2f} TB/s"
    return (
        f"**GPU kernels, first run** ({'; '.join(lines)}; measured limits: {measured}). {data['about']}\n\n"
        f"Times faster than dense, best tile of each way:\n\n{table(data['products'], form)}"
    )


def table(products: list[dict[str, Any]], form: str) -> str:
    rows = []
    order = list(TITLES)
    for entry in sorted(products, key=lambda e: (order.index(e["product"]), e["N"] * e["K"], e["N"], e["K"], e["M"])):
        dense, best = entry["seconds"]["dense"], _best(entry["seconds"])
        # The dense weight gradient is compressed afterwards; other products have the weight expanded before.
        ways = [best.get("expanded", best.get("dense_and_compressed")), *(best.get(way) for way in WAYS[2:])]
        cells = ["-" if seconds is None else f"{dense / seconds:.2f}" for seconds in ways]
        sizes = (entry["M"], entry["N"], entry["K"])
        rows.append((TITLES[entry["product"]], *sizes, f"{1e6 * dense:.0f}", *cells))
    return tabulate.tabulate(rows, headers=HEADERS, tablefmt=form, disable_numparse=True)


def fastest(seconds: dict[str, float]) -> float:
    """The least time of a 2:4 way.

    Sparse tensor cores read the columns of a double-pruned weight, which each backward makes anew: their time without
    that does not count.
    """
    best = _best(seconds)
    if "recompressed" in best:
        best = {way: value for way, value in best.items() if way not in ("mma_sp", "wgmma_sp")}
    return min(best.values())


def _best(seconds: dict[str, float]) -> dict[str, float]:
    """Way -> its fastest tile's seconds."""
    found: dict[str, float] = {}
    for name, value in seconds.items():
        way = next((w for w in WAYS if name == w or name.startswith((f"{w}_", f"{w} "))), None)
        if way is not None:
            found[way] = min(value, found.get(way, value))
    return found
