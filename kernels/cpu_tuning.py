"""The table of measured speeds of a CPU: the 2:4 kernels against dense products.

The alternative to a kernel is a dense product with the weight expanded for it, or, where asked for, one with a copy of
the dense weight.  ``slope-compile tune`` measures them and writes a table beside the compiled library, under a name
made of the CPU, the library's level and sources, the number of threads and torch's version; any other of these is
measured anew.  ``cpu_rules`` reads the table.  All ways give the same numbers to rounding.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slope_compile.kernels import cache_files, cpu_build, cpu_products, reference
from slope_compile.kernels.cpu_library import CpuLibrary
from slope_compile.kernels.measured import Memo, Problem, nearest
from slope_compile.log import log

OPS = ("forward", "grad_input", "grad_input_columns", "grad_weight")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOKENS = (1, 4, 16, 64, 256, 1024)
SHAPES = ((768, 768), (3072, 768), (768, 3072), (4096, 4096))
"""(N, K)"""

ROUNDS = 7
SLOW_SECONDS = 0.5
"""A product that takes longer is measured once, and not with more tokens: the faster way would remain the same."""

MARGIN = 0.97
"""The kernel also wins a near tie, because the expanded weight needs memory."""

CACHES = 64 << 20
"""Bytes written before every timed product, more than the caches hold: in a model, weights come from memory."""

COPY_MARGIN = 0.95
"""A copy stays in memory and must therefore gain more."""


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

    @property
    def sizes(self) -> tuple[int, int, int]:
        return self.tokens, self.N, self.K


@dataclasses.dataclass(frozen=True)
class Table:
    """The measurements with one number of threads."""

    threads: int
    entries: tuple[Entry, ...]
    _answers: Memo = dataclasses.field(default_factory=Memo, compare=False, repr=False)

    def sparse(self, op: str, M: int, N: int, K: int, dtype: torch.dtype) -> bool | None:
        """Whether the kernel won at the nearest sizes (by their ratios); None if there are none."""
        nearest = self._nearest(op, M, N, K, dtype)
        return None if nearest is None else nearest.speedup >= MARGIN

    def copied(self, op: str, M: int, N: int, K: int, dtype: torch.dtype) -> bool:
        """Whether a copy of the dense weight won there."""
        nearest = self._nearest(op, M, N, K, dtype)
        return nearest is not None and nearest.over_copy is not None and nearest.over_copy < COPY_MARGIN

    def _nearest(self, *case: Any) -> Entry | None:
        return self._answers.ask(functools.partial(nearest, self.entries), *case)


def table_path(isa: str, threads: int) -> Path:
    """The file with the table of this machine and these kernels."""
    kernels = cache_files.digest([*cpu_build.source_files(cpu_build.SOURCE), Path(cpu_products.__file__)])
    features = " ".join(sorted(cpu_build.cpu_features()))
    key = cache_files.key(platform.machine(), cpu_build.cpu_model(), features, torch.__version__, kernels)
    return cache_files.cache_folder() / f"tuned-{isa}-{threads}-{key}.json"


def save(table: Table, isa: str) -> Path:
    """Write a table; the running process uses it from now on."""
    path = table_path(isa, table.threads)
    text = json.dumps({"threads": table.threads, "entries": [dataclasses.asdict(e) for e in table.entries]}, indent=1)
    cache_files.write(path, text)
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
    """Measure every case with the current number of threads, which takes some minutes.

    Args:
        copies: measure the forward product against one with a dense weight too.
    """
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


class _Problem(Problem):
    """One weight and the calls to compare."""

    def __init__(self, N: int, K: int, dtype: torch.dtype) -> None:
        super().__init__(N, K, dtype, torch.device("cpu"))

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
