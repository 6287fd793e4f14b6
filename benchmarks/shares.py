"""The cases of a suite without timings, shared out among processes, each of which compiles on one core.

The processes are the same command, each with every n-th case, and write to the same results.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import records
from benchmarks.cases import Case
from benchmarks.runner import Outcome

UNTIMED = ("correctness",)
"""Suites of which several cases may run at a time."""


def execute(words: Sequence[str], path: Path, cases: Sequence[Case], jobs: int, retry: bool) -> Outcome:
    """Run the cases in as many processes; what a process did not finish is left.

    Args:
        words: the command's, for one suite.
        path: of the results.
    """
    before = records.read(path)
    had = records.finished(before, failed=not retry)
    todo = [case.id for case in cases if case.id not in had]
    jobs = min(jobs, len(cases)) if todo else 0
    # A pool of compilers in each process would be as many pools as cores.
    environment = {"TORCHINDUCTOR_COMPILE_THREADS": "1", **os.environ}
    command = [sys.executable, "-m", "benchmarks", *words, "--jobs", "1", "--share"]
    running = [subprocess.Popen([*command, f"{i}/{jobs}"], env=environment, cwd=records.ROOT) for i in range(jobs)]
    for process in running:
        process.wait()
    runs = {record["run"] for record in before}
    new: dict[str, list[records.Record]] = {}
    for record in records.read(path):
        if record["run"] not in runs:
            new.setdefault(record["case"], []).append(record)
    failed = [name for name in todo if any(map(_failed, new.get(name, ())))]
    left = [name for name in todo if name not in new]
    return Outcome(len(todo) - len(failed) - len(left), len(failed), len(cases) - len(todo), len(left))


def _failed(record: records.Record) -> bool:
    return bool(record["status"] == "failed" or record.get("facts", {}).get("passed") is False)
