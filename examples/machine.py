"""What a measurement was taken on: device, versions, commit; without names of hosts, users or folders.

Shared by the demo and the benchmarks, so that a figure from either says where it comes from in the same words.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path

import torch

import slope_compile as slope

_ROOT = Path(__file__).resolve().parents[1]
_FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512_vbmi2", "avx512_bf16", "amx_bf16")
"""Features of a CPU that decide which kernels it can run."""


def describe(device: torch.device) -> dict[str, object]:
    """Device, versions and commit, as plain data for JSON."""
    facts: dict[str, object] = {"device": cpu_name()} | cpu_features()
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts = {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "cuda": torch.version.cuda,
            "memory": properties.total_memory,
            "processors": properties.multi_processor_count,
            "cache": properties.L2_cache_size,
            "host": facts,
        }
    return facts | versions() | commit()


def versions() -> dict[str, str | None]:
    """Versions of everything that a figure depends on."""
    return {
        "torch": torch.__version__,
        "triton": _version("triton"),
        "transformers": _version("transformers"),
        "slope_compile": slope.__version__,
        "python": platform.python_version(),
    }


@functools.cache
def cpu_name() -> str:
    """The CPU's name, with family and model number: virtual machines often give a name without a generation."""
    facts = _cpuinfo()
    name = facts.get("model name") or platform.processor() or platform.machine()
    if "cpu family" in facts and "model" in facts:
        name += f" (family {facts['cpu family']} model {facts['model']})"
    return name


def cpu_features() -> dict[str, object]:
    """Instruction sets and number of cores that this process may use."""
    present = _cpuinfo().get("flags", "").split()
    return {
        "capability": torch.backends.cpu.get_cpu_capability(),
        "features": [flag for flag in _FLAGS if flag in present],
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }


@functools.cache
def commit() -> dict[str, object]:
    """The checkout's commit, and whether tracked files differ from it; empty outside a checkout.

    A copy without its history takes both from ``SLOPE_COMMIT``, as whoever copied it set it: ``git describe --always
    --dirty --abbrev=12 --exclude '*'``.
    """
    name = _output("git", "-C", str(_ROOT), "rev-parse", "--short=12", "HEAD")
    if name is None:
        given = os.environ.get("SLOPE_COMMIT") or None
        return {"commit": given and given.removesuffix("-dirty"), "dirty": given and given.endswith("-dirty")}
    changes = _output("git", "-C", str(_ROOT), "status", "--porcelain", "--untracked-files=no")
    return {"commit": name, "dirty": bool(changes)}


@functools.cache
def _cpuinfo() -> dict[str, str]:
    """The first processor of /proc/cpuinfo; empty where there is no such file."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return {}
    lines = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in lines}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    """What a program prints, or None where it is missing or fails."""
    if shutil.which(command[0]) is None:
        return None
    result = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    return result.stdout.strip() if result.returncode == 0 else None
