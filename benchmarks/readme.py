"""The README's two sections of measured results, short and long: written from committed files, never by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pretrain_results
from benchmarks import gpu_report, highlights, records, select, tables, tile_table
from benchmarks.records import Record

_SECTIONS = ("highlights", "measured")
"""Names in the comments around each section: ``<!-- measured:begin -->``, ``<!-- measured:end -->``."""
_FORM = "github"
_NOTHING = "No results have been committed yet."


def updated(text: str, results: Path) -> str:
    """The README's text with its sections as the files in ``results`` have them.

    Raises:
        ValueError: the text lacks a section, or has one twice.
    """
    bodies = (highlights.table(results, _FORM) or _NOTHING, section(results))
    for name, body in zip(_SECTIONS, bodies, strict=True):
        begin, end = markers(name)
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"expected one {begin} and one {end}")
        before, rest = text.split(begin)
        _, after = rest.split(end)
        text = f"{before}{begin}\n{body}\n{end}{after}"
    return text


def markers(name: str) -> tuple[str, str]:
    """The comments before and after a section."""
    return f"<!-- {name}:begin -->", f"<!-- {name}:end -->"


def section(results: Path) -> str:
    """The long section: the demo's tables, those of each results file in order of their names, and those of tiles."""
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
