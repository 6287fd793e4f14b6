"""The tile configurations of the Triton kernels and the defaults of a launch.

An autotuner may pick any configuration of a kernel's list.  The tests compile each of them for every supported
architecture and reject one that spills registers or needs more shared memory than the architecture has.
"""

from __future__ import annotations

import dataclasses

import torch


@dataclasses.dataclass(frozen=True)
class Config:
    """Tile sizes along tokens (BM), out_features (BN) and in_features (BK): powers of two, 16 or more.

    BM is 0 where a kernel does not depend on the token count.
    """

    BM: int
    BN: int
    BK: int
    warps: int
    stages: int
    aligned_only: bool = False
    """Only for sizes divisible by the load's vector width: with element-wise loads the kernel runs out of registers."""
    archs: tuple[int, ...] = ()
    """Compute capabilities (90 for 9.0) whose registers, shared memory and compiler suffice; empty for all."""


CONVERSIONS = ("expand", "compress", "compress_columns", "pick_columns")
"""Kernels that do not depend on the token count."""

FEW_TOKENS = 32
"""Up to this many tokens one tile of 16 or 32 rows holds all tokens, and reading the weight is the bottleneck."""

HALF = {
    "forward": (
        Config(16, 64, 128, 4, 4),
        Config(32, 64, 64, 4, 4),
        Config(64, 64, 64, 8, 3),
        Config(128, 64, 64, 8, 3, aligned_only=True),
        Config(128, 128, 64, 8, 3, aligned_only=True),
        Config(256, 128, 64, 8, 3, aligned_only=True, archs=(90, 100)),
    ),
    "grad_input": (
        Config(16, 64, 64, 4, 4),
        Config(32, 64, 32, 4, 3),
        Config(64, 64, 64, 8, 3),
        Config(128, 64, 64, 8, 3, aligned_only=True, archs=(80, 90, 100)),
        Config(128, 64, 128, 8, 3, aligned_only=True),
    ),
    "grad_weight": (
        Config(32, 64, 64, 8, 3),
        Config(64, 64, 128, 8, 3),
        Config(32, 128, 128, 8, 3),
        Config(64, 128, 128, 8, 3, aligned_only=True),
        Config(64, 128, 256, 8, 3, aligned_only=True, archs=(90, 100)),
    ),
    "expand": (Config(0, 32, 128, 4, 1),),
    "compress": (Config(0, 32, 128, 4, 1),),
    "compress_columns": (Config(0, 64, 64, 4, 1),),
    "pick_columns": (Config(0, 32, 128, 4, 1),),
}
"""For bfloat16 and float16, sorted by the number of tokens that each is meant for."""

SINGLE = {
    "forward": (
        Config(16, 32, 32, 4, 2),
        Config(32, 32, 32, 4, 2, aligned_only=True),
        Config(64, 64, 32, 8, 2, aligned_only=True),
    ),
    "grad_input": (
        Config(16, 32, 32, 4, 2),
        Config(32, 32, 32, 4, 2),
        Config(64, 32, 64, 8, 2, aligned_only=True, archs=(80, 90)),
    ),
    "grad_weight": (Config(16, 32, 32, 4, 2), Config(32, 64, 64, 8, 2)),
    "expand": (Config(0, 32, 64, 4, 1),),
    "compress": (Config(0, 32, 64, 4, 1),),
    "compress_columns": (Config(0, 32, 32, 4, 1),),
    "pick_columns": (Config(0, 32, 64, 4, 1),),
}
"""For float32, sorted likewise."""


def configurations(
    kernel: str, dtype: torch.dtype, aligned: bool = True, arch: int | None = None
) -> tuple[Config, ...]:
    """The configurations of a kernel for a dtype: "forward", "grad_input", "grad_weight", or one of CONVERSIONS.

    Args:
        arch: compute capability (90 for 9.0).  If None, configurations for particular capabilities are left out.
    """
    choices = (SINGLE if dtype is torch.float32 else HALF)[kernel]
    return tuple(
        config
        for config in choices
        if (aligned or not config.aligned_only) and (not config.archs or arch in config.archs)
    )


def default(kernel: str, M: int, dtype: torch.dtype, aligned: bool = True, arch: int | None = None) -> Config:
    """The configuration used without tuning: the first whose tile holds M tokens, else the last.

    Weight gradients and CONVERSIONS use the first for few tokens, else the last.
    """
    choices = configurations(kernel, dtype, aligned, arch)
    if kernel in ("grad_weight", *CONVERSIONS):
        return choices[0] if M <= FEW_TOKENS else choices[-1]
    return next((config for config in choices if config.BM >= M), choices[-1])
