"""Triton kernels that read 2:4 weights in their stored form, expand a tile in registers and multiply it as a dense one.

Importing this module imports Triton, so only ``triton_products`` imports it, at the first launch.  Weights are stored
as ``metadata`` describes (values ``[N, K / 2]`` in the order of their columns; pattern uint8 ``[N, ceil(K / 8)]``, one
nibble per group; column mask uint8 ``[N, ceil(K / 16)]``, one bit per value).  Nothing is repacked.  Values are
selected, not multiplied by zero, so that pruned entries never enter a sum.

Sums are float32.  The features of a token are contiguous; tokens are a stride apart.  Row numbers are converted to 64
bits before they are multiplied by a stride.  ``EVEN``: the reduction is a multiple of its block, so that its loads need
no mask.  ``WORDS``: the rows of the pattern are whole 32-bit words, at addresses that are multiples of 4.
``COLUMN_WORDS``: the same for the column mask.  Only words are copied to shared memory ahead of their use; loads of
bytes stall every step.  A reduction is never empty, because the launchers handle that case.

Each product is a function that returns the sums of a tile, and a kernel that calls it and stores them.  The lowerings
of ``slope_compile._inductor_gpu`` put the same functions into kernels that Inductor generates.  For the forward product
they use its parts around a load of x that Inductor generates.
"""

import triton
import triton.language as tl

from slope_compile.kernels.triton_tiles import expanded, kept, nibbles, staying, tile_of


@triton.jit
def forward_weights(V, P, rn, K, stride_p, BK: tl.constexpr, WORDS: tl.constexpr):
    """Pointers to the first block of rows rn: of the values ``[BN, BK / 2]``, and of the pattern."""
    LOADS: tl.constexpr = BK // (32 if WORDS else 8)
    rn = rn.to(tl.int64)
    v_at = V + rn[:, None] * (K // 2) + tl.arange(0, BK // 2)[None, :]
    p_row = P + rn[:, None] * stride_p  # [BN, 1]
    p_at = (p_row.to(tl.pointer_type(tl.int32)) if WORDS else p_row) + tl.arange(0, LOADS)[None, :]  # [BN, LOADS]
    return v_at, p_at


@triton.jit
def forward_step(
    acc, x, v_at, p_at, k, in_n, K, stride_p,
    BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr, WORDS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``acc [BM, BN]`` plus ``x [BM, BK]`` times the transposed block of W of the features from k on."""
    EACH: tl.constexpr = 8 if WORDS else 2  # groups per integer loaded from the pattern
    rv = tl.arange(0, BK // 2)
    rb = tl.arange(0, BK // (4 * EACH))
    if EVEN:
        v = tl.load(v_at, mask=in_n, other=0.0)
        codes = tl.load(p_at, mask=in_n, other=0)
    else:
        v = tl.load(v_at, mask=in_n & (rv < K // 2 - k // 2)[None, :], other=0.0)
        codes = tl.load(p_at, mask=in_n & (rb * (EACH // 2) < stride_p - k // 8)[None, :], other=0)
    w = expanded(v, nibbles(codes, BN, BK // 4, EACH), BN, BK // 4)  # [BN, BK]
    return tl.dot(x, tl.trans(w), acc, input_precision=PRECISION)


@triton.jit
def forward_sums(
    X, V, P, rm, rn, M, N, K, stride_xm, stride_p,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    EVEN: tl.constexpr, WORDS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """float32 ``[BM, BN]``: X W^T at rows rm and columns rn."""
    rm = rm.to(tl.int64)
    rk = tl.arange(0, BK)
    in_m = (rm < M)[:, None]
    in_n = (rn < N)[:, None]
    x_at = X + rm[:, None] * stride_xm + rk[None, :]  # [BM, BK]
    v_at, p_at = forward_weights(V, P, rn, K, stride_p, BK, WORDS)
    acc = tl.zeros((BM, BN), tl.float32)
    tl.assume(K > 0)
    for k in range(0, K, BK):
        if EVEN:  # noqa: SIM108
            x = tl.load(x_at, mask=in_m, other=0.0)
        else:
            x = tl.load(x_at, mask=in_m & (rk < K - k)[None, :], other=0.0)
        acc = forward_step(acc, x, v_at, p_at, k, in_n, K, stride_p, BN, BK, EVEN, WORDS, PRECISION)
        x_at += BK
        v_at += BK // 2
        p_at += BK // (32 if WORDS else 8)
    return acc


@triton.jit
def low_rank_sums(
    acc, T, B, rm, rn, M, N, R,
    BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``acc [BM, BN] + T [M, R] B^T [R, N]`` at rows rm and columns rn; both contiguous."""
    rm = rm.to(tl.int64)
    rn = rn.to(tl.int64)
    rr = tl.arange(0, BR)
    for r in range(0, R, BR):
        in_r = (rr < R - r)[None, :]
        t = tl.load(T + rm[:, None] * R + (r + rr)[None, :], mask=(rm < M)[:, None] & in_r, other=0.0)
        b = tl.load(B + rn[:, None] * R + (r + rr)[None, :], mask=(rn < N)[:, None] & in_r, other=0.0)
        acc = tl.dot(t, tl.trans(b), acc, input_precision=PRECISION)
    return acc


@triton.jit
def forward(
    X, V, P, BIAS, T, B, Y,
    M, N, K, R, stride_xm, stride_p,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_LOW_RANK: tl.constexpr, EVEN: tl.constexpr, WORDS: tl.constexpr,
    PRECISION: tl.constexpr, GROUP: tl.constexpr = 8,
):  # fmt: skip
    """``Y [M, N] = X [M, K] W^T + T [M, R] B^T [R, N] + BIAS [N]``; X has contiguous rows, the rest is contiguous."""
    pm, pn = tile_of(M, N, BM, BN, GROUP)
    rm = pm * BM + tl.arange(0, BM)
    rn = pn * BN + tl.arange(0, BN)
    acc = forward_sums(X, V, P, rm, rn, M, N, K, stride_xm, stride_p, BM, BN, BK, EVEN, WORDS, PRECISION)
    if HAS_LOW_RANK:
        acc = low_rank_sums(acc, T, B, rm, rn, M, N, R, BM, BN, BR, PRECISION)
    if HAS_BIAS:
        acc += tl.load(BIAS + rn, mask=rn < N, other=0.0).to(tl.float32)[None, :]
    mask = (rm < M)[:, None] & (rn < N)[None, :]
    tl.store(Y + rm.to(tl.int64)[:, None] * N + rn[None, :], acc.to(Y.dtype.element_ty), mask=mask)


@triton.jit
def grad_input_sums(
    DY, V, P, C, rm, pk, M, N, K, stride_ym, stride_p, stride_c,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    HAS_COLUMNS: tl.constexpr, EVEN: tl.constexpr, WORDS: tl.constexpr, COLUMN_WORDS: tl.constexpr,
    TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """float32 ``[BM, BK]``: DY W at rows rm and the columns ``pk BK`` to ``pk BK + BK - 1``."""
    EACH: tl.constexpr = 8 if WORDS else 2
    LOADS: tl.constexpr = BK // (4 * EACH)
    rm = rm.to(tl.int64)
    rv = pk * (BK // 2) + tl.arange(0, BK // 2)
    rb = pk * LOADS + tl.arange(0, LOADS)
    rn = tl.arange(0, BN).to(tl.int64)
    in_m = (rm < M)[:, None]
    in_v = (rv < K // 2)[None, :]
    in_b = (rb * (EACH // 2) < stride_p)[None, :]
    dy_at = DY + rm[:, None] * stride_ym + rn[None, :]  # [BM, BN]
    v_at = V + rn[:, None] * (K // 2) + rv[None, :]  # [BN, BK / 2]
    p_row = P + rn[:, None] * stride_p  # [BN, 1]
    FLAGS: tl.constexpr = 32 if COLUMN_WORDS else 8  # column-mask bits per load
    rc = pk * (BK // (2 * FLAGS)) + tl.arange(0, BK // (2 * FLAGS))
    in_c = (rc * (FLAGS // 8) < stride_c)[None, :]
    c_row = C + rn[:, None] * stride_c  # [BN, 1]
    if TRANSPOSED:  # noqa: SIM108 - the two have different types
        acc = tl.zeros((BK, BM), tl.float32)
    else:
        acc = tl.zeros((BM, BK), tl.float32)
    tl.assume(N > 0)
    for n in range(0, N, BN):
        p_at = (p_row.to(tl.pointer_type(tl.int32)) if WORDS else p_row) + rb[None, :]  # [BN, LOADS]
        if EVEN:
            dy = tl.load(dy_at, mask=in_m, other=0.0)
            v = tl.load(v_at, mask=in_v, other=0.0)
            codes = tl.load(p_at, mask=in_b, other=0)
        else:
            in_n = rn < N - n
            dy = tl.load(dy_at, mask=in_m & in_n[None, :], other=0.0)
            v = tl.load(v_at, mask=in_n[:, None] & in_v, other=0.0)
            codes = tl.load(p_at, mask=in_n[:, None] & in_b, other=0)
        if HAS_COLUMNS:
            c_at = (c_row.to(tl.pointer_type(tl.int32)) if COLUMN_WORDS else c_row) + rc[None, :]
            if EVEN:  # noqa: SIM108
                stays = tl.load(c_at, mask=in_c, other=0)
            else:
                stays = tl.load(c_at, mask=in_n[:, None] & in_c, other=0)
            v = staying(v, stays, BN, BK // 2, FLAGS)
            c_row += BN * stride_c
        w = expanded(v, nibbles(codes, BN, BK // 4, EACH), BN, BK // 4)  # [BN, BK]
        if TRANSPOSED:
            acc = tl.dot(tl.trans(w), tl.trans(dy), acc, input_precision=PRECISION)
        else:
            acc = tl.dot(dy, w, acc, input_precision=PRECISION)
        dy_at += BN
        v_at += BN * (K // 2)
        p_row += BN * stride_p
    if TRANSPOSED:
        acc = tl.trans(acc)
    return acc


@triton.jit
def grad_input(
    DY, V, P, C, DX,
    M, N, K, stride_ym, stride_p, stride_c,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    HAS_COLUMNS: tl.constexpr, EVEN: tl.constexpr, WORDS: tl.constexpr, COLUMN_WORDS: tl.constexpr,
    TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr, GROUP: tl.constexpr = 8,
):  # fmt: skip
    """``DX [M, K] = DY [M, N] W``; with HAS_COLUMNS, only values of W kept by the mask ``C uint8 [N, ceil(K / 16)]``.

    TRANSPOSED computes ``W^T DY^T``, because the compiler fails on the other form for float32 on sm_90's tensor cores.
    """
    pm, pk = tile_of(M, K, BM, BK, GROUP)
    rm = pm * BM + tl.arange(0, BM)
    rk = pk * BK + tl.arange(0, BK)
    acc = grad_input_sums(
        DY, V, P, C, rm, pk, M, N, K, stride_ym, stride_p, stride_c,
        BM, BN, BK, HAS_COLUMNS, EVEN, WORDS, COLUMN_WORDS, TRANSPOSED, PRECISION,
    )  # fmt: skip
    mask = (rm < M)[:, None] & (rk < K)[None, :]
    tl.store(DX + rm.to(tl.int64)[:, None] * K + rk[None, :], acc.to(DX.dtype.element_ty), mask=mask)


@triton.jit
def grad_weight_kept(
    DY, X, P, pn, pk, M, N, K, stride_ym, stride_xm, stride_p, DTYPE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """DTYPE ``[BN, BK / 2]``: the kept entries of tile (pn, pk) of ``DY^T X``, picked from the sums in registers."""
    rn = (pn * BN + tl.arange(0, BN)).to(tl.int64)
    rk = (pk * BK + tl.arange(0, BK)).to(tl.int64)
    rb = pk * (BK // 8) + tl.arange(0, BK // 8)
    rm = tl.arange(0, BM).to(tl.int64)
    dy_at = DY + rm[:, None] * stride_ym + rn[None, :]  # [BM, BN]
    x_at = X + rm[:, None] * stride_xm + rk[None, :]  # [BM, BK]
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
    codes = tl.load(P + rn[:, None] * stride_p + rb[None, :], mask=in_tile, other=0)  # [BN, BK / 8]
    return kept(acc.to(DTYPE), nibbles(codes, BN, BK // 4, 2), BN, BK // 4)


@triton.jit
def grad_weight(
    DY, X, P, DV,
    M, N, K, stride_ym, stride_xm, stride_p,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr,
    GROUP: tl.constexpr = 8,
):  # fmt: skip
    """``DV [N, K / 2]``: the kept entries of ``DY^T X [N, K]``, each written once.  The dense product is not stored."""
    pn, pk = tile_of(N, K, BN, BK, GROUP)
    rn = pn * BN + tl.arange(0, BN)
    rv = pk * (BK // 2) + tl.arange(0, BK // 2)
    dv = grad_weight_kept(
        DY, X, P, pn, pk, M, N, K, stride_ym, stride_xm, stride_p, DV.dtype.element_ty, BM, BN, BK, EVEN, PRECISION
    )
    mask = (rn < N)[:, None] & (rv < K // 2)[None, :]
    tl.store(DV + rn.to(tl.int64)[:, None] * (K // 2) + rv[None, :], dv, mask=mask)
