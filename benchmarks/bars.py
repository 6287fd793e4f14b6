"""The library's performance goals on a GPU beside the measurements, and results that others have published."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks import kernel_tables, select
from benchmarks.memory_state import total
from benchmarks.model_tables import adapter_cost
from benchmarks.records import ROOT, Record
from benchmarks.tables import in_columns

PUBLISHED = ROOT / "benchmarks" / "published.json"


@dataclasses.dataclass(frozen=True)
class Bar:
    """One figure to reach."""

    what: str
    limit: float
    measured: Callable[[Sequence[Record]], float | None]
    at_most: bool = False
    """Whether less is better."""

    def row(self, records: Sequence[Record]) -> list[str]:
        value = self.measured(records)
        wanted = f"{'at most' if self.at_most else 'at least'} {self.limit:g}"
        if value is None:
            return [self.what, wanted, "-", "not measured"]
        met = value <= self.limit if self.at_most else value >= self.limit
        return [self.what, wanted, f"{value:.3f}", "met" if met else "missed"]


def _blocks(name: str, model: str = "", batch: int = 0, context: int = 0) -> Callable[[Sequence[Record]], list[Record]]:
    def find(records: Sequence[Record]) -> list[Record]:
        return [
            r
            for r in select.ok(records, name)
            if (not model or r["facts"]["model"] == model)
            and (not batch or r["facts"]["batch"] == batch)
            and (not context or r["facts"]["context"] == context)
        ]

    return find


def _lowest(
    find: Callable[[Sequence[Record]], list[Record]], value: Callable[[Record], float]
) -> Callable[[Sequence[Record]], float | None]:
    return lambda records: min(map(value, find(records)), default=None)


def _speedup(record: Record) -> float:
    return select.speedup(record, "slope")["median"]


def _worst_adapter_cost(records: Sequence[Record]) -> float | None:
    found = [r for r in select.ok(records, "block_train") if r["facts"]["rank_share"] < 0.03]
    return max(map(adapter_cost, found), default=None)


def _decode_linears(records: Sequence[Record]) -> float | None:
    found = [r for r in select.ok(records, "linears_forward") if r["facts"]["tokens"] == 1]
    return min(map(_speedup, found), default=None)


def _state(contender: str, dense: str) -> Callable[[Sequence[Record]], float | None]:
    def share(records: Sequence[Record]) -> float | None:
        states = [r["facts"]["state"] for r in select.ok(records, "memory")]
        return max((total(s[contender], "linears") / total(s[dense], "linears") for s in states), default=None)

    return share


def _slowest(records: Sequence[Record]) -> float | None:
    """Anything with default settings: products as the operators pick them, linears, blocks."""
    kernels = [r for r in records if r["suite"] == "kernels"]
    found = [
        kernel_tables.ratio(record, kernel_tables.default(record, family))["median"]
        for family, rows in kernel_tables.families(kernels).items()
        # The adapter is more work than dense has, not another way to do it.
        if family != "forward with adapter"
        for record in rows
    ]
    names = ("block_train", "block_prefill", "block_decode", "linears_forward", "linears_train")
    return min([*found, *map(_speedup, select.ok(records, *names))], default=None)


BARS = (
    Bar("training step, LLaMA-3-8B blocks, 8 x 2048", 1.20,
        _lowest(_blocks("block_train", "llama-3-8b", 8, 2048), _speedup)),
    Bar("training step, OPT-13B blocks, 8 x 2048", 1.25,
        _lowest(_blocks("block_train", "opt-13b", 8, 2048), _speedup)),
    Bar("prefill, slowest model, 8 x 2048", 1.35, _lowest(_blocks("block_prefill", "", 8, 2048), _speedup)),
    Bar("decoding at batch 1, linears, slowest model", 1.55, _decode_linears),
    Bar("decoding at batch 1, blocks, slowest model", 1.35, _lowest(_blocks("block_decode", "", 1), _speedup)),
    Bar("adapters of rank 1.56 %: share of the step", 0.05, _worst_adapter_cost, at_most=True),
    Bar("training state of the sparse linears", 0.55, _state("slope", "dense"), at_most=True),
    Bar("inference weights of the sparse linears", 0.60, _state("slope_inference", "dense_inference"), at_most=True),
    Bar("slowest of everything with default settings", 0.97, _slowest),
)  # fmt: skip
"""Speed as a multiple of dense in the same run, bfloat16."""


def table(records: Sequence[Record], form: str = "simple") -> str:
    """Each bar with what was measured."""
    return in_columns([bar.row(records) for bar in BARS], ["bar", "wanted", "measured", ""], form)


def published(records: Sequence[Record], form: str = "simple") -> str:
    """Per model, the figures that the method's authors published, on their GPU, and those measured here."""
    entries: list[dict[str, Any]] = json.loads(PUBLISHED.read_text(encoding="utf-8"))["models"]
    rows = []
    for model in dict.fromkeys(entry["model"] for entry in entries):
        for what in ("training speed-up", "inference speed-up", "training memory", "inference memory"):
            theirs = {
                entry["method"]: entry
                for entry in entries
                if (entry["model"], entry["what"], entry["rank"]) == (model, what, 0.0)
            }
            ours = _ours(records, model, what)
            if ours is None:
                continue
            notes = [entry["note"] for entry in theirs.values() if entry["note"] and entry["method"] == "SLoPe"]
            cells = [f"{theirs[method]['value']:.2f}" if method in theirs else "-" for method in ("SLoPe", "FST")]
            rows.append([model, what, f"{ours:.2f}", *cells, "; ".join(notes)])
    headers = ["model", "what", "measured here", "SLoPe, published", "FST, published", "note on the published figure"]
    return in_columns(rows, headers, form) if rows else ""


def _ours(records: Sequence[Record], model: str, what: str) -> float | None:
    if what.endswith("speed-up"):
        name = "block_train" if what.startswith("training") else "block_prefill"
        found = _blocks(name, model, 8, 2048)(records)
        return max(map(_speedup, found), default=None)
    states = [r["facts"]["state"] for r in select.ok(records, "memory") if r["facts"]["model"] == model]
    contender, dense = ("slope", "dense") if what.startswith("training") else ("slope_inference", "dense_inference")
    # Whole models, as theirs are.
    return max((total(s[contender]) / total(s[dense]) for s in states), default=None)


def sources() -> list[str]:
    """Where the published figures come from."""
    data = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    return list(data["sources"].values())
