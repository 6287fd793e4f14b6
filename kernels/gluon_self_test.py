"""Self-test of a Gluon kernel on a device, run before the kernel is used there.

Inputs are -1, 0 and 1: every float32 sum is exact, so the rounded result must be right to the last bit.  Each of the
six patterns of a group occurs in every register of every lane.  A second run has rows of zeros, an infinity and a NaN
among the weights; the last two must reach their own outputs and no others.  The fragments and descriptors in the
assembly were derived from manuals.  On a device that interprets them differently the test fails, and the kernel is not
chosen.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slope_compile.kernels import gluon_products, reference
from slope_compile.kernels.gluon_configs import Config, MmaSp
from slope_compile.kernels.gpu_self_test import _mask, _numbers, equal, unusual
from slope_compile.kernels.metadata import pack_mask
from slope_compile.log import log

Sizes = tuple[int, int, int, int, int]
"""M, N, K, R (0: no low-rank update) and splits."""

MMA_SP_SIZES: tuple[Sizes, ...] = (
    (37, 76, 140, 0, 1), (37, 76, 140, 0, 2), (40, 80, 192, 24, 1), (40, 80, 192, 5, 3), (1, 80, 192, 0, 1),
)  # fmt: skip
"""They cover a pattern read by the byte and through shared memory, whole and split sums, products with and without a
low-rank update, and a single token."""


def case(config: Config, bias: bool, low_rank: bool, N: int) -> tuple[Config, bool, bool, bool]:
    """The arguments of :func:`passes`, after device and dtype, for a product with N outputs.

    Products that are tested alike have the same arguments: those of ``mma.sp``, whatever their N and low-rank update.
    """
    if isinstance(config, MmaSp):
        return config, bias, True, True
    return config, bias, low_rank, N % 8 == 0


def passes(
    device: torch.device,
    dtype: torch.dtype,
    config: Config,
    bias: bool = True,
    low_rank: bool = True,
    in_eights: bool = True,
) -> bool:
    """Whether a kernel gives right results in this configuration.  Wrong results and failed builds are logged.

    Args:
        bias, low_rank: whether the product has a bias or a low-rank update.  ``low_rank`` does not matter for
            ``mma.sp``, which is tested with and without.
        in_eights: whether out_features are a multiple of 8; ``mma.sp`` is tested with both.
    """
    try:
        sizes = MMA_SP_SIZES if isinstance(config, MmaSp) else _wgmma_sp_sizes(config, low_rank, in_eights)
        wrong = [size for size in sizes if not _right(device, dtype, config, bias, *size)]
    except Exception as error:  # compilers and drivers raise many types
        log.warning("the kernel %s does not run on %s in %s and is not used: %s", config, device, dtype, error)
        return False
    if wrong:
        log.warning(
            "the kernel %s is wrong on %s in %s for (M, N, K, R, splits) %s and is not used",
            config, device, dtype, ", ".join(map(str, wrong)),
        )  # fmt: skip
    return not wrong


def _wgmma_sp_sizes(config: Config, low_rank: bool, in_eights: bool) -> tuple[Sizes, ...]:
    """Sizes that cover the kernel: a part of one tile; four tiles, three of them partial, with every stage used twice
    and K no multiple of 128; and split sums, with the pattern staged and not staged.
    """
    narrow = 0 if in_eights else 3
    R = 72 if low_rank else 0
    return (
        (13, 40 + narrow, 144, R, 1),
        (config.BM + 9, config.BN + 24 + narrow, 128 * config.stages + 64, R, 1),
        (13, 80 + narrow, 448, R, 2),
        (13, 40 + narrow, 144, R, 2),
    )


def _right(
    device: torch.device, dtype: torch.dtype, config: Config, has_bias: bool,
    M: int, N: int, K: int, R: int, splits: int,
) -> bool:  # fmt: skip
    with torch.no_grad(), torch.inference_mode(False):
        pattern = pack_mask(_mask(N, K)).to(device)
        sizes = ((N, K // 2, 7), (M, K, 5), (M, R, 7), (N, R, 5), (1, N, 5))
        values, x, t, b, bias = (_numbers(*size).to(device, dtype) for size in sizes)
        given, low_rank = bias[0] if has_bias else None, (t, b) if R else None
        update = t.double() @ b.double().t() + (bias[0].double() if has_bias else 0)

        def right(kept: Tensor) -> bool:
            # Freed at once: the result reuses this memory, so that entries left unwritten are NaN, not an old result.
            torch.full((M, N), torch.nan, device=device, dtype=dtype)
            if isinstance(config, MmaSp):
                result = gluon_products.mma_sp(x, kept, pattern, given, low_rank, config, splits)
            else:
                result = gluon_products.wgmma_sp(x, kept, pattern, given, low_rank, config, splits)
            return equal(result, reference.forward(x.double(), kept.double(), pattern, None, 2, 4) + update)

        return right(values) and right(unusual(values))
