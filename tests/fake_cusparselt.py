"""CPU fakes of PyTorch's cuSPARSELt primitives, with the same pitfalls as the real ones.

A packed operand holds its weight's values followed by its pattern, reshaped to N rows.  The dense operand is read as
the transpose of a contiguous matrix, whatever its strides are.  Run as a script, this module is the process that tries
algorithms, with the fakes in place of a GPU.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from slope_compile.kernels import _cusparselt, cusparselt_trials, reference
from slope_compile.kernels._cusparselt import Algorithm, Primitives
from slope_compile.kernels.masks import magnitude_mask
from slope_compile.kernels.metadata import pack_mask
from slope_compile.pattern import Pattern

TWO_FOUR = Pattern(2, 4)
SILENT, ERRATIC, REFUSED, UNBIASED, LEAKY, FLUSHING, SLOW, DEADLY, FAST, COUNT = range(10)
COMMAND = (sys.executable, str(Path(__file__)), "cpu")


class Misbehaving(Primitives):
    """Ids write nothing, something else from call to call, no bias, NaN or zero for more than they should, or raise, or
    end the process."""

    def __init__(self) -> None:
        self.calls = 0
        self.packs = 0
        self.in_order = True
        self.installed: int | None = 801

    def version(self) -> int | None:
        return self.installed

    def capability(self, device: torch.device) -> tuple[int, int]:
        return 9, 0

    def name(self, device: torch.device) -> str:
        return "a GPU"

    def compress(self, dense: Tensor) -> Tensor:
        self.packs += 1
        assert dense.is_contiguous()
        N = dense.shape[0]
        mask = magnitude_mask(dense, TWO_FOUR)  # garbage for a weight that is not 2:4, without a word
        pattern = pack_mask(mask)
        values = reference.compress(dense, pattern, 2, 4).reshape(-1)
        if not self.in_order:
            values = values.view(-1, 2).flip(0).reshape(-1)
        words = pattern.contiguous().view(torch.int16).reshape(-1).view(dense.dtype)
        return torch.cat([values, words]).view(N, -1)

    def product(self, packed: Tensor, dense: Tensor, bias: Tensor | None, algorithm: Algorithm) -> Tensor:
        self.calls += 1
        K, M = dense.shape
        N = packed.shape[0]
        flat = packed.reshape(-1)
        values, words = flat[: N * K // 2], flat[N * K // 2 :]
        if not self.in_order:
            values = values.view(-1, 2).flip(0).reshape(-1)
        pattern = words.view(torch.int16).view(torch.uint8).view(N, K // 8)
        # Strides are not looked at.
        x = dense.as_strided((M, K), (K, 1)) if not dense.is_contiguous() else dense.t()
        right = reference.forward(x, values.view(N, K // 2), pattern, bias, 2, 4)
        if algorithm.alg_id == SILENT:
            return torch.full_like(right, torch.nan)  # what was in the memory
        if algorithm.alg_id == ERRATIC and self.calls % 2:
            return right.roll(1, 0)
        if algorithm.alg_id == REFUSED:
            raise RuntimeError("CUSPARSE_STATUS_NOT_SUPPORTED")
        if algorithm.alg_id == UNBIASED and bias is not None:
            return right - bias
        if algorithm.alg_id == LEAKY and bool(right.isnan().any()):
            return right * torch.nan
        if algorithm.alg_id == FLUSHING:
            return right.nan_to_num(0.0)
        if algorithm.alg_id == DEADLY:
            os.abort()
        return right

    def suggestion(self, packed: Tensor, dense: Tensor) -> tuple[int, int, int, int]:
        return ERRATIC, 1, -1, COUNT

    def expand(self, values: Tensor, pattern: Tensor) -> Tensor:
        return reference.expand(values, pattern, 2, 4)


class Clock(cusparselt_trials.Device):
    """The fast id is fast."""

    def seconds(self, call: Callable[[], object]) -> float:
        call()
        algorithm: Algorithm = call.args[3]  # type: ignore[attr-defined]
        return {FAST: 1.0, SLOW: 2.0}.get(algorithm.alg_id, 0.5)

    def wait(self) -> None:
        pass

    def release(self) -> None:
        pass


if __name__ == "__main__":
    _cusparselt.primitives = Misbehaving()
    cusparselt_trials.main(Clock)
