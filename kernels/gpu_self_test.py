"""Whether the Triton kernels can be trusted on a device: each is run there once per dtype, on numbers with one answer.

All are small whole numbers, so that every sum is exact in every dtype and the results must be equal to the last bit.
Then once more with rows of zeros, an infinity and a NaN among them: those must arrive where they count, and nowhere
else.  Subnormal numbers are for the tests to look at: how tensor cores treat them NVIDIA does not specify.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slope_compile.kernels import reference, triton_products
from slope_compile.kernels.metadata import pack_mask
from slope_compile.log import log

M, N, K, R = 37, 108, 140, 24
"""No multiple of any tile; rows enough for all six patterns of a group in each place of a tile, see ``_mask``."""


def passes(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether every kernel is right; where one is not, or does not build, the log says so and none is used."""
    try:
        wrong = [name for name, right in _checks(device, dtype).items() if not right]
    except Exception as error:  # Whatever a compiler or a driver raises.
        log.warning("the Triton kernels do not run on %s in %s and are not used: %s", device, dtype, error)
        return False
    if wrong:
        log.warning("the Triton kernels %s are wrong on %s in %s: none is used", ", ".join(wrong), device, dtype)
    return not wrong


def _checks(device: torch.device, dtype: torch.dtype) -> dict[str, bool]:
    with torch.no_grad(), torch.inference_mode(False):
        mask, columns = _mask(N, K).to(device), _mask(K, N).t().to(device)
        pattern = pack_mask(mask)
        stays = reference.compress(columns, pattern, 2, 4)
        values = _numbers(N, K // 2, 7).to(device, dtype)
        sizes = ((M, K, 5), (M, N, 5), (1, N, 5), (M, R, 7), (N, R, 5))
        x, grad, bias, down, up = (_numbers(*size).to(device, dtype) for size in sizes)
        problem = (pattern, stays, values, x, grad)
        return _finite(*problem, bias[0], down, up) | _not_finite(*problem)


def _finite(
    pattern: Tensor, stays: Tensor, values: Tensor, x: Tensor, grad: Tensor, bias: Tensor, down: Tensor, up: Tensor
) -> dict[str, bool]:
    column_mask = pack_mask(stays)
    exact, dy, inputs = values.double(), grad.double(), x.double()
    dense = reference.expand(exact, pattern, 2, 4)
    twice = reference.expand(exact * stays, pattern, 2, 4)
    y = reference.forward(inputs, exact, pattern, None, 2, 4)
    picked, picked_pattern = triton_products.compress_columns(values, pattern)
    truth, true_pattern = reference.compress_columns(exact, pattern, 2, 4)
    given, given_pattern = triton_products.compress_columns(values, pattern, column_mask)
    true_given, true_given_pattern = reference.compress_columns(exact, pattern, 2, 4, column_mask)
    pairs = {
        "forward": (triton_products.forward(x, values, pattern, bias), y + bias.double()),
        "forward with a low-rank update": (
            triton_products.forward(x, values, pattern, None, (down, up)), y + down.double() @ up.double().t(),
        ),
        "grad_input": (triton_products.grad_input(grad, values, pattern), dy @ dense),
        "grad_input_columns": (triton_products.grad_input(grad, values, pattern, column_mask), dy @ twice),
        "grad_weight": (
            triton_products.grad_weight(grad, x, pattern), reference.grad_weight(dy, inputs, pattern, 2, 4),
        ),
        "expand": (triton_products.expand(values, pattern), dense),
        "expand of the columns": (triton_products.expand(values, pattern, column_mask), twice),
        "compress": (triton_products.compress(dense.to(values.dtype), pattern), exact),
        "pick_columns": (
            triton_products.pick_columns(values, pattern), reference.pick_columns(exact, pattern, 2, 4).double(),
        ),
        "compress_columns": (picked, truth),
        "the pattern of compress_columns": (picked_pattern, true_pattern.double()),
        "compress_columns with a mask": (given, true_given),
        "the pattern of compress_columns with a mask": (given_pattern, true_given_pattern.double()),
    }  # fmt: skip
    return {name: equal(*pair) for name, pair in pairs.items()}


def _not_finite(pattern: Tensor, stays: Tensor, values: Tensor, x: Tensor, grad: Tensor) -> dict[str, bool]:
    """Weights that count, weights that the columns drop, and sums of which not all are kept."""
    column_mask = pack_mask(stays)
    odd, odd_x, odd_grad = unusual(values), unusual(x), unusual(grad)
    dropped = values.masked_fill(~stays, torch.nan)
    twice = reference.expand(values.double() * stays, pattern, 2, 4)
    pairs = {
        "forward": (
            triton_products.forward(x, odd, pattern), reference.forward(x.double(), odd.double(), pattern, None, 2, 4),
        ),
        "grad_input": (
            triton_products.grad_input(grad, odd, pattern),
            reference.grad_input(grad.double(), odd.double(), pattern, 2, 4),
        ),
        "grad_input_columns": (triton_products.grad_input(grad, dropped, pattern, column_mask), grad.double() @ twice),
        "grad_weight": (
            triton_products.grad_weight(odd_grad, odd_x, pattern),
            reference.grad_weight(odd_grad.double(), odd_x.double(), pattern, 2, 4),
        ),
        "expand of the columns": (triton_products.expand(dropped, pattern, column_mask), twice),
        "compress_columns with a mask": (
            triton_products.compress_columns(dropped, pattern, column_mask)[0],
            reference.compress_columns(values.double(), pattern, 2, 4, column_mask)[0],
        ),
        "pick_columns": (
            triton_products.pick_columns(odd, pattern), reference.pick_columns(odd, pattern, 2, 4).double(),
        ),
    }  # fmt: skip
    return {f"{name} of what is not finite": equal(*pair) for name, pair in pairs.items()}


def equal(result: Tensor, truth: Tensor) -> bool:
    """Whether a result is that of float64, rounded to its dtype; a NaN is like any other."""
    truth = truth.to(result.dtype)
    return bool(((result == truth) | (result.isnan() & truth.isnan())).all())


def unusual(numbers: Tensor) -> Tensor:
    """Some rows of zeros instead, an infinity and a NaN."""
    odd = numbers.clone()
    odd[5::8] = 0
    odd[2, 1], odd[3, 4] = torch.inf, torch.nan
    return odd


def _mask(rows: int, columns: int) -> Tensor:
    """Rows 16 apart, and groups 16 apart, have other patterns.

    In 96 rows, or in 80 and 48 groups, each of the six comes to lie in every row of 16 and every group of 16, so in
    every register of every lane.
    """
    pairs = torch.combinations(torch.arange(4))  # [6, 2]
    row, group = torch.arange(rows)[:, None], torch.arange(columns // 4)
    code = (row + row // 16 + group + group // 16) % 6
    mask = torch.zeros(rows, columns // 4, 4, dtype=torch.bool)
    return mask.scatter_(-1, pairs[code], True).view(rows, columns)


def _numbers(rows: int, columns: int, count: int) -> Tensor:
    """-1, 0 and 1, in an order with period ``count`` that no row shares with the next: sums stay below 2^8."""
    return (torch.arange(rows)[:, None] * 3 + torch.arange(columns)) % count % 3 - 1
