"""The operators ``torch.ops.slope.*``: schemas, shapes for tracing, gradients, autocast.

| operator | computes |
|---|---|
| ``compress(weight, pattern)`` | dense ``[N, K]`` -> values ``[N, K keep/group]`` |
| ``expand(values, pattern)`` | values -> dense ``[N, K]``; carries the directions for the compiled rewrite |
| ``linear(x, values, pattern, bias)`` | forward product ``Y = X W^T + bias`` (``+ down up^T``, a low-rank branch) |
| ``grad_input(grad, values, pattern)`` | exact input gradient ``dX = dY W`` |
| ``grad_input_columns(grad, values, pattern, column_mask)`` | double-pruned ``dX = dY W^{R,C}`` |
| ``grad_weight(grad, x, pattern)`` | ``dY^T X`` at the kept positions, compressed |
| ``pick_columns(values, pattern)`` | second pruning by magnitude: the mask of the values that stay |
| ``compress_columns(values, pattern, column_mask)`` | W^{R,C}'s transpose, values and pattern; picks without a mask |

The double-pruned input gradient ``dX = dY W^{R,C}`` is the forward product of dY with the transposed compressed
weight, ``linear(dY, column_values, column_pattern)``.  If a column mask is given, ``grad_input_columns`` computes the
same without the transposed values, so that a kernel may read the forward storage instead.

The operators are closed under differentiation, so second derivatives work: each gradient is again one of these
operators (``compress`` and ``expand`` are each other's adjoints; the three products differentiate into one another).
``torch.compile`` sees each as one opaque node.  Nothing dense-shaped is saved for backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from slope_compile.kernels import cpu_ops, gpu_ops, reference
from slope_compile.kernels._autocast import register_autocast

_lib = torch.library.Library("slope", "DEF")

_SCHEMAS = {
    "compress": "(Tensor weight, Tensor pattern, int keep, int group) -> Tensor",
    "expand": (
        "(Tensor values, Tensor pattern, int keep, int group, bool double_pruned=False, "
        "Tensor? column_mask=None, Tensor? column_age=None, int interval=0) -> Tensor"
    ),
    "linear": (
        "(Tensor x, Tensor values, Tensor pattern, Tensor? bias, int keep, int group, "
        "bool double_pruned=False, Tensor? column_mask=None, Tensor? down=None, Tensor? up=None) -> Tensor"
    ),
    "grad_input": "(Tensor grad, Tensor values, Tensor pattern, int keep, int group) -> Tensor",
    "grad_input_columns": (
        "(Tensor grad, Tensor values, Tensor pattern, Tensor column_mask, int keep, int group) -> Tensor"
    ),
    "grad_weight": "(Tensor grad, Tensor x, Tensor pattern, int keep, int group) -> Tensor",
    "pick_columns": "(Tensor values, Tensor pattern, int keep, int group) -> Tensor",
    "compress_columns": (
        "(Tensor values, Tensor pattern, int keep, int group, Tensor? column_mask=None) -> (Tensor, Tensor)"
    ),
}
for _name, _schema in _SCHEMAS.items():
    _lib.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))

compress = torch.ops.slope.compress.default
expand = torch.ops.slope.expand.default
linear = torch.ops.slope.linear.default
grad_input = torch.ops.slope.grad_input.default
grad_input_columns = torch.ops.slope.grad_input_columns.default
grad_weight = torch.ops.slope.grad_weight.default
pick_columns = torch.ops.slope.pick_columns.default
compress_columns = torch.ops.slope.compress_columns.default


# --- definitions -----------------------------------------------------------------------------------------------------


def _expand_definition(
    values: Tensor,
    pattern: Tensor,
    keep: int,
    group: int,
    double_pruned: bool = False,
    column_mask: Tensor | None = None,
    column_age: Tensor | None = None,
    interval: int = 0,
) -> Tensor:
    """Expand to a dense weight.  The arguments from ``double_pruned`` on do not change it: they direct the backward of
    the linear that reads the weight, once compilation has rewritten it (see ``passes.sparsify``)."""
    return reference.expand(values, pattern, keep, group)


def _linear_definition(
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
    return reference.forward(x, values, pattern, bias, keep, group, down, up)


_DEFINITIONS = {
    "compress": reference.compress,
    "expand": _expand_definition,
    "linear": _linear_definition,
    "grad_input": reference.grad_input,
    "grad_input_columns": reference.grad_input_columns,
    "grad_weight": reference.grad_weight,
    "pick_columns": reference.pick_columns,
    "compress_columns": reference.compress_columns,
}
for _name, _definition in _DEFINITIONS.items():
    _lib.impl(_name, _definition, "CompositeExplicitAutograd")
for _name, _implementation in cpu_ops.IMPLEMENTATIONS.items():
    _lib.impl(_name, _implementation, "CPU")
for _name, _implementation in gpu_ops.IMPLEMENTATIONS.items():
    _lib.impl(_name, _implementation, "CUDA")


# --- shapes, for fake tensors with symbolic sizes --------------------------------------------------------------------


@torch.library.register_fake("slope::compress", lib=_lib)
def _(weight: Tensor, pattern: Tensor, keep: int, group: int) -> Tensor:
    return weight.new_empty(weight.shape[0], weight.shape[1] // group * keep)


@torch.library.register_fake("slope::expand", lib=_lib)
def _(values: Tensor, pattern: Tensor, keep: int, group: int, *directions: Any) -> Tensor:
    return values.new_empty(values.shape[0], values.shape[1] // keep * group)


@torch.library.register_fake("slope::linear", lib=_lib)
def _(
    x: Tensor, values: Tensor, pattern: Tensor, bias: Tensor | None, keep: int, group: int, *directions: Any
) -> Tensor:
    K = values.shape[1] // keep * group
    torch._check(
        x.shape[-1] == K,
        lambda: f"slope::linear: x has {x.shape[-1]} features, the weight {values.shape[0]} x {K}",
    )
    return x.new_empty(*x.shape[:-1], values.shape[0])


@torch.library.register_fake("slope::grad_input", lib=_lib)
def _(grad: Tensor, values: Tensor, pattern: Tensor, keep: int, group: int) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], values.shape[1] // keep * group)


@torch.library.register_fake("slope::grad_input_columns", lib=_lib)
def _(grad: Tensor, values: Tensor, pattern: Tensor, column_mask: Tensor, keep: int, group: int) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], values.shape[1] // keep * group)


@torch.library.register_fake("slope::grad_weight", lib=_lib)
def _(grad: Tensor, x: Tensor, pattern: Tensor, keep: int, group: int) -> Tensor:
    return grad.new_empty(grad.shape[-1], x.shape[-1] // group * keep)


@torch.library.register_fake("slope::pick_columns", lib=_lib)
def _(values: Tensor, pattern: Tensor, keep: int, group: int) -> Tensor:
    return pattern.new_empty(values.shape[0], (values.shape[1] + 7) // 8)


@torch.library.register_fake("slope::compress_columns", lib=_lib)
def _(
    values: Tensor, pattern: Tensor, keep: int, group: int, column_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    N, K = values.shape[0], values.shape[1] // keep * group
    return values.new_empty(K, N // group * keep), pattern.new_empty(K, (N + 7) // 8)


# --- gradients -------------------------------------------------------------------------------------------------------


def _save(op: Any, *names: str) -> Any:
    """A setup_context that saves the arguments of these names and the (keep, group) pair."""
    positions = {argument.name: i for i, argument in enumerate(op._schema.arguments)}

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*(inputs[positions[name]] for name in names))
        ctx.nm = (inputs[positions["keep"]], inputs[positions["group"]])

    return setup


def _compress_backward(ctx: Any, grad_values: Tensor) -> tuple[Any, ...]:
    (pattern,) = ctx.saved_tensors
    return expand(grad_values, pattern, *ctx.nm), None, None, None


def _expand_backward(ctx: Any, grad_weight: Tensor) -> tuple[Any, ...]:
    (pattern,) = ctx.saved_tensors
    return (compress(grad_weight, pattern, *ctx.nm), *[None] * 7)


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, values, pattern, _, keep, group, double_pruned, column_mask, down, up = inputs
    ctx.save_for_backward(x, values, pattern, column_mask, down, up)
    ctx.nm = (keep, group)
    ctx.double_pruned = double_pruned


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, values, pattern, column_mask, down, up = ctx.saved_tensors
    grad_x = grad_values = grad_bias = grad_down = grad_up = None
    if ctx.needs_input_grad[0] and ctx.double_pruned:
        if column_mask is None:
            column_values, column_pattern = compress_columns(values, pattern, *ctx.nm)
            grad_x = linear(grad, column_values, column_pattern, None, *ctx.nm)
        else:
            grad_x = grad_input_columns(grad, values, pattern, column_mask, *ctx.nm)
    elif ctx.needs_input_grad[0]:
        grad_x = grad_input(grad, values, pattern, *ctx.nm)
    if ctx.needs_input_grad[1]:
        grad_values = grad_weight(grad, x, pattern, *ctx.nm)
    if ctx.needs_input_grad[3]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
    if down is not None and ctx.needs_input_grad[8]:
        grad_down = grad @ up  # [..., N] @ [N, R] -> [..., R]
    if up is not None and ctx.needs_input_grad[9]:
        grad_up = grad.reshape(-1, grad.shape[-1]).t() @ down.reshape(-1, down.shape[-1])  # [N, M] @ [M, R] -> [N, R]
    return grad_x, grad_values, None, grad_bias, None, None, None, None, grad_down, grad_up


def _grad_input_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    grad_out, values, pattern = ctx.saved_tensors
    return (
        linear(grad, values, pattern, None, *ctx.nm) if ctx.needs_input_grad[0] else None,
        grad_weight(grad_out, grad, pattern, *ctx.nm) if ctx.needs_input_grad[1] else None,
        None,
        None,
        None,
    )


def _grad_input_columns_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    grad_out, values, pattern, column_mask = ctx.saved_tensors
    grad_grad = grad_values = None
    if ctx.needs_input_grad[0]:
        grad_grad = linear(grad, reference.keep_columns(values, column_mask), pattern, None, *ctx.nm)
    if ctx.needs_input_grad[1]:
        grad_values = reference.keep_columns(grad_weight(grad_out, grad, pattern, *ctx.nm), column_mask)
    return grad_grad, grad_values, None, None, None, None


def _grad_weight_backward(ctx: Any, grad_values: Tensor) -> tuple[Any, ...]:
    grad_out, x, pattern = ctx.saved_tensors
    return (
        linear(x, grad_values, pattern, None, *ctx.nm) if ctx.needs_input_grad[0] else None,
        grad_input(grad_out, grad_values, pattern, *ctx.nm) if ctx.needs_input_grad[1] else None,
        None,
        None,
        None,
    )


def _pick_columns_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.mark_non_differentiable(output)


def _pick_columns_backward(ctx: Any, _: Any) -> tuple[Any, ...]:
    return None, None, None, None


def _compress_columns_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, pattern, keep, group, column_mask = inputs
    ctx.save_for_backward(pattern, output[1], column_mask)
    ctx.nm = (keep, group)
    ctx.mark_non_differentiable(output[1])


def _compress_columns_backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
    pattern, column_pattern, column_mask = ctx.saved_tensors
    dense: Tensor = expand(grad, column_pattern, *ctx.nm).t()  # [K, N] -> [N, K]
    grad_values: Tensor = compress(dense, pattern, *ctx.nm)
    if column_mask is not None:
        grad_values = reference.keep_columns(grad_values, column_mask)
    return grad_values, None, None, None, None


for _name, _backward, _setup in (
    ("compress", _compress_backward, _save(compress, "pattern")),
    ("expand", _expand_backward, _save(expand, "pattern")),
    ("linear", _linear_backward, _linear_setup),
    ("grad_input", _grad_input_backward, _save(grad_input, "grad", "values", "pattern")),
    (
        "grad_input_columns",
        _grad_input_columns_backward,
        _save(grad_input_columns, "grad", "values", "pattern", "column_mask"),
    ),
    ("grad_weight", _grad_weight_backward, _save(grad_weight, "grad", "x", "pattern")),
    ("pick_columns", _pick_columns_backward, _pick_columns_setup),
    ("compress_columns", _compress_columns_backward, _compress_columns_setup),
):
    torch.library.register_autograd(f"slope::{_name}", _backward, setup_context=_setup, lib=_lib)

register_autocast(_lib, "linear", linear)
