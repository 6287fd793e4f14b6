"""The Triton kernels against float64 and the dense product: on a GPU, or in Triton's interpreter on CPU tensors.

``TRITON_INTERPRET=1 python -m pytest tests/gpu/test_triton_products.py`` interprets; the default suite does it in a
process of its own (``tests/kernels/test_triton_interpreted.py``).  Elsewhere a GPU is needed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from problems import (
    DTYPES,
    SHAPES,
    Problem,
    Shape,
    column_mask,
    draw,
    draw_columns,
    draw_mask,
    every_dtype,
    kept,
    packed,
)
from slope_compile.kernels import reference, triton_configs, triton_products
from slope_compile.pattern import Pattern
from tolerances import relative_error, rounding
from triton_interpreter import close_gaps, dtypes, interpreting, slow_interpreted

if interpreting():
    close_gaps()
    DEVICE = "cpu"
else:
    DEVICE = "cuda"
    pytestmark = pytest.mark.gpu

TWO_FOUR = Pattern(2, 4)
AWKWARD = {
    **SHAPES,
    "N_not_multiple_of_4": Shape((9,), 7, 5),
    "several_tiles": Shape((70,), 132, 67),
    "whole_tiles": Shape((64,), 128, 64),
}


def tokens(t: Tensor) -> Tensor:
    return t.reshape(math.prod(t.shape[:-1]), t.shape[-1])


def on_device(t: Tensor) -> Tensor:
    """Moved with its strides: a copy of an expanded or strided tensor would be contiguous."""
    if DEVICE == "cpu":
        return t
    empty = torch.empty(0, dtype=t.dtype, device=DEVICE)
    storage: Any = t.untyped_storage().cuda()
    return empty.set_(storage, t.storage_offset(), t.shape, t.stride())


def assert_as_good(
    result: Tensor, product: Callable[[torch.dtype], Tensor], scale: Tensor, dtype: torch.dtype, summands: int
) -> None:
    """No further from float64 than 1.1 of the dense product in the same dtype, and the rounding of the result; in
    float32, of the sums."""
    truth, dense = product(torch.float64), product(dtype)
    result = result.cpu()
    assert result.dtype == dense.dtype
    assert result.shape == dense.shape
    assert result.is_contiguous()
    assert bool(torch.isfinite(result).all())
    bound = 1.1 * relative_error(dense, truth, scale) + rounding(dtype, summands)
    assert relative_error(result, truth, scale) <= bound


def check_forward(p: Problem, dtype: torch.dtype, config: triton_configs.Config | None = None) -> None:
    x, values, pattern, bias = map(on_device, (p.x, p.values, p.pattern, p.bias))
    result = triton_products.forward(x, values, pattern, bias, config=config)
    scale = F.linear(p.x.double().abs(), p.weight.double().abs(), p.bias.double().abs())
    assert_as_good(result, lambda d: F.linear(p.x.to(d), p.weight.to(d), p.bias.to(d)), scale, dtype, p.x.shape[-1] + 1)


def check_grad_input(
    p: Problem, dtype: torch.dtype, columns: Tensor | None, config: triton_configs.Config | None = None
) -> None:
    grad, values, pattern = map(on_device, (p.grad, p.values, p.pattern))
    weight = p.weight if columns is None else p.weight * columns
    stored = None if columns is None else on_device(packed(kept(columns, p.mask)))
    result = triton_products.grad_input(grad, values, pattern, stored, config=config)
    scale = p.grad.double().abs() @ weight.double().abs()
    assert_as_good(result, lambda d: p.grad.to(d) @ weight.to(d), scale, dtype, p.grad.shape[-1])


def check_grad_weight(p: Problem, dtype: torch.dtype, config: triton_configs.Config | None = None) -> None:
    grad, x, pattern = map(on_device, (p.grad, p.x, p.pattern))
    result = triton_products.grad_weight(grad, x, pattern, config=config)
    dy, inputs = tokens(p.grad), tokens(p.x)
    scale = kept(dy.double().abs().t() @ inputs.double().abs(), p.mask)
    assert_as_good(result, lambda d: kept(dy.to(d).t() @ inputs.to(d), p.mask), scale, dtype, len(dy))


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        # Tiles are small in float32, and the interpreter takes them one after the other.
        pytest.param(
            shape,
            dtype,
            id=f"{size}-{name}",
            marks=slow_interpreted() if (size, name) == ("several_tiles", "fp32") else [],
        )
        for size, shape in AWKWARD.items()
        for dtype, name in DTYPES.items()
    ],
)
def test_products(shape: Shape, dtype: torch.dtype) -> None:
    p = draw(TWO_FOUR, shape, dtype)
    check_forward(p, dtype)
    check_grad_input(p, dtype, None)
    check_grad_input(p, dtype, torch.rand(p.mask.shape) < 0.8)
    check_grad_weight(p, dtype)
    assert torch.equal(triton_products.expand(on_device(p.values), on_device(p.pattern)).cpu(), p.weight)


@dtypes(torch.bfloat16)
@pytest.mark.parametrize(
    ("kernel", "groups"),
    [("forward", 35), ("forward", 48), ("grad_input", 35), ("grad_input", 48), ("grad_weight", 35)],
)
def test_every_configuration(kernel: str, groups: int, dtype: torch.dtype) -> None:
    """Rows of 48 groups are whole words of patterns and column masks, which are read as such."""
    p = draw(TWO_FOUR, Shape((37,), 76, groups), dtype)
    columns = torch.rand(p.mask.shape) < 0.8
    for config in triton_configs.configurations(kernel, dtype, arch=triton_products.arch(torch.device(DEVICE)) or 90):
        if kernel == "forward":
            check_forward(p, dtype, config)
        elif kernel == "grad_input":
            check_grad_input(p, dtype, columns, config)
        else:
            check_grad_weight(p, dtype, config)


@every_dtype
@pytest.mark.parametrize("R", [1, 16, 40])
def test_low_rank_update(R: int, dtype: torch.dtype) -> None:
    p = draw(TWO_FOUR, Shape((2, 9), 20, 9), dtype)
    t, b = torch.randn(2, 9, R).to(dtype), torch.randn(20, R).to(dtype)
    x, values, pattern = map(on_device, (p.x, p.values, p.pattern))
    result = triton_products.forward(x, values, pattern, None, (on_device(t), on_device(b)))
    scale = p.x.double().abs() @ p.weight.double().abs().t() + t.double().abs() @ b.double().abs().t()
    # One product of the joined operands: what the kernel sums up in one accumulator.
    joined, weight = torch.cat([p.x, t], -1), torch.cat([p.weight, b], -1)
    assert_as_good(result, lambda d: joined.to(d) @ weight.to(d).t(), scale, dtype, joined.shape[-1])


def check_columns(mask: Tensor, weight: Tensor) -> None:
    """Columns are those picked by counting; the transpose has their values, bit by bit, picked then or before."""
    values, pattern = on_device(kept(weight, mask)), on_device(packed(mask))
    picked = column_mask(weight, TWO_FOUR)
    column_mask_found = triton_products.pick_columns(values, pattern)
    assert torch.equal(column_mask_found.cpu(), packed(kept(picked, mask)))
    for given in (None, column_mask_found):
        found, found_pattern = triton_products.compress_columns(values, pattern, given)
        assert torch.equal(bits(found.cpu()), bits(kept(weight.t(), picked.t())))
        assert torch.equal(found_pattern.cpu(), packed(picked.t()))


def bits(t: Tensor) -> Tensor:
    return t.contiguous().view(torch.int32 if t.dtype is torch.float32 else torch.int16)


@every_dtype
@pytest.mark.parametrize(
    ("N", "groups"),
    [
        *[(4, 1), (12, 9), (20, 3)],
        *(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in [(64, 32), (76, 35), (132, 67)]),
    ],
)
def test_conversions(N: int, groups: int, dtype: torch.dtype) -> None:
    p = draw(TWO_FOUR, Shape((1,), N, groups), dtype)
    check_columns(p.mask, torch.where(p.mask, p.weight, 0.0))  # randn * False may be -0
    other = draw_columns(p.mask, TWO_FOUR)
    twice = torch.where(other, p.weight, 0.0)
    values, pattern, given = map(on_device, (p.values, p.pattern, packed(kept(other, p.mask))))
    found, found_pattern = triton_products.compress_columns(values, pattern, given)
    slots = column_mask(twice, TWO_FOUR).t()
    assert torch.equal(found.cpu(), kept(twice.t(), slots))
    assert torch.equal(found_pattern.cpu(), packed(slots))
    assert torch.equal(triton_products.expand(values, pattern, given).cpu(), twice)
    for weight in (p.weight, p.weight.t().contiguous().t(), p.weight.repeat(1, 2)[:, : p.weight.shape[1]]):
        found = triton_products.compress(on_device(weight), on_device(p.pattern))
        assert torch.equal(found.cpu(), p.values)


@every_dtype
def test_columns_of_adversarial_magnitudes(dtype: torch.dtype) -> None:
    # Ties, signs, both zeros, denormals and infinities, at every place of a group; a NaN is larger than infinity.
    tiny = torch.finfo(dtype).smallest_normal / 4
    special = torch.tensor([0.0, -0.0, tiny, -tiny, 2 * tiny, 1.0, -1.0, 2.0, math.inf, -math.inf])
    weight = special[torch.randint(len(special), (64, 36))].to(dtype) * 1
    mask = draw_mask(64, 36, TWO_FOUR)
    weight = torch.where(mask, weight, torch.zeros((), dtype=dtype))
    check_columns(mask, weight)
    weight[5, :] = torch.where(mask[5], math.nan, weight[5])
    values, pattern = kept(weight, mask), packed(mask)
    column_mask_found = triton_products.pick_columns(on_device(values), on_device(pattern))
    assert torch.equal(column_mask_found.cpu(), reference.pick_columns(values, pattern, 2, 4))
    found, found_pattern = triton_products.compress_columns(on_device(values), on_device(pattern))
    expected, expected_pattern = reference.compress_columns(values, pattern, 2, 4)
    assert torch.equal(found_pattern.cpu(), expected_pattern)
    torch.testing.assert_close(found.cpu(), expected, rtol=0.0, atol=0.0, equal_nan=True)


@every_dtype
def test_results_go_where_they_are_asked_for(dtype: torch.dtype) -> None:
    p = draw(TWO_FOUR, Shape((2, 9), 20, 9), dtype)
    x, grad, values, pattern = map(on_device, (p.x, p.grad, p.values, p.pattern))
    calls: list[tuple[Callable[..., Tensor], tuple[Tensor, ...], tuple[int, ...]]] = [
        (triton_products.forward, (x, values, pattern), (2, 9, 20)),
        (triton_products.grad_input, (grad, values, pattern), (2, 9, 36)),
        (triton_products.grad_weight, (grad, x, pattern), (20, 18)),
        (triton_products.compress, (on_device(p.weight), pattern), (20, 18)),
    ]
    for product, arguments, size in calls:
        out = torch.full(size, math.nan, dtype=dtype, device=DEVICE)
        assert product(*arguments, out=out) is out
        assert torch.equal(out, product(*arguments))


def six_patterns() -> Tensor:
    """Keep mask ``[6, 32]``: each pattern of two of four in each of eight neighbouring groups."""
    pairs = list(itertools.combinations(range(4), 2))
    rows = [[i in pairs[(r + g) % 6] for g in range(8) for i in range(4)] for r in range(6)]
    return torch.tensor(rows)


@every_dtype
def test_every_pattern_in_every_position(dtype: torch.dtype) -> None:
    # Small whole numbers: every product is exact in every dtype, so one misplaced value shows.
    mask = six_patterns().repeat(2, 2)
    weight = (torch.arange(mask.numel()).view_as(mask) % 7 + 1).to(dtype) * mask
    values, pattern = on_device(kept(weight, mask)), on_device(packed(mask))
    x = (torch.arange(3 * 64).view(3, 64) % 5 - 2).to(dtype)
    grad = (torch.arange(3 * 12).view(3, 12) % 3 - 1).to(dtype)
    columns = six_patterns().repeat(11, 1)[:64, :12].t()
    assert torch.equal(triton_products.expand(values, pattern).cpu(), weight)
    y = triton_products.forward(on_device(x), values, pattern)
    assert torch.equal(y.cpu().double(), x.double() @ weight.double().t())
    dx = triton_products.grad_input(on_device(grad), values, pattern)
    assert torch.equal(dx.cpu().double(), grad.double() @ weight.double())
    dx = triton_products.grad_input(on_device(grad), values, pattern, on_device(packed(kept(columns, mask))))
    assert torch.equal(dx.cpu().double(), grad.double() @ (weight * columns).double())
    dv = triton_products.grad_weight(on_device(grad), on_device(x), pattern)
    assert torch.equal(dv.cpu().double(), kept(grad.double().t() @ x.double(), mask))


@every_dtype
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_pruned_does_not_leak(bad: float, dtype: torch.dtype) -> None:
    p = draw(TWO_FOUR, Shape((5,), 16, 9), dtype)
    # A kept value that the column mask drops: nothing of W^{R,C} must see it.
    stays = kept(draw_columns(p.mask, TWO_FOUR), p.mask)
    poisoned = on_device(torch.where(stays, p.values, bad))
    grad, values, pattern, stored = map(on_device, (p.grad, p.values, p.pattern, packed(stays)))
    products: tuple[Callable[[Tensor], Tensor], ...] = (
        lambda v: triton_products.grad_input(grad, v, pattern, stored),
        lambda v: triton_products.expand(v, pattern, stored),
        lambda v: triton_products.compress_columns(v, pattern, stored)[0],
        lambda v: triton_products.compress_columns(v, pattern, stored)[1],
    )
    for product in products:
        assert torch.equal(product(poisoned), product(values))
    # A sum that is not finite at pruned positions alone: one input feature, pruned in every row.
    mask = p.mask.clone()
    mask[:, :4] = torch.tensor([True, False, True, False])
    x = p.x.clone()
    x[:, [1, 3]] = bad
    result = triton_products.grad_weight(grad, on_device(x), on_device(packed(mask)))
    assert bool(result.isfinite().all())
    # Where it is kept, it must arrive.
    values = p.values.clone()
    values[3, 4] = bad
    y = triton_products.forward(on_device(p.x), on_device(values), pattern)
    assert not bool(y[:, 3].isfinite().any())
    assert bool(y[:, torch.arange(16) != 3].isfinite().all())


@every_dtype
def test_nothing_outside_the_tensors_is_read(dtype: torch.dtype) -> None:
    # Numbers beside the views are NaN: a tail that is not masked would bring them in.
    p = draw(TWO_FOUR, Shape((5,), 12, 9), dtype)

    def framed(t: Tensor) -> Tensor:
        frame = torch.full((t.shape[0] + 2, t.shape[1] + 6), math.nan, dtype=t.dtype)
        view = frame[1:-1, 3:-3]
        view.copy_(t)
        return on_device(view)

    x, grad, values, pattern = framed(p.x), framed(p.grad), on_device(p.values), on_device(p.pattern)
    assert bool(triton_products.forward(x, values, pattern).isfinite().all())
    assert bool(triton_products.grad_input(grad, values, pattern).isfinite().all())
    assert bool(triton_products.grad_weight(grad, x, pattern).isfinite().all())


@pytest.mark.parametrize(("M", "N", "K"), [(0, 8, 16), (4, 0, 16), (4, 8, 0)])
def test_zero_sizes(M: int, N: int, K: int) -> None:
    mask = draw_mask(N, K, TWO_FOUR)
    values = torch.ones(N, K // 2, device=DEVICE)
    pattern = packed(mask).to(DEVICE)
    x, grad, bias = (torch.ones(*size, device=DEVICE) for size in ((M, K), (M, N), (N,)))
    for R in (None, 0, 3):
        low_rank = None if R is None else (torch.ones(M, R, device=DEVICE), torch.ones(N, R, device=DEVICE))
        expected = F.linear(x, x.new_zeros(N, K), bias) + (R or 0)
        assert torch.equal(triton_products.forward(x, values, pattern, bias, low_rank), expected)
    assert torch.equal(triton_products.grad_input(grad, values, pattern), grad.new_zeros(M, K))
    assert torch.equal(triton_products.grad_weight(grad, x, pattern), grad.new_zeros(N, K // 2))
    assert triton_products.expand(values, pattern).shape == (N, K)
    stored = triton_products.pick_columns(values, pattern)
    assert stored.shape == (N, K // 16)
    assert torch.equal(triton_products.grad_input(grad, values, pattern, stored), grad.new_zeros(M, K))
    column_values, column_pattern = triton_products.compress_columns(values, pattern, stored)
    assert (column_values.shape, column_pattern.shape) == ((K, N // 2), (K, N // 8))
