"""The operators on CPU tensors: the C++ kernels where they are faster, PyTorch's dense products elsewhere.

They are registered for the CPU over the definitions in ``reference``.  A call goes to the definition when the pattern
is not 2:4, the dtype is not one of the kernels', or no library could be built; the values agree to rounding in every
case.  A call whose operands do not fit together also goes there, and is an error (``operands``).  Where there is no
library, or copies were measured to be faster, the forward product reads a dense copy, which ``dense_copies`` keeps
while the weight is constant.
"""

from __future__ import annotations

from torch import Tensor

from slope_compile.kernels import cpu_library, cpu_products, cpu_rules, dense_copies, operands, reference
from slope_compile.kernels.cpu_library import CpuLibrary
from slope_compile.kernels.operands import tokens

ONCE_RECOMPUTED = 2
"""The most forward products of a weight in training before its gradients; no copy is made for so few."""


def library_for(keep: int, group: int, *tensors: Tensor | None) -> CpuLibrary | None:
    """The library if its kernels apply to a call (2:4, one supported dtype), else None."""
    if keep != 2 or group != 4:
        return None
    dtypes = {tensor.dtype for tensor in tensors if tensor is not None}
    if len(dtypes) != 1 or not dtypes <= cpu_products.CODES.keys():
        return None
    return cpu_library.load()


def compress(weight: Tensor, pattern: Tensor, keep: int, group: int) -> Tensor:
    """See :func:`reference.compress`."""
    library = library_for(keep, group, weight)
    if library is None or not operands.describes(pattern, *weight.shape):
        return reference.compress(weight, pattern, keep, group)
    return cpu_products.compress(library, weight, pattern)


def expand(
    values: Tensor,
    pattern: Tensor,
    keep: int,
    group: int,
    double_pruned: bool = False,
    column_mask: Tensor | None = None,
    column_age: Tensor | None = None,
    interval: int = 0,
) -> Tensor:
    """See :func:`reference.expand`; the last four arguments are for the compiler only."""
    library = library_for(keep, group, values)
    if library is None or not operands.weight_fits(values, pattern):
        return reference.expand(values, pattern, keep, group)
    return cpu_products.expand(library, values, pattern)


def linear(
    x: Tensor,
    values: Tensor,
    pattern: Tensor,
    bias: Tensor | None,
    keep: int,
    group: int,
    double_pruned: bool = False,
    column_mask: Tensor | None = None,
    down: Tensor | None = None,
    up: Tensor | None = None,
) -> Tensor:
    """See :func:`reference.forward`."""
    if cpu_library.load() is None:
        weight = dense_copies.expanded(values, pattern, keep, group)
        return reference.forward_dense(x, weight, bias, down, up)
    library = library_for(keep, group, x, values, bias, down, up)
    N, K = values.shape[0], 2 * values.shape[1]
    if library is None or not operands.forward_fits(x, values, pattern, bias, down, up):
        return reference.forward(x, values, pattern, bias, keep, group, down, up)
    dense = dense_copy(library, x, values, pattern)
    if dense is not None:
        return reference.forward_dense(x, dense, bias, down, up)
    sparse = cpu_rules.sparse("forward", tokens(x), N, K, x.dtype, library.isa)
    return cpu_products.forward(library, sparse, x, values, pattern, bias, down=down, up=up)


def dense_copy(library: CpuLibrary, x: Tensor, values: Tensor, pattern: Tensor) -> Tensor | None:
    """The dense weight where the forward product reads a copy of it, see ``cpu_rules.copied``."""
    wanted = cpu_rules.copied(tokens(x), values.shape[0], 2 * values.shape[1], x.dtype, library.isa)
    return dense_copies.kept(values, pattern, 2, 4, after=ONCE_RECOMPUTED) if wanted else None


def grad_input(grad: Tensor, values: Tensor, pattern: Tensor, keep: int, group: int) -> Tensor:
    """See :func:`reference.grad_input`."""
    dense_copies.gradient(pattern)
    library = library_for(keep, group, grad, values)
    N, K = values.shape[0], 2 * values.shape[1]
    if library is None or not operands.grad_input_fits(grad, values, pattern):
        return reference.grad_input(grad, values, pattern, keep, group)
    sparse = cpu_rules.sparse("grad_input", tokens(grad), N, K, grad.dtype, library.isa)
    return cpu_products.grad_input(library, sparse, grad, values, pattern, None)


def grad_input_columns(
    grad: Tensor, values: Tensor, pattern: Tensor, column_mask: Tensor, keep: int, group: int
) -> Tensor:
    """See :func:`reference.grad_input_columns`: the values that the column mask keeps too."""
    dense_copies.gradient(pattern)
    library = library_for(keep, group, grad, values)
    N, K = values.shape[0], 2 * values.shape[1]
    if library is None or not operands.grad_input_fits(grad, values, pattern, column_mask):
        return reference.grad_input_columns(grad, values, pattern, column_mask, keep, group)
    sparse = cpu_rules.sparse("grad_input_columns", tokens(grad), N, K, grad.dtype, library.isa)
    return cpu_products.grad_input(library, sparse, grad, values, pattern, column_mask)


def grad_weight(grad: Tensor, x: Tensor, pattern: Tensor, keep: int, group: int) -> Tensor:
    """See :func:`reference.grad_weight`."""
    dense_copies.gradient(pattern)
    library = library_for(keep, group, grad, x)
    N, K = grad.shape[-1], x.shape[-1]
    if library is None or not operands.grad_weight_fits(grad, x, pattern):
        return reference.grad_weight(grad, x, pattern, keep, group)
    sparse = cpu_rules.sparse("grad_weight", tokens(x), N, K, x.dtype, library.isa)
    return cpu_products.grad_weight(library, sparse, grad, x, pattern)


def pick_columns(values: Tensor, pattern: Tensor, keep: int, group: int) -> Tensor:
    """See :func:`reference.pick_columns`."""
    library = library_for(keep, group, values)
    if library is None or not operands.columns_fit(values, pattern):
        return reference.pick_columns(values, pattern, keep, group)
    return cpu_products.pick_columns(library, values, pattern)


def compress_columns(
    values: Tensor, pattern: Tensor, keep: int, group: int, column_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See :func:`reference.compress_columns`."""
    library = library_for(keep, group, values)
    if library is None or not operands.columns_fit(values, pattern, column_mask):
        return reference.compress_columns(values, pattern, keep, group, column_mask)
    return cpu_products.compress_columns(library, values, pattern, column_mask)


IMPLEMENTATIONS = {
    "compress": compress,
    "expand": expand,
    "linear": linear,
    "grad_input": grad_input,
    "grad_input_columns": grad_input_columns,
    "grad_weight": grad_weight,
    "pick_columns": pick_columns,
    "compress_columns": compress_columns,
}
"""Operator -> its implementation for CPU tensors."""
