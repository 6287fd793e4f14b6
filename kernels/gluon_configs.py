"""The tile configurations of the Gluon kernels, and which one a launch takes by default.

As with ``triton_configs``, the tests compile every configuration for every supported architecture and refuse one that
spills registers, needs more shared memory than the architecture has, or does not run on the sparse tensor cores.
"""

from __future__ import annotations

import dataclasses
import functools
import math


@dataclasses.dataclass(frozen=True)
class MmaSp:
    """A program's share of ``Y``, in instructions of 16 outputs by 8 tokens; each number is a power of two."""

    MT: int
    """Instructions of a warp along out_features."""
    WN: int
    """Warps along out_features."""
    NT: int
    """Instructions of a warp along tokens."""
    WM: int
    """Warps along tokens."""
    stages: int
    """Blocks of 64 in_features in shared memory at a time; 3 or more."""
    registers: int | None = None
    """Most of a thread.  Without a number ptxas aims at as many programs a multiprocessor as shared memory allows, and
    in some of its releases spills for their sake."""

    def __str__(self) -> str:
        return f"mma_sp_{self.BM}x{self.BN}_w{self.WM}x{self.WN}"

    @property
    def BM(self) -> int:
        """Tokens of a program."""
        return 8 * self.NT * self.WM

    @property
    def BN(self) -> int:
        """Outputs of a program."""
        return 16 * self.MT * self.WN

    @property
    def warps(self) -> int:
        return self.WN * self.WM


@dataclasses.dataclass(frozen=True)
class WgmmaSp:
    """A program's share of ``Y``; each number but the last is a power of two."""

    MT: int
    """Instructions of a group of four warps along out_features, of 64 each."""
    WN: int
    """Warps, all along out_features: 4 or 8."""
    NT: int
    """Tokens of an instruction in eights: up to 32.  The tile has at least half as many tokens as outputs, so that the
    compiler puts the larger ring, that of tokens, where the assembly looks for it (``gluon_builds``)."""
    stages: int
    """Blocks of 64 in_features in shared memory at a time; 3 or more."""
    staged: bool = True
    """Whether the pattern comes through shared memory as well, where K is a multiple of 64; else threads load it."""

    def __str__(self) -> str:
        return f"wgmma_sp_{self.BM}x{self.BN}_w{self.WN}"

    @property
    def BM(self) -> int:
        """Tokens of a program."""
        return 8 * self.NT

    @property
    def BN(self) -> int:
        """Outputs of a program."""
        return 16 * self.MT * self.WN

    @property
    def warps(self) -> int:
        return self.WN

    @property
    def largest_rank(self) -> int:
        """Of a low-rank update, which goes through the same stages."""
        return 64 * self.stages


Config = MmaSp | WgmmaSp

FEW_TOKENS = 16
"""What the configurations of ``mma.sp`` for the fewest tokens hold."""

SPLIT_TOKENS = 64
"""Up to here there are so few programs that ``mma.sp`` splits each output's sum between several of them."""

MMA_SP = (
    MmaSp(1, 4, 1, 1, 6),
    MmaSp(2, 4, 1, 1, 6),
    MmaSp(1, 4, 2, 1, 6),
    MmaSp(2, 4, 2, 1, 6),
    MmaSp(2, 4, 4, 1, 4),
    MmaSp(2, 2, 4, 2, 5, registers=255),
    MmaSp(2, 4, 8, 1, 4, registers=255),
    MmaSp(2, 4, 8, 2, 3),  # 4 stages are more shared memory than sm_120 has
)
"""bfloat16 and float16; in the order of the tokens they are meant for."""


WGMMA_SP = (
    WgmmaSp(1, 4, 8, 8),
    WgmmaSp(2, 4, 8, 6),
    WgmmaSp(2, 4, 16, 4),
    WgmmaSp(1, 8, 32, 4, staged=False),
)
"""bfloat16 and float16; in the order of the tokens they are meant for."""

_LAUNCH = 2.5
"""Microseconds of the kernel that adds up parts, beside reading them: an assumption, not measured."""

_PARTS = 2e6
"""Bytes of parts that are written and read again in a microsecond: likewise."""


def default(M: int) -> MmaSp:
    """The configuration taken without tuning: the first that holds M tokens in one tile, else the last."""
    return next((config for config in MMA_SP if config.BM >= M), MMA_SP[-1])


@functools.lru_cache(maxsize=1024)
def default_wgmma(M: int, N: int, K: int, processors: int) -> WgmmaSp:
    """Likewise: the one with the lowest estimate; of equal ones that with the larger tile, which reads less."""
    return min(reversed(WGMMA_SP), key=lambda config: _best(M, N, K, config, processors)[0])


def splits(M: int, N: int, K: int, config: Config, processors: int) -> int:
    """Over how many programs the sum of an output is split, each with at least 8 blocks of 64 in_features.

    ``mma.sp``: so that two programs a processor have something to read, where there are few tokens.  ``wgmma.sp``: as
    many as the estimate is lowest with.
    """
    if isinstance(config, WgmmaSp):
        return _best(M, N, K, config, processors)[1]
    if M > SPLIT_TOKENS:
        return 1
    return max(1, min(2 * processors // _tiles(M, N, config), -(-K // 64) // 8))


@functools.lru_cache(maxsize=1024)
def _best(M: int, N: int, K: int, config: WgmmaSp, processors: int) -> tuple[float, int]:
    """The lowest estimate of a product's time in microseconds, and with how many splits."""
    most = min(2 * processors // _tiles(M, N, config), -(-K // 64) // 8)
    return min((_estimate(M, N, K, config, splits, processors), splits) for splits in range(1, max(1, most) + 1))


def _estimate(M: int, N: int, K: int, config: WgmmaSp, splits: int, processors: int) -> float:
    """Programs of a processor one after the other, or all in the time of one, whichever is longer; and the parts.

    What a block of 64 in_features takes a processor, alone and among others, was fitted to times in bfloat16 on an
    H200, with 64 to 16384 tokens.
    """
    programs = math.ceil(_tiles(M, N, config) * splits / processors)
    blocks = 2 * math.ceil(math.ceil(K / 128) / splits)
    block: float = 0.00155 * (config.BM * config.BN) ** 0.57
    time = blocks * max(block + 0.05, programs * block)
    return time if splits == 1 else time + _LAUNCH + splits * M * N * 8 / _PARTS


def _tiles(M: int, N: int, config: Config) -> int:
    return -(-M // config.BM) * -(-N // config.BN)
