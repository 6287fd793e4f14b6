"""Interleaved timing: rounds over all contenders in alternating order, ratios within a round, medians over rounds.

On a machine that others use too, speed drifts from second to second.  Contenders that are timed one after the other
within a round see nearly the same machine, so the ratio of a round means something where a ratio of two separate
averages would not; and a median over rounds ignores the rounds that a stall has hit.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

import torch

Contender = Callable[[int], object]
"""A function to time.  Its argument counts calls of *all* contenders.  A contender that picks its weight by it, modulo
the number of copies, reads a weight that was not touched for that many calls."""


class TimingError(Exception):
    """A contender that cannot be timed."""


class Stopwatch(Protocol):
    """How long calls take on some device."""

    shortest: float
    """Seconds below which a sample is not to be trusted."""

    def seconds(self, calls: Iterable[Callable[[], object]]) -> float:
        """Time from the first call's start to the last one's end."""


class CpuStopwatch:
    """Wall-clock time."""

    shortest = 5e-4

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock

    def seconds(self, calls: Iterable[Callable[[], object]]) -> float:
        start = self._clock()
        for call in calls:
            call()
        return self._clock() - start


class CudaStopwatch:
    """Time between two events on the current stream.

    The device is given some work before the first event, so that it is still busy while the host launches the calls;
    otherwise short kernels would be timed as slowly as the host can launch them.
    """

    shortest = 1e-4

    def __init__(self, device: torch.device, ahead_bytes: int = 1 << 30) -> None:
        self._ahead = torch.empty(ahead_bytes, dtype=torch.int8, device=device)

    def seconds(self, calls: Iterable[Callable[[], object]]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        calls = list(calls)
        torch.cuda.synchronize()
        self._ahead.zero_()
        start.record()
        for call in calls:
            call()
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end)) / 1000


def stopwatch(device: torch.device) -> Stopwatch:
    """The stopwatch of a device."""
    return CudaStopwatch(device) if device.type == "cuda" else CpuStopwatch()


@dataclasses.dataclass(frozen=True)
class Plan:
    """When a measurement has enough rounds."""

    seconds: float = 10.0
    """Budget; after it no round begins, except to reach ``min_rounds``."""
    min_rounds: int = 3
    max_rounds: int = 60
    precision: float = 0.01
    """Enough when the median of each contender is known to this share of itself (and ``settled_rounds`` are done)."""
    settled_rounds: int = 9


@dataclasses.dataclass(frozen=True)
class Summary:
    """Median and spread."""

    median: float
    low: float
    """First quartile."""
    high: float
    """Third quartile."""
    min: float
    max: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Summary:
        low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
        return cls(statistics.median(values), low, high, min(values), max(values), len(values))

    @property
    def uncertainty(self) -> float:
        """Half width of a confidence interval of the median (the notch of a box plot) as a share of it."""
        return 1.57 * (self.high - self.low) / math.sqrt(self.n) / self.median


@dataclasses.dataclass(frozen=True)
class Samples:
    """Seconds per call of each contender, one entry a round: equal indices belong together."""

    rounds: dict[str, list[float]]
    how: dict[str, str] = dataclasses.field(default_factory=dict)
    """How calls were timed where there is more than one way: see :mod:`benchmarks.replay`."""

    def sum(self, names: Sequence[str]) -> list[float]:
        """Seconds of the named contenders together, by round."""
        return [sum(parts) for parts in zip(*(self.rounds[name] for name in names), strict=True)]


def ratios(baseline: Sequence[float], contender: Sequence[float]) -> list[float]:
    """How many times faster than the baseline, round by round."""
    return [ours / theirs for ours, theirs in zip(baseline, contender, strict=True)]


def measure(
    contenders: Mapping[str, Contender],
    plan: Plan,
    watch: Stopwatch,
    now: Callable[[], float] = time.monotonic,
) -> Samples:
    """Time the contenders against each other.

    Args:
        contenders: by name; each is called once before anything is timed.
        plan: how many rounds.
        watch: times the calls.
        now: a clock for the budget.

    Raises:
        TimingError: calls take no time that the stopwatch could see.
    """
    index = itertools.count()
    for contender in contenders.values():
        contender(next(index))

    def sample(name: str, repeats: int) -> float:
        contender = contenders[name]
        return watch.seconds((lambda: contender(next(index))) for _ in range(repeats))

    repeats = {name: _repeats(functools.partial(sample, name), watch.shortest, name) for name in contenders}
    rounds: dict[str, list[float]] = {name: [] for name in contenders}
    start = now()
    for number in range(plan.max_rounds):
        spent = now() - start
        if number >= plan.min_rounds and (spent >= plan.seconds or _settled(rounds, plan)):
            break
        names = list(contenders)
        for name in names if number % 2 == 0 else reversed(names):
            elapsed = sample(name, repeats[name])
            if elapsed <= 0:
                raise TimingError(f"{name}: {repeats[name]} calls took {elapsed} s")
            rounds[name].append(elapsed / repeats[name])
    return Samples(rounds)


def _repeats(sample: Callable[[int], float], shortest: float, name: str) -> int:
    """Calls a sample must consist of to last at least ``shortest``."""
    repeats = 1
    while repeats <= 1 << 16:
        elapsed = sample(repeats)
        if elapsed >= shortest:
            return repeats
        # A fifth more than needed, so that a slightly faster sample is long enough too; at least twice as many.
        wanted = math.ceil(1.2 * repeats * shortest / elapsed) if elapsed > 0 else 0
        repeats = max(2 * repeats, min(wanted, 100 * repeats))
    raise TimingError(f"{name}: {repeats // 2} calls take less than {shortest} s; it does nothing worth timing")


def _settled(rounds: Mapping[str, list[float]], plan: Plan) -> bool:
    if any(len(seconds) < plan.settled_rounds for seconds in rounds.values()):
        return False
    return all(Summary.of(seconds).uncertainty <= plan.precision for seconds in rounds.values())
