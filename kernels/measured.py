"""Measurements of products, shared by the tables of CPUs and GPUs: the nearest one, and the numbers to measure with."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from slope_compile.kernels import reference
from slope_compile.kernels.masks import random_mask
from slope_compile.kernels.metadata import pack_mask
from slope_compile.pattern import Pattern

MOST = 4096
"""Answers that a table remembers; token counts that never repeat must not fill the memory."""

_UNKNOWN = object()


class Measurement(Protocol):
    """One measured case."""

    @property
    def op(self) -> str: ...
    @property
    def dtype(self) -> str:
        """The dtype's name without ``torch.``"""

    @property
    def sizes(self) -> tuple[int, int, int]:
        """M, N and K."""


Entry = TypeVar("Entry", bound=Measurement)
Answer = TypeVar("Answer")


def nearest(entries: Iterable[Entry], op: str, M: int, N: int, K: int, dtype: torch.dtype) -> Entry | None:
    """The entry of this product and dtype whose sizes have the smallest ratios to M, N and K; None if there is none."""
    name = str(dtype).removeprefix("torch.")
    wanted = (M, N, K)

    def distance(entry: Entry) -> float:
        pairs = zip(entry.sizes, wanted, strict=True)
        return sum(abs(math.log(there / max(1, here))) for there, here in pairs)

    return min((e for e in entries if e.op == op and e.dtype == name), key=distance, default=None)


class Memo:
    """Answers to questions that repeat: products look themselves up at every call.

    Threads may ask at the same time; at worst two of them look up the same.
    """

    def __init__(self) -> None:
        self._answers: dict[tuple[Any, ...], Any] = {}

    def __len__(self) -> int:
        return len(self._answers)

    def ask(self, find: Callable[..., Answer], *case: Any) -> Answer:
        """``find(*case)``, called where the answer is not remembered."""
        # One read: between a test and a read another thread may clear the answers.
        answer: Any = self._answers.get(case, _UNKNOWN)
        if answer is _UNKNOWN:
            answer = find(*case)
            if len(self._answers) >= MOST:
                self._answers.clear()
            self._answers[case] = answer
        found: Answer = answer
        return found


class Problem:
    """One random 2:4 weight ``[N, K]`` on a device, and random activations for it."""

    def __init__(self, N: int, K: int, dtype: torch.dtype, device: torch.device) -> None:
        self.N, self.K, self.dtype, self.device = N, K, dtype, device
        self._generator = torch.Generator(device).manual_seed(0)
        self.pattern = pack_mask(random_mask(N, K, Pattern(2, 4), seed=0, path="tune")).to(device)
        self.values = self.numbers(N, K // 2)
        self.column_mask = reference.pick_columns(self.values, self.pattern, 2, 4)

    def numbers(self, *sizes: int) -> Tensor:
        """Fresh random numbers of unit variance."""
        return torch.randn(*sizes, generator=self._generator, device=self.device).to(self.dtype)
