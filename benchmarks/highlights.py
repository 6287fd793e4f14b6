"""The README's first table of results: what was gained where, in a few rows from all committed files."""

from __future__ import annotations

import dataclasses
import functools
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import model_tables, records, select, tile_table
from benchmarks.memory_state import total
from benchmarks.records import Record
from benchmarks.tables import in_columns

FEW = 64
"""Tokens below which a product is bound by reading the weight."""
LEGEND = """\
Speed (all rows above the training state) is in times of dense: the geometric mean (slowest to fastest) over sizes,
dtypes, numbers of threads and both kinds of input gradient. Whole models are compared with `torch.compile`d dense,
single layers with eager dense; on a GPU, a layer's time is the sum of its products, each with the best tile. Training
state (weights, metadata, gradients, moments) is a share of dense, of whole prepared models. Losses are in nats per
byte: mean (lowest to highest) over seeds. Such short runs show that training works, not which model ends better: see
the last row. -: not measured."""


@dataclasses.dataclass
class Machine:
    """What was measured on one device."""

    records: list[Record] = dataclasses.field(default_factory=list)
    products: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """Entries of the tables of tiles."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One thing measured."""

    what: str
    values: Callable[[Machine], list[float]]
    of: Callable[[Machine], list[Record]] | None = None
    """The records it comes from, where their models are named in the table."""
    loss: bool = False
    """A difference of losses, not a ratio."""

    def title(self, machines: Sequence[Machine]) -> str:
        found = [] if self.of is None else [record for machine in machines for record in self.of(machine)]
        models = dict.fromkeys(record["facts"]["model"] for record in found)
        return f"{self.what} ({', '.join(models)})" if models else self.what

    def cell(self, machine: Machine) -> str:
        values = self.values(machine)
        if not values:
            return "-"
        middle = statistics.fmean(values) if self.loss else select.geometric_mean(values)
        form = "{:+.3f}" if self.loss else "{:.2f}"
        low, shown, high = (form.format(value) for value in (min(values), middle, max(values)))
        return shown if len(values) == 1 else f"**{shown}** ({low} to {high})"


def table(results: Path, form: str) -> str:
    """A row for each thing measured, a column for each machine; "" where there is nothing."""
    machines = {name: machine for name, machine in _machines(results).items() if any(r.values(machine) for r in ROWS)}
    found = list(machines.values())
    rows = [[row.title(found), *map(row.cell, found)] for row in ROWS if any(row.values(machine) for machine in found)]
    return f"{in_columns(rows, ['', *machines], form)}\n\n{LEGEND}" if rows else ""


def _machines(results: Path) -> dict[str, Machine]:
    """By the device's name, in order of the files' names."""
    machines: dict[str, Machine] = {}
    for path in sorted(results.glob("*.jsonl")):
        for record in records.read(path):
            machines.setdefault(_device(record["environment"]), Machine()).records.append(record)
    for path in sorted(results.glob("tiles-*.json")):
        data = json.loads(path.read_text(encoding="utf-8"))
        machines.setdefault(_device(data["machine"]), Machine()).products.extend(data["products"])
    return machines


def _device(environment: dict[str, Any]) -> str:
    name: str = environment["device"]
    return name if "driver" in environment else f"{name}, {environment['capability']}"


def _models(name: str, drop_in: bool, machine: Machine) -> list[Record]:
    """Records of whole models; drop-in or prepared."""
    return [r for r in select.ok(machine.records, name) if (select.ours(r) == select.DROP_IN) == drop_in]


_prepared = functools.partial(_models, "train", False)
_drop_in = functools.partial(_models, "train", True)
_decoding = functools.partial(_models, "decode", False)
_drop_in_decoding = functools.partial(_models, "decode", True)


def _states(machine: Machine) -> list[Record]:
    return [*_prepared(machine), *select.ok(machine.records, "memory")]


def _speed(of: Callable[[Machine], list[Record]]) -> Callable[[Machine], list[float]]:
    return lambda machine: [select.speedup(record, select.ours(record))["median"] for record in of(machine)]


def _layers(machine: Machine) -> list[float]:
    """Forward, input gradient and weight gradient of a layer for many tokens."""
    steps = [r for r in select.ok(machine.records, "step") if r["facts"]["shape"]["M"] >= FEW]
    found = [
        select.speedup(record, name)["median"]
        for record in steps
        for name in ("slope_exact", "slope_double_pruned")
        if name in record["seconds"]
    ]
    for products in select.grouped(machine.products, lambda p: (p["M"], p["N"], p["K"])).values():
        times = {product["product"]: product["seconds"] for product in products}
        for gradient in ("grad_input", "grad_input_columns"):
            parts = [times.get(name) for name in ("forward", gradient, "grad_weight")]
            if all(parts):
                found.append(sum(p["dense"] for p in parts if p) / sum(tile_table.fastest(p) for p in parts if p))
    return found


def _forward(machine: Machine) -> list[float]:
    """The forward product of a layer for few tokens."""
    found = [
        select.speedup(record, "slope")["median"]
        for record in select.ok(machine.records, "forward")
        if record["facts"]["shape"]["M"] < FEW and record["suite"] == "cpu"
    ]
    few = [p["seconds"] for p in machine.products if p["product"] == "forward" and p["M"] < FEW]
    return found + [seconds["dense"] / tile_table.fastest(seconds) for seconds in few]


def _state(machine: Machine) -> list[float]:
    """Of whole models: embeddings and heads included, without adapters."""
    found = []
    for record in _states(machine):
        state = record["facts"]["state"]
        ours = "slope" if "slope" in state else select.ours(record)
        found.append(total(state[ours]) / total(state["dense"]))
    return found


def _loss(variant: str) -> Callable[[Machine], list[float]]:
    def gaps(machine: Machine) -> list[float]:
        found = select.ok(machine.records, "quality")
        return model_tables.loss_gaps(found, [r for r in found if r["facts"]["variant"] == variant])

    return gaps


ROWS = (
    Row("training step", _speed(_prepared), _prepared),
    Row("training step, drop-in", _speed(_drop_in), _drop_in),
    Row("decoding", _speed(_decoding), _decoding),
    Row("decoding, drop-in", _speed(_drop_in_decoding), _drop_in_decoding),
    Row(f"one layer, forward and backward, {FEW} tokens or more", _layers),
    Row(f"one layer, forward, fewer than {FEW} tokens", _forward),
    Row("training state", _state, _states),
    Row("validation loss of short runs, minus dense", _loss("double_pruned"), loss=True),
    Row("the same of a dense model of half the blocks", _loss("dense_half"), loss=True),
)
