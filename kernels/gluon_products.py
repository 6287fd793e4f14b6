"""Products on the 2:4 sparse tensor cores, called with tensors: 2:4, bfloat16 and float16, CUDA devices.

This module does not decide when to use them.  ``gluon_choices`` lists the configurations that give right results on a
device, for measurements, and ``gpu_rules`` uses one where a table of measurements recommends it.

Both kernels compute ``Y = X W^T + T B^T + bias`` from the stored weights.  An input gradient has the same form: pass
dY with the transposed double-pruned weight.

An entry of ``x`` that meets only pruned weights is never read.  If it is infinite or NaN, a dense product gives NaN and
these products do not.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from slope_compile.kernels import gluon_builds, gluon_configs
from slope_compile.kernels.gluon_configs import MmaSp, WgmmaSp
from slope_compile.kernels.launching import Kernels, device_of

DTYPES = (torch.bfloat16, torch.float16)
_LARGEST_ROW = 1 << 24
"""Largest distance of two rows in elements (exclusive): offsets within a tile of up to 256 rows have 32 bits."""


@functools.cache
def _kernels() -> Any:
    from slope_compile.kernels import gluon_mma_sp

    return Kernels(gluon_mma_sp)


@functools.cache
def _wgmma_kernels() -> Any:
    from slope_compile.kernels import gluon_wgmma_sp

    return Kernels(gluon_wgmma_sp)


def unsupported(
    kernel: str, capability: tuple[int, int], dtype: torch.dtype, M: int, N: int, K: int, R: int = 0
) -> str | None:
    """The reason why a kernel cannot compute a product; None if it can.

    Args:
        kernel: "mma_sp" or "wgmma_sp".
        capability: compute capability of the device.
        R: rank of the low-rank update; 0 if there is none.
    """
    if dtype not in DTYPES:
        return f"the sparse tensor cores multiply bfloat16 and float16, not {dtype}"
    if K % 4 or K >= _LARGEST_ROW:
        return f"K = {K} is no multiple of 4 below {_LARGEST_ROW}"
    if kernel == "mma_sp":
        return None if capability >= (8, 0) else f"mma.sp needs compute capability 8.0, not {capability}"
    if capability != (9, 0):
        return f"wgmma.sp is an instruction of compute capability 9.0, not {capability}"
    if K % 16:
        return f"K = {K} is no multiple of 16, so that rows do not begin where the TMA can read them"
    largest = max(config.largest_rank for config in gluon_configs.WGMMA_SP)
    return None if largest >= R else f"a rank of {R} is above {largest}"


def mma_sp(
    x: Tensor,
    values: Tensor,
    pattern: Tensor,
    bias: Tensor | None = None,
    low_rank: tuple[Tensor, Tensor] | None = None,
    config: MmaSp | None = None,
    splits: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """``Y = X W^T + T B^T + bias`` by ``mma.sp``, sm_80 and later: x ``[..., K]`` -> contiguous ``[..., N]``.

    Sums are float32.

    Args:
        x: any layout; copied if its features are not contiguous or a token does not begin at a multiple of 4 bytes.
        values: ``[N, K / 2]``, see ``metadata``.
        pattern: uint8 ``[N, ceil(K / 8)]``.
        low_rank: ``(T [..., R], B [N, R])``, for an adapter ``T = X A^T``.
        config: tile sizes; :func:`gluon_configs.default` if None.
        splits: number of programs that share the sum of an output; :func:`gluon_configs.splits` if None.  Their
            float32 parts are added up in a fixed order.
        out: a contiguous tensor for the result, with its shape and dtype.
    """
    N, K = values.shape[0], values.shape[1] * 2
    y = x.new_empty(*x.shape[:-1], N) if out is None else out
    M = math.prod(x.shape[:-1])
    if M * N == 0:
        return y
    if K == 0:
        return _without_weights(y, bias, low_rank)
    rows, kept = words(x.reshape(M, K), torch.int32), words(values.contiguous(), torch.int32)
    t, b, R = _low_rank(low_rank, M, kept, 4)
    piece = 8 if K % 64 == 0 else 2 if K % 16 == 0 else 1
    pattern = in_pieces(pattern, piece)
    config = config or gluon_configs.default(M)
    if splits is None:
        splits = gluon_configs.splits(M, N, K, config, processors(x.device))
    per_split, splits = _divided(-(-K // 64), splits)
    parts = y if splits == 1 else x.new_empty(splits, M, N, dtype=torch.float32)
    given = y if bias is None else bias.contiguous()
    tiles = -(-M // config.BM) * -(-N // config.BN)
    with device_of(x):
        _kernels().forward[(tiles, splits)](
            rows, kept, pattern, t, b, given, parts,
            M, N, K, R, 2 * rows.stride(0), -(-K // 8), per_split,
            MT=config.MT, WN=config.WN, NT=config.NT, WM=config.WM, STAGES=config.stages,
            FP16=x.dtype is torch.float16, HAS_BIAS=bias is not None and splits == 1, HAS_LOW_RANK=R > 0,
            PIECE=piece, num_warps=config.warps, maxnreg=config.registers,
        )  # fmt: skip
        if splits > 1:
            _add_up(parts, bias, y)
    return y


def wgmma_sp(
    x: Tensor,
    values: Tensor,
    pattern: Tensor,
    bias: Tensor | None = None,
    low_rank: tuple[Tensor, Tensor] | None = None,
    config: WgmmaSp | None = None,
    splits: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """``Y = X W^T + T B^T + bias`` by ``wgmma.sp``, sm_90: x ``[..., K]`` -> contiguous ``[..., N]``.

    Sums are float32.

    Args:
        x: any layout; copied if its features are not contiguous or a token does not begin at a multiple of 16 bytes.
        values: ``[N, K / 2]``, K a multiple of 16, see ``metadata``.
        pattern: uint8 ``[N, K / 8]``.
        low_rank: ``(T [..., R], B [N, R])``, for an adapter ``T = X A^T``; R is at most ``config.largest_rank``.
        config: tile sizes; :func:`gluon_configs.default_wgmma` if None.
        splits, out: as in :func:`mma_sp`.

    Raises:
        ValueError: K or R is unsupported, or the tile has too few tokens for its outputs.
        RuntimeError: the compiler's build of the kernel must not be used (``gluon_builds``).
    """
    N, K = values.shape[0], values.shape[1] * 2
    y = x.new_empty(*x.shape[:-1], N) if out is None else out
    M = math.prod(x.shape[:-1])
    if M * N == 0:
        return y
    if K == 0:
        return _without_weights(y, bias, low_rank)
    config = config or gluon_configs.default_wgmma(M, N, K, processors(x.device))
    if 2 * config.BM < config.BN:
        raise ValueError(f"{config}: a tile of {config.BM} tokens is less than half of its {config.BN} outputs")
    rows, kept = words(x.reshape(M, K), torch.int32, 16), words(values, torch.int32, 16)
    t, b, R = _low_rank(low_rank, M, rows, 16)
    if K % 16 or config.largest_rank < R:
        raise ValueError(f"wgmma_sp: K = {K} must be a multiple of 16, and R = {R} at most {config.largest_rank}")
    if splits is None:
        splits = gluon_configs.splits(M, N, K, config, processors(x.device))
    pairs = -(-K // 128)
    pairs_per_split, splits = _divided(pairs, splits)
    parts = y if splits == 1 else x.new_empty(splits, M, N, dtype=torch.float32)
    piece = 8 if config.staged and K % 64 == 0 else 2
    kernels = _wgmma_kernels()
    tile = kernels.tiles(rows, config.BM, 32)
    arguments = (
        tile, kernels.tiles(kept, config.BN, 16), kernels.tiles(t, config.BM, 32) if R else tile,
        in_pieces(pattern, piece), b, y if bias is None else bias.contiguous(), parts,
        M, N, R, K // 8, 2 * pairs, 2 * pairs_per_split,
    )  # fmt: skip
    flags = {
        "FP16": x.dtype is torch.float16, "HAS_BIAS": bias is not None and splits == 1, "HAS_LOW_RANK": R > 0,
        "WIDE": N % 8 == 0, "PIECE": piece,
    }  # fmt: skip
    options = {"MT": config.MT, "WN": config.WN, "NT": config.NT, "STAGES": config.stages, "num_warps": config.warps}
    with device_of(x):
        grid = (-(-M // config.BM) * -(-N // config.BN), splits)
        check = functools.partial(_check_build, x.device, config, arguments, flags | options)
        launch = kernels.forward.checked(grid, check) if _on_gpu(x) else kernels.forward[grid]
        launch(*arguments, **flags, **options)
        if splits > 1:
            _add_up(parts, bias, y)
    return y


def _divided(blocks: int, splits: int) -> tuple[int, int]:
    """Blocks of each split, and the number of splits, so that each has work."""
    per_split = -(-blocks // splits)
    return per_split, -(-blocks // per_split)


def _add_up(parts: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """``y = parts [splits, M, N] + bias``."""
    splits, M, N = parts.shape
    given = y if bias is None else bias.contiguous()
    _kernels().add_up[(-(-M * N // 512),)](parts, given, y, M * N, N, splits, HAS_BIAS=bias is not None, num_warps=4)


def _check_build(
    device: torch.device, config: WgmmaSp, arguments: tuple[Any, ...], options: dict[str, bool | int]
) -> None:
    """Compile without a launch and check the build (``gluon_builds``), once for each distinct build."""
    wide_sizes = tuple(argument > 2**31 - 1 for argument in arguments if isinstance(argument, int))
    # Triton specializes a build on the width of sizes, the result's type and whether it begins at 16 bytes.
    key = (device, *options.values(), *wide_sizes, arguments[6].dtype, arguments[6].data_ptr() % 16 == 0)
    if key not in _build_problems:
        built = _wgmma_kernels().forward.warmup(*arguments, grid=(1,), **options)
        ptx = built.asm["ptx"]
        from slope_compile.kernels._gluon import assembler

        _build_problems[key] = gluon_builds.problems(
            ptx, config, gluon_builds.messages(ptx, assembler(90), "sm_90a")
        )
    found = _build_problems[key]
    if found:
        raise RuntimeError(f"{config} must not be used as this compiler builds it: {'; '.join(found)}")


_build_problems: dict[tuple[Any, ...], list[str]] = {}
"""Problems of the builds of this process.  They depend on the compiler alone and are the same for every model."""


def _on_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda


def _without_weights(y: Tensor, bias: Tensor | None, low_rank: tuple[Tensor, Tensor] | None) -> Tensor:
    """The result for K = 0."""
    if low_rank is not None:
        return y.copy_(F.linear(*low_rank, bias))
    return y.zero_() if bias is None else y.copy_(bias.expand_as(y))


def words(matrix: Tensor, dtype: torch.dtype, alignment: int = 0) -> Tensor:
    """View a 16-bit matrix ``[rows, columns]`` as integers of ``dtype``; a row must hold a whole number of them.

    The matrix is copied if a row does not begin at a multiple of an integer's size or of ``alignment`` bytes, and, for
    the TMA (alignment 16), if rows overlap.
    """
    per, alignment = dtype.itemsize // 2, max(alignment, dtype.itemsize)
    columns, stride = matrix.shape[1], matrix.stride(0)
    aligned = matrix.stride(1) == 1 and 2 * stride % alignment == 0 and matrix.data_ptr() % alignment == 0
    overlapping, far = alignment > 8 and stride < columns, stride >= _LARGEST_ROW
    if not aligned or matrix.storage_offset() % per or overlapping or far:
        matrix = matrix.clone(memory_format=torch.contiguous_format)
    return matrix.view(dtype)


def _low_rank(
    low_rank: tuple[Tensor, Tensor] | None, M: int, instead: Tensor, alignment: int
) -> tuple[Tensor, Tensor, int]:
    """T and B as contiguous words, and their rank.  Columns of zeros are appended until rows are aligned."""
    if low_rank is None or low_rank[1].shape[1] == 0:
        return instead, instead, 0
    t, b = low_rank[0].reshape(M, -1), low_rank[1]
    missing = -t.shape[1] % (alignment // 2)
    t, b = (F.pad(m, (0, missing)) if missing else m.contiguous() for m in (t, b))
    return words(t, torch.int32, alignment), words(b, torch.int32), t.shape[1]


def in_pieces(pattern: Tensor, size: int) -> Tensor:
    """View a pattern as integers of ``size`` bytes; a row must hold a whole number of them."""
    pattern = pattern.contiguous()
    if pattern.data_ptr() % size or pattern.storage_offset() % size:
        pattern = pattern.clone()
    return pattern.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size])


@functools.lru_cache(maxsize=16)
def processors(device: torch.device) -> int:
    """Number of multiprocessors of a device; 1 for the CPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
