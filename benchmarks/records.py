"""Results as JSON lines: one line a measurement or a failure, each complete in itself."""

from __future__ import annotations

import dataclasses
import datetime
import getpass
import json
import math
import os
import site
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import Measurement

Record = dict[str, Any]
"""``suite``, ``case``, ``status`` ("ok" or "failed"), ``environment``, ``command``, ``date``, ``took`` (seconds of the
whole case), ``load`` (of the machine before it); then the fields of a Measurement, or ``error`` with the traceback."""

FILE = "results.jsonl"
ROOT = Path(__file__).resolve().parents[1]


def measurement_record(common: Record, measurement: Measurement) -> Record:
    rounded: Record = _rounded(dataclasses.asdict(measurement))
    return common | {"status": "ok"} | rounded


def failure_record(common: Record, error: str) -> Record:
    return common | {"status": "failed", "error": without_paths(error)}


def today() -> str:
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def append(path: Path, records: Iterable[Record]) -> None:
    """Add records to a file in one write, so that a case is in it as a whole or not at all."""
    lines = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        # A process killed while writing leaves half a line: what follows must not continue it.
        if file.tell() and not _ends_line(file.name):
            lines = "\n" + lines
        file.write(lines.encode())
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> list[Record]:
    """The records of a file, or of all ``*.jsonl`` files of a folder; unreadable lines are left out.

    Of a case that was run several times within a file only the last run counts.
    """
    if path.is_dir():
        return [record for file in sorted(path.glob("*.jsonl")) for record in read(file)]
    runs: dict[str, list[Record]] = {}
    last: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        case, run = record["case"], record["run"]
        if last.get(case) != run:
            runs[case] = []
            last[case] = run
        runs[case].append(record)
    return [record for records in runs.values() for record in records]


def finished(records: Sequence[Record], failed: bool = False) -> set[str]:
    """Cases that need not be run again; failed ones are tried anew, unless ``failed`` counts them as finished."""
    return {record["case"] for record in records if failed or record["status"] == "ok"}


def without_paths(text: str) -> str:
    """Replace private details of a machine: folders, and the user's name in them."""
    places = {
        str(ROOT): ".",
        sysconfig.get_path("purelib"): "<packages>",
        str(Path(torch.__file__).parents[1]): "<packages>",
        **dict.fromkeys(site.getsitepackages(), "<packages>"),
        sysconfig.get_path("stdlib"): "<python>",
        sys.prefix: "<environment>",
        sys.base_prefix: "<python>",
        tempfile.gettempdir(): "<temporary>",
        os.path.expanduser("~"): "<home>",
    }
    # The longest first: one folder may lie in another.
    for place in sorted(places, key=len, reverse=True):
        if len(place) > 1:
            text = text.replace(place, places[place])
    try:
        return text.replace(f"torchinductor_{getpass.getuser()}", "torchinductor")
    except (KeyError, OSError):  # A user without a name.
        return text


def _rounded(value: Any) -> Any:
    """Numbers with six digits: no measurement has more, and files of results are committed."""
    if isinstance(value, float):
        # JSON has no infinity; an error of that size is a result all the same.
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, list | tuple) else value


def _ends_line(name: str) -> bool:
    with open(name, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
