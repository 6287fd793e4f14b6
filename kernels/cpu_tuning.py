"""Which way is faster on this machine, measured: the 2:4 kernel, a dense product with the expanded weight, or, where
asked for, one with a copy of the dense weight.

``slope-compile tune`` writes the answer beside the compiled library, under a name that says for which CPU, library
level, number of threads and torch it holds; ``cpu_rules`` reads it.  All ways give the same numbers to rounding.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slope_compile.kernels import cpu_build, cpu_products, reference
from slope_compile.kernels.cpu_library import CpuLibrary
from slope_compile.kernels.masks import random_mask
from slope_compile.kernels.metadata import pack_mask
from slope_compile.log import log
from slope_compile.pattern import Pattern

OPS = ("forward", "grad_input", "grad_input_columns", "grad_weight")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOKENS = (1, 4, 16, 64, 256, 1024)
SHAPES = ((768, 768), (3072, 768), (768, 3072), (4096, 4096))
"""(N, K)"""

ROUNDS = 7
SLOW_SECONDS = 0.5
"""A product that takes longer is measured once and not with more tokens: the winner will not change any more."""

MOST_DECIDED = 4096
"""Answers that a table remembers."""

MARGIN = 0.97
"""The kernel also wins a near tie: its alternative needs memory for the expanded weight."""

CACHES = 64 << 20
"""Bytes that are written before every timed product, more than caches hold: in a model weights come from memory."""

COPY_MARGIN = 0.95
"""What is kept for good has to gain more."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One measured case."""

    op: str
    dtype: str
    tokens: int
    N: int
    K: int
    speedup: float
    """Time of the dense way over time of the kernel."""
    over_copy: float | None = None
    """The same with a dense weight that need not be expanded; None if copies were not asked for."""


@dataclasses.dataclass(frozen=True)
class Table:
    """What was measured with one number of threads."""

    threads: int
    entries: tuple[Entry, ...]
    _found: dict[tuple[object, ...], Entry | None] = dataclasses.field(default_factory=dict, compare=False, repr=False)
    """What was asked before: products ask at every call."""

    def sparse(self, op: str, M: int, N: int, K: int, dtype: torch.dtype) -> bool | None:
        """Whether the kernel won at the nearest sizes (by their ratios); None if nothing like it is there."""
        nearest = self._nearest(op, M, N, K, dtype)
        return None if nearest is None else nearest.speedup >= MARGIN

    def copied(self, op: str, M: int, N: int, K: int, dtype: torch.dtype) -> bool:
        """Whether a copy of the dense weight won there."""
        nearest = self._nearest(op, M, N, K, dtype)
        return nearest is not None and nearest.over_copy is not None and nearest.over_copy < COPY_MARGIN

    def _nearest(self, *asked: Any) -> Entry | None:
        if asked not in self._found:
            if len(self._found) >= MOST_DECIDED:
                self._found.clear()
            self._found[asked] = self._find(*asked)
        return self._found[asked]

    def _find(self, op: str, M: int, N: int, K: int, dtype: torch.dtype) -> Entry | None:
        near = [e for e in self.entries if e.op == op and DTYPES[e.dtype] is dtype]
        if not near:
            return None

        def distance(entry: Entry) -> float:
            pairs = ((entry.tokens, M), (entry.N, N), (entry.K, K))
            return sum(abs(math.log(measured / max(1, wanted))) for measured, wanted in pairs)

        return min(near, key=distance)


def table_path(isa: str, threads: int) -> Path:
    """Where the table of this machine lies."""
    machine = (platform.machine(), platform.processor(), " ".join(sorted(cpu_build.cpu_features())), torch.__version__)
    digest = hashlib.sha256("\0".join(machine).encode()).hexdigest()[:16]
    return cpu_build.cache_folder() / f"tuned-{isa}-{threads}-{digest}.json"


def save(table: Table, isa: str) -> Path:
    """Write a table; the running process uses it from now on."""
    path = table_path(isa, table.threads)
    text = json.dumps({"threads": table.threads, "entries": [dataclasses.asdict(e) for e in table.entries]}, indent=1)
    handle, temporary = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(handle, "w") as file:
        file.write(text)
    os.replace(temporary, path)
    load.cache_clear()
    return path


@functools.lru_cache(maxsize=16)
def load(isa: str, threads: int) -> Table | None:
    """The table of this machine, if it was ever tuned with this number of threads."""
    try:
        data = json.loads(table_path(isa, threads).read_text())
        return Table(int(data["threads"]), tuple(Entry(**entry) for entry in data["entries"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("%s cannot be read (%s); run `slope-compile tune` again", table_path(isa, threads), error)
        return None


def measure(library: CpuLibrary, copies: bool = False) -> Iterator[Entry]:
    """Measure every case with the current number of threads; some minutes.  With ``copies``, the forward product also
    against one with a dense weight."""
    other = torch.zeros(CACHES, dtype=torch.uint8, device="cpu")
    for name, dtype in DTYPES.items():
        for N, K in SHAPES:
            too_slow = set()
            problem = _Problem(N, K, dtype)
            for tokens in TOKENS:
                for op in (op for op in OPS if op not in too_slow):
                    kernel, expanded = problem.ways(library, op, tokens)
                    ratio, slowest = _compare(kernel, expanded, other)
                    if slowest > SLOW_SECONDS:
                        too_slow.add(op)
                    over_copy = _compare(kernel, problem.copy(tokens), other)[0] if copies and op == "forward" else None
                    yield Entry(op, name, tokens, N, K, ratio, over_copy)


class _Problem:
    """One weight, in both forms."""

    def __init__(self, N: int, K: int, dtype: torch.dtype) -> None:
        self.N, self.K, self.dtype = N, K, dtype
        self.generator = torch.Generator("cpu").manual_seed(0)
        nm = Pattern(2, 4)
        self.pattern = pack_mask(random_mask(N, K, nm, seed=0, path="tune"))
        self.values = self.numbers(N, K // 2)
        self.column_mask = reference.pick_columns(self.values, self.pattern, 2, 4)

    def numbers(self, *sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=self.generator, device="cpu").to(self.dtype)

    def ways(self, library: CpuLibrary, op: str, M: int) -> tuple[Callable[[], object], Callable[[], object]]:
        """The kernel and its dense alternative on M fresh random tokens, as ``cpu_ops`` chooses between them."""
        x, grad = self.numbers(M, self.K), self.numbers(M, self.N)
        calls: dict[str, Callable[[bool], object]] = {
            "forward": lambda sparse: cpu_products.forward(library, sparse, x, self.values, self.pattern, None),
            "grad_input": lambda sparse: cpu_products.grad_input(
                library, sparse, grad, self.values, self.pattern, None
            ),
            "grad_input_columns": lambda sparse: cpu_products.grad_input(
                library, sparse, grad, self.values, self.pattern, self.column_mask
            ),
            "grad_weight": lambda sparse: cpu_products.grad_weight(library, sparse, grad, x, self.pattern),
        }
        call = calls[op]
        return (lambda: call(True)), (lambda: call(False))

    def copy(self, M: int) -> Callable[[], object]:
        """The forward product on M fresh random tokens with a copy of the dense weight."""
        x, weight = self.numbers(M, self.K), reference.expand(self.values, self.pattern, 2, 4)
        return lambda: torch.nn.functional.linear(x, weight)


def _compare(kernel: Callable[[], object], dense: Callable[[], object], other: Tensor) -> tuple[float, float]:
    """(time of dense over time of kernel, longest time), medians of interleaved rounds; ``other`` is written in
    between, so that weights are not in the caches."""

    def seconds(call: Callable[[], object]) -> float:
        other.add_(1)
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    first = seconds(kernel), seconds(dense)  # also the warm-up
    if max(first) > SLOW_SECONDS:
        return first[1] / first[0], max(first)
    rounds = []
    for i in range(ROUNDS):
        pair = [(kernel, dense), (dense, kernel)][i % 2]
        times = dict(zip(pair, (seconds(pair[0]), seconds(pair[1])), strict=True))
        rounds.append(times[dense] / times[kernel])
    return statistics.median(rounds), max(first)
