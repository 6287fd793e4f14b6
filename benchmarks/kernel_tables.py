"""Tables of the suites kernels and layer: which way is fastest where, and how far from the device's limits."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks import select
from benchmarks.records import Record
from benchmarks.tables import in_columns, milliseconds, with_quartiles

FAMILIES = {
    "forward": ("forward", ""),
    "grad_input, exact": ("grad_input", "exact"),
    "grad_input, double-pruned": ("grad_input", "double_pruned"),
    "grad_weight": ("grad_weight", ""),
    "forward with adapter": ("low_rank", ""),
}
"""What a reader calls it -> (measurement, end of the names of the contenders that compute it)."""
DENSE = ("dense", "compiled")
PEERS = ("cusparselt", "cutlass", "torchao")
NOISE = 0.97
"""Slower than dense by more than this is slower."""


def contenders(record: Record, family: str) -> list[str]:
    """The library's ways to compute a family's product."""
    end = FAMILIES[family][1]
    names = (name for name in record["seconds"] if name not in DENSE and not name.startswith(PEERS))
    # In low_rank, "slope" has no adapter.
    return [n for n in names if n.endswith(end) and not (family == "forward with adapter" and n == "slope")]


def default(record: Record, family: str) -> str:
    """The contender that the operator itself picks."""
    end = FAMILIES[family][1]
    return "slope_adapter" if family == "forward with adapter" else f"slope_{end}" if end else "slope"


def fastest(record: Record, names: Iterable[str]) -> str:
    return min(names, key=lambda name: record["seconds"][name]["median"])


def best_dense(record: Record) -> str:
    """The faster one of eager cuBLAS and ``torch.compile`` with max-autotune, where both were measured."""
    return fastest(record, [name for name in DENSE if name in record["seconds"]])


def ratio(record: Record, name: str) -> dict[str, float]:
    """How many times faster than the best dense one."""
    return select.speedup(record, name, best_dense(record))


def families(records: Sequence[Record]) -> dict[str, list[Record]]:
    """The records of each family that has any."""
    found = {name: select.ok(records, measured) for name, (measured, _) in FAMILIES.items()}
    return {name: rows for name, rows in found.items() if rows}


def summary(records: Sequence[Record], form: str = "simple") -> str:
    """By tokens: the fastest choice and the operator's own, against the best dense: geometric mean and worst shape."""
    rows = []
    for family, found in families(records).items():
        for M, group in sorted(select.grouped(found, lambda r: r["facts"]["shape"]["M"]).items()):
            best = [ratio(r, fastest(r, contenders(r, family)))["median"] for r in group]
            own = [ratio(r, default(r, family))["median"] for r in group]
            # Autotuning has dense among its choices: where nothing beats it, it is what is taken.
            tuned = [max(b, 1.0) for b in best]
            cells = [f"{select.geometric_mean(v):.2f} ({min(v):.2f})" for v in (own, best, tuned)]
            rows.append([family, str(M), str(len(group)), *cells, _of(group, family, "autotuned")])
            rows[-1] += [_of(group, family, peer) for peer in PEERS[:2]]
    headers = ["product", "tokens", "shapes", "as picked by rule", "fastest 2:4", "fastest, or dense", "max_autotune"]
    headers += PEERS[:2]
    return in_columns(rows, headers, form)


def _of(group: Sequence[Record], family: str, beginning: str) -> str:
    """Geometric mean and worst of the family's contenders whose names begin so, the fastest of each record."""
    end = FAMILIES[family][1]
    names = [(r, [n for n in r["seconds"] if n.startswith(beginning) and n.endswith(end)]) for r in group]
    found = [ratio(r, fastest(r, n))["median"] for r, n in names if n]
    return f"{select.geometric_mean(found):.2f} ({min(found):.2f})" if found else "-"


def winners(records: Sequence[Record], form: str = "simple") -> str:
    """Who is fastest, by product and tokens: the number of shapes that each contender wins."""
    rows = []
    for family, found in families(records).items():
        for M, group in sorted(select.grouped(found, lambda r: r["facts"]["shape"]["M"]).items()):
            end = FAMILIES[family][1]
            counts: collections.Counter[str] = collections.Counter()
            for record in group:
                peers = [n for n in record["seconds"] if n.startswith(PEERS) and n.endswith(end)]
                counts[fastest(record, [best_dense(record), *contenders(record, family), *peers])] += 1
            won = ", ".join(f"{name} {count}" for name, count in counts.most_common())
            rows.append([family, str(M), won])
    return in_columns(rows, ["product", "tokens", "fastest, number of shapes"], form)


def every_case(records: Sequence[Record], form: str = "simple") -> str:
    """All cases: dense time and its share of the limit, the operator's own choice, and the fastest one."""
    rows = []
    for family, found in families(records).items():
        for record in sorted(found, key=_place):
            own, best = default(record, family), fastest(record, contenders(record, family))
            dense, floor = best_dense(record), record["facts"].get("floor", {})
            rows.append(
                [
                    family,
                    select.shape(record),
                    str(record["facts"]["shape"]["M"]),
                    record["facts"]["dtype"],
                    milliseconds(record["seconds"][dense]["median"]),
                    share_of_limit(floor.get("dense"), record["seconds"][dense]),
                    with_quartiles(ratio(record, own)),
                    best,
                    with_quartiles(ratio(record, best)),
                    share_of_limit(floor.get("sparse"), record["seconds"][best]),
                ]
            )
    headers = ["product", "N x K", "tokens", "dtype", "dense, ms", "of its limit", "as picked by rule", "fastest"]
    return in_columns(rows, [*headers, "times faster", "of its limit"], form)


def worst(records: Sequence[Record], form: str = "simple") -> str:
    """The slowest ratio of each product: as the operator picks, and of the fastest 2:4 way."""
    rows = []
    for family, found in families(records).items():
        picked = min(found, key=lambda r: ratio(r, default(r, family))["median"])
        low = ratio(picked, default(picked, family))["median"]
        below = sum(ratio(r, default(r, family))["median"] < NOISE for r in found)
        where = f"{select.shape(picked)}, {picked['facts']['shape']['M']} tokens, {picked['facts']['dtype']}"
        rows.append([family, f"{low:.2f}", where, f"{below} of {len(found)}"])
    return in_columns(rows, ["product", "worst ratio, as picked by rule", "where", f"below {NOISE}"], form)


def linears(records: Sequence[Record], form: str = "simple") -> str:
    """All linears of a block at a time."""
    rows = []
    for record in records:
        facts, seconds = record["facts"], record["seconds"]
        what = record["name"].removeprefix("linears_")
        cells = [facts["model"], what, str(facts["tokens"]), facts["dtype"], milliseconds(seconds["dense"]["median"])]
        cells += [share_of_limit(facts["floor"]["dense"], seconds["dense"])]
        for name in ("slope", "slope_adapters", "torchao"):
            cells.append(with_quartiles(select.speedup(record, name)) if name in seconds else "-")
        rows.append([*cells, share_of_limit(facts["floor"]["sparse"], seconds["slope"])])
    headers = ["model", "linears of a block", "tokens", "dtype", "dense, ms", "of its limit", "SLoPe", "with adapters"]
    return in_columns(rows, [*headers, "torchao", "SLoPe, of its limit"], form)


def left_out(records: Sequence[Record], form: str = "simple") -> str:
    """Contenders that did not run or were wrong, by reason, and in how many cases."""
    reasons: collections.Counter[tuple[str, str]] = collections.Counter()
    for record in records:
        for name, why in record["facts"].get("left_out", {}).items():
            reasons[name, why] += 1
    rows = [[name, str(count), why] for (name, why), count in sorted(reasons.items())]
    return in_columns(rows, ["left out", "cases", "why"], form)


def limits(records: Iterable[Record], form: str = "simple") -> str:
    """What the device was measured to reach."""
    rows = [
        [r["facts"]["dtype"], f"{r['facts']['bandwidth'] / 1e9:,.0f}", f"{r['facts']['flops'] / 1e12:,.1f}"]
        for r in records
    ]
    return in_columns(rows, ["dtype", "copy, GB/s", "dense product, TFLOP/s"], form)


def _place(record: Record) -> tuple[str, int, int, int]:
    shape = record["facts"]["shape"]
    return record["facts"]["dtype"], shape["N"], shape["K"], shape["M"]


def share_of_limit(floor: dict[str, Any] | None, seconds: dict[str, float]) -> str:
    """How near a median is to the least time, and what bounds that."""
    return "-" if floor is None else f"{floor['seconds'] / seconds['median']:.0%} ({floor['bound']})"
