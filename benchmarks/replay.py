"""Calls recorded in CUDA graphs and replayed, to time short kernels without the host's launch overhead.

A product of few tokens takes some microseconds on a GPU; Python, the dispatcher and the launch take more than that.
Inside a compiled model with CUDA graphs, or behind longer kernels, that overhead is hidden; launched one by one, calls
would measure nothing else.  So each contender's calls are recorded once, as many as there are copies of the weight,
and a sample is a number of replays.  Calls that cannot be recorded (because they synchronise, for example) are launched
one by one, and the result records that.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from benchmarks import timing
from benchmarks.timing import Contender, Plan, Samples, Stopwatch

REPLAYED, LAUNCHED = "replayed", "launched"


class Replay:
    """``calls`` calls of a contender in one CUDA graph, the calls' index going from 0 on."""

    def __init__(self, contender: Contender, calls: int, pool: Any) -> None:
        # As PyTorch asks: what is compiled, loaded or picked at a first call happens before, on a stream of its own.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for index in range(max(2, min(calls, 3))):
                contender(index)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool):
            for index in range(calls):
                contender(index)

    def __call__(self, _: int) -> None:
        self.graph.replay()


def measure(contenders: Mapping[str, Contender], calls: int, plan: Plan, watch: Stopwatch) -> Samples:
    """As :func:`timing.measure`, in seconds per call of a contender, ``calls`` of them to a graph.

    The graphs share one pool of memory: their outputs are not read, and no two run at a time.
    """
    pool = torch.cuda.graph_pool_handle()
    timed: dict[str, Contender] = {}
    how: dict[str, str] = {}
    for name, contender in contenders.items():
        try:
            timed[name] = Replay(contender, calls, pool)
            how[name] = REPLAYED
        except RuntimeError:  # What PyTorch raises for an operation that a capture does not permit.
            torch.cuda.synchronize()
            timed[name] = contender
            how[name] = LAUNCHED
    rounds = timing.measure(timed, plan, watch).rounds
    per = {name: calls if way == REPLAYED else 1 for name, way in how.items()}
    return Samples({name: [s / per[name] for s in seconds] for name, seconds in rounds.items()}, how)
