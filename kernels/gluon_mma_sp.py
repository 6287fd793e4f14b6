"""``Y = X W^T`` on the 2:4 sparse tensor cores, sm_80 and later: ``mma.sp`` issued from Gluon's inline assembly.

Importing this module imports Triton: only ``gluon_products`` does, at the first launch.  Storage is that of
``metadata`` (values ``[N, K / 2]`` in the order of their columns, pattern uint8 ``[N, ceil(K / 8)]``); nothing is
repacked: the selectors of the tensor core are made from the pattern's bits in registers.

The tensor core multiplies a sparse left operand, so the product is computed as ``W X^T``.  One instruction,
``mma.sp.m16n8k32``, takes 16 rows of W, 8 tokens and 32 input features; a *step* below.  Two steps make a *block* of
64 features, which is what one word of selectors covers and what is copied to shared memory at a time.

Every operand is a tensor over the same eight dimensions ``[MT, WN, r1, g, NT, WM, t, r0]`` in one :func:`layout`: lane
``4 g + t`` of warp ``(WN, WM)`` holds register ``r0 + 2 r1`` of the instruction ``(MT, NT)``.  These are the fragments
that PTX defines for ``mma.sp.m16n8k32`` with 16-bit operands:

- A, ``[MT, WN, 2, 8, 1, 1, 4, 2]``: the two kept values of a group, the lower half first in the row; row
  ``16 (mt WN + wn) + 8 r0 + g``, group ``t + 4 r1`` of the step.
- B, ``[1, 1, 2, 8, NT, WM, 4, 2]``: two features of a token; token ``8 (nt WM + wm) + g``, features
  ``8 (r0 + 2 r1) + 2 t`` of the step and the next.
- E, ``[MT, WN, 1, 8, 1, 1, 4, 1]``: the selectors of four groups in row ``g`` (bits 0-15) and four in row ``g + 8``
  (bits 16-31): those of features ``16 t`` to ``16 t + 15`` of the block, so that lanes t = 0, 1 serve its first step
  and t = 2, 3 its second.  A group takes four bits, ``i0 | i1 << 2``: its kept positions, in ascending order.
- C, ``[MT, WN, 2, 8, NT, WM, 4, 2]``: the sum of row ``16 (mt WN + wn) + 8 r1 + g`` and token
  ``8 (nt WM + wm) + 2 t + r0``.

An entry of X that meets only pruned weights is never read by the tensor core: where a dense product makes NaN of an
infinite input times a pruned zero, this one does not.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

# Names that changed between Triton 3.6 and 3.9; the old one of the copy is still there in 3.9, and raises.
copy_async = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
barrier = getattr(gl, "barrier", None) or gl.thread_barrier

# Operands, four registers each: $0 the sums, $4 A, $8 B, $12 E (four times the same one), $16 the sums before.
INSTRUCTION = gl.constexpr("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.")
OPERANDS = gl.constexpr(".f32 {$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9,$10,$11}, {$16,$17,$18,$19}, $12, ")
CONSTRAINTS = gl.constexpr("=f,=f,=f,=f,r,r,r,r,r,r,r,r,r,r,r,r,f,f,f,f")


@gluon.constexpr_function
def _bases(rank, fields):
    """Bases of ``fields``: (dimension, first step, size) each, the fastest first."""
    found = []
    for dimension, step, size in fields:
        for bit in range(size.bit_length() - 1):
            found.append([step << bit if d == dimension else 0 for d in range(rank)])
    return found


@gluon.constexpr_function
def layout(MT, WN, NT, WM):
    """Of every operand; r0 and r1 come first, so that four registers in a row are those of one instruction."""
    return gl.DistributedLinearLayout(
        reg_bases=_bases(8, [(7, 1, 2), (2, 1, 2), (4, 1, NT), (0, 1, MT)]),
        lane_bases=_bases(8, [(6, 1, 4), (3, 1, 8)]),
        warp_bases=_bases(8, [(1, 1, WN), (5, 1, WM)]),
        block_bases=[],
        shape=[MT, WN, 2, 8, NT, WM, 4, 2],
    )


@gluon.constexpr_function
def a_layout(MT, WN, WM):
    """How a tile of values, int32 ``[16 MT WN, 16]``, is read from shared memory: A of step 0, then of step 1."""
    return gl.DistributedLinearLayout(
        reg_bases=_bases(2, [(0, 8, 2), (1, 4, 2), (0, 16 * WN, MT), (1, 8, 2)]),
        lane_bases=_bases(2, [(1, 1, 4), (0, 1, 8)]),
        warp_bases=_bases(2, [(0, 16, WN)]) + [[0, 0]] * (WM.bit_length() - 1),
        block_bases=[],
        shape=[16 * MT * WN, 16],
    )


@gluon.constexpr_function
def b_layout(WN, NT, WM):
    """How a tile of tokens, int32 ``[8 NT WM, 32]``, is read from shared memory: B of step 0, then of step 1."""
    return gl.DistributedLinearLayout(
        reg_bases=_bases(2, [(1, 4, 2), (1, 8, 2), (0, 8 * WM, NT), (1, 16, 2)]),
        lane_bases=_bases(2, [(1, 1, 4), (0, 1, 8)]),
        warp_bases=[[0, 0]] * (WN.bit_length() - 1) + _bases(2, [(0, 8, WM)]),
        block_bases=[],
        shape=[8 * NT * WM, 32],
    )


@gluon.constexpr_function
def _slice(L, dimension):
    for d in range(7, -1, -1):
        if d != dimension:
            L = gl.SliceLayout(d, L)
    return L


@gluon.jit
def _axis(size: gl.constexpr, dimension: gl.constexpr, L: gl.constexpr):
    """0 .. size - 1 along one of the eight dimensions."""
    along: gl.constexpr = _slice(L, dimension)
    index = gl.arange(0, size, layout=along)
    for d in gl.static_range(8):
        if d != dimension:
            index = gl.expand_dims(index, d)
    return index


@gluon.jit
def _selectors(bits):
    """``i0 | i1 << 2`` of the eight groups in a word of the pattern; of no bits, past the end, 0 and 2."""
    b0 = bits & 0x11111111
    b1 = (bits >> 1) & 0x11111111
    b2 = (bits >> 2) & 0x11111111
    b3 = (bits >> 3) & 0x11111111
    both = b0 & b1
    # i0 is 0 with b0, else 1 with b1, else 2; i1 is 3 with b3, else 1 with b0 and b1, else 2.
    return (b1 & (b0 ^ 0x11111111)) | ((b2 & b3) << 1) | ((b3 | both) << 2) | ((both ^ 0x11111111) << 3)


@gluon.jit
def _pattern_word(at, in_rows, left, HALVES: gl.constexpr):
    """16 bits of the pattern from ``at``, as int32; ``left`` is how many bytes from there on the row still has."""
    if HALVES:
        return gl.load(at, mask=in_rows & (left > 0), other=0).to(gl.int32) & 0xFFFF
    low = gl.load(at, mask=in_rows & (left > 0), other=0).to(gl.int32)
    high = gl.load(at + 1, mask=in_rows & (left > 1), other=0).to(gl.int32)
    return low | (high << 8)


@gluon.jit
def forward(
    X, V, P, BIAS, Y,
    M, N, K, stride_xm, stride_p, blocks_per_split,
    MT: gl.constexpr, WN: gl.constexpr, NT: gl.constexpr, WM: gl.constexpr, STAGES: gl.constexpr,
    FP16: gl.constexpr, HAS_BIAS: gl.constexpr, HALVES: gl.constexpr, BAND: gl.constexpr = 8,
):  # fmt: skip
    """``Y [M, N] = X [M, K] W^T + BIAS [N]`` of 16-bit operands; one program computes 8 NT WM tokens, 16 MT WN outputs.

    X: int32, pairs of features; rows are ``stride_xm`` elements (not pairs) apart.
    V: int32 ``[N, K / 4]``, the kept values of a group each.
    P: pattern, rows ``stride_p`` bytes apart; int16 with HALVES (``stride_p`` is even), else uint8.
    Y: ``[M, N]``; or float32 ``[splits, M, N]``, where program (_, s) adds up its ``blocks_per_split`` blocks only.
    The tensors lie at multiples of 4 bytes, those of 16 bits or less at multiples of their element.
    """
    BN: gl.constexpr = 16 * MT * WN
    BM: gl.constexpr = 8 * NT * WM
    WARPS: gl.constexpr = WN * WM
    L: gl.constexpr = layout(MT, WN, NT, WM)
    MMA: gl.constexpr = INSTRUCTION + ("f16.f16" if FP16 else "bf16.bf16") + OPERANDS

    # Bands of BAND tiles along N, so that programs that run together share what they read.
    tiles_m = gl.cdiv(M, BM)
    tiles_n = gl.cdiv(N, BN)
    first_n = gl.program_id(0) // (BAND * tiles_m) * BAND
    height = gl.minimum(tiles_n - first_n, BAND)
    pn = first_n + gl.program_id(0) % (BAND * tiles_m) % height
    pm = gl.program_id(0) % (BAND * tiles_m) // height
    first = gl.program_id(1) * blocks_per_split
    blocks = gl.minimum(gl.cdiv(K, 64) - first, blocks_per_split)

    # Tiles go through rings of STAGES in shared memory.  The 16-byte pieces of a row are swizzled, so that ldmatrix
    # meets no bank twice in eight rows.
    X_FROM: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [WARPS, 1], [1, 0])
    V_FROM: gl.constexpr = gl.BlockedLayout([1, 4], [8, 4], [WARPS, 1], [1, 0])
    x_ring = gl.allocate_shared_memory(gl.int32, [STAGES, BM, 32], gl.SwizzledSharedLayout(4, 1, 8, order=[1, 0]))
    v_ring = gl.allocate_shared_memory(gl.int32, [STAGES, BN, 16], gl.SwizzledSharedLayout(4, 2, 4, order=[1, 0]))
    x_row = pm * BM + gl.arange(0, BM, layout=gl.SliceLayout(1, X_FROM))
    x_word = gl.arange(0, 32, layout=gl.SliceLayout(0, X_FROM))
    v_row = pn * BN + gl.arange(0, BN, layout=gl.SliceLayout(1, V_FROM))
    v_word = gl.arange(0, 16, layout=gl.SliceLayout(0, V_FROM))
    x_at = X + x_row.to(gl.int64)[:, None] * (stride_xm // 2) + (first * 32 + x_word)[None, :]
    v_at = V + v_row.to(gl.int64)[:, None] * (K // 4) + (first * 16 + v_word)[None, :]
    in_x = (x_row < M)[:, None]
    in_v = (v_row < N)[:, None]

    mt = _axis(MT, 0, L)
    wn = _axis(WN, 1, L)
    g = _axis(8, 3, L)
    t = _axis(4, 6, L)
    p_row = pn * BN + 16 * (mt * WN + wn) + g
    in_p = p_row < N
    in_q = p_row + 8 < N
    PER: gl.constexpr = 2 if HALVES else 1
    p_at = P + p_row.to(gl.int64) * (stride_p // PER) + (first * 8 + 2 * t) // PER
    q_at = p_at + 8 * (stride_p // PER)

    # Masked elements are filled with zeros, in rows past the end and past K alike.
    for i in gl.static_range(STAGES - 1):
        k = first + i
        copy_async(x_ring.index(i), x_at + i * 32, mask=in_x & (x_word < K // 2 - k * 32)[None, :] & (i < blocks))
        copy_async(v_ring.index(i), v_at + i * 16, mask=in_v & (v_word < K // 4 - k * 16)[None, :] & (i < blocks))
        async_copy.commit_group()
    x_at += (STAGES - 1) * 32
    v_at += (STAGES - 1) * 16
    left = stride_p - first * 8 - 2 * t
    p = _pattern_word(p_at, in_p, left, HALVES)
    q = _pattern_word(q_at, in_q, left, HALVES)

    acc = gl.zeros([MT, WN, 2, 8, NT, WM, 4, 2], gl.float32, L)
    gl.assume(blocks > 0)
    stage = 0
    for i in range(0, blocks):
        async_copy.wait_group(STAGES - 2)
        # What every thread has copied is visible to all now, and nobody reads the stage before this one any more.
        barrier()
        into = gl.where(stage == 0, STAGES - 1, stage - 1)
        ahead = first + i + STAGES - 1
        more = i + STAGES - 1 < blocks
        copy_async(x_ring.index(into), x_at, mask=in_x & (x_word < K // 2 - ahead * 32)[None, :] & more)
        copy_async(v_ring.index(into), v_at, mask=in_v & (v_word < K // 4 - ahead * 16)[None, :] & more)
        async_copy.commit_group()
        x_at += 32
        v_at += 16

        e = _selectors(p | (q << 16))
        p_at += 8 // PER
        q_at += 8 // PER
        left -= 8
        p = _pattern_word(p_at, in_p, left, HALVES)
        q = _pattern_word(q_at, in_q, left, HALVES)

        a = v_ring.index(stage).load(a_layout(MT, WN, WM)).reshape([MT, WN, 2, 8, 2, 2, 4])  # mt wn r0 g step r1 t
        a0, a1 = gl.split(gl.permute(a, (0, 1, 5, 3, 6, 2, 4)))
        a0 = gl.convert_layout(a0.reshape([MT, WN, 2, 8, 1, 1, 4, 2]), L, assert_trivial=True)
        a1 = gl.convert_layout(a1.reshape([MT, WN, 2, 8, 1, 1, 4, 2]), L, assert_trivial=True)
        b = x_ring.index(stage).load(b_layout(WN, NT, WM)).reshape([NT, WM, 8, 2, 2, 2, 4])  # nt wm g step r1 r0 t
        b0, b1 = gl.split(gl.permute(b, (4, 2, 0, 1, 6, 5, 3)))
        b0 = gl.convert_layout(b0.reshape([1, 1, 2, 8, NT, WM, 4, 2]), L, assert_trivial=True)
        b1 = gl.convert_layout(b1.reshape([1, 1, 2, 8, NT, WM, 4, 2]), L, assert_trivial=True)
        # The last operand says whose selectors count: those of lanes t = 0, 1 or t = 2, 3.
        acc = gl.inline_asm_elementwise(
            MMA + "0x0;", CONSTRAINTS, [a0, b0, e, acc], dtype=gl.float32, is_pure=True, pack=4
        )
        acc = gl.inline_asm_elementwise(
            MMA + "0x1;", CONSTRAINTS, [a1, b1, e, acc], dtype=gl.float32, is_pure=True, pack=4
        )
        stage = gl.where(stage == STAGES - 1, 0, stage + 1)
    # Copies still under way write zeros into the rings, whose memory is used anew below.
    async_copy.wait_group(0)
    barrier()

    if HAS_BIAS:
        r1 = _axis(2, 2, L)
        out = pn * BN + 16 * (mt * WN + wn) + 8 * r1 + _axis(8, 3, L)
        acc += gl.load(BIAS + out, mask=out < N, other=0.0).to(gl.float32)
    # As [nt, wm, t, r0] x [mt, wn, r1, g], then through shared memory to rows that a warp writes in one piece.
    ACROSS: gl.constexpr = 16 if BN >= 128 else BN // 8
    OUT: gl.constexpr = gl.BlockedLayout([1, 8], [32 // ACROSS, ACROSS], [WARPS, 1], [1, 0])
    y = gl.permute(acc.to(Y.dtype.element_ty), (4, 5, 6, 7, 0, 1, 2, 3)).reshape([BM, BN])
    y = gl.convert_layout(y, OUT)
    y_row = pm * BM + gl.arange(0, BM, layout=gl.SliceLayout(1, OUT))
    y_column = pn * BN + gl.arange(0, BN, layout=gl.SliceLayout(0, OUT))
    y_at = Y + (gl.program_id(1).to(gl.int64) * M + y_row)[:, None] * N + y_column[None, :]
    gl.store(y_at, y, mask=(y_row < M)[:, None] & (y_column < N)[None, :])


@gluon.jit
def add_up(PARTS, BIAS, Y, count, N, SPLITS, HAS_BIAS: gl.constexpr, BLOCK: gl.constexpr = 512):
    """``Y [count] = sum of PARTS float32 [SPLITS, count] + BIAS [N]`` of ``count = M N`` entries, in a fixed order."""
    L: gl.constexpr = gl.BlockedLayout([4], [32], [4], [0])
    at = gl.program_id(0).to(gl.int64) * BLOCK + gl.arange(0, BLOCK, layout=L)
    inside = at < count
    acc = gl.zeros([BLOCK], gl.float32, L)
    parts = PARTS + at
    for _ in range(0, SPLITS):
        acc += gl.load(parts, mask=inside, other=0.0)
        parts += count
    if HAS_BIAS:
        acc += gl.load(BIAS + at % N, mask=inside, other=0.0).to(gl.float32)
    gl.store(Y + at, acc.to(Y.dtype.element_ty), mask=inside)
