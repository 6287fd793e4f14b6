"""The README's section of measured results: written from committed files, never by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pretrain_results
from benchmarks import gpu_report, records, select, tables, tile_table
from benchmarks.records import Record

BEGIN, END = "<!-- measured:begin -->", "<!-- measured:end -->"
_FORM = "github"
_NOTHING = "No results have been committed yet."


def updated(text: str, results: Path) -> str:
    """The README's text with its section as the files in ``results`` have it.

    Raises:
        ValueError: the text has no section, or more than one.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"expected one {BEGIN} and one {END}")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{section(results)}\n{END}{after}"


def section(results: Path) -> str:
    """The section's text: the demo's tables, those of each results file in order of their names, and those of tiles."""
    parts = [_demo(path) for path in sorted(results.glob("demo-*.json"))]
    parts += [_benchmark(found) for path in sorted(results.glob("*.jsonl")) if (found := records.read(path))]
    parts += [tile_table.section(path, _FORM) for path in sorted(results.glob("tiles-*.json"))]
    return "\n\n".join(parts) or _NOTHING


def _demo(path: Path) -> str:
    data = json.loads(path.read_text(encoding="utf-8"))
    machine, found = data["machine"], pretrain_results.read_runs(data)
    settings = data["settings"]
    size = f"{settings['layers']} x {settings['width']}, {settings['batch']} x {settings['context']} tokens a step"
    lines = select.provenance([{"environment": machine, "date": data["date"], "command": data["command"]}])
    table = pretrain_results.table(found, _FORM)
    what = f"{size}, {settings['dtype']}, {select.counted(machine['threads'], 'thread')}"
    return f"**Demo** ({what}): {_cited(lines)}\n\n{table}"


def _benchmark(found: list[Record]) -> str:
    parts = [f"**Benchmarks**: {_cited(select.provenance(found))}"]
    products = select.ok([record for record in found if record["suite"] != "kernels"], *select.PRODUCTS)
    for setting, group in select.grouped(products, select.setting).items():
        parts.append(
            f"Single layers, {select.titled(*setting)}: times faster than eager dense, geometric mean over shapes "
            f"(worst shape).\n\n{tables.summary(group, _FORM)}"
        )
    if rows := select.ok(found, "train", "decode"):
        parts.append(
            f"Models against `torch.compile`d dense (first to third quartile).\n\n{tables.models(rows, _FORM)}"
        )
    if rows := select.ok(found, "train"):
        parts.append(f"Training state (weights, metadata, gradients, moments).\n\n{tables.memory(rows, _FORM)}")
    if rows := select.ok(found, "compile"):
        title = f"Time of the passes in `torch.compile`, prepared models: {tables.compilation_goals(rows)}."
        parts.append(f"{title}\n\n{tables.compilation(rows, _FORM)}")
    parts += [f"{title}\n\n{table}" for title, table in gpu_report.sections(found, _FORM, whole=False)]
    if failures := select.failed(found):
        parts.append(f"Failed: {', '.join(record['case'] for record in failures)}.")
    return "\n\n".join(parts)


def _cited(lines: list[str]) -> str:
    return "; ".join(lines) + "."
