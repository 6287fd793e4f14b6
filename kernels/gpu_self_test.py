"""Whether the Triton kernels can be trusted on a device: each is run there once per dtype, on numbers with one answer.

All are small whole numbers, so that every sum is exact in every dtype and the results must be equal to the last bit.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from slope_compile.kernels import reference, triton_products
from slope_compile.kernels.metadata import pack_mask
from slope_compile.log import log

M, N, K = 37, 108, 140
"""No multiple of any tile; rows enough for all six patterns of a group in each place of a tile, see ``_mask``."""


@functools.lru_cache(maxsize=64)
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
        pattern, columns = pack_mask(_mask(N, K)).to(device), pack_mask(_mask(K, N)).to(device)
        values = _numbers(N, K // 2, 7).to(device, dtype)
        x, grad, bias = (_numbers(*size, 5).to(device, dtype) for size in ((M, K), (M, N), (1, N)))
        exact = values.double()

        def equal(result: Tensor, truth: Tensor) -> bool:
            return torch.equal(result.double(), truth)

        forward = triton_products.forward(x, values, pattern, bias[0])
        grad_input = triton_products.grad_input(grad, values, pattern)
        double_pruned = triton_products.grad_input(grad, values, pattern, columns)
        grad_weight = triton_products.grad_weight(grad, x, pattern)
        expanded = triton_products.expand(values, pattern)
        dense = reference.expand(exact, pattern, 2, 4)
        compressed = triton_products.compress(dense.to(dtype), pattern)
        picked, picked_pattern = triton_products.compress_columns(values, pattern)
        truth, true_pattern = reference.compress_columns(exact, pattern, 2, 4)
        again = triton_products.recompress_columns(values, pattern, columns)
        dy, inputs = grad.double(), x.double()
        return {
            "forward": equal(forward, reference.forward(inputs, exact, pattern, bias[0].double(), 2, 4)),
            "grad_input": equal(grad_input, reference.grad_input(dy, exact, pattern, 2, 4)),
            "grad_input_columns": equal(
                double_pruned, reference.grad_input_columns(dy, exact, pattern, columns, 2, 4)
            ),
            "grad_weight": equal(grad_weight, reference.grad_weight(dy, inputs, pattern, 2, 4)),
            "expand": equal(expanded, dense),
            "compress": equal(compressed, exact),
            "compress_columns": equal(picked, truth) and torch.equal(picked_pattern, true_pattern),
            "recompress_columns": equal(again, reference.recompress_columns(exact, pattern, columns, 2, 4)),
        }


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
