"""Measured seconds of one linear's forward product, dense and sparse, for ``explain(..., measure=True)``."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from slope_compile.kernels import ops
from slope_compile.pattern import Pattern

ROUNDS = 15
BUDGET = 0.5
"""Seconds after which no further round begins."""


def forward_seconds(M: int, weight: Tensor, values: Tensor, pattern: Tensor, nm: Pattern) -> tuple[float, float]:
    """Medians of interleaved rounds: ``F.linear`` with the dense weight, and ``slope::linear``.

    Args:
        M: tokens of the random activations.
        weight: ``[N, K]``, dense; ``values`` and ``pattern`` are its compressed form.

    Returns:
        Seconds of one call each, dense and sparse, eager, the dispatch included.
    """
    x = torch.randn(M, weight.shape[1], device=weight.device).to(weight.dtype)
    with torch.no_grad():

        def dense() -> Tensor:
            return F.linear(x, weight)

        def sparse() -> Tensor:
            product: Tensor = ops.linear(x, values, pattern, None, nm.keep, nm.group)
            return product

        return _medians(dense, sparse, weight.device)


def _medians(first: Callable[[], object], second: Callable[[], object], device: torch.device) -> tuple[float, float]:
    def seconds(call: Callable[[], object]) -> float:
        _wait(device)
        start = time.perf_counter()
        call()
        _wait(device)
        return time.perf_counter() - start

    seconds(first), seconds(second)  # warm-up: kernels are built, caches filled
    times: tuple[list[float], list[float]] = ([], [])
    begin = time.perf_counter()
    while len(times[0]) < ROUNDS and (not times[0] or time.perf_counter() - begin < BUDGET):
        order = (0, 1) if len(times[0]) % 2 else (1, 0)  # neither always runs in the caches that the other left
        for which in order:
            times[which].append(seconds((first, second)[which]))
    return statistics.median(times[0]), statistics.median(times[1])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
