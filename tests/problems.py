"""Random sparse linear layers for the tests of the operators: named patterns, dtypes, shapes and layouts.

Patterns and column masks are drawn here and packed here, bit by bit, without the library's own packing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from _pytest.mark import ParameterSet
from torch import Tensor

from slope_compile.kernels import reference
from slope_compile.pattern import Pattern

NM = [Pattern.parse(text) for text in ("1:2", "2:4", "1:4", "2:8", "4:8")]
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}

every_pattern = pytest.mark.parametrize("nm", [pytest.param(nm, id=str(nm)) for nm in NM])
every_dtype = pytest.mark.parametrize("dtype", [pytest.param(dtype, id=name) for dtype, name in DTYPES.items()])


@dataclasses.dataclass(frozen=True)
class Shape:
    """Leading dimensions of the activations, out_features, and in_features as a number of groups."""

    leading: tuple[int, ...]
    N: int
    groups: int
    layout: str = "contiguous"


SHAPES = {
    "plain": Shape((24,), 16, 8),
    "one_row": Shape((1,), 16, 4),
    "one_output": Shape((5,), 1, 4),
    "N_not_multiple_of_8": Shape((6,), 12, 4),
    "K_one_group": Shape((7,), 16, 1),
    # 18 for 1:2, 36 for 2:4: the last byte of metadata is used in part.
    "K_nine_groups": Shape((7,), 24, 9),
    "zero_tokens": Shape((0,), 8, 4),
    "batched": Shape((2, 5), 16, 4),
    "4d": Shape((2, 3, 4), 8, 4),
    "4d_without_tokens": Shape((2, 0, 4), 8, 4),
    "one_token_without_batch": Shape((), 8, 4),
    "every_second_feature": Shape((6,), 16, 4, "strided"),
    "transposed_storage": Shape((6,), 16, 4, "transposed"),
    "transposed_batch": Shape((3, 4), 16, 4, "transposed"),
    "stride_zero": Shape((6,), 16, 4, "broadcast"),
}
"""The shapes and layouts that go wrong first."""

TELLING = ("plain", "one_row", "N_not_multiple_of_8", "K_nine_groups")
"""Shapes for the patterns other than 2:4: those whose indexing depends on the pattern."""


def _cases(with_columns: bool) -> list[ParameterSet]:
    """2:4 in every shape, the other patterns in the telling ones, all in every dtype."""
    return [
        pytest.param(nm, shape, dtype, id=f"{nm}-{name}-{DTYPES[dtype]}")
        for nm in NM
        for name, shape in SHAPES.items()
        for dtype in DTYPES
        if (str(nm) == "2:4" or name in TELLING) and not (with_columns and shape.N % nm.group)
    ]


every_case = pytest.mark.parametrize(("nm", "shape", "dtype"), _cases(with_columns=False))
every_column_case = pytest.mark.parametrize(("nm", "shape", "dtype"), _cases(with_columns=True))
"""Those whose out_features divide into column groups."""


def laid_out(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> Tensor:
    """A random tensor of this shape in this memory layout."""

    def numbers(*sizes: int) -> Tensor:
        return torch.randn(*sizes, dtype=torch.float64).to(dtype)

    if layout == "strided":
        return numbers(*shape[:-1], 2 * shape[-1])[..., ::2]
    if layout == "transposed":
        return numbers(*shape[::-1]).permute(*range(len(shape) - 1, -1, -1))
    if layout == "broadcast":
        return numbers(shape[-1]).expand(shape)
    return numbers(*shape)


def draw_mask(N: int, K: int, nm: Pattern) -> Tensor:
    """A random keep mask, bool ``[N, K]``: an independent draw, not the library's."""
    order = torch.rand(N, K // nm.group, nm.group).argsort(-1)
    return (order < nm.keep).view(N, K)


def packed(mask: Tensor) -> Tensor:
    """The documented layout, spelled out: bit ``i`` of byte ``[n, j]`` is element ``[n, 8 j + i]``."""
    N, K = mask.shape
    result = torch.zeros(N, -(-K // 8), dtype=torch.uint8)
    for k in range(K):
        result[:, k // 8] |= mask[:, k].to(torch.uint8) << (k % 8)
    return result


def kept(dense: Tensor, mask: Tensor) -> Tensor:
    """The entries of ``dense`` where ``mask``, row by row in the order of their columns."""
    return dense[mask].view(mask.shape[0], -1)


def column_mask(weight: Tensor, nm: Pattern) -> Tensor:
    """The entries of ``weight [N, K]`` that the second pruning picks: bool ``[N, K]``, groups along N.

    By counting, for each entry, those of its group that go before it: larger ones, and equal ones above it.
    """
    N, K = weight.shape
    groups = weight.double().abs().view(N // nm.group, nm.group, K)
    mine, other = groups.unsqueeze(2), groups.unsqueeze(1)
    above = torch.ones(nm.group, nm.group).tril(-1).bool().view(1, nm.group, nm.group, 1)
    before = (other > mine) | ((other == mine) & above)
    return (before.sum(2) < nm.keep).view(N, K)


def packed_columns(weight: Tensor, mask: Tensor, nm: Pattern) -> Tensor:
    """The column mask of ``weight [N, K]`` in its stored form: one bit for each value, the entries kept by ``mask``."""
    return packed(kept(column_mask(weight, nm), mask))


def draw_columns(mask: Tensor, nm: Pattern) -> Tensor:
    """A random legal second pruning of the entries kept by ``mask [N, K]``, not by magnitude: bool ``[N, K]``."""
    N, K = mask.shape
    return draw_mask(K, N, nm).t() & mask


@dataclasses.dataclass(frozen=True)
class Problem:
    """One layer and its activations: everything in ``dtype``, the dense weight already masked."""

    nm: Pattern
    x: Tensor
    """``[..., K]``"""
    grad: Tensor
    """dY, ``[..., N]``"""
    mask: Tensor
    """keep mask, ``[N, K]``"""
    weight: Tensor
    """dense ``[N, K]``, zero where pruned"""
    values: Tensor
    pattern: Tensor
    bias: Tensor

    @property
    def ints(self) -> tuple[int, int]:
        """The last two arguments of most operators."""
        return self.nm.keep, self.nm.group


def draw(nm: Pattern, shape: Shape, dtype: torch.dtype) -> Problem:
    """A problem with fresh random numbers."""
    N, K = shape.N, shape.groups * nm.group
    mask = draw_mask(N, K, nm)
    weight = torch.randn(N, K, dtype=torch.float64).to(dtype) * mask
    return Problem(
        nm=nm,
        x=laid_out((*shape.leading, K), shape.layout, dtype),
        grad=laid_out((*shape.leading, N), shape.layout, dtype),
        mask=mask,
        weight=weight,
        values=kept(weight, mask),
        pattern=packed(mask),
        bias=torch.randn(N, dtype=torch.float64).to(dtype),
    )


class Operands:
    """Random operands of every operator, for M tokens and a 2:4 weight [N, K]; a test may put others in their place."""

    def __init__(self, M: int, N: int, K: int, dtype: torch.dtype = torch.float32) -> None:
        self.x, self.grad = torch.randn(M, K).to(dtype), torch.randn(M, N).to(dtype)
        self.weight, self.bias = torch.randn(N, K).to(dtype), torch.randn(N).to(dtype)
        self.pattern = packed(draw_mask(N, K, Pattern(2, 4)))
        self.values = torch.randn(N, K // 2).to(dtype)
        self.column_mask = packed(torch.rand(N, K // 2) < 0.8)
        self.down, self.up = torch.randn(M, 3).to(dtype), torch.randn(N, 3).to(dtype)

    def calls(self, table: Any) -> dict[str, Callable[[], Tensor]]:
        """Every operator of a module: ``ops``, or the implementations for a device."""
        x, grad, values, pattern, mask = self.x, self.grad, self.values, self.pattern, self.column_mask
        return {
            "linear": lambda: table.linear(x, values, pattern, self.bias, 2, 4, False, None, self.down, self.up),
            "grad_input": lambda: table.grad_input(grad, values, pattern, 2, 4),
            "grad_input_columns": lambda: table.grad_input_columns(grad, values, pattern, mask, 2, 4),
            "grad_weight": lambda: table.grad_weight(grad, x, pattern, 2, 4),
            "compress": lambda: table.compress(self.weight, pattern, 2, 4),
            "expand": lambda: table.expand(values, pattern, 2, 4),
            "pick_columns": lambda: table.pick_columns(values, pattern, 2, 4),
            "compress_columns": lambda: table.compress_columns(values, pattern, 2, 4, mask)[0],
        }

    def definitions(self) -> dict[str, Callable[[], Tensor]]:
        """The same by their definitions."""
        x, grad, values, pattern, mask = self.x, self.grad, self.values, self.pattern, self.column_mask
        return {
            "linear": lambda: reference.forward(x, values, pattern, self.bias, 2, 4, self.down, self.up),
            "grad_input": lambda: reference.grad_input(grad, values, pattern, 2, 4),
            "grad_input_columns": lambda: reference.grad_input_columns(grad, values, pattern, mask, 2, 4),
            "grad_weight": lambda: reference.grad_weight(grad, x, pattern, 2, 4),
            "compress": lambda: reference.compress(self.weight, pattern, 2, 4),
            "expand": lambda: reference.expand(values, pattern, 2, 4),
            "pick_columns": lambda: reference.pick_columns(values, pattern, 2, 4),
            "compress_columns": lambda: reference.compress_columns(values, pattern, 2, 4, mask)[0],
        }
