"""The command ``slope-compile``: what this machine can do, and what is fastest on it."""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Sequence

import tabulate
import torch

from slope_compile import __version__
from slope_compile.errors import SlopeError
from slope_compile.kernels import cpu_build, cpu_library, cpu_rules, cpu_tuning

_HEADERS = ("product", "dtype", *map(str, cpu_tuning.TOKENS))


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status: 0 done, 1 not possible here, 2 a wrong call."""
    parser = argparse.ArgumentParser(prog="slope-compile", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    tune = commands.add_parser(
        "tune",
        help="measure where the 2:4 CPU kernels win on this machine (minutes, on a machine that is otherwise idle)",
    )
    tune.add_argument("--threads", type=int, default=0, metavar="N", help="CPU threads; default: PyTorch's")
    tune.set_defaults(run=run_tune)
    doctor = commands.add_parser("doctor", help="say what this machine can do, and what to install to get more")
    doctor.set_defaults(run=run_doctor)
    parsed = parser.parse_args(arguments)
    try:
        status: int = parsed.run(parsed)
        return status
    except SlopeError as error:
        sys.stderr.write(f"slope-compile: {error}\n")
        return 1


def run_tune(arguments: argparse.Namespace) -> int:
    """Measure, show and save the table that ``cpu_rules`` goes by."""
    if arguments.threads < 0:
        sys.stderr.write(f"slope-compile tune: --threads: expected 1 or more, got {arguments.threads}\n")
        return 2
    library = cpu_library.load()
    if library is None:
        sys.stderr.write("slope-compile tune: there are no CPU kernels to measure; see `slope-compile doctor`\n")
        return 1
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(arguments.threads or before)
        threads = torch.get_num_threads()
        entries = []
        for entry in cpu_tuning.measure(library):
            entries.append(entry)
            sys.stderr.write(f"{entry.op} {entry.dtype} {entry.tokens} tokens: {entry.speedup:.2f}\n")
        path = cpu_tuning.save(cpu_tuning.Table(threads, tuple(entries)), library.isa)
    finally:
        torch.set_num_threads(before)
    _write(f"2:4 kernels ({library.isa}, {threads} threads): times faster than expanding the weight, by tokens\n")
    _write(_speedups(entries))
    _write(f"\nSaved to {path}; every process on this machine goes by it.\n")
    return 0


def _speedups(entries: Sequence[cpu_tuning.Entry]) -> str:
    found = {(e.op, e.dtype, e.tokens): e.speedup for e in entries}
    lines = dict.fromkeys((e.op, e.dtype) for e in entries)
    rows = [(*line, *(found.get((*line, tokens)) for tokens in cpu_tuning.TOKENS)) for line in lines]
    return tabulate.tabulate(rows, headers=_HEADERS, floatfmt=".2f", missingval="-")


def run_doctor(arguments: argparse.Namespace) -> int:
    """Print what is there."""
    compiler = cpu_build.find_compiler()
    library = cpu_library.load()
    threads = torch.get_num_threads()
    tuned = library is not None and cpu_tuning.load(library.isa, threads) is not None
    rows = [
        ("slope_compile", __version__),
        ("Python", platform.python_version()),
        ("torch", torch.__version__),
        ("CPU levels", ", ".join(level for level in cpu_build.LEVELS if not cpu_build.missing_features(level))),
        ("CPU threads", threads),
        ("C++ compiler", "none: install g++ 11 or clang++ 14, or newer" if compiler is None else str(compiler)),
        ("CPU kernels", "none" if library is None else f"{library.isa}, {library.path}"),
        ("tuned", "yes" if tuned else "no: `slope-compile tune` measures where the kernels win here"),
        ("GPU", torch.cuda.get_device_name() if torch.cuda.is_available() else "none that PyTorch can use"),
    ]
    _write(tabulate.tabulate(rows, tablefmt="plain"))
    if library is not None:
        _write("\n\nCPU, by tokens: 2:4 kernel, or a dense product with the expanded weight\n")
        _write(_choices(library.isa))
    if torch.cuda.is_available():
        _write("\n\nGPU: this version has no GPU kernels; products expand the weight and run dense.")
    _write("\n")
    return 0


def _choices(isa: str) -> str:
    rows = [
        (
            op,
            name,
            *("2:4" if cpu_rules.sparse(op, tokens, dtype, isa) else "dense" for tokens in cpu_tuning.TOKENS),
        )
        for name, dtype in cpu_tuning.DTYPES.items()
        for op in cpu_tuning.OPS
    ]
    return tabulate.tabulate(rows, headers=_HEADERS)


def _write(text: str) -> None:
    sys.stdout.write(text)


if __name__ == "__main__":
    sys.exit(main())
