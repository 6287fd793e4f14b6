"""How far a result may be from the truth, as data with reasons.

The truth is computed in float64 from the *same, already rounded* inputs, so that the rounding of inputs does not
count.  The remaining error is the rounding of one accumulation and of the result.  The bounds are not guesses about a
kernel: the yardstick is PyTorch's dense product in the same dtype on the same numbers.

Errors are componentwise: the error of an entry is measured against ``scale = |A| |B|`` at that entry, the sum
of the magnitudes that were added up there.  An entry that is small beside the rest of the matrix is judged as
strictly as the largest one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

UNIT_ROUNDOFF = {
    torch.float64: 2.0**-53,  # 53 significant bits
    torch.float32: 2.0**-24,  # 24
    torch.float16: 2.0**-11,  # 11
    torch.bfloat16: 2.0**-8,  # 8
}
"""Largest relative error of rounding one number: half the distance between 1 and the next one."""

NO_WORSE_FACTOR = 2.0
"""A kernel adds the same terms as the dense product in another order (other blocks, zeros left out).  Either
order has the same bound, and the worst entry of a random matrix varies between orders by less than this."""

SMALLEST = {
    torch.float64: 2.0**-1074,
    torch.float32: 2.0**-149,
    torch.float16: 2.0**-24,
    torch.bfloat16: 2.0**-133,
}
"""Smallest positive number: below the normal range the spacing is absolute, and float16 gets there."""

SAME_FORMULA = {torch.float64: 1e-11, torch.float32: 1e-5}
"""Relative to the largest entry: two evaluations of one formula through a model of a few layers, in which some
thousand roundings of 1.1e-16 (6e-8) add up."""


SEQUENTIAL = 0.5
"""Error of a float32 sum of n random terms of mean zero, added one after the other, in units of ``u sqrt(n)`` and of
the result's norm.  The partial sum of the first j has ``sqrt(j / n)`` of the whole sum's deviation and is off by 0.42 u
of itself when it is rounded (root mean square over a binade), n times: ``0.42 u sqrt(n / 2)``, that is 0.30.  The rest
is for the scatter of results of few entries.  A term left out is ``1 / sqrt(n)``, TF32's rounding of the factors 4000
u."""


def in_sequence(summands: int) -> float:
    """Largest error of float32 sums of so many terms, as a share of the norm of a result of random numbers."""
    return SEQUENTIAL * UNIT_ROUNDOFF[torch.float32] * math.sqrt(max(summands, 1))


def rounding(dtype: torch.dtype, summands: int) -> float:
    """What an entry may be off by beside the dense product's error, as a share of the sum of magnitudes.

    In 16 bits: one rounding of the result; sums are float32 and their order does not show.  In float32 it does: one
    that adds n terms in a row is within ``sqrt(n) u`` with high probability (Higham and Mary, 2019), and a library that
    adds many short sums is far better than that.  One term left out is of the order of ``1 / n``.
    """
    return UNIT_ROUNDOFF[dtype] * (math.sqrt(max(summands, 1)) if dtype is torch.float32 else 1.0)


def relative_error(result: Tensor, truth: Tensor, scale: Tensor) -> float:
    """Largest error over ``scale``; an entry to which nothing was added must be exactly right."""
    if result.numel() == 0:
        return 0.0
    error = (result.double() - truth).abs()
    error = (error - SMALLEST[result.dtype] / 2).clamp_min(0)
    relative = torch.where(scale > 0, error / scale, error * torch.inf)
    return float(relative.nan_to_num(0.0, posinf=torch.inf).max())  # 0 * inf: right where nothing was added


def assert_no_worse_than_dense(result: Tensor, dense: Tensor, truth: Tensor, scale: Tensor) -> None:
    """``result`` is about as near to the float64 ``truth`` as PyTorch's dense product in the same dtype.

    Args:
        result: the tensor under test.
        dense: the same product by PyTorch's dense kernel, same dtype.
        truth: the same product in float64 of the same inputs.
        scale: ``|A| |B|`` in float64, same shape.
    """
    assert result.dtype == dense.dtype, f"dtype {result.dtype}, the dense product has {dense.dtype}"
    assert result.shape == truth.shape, f"shape {list(result.shape)}, expected {list(truth.shape)}"
    assert bool(torch.isfinite(result).all()), "not finite"
    error = relative_error(result, truth, scale)
    # One rounding of the result on top: a kernel may round once where the dense one happens to be exact.
    bound = NO_WORSE_FACTOR * relative_error(dense, truth, scale) + UNIT_ROUNDOFF[result.dtype]
    assert error <= bound, f"error {error:.3g} of the sum of magnitudes, allowed {bound:.3g} ({result.dtype})"


def assert_same(result: Tensor, expected: Tensor, what: str = "") -> None:
    """Equal but for the order of additions: the same formula, evaluated in the same dtype along another way."""
    assert result.dtype == expected.dtype, f"{what} dtype {result.dtype}, expected {expected.dtype}"
    assert result.shape == expected.shape, f"{what} shape {list(result.shape)}, expected {list(expected.shape)}"
    if result.numel():
        error, largest = float((result - expected).detach().abs().max()), float(expected.detach().abs().max())
        bound = SAME_FORMULA[result.dtype] * max(largest, 1e-3)
        assert error <= bound, f"{what} error {error:.3g}, allowed {bound:.3g} (largest entry {largest:.3g})"
