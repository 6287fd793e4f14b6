"""Triton kernels between the forms of a 2:4 weight: dense, its values, and the values of its transpose.

Importing this module imports Triton, so only ``triton_products`` imports it, at the first launch.  Weights are stored
as ``metadata`` describes.  Each kernel reads its inputs once and writes its result once.  A dense ``[N, K]`` is in
memory only if it is an argument or the result.
"""

import triton
import triton.language as tl

from slope_compile.kernels.triton_tiles import (
    expanded,
    filled_two,
    kept,
    largest_two,
    magnitude_keys,
    nibbles,
    packed,
    packed_flags,
    staying,
)


@triton.jit
def stored_tile(
    V, P, C, rn, pk, N, K, stride_p, stride_c, BN: tl.constexpr, BK: tl.constexpr, HAS_COLUMNS: tl.constexpr
):
    """A dense tile ``[BN, BK]`` of a stored weight, rows rn and columns ``pk BK`` to ``pk BK + BK - 1``, and its
    nibbles; with HAS_COLUMNS, only values kept by the column mask ``C uint8 [N, ceil(K / 16)]``."""
    rv = pk * (BK // 2) + tl.arange(0, BK // 2)
    rb = pk * (BK // 8) + tl.arange(0, BK // 8)
    in_n = (rn < N)[:, None]
    v = tl.load(V + rn[:, None] * (K // 2) + rv[None, :], mask=in_n & (rv < K // 2)[None, :], other=0.0)
    codes = tl.load(P + rn[:, None] * stride_p + rb[None, :], mask=in_n & (rb < stride_p)[None, :], other=0)
    nibble = nibbles(codes, BN, BK // 4, 2)
    if HAS_COLUMNS:
        rc = pk * (BK // 16) + tl.arange(0, BK // 16)
        stays = tl.load(C + rn[:, None] * stride_c + rc[None, :], mask=in_n & (rc < stride_c)[None, :], other=0)
        v = staying(v, stays, BN, BK // 2, 8)
    return expanded(v, nibble, BN, BK // 4), nibble


@triton.jit
def expand(
    V, P, C, W, N, K, stride_p, stride_c, BN: tl.constexpr, BK: tl.constexpr, HAS_COLUMNS: tl.constexpr
):  # fmt: skip
    """Dense ``W [N, K]``, zero where pruned, from values ``V [N, K / 2]``; with HAS_COLUMNS, W^{R,C}."""
    tiles = tl.cdiv(K, BK)
    pn, pk = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    rn = (pn * BN + tl.arange(0, BN)).to(tl.int64)
    rk = pk * BK + tl.arange(0, BK)
    w, _ = stored_tile(V, P, C, rn, pk, N, K, stride_p, stride_c, BN, BK, HAS_COLUMNS)
    tl.store(W + rn[:, None] * K + rk[None, :], w, mask=(rn < N)[:, None] & (rk < K)[None, :])


@triton.jit
def compress(W, P, V, N, K, stride_wn, stride_wk, stride_p, BN: tl.constexpr, BK: tl.constexpr):
    """Values ``V [N, K / 2]`` of a dense ``W [N, K]`` in any layout."""
    tiles = tl.cdiv(K, BK)
    pn, pk = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    rn = (pn * BN + tl.arange(0, BN)).to(tl.int64)
    rk = (pk * BK + tl.arange(0, BK)).to(tl.int64)
    rv = pk * (BK // 2) + tl.arange(0, BK // 2)
    rb = pk * (BK // 8) + tl.arange(0, BK // 8)
    in_n = (rn < N)[:, None]
    w = tl.load(W + rn[:, None] * stride_wn + rk[None, :] * stride_wk, mask=in_n & (rk < K)[None, :], other=0.0)
    codes = tl.load(P + rn[:, None] * stride_p + rb[None, :], mask=in_n & (rb < stride_p)[None, :], other=0)
    v = kept(w, nibbles(codes, BN, BK // 4, 2), BN, BK // 4)
    tl.store(V + rn[:, None] * (K // 2) + rv[None, :], v, mask=in_n & (rv < K // 2)[None, :])


@triton.jit
def compress_columns(
    V, P, C, CV, CP, N, K, stride_p, stride_c, stride_cp, BN: tl.constexpr, BK: tl.constexpr, HAS_COLUMNS: tl.constexpr
):  # fmt: skip
    """Values ``CV [K, N / 2]`` and pattern ``CP uint8 [K, ceil(N / 8)]`` of the transpose of W^{R,C}.

    From every four neighbours along N it keeps the two largest magnitudes, on a tie the first; pruned entries count as
    zero.  With HAS_COLUMNS, entries that the column mask C drops count as pruned.  N is a multiple of 4.
    """
    tiles = tl.cdiv(K, BK)
    pn, pk = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    rn = (pn * BN + tl.arange(0, BN)).to(tl.int64)
    rk = (pk * BK + tl.arange(0, BK)).to(tl.int64)
    ru = pn * (BN // 2) + tl.arange(0, BN // 2)
    rc = pn * (BN // 8) + tl.arange(0, BN // 8)
    group = pn * (BN // 4) + tl.arange(0, BN // 4)
    in_k = (rk < K)[:, None]
    w, _ = stored_tile(V, P, C, rn, pk, N, K, stride_p, stride_c, BN, BK, HAS_COLUMNS)
    w = tl.trans(w)  # [BK, BN]
    keys = magnitude_keys(w)
    # A column mask keeps at most two of each group.
    nibble = filled_two(keys, BK, BN // 4) if HAS_COLUMNS else largest_two(keys, BK, BN // 4)
    nibble = tl.where((group < N // 4)[None, :], nibble, 0)
    codes = packed(nibble, BK, BN // 4)
    tl.store(CP + rk[:, None] * stride_cp + rc[None, :], codes, mask=in_k & (rc < stride_cp)[None, :])
    cv = kept(w, nibble, BK, BN // 4)
    tl.store(CV + rk[:, None] * (N // 2) + ru[None, :], cv, mask=in_k & (ru < N // 2)[None, :])


@triton.jit
def pick_columns(V, P, C, N, K, stride_p, stride_c, BN: tl.constexpr, BK: tl.constexpr):
    """Column mask ``C uint8 [N, ceil(K / 16)]`` of values whose magnitude is among the two largest of four neighbours
    along N.

    On a tie the first wins; pruned entries count as zero.  N is a multiple of 4.
    """
    tiles = tl.cdiv(K, BK)
    pn, pk = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    rn = (pn * BN + tl.arange(0, BN)).to(tl.int64)
    rv = pk * (BK // 2) + tl.arange(0, BK // 2)
    rc = pk * (BK // 16) + tl.arange(0, BK // 16)
    w, nibble = stored_tile(V, P, C, rn, pk, N, K, stride_p, stride_c, BN, BK, False)
    picked = largest_two(magnitude_keys(tl.trans(w)), BK, BN // 4)
    dense = tl.trans(tl.reshape((picked[:, :, None] >> tl.arange(0, 4)[None, None, :]) & 1, (BK, BN)))
    stays = tl.where((rv < K // 2)[None, :], kept(dense, nibble, BN, BK // 4), 0)
    mask = (rn < N)[:, None] & (rc < stride_c)[None, :]
    tl.store(C + rn[:, None] * stride_c + rc[None, :], packed_flags(stays, BN, BK // 16), mask=mask)
