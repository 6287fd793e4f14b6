"""The tile configurations of the Gluon kernels and the defaults of a launch.

As with ``triton_configs``, the tests compile every configuration for every supported architecture and reject one that
spills registers, needs more shared memory than the architecture has, or does not run on the sparse tensor cores.
"""

from __future__ import annotations

import dataclasses
import functools
import math


@dataclasses.dataclass(frozen=True)
class MmaSp:
    """The tile of ``Y`` that a program computes, in instructions of 16 outputs by 8 tokens.

    MT, WN, NT and WM are powers of two.
    """

    MT: int
    """Instructions of a warp along out_features."""
    WN: int
    """Warps along out_features."""
    NT: int
    """Instructions of a warp along tokens."""
    WM: int
    """Warps along tokens."""
    stages: int
    """Number of blocks of 64 in_features held in shared memory; 3 or more."""
    registers: int | None = None
    """Register limit per thread; None lets ptxas choose.  Some releases of ptxas then spill registers to fit as many
    programs on a multiprocessor as shared memory allows."""

    def __str__(self) -> str:
        return f"mma_sp_{self.BM}x{self.BN}_w{self.WM}x{self.WN}"

    @property
    def BM(self) -> int:
        """Tokens per program."""
        return 8 * self.NT * self.WM

    @property
    def BN(self) -> int:
        """Outputs per program."""
        return 16 * self.MT * self.WN

    @property
    def warps(self) -> int:
        return self.WN * self.WM


@dataclasses.dataclass(frozen=True)
class WgmmaSp:
    """The tile of ``Y`` that a program computes; MT, WN and NT are powers of two."""

    MT: int
    """Instructions of a group of four warps along out_features, 64 outputs each."""
    WN: int
    """Warps, all along out_features: 4 or 8."""
    NT: int
    """Tokens of an instruction divided by 8, at most 32.  The tile must have at least half as many tokens as outputs:
    only then does the compiler place the ring of tokens where the assembly expects it (``gluon_builds``)."""
    stages: int
    """Number of blocks of 64 in_features held in shared memory; 3 or more."""
    staged: bool = True
    """Whether the pattern goes through shared memory too if K is a multiple of 64.  Otherwise each thread loads it."""

    def __str__(self) -> str:
        return f"wgmma_sp_{self.BM}x{self.BN}_w{self.WN}"

    @property
    def BM(self) -> int:
        """Tokens per program."""
        return 8 * self.NT

    @property
    def BN(self) -> int:
        """Outputs per program."""
        return 16 * self.MT * self.WN

    @property
    def warps(self) -> int:
        return self.WN

    @property
    def largest_rank(self) -> int:
        """Largest rank of a low-rank update, all of which must fit in the stages."""
        return 64 * self.stages


Config = MmaSp | WgmmaSp

FEW_TOKENS = 16
"""Tiles of ``mma.sp`` with up to this many tokens are candidates for any product."""

SPLIT_TOKENS = 64
"""Up to this many tokens there are so few programs that ``mma.sp`` splits the sum of each output between several."""

MMA_SP = (
    MmaSp(1, 4, 1, 1, 6),
    MmaSp(2, 4, 1, 1, 6),
    MmaSp(1, 4, 2, 1, 6),
    MmaSp(2, 4, 2, 1, 6),
    MmaSp(2, 4, 4, 1, 4),
    MmaSp(2, 2, 4, 2, 5, registers=255),
    MmaSp(2, 4, 8, 1, 4, registers=255),
    MmaSp(2, 4, 8, 2, 3),  # 4 stages would need more shared memory than sm_120 has
)
"""For bfloat16 and float16, sorted by the number of tokens that each is meant for."""


WGMMA_SP = (
    WgmmaSp(1, 4, 8, 8),
    WgmmaSp(2, 4, 8, 6),
    WgmmaSp(2, 4, 16, 4),
    WgmmaSp(1, 8, 32, 4, staged=False),
)
"""For bfloat16 and float16, sorted by the number of tokens that each is meant for."""

_LAUNCH = 2.5
"""Microseconds that the kernel that adds up parts takes beside reading them: an assumption, not measured."""

_PARTS = 2e6
"""Bytes of parts that are written and read again in a microsecond: an assumption, not measured."""


def default(M: int) -> MmaSp:
    """The configuration used without tuning: the first whose tile holds M tokens, else the last."""
    return next((config for config in MMA_SP if config.BM >= M), MMA_SP[-1])


@functools.lru_cache(maxsize=1024)
def default_wgmma(M: int, N: int, K: int, processors: int) -> WgmmaSp:
    """The configuration used without tuning: the one with the lowest estimated time.

    On a tie the larger tile wins, because it reads less.
    """
    return min(reversed(WGMMA_SP), key=lambda config: _best(M, N, K, config, processors)[0])


def splits(M: int, N: int, K: int, config: Config, processors: int) -> int:
    """The number of programs that share the sum of an output, each with at least 8 blocks of 64 in_features.

    For ``mma.sp`` and few tokens, enough for two programs on each processor.  For ``wgmma.sp``, the number with the
    lowest estimated time.
    """
    if isinstance(config, WgmmaSp):
        return _best(M, N, K, config, processors)[1]
    if M > SPLIT_TOKENS:
        return 1
    return max(1, min(2 * processors // _tiles(M, N, config), -(-K // 64) // 8))


@functools.lru_cache(maxsize=1024)
def _best(M: int, N: int, K: int, config: WgmmaSp, processors: int) -> tuple[float, int]:
    """The lowest estimate of a product's time in microseconds, and its number of splits."""
    most = min(2 * processors // _tiles(M, N, config), -(-K // 64) // 8)
    return min((_estimate(M, N, K, config, splits, processors), splits) for splits in range(1, max(1, most) + 1))


def _estimate(M: int, N: int, K: int, config: WgmmaSp, splits: int, processors: int) -> float:
    """Estimated time of a product in microseconds.

    The programs of a processor take the longer of two times: the sum of their work, or the latency of one program.
    Adding up the parts of splits is extra.  The times of a block of 64 in_features, in sequence and alone, were fitted
    to measurements in bfloat16 on an H200 with 64 to 16384 tokens.
    """
    programs = math.ceil(_tiles(M, N, config) * splits / processors)
    blocks = 2 * math.ceil(math.ceil(K / 128) / splits)
    block: float = 0.00155 * (config.BM * config.BN) ** 0.57
    time = blocks * max(block + 0.05, programs * block)
    return time if splits == 1 else time + _LAUNCH + splits * M * N * 8 / _PARTS


def _tiles(M: int, N: int, config: Config) -> int:
    return -(-M // config.BM) * -(-N // config.BN)
