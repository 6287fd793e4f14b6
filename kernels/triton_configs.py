"""The tile configurations of the Triton kernels, and which one a launch takes by default.

An autotuner may pick any configuration of a kernel's list: the tests compile each of them for every supported
architecture and refuse one that spills registers or needs more shared memory than the architecture has.
"""

from __future__ import annotations

import dataclasses

import torch


@dataclasses.dataclass(frozen=True)
class Config:
    """Tile sizes along tokens, out_features and in_features; BK is a multiple of 8, each a power of two from 16 on."""

    BM: int
    BN: int
    BK: int
    warps: int
    stages: int
    aligned_only: bool = False
    """For sizes that are multiples of the vectors of a load only: with element-wise loads it runs out of registers."""


FEW_TOKENS = 32
"""Up to here one tile of 16 or 32 rows holds all tokens and the product is bound by reading the weight."""

HALF = {
    "forward": (
        Config(16, 64, 128, 4, 4),
        Config(32, 64, 64, 4, 4),
        Config(64, 64, 64, 8, 3),
        Config(128, 64, 64, 8, 3, aligned_only=True),
    ),
    "grad_input": (
        Config(16, 64, 64, 4, 4),
        Config(32, 64, 32, 4, 3),
        Config(64, 64, 64, 8, 3),
        Config(128, 64, 64, 8, 3, aligned_only=True),
    ),
    "grad_weight": (
        Config(32, 64, 64, 4, 3),
        Config(64, 64, 128, 8, 3),
        Config(32, 128, 128, 8, 3),
    ),
    "expand": (Config(0, 32, 128, 4, 1),),
}
"""bfloat16 and float16; in the order of the tokens they are meant for."""

SINGLE = {
    "forward": (
        Config(16, 32, 32, 4, 2),
        Config(32, 32, 32, 4, 2, aligned_only=True),
        Config(64, 64, 32, 8, 2, aligned_only=True),
    ),
    "grad_input": (
        Config(16, 32, 32, 4, 2),
        Config(32, 32, 32, 4, 2),
        Config(64, 32, 64, 8, 2, aligned_only=True),
    ),
    "grad_weight": (Config(16, 32, 32, 4, 2), Config(32, 64, 64, 8, 2)),
    "expand": (Config(0, 32, 64, 4, 1),),
}
"""float32."""


def configurations(kernel: str, dtype: torch.dtype, aligned: bool = True) -> tuple[Config, ...]:
    """The configurations of "forward", "grad_input", "grad_weight" or "expand" for a dtype."""
    choices = (SINGLE if dtype is torch.float32 else HALF)[kernel]
    return choices if aligned else tuple(config for config in choices if not config.aligned_only)


def default(kernel: str, M: int, dtype: torch.dtype, aligned: bool = True) -> Config:
    """The configuration taken without tuning: the smallest tile of tokens that holds M, else the largest."""
    choices = configurations(kernel, dtype, aligned)
    if kernel in ("grad_weight", "expand"):
        return choices[0] if M <= FEW_TOKENS else choices[-1]
    return next((config for config in choices if config.BM >= M), choices[-1])
