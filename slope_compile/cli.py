"""The command ``slope-compile``: what the backend does with a model, and what this machine can do."""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from collections.abc import Mapping, Sequence

import tabulate
import torch

from slope_compile import cli_inspect, doctor
from slope_compile.dtypes import dtype_name
from slope_compile.errors import SlopeError
from slope_compile.kernels import (
    _cusparselt,
    cache_files,
    cpu_library,
    cpu_tuning,
    cusparselt_search,
    gpu_calls,
    gpu_ops,
    gpu_rules,
    gpu_tuning,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status: 0 done, 1 not possible here, 2 a wrong call."""
    parser = argparse.ArgumentParser(prog="slope-compile", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    tune = commands.add_parser(
        "tune",
        help="measure where the 2:4 kernels win on this machine (minutes, on a machine that is otherwise idle)",
    )
    tune.add_argument("--device", default="cpu", metavar="DEVICE", help="cpu (default), cuda or cuda:1")
    tune.add_argument("--threads", type=int, default=0, metavar="N", help="CPU threads; default: PyTorch's")
    tune.add_argument(
        "--copies", action="store_true",
        help="on a CPU: also measure a copy of the dense weight; where it wins, weights that do not change keep one "
        "from then on, in the memory of a dense weight",
    )  # fmt: skip
    tune.add_argument(
        "--sizes", action="append", default=[], metavar="MxNxK",
        help="on a GPU: verify algorithms of cuSPARSELt for M tokens and a weight [N, K] too; as often as you like",
    )  # fmt: skip
    tune.set_defaults(run=run_tune)
    doctor.add_parser(commands)
    cli_inspect.add_parser(commands)
    parsed = parser.parse_args(arguments)
    try:
        status: int = parsed.run(parsed)
        return status
    except SlopeError as error:
        sys.stderr.write(f"slope-compile: {error}\n")
        return 1


def run_tune(arguments: argparse.Namespace) -> int:
    """Measure, show and save the table that the rules of a device use."""
    if arguments.device != "cpu":
        if arguments.copies:
            sys.stderr.write("slope-compile tune: --copies is for CPUs; leave it out, or leave --device out\n")
            return 2
        return _tune_gpu(arguments.device, arguments.sizes)
    if arguments.threads < 0:
        sys.stderr.write(f"slope-compile tune: --threads: expected 1 or more, got {arguments.threads}\n")
        return 2
    library = cpu_library.load()
    if library is None:
        sys.stderr.write("slope-compile tune: there are no CPU kernels to measure; see `slope-compile doctor`\n")
        return 1
    if _would_be_lost():
        return 1
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(arguments.threads or before)
        threads = torch.get_num_threads()
        entries = []
        for entry in cpu_tuning.measure(library, arguments.copies):
            entries.append(entry)
            case = f"{entry.op} {entry.dtype} {entry.N}x{entry.K} {entry.tokens} tokens"
            copy = "" if entry.over_copy is None else f", than with a copy {entry.over_copy:.2f}"
            sys.stderr.write(f"{case}: {entry.speedup:.2f}{copy}\n")
        path = cpu_tuning.save(cpu_tuning.Table(threads, tuple(entries)), library.isa)
    finally:
        torch.set_num_threads(before)
    _write(f"2:4 kernels ({library.isa}, {threads} threads): times faster than expanding the weight, by tokens\n")
    _write(_speedups({_case(e): e.speedup for e in entries}))
    if arguments.copies:
        _write("\n\nTimes faster than a dense product with a copy of the weight\n")
        _write(_speedups({_case(e): e.over_copy for e in entries if e.over_copy is not None}))
    _write(f"\nSaved to {path}; every process on this machine goes by it.\n")
    return 0


def _would_be_lost() -> bool:
    """Whether a table could not be kept for other processes; if so, the reason is printed."""
    problem = cache_files.nothing_lasts()
    if problem is not None:
        advice = "name a folder that can be written in TORCHINDUCTOR_CACHE_DIR"
        sys.stderr.write(f"slope-compile tune: {problem}, so the table would be lost: {advice}\n")
    return problem is not None


def _tune_gpu(name: str, sizes: Sequence[str]) -> int:
    """Every way of every product on a GPU, see ``gpu_calls``; what cuSPARSELt can do there is found out first."""
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type != "cuda":
        sys.stderr.write(f"slope-compile tune: --device: expected cpu, cuda or cuda:N, got {name!r}\n")
        return 2
    wrong = [text for text in sizes if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){2}", text)]
    if wrong:
        sys.stderr.write(f"slope-compile tune: --sizes: expected MxNxK, such as 2048x3072x768, got {wrong[0]!r}\n")
        return 2
    index = device.index or 0
    if index >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        sys.stderr.write(f"slope-compile tune: PyTorch sees {found} GPUs, none is {name}; see `slope-compile doctor`\n")
        return 1
    device = torch.device("cuda", index)
    lacking = gpu_ops.missing(device)
    if lacking is not None:
        sys.stderr.write(f"slope-compile tune: no kernels to measure on {device}: {lacking}\n")
        return 1
    if _would_be_lost():
        return 1
    _verify(device, [tuple(map(int, text.split("x"))) for text in sizes])
    entries = []
    with torch.cuda.device(device):
        for entry in gpu_calls.measure(device):
            entries.append(entry)
            times = ", ".join(f"{way} {1e6 * seconds:.0f} us" for way, seconds in entry.seconds.items())
            sys.stderr.write(f"{entry.op} {entry.dtype} M={entry.M} N={entry.N} K={entry.K}: {times}\n")
    path = gpu_tuning.save(gpu_tuning.Table(gpu_ops.name(device), tuple(entries)))
    _write(f"{gpu_ops.name(device)}: microseconds, * = the fastest\n")
    _write(_times(entries))
    _write(f"\nSaved to {path}; every process on this machine goes by it.\n")
    return 0


def _verify(device: torch.device, sizes: Sequence[tuple[int, ...]]) -> None:
    """Look for algorithms of cuSPARSELt, in processes of their own: for ``sizes``, then for what is measured."""

    def show(product: _cusparselt.Product, verified: Sequence[_cusparselt.Algorithm]) -> None:
        dtype, M, N, K = product
        fastest = f", the fastest is {verified[0].alg_id}" if verified else ""
        sys.stderr.write(
            f"cuSPARSELt {dtype_name(dtype)} M={M} N={N} K={K}: {len(verified)} of its algorithms are right{fastest}\n"
        )

    given = [p for M, N, K in sizes for dtype in _cusparselt.DTYPES for p in cusparselt_search.layer(dtype, M, N, K)]
    for product in given:
        if why := _cusparselt.unfit(device, *product):
            sys.stderr.write(f"cuSPARSELt: {' x '.join(map(str, product[1:]))}: {why}\n")
    with cusparselt_search.Search(device) as search:
        search.run([*given, *cusparselt_search.tuned()], report=show)
        if search.host:
            cost = 1e6 * statistics.median(search.host)
            _write(f"A call of cuSPARSELt costs the host {cost:.0f} us, which a CUDA graph pays once.\n")


def _times(entries: Sequence[gpu_tuning.Entry]) -> str:
    rows = []
    for e in entries:
        best = min(e.seconds, key=e.seconds.__getitem__, default=None)
        cells = (f"{1e6 * e.seconds[w]:.0f}{'*' * (w == best)}" if w in e.seconds else "-" for w in gpu_rules.WAYS)
        rows.append((e.op, e.dtype, e.M, e.N, e.K, *cells))
    return tabulate.tabulate(rows, headers=("product", "dtype", "M", "N", "K", *gpu_rules.WAYS))


def _case(entry: cpu_tuning.Entry) -> tuple[str, str, str, int]:
    return entry.op, entry.dtype, f"{entry.N}x{entry.K}", entry.tokens


def _speedups(found: Mapping[tuple[str, str, str, int], float]) -> str:
    lines = dict.fromkeys(key[:3] for key in found)
    rows = [(*line, *(found.get((*line, M)) for M in cpu_tuning.TOKENS)) for line in lines]
    headers = ("product", "dtype", "N x K", *map(str, cpu_tuning.TOKENS))
    return tabulate.tabulate(rows, headers=headers, floatfmt=".2f", missingval="-")


def _write(text: str) -> None:
    sys.stdout.write(text)


if __name__ == "__main__":
    sys.exit(main())
