"""The command line: ``python -m benchmarks run``, ``profile`` and ``report``."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import os
import re
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import machine
from benchmarks import cases, records, runner, shares

_INTERRUPTED = 130
_FLAGS = (("layers", 0), ("optimizer", "fused"), ("case_seconds", None), ("device", ""))
"""Flags of ``run`` that decide what is measured, with their defaults."""
_AHEAD = 60.0
"""Time limit in seconds for compiling kernels before a suite; in a run with a deadline, at most a third of its time."""
_RESULTS = records.ROOT / "benchmarks" / "results"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = _parser()
    words = sys.argv[1:] if arguments is None else list(arguments)
    given = parser.parse_args(words)
    given.words = words
    try:
        status: int = given.function(given)
    except BrokenPipeError:  # Whoever read the output has seen enough.
        return 1
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return status


def _run(given: argparse.Namespace) -> int:
    begun = time.monotonic()
    chosen = {suite: _cases(given, suite) for suite in given.suite}
    if given.list:
        print("\n".join(case.id for _, found in chosen.values() for case in found))
        return 0
    if not any(found for _, found in chosen.values()):
        suites = " ".join(given.suite)
        raise ValueError(f"--only {given.only.pattern!r} matches no case of suite {suites}; --list shows them")
    total = runner.Outcome()
    for number, (suite, (device, found)) in enumerate(chosen.items()):
        job = runner.Job(
            suite=suite,
            out=given.out,
            command=_command(given),
            environment=functools.partial(_environment, device),
            device=device,
            budget=given.budget,
            seconds=given.case_seconds,
            retry=given.retry,
        )
        if given.minutes:
            left = 60 * _deadlines(given)[number] - (time.monotonic() - begun)
            job = dataclasses.replace(job, allowance=left)
        if given.jobs > 1 and suite in shares.UNTIMED:
            words = [*given.words, "--suite", suite, "--out", str(given.out.resolve())]
            words += ["--minutes", f"{job.allowance / 60:.2f}"] if job.allowance is not None else []
            total += shares.execute(words, given.out / records.FILE, found, given.jobs, given.retry)
            continue
        if given.jobs > 1 and suite == "kernels" and device.type == "cuda":
            job = _compiled_ahead(given, job, found)
        try:
            total += runner.execute(job, found)
        except runner.BrokenDevice as error:
            print(f"{error}; going on in a new process", flush=True)
            _start_anew(given, begun)
    print(f"{total}; results: {given.out / records.FILE}")
    if total.left:
        print("The same command goes on where this one stopped.")
    return _INTERRUPTED if total.left else int(total.failed > 0)


def _compiled_ahead(given: argparse.Namespace, job: runner.Job, found: list[cases.Case]) -> runner.Job:
    """What is left of the job's time after its kernels were compiled."""
    from benchmarks import ahead

    had = records.finished(records.read(job.out / records.FILE), failed=not given.retry)
    todo = ahead.tasks(case for case in found if case.id not in had)
    begun, most = time.monotonic(), _AHEAD if job.allowance is None else min(_AHEAD, job.allowance / 3)
    wrong = ahead.compile_(todo, job.device, given.jobs, most)
    took = time.monotonic() - begun
    print(f"{len(todo)} kernels compiled ahead in {took:.0f} s" + "".join(f"\n  {why}" for why in wrong), flush=True)
    return job if job.allowance is None else dataclasses.replace(job, allowance=job.allowance - took)


def _cases(given: argparse.Namespace, suite: str) -> tuple[torch.device, list[cases.Case]]:
    device = torch.device(given.device or ("cpu" if suite in ("cpu", "compile") else _accelerator()))
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())  # as tensors name it, so that caches keyed by it hit
    options = cases.Options(
        device=device,
        threads=tuple(given.threads),
        dtypes=tuple(given.dtype),
        layers=given.layers,
        optimizer=given.optimizer,
        autotune=given.autotune,
        tiles=given.tiles,
        tiny=given.tiny,
    )
    found = [case for case in cases.cases(suite, options) if given.only.search(case.id)]
    first, step = given.share
    return device, found[first::step]


@functools.cache
def _environment(device: torch.device) -> dict[str, Any]:
    return machine.describe(device)


def _deadlines(given: argparse.Namespace) -> list[float]:
    """Minutes from the start after which each suite ends; time that a suite leaves over goes to the next."""
    minutes: list[float] = given.minutes
    if len(minutes) not in (1, len(given.suite)):
        raise ValueError(f"--minutes: expected one number, or one for each of {len(given.suite)} suites")
    each = minutes if len(minutes) > 1 else [minutes[0] / len(given.suite)] * len(given.suite)
    return list(itertools.accumulate(each))


def _start_anew(given: argparse.Namespace, begun: float) -> None:
    """Replace this process, which can no longer use its GPU, by one that continues without the failed cases."""
    words = [*given.words, "--no-retry"]
    if given.minutes:
        spent = (time.monotonic() - begun) / 60
        left = [max(0.0, deadline - spent) for deadline in _deadlines(given)]
        words += ["--minutes", *(f"{b - a:.2f}" for a, b in itertools.pairwise([0.0, *left]))]
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", "benchmarks", *words])


def _report(given: argparse.Namespace) -> int:
    from benchmarks import plots, readme, tables

    if given.folder is not None:
        found = records.read(given.folder)
        if not found:
            raise ValueError(f"{given.folder} has no results")
        print(tables.report(found))
        if given.plots is not None:
            for picture in plots.draw(found, given.plots):
                print(f"Written: {picture}")
    if given.write is None:
        return 0
    for path in given.write or readme.FILES:
        old = path.read_text(encoding="utf-8")
        new = readme.updated(old, _RESULTS)
        if given.check and new != old:
            print(f"{path} is not current: run python -m benchmarks report --write")
            return 1
        if not given.check:
            path.write_text(new, encoding="utf-8")
    return 0


def _profile(given: argparse.Namespace) -> int:
    from benchmarks import profiling

    device, found = _cases(given, given.suite)
    if not found:
        raise ValueError(f"--case {given.only.pattern!r} matches no case of suite {given.suite}")
    words = ["python", "-m", "benchmarks", "profile", "--suite", given.suite, "--case", given.only.pattern]
    command = shlex.join(words + ["--tiny"] * given.tiny)
    written = profiling.write(found, given.out, device, _environment(device), command)
    for path in written:
        print(f"Written: {path}")
    return 0 if len(written) == len(found) else 1


def _accelerator() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _command(given: argparse.Namespace) -> str:
    """How to repeat the measurement: the flags that decide what is measured, not where results go."""
    words = ["python", "-m", "benchmarks", "run", "--suite", *given.suite]
    if given.only.pattern:
        words += ["--only", given.only.pattern]
    for flag in ("threads", "dtype", "minutes"):
        if values := getattr(given, flag):
            words += [f"--{flag}", *map(str, values)]
    for flag, default in _FLAGS:
        if (value := getattr(given, flag)) != default:
            words += ["--" + flag.replace("_", "-"), str(value)]
    words += [f"--{flag}" for flag in ("autotune", "tiles", "tiny") if getattr(given, flag)]
    return shlex.join(words)


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {value}")
    return value


def _share(text: str) -> tuple[int, int]:
    first, _, step = text.partition("/")
    if not (first.isdecimal() and step.isdecimal() and int(first) < int(step)):
        raise argparse.ArgumentTypeError(f"expected I/N with I below N, got {text}")
    return int(first), int(step)


def _regex(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"not a regular expression: {error}") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure against dense PyTorch.")
    commands = parser.add_subparsers(required=True, metavar="run | profile | report")

    run = commands.add_parser("run", help="measure; goes on where an earlier run with the same --out stopped")
    run.set_defaults(function=_run)
    run.add_argument("--suite", required=True, nargs="+", choices=list(cases.SUITES), help="one or several, in order")
    run.add_argument("--out", type=Path, default=Path("runs/benchmarks"), help="folder for the results")
    run.add_argument("--only", type=_regex, default=re.compile(""), metavar="REGEX", help="cases whose id matches")
    run.add_argument("--list", action="store_true", help="print the ids of the cases and end")
    run.add_argument("--minutes", type=float, nargs="+", default=[], metavar="M",
                     help="be done by then, what needs more is left for later; one number, or one for each suite")
    run.add_argument("--jobs", type=_positive, default=1, metavar="N",
                     help="processes for what is not timed: cases of correctness, and what compiles for kernels")
    run.add_argument("--share", type=_share, default=(0, 1), metavar="I/N", help="every N-th case from the I-th on")
    run.add_argument("--budget", type=float, metavar="SECONDS", help="begin no case of a suite after this time")
    run.add_argument("--no-retry", dest="retry", action="store_false", help="leave cases that failed before alone")
    run.add_argument("--case-seconds", type=float, metavar="SECONDS", help="time for the samples of each case")
    run.add_argument("--threads", type=_positive, nargs="+", default=[], metavar="N", help="numbers of CPU threads")
    run.add_argument("--dtype", nargs="+", default=[], choices=[*cases.DTYPES, cases.AUTOCAST])
    run.add_argument("--device", default="", help="default: cpu for cpu and compile, else cuda where there is one")
    run.add_argument("--layers", type=_positive, default=0, help="blocks of a model; default: 4 on a GPU, all on a CPU")
    run.add_argument("--optimizer", choices=("fused", "foreach", "forloop"), default="fused", help="kind of AdamW")
    run.add_argument("--autotune", action="store_true", help="compile blocks and layers with max_autotune, dense too")
    run.add_argument("--tiles", action="store_true",
                     help="kernels and correctness: every tile; kernels: the products through max_autotune; takes long")
    run.add_argument("--tiny", action="store_true", help="sizes that run in seconds, to try the cases out")

    profile = commands.add_parser("profile", help="which kernels the contenders of a case spend their time in")
    profile.set_defaults(function=_profile, threads=[], dtype=[], layers=0, optimizer="fused", autotune=False,
                         tiles=False, share=(0, 1))
    profile.add_argument("--suite", required=True, choices=list(cases.SUITES))
    profile.add_argument("--case", dest="only", type=_regex, required=True, metavar="REGEX", help="ids that match")
    profile.add_argument("--out", type=Path, default=records.ROOT / "benchmarks" / "notes", help="folder for the notes")
    profile.add_argument("--device", default="", help="as of run")
    profile.add_argument("--tiny", action="store_true", help="sizes that run in seconds")

    report = commands.add_parser("report", help="tables and plots of a results folder; the README's tables")
    report.set_defaults(function=_report)
    report.add_argument("folder", type=Path, nargs="?", help="results of a run")
    report.add_argument("--plots", type=Path, metavar="DIR", help="write PNG files there")
    report.add_argument("--write", type=Path, nargs="*", metavar="FILE",
                        help="rewrite the sections of README.md and RESULTS.md (or of FILE) from benchmarks/results/")
    report.add_argument("--check", action="store_true", help="with --write: write nothing, fail if one is not current")
    return parser


if __name__ == "__main__":
    sys.exit(main())
