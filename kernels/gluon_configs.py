"""The tile configurations of the Gluon kernels, and which one a launch takes by default.

As with ``triton_configs``, the tests compile every configuration for every supported architecture and refuse one that
spills registers, needs more shared memory than the architecture has, or does not run on the sparse tensor cores.
"""

from __future__ import annotations

import dataclasses


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
    """Tokens of an instruction in eights: up to 32."""
    stages: int
    """Blocks of 64 in_features in shared memory at a time; 3 or more."""

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
"""Up to here there are so few programs that each output's sum is split between several of them."""

MMA_SP = (
    MmaSp(1, 4, 1, 1, 6),
    MmaSp(2, 4, 1, 1, 6),
    MmaSp(1, 4, 2, 1, 6),
    MmaSp(2, 4, 2, 1, 6),
    MmaSp(2, 4, 4, 1, 4),
    MmaSp(2, 2, 4, 2, 4),
    MmaSp(2, 4, 8, 1, 4),
    MmaSp(2, 4, 8, 2, 4),
)
"""bfloat16 and float16; in the order of the tokens they are meant for."""


WGMMA_SP = (
    WgmmaSp(2, 4, 8, 6),
    WgmmaSp(2, 4, 16, 4),
    WgmmaSp(1, 8, 32, 4),
    WgmmaSp(2, 8, 16, 6),
)
"""bfloat16 and float16; in the order of the tokens they are meant for."""


def default(M: int) -> MmaSp:
    """The configuration taken without tuning: the first that holds M tokens in one tile, else the last."""
    return next((config for config in MMA_SP if config.BM >= M), MMA_SP[-1])


def default_wgmma(M: int) -> WgmmaSp:
    """Likewise."""
    return next((config for config in WGMMA_SP if config.BM >= M), WGMMA_SP[-1])


def splits(M: int, N: int, K: int, config: MmaSp, processors: int) -> int:
    """Over how many programs the sum of an output is split: an assumption, not measured.

    Only where the tokens fit one tile of few, and so that two programs a processor have something to read, each
    at least 8 blocks of 64 in_features.
    """
    if M > FEW_TOKENS:
        return 1
    programs = -(-M // config.BM) * -(-N // config.BN)
    return max(1, min(2 * processors // programs, -(-K // 64) // 8))
