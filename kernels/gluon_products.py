"""Launches of the Gluon kernels, called with tensors: 2:4, bfloat16 and float16, CUDA devices from sm_80 on.

Nothing here decides whether they should be used, and by default nothing uses them: they have never been measured on a
GPU.  They are offered to the benchmarks as one more contender; ``gpu_self_test.mma_sp_passes`` comes before any use.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from slope_compile.kernels import gluon_configs
from slope_compile.kernels.gluon_configs import MmaSp
from slope_compile.kernels.triton_products import _on

DTYPES = (torch.bfloat16, torch.float16)


@functools.cache
def _kernels() -> Any:
    from slope_compile.kernels import gluon_mma_sp

    return gluon_mma_sp


def forward(
    x: Tensor,
    values: Tensor,
    pattern: Tensor,
    bias: Tensor | None = None,
    config: MmaSp | None = None,
    splits: int | None = None,
) -> Tensor:
    """``Y = X W^T + bias`` on the sparse tensor cores: x ``[..., K]`` -> contiguous ``[..., N]``.

    Sums are float32.  An entry of ``x`` that meets only pruned weights takes no part, whatever it is: where it is
    infinite or NaN, a dense product has NaN and this one has not.

    Args:
        x: any layout; copied where the features of a token lie apart or a token does not begin at 4 bytes.
        values: ``[N, K / 2]``, see ``metadata``.
        pattern: uint8 ``[N, ceil(K / 8)]``.
        config: tile sizes; those of :func:`gluon_configs.default` without.
        splits: over how many programs the sum of an output is split; :func:`gluon_configs.splits` without.  Their
            parts are added up in a fixed order.
    """
    N, K = values.shape[0], values.shape[1] * 2
    y = x.new_empty(*x.shape[:-1], N)
    M = math.prod(x.shape[:-1])
    if M * N == 0:
        return y
    if K == 0:
        return y.zero_() if bias is None else y.copy_(bias.expand_as(y))
    rows, words = _pairs(x.reshape(M, K)), _pairs(values)
    halves = K % 16 == 0
    pattern = _halves(pattern) if halves else pattern.contiguous()
    config = config or gluon_configs.default(M)
    if splits is None:
        splits = gluon_configs.splits(M, N, K, config, _processors(x.device))
    blocks = -(-K // 64)
    per_split = -(-blocks // splits)
    splits = -(-blocks // per_split)  # none without work
    parts = y if splits == 1 else x.new_empty(splits, M, N, dtype=torch.float32)
    given = x if bias is None else bias.contiguous()
    tiles = -(-M // config.BM) * -(-N // config.BN)
    with _on(x):
        _kernels().forward[(tiles, splits)](
            rows, words, pattern, given, parts,
            M, N, K, 2 * rows.stride(0), -(-K // 8), per_split,
            MT=config.MT, WN=config.WN, NT=config.NT, WM=config.WM, STAGES=config.stages,
            FP16=x.dtype is torch.float16, HAS_BIAS=bias is not None and splits == 1, HALVES=halves,
            num_warps=config.warps,
        )  # fmt: skip
        if splits > 1:
            _kernels().add_up[(-(-M * N // 512),)](
                parts, given, y, M * N, N, splits, HAS_BIAS=bias is not None, num_warps=4
            )
    return y


def _pairs(matrix: Tensor) -> Tensor:
    """16-bit ``[rows, even columns]`` as int32 ``[rows, columns / 2]``, copied where the words are not aligned."""
    aligned = matrix.stride(1) == 1 and matrix.stride(0) % 2 == 0 and matrix.data_ptr() % 4 == 0
    if not aligned or matrix.storage_offset() % 2:
        matrix = matrix.clone(memory_format=torch.contiguous_format)
    return matrix.view(torch.int32)


def _halves(pattern: Tensor) -> Tensor:
    """A pattern of an even number of bytes a row as int16."""
    pattern = pattern.contiguous()
    if pattern.data_ptr() % 2 or pattern.storage_offset() % 2:
        pattern = pattern.clone()
    return pattern.view(torch.int16)


@functools.lru_cache(maxsize=16)
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
