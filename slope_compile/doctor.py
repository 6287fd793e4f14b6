"""``slope-compile doctor``: what this machine can do, which way each product goes on it, and what would give more."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import platform
import sys
from collections.abc import Iterator
from typing import Any

import torch
from tabulate import tabulate

from slope_compile import __version__
from slope_compile.dtypes import dtype_name
from slope_compile.kernels import cpu_build, cpu_library, cpu_tuning, gpu_ops, gpu_tuning, triton_products
from slope_compile.lowering import EXPANDED, OR_COPY, lowering
from slope_compile.pattern import Pattern

HEADERS = ("product", "dtype", *map(str, cpu_tuning.TOKENS))
SIZE = 4096
"""N and K for which choices are shown."""


def add_parser(commands: Any) -> None:
    """Add the command to the subparsers of ``slope-compile``."""
    doctor = commands.add_parser("doctor", help="say what this machine can do, and what to install to get more")
    doctor.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print what is there; returns the exit status."""
    library = cpu_library.load()
    say = sys.stdout.write
    say(tabulate([*_packages(), *_cpu(library), *_gpus()], tablefmt="plain") + "\n")
    for device in (torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))):
        where = "CPU" if device.type == "cpu" else f"GPU {device.index}, N = K = {SIZE}"
        say(f"\n{where}, by tokens: 2:4 kernel, or a dense product with the expanded weight\n")
        say(tabulate(list(_choices(device)), headers=HEADERS) + "\n")
    say("\nOther patterns and dtypes have no kernels: the weight is expanded and the product is dense.\n")
    return 0


def _packages() -> Iterator[tuple[str, object]]:
    yield "slope_compile", __version__
    yield "Python", platform.python_version()
    yield "torch", torch.__version__
    if importlib.util.find_spec("triton") is None:
        yield "Triton", "none: install triton (Linux) for the GPU kernels"
    else:
        yield "Triton", importlib.metadata.version("triton")


def _cpu(library: cpu_library.CpuLibrary | None) -> Iterator[tuple[str, object]]:
    compiler = cpu_build.find_compiler()
    threads = torch.get_num_threads()
    tuned = library is not None and cpu_tuning.load(library.isa, threads) is not None
    yield "CPU levels", ", ".join(level for level in cpu_build.LEVELS if not cpu_build.missing_features(level))
    yield "CPU threads", threads
    yield "C++ compiler", "none: install g++ 11 or clang++ 14, or newer" if compiler is None else str(compiler)
    yield "CPU kernels", "none" if library is None else f"{library.isa}, {library.path}"
    yield "CPU tuned", "yes" if tuned else "no: `slope-compile tune` measures where the kernels win here"


def _gpus() -> Iterator[tuple[str, object]]:
    if not torch.cuda.is_available():
        built = torch.version.cuda is not None or torch.version.hip is not None
        advice = "for an NVIDIA GPU install a build with CUDA (pytorch.org)"
        yield "GPU", "none that PyTorch can use" if built else f"none: this PyTorch is built for CPUs only; {advice}"
        return
    lt = torch.backends.cusparselt
    version = lt.version() if lt.is_available() else None
    absent = "not in this PyTorch; its builds with CUDA for Linux have it"
    yield "cuSPARSELt", absent if version is None else f"{version} (taken where tuning found it fastest)"
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        major, minor = torch.cuda.get_device_capability(device)
        name = torch.cuda.get_device_name(device)
        yield f"GPU {index}", f"{name}, compute capability {major}.{minor}"
        missing = gpu_ops.missing(device)
        yield f"GPU {index} kernels", "Triton" if missing is None else f"none: {missing}"
        yield f"GPU {index} tuned", _tuned(name, index)


def _tuned(gpu: str, index: int) -> str:
    table = gpu_tuning.load(gpu)
    if gpu_tuning.table_path(gpu).exists() and table is not None:
        return "yes"
    rule = "a roofline rule decides" if table is None else f"a table decides that was measured on an {table.gpu}"
    return f"no: {rule}; `slope-compile tune --device cuda:{index}` measures"


def _choices(device: torch.device) -> Iterator[tuple[str, ...]]:
    dtypes = cpu_tuning.DTYPES if device.type == "cpu" else {dtype_name(d): d for d in triton_products.DTYPES}
    for name, dtype in dtypes.items():
        for op in cpu_tuning.OPS:
            ways = [lowering(op, M, SIZE, SIZE, dtype, device, Pattern(2, 4)) for M in cpu_tuning.TOKENS]
            yield (op, name, *(_short(way, device) for way in ways))


def _short(way: str, device: torch.device) -> str:
    """On a CPU there is one kind of kernel, on a GPU the table names it."""
    if way.endswith(OR_COPY):
        return "copy"
    if way == EXPANDED:
        return "dense"
    return "2:4" if device.type == "cpu" else way.removeprefix("2:4 kernel, ").removeprefix("Gluon ")
