"""The coverage table: its data as committed, and the README's section made from it."""

from __future__ import annotations

import collections
import json
from pathlib import Path
from typing import Any

from tabulate import tabulate

from matrix.models import MODELS, Model
from slope_compile.report import Reason

BEGIN, END = "<!-- coverage:begin -->", "<!-- coverage:end -->"
RESULTS = Path(__file__).parent / "results.json"
Results = dict[str, dict[str, Any]]
"""``model/mode`` -> ``status`` ("ok" or "failed"), then what was counted or the error, and the versions it ran with."""

_COLUMNS = {
    "eager": "eager, prepared",
    "train": "training, prepared",
    "drop-in": "training, drop-in",
    "inference": "inference",
    "dynamic": "dynamic shapes",
    "autocast": "autocast bf16",
    "checkpointing": "checkpointing",
    "accumulation": "accumulation",
    "breaks": "graph breaks",
    "generate": "generate()",
    "export": "export",
}
_WORDS = {
    Reason.FIRST: "first",
    Reason.HEAD: "head",
    Reason.TIED: "tied",
    Reason.ROUTER: "router",
    Reason.EXPERTS: "fused experts",
}
_LEGEND = """\
A cell says how many linears were sparse in the graphs that were compiled, of those that are eligible. It stands here
only if, besides, every other linear has a decision with the reason in the second column, no product with a dense weight
is left without one, and outputs and (in training) all gradients equal those of dense layers under hand-made masks:
in float64, or in float32 where the model computes in it; under autocast, the error against float32 is at most twice the
masked reference's and a rounding. Models have two small blocks, random weights. Dynamic shapes: three, compiled once;
accumulation: two micro-batches, an optimizer step, a third; breaks: one in the middle of each block; generate: a static
cache, prefill and decode; export: `transform`, forward and backward (there the dataflow says what is first: in T5 and
Whisper the decoder's first linears too, in Phi the MLP that stands beside the first attention).\
"""


def read(path: Path = RESULTS) -> Results:
    if not path.exists():
        return {}
    found: Results = json.loads(path.read_text(encoding="utf-8"))
    return found


def write(results: Results, path: Path = RESULTS) -> None:
    lines = [f"{json.dumps(name)}: {json.dumps(results[name])}" for name in sorted(results)]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def updated(text: str, results: Results) -> str:
    """The README's text with its section as the results have it.

    Raises:
        ValueError: the text has no section, or more than one.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"expected one {BEGIN} and one {END}")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{section(results)}\n{END}{after}"


def section(results: Results) -> str:
    """Table, legend and notes."""
    notes: dict[str, str] = {}
    rows = []
    for model in MODELS:
        cells = [_cell(model, mode, results, notes) for mode in _COLUMNS]
        rows.append([model.title, _dense(model), *cells])
    table = tabulate(rows, headers=["model", "dense, because", *_COLUMNS.values()], tablefmt="github")
    lines = [f"{mark} {text}." for text, mark in notes.items()]
    return "\n\n".join([table, *([" ".join(lines)] if lines else []), _LEGEND, _provenance(results)])


def _cell(model: Model, mode: str, results: Results, notes: dict[str, str]) -> str:
    if mode in model.skipped:
        text = model.skipped[mode]
        return f"- {notes.setdefault(text, f'({len(notes) + 1})')}"
    found = results.get(f"{model.name}/{mode}")
    if found is None:
        return "not run"
    if found["status"] != "ok":
        return "failed"
    text = f"{found['sparse']}/{found['eligible']}"
    if mode in model.apart:
        _, why = model.apart[mode]
        text += f" {notes.setdefault(why, f'({len(notes) + 1})')}"
    return text


def _dense(model: Model) -> str:
    counts = collections.Counter(_WORDS[reason] for reason in model.dense.values())
    return ", ".join(f"{number} {word}" for word, number in counts.items())


def _provenance(results: Results) -> str:
    def each(name: str) -> str:
        return ", ".join(dict.fromkeys(str(cell.get(name, 'unknown')) for cell in results.values()))

    words = f"torch {each('torch')}, transformers {each('transformers')} (which has a class for each model named here)"
    words += f", Python {each('python')}, rewritten graphs run by {each('compiler')}"
    return f"Measured with {words}; commit {each('commit')}."
