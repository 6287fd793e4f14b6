"""A quick check of the compiled kernels against their definitions, before anything uses them.

A compiler that miscompiles, a CPU that does less than it says, a library of other sources: each shows as a wrong
number here rather than in somebody's training run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from slope_compile.kernels import reference
from slope_compile.kernels.masks import random_mask
from slope_compile.kernels.metadata import pack_mask
from slope_compile.pattern import Pattern

ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""dtype -> largest relative error of rounding to it, in the order of the C interface's numbers."""

SHAPES = ((1, 77, 140), (6, 36, 76), (23, 20, 92), (269, 76, 108))
"""(M, N, K): a matrix-vector product, small ones and a larger one, each with tails beside whole blocks.  None has the
2^15 entries from which PyTorch takes several threads: on a busy machine each such operation waits for milliseconds."""

RANK = 5

Function = Callable[..., int]


class Kernels(Protocol):
    """What is tested of a library."""

    forward: Function
    grad_input: Function
    grad_weight: Function
    compress: Function
    expand: Function
    pick_columns: Function
    compress_columns: Function
    illegal_groups: Function


def self_test(kernels: Kernels) -> str | None:
    """What is wrong with a library, or None: every function in every dtype, with one thread and with two."""
    for code, dtype in enumerate(ROUNDOFF):
        for M, N, K in SHAPES:
            case = _Case(kernels, code, dtype, M, N, K)
            for name, right in case.checks():
                if not right:
                    return f"{name} is wrong for {dtype}, M = {M}, N = {N}, K = {K}"
    return None


class _Case:
    """Random numbers of one shape and dtype, and the checks on them."""

    def __init__(self, kernels: Kernels, code: int, dtype: torch.dtype, M: int, N: int, K: int) -> None:
        generator = torch.Generator("cpu").manual_seed(24)

        def numbers(rows: int, columns: int) -> Tensor:
            return torch.randn(rows, columns, generator=generator, dtype=torch.float32, device="cpu").to(dtype)

        self.kernels, self.code, self.M, self.N, self.K = kernels, code, M, N, K
        self.pattern = pack_mask(random_mask(N, K, Pattern(2, 4), 0, "self-test"))
        self.weight = numbers(K, N).t()
        self.values = reference.compress(self.weight, self.pattern, 2, 4)
        self.dense = reference.expand(self.values, self.pattern, 2, 4)
        self.x = numbers(M, 2 * K)[:, ::2]
        self.grad = numbers(N, M).t()
        self.dv = numbers(N, K // 2)
        self.bias, self.down, self.up = numbers(1, N)[0], numbers(M, RANK), numbers(N, RANK)

    def checks(self) -> Iterator[tuple[str, bool]]:
        """Name and outcome of each check."""
        yield "illegal_groups", self.illegal_groups()
        yield "compress", self.compress()
        yield "expand", self.expand(self.dense, None)
        yield "forward", self.forward()
        yield "grad_input", self.grad_input(self.dense, None)
        yield "grad_weight", self.grad_weight(accumulate=0)
        yield "grad_weight (accumulated)", self.grad_weight(accumulate=1)
        if self.N % 4 == 0:
            mask = reference.pick_columns(self.values, self.pattern, 2, 4)
            yield "pick_columns", self.pick_columns(mask)
            yield "compress_columns", self.compress_columns(self.values, None)
            smallest = reference.pick_columns(1 / self.values, self.pattern, 2, 4)  # not what would be picked
            yield "compress_columns (masked)", self.compress_columns(self.values, smallest)
            for kept in (mask, smallest):
                dense = reference.expand(reference.keep_columns(self.values, kept), self.pattern, 2, 4)
                yield "expand (double-pruned)", self.expand(dense, kept)
                yield "grad_input (double-pruned)", self.grad_input(dense, kept)

    def illegal_groups(self) -> bool:
        damaged = self.pattern.clone()
        damaged[self.N - 1, 0] ^= 1
        counts = [self.kernels.illegal_groups(p.data_ptr(), self.N, self.K) for p in (self.pattern, damaged)]
        return counts == [0, 1]

    def compress(self) -> bool:
        weight, pattern = self.weight, self.pattern
        values = _unwritten(self.values)
        same = _same(
            values,
            lambda threads, to: self.kernels.compress(
                self.code, threads, _at(weight), *weight.stride(), _at(pattern), to, self.N, self.K
            ),
        )
        return same and torch.equal(values, self.values)

    def expand(self, expected: Tensor, column_mask: Tensor | None) -> bool:
        dense = _unwritten(self.dense)
        same = _same(
            dense,
            lambda threads, to: self.kernels.expand(
                self.code, threads, _at(self.values), _at(self.pattern), _at(column_mask), to, self.N, self.K
            ),
        )
        return same and torch.equal(dense, expected)

    def forward(self) -> bool:
        x, down, up = self.x, self.down, self.up
        y = _unwritten(x.new_empty(self.M, self.N))
        same = _same(
            y,
            lambda threads, to: self.kernels.forward(
                self.code, threads, _at(x), *x.stride(), _at(self.values), _at(self.pattern), _at(self.bias),
                _at(down), _at(up), RANK, to, self.M, self.N, self.K,
            ),
        )  # fmt: skip
        ones = x.new_ones(self.M, 1)
        left = torch.cat([x, down, ones], 1)
        right = torch.cat([self.dense, up, self.bias.unsqueeze(1)], 1).t()
        return same and _near(y, left, right)

    def grad_input(self, dense: Tensor, column_mask: Tensor | None) -> bool:
        grad = self.grad
        dx = _unwritten(grad.new_empty(self.M, self.K))
        same = _same(
            dx,
            lambda threads, to: self.kernels.grad_input(
                self.code, threads, _at(grad), *grad.stride(), _at(self.values), _at(self.pattern),
                _at(column_mask), to, self.M, self.N, self.K,
            ),
        )  # fmt: skip
        return same and _near(dx, grad, dense)

    def grad_weight(self, accumulate: int) -> bool:
        grad, x = self.grad, self.x
        dv = self.dv.clone() if accumulate else _unwritten(self.dv)
        same = _same(
            dv,
            lambda threads, to: self.kernels.grad_weight(
                self.code, threads, _at(grad), *grad.stride(), _at(x), *x.stride(), _at(self.pattern), to,
                accumulate, self.M, self.N, self.K,
            ),
        )  # fmt: skip
        start = self.dv * accumulate
        before = reference.expand(start, self.pattern, 2, 4)
        truth = grad.double().t() @ x.double() + before.double()
        scale = grad.double().abs().t() @ x.double().abs() + before.double().abs()
        truth, scale = (reference.compress(dense, self.pattern, 2, 4) for dense in (truth, scale))
        return same and _within(dv, truth, scale, self.M + 1)

    def pick_columns(self, expected: Tensor) -> bool:
        mask = torch.full_like(expected, 255)
        same = _same(
            mask,
            lambda threads, to: self.kernels.pick_columns(
                self.code, threads, _at(self.values), _at(self.pattern), to, self.N, self.K
            ),
        )
        return same and torch.equal(mask, expected)

    def compress_columns(self, values: Tensor, column_mask: Tensor | None) -> bool:
        column_values, column_pattern = reference.compress_columns(values, self.pattern, 2, 4, column_mask)
        found, pattern = _unwritten(column_values), torch.full_like(column_pattern, 255)
        same = _same(
            found,
            lambda threads, to: self.kernels.compress_columns(
                self.code, threads, _at(values), _at(self.pattern), _at(column_mask), to, _at(pattern), self.N, self.K
            ),
        )
        return same and torch.equal(found, column_values) and torch.equal(pattern, column_pattern)


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _unwritten(like: Tensor) -> Tensor:
    """Room for a result, in which an entry that is never written shows."""
    return torch.full_like(like, torch.nan, memory_format=torch.contiguous_format)


def _same(result: Tensor, call: Callable[[int, int], int]) -> bool:
    """Call with one thread, into ``result``, and with two: whether both succeed and give the same bits."""
    other = result.clone()
    if call(1, result.data_ptr()) != 0 or call(2, other.data_ptr()) != 0:
        return False
    return torch.equal(result.view(torch.uint8), other.view(torch.uint8))


def _near(result: Tensor, left: Tensor, right: Tensor) -> bool:
    """Whether a result is the product of two matrices of its dtype, to rounding."""
    left, right = left.double(), right.double()
    return _within(result, left @ right, left.abs() @ right.abs(), left.shape[1])


def _within(result: Tensor, truth: Tensor, scale: Tensor, terms: int) -> bool:
    """Whether each entry is as near as ``terms`` additions in float32 and one rounding allow; ``scale`` = sum |terms|.

    A wrong entry misses this by far: it is off by whole terms.
    """
    added_up = 2 * terms * ROUNDOFF[torch.float32] * scale
    rounded = 1.01 * ROUNDOFF[result.dtype] * (truth.abs() + added_up)
    return bool(((result.double() - truth).abs() <= added_up + rounded + torch.finfo(result.dtype).tiny).all())
