"""Random sparse linear layers for the tests of the operators: named patterns, dtypes, shapes and layouts.

The pattern of a problem is drawn here and packed here, bit by bit, without the library's own packing.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from slope_compile.pattern import Pattern

NM = [pytest.param(Pattern.parse(text), id=text) for text in ("1:2", "2:4", "1:4", "2:8", "4:8")]
DTYPES = [
    pytest.param(torch.float32, id="fp32"),
    pytest.param(torch.bfloat16, id="bf16"),
    pytest.param(torch.float16, id="fp16"),
]


@dataclasses.dataclass(frozen=True)
class Shape:
    """Leading dimensions of the activations, out_features, and in_features as a number of groups."""

    leading: tuple[int, ...]
    N: int
    groups: int
    layout: str = "contiguous"


SHAPES = [
    pytest.param(Shape((24,), 16, 8), id="plain"),
    pytest.param(Shape((1,), 16, 4), id="one_row"),
    pytest.param(Shape((5,), 1, 4), id="one_output"),
    pytest.param(Shape((6,), 12, 4), id="N_not_multiple_of_8"),
    pytest.param(Shape((7,), 16, 1), id="K_one_group"),
    # 18 for 1:2, 36 for 2:4: the last byte of metadata is used in part.
    pytest.param(Shape((7,), 24, 9), id="K_nine_groups"),
    pytest.param(Shape((0,), 8, 4), id="zero_tokens"),
    pytest.param(Shape((2, 5), 16, 4), id="batched"),
    pytest.param(Shape((2, 3, 4), 8, 4), id="4d"),
    pytest.param(Shape((2, 0, 4), 8, 4), id="4d_without_tokens"),
    pytest.param(Shape((), 8, 4), id="one_token_without_batch"),
    pytest.param(Shape((6,), 16, 4, "strided"), id="every_second_feature"),
    pytest.param(Shape((6,), 16, 4, "transposed"), id="transposed_storage"),
    pytest.param(Shape((3, 4), 16, 4, "transposed"), id="transposed_batch"),
    pytest.param(Shape((6,), 16, 4, "broadcast"), id="stride_zero"),
]


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
