"""Launches of the Triton kernels, called with tensors.

Nothing here decides anything.  2:4 only; the tensors of a call share a dtype out of ``DTYPES`` and a device: a GPU, or
the CPU while Triton interprets (``TRITON_INTERPRET=1``, set before the first launch).  Activations may have any
layout, with a copy where the features of a token lie apart; empty products are answered without a launch.  Products
go into ``out`` where one is given, contiguous and of the result's shape and dtype.  Nothing is read back from the
device and nothing is allocated but results and copies, so that a CUDA graph can hold any of these calls.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from slope_compile.kernels import triton_configs
from slope_compile.kernels.launching import Kernels, device_of
from slope_compile.kernels.triton_configs import Config

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@functools.cache
def _kernels() -> Any:
    from slope_compile.kernels import triton_kernels

    return Kernels(triton_kernels)


@functools.cache
def _conversions() -> Any:
    from slope_compile.kernels import triton_conversions

    return Kernels(triton_conversions)


@functools.lru_cache(maxsize=16)
def arch(device: torch.device) -> int | None:
    """Compute capability of a GPU, 90 for 9.0; None for the CPU."""
    if device.type != "cuda":
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def precision() -> str:
    """How float32 is multiplied: TF32 where PyTorch's own products may use it, IEEE otherwise.  16 bits ignore it.

    Asked in the way that answers to each of PyTorch's switches; ``allow_tf32`` raises where the newer ones were used.
    """
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def forward(
    x: Tensor,
    values: Tensor,
    pattern: Tensor,
    bias: Tensor | None = None,
    low_rank: tuple[Tensor, Tensor] | None = None,
    config: Config | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """``Y = X W^T + T B^T + bias``: x ``[..., K]`` -> contiguous ``[..., N]``.

    Args:
        low_rank: ``(T [..., R], B [N, R])``, for an adapter ``T = X A^T``; summed up with the product in float32.
        config: tile sizes; the default ones without.
    """
    N, K = values.shape[0], values.shape[1] * 2
    y = x.new_empty(*x.shape[:-1], N) if out is None else out
    rows = _rows(x)
    M = rows.shape[0]
    if M * N == 0:
        return y
    t, b, R = x, x, 0 if low_rank is None else low_rank[1].shape[1]
    if low_rank is not None:
        t, b = low_rank[0].reshape(M, R).contiguous(), low_rank[1].contiguous()
    if K == 0:
        y.zero_()
        if R:
            y += (t @ b.t()).view_as(y)
        return y if bias is None else y.add_(bias)
    config = config or triton_configs.default("forward", M, x.dtype, _aligned(N, K, rows), arch(x.device))
    values, pattern = values.contiguous(), pattern.contiguous()
    with device_of(x):
        _kernels().forward[(_tiles(M, config.BM) * _tiles(N, config.BN),)](
            rows, values, pattern, x if bias is None else bias.contiguous(), t, b, y,
            M, N, K, R, rows.stride(0), pattern.stride(0),
            BM=config.BM, BN=config.BN, BK=config.BK, BR=16 if R <= 16 else 32,
            HAS_BIAS=bias is not None, HAS_LOW_RANK=R > 0, EVEN=K % config.BK == 0,
            WORDS=_words(pattern, config.BK), PRECISION=precision(), num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
    return y


def grad_input(
    grad: Tensor,
    values: Tensor,
    pattern: Tensor,
    column_mask: Tensor | None = None,
    config: Config | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """``dX = dY W``: grad ``[..., N]`` -> contiguous ``[..., K]``; with a column mask that of ``W^{R,C}``."""
    N, K = values.shape[0], values.shape[1] * 2
    dx = grad.new_empty(*grad.shape[:-1], K) if out is None else out
    rows = _rows(grad)
    M = rows.shape[0]
    if M * K == 0 or N == 0:
        return dx.zero_()
    config = config or triton_configs.default("grad_input", M, grad.dtype, _aligned(N, K, rows), arch(grad.device))
    values, pattern = values.contiguous(), pattern.contiguous()
    columns = pattern if column_mask is None else column_mask.contiguous()
    with device_of(grad):
        _kernels().grad_input[(_tiles(M, config.BM) * _tiles(K, config.BK),)](
            rows, values, pattern, columns, dx,
            M, N, K, rows.stride(0), pattern.stride(0), columns.stride(0),
            BM=config.BM, BN=config.BN, BK=config.BK,
            HAS_COLUMNS=column_mask is not None, EVEN=N % config.BN == 0, WORDS=_words(pattern, config.BK),
            COLUMN_WORDS=column_mask is not None and _words(columns, config.BK // 2),
            TRANSPOSED=grad.dtype is torch.float32, PRECISION=precision(),
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
    return dx


def grad_weight(
    grad: Tensor, x: Tensor, pattern: Tensor, config: Config | None = None, out: Tensor | None = None
) -> Tensor:
    """``dV``: ``dY^T X`` at the kept positions; grad ``[..., N]``, x ``[..., K]`` -> ``[N, K / 2]``."""
    N, K = grad.shape[-1], x.shape[-1]
    M = math.prod(x.shape[:-1])
    rows, inputs = _rows(grad), _rows(x)
    values_grad = grad.new_empty(N, K // 2) if out is None else out
    if N * K == 0 or M == 0:
        return values_grad.zero_()
    aligned = _aligned(N, K, rows, inputs)
    config = config or triton_configs.default("grad_weight", M, x.dtype, aligned, arch(x.device))
    pattern = pattern.contiguous()
    with device_of(grad):
        _kernels().grad_weight[(_tiles(N, config.BN) * _tiles(K, config.BK),)](
            rows, inputs, pattern, values_grad,
            M, N, K, rows.stride(0), inputs.stride(0), pattern.stride(0),
            BM=config.BM, BN=config.BN, BK=config.BK, EVEN=M % config.BM == 0, PRECISION=precision(),
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
    return values_grad


def expand(values: Tensor, pattern: Tensor, column_mask: Tensor | None = None, config: Config | None = None) -> Tensor:
    """Dense ``[N, K]`` of values ``[N, K / 2]``; with a column mask ``W^{R,C}``."""
    N, K = values.shape[0], values.shape[1] * 2
    dense = values.new_empty(N, K)
    if N * K == 0:
        return dense
    config = config or triton_configs.default("expand", 0, values.dtype)
    values, pattern = values.contiguous(), pattern.contiguous()
    columns = pattern if column_mask is None else column_mask.contiguous()
    with device_of(values):
        _conversions().expand[(_tiles(N, config.BN) * _tiles(K, config.BK),)](
            values, pattern, columns, dense, N, K, pattern.stride(0), columns.stride(0),
            BN=config.BN, BK=config.BK, HAS_COLUMNS=column_mask is not None,
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
    return dense


def compress(weight: Tensor, pattern: Tensor, config: Config | None = None) -> Tensor:
    """Values ``[N, K / 2]`` of a dense ``[N, K]`` in any layout."""
    N, K = weight.shape
    values = weight.new_empty(N, K // 2)
    if N * K == 0:
        return values
    config = config or triton_configs.default("compress", 0, weight.dtype)
    pattern = pattern.contiguous()
    with device_of(weight):
        _conversions().compress[(_tiles(N, config.BN) * _tiles(K, config.BK),)](
            weight, pattern, values, N, K, *weight.stride(), pattern.stride(0),
            BN=config.BN, BK=config.BK, num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
    return values


def compress_columns(
    values: Tensor, pattern: Tensor, column_mask: Tensor | None = None, config: Config | None = None
) -> tuple[Tensor, Tensor]:
    """The transpose of W^{R,C}: ``(column_values [K, N / 2], column_pattern uint8 [K, ceil(N / 8)])``; N is in fours.

    Picked by magnitude, among the values that the column mask keeps where there is one.
    """
    N, K = values.shape[0], values.shape[1] * 2
    column_values, column_pattern = values.new_empty(K, N // 2), pattern.new_empty(K, -(-N // 8))
    if N * K == 0:
        return column_values, column_pattern
    config = config or triton_configs.default("compress_columns", 0, values.dtype)
    values, pattern = values.contiguous(), pattern.contiguous()
    columns = pattern if column_mask is None else column_mask.contiguous()
    with device_of(values):
        _conversions().compress_columns[(_tiles(N, config.BN) * _tiles(K, config.BK),)](
            values, pattern, columns, column_values, column_pattern,
            N, K, pattern.stride(0), columns.stride(0), column_pattern.stride(0),
            BN=config.BN, BK=config.BK, HAS_COLUMNS=column_mask is not None,
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
    return column_values, column_pattern


def pick_columns(values: Tensor, pattern: Tensor, config: Config | None = None) -> Tensor:
    """The column mask of W^{R,C} by magnitude, uint8 ``[N, ceil(K / 16)]``; N is a multiple of 4."""
    N, K = values.shape[0], values.shape[1] * 2
    column_mask = pattern.new_empty(N, -(-K // 16))
    if N * K == 0:
        return column_mask
    config = config or triton_configs.default("pick_columns", 0, values.dtype)
    values, pattern = values.contiguous(), pattern.contiguous()
    with device_of(values):
        _conversions().pick_columns[(_tiles(N, config.BN) * _tiles(K, config.BK),)](
            values, pattern, column_mask, N, K, pattern.stride(0), column_mask.stride(0),
            BN=config.BN, BK=config.BK, num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
    return column_mask


def _rows(activations: Tensor) -> Tensor:
    """``[M, features]`` with the features of a token side by side; other layouts are copied."""
    rows = activations.reshape(math.prod(activations.shape[:-1]), activations.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _words(bits: Tensor, width: int) -> bool:
    """Whether a pattern or a column mask, of whose rows a tile has ``width`` bits, can be read by 32-bit words."""
    return width % 32 == 0 and bits.stride(0) % 4 == 0 and bits.data_ptr() % 4 == 0


def _aligned(N: int, K: int, *activations: Tensor) -> bool:
    """Whether every row, that of the pattern too, begins at a multiple of 16 elements."""
    return N % 16 == 0 and K % 128 == 0 and all(rows.stride(0) % 16 == 0 for rows in activations)


def _tiles(length: int, block: int) -> int:
    return -(-length // block)

