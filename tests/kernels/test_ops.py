"""The operators ``torch.ops.slope.*``: gradients, second gradients, adjointness, autocast.

The values of the products are checked in ``test_reference``; here it is what autograd makes of them.  The oracle of
a gradient is autograd through the dense weight times its mask, in float64.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from problems import (
    SHAPES,
    Problem,
    Shape,
    column_mask,
    draw,
    draw_columns,
    every_case,
    every_column_case,
    every_pattern,
    kept,
    packed,
    packed_columns,
)
from slope_compile.kernels import ops, reference
from slope_compile.pattern import Pattern
from tolerances import assert_no_worse_than_dense, assert_same

TWO_FOUR = Pattern(2, 4)
SMALL = Shape((3,), 8, 2)
"""Few enough numbers for finite differences, N and K multiples of every group."""


class Dense:
    """The oracle: autograd through ``weight * mask`` in one dtype."""

    def __init__(self, p: Problem, dtype: torch.dtype) -> None:
        self.x, self.bias, grad = p.x.to(dtype), p.bias.to(dtype), p.grad.to(dtype)
        # Noise at the pruned positions: the mask has to hide it.
        self.weight = torch.where(p.mask, p.weight.to(dtype), 3.0)
        for leaf in (self.x, self.bias, self.weight):
            leaf.requires_grad_()
        self.output = F.linear(self.x, self.weight * p.mask, self.bias)
        self.x_grad, self.weight_grad, self.bias_grad = torch.autograd.grad(
            self.output, (self.x, self.weight, self.bias), grad
        )
        self.output = self.output.detach()


def scales(p: Problem) -> Dense:
    """The same layer on the magnitudes: what was added up at each entry of each result."""
    x, grad, weight, bias = (t.abs() for t in (p.x, p.grad, p.weight, p.bias))
    return Dense(dataclasses.replace(p, x=x, grad=grad, weight=weight, bias=bias), torch.float64)


def leaves(p: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """x, values and bias as leaves that want a gradient; x keeps its layout."""
    x, values, bias = (t.detach().requires_grad_() for t in (p.x, p.values, p.bias))
    return x, values, bias


@every_case
def test_linear_and_its_gradients(nm: Pattern, shape: Shape, dtype: torch.dtype) -> None:
    p = draw(nm, shape, dtype)
    x, values, bias = leaves(p)
    output = ops.linear(x, values, p.pattern, bias, *p.ints)
    x_grad, values_grad, bias_grad = torch.autograd.grad(output, (x, values, bias), p.grad)

    dense, truth, scale = Dense(p, dtype), Dense(p, torch.float64), scales(p)
    assert_no_worse_than_dense(output.detach(), dense.output, truth.output, scale.output)
    assert_no_worse_than_dense(x_grad, dense.x_grad, truth.x_grad, scale.x_grad)
    assert_no_worse_than_dense(bias_grad, dense.bias_grad, truth.bias_grad, scale.bias_grad)
    assert_no_worse_than_dense(values_grad, *(kept(d.weight_grad, p.mask) for d in (dense, truth, scale)))
    # The oracle's own gradient is zero where the weight is pruned, and so is ours once expanded.
    expanded = ops.expand(values_grad, p.pattern, *p.ints)
    assert not truth.weight_grad[~p.mask].any()
    assert not expanded[~p.mask].any()


@every_case
def test_the_low_rank_branch_and_its_gradients(nm: Pattern, shape: Shape, dtype: torch.dtype) -> None:
    p = draw(nm, shape, dtype)
    N, R = p.weight.shape[0], 3
    down = torch.randn(*p.x.shape[:-1], R).to(dtype).requires_grad_()
    up = torch.randn(N, R).to(dtype).requires_grad_()
    x, values, bias = leaves(p)
    output = ops.linear(x, values, p.pattern, bias, *p.ints, False, None, down, up)
    found = torch.autograd.grad(output, (x, values, bias, down, up), p.grad)

    def wide(dtype: torch.dtype, magnitudes: bool = False) -> Problem:
        """The same as one dense layer whose input and weight are longer by R."""
        x, weight = torch.cat([p.x, down.detach()], -1), torch.cat([p.weight, up.detach()], -1)
        mask = torch.cat([p.mask, torch.ones(N, R, dtype=torch.bool)], -1)
        whole = dataclasses.replace(p, x=x, weight=weight, mask=mask)
        if magnitudes:
            parts = {name: getattr(whole, name).abs() for name in ("x", "grad", "weight", "bias")}
            whole = dataclasses.replace(whole, **parts)
        return whole

    dense, truth = Dense(wide(dtype), dtype), Dense(wide(torch.float64), torch.float64)
    scale = Dense(wide(torch.float64, magnitudes=True), torch.float64)
    K = p.weight.shape[1]
    assert_no_worse_than_dense(output.detach(), dense.output, truth.output, scale.output)
    for gradient, part in ((found[0], slice(0, K)), (found[3], slice(K, None))):
        assert_no_worse_than_dense(gradient, *(d.x_grad[..., part] for d in (dense, truth, scale)))
    assert_no_worse_than_dense(found[4], *(d.weight_grad[:, K:] for d in (dense, truth, scale)))
    assert_no_worse_than_dense(found[1], *(kept(d.weight_grad[:, :K], p.mask) for d in (dense, truth, scale)))
    assert_no_worse_than_dense(found[2], dense.bias_grad, truth.bias_grad, scale.bias_grad)


@every_column_case
def test_the_double_pruned_backward(nm: Pattern, shape: Shape, dtype: torch.dtype) -> None:
    p = draw(nm, shape, dtype)
    x, values, bias = leaves(p)
    output = ops.linear(x, values, p.pattern, bias, *p.ints, True)
    x_grad, values_grad, bias_grad = torch.autograd.grad(output, (x, values, bias), p.grad)
    # Only dX is lossy: everything else is bitwise what the exact mode gives, and imposed zeros keep training.
    exact_output = ops.linear(x, values, p.pattern, bias, *p.ints)
    _, exact_values_grad, exact_bias_grad = torch.autograd.grad(exact_output, (x, values, bias), p.grad)
    assert torch.equal(output, exact_output)
    assert torch.equal(values_grad, exact_values_grad)
    assert torch.equal(bias_grad, exact_bias_grad)

    twice = p.weight * column_mask(p.weight, nm)
    truth = p.grad.double() @ twice.double()
    scale = p.grad.double().abs() @ twice.double().abs()
    assert_no_worse_than_dense(x_grad, p.grad @ twice, truth, scale)


@every_pattern
def test_a_stored_column_mask_is_used_instead_of_a_new_one(nm: Pattern) -> None:
    p = draw(nm, SHAPES["plain"], torch.float64)
    x, values, _ = leaves(p)
    chosen = draw_columns(p.mask, nm)
    stored = packed(kept(chosen, p.mask))
    output = ops.linear(x, values, p.pattern, None, *p.ints, True, stored)
    (x_grad,) = torch.autograd.grad(output, x, p.grad)
    assert_same(x_grad, p.grad @ (p.weight * chosen))
    # Without double pruning it says nothing.
    output = ops.linear(x, values, p.pattern, None, *p.ints, False, stored)
    (x_grad,) = torch.autograd.grad(output, x, p.grad)
    assert_same(x_grad, p.grad @ p.weight)


def test_the_double_pruned_gradient_is_not_the_exact_one() -> None:
    # Otherwise the tests above could not tell the modes apart.
    p = draw(TWO_FOUR, SHAPES["plain"], torch.float64)
    x, values, _ = leaves(p)
    exact, lossy = (
        torch.autograd.grad(ops.linear(x, values, p.pattern, None, *p.ints, mode), x, p.grad)[0]
        for mode in (False, True)
    )
    assert (exact - lossy).norm() > 0.1 * exact.norm()


@every_pattern
def test_expand_and_compress_gradients(nm: Pattern) -> None:
    p = draw(nm, SHAPES["plain"], torch.float64)
    values = p.values.clone().requires_grad_()
    cotangent = torch.randn_like(p.weight)
    # The arguments after keep and group are directions for the compiled rewrite and change nothing here.
    dense = ops.expand(values, p.pattern, *p.ints, True, packed_columns(p.weight, p.mask, nm), None, 100)
    assert torch.equal(dense, p.weight)
    (grad,) = torch.autograd.grad(dense, values, cotangent)
    assert torch.equal(grad, kept(cotangent, p.mask))

    weight = torch.randn_like(p.weight).requires_grad_()
    compressed = ops.compress(weight, p.pattern, *p.ints)
    (grad,) = torch.autograd.grad(compressed, weight, p.values)
    assert torch.equal(grad, p.weight)


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=3))[1:], ids=str)
@pytest.mark.parametrize("double_pruned", [pytest.param(False, id="exact"), pytest.param(True, id="double")])
def test_only_gradients_that_are_wanted_are_computed(wanted: tuple[bool, bool, bool], double_pruned: bool) -> None:
    p = draw(TWO_FOUR, SMALL, torch.float64)
    inputs = [t.clone().requires_grad_(want) for t, want in zip((p.x, p.values, p.bias), wanted, strict=True)]
    x, values, bias = inputs
    ops.linear(x, values, p.pattern, bias, *p.ints, double_pruned).backward(p.grad)
    assert tuple(t.grad is not None for t in inputs) == wanted


# --- finite differences --------------------------------------------------------------------------------------

Operator = Callable[..., Tensor]


def _small() -> Problem:
    p = draw(TWO_FOUR, SMALL, torch.float64)
    # No two magnitudes of a column group are near each other: a step of 1e-6 must not change what is picked.
    spread = torch.randperm(p.values.numel()).view_as(p.values).double() + 1
    values = spread / spread.numel() * p.values.sign()
    return dataclasses.replace(p, values=values)


def _with_a_mask(operator: Operator, p: Problem) -> Operator:
    return functools.partial(operator, packed(kept(draw_columns(p.mask, p.nm), p.mask)))


OPERATORS: dict[str, Callable[[Problem], tuple[Operator, tuple[Tensor, ...]]]] = {
    "compress": lambda p: (lambda w: ops.compress(w, p.pattern, *p.ints), (torch.randn_like(p.weight),)),
    "expand": lambda p: (lambda v: ops.expand(v, p.pattern, *p.ints), (p.values,)),
    "linear": lambda p: (lambda x, v: ops.linear(x, v, p.pattern, None, *p.ints), (p.x, p.values)),
    "linear_with_bias": lambda p: (
        lambda x, v, b: ops.linear(x, v, p.pattern, b, *p.ints),
        (p.x, p.values, p.bias),
    ),
    "grad_input": lambda p: (lambda g, v: ops.grad_input(g, v, p.pattern, *p.ints), (p.grad, p.values)),
    "grad_input_columns": lambda p: (
        _with_a_mask(lambda m, g, v: ops.grad_input_columns(g, v, p.pattern, m, *p.ints), p),
        (p.grad, p.values),
    ),
    "grad_weight": lambda p: (lambda g, x: ops.grad_weight(g, x, p.pattern, *p.ints), (p.grad, p.x)),
    "compress_columns": lambda p: (lambda v: ops.compress_columns(v, p.pattern, *p.ints)[0], (p.values,)),
    "compress_columns_of_a_mask": lambda p: (
        _with_a_mask(lambda m, v: ops.compress_columns(v, p.pattern, *p.ints, m)[0], p),
        (p.values,),
    ),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_first_and_second_derivatives(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Finite differences write through ``.data``, which dense copies, kept where there are no kernels, do not see.
    monkeypatch.setattr("slope_compile.kernels.dense_copies.expanded", reference.expand)
    operator, inputs = OPERATORS[name](_small())
    inputs = tuple(t.clone().requires_grad_() for t in inputs)
    assert torch.autograd.gradcheck(operator, inputs)
    assert torch.autograd.gradgradcheck(operator, inputs)


def test_every_operator_is_in_the_table() -> None:
    names = torch._C._dispatch_get_all_op_names()
    defined = {name.removeprefix("slope::") for name in names if name.startswith("slope::")}
    assert defined == set(OPERATORS) - {"linear_with_bias", "compress_columns_of_a_mask"} | {"pick_columns"}


def test_what_is_picked_has_no_derivative() -> None:
    p = _small()
    values = p.values.clone().requires_grad_()
    assert not ops.pick_columns(values, p.pattern, *p.ints).requires_grad
    column_values, column_pattern = ops.compress_columns(values, p.pattern, *p.ints)
    assert column_values.requires_grad
    assert not column_pattern.requires_grad


@every_pattern
def test_values_that_a_column_mask_drops_do_not_leak(nm: Pattern) -> None:
    """Into the input's gradient, nor into its second derivatives; they have gradients of their own all the same."""
    p = draw(nm, SHAPES["plain"], torch.float64)
    stays = kept(draw_columns(p.mask, nm), p.mask)
    stored, clean = packed(stays), p.values.masked_fill(~stays, 0)
    grad, cotangent = p.grad.clone().requires_grad_(), torch.randn_like(p.x)
    values = p.values.masked_fill(~stays, float("nan")).requires_grad_()
    x_grad = ops.grad_input_columns(grad, values, p.pattern, stored, *p.ints)
    assert_same(x_grad, ops.grad_input(p.grad, clean, p.pattern, *p.ints))
    grad_grad, values_grad = torch.autograd.grad(x_grad, (grad, values), cotangent)
    assert_same(grad_grad, ops.linear(cotangent, clean, p.pattern, None, *p.ints))
    exact = ops.grad_weight(p.grad, cotangent, p.pattern, *p.ints)
    assert_same(values_grad, exact.masked_fill(~stays, 0))
    x = p.x.clone().requires_grad_()
    output = ops.linear(x, values, p.pattern, None, *p.ints, True, stored)
    first, of_values = torch.autograd.grad(output, (x, values), p.grad)
    assert_same(first, x_grad)
    assert_same(of_values, ops.grad_weight(p.grad, p.x, p.pattern, *p.ints))


# --- adjointness ---------------------------------------------------------------------------------------------


@every_pattern
def test_the_products_are_each_others_adjoints(nm: Pattern) -> None:
    p = draw(nm, SHAPES["plain"], torch.float64)
    other_values, weight = torch.randn_like(p.values), torch.randn_like(p.weight)

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum()

    # <Y(x), dY> = <x, dX(dY)>
    forward = ops.linear(p.x, p.values, p.pattern, None, *p.ints)
    assert_same(dot(forward, p.grad), dot(p.x, ops.grad_input(p.grad, p.values, p.pattern, *p.ints)))
    # <Y(V), dY> = <V, dV(dY)>
    forward = ops.linear(p.x, other_values, p.pattern, None, *p.ints)
    assert_same(dot(forward, p.grad), dot(other_values, ops.grad_weight(p.grad, p.x, p.pattern, *p.ints)))
    # <expand v, w> = <v, compress w>
    expanded = ops.expand(other_values, p.pattern, *p.ints)
    assert_same(dot(expanded, weight), dot(other_values, ops.compress(weight, p.pattern, *p.ints)))


# --- autocast ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lower", [pytest.param(torch.bfloat16, id="bf16"), pytest.param(torch.float16, id="fp16")])
@pytest.mark.parametrize("name", ["plain", "batched", "K_nine_groups"])
def test_linear_under_autocast_is_that_of_torch(name: str, lower: torch.dtype) -> None:
    p = draw(TWO_FOUR, SHAPES[name], torch.float32)
    x, values, bias = leaves(p)
    dense_x, _, dense_bias = leaves(p)
    weight = p.weight.clone().requires_grad_()
    with torch.autocast("cpu", dtype=lower):
        output = ops.linear(x, values, p.pattern, bias, *p.ints)
        dense = F.linear(dense_x, weight, dense_bias)
    assert output.dtype == dense.dtype == lower
    # Both round the same sum of the same rounded terms; blocks may be added in another order.
    truth, scale = Dense(rounded(p, lower), torch.float64), scales(rounded(p, lower))
    assert_no_worse_than_dense(output.detach(), dense.detach(), truth.output, scale.output)
    gradient = p.grad.to(lower)
    grads = torch.autograd.grad(output, (x, values, bias), gradient)
    dense_grads = torch.autograd.grad(dense, (dense_x, weight, dense_bias), gradient)
    assert [g.dtype for g in grads] == [torch.float32] * 3  # those of the stored numbers
    assert_no_worse_than_dense(grads[0].to(lower), dense_grads[0].to(lower), truth.x_grad, scale.x_grad)
    assert_no_worse_than_dense(
        grads[1].to(lower),
        kept(dense_grads[1], p.mask).to(lower),
        *(kept(t.weight_grad, p.mask) for t in (truth, scale)),
    )
    assert_no_worse_than_dense(grads[2].to(lower), dense_grads[2].to(lower), truth.bias_grad, scale.bias_grad)


def rounded(p: Problem, dtype: torch.dtype) -> Problem:
    """The problem that autocast computes: every number rounded once."""
    x, grad, weight, values, bias = (t.to(dtype) for t in (p.x, p.grad, p.weight, p.values, p.bias))
    return Problem(p.nm, x, grad, p.mask, weight, values, p.pattern, bias)


def test_autocast_leaves_float64_alone() -> None:
    p = draw(TWO_FOUR, SMALL, torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = ops.linear(p.x, p.values, p.pattern, p.bias, *p.ints)
        assert output.dtype == F.linear(p.x, p.weight, p.bias).dtype == torch.float64
    assert torch.equal(output, ops.linear(p.x, p.values, p.pattern, p.bias, *p.ints))


def test_autocast_can_be_switched_off_inside() -> None:
    p = draw(TWO_FOUR, SMALL, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.autocast("cpu", enabled=False):
        assert ops.linear(p.x, p.values, p.pattern, None, *p.ints).dtype == torch.float32


def test_autocast_joins_tensors_of_different_dtypes() -> None:
    # Activations of a layer before are in the lower dtype already, the parameters are not.
    p = draw(TWO_FOUR, SMALL, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = ops.linear(p.x.bfloat16(), p.values, p.pattern, p.bias, *p.ints)
        assert torch.equal(output, F.linear(p.x.bfloat16(), p.weight, p.bias))


def test_expanding_under_autocast_keeps_the_stored_dtype() -> None:
    # As a Parameter does: it is the product that casts, once, where it reads the weight.
    p = draw(TWO_FOUR, SMALL, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weight = ops.expand(p.values, p.pattern, *p.ints)
    assert torch.equal(weight, p.weight)
    assert weight.dtype == torch.float32
