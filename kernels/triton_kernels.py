"""Triton kernels that read 2:4 weights in their stored form, expand a tile in registers and multiply it as a dense one.

Importing this module imports Triton: only ``triton_products`` does, at the first launch.  Storage is that of
``metadata`` (values ``[N, K / 2]`` in the order of their columns, pattern uint8 ``[N, ceil(K / 8)]``, one nibble a
group); nothing is repacked.  A value that is not kept never takes part: it is selected, not multiplied by zero.

Sums are float32.  The features of a token lie side by side, tokens are a stride apart.  Row numbers are 64-bit before
they meet a stride.  ``EVEN`` says that the reduction is a multiple of its block, so that its loads need no mask.  A
reduction is never empty: the launchers answer that case themselves.
"""

import triton
import triton.language as tl


@triton.jit
def _expanded(v, nibble, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    """Dense tile ``[ROWS, 4 GROUPS]`` of the values ``v [ROWS, 2 GROUPS]`` and ``nibble int32 [ROWS, GROUPS]``."""
    first, second = tl.split(tl.reshape(v, (ROWS, GROUPS, 2)))
    zero = tl.zeros_like(first)
    b0 = (nibble & 1) != 0
    b1 = (nibble & 2) != 0
    b2 = (nibble & 4) != 0
    b3 = (nibble & 8) != 0
    # Two are kept: element 1 is the first kept unless 0 is kept, element 2 the second unless 3 is kept.
    d0 = tl.where(b0, first, zero)
    d1 = tl.where(b1, tl.where(b0, second, first), zero)
    d2 = tl.where(b2, tl.where(b3, first, second), zero)
    d3 = tl.where(b3, second, zero)
    return tl.reshape(tl.join(tl.join(d0, d2), tl.join(d1, d3)), (ROWS, 4 * GROUPS))


@triton.jit
def _nibbles(codes, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    """int32 ``[ROWS, GROUPS]`` of the bytes ``[ROWS, GROUPS / 2]``; the low nibble is the group that comes first."""
    shifts = (tl.arange(0, 2) * 4)[None, None, :]
    return tl.reshape((codes.to(tl.int32)[:, :, None] >> shifts) & 15, (ROWS, GROUPS))


@triton.jit
def _tile(rows, columns, BROWS: tl.constexpr, BCOLUMNS: tl.constexpr, GROUP: tl.constexpr):
    """Which output tile this program computes: bands of GROUP tile rows, so that neighbours share what they read."""
    program = tl.program_id(0)
    tile_rows = tl.cdiv(rows, BROWS)
    band = GROUP * tl.cdiv(columns, BCOLUMNS)
    first = program // band * GROUP
    height = tl.minimum(tile_rows - first, GROUP)
    return first + (program % band) % height, (program % band) // height


@triton.jit
def forward(
    X, V, P, BIAS, T, B, Y,
    M, N, K, R, stride_xm, stride_p,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_LOW_RANK: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    GROUP: tl.constexpr = 8,
):  # fmt: skip
    """``Y [M, N] = X [M, K] W^T + T [M, R] B^T [R, N] + BIAS [N]``; all contiguous but X, whose rows are."""
    pm, pn = _tile(M, N, BM, BN, GROUP)
    rm = (pm * BM + tl.arange(0, BM)).to(tl.int64)
    rn = (pn * BN + tl.arange(0, BN)).to(tl.int64)
    rk = tl.arange(0, BK)
    rv = tl.arange(0, BK // 2)
    rb = tl.arange(0, BK // 8)
    in_m = (rm < M)[:, None]
    in_n = (rn < N)[:, None]
    x_at = X + rm[:, None] * stride_xm + rk[None, :]
    v_at = V + rn[:, None] * (K // 2) + rv[None, :]
    p_at = P + rn[:, None] * stride_p + rb[None, :]
    acc = tl.zeros((BM, BN), tl.float32)
    tl.assume(K > 0)
    for k in range(0, K, BK):
        if EVEN:
            x = tl.load(x_at, mask=in_m, other=0.0)
            v = tl.load(v_at, mask=in_n, other=0.0)
            codes = tl.load(p_at, mask=in_n, other=0)
        else:
            x = tl.load(x_at, mask=in_m & (rk < K - k)[None, :], other=0.0)
            v = tl.load(v_at, mask=in_n & (rv < K // 2 - k // 2)[None, :], other=0.0)
            codes = tl.load(p_at, mask=in_n & (rb < stride_p - k // 8)[None, :], other=0)
        w = _expanded(v, _nibbles(codes, BN, BK // 4), BN, BK // 4)
        acc = tl.dot(x, tl.trans(w), acc, input_precision=PRECISION)
        x_at += BK
        v_at += BK // 2
        p_at += BK // 8
    if HAS_LOW_RANK:
        rr = tl.arange(0, BR)
        for r in range(0, R, BR):
            in_r = (rr < R - r)[None, :]
            t = tl.load(T + rm[:, None] * R + (r + rr)[None, :], mask=in_m & in_r, other=0.0)
            b = tl.load(B + rn[:, None] * R + (r + rr)[None, :], mask=in_n & in_r, other=0.0)
            acc = tl.dot(t, tl.trans(b), acc, input_precision=PRECISION)
    if HAS_BIAS:
        acc += tl.load(BIAS + rn, mask=rn < N, other=0.0).to(tl.float32)[None, :]
    tl.store(Y + rm[:, None] * N + rn[None, :], acc.to(Y.dtype.element_ty), mask=in_m & (rn < N)[None, :])


@triton.jit
def grad_input(
    DY, V, P, C, DX,
    M, N, K, stride_ym, stride_p, stride_c,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    HAS_COLUMNS: tl.constexpr, EVEN: tl.constexpr, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr,
    GROUP: tl.constexpr = 8,
):  # fmt: skip
    """``DX [M, K] = DY [M, N] W``; with HAS_COLUMNS of those entries of W that ``C uint8 [K, ceil(N / 8)]`` keeps too.

    TRANSPOSED computes ``W^T DY^T``: the other form with float32 on tensor cores ends sm_90's compiler with an error.
    """
    pm, pk = _tile(M, K, BM, BK, GROUP)
    rm = (pm * BM + tl.arange(0, BM)).to(tl.int64)
    rk = (pk * BK + tl.arange(0, BK)).to(tl.int64)
    rv = pk * (BK // 2) + tl.arange(0, BK // 2)
    rb = pk * (BK // 8) + tl.arange(0, BK // 8)
    rn = tl.arange(0, BN).to(tl.int64)
    in_m = (rm < M)[:, None]
    in_v = (rv < K // 2)[None, :]
    in_b = (rb < stride_p)[None, :]
    dy_at = DY + rm[:, None] * stride_ym + rn[None, :]
    v_at = V + rn[:, None] * (K // 2) + rv[None, :]
    p_at = P + rn[:, None] * stride_p + rb[None, :]
    # Byte j of column k holds the rows 8 j to 8 j + 7.
    rc = tl.arange(0, BN // 8)
    c_at = C + rk[None, :] * stride_c + rc[:, None]
    if TRANSPOSED:  # noqa: SIM108 - the two have different types
        acc = tl.zeros((BK, BM), tl.float32)
    else:
        acc = tl.zeros((BM, BK), tl.float32)
    tl.assume(N > 0)
    for n in range(0, N, BN):
        if EVEN:
            dy = tl.load(dy_at, mask=in_m, other=0.0)
            v = tl.load(v_at, mask=in_v, other=0.0)
            codes = tl.load(p_at, mask=in_b, other=0)
        else:
            in_n = rn < N - n
            dy = tl.load(dy_at, mask=in_m & in_n[None, :], other=0.0)
            v = tl.load(v_at, mask=in_n[:, None] & in_v, other=0.0)
            codes = tl.load(p_at, mask=in_n[:, None] & in_b, other=0)
        w = _expanded(v, _nibbles(codes, BN, BK // 4), BN, BK // 4)
        if HAS_COLUMNS:
            bits = tl.load(c_at, mask=(rc < stride_c - n // 8)[:, None] & (rk < K)[None, :], other=0).to(tl.int32)
            rows = (bits[:, None, :] >> tl.arange(0, 8)[None, :, None]) & 1
            w = tl.where(tl.reshape(rows, (BN, BK)) != 0, w, tl.zeros_like(w))
            c_at += BN // 8
        if TRANSPOSED:
            acc = tl.dot(tl.trans(w), tl.trans(dy), acc, input_precision=PRECISION)
        else:
            acc = tl.dot(dy, w, acc, input_precision=PRECISION)
        dy_at += BN
        v_at += BN * (K // 2)
        p_at += BN * stride_p
    if TRANSPOSED:
        acc = tl.trans(acc)
    tl.store(DX + rm[:, None] * K + rk[None, :], acc.to(DX.dtype.element_ty), mask=in_m & (rk < K)[None, :])


@triton.jit
def grad_weight(
    DY, X, P, DV,
    M, N, K, stride_ym, stride_xm, stride_p,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr,
    GROUP: tl.constexpr = 8,
):  # fmt: skip
    """``DV [N, K / 2]``: the kept entries of ``DY^T X [N, K]``, picked from the sums in registers and written once."""
    pn, pk = _tile(N, K, BN, BK, GROUP)
    rn = (pn * BN + tl.arange(0, BN)).to(tl.int64)
    rk = (pk * BK + tl.arange(0, BK)).to(tl.int64)
    rv = pk * (BK // 2) + tl.arange(0, BK // 2)
    rb = pk * (BK // 8) + tl.arange(0, BK // 8)
    rm = tl.arange(0, BM).to(tl.int64)
    dy_at = DY + rm[:, None] * stride_ym + rn[None, :]
    x_at = X + rm[:, None] * stride_xm + rk[None, :]
    in_n = (rn < N)[None, :]
    in_k = (rk < K)[None, :]
    acc = tl.zeros((BN, BK), tl.float32)
    tl.assume(M > 0)
    for m in range(0, M, BM):
        if EVEN:
            dy = tl.load(dy_at, mask=in_n, other=0.0)
            x = tl.load(x_at, mask=in_k, other=0.0)
        else:
            in_m = (rm < M - m)[:, None]
            dy = tl.load(dy_at, mask=in_m & in_n, other=0.0)
            x = tl.load(x_at, mask=in_m & in_k, other=0.0)
        acc = tl.dot(tl.trans(dy), x, acc, input_precision=PRECISION)
        dy_at += tl.cast(BM, tl.int64) * stride_ym
        x_at += tl.cast(BM, tl.int64) * stride_xm
    in_tile = (rn < N)[:, None] & (rb < stride_p)[None, :]
    codes = tl.load(P + rn[:, None] * stride_p + rb[None, :], mask=in_tile, other=0)
    nibble = _nibbles(codes, BN, BK // 4)
    dense = acc.to(DV.dtype.element_ty)
    even, odd = tl.split(tl.reshape(dense, (BN, BK // 4, 2, 2)))
    d0, d2 = tl.split(even)
    d1, d3 = tl.split(odd)
    first = tl.where((nibble & 1) != 0, d0, tl.where((nibble & 2) != 0, d1, d2))
    second = tl.where((nibble & 8) != 0, d3, tl.where((nibble & 4) != 0, d2, d1))
    out = tl.reshape(tl.join(first, second), (BN, BK // 2))
    tl.store(DV + rn[:, None] * (K // 2) + rv[None, :], out, mask=(rn < N)[:, None] & (rv < K // 2)[None, :])


@triton.jit
def expand(V, P, W, N, K, stride_p, BN: tl.constexpr, BK: tl.constexpr):
    """``W [N, K]`` dense, zero where pruned."""
    tiles = tl.cdiv(K, BK)
    pn, pk = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    rn = (pn * BN + tl.arange(0, BN)).to(tl.int64)
    rk = pk * BK + tl.arange(0, BK)
    rv = pk * (BK // 2) + tl.arange(0, BK // 2)
    rb = pk * (BK // 8) + tl.arange(0, BK // 8)
    in_n = (rn < N)[:, None]
    v = tl.load(V + rn[:, None] * (K // 2) + rv[None, :], mask=in_n & (rv < K // 2)[None, :], other=0.0)
    codes = tl.load(P + rn[:, None] * stride_p + rb[None, :], mask=in_n & (rb < stride_p)[None, :], other=0)
    w = _expanded(v, _nibbles(codes, BN, BK // 4), BN, BK // 4)
    tl.store(W + rn[:, None] * K + rk[None, :], w, mask=in_n & (rk < K)[None, :])
