"""The definition of every operator in plain PyTorch.

These functions run on any device and in any floating dtype, are the oracle of the test-suite, and are what executes
where no faster kernel is registered.  They never synchronise with the device and allocate at most one dense weight.

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
from slope_compile.kernels.metadata import kept_columns, pack_mask
from slope_compile.pattern import Pattern


def as_matrix(x: Tensor) -> Tensor:
    """``[..., features]`` as ``[M, features]``, where there are no features too."""
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
    # A pattern of fewer rows would do for scatter_, and the rest of the weight be zeros.
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

    ``down [..., R]`` and ``up [N, R]``, or neither: the low-rank branch of an adapter, its scale in ``down``.
    """
    return forward_dense(x, expand(values, pattern, keep, group), bias, down, up)


def forward_dense(x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor | None, up: Tensor | None) -> Tensor:
    """The same with the expanded weight ``[N, K]``."""
    y = torch.nn.functional.linear(x, weight, bias)
    return (y if down is None or up is None else y + torch.nn.functional.linear(down, up)).contiguous()


def grad_input(grad: Tensor, values: Tensor, pattern: Tensor, keep: int, group: int) -> Tensor:
    """``dX = dY W`` with the once pruned W (exact): grad ``[..., N]`` -> ``[..., K]``."""
    return torch.matmul(grad, expand(values, pattern, keep, group)).contiguous()


def grad_input_columns(
    grad: Tensor, values: Tensor, pattern: Tensor, column_pattern: Tensor, keep: int, group: int
) -> Tensor:
    """``dX = dY W^{R,C}``, double-pruned by a given column pattern uint8 ``[K, ceil(N / 8)]``."""
    column_values = recompress_columns(values, pattern, column_pattern, keep, group)
    return forward(grad, column_values, column_pattern, None, keep, group)


def grad_weight(grad: Tensor, x: Tensor, pattern: Tensor, keep: int, group: int) -> Tensor:
    """``dV = dY^T X`` at the kept positions only: grad ``[..., N]``, x ``[..., K]`` -> ``[N, K * keep / group]``."""
    dense = as_matrix(grad).t() @ as_matrix(x)  # [N, M] @ [M, K] -> [N, K]
    return compress(dense, pattern, keep, group)


def compress_columns(values: Tensor, pattern: Tensor, keep: int, group: int) -> tuple[Tensor, Tensor]:
    """The second, column-wise compression: pick W^{R,C} from W^R by magnitude, groups along N.

    The result is the ordinary compressed form of (W^{R,C})^T ``[K, N]``: exactly ``keep`` slots a group, of which
    those without a surviving weight hold explicit zeros.

    Returns:
        ``(column_values [K, N * keep / group], column_pattern uint8 [K, ceil(N / 8)])``.
    """
    transposed = expand(values, pattern, keep, group).t().contiguous()  # [K, N]
    column_pattern = pack_mask(magnitude_mask(transposed, Pattern(keep, group)))
    return compress(transposed, column_pattern, keep, group), column_pattern


def recompress_columns(
    values: Tensor, pattern: Tensor, column_pattern: Tensor, keep: int, group: int
) -> Tensor:
    """The column-wise values for a column pattern that is given: ``[K, N * keep / group]``."""
    transposed = expand(values, pattern, keep, group).t().contiguous()  # [K, N]
    return compress(transposed, column_pattern, keep, group)
