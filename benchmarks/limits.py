"""What a device can do at most, measured: bytes a second of a large copy, FLOP/s of a large dense product.

Measured in the run whose figures they are compared with, on random numbers: a GPU multiplies zeros faster.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import torch

from benchmarks.cases import DTYPES, Case, Measurement, Run, compare
from benchmarks.timing import Plan, measure
from slope_compile.cost import Cost

_PLAN = Plan(seconds=2.0, max_rounds=30)


@dataclasses.dataclass(frozen=True)
class Limits:
    """Of one device and dtype."""

    bandwidth: float
    """Bytes a second, read and written ones added up."""
    flops: float
    """Of dense products, a multiplication with its addition counted as 2."""

    def floor(self, cost: Cost) -> tuple[float, str]:
        """Seconds that the work takes at least, and what bounds it.

        The 2:4 unit counts as twice the dense one, as data sheets have it: its own peak cannot be measured without a
        product that reaches it.
        """
        peaks = [self.flops * (2 if work.sparse_unit else 1) for work in cost.works]
        terms = [
            (float(work.charged) / peak, float(work.moved) / self.bandwidth)
            for work, peak in zip(cost.works, peaks, strict=True)
        ]
        arithmetic, traffic = (sum(term[i] for term in terms) for i in (0, 1))
        return sum(map(max, terms)), "arithmetic" if arithmetic > traffic else "memory"


@functools.lru_cache(maxsize=16)
def limits(device: torch.device, dtype: str) -> Limits:
    """The measured limits; once in a process for each device and dtype."""
    case_limits, _ = _measured(device, dtype, Run.on(device, _PLAN))
    return case_limits


def limits_case(prefix: str, dtype: str, device: torch.device) -> Case:
    """The limits as a record of their own."""

    def run(given: Run) -> Iterator[Measurement]:
        _, measurement = _measured(device, dtype, given)
        yield measurement

    return Case(f"{prefix}/limits/{dtype}", run, torch.get_num_threads(), seconds=2.0, needs=8.0)


def _measured(device: torch.device, dtype: str, run: Run) -> tuple[Limits, Measurement]:
    count, side = (1 << 29, 8192) if device.type == "cuda" else (1 << 24, 1024)
    source = torch.randn(count, device=device).to(torch.bfloat16)
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, device=device).to(DTYPES[dtype]) for _ in range(2))
    contenders = {"copy": lambda _: target.copy_(source), "matmul": lambda _: torch.mm(a, b)}
    samples = measure(contenders, run.plan, run.watch)
    found = compare("limits", samples, {name: [name] for name in contenders}, (), {})
    bandwidth = 2 * source.nbytes / found.seconds["copy"].median
    flops = 2 * side**3 / found.seconds["matmul"].median
    facts = {"dtype": dtype, "bandwidth": bandwidth, "flops": flops, "copied": source.nbytes, "side": side}
    return Limits(bandwidth, flops), dataclasses.replace(found, facts=facts)


