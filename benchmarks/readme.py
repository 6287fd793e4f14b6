"""What the README and ``RESULTS.md`` say was measured: written from committed files, never by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pretrain_results
from benchmarks import gpu_report, highlights, records, select, tables, tile_table
from benchmarks.records import Record

FILES = (records.ROOT / "README.md", records.ROOT / "benchmarks" / "RESULTS.md")
"""The first has a table of highlights, the second all tables."""
_FORM = "github"
_NOTHING = "No results have been committed yet."


def updated(text: str, results: Path) -> str:
    """The text of a file with its sections as the files in ``results`` have them.

    Raises:
        ValueError: the text has no section, one twice, or half of one.
    """
    found = 0
    for name, body in _SECTIONS.items():
        begin, end = markers(name)
        counts = text.count(begin), text.count(end)
        if counts not in ((0, 0), (1, 1)):
            raise ValueError(f"expected one {begin} and one {end}")
        if counts == (1, 1):
            found += 1
            before, rest = text.split(begin)
            _, after = rest.split(end)
            text = f"{before}{begin}\n{body(results)}\n{end}{after}"
    if not found:
        raise ValueError(
            f"expected one of the sections {', '.join(_SECTIONS)}, each between {' and '.join(markers('NAME'))}"
        )
    return text


def markers(name: str) -> tuple[str, str]:
    """The comments before and after a section."""
    return f"<!-- {name}:begin -->", f"<!-- {name}:end -->"


def short(results: Path) -> str:
    """A row for each thing measured, a column for each machine."""
    return highlights.table(results, _FORM) or _NOTHING


def section(results: Path) -> str:
    """All tables, with a heading for each file: those of the demo, of the benchmarks, and of tiles."""
    parts = {path: _demo(path) for path in sorted(results.glob("demo-*.json"))}
    parts |= {path: _benchmark(found) for path in sorted(results.glob("*.jsonl")) if (found := records.read(path))}
    parts |= {path: tile_table.section(path, _FORM) for path in sorted(results.glob("tiles-*.json"))}
    return "\n\n".join(f"## {path.name}\n\n{text}" for path, text in parts.items()) or _NOTHING


_SECTIONS = {"highlights": short, "measured": section}
"""Name in the comments around a section (``<!-- measured:begin -->``, ``<!-- measured:end -->``) -> its text."""


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
