"""The products as compiled code calls them: into a buffer that is given, past the dispatcher.

Inductor plans the buffers of a graph, and its generated code may call any Python function with an ``out`` argument.
The functions here are those for the CPU library; ``slope_compile._inductor_lowerings`` tells Inductor of them.  A call
of an operator costs some 40 microseconds more than one of these: several times the product of one token and a small
weight.

``sparse`` is True for the 2:4 kernel, False for a dense product with the expanded weight, and None to have
``cpu_rules`` decide at each call, when the number of tokens is known.  Activations are matrices here: x ``[M, K]``,
grad ``[M, N]``.
"""

from __future__ import annotations

from torch import Tensor

from slope_compile.kernels import cpu_library, cpu_ops, cpu_products, cpu_rules, dense_copies, reference
from slope_compile.kernels.cpu_library import CpuLibrary


def linear(
    x: Tensor, values: Tensor, pattern: Tensor, bias: Tensor | None = None, *, out: Tensor, sparse: bool | None = None
) -> Tensor:
    """``out [M, N] = X W^T + bias``."""
    return _linear(x, values, pattern, bias, None, None, out, sparse)


def linear_low_rank(
    x: Tensor,
    values: Tensor,
    pattern: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None = None,
    *,
    out: Tensor,
    sparse: bool | None = None,
) -> Tensor:
    """``out [M, N] = X W^T + bias + down up^T``, down ``[M, R]``, up ``[N, R]``."""
    return _linear(x, values, pattern, bias, down, up, out, sparse)


def _linear(
    x: Tensor,
    values: Tensor,
    pattern: Tensor,
    bias: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    out: Tensor,
    sparse: bool | None,
) -> Tensor:
    library = cpu_library.load()
    if library is None:
        return out.copy_(cpu_ops.linear(x, values, pattern, bias, 2, 4, down=down, up=up))
    dense = None if sparse is not None else cpu_ops.dense_copy(library, x, values, pattern)
    if dense is not None:
        return out.copy_(reference.forward_dense(x, dense, bias, down, up))
    way = _way(library, "forward", x, values.shape[0], 2 * values.shape[1], sparse)
    return cpu_products.forward(library, way, x, values, pattern, bias, out, down, up)


def grad_input(grad: Tensor, values: Tensor, pattern: Tensor, *, out: Tensor, sparse: bool | None = None) -> Tensor:
    """``out [M, K] = dY W``, exact."""
    library = cpu_library.load()
    if library is None:
        return out.copy_(cpu_ops.grad_input(grad, values, pattern, 2, 4))
    dense_copies.gradient(pattern)
    way = _way(library, "grad_input", grad, values.shape[0], 2 * values.shape[1], sparse)
    return cpu_products.grad_input(library, way, grad, values, pattern, None, out)


def grad_input_columns(
    grad: Tensor, values: Tensor, pattern: Tensor, column_mask: Tensor, *, out: Tensor, sparse: bool | None = None
) -> Tensor:
    """``out [M, K] = dY W^{R,C}``, double-pruned."""
    library = cpu_library.load()
    if library is None:
        return out.copy_(cpu_ops.grad_input_columns(grad, values, pattern, column_mask, 2, 4))
    dense_copies.gradient(pattern)
    way = _way(library, "grad_input_columns", grad, values.shape[0], 2 * values.shape[1], sparse)
    return cpu_products.grad_input(library, way, grad, values, pattern, column_mask, out)


def grad_weight(grad: Tensor, x: Tensor, pattern: Tensor, *, out: Tensor, sparse: bool | None = None) -> Tensor:
    """``out [N, K / 2]``: ``dY^T X`` at the kept positions."""
    library = cpu_library.load()
    if library is None:
        return out.copy_(cpu_ops.grad_weight(grad, x, pattern, 2, 4))
    dense_copies.gradient(pattern)
    way = _way(library, "grad_weight", x, grad.shape[1], x.shape[1], sparse)
    return cpu_products.grad_weight(library, way, grad, x, pattern, out)


def _way(library: CpuLibrary, op: str, rows: Tensor, N: int, K: int, sparse: bool | None) -> bool:
    return cpu_rules.sparse(op, rows.shape[0], N, K, rows.dtype, library.isa) if sparse is None else sparse
