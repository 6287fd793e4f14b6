"""Launches of the Triton kernels, called with tensors.

This module does not decide when to use them.  Weights are 2:4.  The tensors of a call share a dtype out of ``DTYPES``
and a device: a GPU, or the CPU in Triton's interpreter (``TRITON_INTERPRET=1``, set before the first launch).
Activations may have any layout; they are copied if the features of a token are not contiguous.  Empty products need no
launch.  A product is written to ``out`` if given, a contiguous tensor with the result's shape and dtype.  Nothing is
read back from the device, and only results and copies are allocated, so that a CUDA graph can contain any of these
calls.
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
    """Precision of float32 products: TF32 if PyTorch's own products may use it, else IEEE.  16-bit products ignore it.

    ``fp32_precision`` reflects all of PyTorch's switches; reading ``allow_tf32`` raises if the newer ones were used.
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
        low_rank: ``(T [..., R], B [N, R])``, for an adapter ``T = X A^T``; added to the product in float32.
        config: tile sizes; :func:`triton_configs.default` if None.
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
    """``dX = dY W``: grad ``[..., N]`` -> contiguous ``[..., K]``; with a column mask, ``dX = dY W^{R,C}``."""
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
    """Dense ``[N, K]`` from values ``[N, K / 2]``; with a column mask, ``W^{R,C}``."""
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


def compress(
    weight: Tensor, pattern: Tensor, config: Config | None = None, out: Tensor | None = None
) -> Tensor:
    """Values ``[N, K / 2]`` of a dense ``[N, K]`` in any layout.

    Args:
        out: a contiguous tensor for the result, with its shape and dtype.
    """
    N, K = weight.shape
    values = weight.new_empty(N, K // 2) if out is None else out
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
    """The transpose of W^{R,C}: ``(column_values [K, N / 2], column_pattern uint8 [K, ceil(N / 8)])``.

    N is a multiple of 4.  Entries are picked by magnitude, with a column mask only among the values that it keeps.
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
    """Activations as ``[M, features]`` with contiguous features; other layouts are copied."""
    rows = activations.reshape(math.prod(activations.shape[:-1]), activations.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _words(bits: Tensor, width: int) -> bool:
    """Whether a pattern or a column mask can be read by 32-bit words; a row of a tile has ``width`` bits of it."""
    return width % 32 == 0 and bits.stride(0) % 4 == 0 and bits.data_ptr() % 4 == 0


def _aligned(N: int, K: int, *activations: Tensor) -> bool:
    """Whether every row, including the pattern's, begins at a multiple of 16 elements."""
    return N % 16 == 0 and K % 128 == 0 and all(rows.stride(0) % 16 == 0 for rows in activations)


def _tiles(length: int, block: int) -> int:
    return -(-length // block)

