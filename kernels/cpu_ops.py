"""The operators on CPU tensors: our C++ kernels where they win, PyTorch's dense ones where those do.

Registered for the CPU over the definitions in ``reference``.  A call goes to the definition when the pattern is not
2:4, the dtype is not one of the kernels', or no library could be built; the values agree to rounding in every case.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slope_compile.kernels import cpu_library, cpu_rules, reference
from slope_compile.kernels.cpu_library import CpuLibrary

CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""dtype -> its number in the C interface."""


def library_for(keep: int, group: int, *tensors: Tensor | None) -> CpuLibrary | None:
    """The library if its kernels apply to a call: 2:4, one dtype that they know."""
    if keep != 2 or group != 4:
        return None
    dtypes = {tensor.dtype for tensor in tensors if tensor is not None}
    if len(dtypes) != 1 or not dtypes <= CODES.keys():
        return None
    return cpu_library.load()


def compress(weight: Tensor, pattern: Tensor, keep: int, group: int) -> Tensor:
    """See :func:`reference.compress`."""
    library = library_for(keep, group, weight)
    N, K = weight.shape
    if library is None or K % 4:
        return reference.compress(weight, pattern, keep, group)
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


def expand(
    values: Tensor,
    pattern: Tensor,
    keep: int,
    group: int,
    double_pruned: bool = False,
    column_pattern: Tensor | None = None,
    column_age: Tensor | None = None,
    interval: int = 0,
) -> Tensor:
    """See :func:`reference.expand`; the last four arguments speak to the compiler only."""
    library = library_for(keep, group, values)
    if library is None:
        return reference.expand(values, pattern, keep, group)
    values, pattern = values.contiguous(), pattern.contiguous()
    N, K = values.shape[0], values.shape[1] * 2
    dense = values.new_empty(N, K)
    library.expand(
        CODES[values.dtype],
        torch.get_num_threads(),
        values.data_ptr(),
        pattern.data_ptr(),
        dense.data_ptr(),
        N,
        K,
    )
    return dense


def linear(
    x: Tensor,
    values: Tensor,
    pattern: Tensor,
    bias: Tensor | None,
    keep: int,
    group: int,
    double_pruned: bool = False,
    column_pattern: Tensor | None = None,
) -> Tensor:
    """See :func:`reference.forward`."""
    N, K = values.shape[0], values.shape[1] // keep * group
    library = library_for(keep, group, x, values, bias)
    if library is None or x.shape[-1] != K:
        return reference.forward(x, values, pattern, bias, keep, group)
    rows = x.reshape(-1, K)
    M, threads = rows.shape[0], torch.get_num_threads()
    if not cpu_rules.sparse("forward", M, x.dtype, library.isa):
        dense = expand(values, pattern, keep, group)
        return torch.nn.functional.linear(x, dense, bias).contiguous()
    values, pattern = values.contiguous(), pattern.contiguous()
    bias = None if bias is None else bias.contiguous()
    y = x.new_empty(*x.shape[:-1], N)
    status = library.forward(
        CODES[x.dtype],
        threads,
        rows.data_ptr(),
        *rows.stride(),
        values.data_ptr(),
        pattern.data_ptr(),
        None if bias is None else bias.data_ptr(),
        None,
        None,
        0,
        y.data_ptr(),
        M,
        N,
        K,
    )
    check(status, "slope::linear", M, N, K)
    return y


def grad_input(grad: Tensor, values: Tensor, pattern: Tensor, keep: int, group: int) -> Tensor:
    """See :func:`reference.grad_input`."""
    dx = _grad_input(grad, values, pattern, None, keep, group)
    return reference.grad_input(grad, values, pattern, keep, group) if dx is None else dx


def grad_input_columns(
    grad: Tensor, values: Tensor, pattern: Tensor, column_pattern: Tensor, keep: int, group: int
) -> Tensor:
    """See :func:`reference.grad_input_columns`: the entries that both patterns keep, read from the forward storage."""
    dx = _grad_input(grad, values, pattern, column_pattern, keep, group)
    return reference.grad_input_columns(grad, values, pattern, column_pattern, keep, group) if dx is None else dx


def _grad_input(
    grad: Tensor, values: Tensor, pattern: Tensor, column_pattern: Tensor | None, keep: int, group: int
) -> Tensor | None:
    """The input gradient by our kernel or by a dense product; None where neither applies."""
    N, K = values.shape[0], values.shape[1] // keep * group
    library = library_for(keep, group, grad, values)
    if library is None or grad.shape[-1] != N:
        return None
    rows = grad.reshape(-1, N)
    M, threads = rows.shape[0], torch.get_num_threads()
    op = "grad_input" if column_pattern is None else "grad_input_columns"
    if not cpu_rules.sparse(op, M, grad.dtype, library.isa):
        if column_pattern is None:
            return torch.matmul(grad, expand(values, pattern, keep, group)).contiguous()
        column_values = recompress_columns(values, pattern, column_pattern, keep, group)
        return torch.nn.functional.linear(grad, expand(column_values, column_pattern, keep, group)).contiguous()
    values, pattern = values.contiguous(), pattern.contiguous()
    column_pattern = None if column_pattern is None else column_pattern.contiguous()
    dx = grad.new_empty(*grad.shape[:-1], K)
    status = library.grad_input(
        CODES[grad.dtype],
        threads,
        rows.data_ptr(),
        *rows.stride(),
        values.data_ptr(),
        pattern.data_ptr(),
        None if column_pattern is None else column_pattern.data_ptr(),
        dx.data_ptr(),
        M,
        N,
        K,
    )
    check(status, f"slope::{op}", M, N, K)
    return dx


def grad_weight(grad: Tensor, x: Tensor, pattern: Tensor, keep: int, group: int) -> Tensor:
    """See :func:`reference.grad_weight`."""
    N, K = grad.shape[-1], x.shape[-1]
    library = library_for(keep, group, grad, x)
    rows, inputs = grad.reshape(-1, N), x.reshape(-1, K)
    M, threads = rows.shape[0], torch.get_num_threads()
    if library is None or K % 4 or inputs.shape[0] != M:
        return reference.grad_weight(grad, x, pattern, keep, group)
    if not cpu_rules.sparse("grad_weight", M, grad.dtype, library.isa):
        return compress(rows.t() @ inputs, pattern, keep, group)
    pattern = pattern.contiguous()
    values_grad = grad.new_empty(N, K // 2)
    status = library.grad_weight(
        CODES[grad.dtype],
        threads,
        rows.data_ptr(),
        *rows.stride(),
        inputs.data_ptr(),
        *inputs.stride(),
        pattern.data_ptr(),
        values_grad.data_ptr(),
        0,
        M,
        N,
        K,
    )
    check(status, "slope::grad_weight", M, N, K)
    return values_grad


def compress_columns(values: Tensor, pattern: Tensor, keep: int, group: int) -> tuple[Tensor, Tensor]:
    """See :func:`reference.compress_columns`."""
    library = library_for(keep, group, values)
    N, K = values.shape[0], values.shape[1] // keep * group
    if library is None or N % 4:
        return reference.compress_columns(values, pattern, keep, group)
    values, pattern = values.contiguous(), pattern.contiguous()
    column_values, column_pattern = values.new_empty(K, N // 2), pattern.new_empty(K, (N + 7) // 8)
    library.compress_columns(
        CODES[values.dtype],
        torch.get_num_threads(),
        values.data_ptr(),
        pattern.data_ptr(),
        column_values.data_ptr(),
        column_pattern.data_ptr(),
        N,
        K,
    )
    return column_values, column_pattern


def recompress_columns(values: Tensor, pattern: Tensor, column_pattern: Tensor, keep: int, group: int) -> Tensor:
    """See :func:`reference.recompress_columns`."""
    library = library_for(keep, group, values)
    N, K = values.shape[0], values.shape[1] // keep * group
    if library is None or N % 4:
        return reference.recompress_columns(values, pattern, column_pattern, keep, group)
    values, pattern, column_pattern = values.contiguous(), pattern.contiguous(), column_pattern.contiguous()
    column_values = values.new_empty(K, N // 2)
    library.recompress_columns(
        CODES[values.dtype],
        torch.get_num_threads(),
        values.data_ptr(),
        pattern.data_ptr(),
        column_pattern.data_ptr(),
        column_values.data_ptr(),
        N,
        K,
    )
    return column_values


def check(status: int, name: str, M: int, N: int, K: int) -> None:
    """Raise what a kernel's status says.

    Raises:
        MemoryError: the kernel found no memory for its working space.
    """
    if status:
        raise MemoryError(f"{name}: no memory for the working space of M = {M}, N = {N}, K = {K}")


IMPLEMENTATIONS = {
    "compress": compress,
    "expand": expand,
    "linear": linear,
    "grad_input": grad_input,
    "grad_input_columns": grad_input_columns,
    "grad_weight": grad_weight,
    "compress_columns": compress_columns,
    "recompress_columns": recompress_columns,
}
"""Operator -> its implementation for CPU tensors."""
