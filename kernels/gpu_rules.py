"""The choice of a product's way on a GPU; ``gpu_calls`` lists the ways.

A table that ``slope-compile tune`` measured on this GPU decides where there is one (``gpu_tuning``).  Elsewhere a
roofline does, between the Triton kernel and PyTorch's dense product with the expanded weight: each takes as long as the
larger of its arithmetic and its traffic, and the smaller time wins.  The rule has two parameters.  ``RIDGE`` is the
number of operations that a GPU with tensor cores can compute per byte that it can read (A100 156, H100 295, H200 206
FLOP/B in bfloat16, by their data sheets).  ``SHARE`` is the part of the dense product's rate that the kernels are
assumed to reach where they are bound by arithmetic; it is a low estimate and not measured.  In float32 without TF32 the
kernels do not run on tensor cores, and the rule never takes them.  Sparse tensor cores and cuSPARSELt are taken only
where they were measured as faster, and cuSPARSELt only with an algorithm that was verified for exactly these sizes
(``_cusparselt``).
"""

from __future__ import annotations

import torch

from slope_compile.kernels import gpu_tuning

WAYS = ("triton", "few", "mma_sp", "wgmma_sp", "cusparselt", "expanded")

RIDGE = 200.0
"""FLOP per byte."""

SHARE = {"forward": 0.5, "grad_input": 0.5, "grad_input_columns": 0.4, "grad_weight": 0.7}
"""Operator -> assumed part of the dense rate."""


def way(
    op: str, M: int, N: int, K: int, dtype: torch.dtype, gpu: str, among: tuple[str, ...] = ("triton", "expanded")
) -> str:
    """The way to take out of ``among``, which must contain "expanded".

    Args:
        op: "forward", "grad_input", "grad_input_columns" or "grad_weight".
        gpu: name of the device, as ``torch.cuda.get_device_name`` gives it.
    """
    table = gpu_tuning.load(gpu)
    fastest = None if table is None else table.fastest(op, M, N, K, dtype, among)
    if fastest is not None:
        return fastest
    return "triton" if "triton" in among and roofline(op, M, N, K, dtype) else "expanded"


def takes_triton(op: str, M: int, N: int, K: int, dtype: torch.dtype, gpu: str) -> bool:
    """Whether an operator takes the Triton kernel where it is called outside of compiled code."""
    return way(op, M, N, K, dtype, gpu) == "triton"


def roofline(op: str, M: int, N: int, K: int, dtype: torch.dtype) -> bool:
    """Whether the Triton kernel should win by the rule; times are in units of the time that one byte takes."""
    if dtype is torch.float32:
        return False
    arithmetic = 2 * M * N * K / RIDGE
    activations, dense = (M * N + M * K) * dtype.itemsize, N * K * dtype.itemsize
    stored = dense / 2 + N * K / 8
    if op == "grad_input_columns":
        stored += N * K / 16  # the column mask
    kernel = max(arithmetic / SHARE[op], activations + stored)
    product = max(arithmetic, activations + dense)
    # The conversion in between reads one form and writes the other.
    return kernel < product + stored + dense


def fingerprint(gpu: str) -> str:
    """Identifies the table that decides, so that code compiled under another one is not taken from a cache."""
    table = gpu_tuning.load(gpu)
    return "roofline" if table is None else table.digest()
