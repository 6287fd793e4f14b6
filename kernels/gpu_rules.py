"""When the Triton kernels are used on a GPU, and when PyTorch's dense product with the expanded weight is.

A measured table decides where there is one for this GPU.  Elsewhere a roofline does: each way takes as long as the
larger of its arithmetic and its traffic, and the smaller time wins.  Two numbers go in.  ``RIDGE`` is what a GPU with
tensor cores can compute per byte that it can read (A100 156, H100 295, H200 206 FLOP/B in bfloat16, by their data
sheets).  ``SHARE`` is the part of the dense product's rate that the kernels are taken to reach where they are bound by
arithmetic; it is an assumption, on the low side, and no measurement.  In float32 without TF32 the kernels do not run on
tensor cores and the rule never takes them.
"""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path

import torch

from slope_compile.kernels import cpu_build
from slope_compile.kernels.cpu_tuning import Entry, Table
from slope_compile.log import log

RIDGE = 200.0
"""FLOP per byte."""

SHARE = {"forward": 0.5, "grad_input": 0.5, "grad_input_columns": 0.4, "grad_weight": 0.7}
"""Operator -> assumed part of the dense rate."""


def sparse(op: str, M: int, N: int, K: int, dtype: torch.dtype, gpu: str) -> bool:
    """Whether the Triton kernel computes ``op``.

    Args:
        op: "forward", "grad_input", "grad_input_columns" or "grad_weight".
        gpu: name of the device, as ``torch.cuda.get_device_name`` gives it.
    """
    table = load(gpu)
    measured = None if table is None else table.sparse(op, M, dtype)
    return roofline(op, M, N, K, dtype) if measured is None else measured


def roofline(op: str, M: int, N: int, K: int, dtype: torch.dtype) -> bool:
    """The rule, in units of the time that one byte takes."""
    if dtype is torch.float32:
        return False
    arithmetic = 2 * M * N * K / RIDGE
    activations, dense = (M * N + M * K) * dtype.itemsize, N * K * dtype.itemsize
    stored = dense / 2 + N * K / 8
    kernel = max(arithmetic / SHARE[op], activations + stored)
    product = max(arithmetic, activations + dense)
    # The conversion in between reads one form and writes the other.
    return kernel < product + stored + dense


def table_path(gpu: str) -> Path:
    """Where the table of a GPU lies."""
    digest = hashlib.sha256(f"{gpu}\0{torch.__version__}".encode()).hexdigest()[:16]
    return cpu_build.cache_folder() / f"tuned-cuda-{digest}.json"


@functools.lru_cache(maxsize=16)
def load(gpu: str) -> Table | None:
    """The measured table of a GPU: ``{"entries": [{"op", "dtype", "tokens", "speedup"}, ...]}``, if there is one."""
    path = table_path(gpu)
    try:
        return Table(0, tuple(Entry(**entry) for entry in json.loads(path.read_text())["entries"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("%s cannot be read (%s); the roofline rule decides", path, error)
        return None
