"""``Y = X W^T`` for up to eight tokens, on sm_80 and later.  Reading W is the bottleneck; tensor cores are not used.

Importing this module imports Triton, so only ``few_tokens`` imports it, at the first launch.  Weights are stored as
``metadata`` describes.  Each entry is read once, directly to registers.  The loop uses no shared memory and no barrier,
so that the loads of many warps are in flight at a time.

A lane holds EACH neighbouring groups of four features: the two kept values and the pattern of each group for ROWS / WN
outputs, and the four entries of each group for all tokens.  The pattern's bits select two of the four entries; nothing
is multiplied by zero.  As in ``gluon_mma_sp``, an entry of X that meets only pruned weights therefore never enters a
sum.  Sums are float32.  Each lane has its own, and they are added up at the end in an order that does not depend on the
data.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

__all__ = ["forward"]


@gluon.constexpr_function
def _layout(TOKENS, EACH, WN, WK):
    """Layout of ``[tokens, outputs, groups]``: tokens in a lane, outputs along WN warps, groups along lanes and WK
    warps."""
    return gl.BlockedLayout([TOKENS, 1, EACH], [1, 1, 32], [1, WN, WK], [2, 1, 0])


@gluon.constexpr_function
def _pattern_layout(EACH, WN, WK):
    """Layout of ``[outputs, words of a pattern, groups of a word]``: one word per lane."""
    return gl.BlockedLayout([1, 1, EACH], [1, 32, 1], [WN, WK, 1], [2, 1, 0])


@gluon.jit
def _number(bits, FP16: gl.constexpr, HIGH: gl.constexpr):
    """The lower or (HIGH) upper 16 bits of an int32, a float16 or bfloat16 number, as float32."""
    if FP16:
        half = (bits >> 16) if HIGH else bits
        return half.to(gl.int16).to(gl.float16, bitcast=True).to(gl.float32)
    word = (bits & -65536) if HIGH else (bits << 16)
    return word.to(gl.float32, bitcast=True)


@gluon.jit
def forward(
    X, V, P, BIAS, Y,
    M, N, groups, stride_x, stride_p,
    TOKENS: gl.constexpr, ROWS: gl.constexpr, EACH: gl.constexpr, WN: gl.constexpr, WK: gl.constexpr,
    FP16: gl.constexpr, HAS_BIAS: gl.constexpr,
):  # fmt: skip
    """``Y [M, N] = X [M, K] W^T + BIAS [N]`` of 16-bit operands, M at most TOKENS; a program has ROWS outputs.

    X: int64, each a group of four features; rows are ``stride_x`` groups apart.
    V: int32 ``[N, groups]``, each the two kept values of a group.
    P: the pattern as words of EACH groups (int16 for 4, int32 for 8); rows are ``stride_p`` words apart.
    """
    L: gl.constexpr = _layout(TOKENS, EACH, WN, WK)
    LP: gl.constexpr = _pattern_layout(EACH, WN, WK)
    WEIGHT: gl.constexpr = gl.SliceLayout(0, L)
    INPUT: gl.constexpr = gl.SliceLayout(1, L)
    STEP: gl.constexpr = 32 * EACH * WK
    token = gl.arange(0, TOKENS, layout=gl.SliceLayout(1, INPUT))
    row = gl.program_id(0) * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, WEIGHT))
    group = gl.arange(0, STEP, layout=gl.SliceLayout(0, WEIGHT))
    x_group = gl.arange(0, STEP, layout=gl.SliceLayout(0, INPUT))
    p_row = gl.program_id(0) * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, gl.SliceLayout(2, LP)))
    p_word = gl.arange(0, STEP // EACH, layout=gl.SliceLayout(0, gl.SliceLayout(2, LP)))
    p_bits = 4 * gl.arange(0, EACH, layout=gl.SliceLayout(0, gl.SliceLayout(1, LP)))
    x_at = X + token.to(gl.int64)[:, None] * stride_x + x_group[None, :]
    v_at = V + row.to(gl.int64)[:, None] * groups + group[None, :]
    p_at = P + p_row.to(gl.int64)[:, None] * stride_p + p_word[None, :]
    in_m = (token < M)[:, None]
    in_n = (row < N)[:, None]
    in_p = (p_row < N)[:, None]

    acc = gl.zeros([TOKENS, ROWS, STEP], gl.float32, L)
    gl.assume(groups > 0)
    for k in range(0, groups, STEP):
        v = gl.load(v_at, mask=in_n & (group < groups - k)[None, :], other=0)
        words = gl.load(p_at, mask=in_p & (p_word * EACH < groups - k)[None, :], other=0).to(gl.int32)
        x = gl.load(x_at, mask=in_m & (x_group < groups - k)[None, :], other=0)
        v_at += STEP
        p_at += STEP // EACH
        x_at += STEP
        # [ROWS, STEP / EACH, EACH] -> [ROWS, STEP]
        code = (words[:, :, None] >> p_bits[None, None, :]).reshape([ROWS, STEP])
        code = gl.convert_layout(code, WEIGHT, assert_trivial=True)
        lower = x.to(gl.int32)
        upper = (x >> 32).to(gl.int32)
        x0 = _number(lower, FP16, False)[:, None, :]
        x1 = _number(lower, FP16, True)[:, None, :]
        x2 = _number(upper, FP16, False)[:, None, :]
        x3 = _number(upper, FP16, True)[:, None, :]
        b0 = ((code & 1) != 0)[None, :, :]
        b1 = ((code & 2) != 0)[None, :, :]
        b2 = ((code & 4) != 0)[None, :, :]
        b3 = ((code & 8) != 0)[None, :, :]
        # Two are kept.  The first is 0 if b0 is set, else 1 if b1 is, else 2; the second is 3, else 2, else 1.
        acc += gl.where(b0, x0, gl.where(b1, x1, x2)) * _number(v, FP16, False)[None, :, :]
        acc += gl.where(b3, x3, gl.where(b2, x2, x1)) * _number(v, FP16, True)[None, :, :]
    y = gl.sum(acc, 2)  # [TOKENS, ROWS]
    OUT: gl.constexpr = gl.SliceLayout(2, L)
    m = gl.arange(0, TOKENS, layout=gl.SliceLayout(1, OUT))
    n = gl.program_id(0) * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(0, OUT))
    if HAS_BIAS:
        y += gl.load(BIAS + n, mask=n < N, other=0.0).to(gl.float32)[None, :]
    at = Y + m.to(gl.int64)[:, None] * N + n[None, :]
    gl.store(at, y.to(Y.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])
