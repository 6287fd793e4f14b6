"""``Y = X W^T`` on the 2:4 sparse tensor cores, sm_80 and later: ``mma.sp`` issued from Gluon's inline assembly.

Importing this module imports Triton, so only ``gluon_products`` imports it, at the first launch.  Weights are stored
as ``metadata`` describes (values ``[N, K / 2]`` in the order of their columns, pattern uint8 ``[N, ceil(K / 8)]``).
Nothing is repacked: the kernel makes the tensor core's selectors from the pattern's bits in registers.
``gluon_fragments`` defines which lane holds what.

The tensor core never reads an entry of X that meets only pruned weights.  A dense product gives NaN where an infinite
input meets a pruned zero; this product does not.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from slope_compile.kernels._gluon import barrier, commit_copies, copy_async, wait_for_copies
from slope_compile.kernels.gluon_fragments import (
    _bases,
    axis,
    bias_of_tile,
    layout,
    pattern_of_block,
    pattern_word,
    selectors,
    store_tile,
    tile_of_program,
    values_of_block,
)

# Operands, four registers each: $0 the new sums, $4 A, $8 B, $12 E (the same word four times), $16 the old sums.
SPARSE = gl.constexpr("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.")
SPARSE_OPERANDS = gl.constexpr(".f32 {$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9,$10,$11}, {$16,$17,$18,$19}, $12, ")
SPARSE_CONSTRAINTS = gl.constexpr("=f,=f,=f,=f,r,r,r,r,r,r,r,r,r,r,r,r,f,f,f,f")
# Operands: $0 the new sums, $4 A, $8 B of two steps of 16 features, $12 the old sums.
DENSE = gl.constexpr("mma.sync.aligned.m16n8k16.row.col.f32.")
DENSE_FIRST = gl.constexpr(".f32 {$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$12,$13,$14,$15};")
DENSE_SECOND = gl.constexpr(".f32 {$0,$1,$2,$3}, {$4,$5,$6,$7}, {$10,$11}, {$12,$13,$14,$15};")
DENSE_CONSTRAINTS = gl.constexpr("=f,=f,=f,=f,r,r,r,r,r,r,r,r,f,f,f,f")


@gluon.constexpr_function
def _b_layout(WN, NT, WM):
    """Layout to read a tile of tokens, int32 ``[8 NT WM, 32]``, from shared memory: B of step 0, then of step 1."""
    return gl.DistributedLinearLayout(
        reg_bases=_bases(2, [(1, 4, 2), (1, 8, 2), (0, 8 * WM, NT), (1, 16, 2)]),
        lane_bases=_bases(2, [(1, 1, 4), (0, 1, 8)]),
        warp_bases=[[0, 0]] * (WN.bit_length() - 1) + _bases(2, [(0, 8, WM)]),
        block_bases=[],
        shape=[8 * NT * WM, 32],
    )


@gluon.jit
def _copy_block(
    x_ring, v_ring, stage, X, V, x_at, v_at, x_word, v_word, in_x, in_v, block, wanted, K,
):  # fmt: skip
    """Start copying a block's tokens and values to a stage.

    X, V: pointers to the block in the tile's first row; ``x_at`` and ``v_at`` are the offsets of the tile's rows.
    in_x, in_v: rows that exist.  Masked copies write zeros, for rows past the end as well as for features past K.
    """
    of_x = in_x & (x_word < K // 2 - block * 32)[None, :] & wanted
    of_v = in_v & (v_word < K // 4 - block * 16)[None, :] & wanted
    copy_async(x_ring.index(stage), X + x_at + x_word[None, :], mask=of_x)
    copy_async(v_ring.index(stage), V + v_at + v_word[None, :], mask=of_v)


@gluon.jit
def _multiply(
    acc, x_ring, v_ring, stage, e,
    MT: gl.constexpr, WN: gl.constexpr, NT: gl.constexpr, WM: gl.constexpr, FP16: gl.constexpr, L: gl.constexpr,
):  # fmt: skip
    """``acc`` plus the product of a block in shared memory, with selectors E."""
    MMA: gl.constexpr = SPARSE + ("f16.f16" if FP16 else "bf16.bf16") + SPARSE_OPERANDS
    a0, a1 = values_of_block(v_ring.index(stage), MT, WN, WM, L)
    b = x_ring.index(stage).load(_b_layout(WN, NT, WM)).reshape([NT, WM, 8, 2, 2, 2, 4])  # nt wm g step r1 r0 t
    b0, b1 = gl.split(gl.permute(b, (4, 2, 0, 1, 6, 5, 3)))
    b0 = gl.convert_layout(b0.reshape([1, 1, 2, 8, NT, WM, 4, 2]), L, assert_trivial=True)
    b1 = gl.convert_layout(b1.reshape([1, 1, 2, 8, NT, WM, 4, 2]), L, assert_trivial=True)
    # The last operand chooses the lanes that supply the selectors: t = 0, 1 or t = 2, 3.
    acc = gl.inline_asm_elementwise(
        MMA + "0x0;", SPARSE_CONSTRAINTS, [a0, b0, e, acc], dtype=gl.float32, is_pure=True, pack=4
    )
    return gl.inline_asm_elementwise(
        MMA + "0x1;", SPARSE_CONSTRAINTS, [a1, b1, e, acc], dtype=gl.float32, is_pure=True, pack=4
    )


@gluon.jit
def _sparse_sums(
    X, V, P, row, pm, pn, first, blocks, M, N, K, stride_xm, stride_p,
    MT: gl.constexpr, WN: gl.constexpr, NT: gl.constexpr, WM: gl.constexpr, STAGES: gl.constexpr,
    FP16: gl.constexpr, PIECE: gl.constexpr, L: gl.constexpr,
):  # fmt: skip
    """``X W^T`` of tile (pm, pn) over ``blocks`` blocks from ``first`` on, as C; ``row``: A's row g in the tile."""
    BN: gl.constexpr = 16 * MT * WN
    BM: gl.constexpr = 8 * NT * WM
    WARPS: gl.constexpr = WN * WM
    # Tiles go through rings of STAGES stages in shared memory.  The 16-byte pieces of a row are swizzled, so that
    # ldmatrix has no bank conflicts within eight rows.
    X_FROM: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [WARPS, 1], [1, 0])
    V_FROM: gl.constexpr = gl.BlockedLayout([1, 4], [8, 4], [WARPS, 1], [1, 0])
    x_ring = gl.allocate_shared_memory(gl.int32, [STAGES, BM, 32], gl.SwizzledSharedLayout(4, 1, 8, order=[1, 0]))
    v_ring = gl.allocate_shared_memory(gl.int32, [STAGES, BN, 16], gl.SwizzledSharedLayout(4, 2, 4, order=[1, 0]))
    x_row = gl.arange(0, BM, layout=gl.SliceLayout(1, X_FROM))
    x_word = gl.arange(0, 32, layout=gl.SliceLayout(0, X_FROM))
    v_row = gl.arange(0, BN, layout=gl.SliceLayout(1, V_FROM))
    v_word = gl.arange(0, 16, layout=gl.SliceLayout(0, V_FROM))
    # The rows of a tile are 32-bit offsets from one moving pointer: half as many registers as a pointer for each row.
    X += (pm * BM).to(gl.int64) * (stride_xm // 2) + first * 32
    V += (pn * BN).to(gl.int64) * (K // 4) + first * 16
    x_at = (x_row * (stride_xm // 2))[:, None]
    v_at = (v_row * (K // 4))[:, None]
    in_x = (x_row < M - pm * BM)[:, None]
    in_v = (v_row < N - pn * BN)[:, None]

    t = axis(4, 6, L)
    p_row = pn * BN + row
    P += (pn * BN).to(gl.int64) * (stride_p // PIECE) + first * 8 // PIECE
    if PIECE == 8:
        P_FROM: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
        p_ring = gl.allocate_shared_memory(gl.int64, [STAGES, BN], gl.SwizzledSharedLayout(1, 1, 1, order=[0]))
        p_of = gl.arange(0, BN, layout=P_FROM)
        p_at = p_of * (stride_p // 8)
        in_p = p_of < N - pn * BN
    else:
        Q = P + 8 * (stride_p // PIECE)
        p_at = row * (stride_p // PIECE) + 2 * t // PIECE
        in_p = p_row < N
        in_q = p_row + 8 < N

    for i in range(0, STAGES - 1):  # not unrolled: that would run out of registers
        more = i < blocks
        _copy_block(x_ring, v_ring, i, X, V, x_at, v_at, x_word, v_word, in_x, in_v, first + i, more, K)
        if PIECE == 8:
            copy_async(p_ring.index(i), P + p_at, mask=in_p & more)
            P += 1
        commit_copies()
        X += 32
        V += 16
    if PIECE < 8:
        left = stride_p - first * 8 - 2 * t
        p = pattern_word(P + p_at, in_p, left, PIECE)
        q = pattern_word(Q + p_at, in_q, left, PIECE)

    acc = gl.zeros([MT, WN, 2, 8, NT, WM, 4, 2], gl.float32, L)
    gl.assume(blocks > 0)
    stage = 0
    for i in range(0, blocks):
        wait_for_copies(STAGES - 2)
        # Now every thread sees the copies of all threads, and no thread reads the previous stage any more.
        barrier()
        into = gl.where(stage == 0, STAGES - 1, stage - 1)
        ahead = first + i + STAGES - 1
        more = i + STAGES - 1 < blocks
        _copy_block(x_ring, v_ring, into, X, V, x_at, v_at, x_word, v_word, in_x, in_v, ahead, more, K)
        if PIECE == 8:
            copy_async(p_ring.index(into), P + p_at, mask=in_p & more)
            P += 1
        commit_copies()
        X += 32
        V += 16

        if PIECE == 8:
            p, q = pattern_of_block(p_ring.index(stage), MT, WN, WM, L)
        e = selectors(p, q)
        if PIECE < 8:
            P += 8 // PIECE
            Q += 8 // PIECE
            left -= 8
            p = pattern_word(P + p_at, in_p, left, PIECE)
            q = pattern_word(Q + p_at, in_q, left, PIECE)
        acc = _multiply(acc, x_ring, v_ring, stage, e, MT, WN, NT, WM, FP16, L)
        stage = gl.where(stage == STAGES - 1, 0, stage + 1)
    # The last copies still write zeros into the rings; their memory is reused afterwards.
    wait_for_copies(0)
    barrier()
    return acc


@gluon.jit
def _add_low_rank(
    acc, T, B, first_row, token, row_end, token_end, R, steps,
    FP16: gl.constexpr, L: gl.constexpr,
):  # fmt: skip
    """``acc + B T^T`` over ``steps`` steps of 32 features.  T, B, rows and tokens are counted from the tile's first."""
    TYPES: gl.constexpr = "f16.f16" if FP16 else "bf16.bf16"
    r1 = axis(2, 2, L)
    t = axis(4, 6, L)
    r0 = axis(2, 7, L)
    row = first_row + 8 * r0
    a_word = t + 4 * r1
    b_word = t + 4 * (r0 + 2 * r1)
    # 32-bit offsets take half as many registers as pointers.
    a_at = row * (R // 2) + a_word
    b_at = token * (R // 2) + b_word
    for i in range(0, steps):
        left = R // 2 - 16 * i
        first = gl.load(B + a_at, mask=(row < row_end) & (a_word < left), other=0)
        second = gl.load(B + a_at + 8, mask=(row < row_end) & (a_word + 8 < left), other=0)
        b = gl.load(T + b_at, mask=(token < token_end) & (b_word < left), other=0)
        acc = gl.inline_asm_elementwise(
            DENSE + TYPES + DENSE_FIRST, DENSE_CONSTRAINTS, [first, b, acc], dtype=gl.float32, is_pure=True, pack=4
        )
        acc = gl.inline_asm_elementwise(
            DENSE + TYPES + DENSE_SECOND, DENSE_CONSTRAINTS, [second, b, acc], dtype=gl.float32, is_pure=True, pack=4
        )
        B += 16
        T += 16
    return acc


@gluon.jit
def forward(
    X, V, P, T, B, BIAS, Y,
    M, N, K, R, stride_xm, stride_p, blocks_per_split,
    MT: gl.constexpr, WN: gl.constexpr, NT: gl.constexpr, WM: gl.constexpr, STAGES: gl.constexpr,
    FP16: gl.constexpr, HAS_BIAS: gl.constexpr, HAS_LOW_RANK: gl.constexpr, PIECE: gl.constexpr,
    BAND: gl.constexpr = 8,
):  # fmt: skip
    """``Y [M, N] = X [M, K] W^T + T B^T + BIAS [N]`` of 16-bit operands; tiles of 8 NT WM tokens and 16 MT WN outputs.

    X: int32, each a pair of features; rows are ``stride_xm`` elements (not pairs) apart.
    V: int32 ``[N, K / 4]``, each the two kept values of a group.
    P: the pattern as integers of PIECE bytes; rows are ``stride_p`` bytes apart, a multiple of PIECE.  With PIECE = 8
        the pattern is copied to shared memory as early as the values.  With 2 or 1 each thread loads its own bits, one
        block ahead.
    T, B: int32 ``[M, R / 2]``, ``[N, R / 2]``, read with HAS_LOW_RANK only.
    Y: ``[M, N]``, or float32 ``[splits, M, N]``: program (_, s) then sums ``blocks_per_split`` blocks of its own, and
        program (_, 0) adds T B^T.
    32-bit tensors begin at multiples of 4 bytes, the others at multiples of their element size.
    """
    BN: gl.constexpr = 16 * MT * WN
    BM: gl.constexpr = 8 * NT * WM
    WARPS: gl.constexpr = WN * WM
    L: gl.constexpr = layout(MT, WN, NT, WM)
    pn, pm = tile_of_program(M, N, BM, BN, BAND)
    first = gl.program_id(1) * blocks_per_split
    blocks = gl.minimum(gl.cdiv(K, 64) - first, blocks_per_split)
    row = 16 * (axis(MT, 0, L) * WN + axis(WN, 1, L)) + axis(8, 3, L)
    acc = _sparse_sums(
        X, V, P, row, pm, pn, first, blocks, M, N, K, stride_xm, stride_p,
        MT, WN, NT, WM, STAGES, FP16, PIECE, L,
    )  # fmt: skip
    if HAS_LOW_RANK:
        token = 8 * (axis(NT, 4, L) * WM + axis(WM, 5, L)) + axis(8, 3, L)
        steps = gl.where(gl.program_id(1) == 0, gl.cdiv(R, 32), 0)
        t_tile = T + (pm * BM).to(gl.int64) * (R // 2)
        b_tile = B + (pn * BN).to(gl.int64) * (R // 2)
        acc = _add_low_rank(acc, t_tile, b_tile, row, token, N - pn * BN, M - pm * BM, R, steps, FP16, L)
    if HAS_BIAS:
        acc += bias_of_tile(BIAS, pn * BN + row, N, L)
    store_tile(acc, Y, gl.program_id(1).to(gl.int64) * M, pm, pn, M, N, BM, BN, WARPS)


@gluon.jit
def add_up(PARTS, BIAS, Y, count, N, SPLITS, HAS_BIAS: gl.constexpr, BLOCK: gl.constexpr = 512):
    """``Y [count] = sum of PARTS float32 [SPLITS, count] + BIAS [N]``, ``count = M N``; the order of sums is fixed."""
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
