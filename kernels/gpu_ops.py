"""The operators on CUDA tensors: Triton kernels where they should win, PyTorch's dense products where those should.

Registered for CUDA over the definitions in ``reference``.  A call goes to the definition when the pattern is not 2:4,
the dtype is not one of the kernels', the operands do not fit together (``operands``), or the kernels cannot be used on
the device; the log gives the reason for the device once.  Triton is imported at the first call on a GPU.
"""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor

from slope_compile.kernels import gpu_rules, gpu_self_test, operands, reference, triton_products
from slope_compile.kernels.operands import tokens
from slope_compile.kernels.self_tests import trusted
from slope_compile.log import log

OLDEST = (8, 0)
"""Compute capability from which the kernels are compiled and checked."""


@functools.lru_cache(maxsize=16)
def missing(device: torch.device) -> str | None:
    """Why the Triton kernels cannot run on a device; None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if torch.version.hip is not None:
        return "they are written for CUDA"
    capability = torch.cuda.get_device_capability(device)
    return None if capability >= OLDEST else f"its compute capability {capability} is below {OLDEST}"


@functools.lru_cache(maxsize=16)
def available(device: torch.device) -> bool:
    """Whether Triton kernels can run on a device; if not, the reason is logged."""
    lacking = missing(device)
    if lacking is not None:
        log.warning("no Triton kernels on %s: %s; the plain PyTorch definitions are used", device, lacking)
    return lacking is None


@functools.lru_cache(maxsize=16)
def name(device: torch.device) -> str:
    """The GPU's name, under which measurements are stored."""
    return torch.cuda.get_device_name(device)


def ready(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels can be compiled into a graph: they run on the device and passed their test there."""
    return device.type == "cuda" and available(device) and trusted(gpu_self_test.passes, device, dtype)


def usable(keep: int, group: int, *tensors: Tensor | None) -> bool:
    """Whether the kernels apply to a call: 2:4, one supported dtype and device, and a passed test.

    Args:
        tensors: the operands, and their patterns and column masks in uint8.
    """
    if keep != 2 or group != 4:
        return False
    given = [tensor for tensor in tensors if tensor is not None]
    device, dtype = given[0].device, given[0].dtype
    if dtype not in triton_products.DTYPES or any(t.dtype not in (dtype, torch.uint8) for t in given):
        return False
    if any(t.device != device for t in given):  # the definition raises PyTorch's error
        return False
    return available(device) and trusted(gpu_self_test.passes, device, dtype)


def _takes_triton(op: str, x: Tensor, N: int, K: int) -> bool:
    return gpu_rules.takes_triton(op, tokens(x), N, K, x.dtype, name(x.device))


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
    if not usable(keep, group, values, pattern) or not operands.weight_fits(values, pattern):
        return reference.expand(values, pattern, keep, group)
    return triton_products.expand(values, pattern)


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
    N, K = values.shape[0], values.shape[1] * 2
    fits = operands.forward_fits(x, values, pattern, bias, down, up)
    if not usable(keep, group, x, values, pattern, bias, down, up) or not fits:
        return reference.forward(x, values, pattern, bias, keep, group, down, up)
    low_rank = None if down is None or up is None else (down, up)
    if _takes_triton("forward", x, N, K):
        return triton_products.forward(x, values, pattern, bias, low_rank=low_rank)
    return reference.forward_dense(x, triton_products.expand(values, pattern), bias, down, up)


def grad_input(grad: Tensor, values: Tensor, pattern: Tensor, keep: int, group: int) -> Tensor:
    """See :func:`reference.grad_input`."""
    N, K = values.shape[0], values.shape[1] * 2
    if not usable(keep, group, grad, values, pattern) or not operands.grad_input_fits(grad, values, pattern):
        return reference.grad_input(grad, values, pattern, keep, group)
    if _takes_triton("grad_input", grad, N, K):
        return triton_products.grad_input(grad, values, pattern)
    return torch.matmul(grad, triton_products.expand(values, pattern)).contiguous()


def grad_input_columns(
    grad: Tensor, values: Tensor, pattern: Tensor, column_mask: Tensor, keep: int, group: int
) -> Tensor:
    """See :func:`reference.grad_input_columns`: the column mask is read along with the values."""
    N, K = values.shape[0], values.shape[1] * 2
    fits = operands.grad_input_fits(grad, values, pattern, column_mask)
    if not usable(keep, group, grad, values, pattern, column_mask) or not fits:
        return reference.grad_input_columns(grad, values, pattern, column_mask, keep, group)
    if _takes_triton("grad_input_columns", grad, N, K):
        return triton_products.grad_input(grad, values, pattern, column_mask)
    return torch.matmul(grad, triton_products.expand(values, pattern, column_mask)).contiguous()


def grad_weight(grad: Tensor, x: Tensor, pattern: Tensor, keep: int, group: int) -> Tensor:
    """See :func:`reference.grad_weight`."""
    N, K = grad.shape[-1], x.shape[-1]
    if not usable(keep, group, grad, x, pattern) or not operands.grad_weight_fits(grad, x, pattern):
        return reference.grad_weight(grad, x, pattern, keep, group)
    if _takes_triton("grad_weight", x, N, K):
        return triton_products.grad_weight(grad, x, pattern)
    dense = grad.reshape(-1, N).t() @ x.reshape(-1, K)
    return triton_products.compress(dense, pattern)


def compress(weight: Tensor, pattern: Tensor, keep: int, group: int) -> Tensor:
    """See :func:`reference.compress`."""
    if not usable(keep, group, weight, pattern) or not operands.describes(pattern, *weight.shape):
        return reference.compress(weight, pattern, keep, group)
    return triton_products.compress(weight, pattern)


def pick_columns(values: Tensor, pattern: Tensor, keep: int, group: int) -> Tensor:
    """See :func:`reference.pick_columns`: one kernel, nothing dense in memory."""
    if not usable(keep, group, values, pattern) or not operands.columns_fit(values, pattern):
        return reference.pick_columns(values, pattern, keep, group)
    return triton_products.pick_columns(values, pattern)


def compress_columns(
    values: Tensor, pattern: Tensor, keep: int, group: int, column_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See :func:`reference.compress_columns`: one kernel, nothing dense in memory."""
    fits = operands.columns_fit(values, pattern, column_mask)
    if not usable(keep, group, values, pattern, column_mask) or not fits:
        return reference.compress_columns(values, pattern, keep, group, column_mask)
    return triton_products.compress_columns(values, pattern, column_mask)


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
"""Operator -> its implementation for CUDA tensors."""
