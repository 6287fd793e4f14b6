"""The command line: ``python -m benchmarks run`` and ``python -m benchmarks report``."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import machine
from benchmarks import cases, records, runner

_INTERRUPTED = 130
_RESULTS = records.ROOT / "benchmarks" / "results"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = _parser()
    given = parser.parse_args(arguments)
    try:
        status: int = given.function(given)
    except BrokenPipeError:  # Whoever read the output has seen enough.
        return 1
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return status


def _run(given: argparse.Namespace) -> int:
    device = torch.device(given.device or ("cpu" if given.suite in ("cpu", "compile") else _accelerator()))
    options = cases.Options(
        device=device,
        threads=tuple(given.threads),
        dtypes=tuple(given.dtype),
        layers=given.layers,
        optimizer=given.optimizer,
        tiny=given.tiny,
    )
    wanted = [case for case in cases.cases(given.suite, options) if given.only.search(case.id)]
    if given.list:
        print("\n".join(case.id for case in wanted))
        return 0
    if not wanted:
        raise ValueError(f"--only {given.only.pattern!r} matches no case of suite {given.suite!r}; --list shows them")
    job = runner.Job(
        suite=given.suite,
        out=given.out,
        command=_command(given),
        environment=lambda: machine.describe(device),
        device=device,
        budget=given.budget,
        seconds=given.case_seconds,
    )
    outcome = runner.execute(job, wanted)
    print(f"{outcome}; results: {given.out / records.FILE}")
    if outcome.left:
        print("The same command goes on where this one stopped.")
    return _INTERRUPTED if outcome.left else int(outcome.failed > 0)


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
    if given.readme is not None:
        old = given.readme.read_text(encoding="utf-8")
        new = readme.updated(old, _RESULTS)
        if given.check and new != old:
            print(f"{given.readme} is not current: run python -m benchmarks report --readme {given.readme}")
            return 1
        if not given.check:
            given.readme.write_text(new, encoding="utf-8")
    return 0


def _accelerator() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _command(given: argparse.Namespace) -> str:
    """How to repeat the measurement: the flags that decide what is measured, not where results go."""
    words = ["python", "-m", "benchmarks", "run", "--suite", given.suite]
    if given.only.pattern:
        words += ["--only", given.only.pattern]
    for flag in ("threads", "dtype"):
        if values := getattr(given, flag):
            words += [f"--{flag}", *map(str, values)]
    for flag, default in (("layers", 0), ("optimizer", "fused"), ("case_seconds", None), ("device", "")):
        if (value := getattr(given, flag)) != default:
            words += ["--" + flag.replace("_", "-"), str(value)]
    return shlex.join(words + ["--tiny"] * given.tiny)


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {value}")
    return value


def _regex(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"not a regular expression: {error}") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure against dense PyTorch.")
    commands = parser.add_subparsers(required=True, metavar="run | report")

    run = commands.add_parser("run", help="measure; goes on where an earlier run with the same --out stopped")
    run.set_defaults(function=_run)
    run.add_argument("--suite", required=True, choices=list(cases.SUITES))
    run.add_argument("--out", type=Path, default=Path("runs/benchmarks"), help="folder for the results")
    run.add_argument("--only", type=_regex, default=re.compile(""), metavar="REGEX", help="cases whose id matches")
    run.add_argument("--list", action="store_true", help="print the ids of the cases and end")
    run.add_argument("--budget", type=float, metavar="SECONDS", help="begin no case after this time")
    run.add_argument("--case-seconds", type=float, metavar="SECONDS", help="time for the samples of each case")
    run.add_argument("--threads", type=_positive, nargs="+", default=[], metavar="N", help="numbers of CPU threads")
    run.add_argument("--dtype", nargs="+", default=[], choices=[*cases.DTYPES, cases.AUTOCAST])
    run.add_argument("--device", default="", help="default: cpu for cpu and compile, else cuda where there is one")
    run.add_argument("--layers", type=_positive, default=0, help="blocks of the Hugging Face models; default: all")
    run.add_argument("--optimizer", choices=("fused", "foreach", "forloop"), default="fused", help="kind of AdamW")
    run.add_argument("--tiny", action="store_true", help="sizes that run in seconds, to try the cases out")

    report = commands.add_parser("report", help="tables and plots of a results folder; the README's section")
    report.set_defaults(function=_report)
    report.add_argument("folder", type=Path, nargs="?", help="results of a run")
    report.add_argument("--plots", type=Path, metavar="DIR", help="write PNG files there")
    report.add_argument("--readme", type=Path, metavar="FILE", help="rewrite its section from benchmarks/results/")
    report.add_argument("--check", action="store_true", help="with --readme: write nothing, fail if it is not current")
    return parser


if __name__ == "__main__":
    sys.exit(main())
