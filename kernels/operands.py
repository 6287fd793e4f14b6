"""Whether the operands of a 2:4 product fit together.

The kernels check nothing: with a pattern of another weight, or a bias that is too short, they would read past the end
of a tensor.  The operators therefore ask here first, and a call whose operands do not fit goes to the definition in
``reference``, which raises PyTorch's error or broadcasts.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from slope_compile.kernels.metadata import packed_width


def tokens(x: Tensor) -> int:
    """M of activations ``[..., features]``."""
    return math.prod(x.shape[:-1])


def describes(pattern: Tensor, N: int, K: int) -> bool:
    """Whether a pattern has the form of metadata of a weight ``[N, K]``: uint8 ``[N, ceil(K / 8)]``."""
    return pattern.dtype is torch.uint8 and pattern.shape == (N, packed_width(K)) and K % 4 == 0


def masks(column_mask: Tensor, N: int, K: int) -> bool:
    """Whether a column mask has the form of one for a weight ``[N, K]``: uint8 ``[N, ceil(K / 16)]``."""
    return column_mask.dtype is torch.uint8 and column_mask.shape == (N, packed_width(K // 2))


def adds_up(x: Tensor, N: int, bias: Tensor | None, down: Tensor | None, up: Tensor | None) -> bool:
    """Whether bias ``[N]``, down ``[..., R]`` and up ``[N, R]``, as far as they are given, go with x ``[..., K]``."""
    if bias is not None and bias.shape != (N,):
        return False
    return down is None or up is None or (down.shape[:-1] == x.shape[:-1] and up.shape == (N, down.shape[-1]))


def forward_fits(
    x: Tensor,
    values: Tensor,
    pattern: Tensor,
    bias: Tensor | None = None,
    down: Tensor | None = None,
    up: Tensor | None = None,
) -> bool:
    """Whether x ``[..., K]`` and what is added fit the weight ``[N, K]`` of values ``[N, K / 2]``."""
    N, K = values.shape[0], 2 * values.shape[1]
    return x.shape[-1] == K and describes(pattern, N, K) and adds_up(x, N, bias, down, up)


def grad_input_fits(grad: Tensor, values: Tensor, pattern: Tensor, column_mask: Tensor | None = None) -> bool:
    """Whether grad ``[..., N]`` and a column mask, if there is one, fit the weight ``[N, K]``."""
    N, K = values.shape[0], 2 * values.shape[1]
    fits = grad.shape[-1] == N and describes(pattern, N, K)
    return fits and (column_mask is None or masks(column_mask, N, K))


def grad_weight_fits(grad: Tensor, x: Tensor, pattern: Tensor) -> bool:
    """Whether grad ``[..., N]`` and x ``[..., K]`` have the same tokens and fit the pattern of a weight ``[N, K]``."""
    return grad.shape[:-1] == x.shape[:-1] and describes(pattern, grad.shape[-1], x.shape[-1])


def weight_fits(values: Tensor, pattern: Tensor) -> bool:
    """Whether values ``[N, K / 2]`` and a pattern are the same weight's."""
    return describes(pattern, values.shape[0], 2 * values.shape[1])


def columns_fit(values: Tensor, pattern: Tensor, column_mask: Tensor | None = None) -> bool:
    """The same where the weight is pruned along its columns: N comes in groups of four."""
    N, K = values.shape[0], 2 * values.shape[1]
    fits = N % 4 == 0 and describes(pattern, N, K)
    return fits and (column_mask is None or masks(column_mask, N, K))
