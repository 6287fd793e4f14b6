"""The measurements: cases, their results, and the suites that they belong to."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import torch

from benchmarks import replay
from benchmarks.timing import Contender, Plan, Samples, Stopwatch, Summary, measure, ratios, stopwatch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
AUTOCAST = "autocast"
"""Float32 weights under ``torch.autocast`` to bfloat16: a dtype of models, not of single layers."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command line says about all cases."""

    device: torch.device = torch.device("cpu")  # noqa: RUF009 (immutable)
    threads: tuple[int, ...] = ()
    """Numbers of CPU threads; empty = the suite's own."""
    dtypes: tuple[str, ...] = ()
    """Names in ``DTYPES``, or ``AUTOCAST``; empty = the suite's own."""
    layers: int = 0
    """Blocks of a model; 0 = as many as the suite takes, or as the model has."""
    optimizer: str = "fused"
    """AdamW's implementation: "fused", "foreach" or "forloop"."""
    autotune: bool = False
    """Whether blocks and layers are compiled with Inductor's max_autotune, on both sides."""
    tiles: bool = False
    """Whether to include every tile of every kernel, and products through max-autotune, which take long to set up."""
    tiny: bool = False
    """Sizes that run in seconds: for tests of the cases themselves."""

    def wants(self, dtype: str) -> bool:
        return not self.dtypes or dtype in self.dtypes


@dataclasses.dataclass(frozen=True)
class Measurement:
    """Contenders that do the same work, timed against each other."""

    name: str
    seconds: dict[str, Summary]
    """Seconds per call, by contender."""
    speedup: dict[str, dict[str, Summary]]
    """``speedup[contender][baseline]``: how many times faster, from the ratios within rounds."""
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Shapes, dtype, and whatever else was measured: bytes, tokens per call, errors."""


@dataclasses.dataclass(frozen=True)
class Run:
    """What a case is given."""

    plan: Plan
    watch: Stopwatch
    replays: bool = False
    """Whether short calls are recorded in CUDA graphs and replayed."""

    @classmethod
    def on(cls, device: torch.device, plan: Plan) -> Run:
        return cls(plan, stopwatch(device), replays=device.type == "cuda")

    def measure(self, contenders: Mapping[str, Contender], calls: int = 0) -> Samples:
        """Time contenders against each other.

        Args:
            contenders: by name.
            calls: number of calls in a CUDA graph, where there are graphs, for calls so short that the host could not
                launch them fast enough; chosen so that each copy of a weight is read in turn.  0 = launched one by one.
        """
        if calls and self.replays:
            return replay.measure(contenders, calls, self.plan, self.watch)
        return measure(contenders, self.plan, self.watch)


@dataclasses.dataclass(frozen=True)
class Case:
    """One unit of work that can be run, fail and be repeated by itself."""

    id: str
    measure: Callable[[Run], Iterable[Measurement]]
    threads: int
    seconds: float = 10.0
    """Budget for samples, without set-up and compilation; the least number of rounds may take more."""
    limit: float = 1200.0
    """Seconds after which the case counts as failed."""
    needs: float = 0.0
    """Seconds that the whole case is expected to take, compilation included: with less than that left before the
    deadline of a run it is not begun.  0 = not known."""


def compare(
    name: str,
    samples: Samples,
    contenders: Mapping[str, Sequence[str]],
    baselines: Sequence[str],
    facts: Mapping[str, Any],
) -> Measurement:
    """The measurement of contenders that consist of one or several timed parts each.

    Args:
        name: of the measurement.
        samples: what was timed.
        contenders: name -> parts in ``samples`` whose sum it is.
        baselines: contenders that every other one is compared with.
        facts: see :class:`Measurement`.
    """
    seconds = {contender: samples.sum(parts) for contender, parts in contenders.items()}
    speedup = {
        contender: {b: Summary.of(ratios(seconds[b], seconds[contender])) for b in baselines if b != contender}
        for contender in seconds
    }
    how = {"timed": samples.how} if samples.how else {}
    return Measurement(name, {c: Summary.of(values) for c, values in seconds.items()}, speedup, dict(facts) | how)


SUITES: dict[str, tuple[str, ...]] = {
    "cpu": ("benchmarks.cpu_layer", "benchmarks.cpu_model"),
    "compile": ("benchmarks.compile_time",),
    "correctness": ("benchmarks.correctness",),
    "kernels": ("benchmarks.gpu_kernels",),
    "layer": ("benchmarks.gpu_layer",),
    "model": ("benchmarks.gpu_model",),
    "memory": ("benchmarks.memory_state",),
    "quality": ("benchmarks.quality",),
}
"""Suite -> modules with a function ``cases(options) -> list[Case]``, imported when the suite is run."""


def cases(suite: str, options: Options) -> list[Case]:
    """All cases of a suite, in order.

    Raises:
        ValueError: the suite is unknown, or two cases have one id.
    """
    if suite not in SUITES:
        raise ValueError(f"suite {suite!r} is unknown; there are {', '.join(SUITES)}")
    found: list[Case] = []
    for name in SUITES[suite]:
        found += cast("list[Case]", importlib.import_module(name).cases(options))
    ids = [case.id for case in found]
    repeated = {name for name in ids if ids.count(name) > 1}
    if repeated:
        raise ValueError(f"suite {suite!r}: several cases are called {', '.join(sorted(repeated))}")
    return found
