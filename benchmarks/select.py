"""Views of results: what tables and plots pick out of records."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from benchmarks.records import Record

COLUMNS: dict[str, tuple[str, str]] = {
    "forward": ("forward", "slope"),
    "grad_input, exact": ("grad_input", "slope_exact"),
    "grad_input, double-pruned": ("grad_input", "slope_double_pruned"),
    "grad_weight": ("grad_weight", "slope"),
    "all three, exact": ("step", "slope_exact"),
    "all three, double-pruned": ("step", "slope_double_pruned"),
}
"""What a reader calls a contender of the layer cases -> (measurement, contender)."""

PRODUCTS = ("forward", "grad_input", "grad_weight", "step")


def ok(records: Iterable[Record], *names: str) -> list[Record]:
    """The measurements of these names."""
    return [record for record in records if record["status"] == "ok" and record["name"] in names]


def failed(records: Iterable[Record]) -> list[Record]:
    return [record for record in records if record["status"] == "failed"]


def grouped(records: Iterable[Record], key: Callable[[Record], Any]) -> dict[Any, list[Record]]:
    """Records by key, keys in order of first appearance."""
    groups: dict[Any, list[Record]] = {}
    for record in records:
        groups.setdefault(key(record), []).append(record)
    return groups


def setting(record: Record) -> tuple[str, str, int]:
    """Suite, dtype, threads."""
    return record["suite"], record["facts"]["dtype"], record["threads"]


def titled(suite: str, dtype: str, threads: int) -> str:
    """A setting in words."""
    return f"suite {suite}, {dtype}, {counted(threads, 'thread')}"


def counted(number: int, what: str) -> str:
    """``"1 thread"``, ``"2 threads"``."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def shape(record: Record) -> str:
    """``"N x K"`` of a layer's weight."""
    size = record["facts"]["shape"]
    return f"{size['N']} x {size['K']}"


def speedup(record: Record, contender: str, baseline: str = "dense") -> dict[str, float]:
    """Summary of the ratios."""
    summary: dict[str, float] = record["speedup"][contender][baseline]
    return summary


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


DROP_IN = "slope_drop_in"
"""Contender whose weights stay dense-shaped, and its state as large as dense."""


def ours(record: Record) -> str:
    """The contender of a model's record that is not dense."""
    name: str
    (name,) = (name for name in record["seconds"] if name.startswith("slope"))
    return name


def state_bytes(record: Record, contender: str, group: str) -> dict[str, int]:
    """Weights, metadata, gradients, moments of ``"linears"``, ``"adapters"`` or ``"rest"``."""
    state: dict[str, int] = record["facts"]["state"][contender][group]
    return state


def provenance(records: Sequence[Record]) -> list[str]:
    """Where figures come from: a line for the machine, one for the versions, one for each command."""
    environments = [record["environment"] for record in records]

    def each(*names: str) -> str:
        return ", ".join(dict.fromkeys(" ".join(str(e[name]) for name in names) for e in environments))

    features = list(dict.fromkeys(feature for e in environments for feature in e.get("features", ())))
    machine = each("device")
    if any("driver" in e for e in environments):
        machine += f", driver {each('driver')}, CUDA {each('cuda')}"
    else:
        machine += f", {each('cores')} cores, {' '.join(features) or each('capability')}"
    commits = ", ".join(dict.fromkeys(f"{e['commit']}{' with changes' if e['dirty'] else ''}" for e in environments))
    dates = sorted({record["date"] for record in records})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return [
        machine,
        f"torch {each('torch')}, Triton {each('triton')}, Python {each('python')}; commit {commits}; {when}",
        *(f"`{command}`" for command in dict.fromkeys(record["command"] for record in records)),
    ]
