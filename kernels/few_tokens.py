"""Products of up to eight tokens, called with tensors: 2:4, bfloat16 and float16, CUDA devices.

Reading the weight is their bottleneck.  This module does not decide when to use them; the kernel is in
``gluon_few_tokens``.  As on the sparse tensor cores, an entry of ``x`` that meets only pruned weights never enters a
sum, even if it is infinite or NaN.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import torch
from torch import Tensor

from slope_compile.kernels.gluon_products import DTYPES, in_pieces, words
from slope_compile.kernels.launching import Kernels, device_of

MOST = 8
"""Most tokens."""
OLDEST = (8, 0)
"""Oldest compute capability."""


@dataclasses.dataclass(frozen=True)
class FewTokens:
    """How a program's work is divided; each number is a power of two."""

    ROWS: int
    """Outputs per program."""
    EACH: int
    """Groups of four features that a lane reads at a time: 4 or 8."""
    WN: int
    """Warps along outputs."""
    WK: int
    """Warps along features."""

    def __str__(self) -> str:
        return f"few_{self.ROWS}_e{self.EACH}_w{self.WN}x{self.WK}"

    @property
    def warps(self) -> int:
        return self.WN * self.WK


CONFIGS: dict[int, tuple[FewTokens, ...]] = {
    1: (FewTokens(4, 8, 1, 4), FewTokens(4, 4, 1, 4)),
    2: (FewTokens(4, 8, 1, 4), FewTokens(4, 4, 1, 4)),
    4: (FewTokens(2, 8, 1, 4), FewTokens(4, 4, 1, 4)),
    8: (FewTokens(2, 4, 1, 4),),
}
"""Tokens, rounded up to a power of two -> configurations, the default first.  The last has EACH = 4 and supports any
K that is a multiple of 16."""


def unsupported(capability: tuple[int, int], dtype: torch.dtype, M: int, K: int) -> str | None:
    """The reason why a product cannot be computed here; None if it can."""
    if dtype not in DTYPES:
        return f"it multiplies bfloat16 and float16, not {dtype}"
    if capability < OLDEST:
        return f"it needs compute capability {OLDEST}, not {capability}"
    if not 0 < M <= MOST:
        return f"it takes up to {MOST} tokens, not {M}"
    if K % 16 or not K:
        return f"K = {K} is no positive multiple of 16, so that rows of a pattern are no whole words"
    return None


def configurations(M: int, K: int) -> tuple[FewTokens, ...]:
    """Configurations for M tokens whose word size divides a row."""
    return tuple(c for c in CONFIGS[_tokens(M)] if K % (4 * c.EACH) == 0)


@functools.cache
def _kernels() -> Any:
    from slope_compile.kernels import gluon_few_tokens

    return Kernels(gluon_few_tokens)


def forward(
    x: Tensor,
    values: Tensor,
    pattern: Tensor,
    bias: Tensor | None = None,
    config: FewTokens | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """``Y = X W^T + bias``: x ``[..., K]`` of 1 to 8 tokens -> contiguous ``[..., N]``; sums are float32.

    Args:
        x: any layout; copied if its features are not contiguous or a token does not begin at a multiple of 8 bytes.
        values: ``[N, K / 2]``, K a multiple of 16, see ``metadata``.
        pattern: uint8 ``[N, K / 8]``.
        config: how the work is divided; the first of :func:`configurations` if None.
        out: a contiguous tensor for the result, with its shape and dtype.
    """
    N, K = values.shape[0], values.shape[1] * 2
    y = x.new_empty(*x.shape[:-1], N) if out is None else out
    M = math.prod(x.shape[:-1])
    if M * N == 0:
        return y
    config = config or configurations(M, K)[0]
    groups, kept = words(x.reshape(M, K), torch.int64), words(values.contiguous(), torch.int32)
    codes = in_pieces(pattern, config.EACH // 2)
    with device_of(x):
        _kernels().forward[(-(-N // config.ROWS),)](
            groups, kept, codes, y if bias is None else bias.contiguous(), y,
            M, N, K // 4, groups.stride(0), codes.stride(0),
            TOKENS=_tokens(M), ROWS=config.ROWS, EACH=config.EACH, WN=config.WN, WK=config.WK,
            FP16=x.dtype is torch.float16, HAS_BIAS=bias is not None, num_warps=config.warps,
        )  # fmt: skip
    return y


def _tokens(M: int) -> int:
    return 1 << (M - 1).bit_length()
