"""The definition of every operator in plain PyTorch.

These functions run on any device and in any floating dtype.  The tests compare every kernel with them, and they run
where there is no faster kernel.  They never synchronise with the device and allocate at most one dense weight.

Letters: ``M`` tokens (any leading dimensions), ``N`` out_features, ``K`` in_features.  W is ``[N, K]``, N:M sparse
along K, stored as ``values [N, K * keep / group]`` and ``pattern`` (see ``metadata``).  The three products:

    forward       Y  = X W^T        [M, K] @ [K, N] -> [M, N]
    grad_input    dX = dY W         [M, N] @ [N, K] -> [M, K]
    grad_weight   dV = (dY^T X)     [N, M] @ [M, K] -> [N, K] at the kept positions -> [N, K * keep / group]
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from slope_compile.kernels.masks import magnitude_mask
from slope_compile.kernels.metadata import kept_columns, pack_mask, unpack_mask
from slope_compile.pattern import Pattern


def as_matrix(x: Tensor) -> Tensor:
    """``[..., features]`` as ``[M, features]``, even with zero features."""
    return x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def compress(weight: Tensor, pattern: Tensor, keep: int, group: int) -> Tensor:
    """Gather the kept entries of a dense weight.

    Args:
        weight: ``[N, K]``, K a multiple of ``group``.
        pattern: uint8 ``[N, ceil(K / 8)]``.

    Returns:
        values ``[N, K * keep / group]``.
    """
    N, K = weight.shape
    columns = kept_columns(pattern, K, keep, group)  # [N, K/group, keep]
    return weight.reshape(N, K // group, group).gather(-1, columns).view(N, K // group * keep)


def expand(values: Tensor, pattern: Tensor, keep: int, group: int) -> Tensor:
    """Inverse of :func:`compress`: dense ``[N, K]`` with zeros at the pruned positions."""
    N, kept = values.shape
    groups = kept // keep
    columns = kept_columns(pattern, groups * group, keep, group)  # [N, K/group, keep]
    dense = values.new_zeros(N, groups, group)
    # view() checks the pattern's rows: scatter_ would accept fewer and leave the rest of the weight zero.
    return dense.scatter_(-1, columns.view(N, groups, keep), values.reshape(N, groups, keep)).view(N, groups * group)


def forward(
    x: Tensor,
    values: Tensor,
    pattern: Tensor,
    bias: Tensor | None,
    keep: int,
    group: int,
    down: Tensor | None = None,
    up: Tensor | None = None,
) -> Tensor:
    """``Y = X W^T + bias + down up^T``: x ``[..., K]``, bias ``[N]`` or None -> ``[..., N]``.

    ``down [..., R]`` and ``up [N, R]``, both or neither, are the low-rank branch of an adapter; ``down`` includes its
    scale.
    """
    return forward_dense(x, expand(values, pattern, keep, group), bias, down, up)


def forward_dense(x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor | None, up: Tensor | None) -> Tensor:
    """:func:`forward` with the expanded weight ``[N, K]``."""
    y = torch.nn.functional.linear(x, weight, bias)
    return (y if down is None or up is None else y + torch.nn.functional.linear(down, up)).contiguous()


def grad_input(grad: Tensor, values: Tensor, pattern: Tensor, keep: int, group: int) -> Tensor:
    """``dX = dY W`` with W as it is in forward (exact): grad ``[..., N]`` -> ``[..., K]``."""
    return torch.matmul(grad, expand(values, pattern, keep, group)).contiguous()


def grad_input_columns(
    grad: Tensor, values: Tensor, pattern: Tensor, column_mask: Tensor, keep: int, group: int
) -> Tensor:
    """``dX = dY W^{R,C}``, double-pruned by a column mask uint8 ``[N, ceil(K * keep / group / 8)]``."""
    return grad_input(grad, keep_columns(values, column_mask), pattern, keep, group)


def grad_weight(grad: Tensor, x: Tensor, pattern: Tensor, keep: int, group: int) -> Tensor:
    """``dV = dY^T X`` at the kept positions only: grad ``[..., N]``, x ``[..., K]`` -> ``[N, K * keep / group]``."""
    dense = as_matrix(grad).t() @ as_matrix(x)  # [N, M] @ [M, K] -> [N, K]
    return compress(dense, pattern, keep, group)


def pick_columns(values: Tensor, pattern: Tensor, keep: int, group: int) -> Tensor:
    """The second, column-wise pruning: pick W^{R,C} from W^R by magnitude, groups along N.

    Returns:
        The column mask, uint8 ``[N, ceil(K * keep / group / 8)]``, one bit per value: 1 if it is kept (see
        ``metadata``).
    """
    transposed = expand(values, pattern, keep, group).t().contiguous()  # [K, N]
    mask = magnitude_mask(transposed, Pattern(keep, group)).t().contiguous()  # [N, K]
    return pack_mask(compress(mask, pattern, keep, group))


def keep_columns(values: Tensor, column_mask: Tensor) -> Tensor:
    """The values of W^{R,C}: ``[N, K * keep / group]``, zero where the column mask drops them."""
    return values.masked_fill(~unpack_mask(column_mask, values.shape[1]), 0)


def compress_columns(
    values: Tensor, pattern: Tensor, keep: int, group: int, column_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(W^{R,C})^T ``[K, N]`` in the ordinary compressed form, groups along N.

    Without a column mask W^{R,C} is picked here.  Each group has exactly ``keep`` slots for its largest magnitudes, on
    a tie the first; slots without a surviving weight hold explicit zeros.

    Returns:
        ``(column_values [K, N * keep / group], column_pattern uint8 [K, ceil(N / 8)])``.
    """
    if column_mask is not None:
        values = keep_columns(values, column_mask)
    transposed = expand(values, pattern, keep, group).t().contiguous()  # [K, N]
    column_pattern = pack_mask(magnitude_mask(transposed, Pattern(keep, group)))
    return compress(transposed, column_pattern, keep, group), column_pattern
