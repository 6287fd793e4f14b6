"""The test-suite's own tests of the device's kernels, in a process of their own, as one more case of correctness."""

from __future__ import annotations

import functools
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator

import torch

from benchmarks import records
from benchmarks.cases import Case, Measurement, Options, Run

TESTS = ("tests/gpu",)
_COUNTS = re.compile(r"(\d+) (passed|failed|skipped|errors?|xfailed)")


def suite_case(options: Options) -> Case:
    chosen = (*TESTS, "-k", "zero_sizes") if options.tiny else TESTS
    return Case("correctness/pytest/gpu", functools.partial(_run, chosen), threads=1, limit=280.0, needs=60.0)


def _run(chosen: tuple[str, ...], given: Run) -> Iterator[Measurement]:
    if importlib.util.find_spec("pytest") is None:
        raise RuntimeError("pytest is not installed: the test-suite's own tests of the kernels cannot run here")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen]
    if torch.cuda.is_available() and importlib.util.find_spec("xdist") is not None:
        command += ["-n", "8"]  # They wait for the compiler, which has one core each, and not for the GPU.
    done = subprocess.run(command, cwd=records.ROOT, capture_output=True, text=True, timeout=270, check=False)
    last = done.stdout.splitlines()[-1] if done.stdout else ""
    counts = {what: int(number) for number, what in _COUNTS.findall(last)}
    if not counts:
        raise RuntimeError(f"no test ran:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    facts = {
        "dtype": "all",
        "tests": counts,
        "passed": done.returncode == 0,
        "output": records.without_paths(done.stdout[-3000:]) if done.returncode else "",
    }
    yield Measurement("correctness_tests", {}, {}, facts)
