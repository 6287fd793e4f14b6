"""The test-suite's own tests of the device's kernels, in a process of their own, as one more case of correctness."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence

import torch

from benchmarks import records
from benchmarks.cases import Case, Measurement, Options, Run

TESTS = ("tests/gpu",)
SECONDS = 270.0
"""Limit of the run."""
_COUNTS = re.compile(r"(\d+) (passed|failed|skipped|errors?|xfailed)")
_PROGRESS = re.compile(r"[.FEsxX]+ *(\[ *\d+%\])?")
_LETTERS = {".": "passed", "F": "failed", "E": "errors", "s": "skipped", "x": "xfailed"}


def suite_case(options: Options) -> Case:
    chosen = (*TESTS, "-k", "zero_sizes") if options.tiny else TESTS
    return Case("correctness/pytest/gpu", functools.partial(_run, chosen), threads=1, limit=280.0, needs=60.0)


def _run(chosen: tuple[str, ...], given: Run) -> Iterator[Measurement]:
    if importlib.util.find_spec("pytest") is None:
        raise RuntimeError("pytest is not installed: the test-suite's own tests of the kernels cannot run here")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen]
    if torch.cuda.is_available() and importlib.util.find_spec("xdist") is not None:
        # They wait for the compiler, which has one core each, and not for the GPU.
        command += ["-n", str(max(2, min(12, (os.cpu_count() or 2) - 2)))]
    yield tested(command, SECONDS)


def tested(command: Sequence[str], seconds: float) -> Measurement:
    """What a run of pytest found; of one that is not over in time, what it had found until then.

    Raises:
        RuntimeError: no test ran.
    """
    try:
        done = subprocess.run(command, cwd=records.ROOT, capture_output=True, text=True, timeout=seconds, check=False)
        output, errors, passed = done.stdout, done.stderr, done.returncode == 0
        last = output.splitlines()[-1] if output else ""
        counts = {what: int(number) for number, what in _COUNTS.findall(last)}
    except subprocess.TimeoutExpired as late:
        output, errors, passed = _text(late.stdout), _text(late.stderr), False
        shown = "".join(line.split("[")[0] for line in output.splitlines() if _PROGRESS.fullmatch(line.strip()))
        counts = {what: shown.count(letter) for letter, what in _LETTERS.items() if letter in shown}
        errors += f"\nnot over after {seconds:.0f} s"
    if not counts:
        raise RuntimeError(f"no test ran:\n{output[-2000:]}{errors[-2000:]}")
    facts = {
        "dtype": "all",
        "tests": counts,
        "passed": passed,
        "output": "" if passed else records.without_paths(output[-3000:] + errors[-200:]),
    }
    return Measurement("correctness_tests", {}, {}, facts)


def _text(given: str | bytes | None) -> str:
    return given.decode(errors="replace") if isinstance(given, bytes) else given or ""
