"""Triton kernels between the forms of a 2:4 weight: dense, its values, and the values of its transpose.

Importing this module imports Triton: only ``triton_products`` does, at the first launch.  Storage is that of
``metadata``.  Each reads what it needs once and writes its result once; a dense ``[N, K]`` is in memory only where it
is an argument or the result.
"""

import triton
import triton.language as tl

from slope_compile.kernels.triton_tiles import expanded, kept, largest_two, magnitude_keys, nibbles, packed


@triton.jit
def stored_tile(V, P, rn, pk, N, K, stride_p, BN: tl.constexpr, BK: tl.constexpr):
    """Dense ``[BN, BK]`` of the rows rn and the columns ``pk BK`` to ``pk BK + BK - 1`` of a stored weight."""
    rv = pk * (BK // 2) + tl.arange(0, BK // 2)
    rb = pk * (BK // 8) + tl.arange(0, BK // 8)
    in_n = (rn < N)[:, None]
    v = tl.load(V + rn[:, None] * (K // 2) + rv[None, :], mask=in_n & (rv < K // 2)[None, :], other=0.0)
    codes = tl.load(P + rn[:, None] * stride_p + rb[None, :], mask=in_n & (rb < stride_p)[None, :], other=0)
    return expanded(v, nibbles(codes, BN, BK // 4, 2), BN, BK // 4)


@triton.jit
def expand(V, P, W, N, K, stride_p, BN: tl.constexpr, BK: tl.constexpr):
    """``W [N, K]`` dense, zero where pruned, of values ``V [N, K / 2]``."""
    tiles = tl.cdiv(K, BK)
    pn, pk = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    rn = (pn * BN + tl.arange(0, BN)).to(tl.int64)
    rk = pk * BK + tl.arange(0, BK)
    w = stored_tile(V, P, rn, pk, N, K, stride_p, BN, BK)
    tl.store(W + rn[:, None] * K + rk[None, :], w, mask=(rn < N)[:, None] & (rk < K)[None, :])


@triton.jit
def compress(W, P, V, N, K, stride_wn, stride_wk, stride_p, BN: tl.constexpr, BK: tl.constexpr):
    """Values ``V [N, K / 2]`` of ``W [N, K]`` dense, in any layout."""
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
    V, P, CV, C, N, K, stride_p, stride_c, BN: tl.constexpr, BK: tl.constexpr, PICK: tl.constexpr
):  # fmt: skip
    """``CV [K, N / 2]``: of W's transpose what its pattern ``C uint8 [K, ceil(N / 8)]`` keeps, which PICK picks first.

    PICK keeps the two largest magnitudes of four neighbours along N, of equal ones the first, and writes C.  N is a
    multiple of 4.  A kept position at which W is pruned gets an explicit zero.
    """
    tiles = tl.cdiv(K, BK)
    pn, pk = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    rn = (pn * BN + tl.arange(0, BN)).to(tl.int64)
    rk = (pk * BK + tl.arange(0, BK)).to(tl.int64)
    ru = pn * (BN // 2) + tl.arange(0, BN // 2)
    rc = pn * (BN // 8) + tl.arange(0, BN // 8)
    in_k = (rk < K)[:, None]
    in_c = in_k & (rc < stride_c)[None, :]
    w = tl.trans(stored_tile(V, P, rn, pk, N, K, stride_p, BN, BK))  # [BK, BN]
    c_at = C + rk[:, None] * stride_c + rc[None, :]  # [BK, BN / 8]
    if PICK:
        nibble = largest_two(magnitude_keys(w), BK, BN // 4)
        group = pn * (BN // 4) + tl.arange(0, BN // 4)
        nibble = tl.where((group < N // 4)[None, :], nibble, 0)
        tl.store(c_at, packed(nibble, BK, BN // 4), mask=in_c)
    else:
        nibble = nibbles(tl.load(c_at, mask=in_c, other=0), BK, BN // 4, 2)
    cv = kept(w, nibble, BK, BN // 4)
    tl.store(CV + rk[:, None] * (N // 2) + ru[None, :], cv, mask=in_k & (ru < N // 2)[None, :])
