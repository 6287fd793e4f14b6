"""Whether a Gluon kernel can be trusted on a device: it is run there on numbers with one answer before anything else.

Inputs are -1, 0 and 1, so that every float32 sum is exact and the rounded result must be equal to the last bit.  Each
of the six patterns of a group comes to lie in every register of every lane.  A second time there are rows of zeros, an
infinity and a NaN among the weights, which must arrive in their outputs and nowhere else.  The fragments and
descriptors in the assembly were derived from manuals; a device that reads them otherwise is noticed here, and the
kernel is not chosen.
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
"""Both ways to read a pattern, whole and split, with a low-rank update and without, and a single token."""


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
    """Whether a kernel is right in this configuration; where it is not, or does not build, the log says so.

    Args:
        bias, low_rank: whether the product is to have them; ``mma.sp`` is tested with both and without.
        in_eights: whether its out_features are a multiple of 8; ``mma.sp`` is tested with both.
    """
    try:
        sizes = MMA_SP_SIZES if isinstance(config, MmaSp) else _wgmma_sp_sizes(config, low_rank, in_eights)
        wrong = [size for size in sizes if not _right(device, dtype, config, bias, *size)]
    except Exception as error:  # Whatever a compiler or a driver raises.
        log.warning("the kernel %s does not run on %s in %s and is not used: %s", config, device, dtype, error)
        return False
    if wrong:
        log.warning(
            "the kernel %s is wrong on %s in %s for (M, N, K, R, splits) %s and is not used",
            config, device, dtype, ", ".join(map(str, wrong)),
        )  # fmt: skip
    return not wrong


def _wgmma_sp_sizes(config: Config, low_rank: bool, in_eights: bool) -> tuple[Sizes, ...]:
    """A part of one tile; four tiles, of which three are partial, and each stage used twice, with a rest of K; and
    sums of several programs, the pattern staged as before and not.
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
            # Freed at once, so that a result that nobody writes is this rather than the one of the run before.
            torch.full((M, N), torch.nan, device=device, dtype=dtype)
            if isinstance(config, MmaSp):
                result = gluon_products.mma_sp(x, kept, pattern, given, low_rank, config, splits)
            else:
                result = gluon_products.wgmma_sp(x, kept, pattern, given, low_rank, config, splits)
            return equal(result, reference.forward(x.double(), kept.double(), pattern, None, 2, 4) + update)

        return right(values) and right(unusual(values))
