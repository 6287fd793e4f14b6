"""Several processes compile the kernels of a suite before it runs; the suite itself would compile one at a time.

The processes test and call each way once.  The run then finds the compiled kernels in Triton's cache on disk.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import multiprocessing
import re
import time
from collections.abc import Iterable, Sequence

import torch

from benchmarks import choices
from benchmarks.cases import Case
from benchmarks.gpu_kernels import LOW_RANK
from benchmarks.products import Problem

WAYS = ("wgmma_sp", "mma_sp", "few", "triton")
"""Ways that have kernels of this library, the slowest to compile first."""
DTYPES = {"bf16": "bfloat16", "fp16": "float16"}
_CASE = re.compile(r"kernels/(?P<N>\d+)x(?P<K>\d+)/m(?P<M>\d+)/(?P<dtype>\w+)/")


@dataclasses.dataclass(frozen=True)
class Task:
    """One way of one product: its tests and its kernel."""

    dtype: str
    M: int
    N: int
    K: int
    op: str
    """One of ``choices.OPS``."""
    way: str


def tasks(cases: Iterable[Case], most: int = 24) -> list[Task]:
    """For the first cases of the suite kernels, each number of tokens once: shapes of multiples of 128 share them."""
    shapes: dict[tuple[str, int], tuple[int, int]] = {}
    matches = filter(None, (_CASE.match(case.id) for case in cases))
    for found in itertools.islice(matches, most):
        shapes.setdefault((DTYPES[found["dtype"]], int(found["M"])), (int(found["N"]), int(found["K"])))
    return [
        Task(dtype, M, N, K, op, way)
        for op, way in itertools.product(choices.OPS, WAYS)
        for (dtype, M), (N, K) in shapes.items()
    ]


def compile_(todo: Sequence[Task], device: torch.device, jobs: int, seconds: float) -> list[str]:
    """Compile in so many processes, for so many seconds at most; return the errors.

    They may be ignored, because the run meets them again.
    """
    ends, wrong = time.monotonic() + seconds, []
    if not todo:
        return []
    with multiprocessing.get_context("spawn").Pool(min(jobs, len(todo))) as pool:
        results = pool.imap_unordered(functools.partial(_compile, str(device)), todo)
        try:
            for _ in todo:
                wrong += results.next(timeout=max(0.0, ends - time.monotonic()))
        except multiprocessing.TimeoutError:
            wrong.append(f"{seconds:.0f} s are over")
    return wrong


def _compile(device: str, task: Task) -> list[str]:
    try:
        with torch.no_grad():
            problem = Problem.draw(task.M, task.N, task.K, task.dtype, torch.device(device), copies=1)
            for choice in choices.ways_of(task.op, problem, LOW_RANK, (task.way,)):
                choice.make()(0)
            if problem.device.type == "cuda":
                torch.cuda.synchronize(problem.device)
    except Exception as error:  # Whatever a compiler or a driver raises.
        return [f"{task}: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"]
    return []
