"""The products and conversions of 2:4 weights by the CPU library, called with tensors.

Nothing here decides anything: ``sparse`` says whether a product runs on compressed weights or as PyTorch's dense one on
the expanded weight.  Tensors must be on the CPU, of one dtype in ``CODES``, and fit together; layouts are any.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slope_compile.kernels.cpu_library import CpuLibrary
from slope_compile.kernels.metadata import packed_width
from slope_compile.kernels.reference import as_matrix

CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""dtype -> its number in the C interface."""


def forward(
    library: CpuLibrary,
    sparse: bool,
    x: Tensor,
    values: Tensor,
    pattern: Tensor,
    bias: Tensor | None,
    out: Tensor | None = None,
    down: Tensor | None = None,
    up: Tensor | None = None,
) -> Tensor:
    """The forward product by the 2:4 kernel, or by a dense one with the expanded weight; ``+ down up^T`` if given.

    ``out``, here and below: a contiguous tensor of the result's shape and dtype to write to, instead of a new one.
    """
    if not sparse:
        y = torch.nn.functional.linear(x, expand(library, values, pattern), bias).contiguous()
        if down is not None and up is not None:
            as_matrix(y).addmm_(as_matrix(down), up.t())
        return _give(y, out)
    N, K = values.shape[0], values.shape[1] * 2
    rows = as_matrix(x)
    values, pattern = values.contiguous(), pattern.contiguous()
    bias = None if bias is None else bias.contiguous()
    rank = 0 if down is None or up is None else up.shape[1]
    down, up = (None, None) if down is None or up is None else (down.contiguous(), up.contiguous())
    y = x.new_empty(*x.shape[:-1], N) if out is None else out
    status = library.forward(
        CODES[x.dtype],
        torch.get_num_threads(),
        rows.data_ptr(),
        *rows.stride(),
        values.data_ptr(),
        pattern.data_ptr(),
        None if bias is None else bias.data_ptr(),
        None if down is None else down.data_ptr(),
        None if up is None else up.data_ptr(),
        rank,
        y.data_ptr(),
        rows.shape[0],
        N,
        K,
    )
    check(status, "slope::linear", rows.shape[0], N, K)
    return y


def grad_input(
    library: CpuLibrary,
    sparse: bool,
    grad: Tensor,
    values: Tensor,
    pattern: Tensor,
    column_mask: Tensor | None,
    out: Tensor | None = None,
) -> Tensor:
    """The input gradient by the 2:4 kernel or by a dense one; exact without a column mask."""
    N, K = values.shape[0], values.shape[1] * 2
    if not sparse:
        return _give(torch.matmul(grad, expand(library, values, pattern, column_mask)), out)
    rows = as_matrix(grad)
    values, pattern = values.contiguous(), pattern.contiguous()
    column_mask = None if column_mask is None else column_mask.contiguous()
    dx = grad.new_empty(*grad.shape[:-1], K) if out is None else out
    status = library.grad_input(
        CODES[grad.dtype],
        torch.get_num_threads(),
        rows.data_ptr(),
        *rows.stride(),
        values.data_ptr(),
        pattern.data_ptr(),
        None if column_mask is None else column_mask.data_ptr(),
        dx.data_ptr(),
        rows.shape[0],
        N,
        K,
    )
    check(status, "slope::grad_input", rows.shape[0], N, K)
    return dx


def grad_weight(
    library: CpuLibrary, sparse: bool, grad: Tensor, x: Tensor, pattern: Tensor, out: Tensor | None = None
) -> Tensor:
    """The compressed weight gradient by the 2:4 kernel, or compressed from a dense one."""
    N, K = grad.shape[-1], x.shape[-1]
    rows, inputs = as_matrix(grad), as_matrix(x)
    if not sparse:
        return _give(compress(library, rows.t() @ inputs, pattern), out)
    pattern = pattern.contiguous()
    values_grad = grad.new_empty(N, K // 2) if out is None else out
    status = library.grad_weight(
        CODES[grad.dtype],
        torch.get_num_threads(),
        rows.data_ptr(),
        *rows.stride(),
        inputs.data_ptr(),
        *inputs.stride(),
        pattern.data_ptr(),
        values_grad.data_ptr(),
        0,
        rows.shape[0],
        N,
        K,
    )
    check(status, "slope::grad_weight", rows.shape[0], N, K)
    return values_grad


def _give(result: Tensor, out: Tensor | None) -> Tensor:
    return result.contiguous() if out is None else out.copy_(result)


def compress(library: CpuLibrary, weight: Tensor, pattern: Tensor) -> Tensor:
    """Values ``[N, K / 2]`` of a dense ``[N, K]``."""
    N, K = weight.shape
    pattern = pattern.contiguous()
    values = weight.new_empty(N, K // 2)
    library.compress(
        CODES[weight.dtype],
        torch.get_num_threads(),
        weight.data_ptr(),
        *weight.stride(),
        pattern.data_ptr(),
        values.data_ptr(),
        N,
        K,
    )
    return values


def expand(library: CpuLibrary, values: Tensor, pattern: Tensor, column_mask: Tensor | None = None) -> Tensor:
    """Dense ``[N, K]`` of values ``[N, K / 2]``; with a column mask uint8 ``[N, ceil(K / 16)]`` W^{R,C}."""
    N, K = values.shape[0], values.shape[1] * 2
    values, pattern = values.contiguous(), pattern.contiguous()
    column_mask = None if column_mask is None else column_mask.contiguous()
    dense = values.new_empty(N, K)
    library.expand(
        CODES[values.dtype],
        torch.get_num_threads(),
        values.data_ptr(),
        pattern.data_ptr(),
        None if column_mask is None else column_mask.data_ptr(),
        dense.data_ptr(),
        N,
        K,
    )
    return dense


def pick_columns(library: CpuLibrary, values: Tensor, pattern: Tensor) -> Tensor:
    """The second pruning: column mask uint8 ``[N, ceil(K / 16)]``; N is a multiple of 4."""
    N, K = values.shape[0], values.shape[1] * 2
    values, pattern = values.contiguous(), pattern.contiguous()
    column_mask = pattern.new_empty(N, packed_width(K // 2))
    library.pick_columns(
        CODES[values.dtype],
        torch.get_num_threads(),
        values.data_ptr(),
        pattern.data_ptr(),
        column_mask.data_ptr(),
        N,
        K,
    )
    return column_mask


def compress_columns(
    library: CpuLibrary, values: Tensor, pattern: Tensor, column_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """W^{R,C}'s transpose: column values ``[K, N / 2]`` and column pattern uint8 ``[K, ceil(N / 8)]``; N in fours."""
    N, K = values.shape[0], values.shape[1] * 2
    values, pattern = values.contiguous(), pattern.contiguous()
    column_mask = None if column_mask is None else column_mask.contiguous()
    column_values, column_pattern = values.new_empty(K, N // 2), pattern.new_empty(K, packed_width(N))
    library.compress_columns(
        CODES[values.dtype],
        torch.get_num_threads(),
        values.data_ptr(),
        pattern.data_ptr(),
        None if column_mask is None else column_mask.data_ptr(),
        column_values.data_ptr(),
        column_pattern.data_ptr(),
        N,
        K,
    )
    return column_values, column_pattern


def check(status: int, name: str, M: int, N: int, K: int) -> None:
    """Raise the error for a kernel's status.

    Raises:
        MemoryError: the kernel found no memory for its working space.
    """
    if status:
        raise MemoryError(f"{name}: no memory for the working space of M = {M}, N = {N}, K = {K}")
