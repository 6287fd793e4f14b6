"""``Y = X W^T`` on the 2:4 sparse tensor cores of sm_90: ``wgmma.mma_async.sp`` issued from Gluon's inline assembly.

Importing this module imports Triton, so only ``gluon_products`` imports it, at the first launch.  Weights are stored
as ``metadata`` describes and read without repacking.  The tensor memory accelerator (TMA) copies values and tokens to
rings in shared memory; ``ldmatrix`` then reads the values into registers.  The selectors are made from the pattern's
bits in registers.  ``gluon_fragments`` defines which lane holds what.  The note on entries of X in ``gluon_mma_sp``
applies here too.

The assembly relies on two things that Triton does not promise: that the ring of tokens begins where shared memory does
(PTX symbol ``global_smem``), and that ptxas keeps the instructions asynchronous.  ``gluon_builds`` therefore checks
every build before it is used.

The kernel goes through blocks of 64 features.  One group of instructions is always in flight:

1. Wait on the stage's mbarrier until its copies have arrived.  Read its values.
2. Issue the block's instructions as one group.  Wait for the group of the *previous* block.
3. Synchronize all threads.  No thread reads the previous block's stage any more: its values were read before its group
   was issued, and its tokens by that group.  Refill the stage.

The fragments of a block must stay in their registers while its group is in flight, so the loop is unrolled by two and
blocks alternate between two sets of registers.  The number of blocks is even; the TMA fills a block past the end with
zeros.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from slope_compile.kernels._gluon import (
    barrier,
    commit_copies,
    copy_async,
    fence_async_shared,
    load_tile,
    mbarrier,
    tiles,
    wait_for_copies,
)
from slope_compile.kernels.gluon_fragments import (
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

__all__ = ["forward", "tiles"]


@gluon.constexpr_function
def _group(multiplications, address):
    """PTX of a group of asynchronous instructions.

    multiplications: for each step, the instructions as text; they may use the matrix descriptor ``tile``.
    address: the operand with the offset in bytes of B's stage ``[BM, 128 bytes]`` in the ring.

    ``tile`` describes B in shared memory: its address in units of 16 bytes, 1024 bytes from eight tokens to the next
    eight, and the swizzle of 128 bytes.  A stage holds 64 features in 8 units, so a step advances the address by 8
    units over the number of steps.
    """
    text = [
        "{", ".reg .b32 at, low, high;", ".reg .b64 tile;",
        "mov.u32 at, global_smem;", f"add.u32 at, at, {address};",
        "shr.u32 low, at, 4;", "and.b32 low, low, 0x3fff;", "mov.u32 high, 0x40000040;",
        "wgmma.fence.sync.aligned;",
    ]  # fmt: skip
    units = 8 // len(multiplications)
    for step in multiplications:
        text += ["mov.b64 tile, {low, high};", *step, f"add.u32 low, low, {units};"]
    return "\n".join([*text, "wgmma.commit_group.sync.aligned;"])


@gluon.constexpr_function
def _registers(first, count):
    return "{" + ", ".join(f"${first + i}" for i in range(count)) + "}"


@gluon.constexpr_function
def _sparse_group(MT, NT, FP16):
    """PTX of a block, two steps.  Operands, each MT times 4 NT registers: sums, A of each step, E, the address of B."""
    Q = 4 * NT
    P = MT * Q
    kind = f"m64n{8 * NT}k32.f32." + ("f16.f16" if FP16 else "bf16.bf16")
    steps = []
    for step in range(2):
        instructions = []
        for mt in range(MT):
            sums, a, e = _registers(mt * Q, Q), _registers(P * (1 + step) + mt * Q, 4), f"${3 * P + mt * Q}"
            # After E: the lanes that supply the selectors (0: t = 0, 1; 1: t = 2, 3), accumulate, no negated operand
            # (twice), B with K contiguous.
            instructions.append(f"wgmma.mma_async.sp.sync.aligned.{kind} {sums}, {a}, tile, {e}, {step}, 1, 1, 1, 0;")
        steps.append(instructions)
    return _group(steps, f"${4 * P}") + "\nwgmma.wait_group.sync.aligned 1;\n}"


@gluon.constexpr_function
def _dense_group(MT, NT, FP16):
    """PTX of 64 features of a dense product, four steps.  Operands: sums, A of each step, the address of B."""
    Q = 4 * NT
    P = MT * Q
    kind = f"m64n{8 * NT}k16.f32." + ("f16.f16" if FP16 else "bf16.bf16")
    steps = []
    for step in range(4):
        instructions = []
        for mt in range(MT):
            sums, a = _registers(mt * Q, Q), _registers(P * (1 + step) + mt * Q, 4)
            instructions.append(f"wgmma.mma_async.sync.aligned.{kind} {sums}, {a}, tile, 1, 1, 1, 0;")
        steps.append(instructions)
    return _group(steps, f"${5 * P}") + "\nwgmma.wait_group.sync.aligned 0;\n}"


@gluon.constexpr_function
def _constraints(P, inputs):
    """Constraints of P new sums, ``inputs`` operands of P registers each, and the old sums in the same registers."""
    return ",".join(["=f"] * P + ["r"] * (P * inputs) + [str(i) for i in range(P)])


@gluon.jit
def _address(stage, BM: gl.constexpr, L: gl.constexpr, WN: gl.constexpr):
    """Offset of a stage in the ring of tokens, in bytes, in every lane."""
    return gl.zeros([1, WN, 1, 8, 1, 1, 4, 1], gl.int32, L) + stage * (BM * 128)


@gluon.jit
def _multiply(
    acc, ready, v_ring, p_ring, p, q, stage, phase,
    MT: gl.constexpr, WN: gl.constexpr, NT: gl.constexpr, STAGES: gl.constexpr,
    FP16: gl.constexpr, PIECE: gl.constexpr, L: gl.constexpr,
):  # fmt: skip
    """Wait for a stage's copies, issue its block's group of instructions and wait for the previous group.

    p, q: the block's pattern.  With PIECE = 8 it is read from its ring instead, and the next block's is waited for.
    """
    mbarrier.wait(ready.index(stage), phase)
    if PIECE == 8:
        p, q = pattern_of_block(p_ring.index(stage), MT, WN, 1, L)
    a0, a1 = values_of_block(v_ring.index(stage), MT, WN, 1, L)
    e = selectors(p, q)
    PACK: gl.constexpr = 4 * NT * MT
    TEXT: gl.constexpr = _sparse_group(MT, NT, FP16)
    REGISTERS: gl.constexpr = _constraints(PACK, 4)
    at = _address(stage, 8 * NT, L, WN)
    acc = gl.inline_asm_elementwise(TEXT, REGISTERS, [a0, a1, e, at, acc], dtype=gl.float32, is_pure=False, pack=PACK)
    if PIECE == 8:
        wait_for_copies(STAGES - 3)
    return acc


@gluon.jit
def _fill(x_desc, v_desc, ready, x_ring, v_ring, stage, pm, pn, block, wanted, BM: gl.constexpr, BN: gl.constexpr):
    """Start the copies of a block's tiles to a stage; the stage's mbarrier counts their bytes."""
    mbarrier.expect(ready.index(stage), BM * 128 + BN * 64, pred=wanted)
    load_tile(x_desc, [pm * BM, block * 32], ready.index(stage), x_ring.index(stage), pred=wanted)
    load_tile(v_desc, [pn * BN, block * 16], ready.index(stage), v_ring.index(stage), pred=wanted)


@gluon.jit
def _start(
    x_desc, v_desc, pm, pn, first, blocks, STAGES: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr
):  # fmt: skip
    """The rings of tokens and values and their mbarriers; the copies of the first STAGES blocks are started."""
    # The ring of tokens comes first, because the assembly expects it where shared memory begins.
    x_ring = gl.allocate_shared_memory(gl.int32, [STAGES, BM, 32], x_desc.layout)
    v_ring = gl.allocate_shared_memory(gl.int32, [STAGES, BN, 16], v_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
    # The TMA and the other threads may use the mbarriers only after this.
    fence_async_shared()
    barrier()
    for i in gl.static_range(STAGES):
        _fill(x_desc, v_desc, ready, x_ring, v_ring, i, pm, pn, first + i, i < blocks, BM, BN)
    return x_ring, v_ring, ready


@gluon.jit
def _stage_pattern(
    P, pn, first, blocks, N, stride_p, STAGES: gl.constexpr, BN: gl.constexpr, WN: gl.constexpr
):  # fmt: skip
    """The ring of the pattern, with STAGES - 1 blocks on the way and the first there.

    Returns:
        The ring; pointers to the first block in each row; which rows exist; and how many blocks they have.
    """
    P_FROM: gl.constexpr = gl.BlockedLayout([1], [32], [WN], [0])
    p_ring = gl.allocate_shared_memory(gl.int64, [STAGES, BN], gl.SwizzledSharedLayout(1, 1, 1, order=[0]))
    p_of = pn * BN + gl.arange(0, BN, layout=P_FROM)
    p_at = P + p_of.to(gl.int64) * (stride_p // 8) + first
    in_p = p_of < N
    left = gl.minimum(stride_p // 8 - first, blocks)
    for i in gl.static_range(STAGES - 1):
        copy_async(p_ring.index(i), p_at + i, mask=in_p & (i < left))
        commit_copies()
    # Here for the first block; later for each next block, before the barrier.
    wait_for_copies(STAGES - 2)
    barrier()
    return p_ring, p_at, in_p, left


@gluon.jit
def _sparse_sums(
    x_desc, v_desc, P, x_ring, v_ring, ready, p_row, t, pm, pn, first, blocks, N, stride_p,
    MT: gl.constexpr, WN: gl.constexpr, NT: gl.constexpr, STAGES: gl.constexpr,
    FP16: gl.constexpr, PIECE: gl.constexpr, L: gl.constexpr,
):  # fmt: skip
    """``X W^T`` of the tile over ``blocks`` blocks from ``first`` on, in the steps of the module docstring.

    Returns:
        The sums (C), the next stage of the rings, and the phase of its mbarrier.  No copy is in flight any more.
    """
    BN: gl.constexpr = 16 * MT * WN
    BM: gl.constexpr = 8 * NT
    if PIECE == 8:
        p_ring, p_at, in_p, left = _stage_pattern(P, pn, first, blocks, N, stride_p, STAGES, BN, WN)
        p_even, q_even = None, None  # in the ring
        p_odd, q_odd = None, None
    else:
        p_ring = None
        in_p = p_row < N
        in_q = p_row + 8 < N
        p_at = P + p_row.to(gl.int64) * (stride_p // 2) + first * 4 + t
        q_at = p_at + 8 * (stride_p // 2)
        left = stride_p - first * 8 - 2 * t
        # Loaded two blocks ahead: the words of the next even block and of the next odd one.
        p_even = pattern_word(p_at, in_p, left, 2)
        q_even = pattern_word(q_at, in_q, left, 2)
        p_odd = pattern_word(p_at + 4, in_p, left - 8, 2)
        q_odd = pattern_word(q_at + 4, in_q, left - 8, 2)

    acc = gl.zeros([MT, WN, 2, 8, NT, 1, 4, 2], gl.float32, L)
    gl.assume(blocks > 0)
    even = 0
    phase = 0
    for k in range(0, blocks, 2):
        acc = _multiply(acc, ready, v_ring, p_ring, p_even, q_even, even, phase, MT, WN, NT, STAGES, FP16, PIECE, L)
        if PIECE == 2:
            left -= 16
            p_at += 8
            q_at += 8
            p_even = pattern_word(p_at, in_p, left, 2)
            q_even = pattern_word(q_at, in_q, left, 2)
        barrier()
        before = gl.where(even == 0, STAGES - 1, even - 1)
        ahead = k - 1 + STAGES
        more = (k > 0) & (ahead < blocks)
        _fill(x_desc, v_desc, ready, x_ring, v_ring, before, pm, pn, first + ahead, more, BM, BN)
        if PIECE == 8:
            copy_async(p_ring.index(before), p_at + ahead, mask=in_p & (ahead < left))
            commit_copies()

        odd = gl.where(even == STAGES - 1, 0, even + 1)
        phase = gl.where(odd == 0, phase ^ 1, phase)
        acc = _multiply(acc, ready, v_ring, p_ring, p_odd, q_odd, odd, phase, MT, WN, NT, STAGES, FP16, PIECE, L)
        if PIECE == 2:
            p_odd = pattern_word(p_at + 4, in_p, left - 8, 2)
            q_odd = pattern_word(q_at + 4, in_q, left - 8, 2)
        barrier()
        ahead = k + STAGES
        _fill(x_desc, v_desc, ready, x_ring, v_ring, even, pm, pn, first + ahead, ahead < blocks, BM, BN)
        if PIECE == 8:
            copy_async(p_ring.index(even), p_at + ahead, mask=in_p & (ahead < left))
            commit_copies()

        even = gl.where(odd == STAGES - 1, 0, odd + 1)
        phase = gl.where(even == 0, phase ^ 1, phase)
    PACK: gl.constexpr = 4 * NT * MT
    LAST: gl.constexpr = _constraints(PACK, 0)
    acc = gl.inline_asm_elementwise(
        "wgmma.wait_group.sync.aligned 0;", LAST, [acc], dtype=gl.float32, is_pure=False, pack=PACK
    )
    if PIECE == 8:
        wait_for_copies(0)  # the last ones still write zeros
    # No thread reads a stage any more; their memory is reused afterwards.
    barrier()
    return acc, even, phase


@gluon.jit
def _add_low_rank(
    acc, t_desc, B, x_ring, ready, stage, phase, p_row, t, pm, N, R,
    MT: gl.constexpr, WN: gl.constexpr, NT: gl.constexpr, STAGES: gl.constexpr,
    FP16: gl.constexpr, L: gl.constexpr,
):  # fmt: skip
    """``acc + T B^T`` in program (_, 0), else ``acc``.  T goes through the ring of tokens, from ``stage`` on."""
    BM: gl.constexpr = 8 * NT
    PACK: gl.constexpr = 4 * NT * MT
    parts = gl.where(gl.program_id(1) == 0, gl.cdiv(R, 64), 0)
    into = stage
    for i in gl.static_range(STAGES):
        mbarrier.expect(ready.index(into), BM * 128, pred=i < parts)
        load_tile(t_desc, [pm * BM, i * 32], ready.index(into), x_ring.index(into), pred=i < parts)
        into = gl.where(into == STAGES - 1, 0, into + 1)
    row = p_row + 8 * axis(2, 7, L)
    word = t + 4 * axis(2, 2, L)
    b_at = B + row.to(gl.int64) * (R // 2) + word
    in_b = row < N
    TEXT: gl.constexpr = _dense_group(MT, NT, FP16)
    REGISTERS: gl.constexpr = _constraints(PACK, 5)
    for i in range(0, parts):
        rest = R // 2 - 32 * i - word
        b0 = gl.load(b_at, mask=in_b & (rest > 0), other=0)
        b1 = gl.load(b_at + 8, mask=in_b & (rest > 8), other=0)
        b2 = gl.load(b_at + 16, mask=in_b & (rest > 16), other=0)
        b3 = gl.load(b_at + 24, mask=in_b & (rest > 24), other=0)
        b_at += 32
        mbarrier.wait(ready.index(stage), phase)
        at = _address(stage, BM, L, WN)
        acc = gl.inline_asm_elementwise(
            TEXT, REGISTERS, [b0, b1, b2, b3, at, acc], dtype=gl.float32, is_pure=False, pack=PACK
        )
        stage = gl.where(stage == STAGES - 1, 0, stage + 1)
        phase = gl.where(stage == 0, phase ^ 1, phase)
    barrier()
    return acc


# No argument is specialized but the constexprs, so that the build that was checked is the one that is launched.
@gluon.jit(
    do_not_specialize=["M", "N", "R", "stride_p", "blocks", "blocks_per_split"],
    do_not_specialize_on_alignment=["P", "B", "BIAS"],
)
def forward(
    x_desc, v_desc, t_desc, P, B, BIAS, Y,
    M, N, R, stride_p, blocks, blocks_per_split,
    MT: gl.constexpr, WN: gl.constexpr, NT: gl.constexpr, STAGES: gl.constexpr,
    FP16: gl.constexpr, HAS_BIAS: gl.constexpr, HAS_LOW_RANK: gl.constexpr, WIDE: gl.constexpr,
    PIECE: gl.constexpr,
    BAND: gl.constexpr = 8,
):  # fmt: skip
    """``Y [M, N] = X [M, K] W^T + T B^T + BIAS [N]`` of 16-bit operands; tiles of 8 NT tokens and 16 MT WN outputs.

    x_desc: tiles ``[8 NT, 32]`` of X, int32 ``[M, K / 2]``, each a pair of features.
    v_desc: tiles ``[16 MT WN, 16]`` of V, int32 ``[N, K / 4]``, each the two kept values of a group.
    t_desc: tiles ``[8 NT, 32]`` of T, int32 ``[M, R / 2]``, read with HAS_LOW_RANK only; R is at most 64 STAGES.
    P: the pattern as integers of PIECE bytes; rows are ``stride_p`` bytes apart, a multiple of PIECE.  With PIECE = 8
        the pattern is copied to shared memory, almost as early as the values.  With 2 each thread loads its own bits,
        two blocks ahead.
    B: int32 ``[N, R / 2]``.
    Y: ``[M, N]``, or float32 ``[splits, M, N]``: program (_, s) then sums ``blocks_per_split`` blocks of its own, and
        program (_, 0) adds T B^T.
    blocks: how many blocks of 64 features cover K, rounded up to an even number; ``blocks_per_split`` is even too.
    WIDE: N is a multiple of 8, so a thread stores 8 outputs at a time.
    """
    if WIDE:
        N = N // 8 * 8  # tells the compiler
    BN: gl.constexpr = 16 * MT * WN
    BM: gl.constexpr = 8 * NT
    L: gl.constexpr = layout(MT, WN, NT, 1)
    pn, pm = tile_of_program(M, N, BM, BN, BAND)
    first = gl.program_id(1) * blocks_per_split
    blocks = gl.minimum(blocks - first, blocks_per_split)

    x_ring, v_ring, ready = _start(x_desc, v_desc, pm, pn, first, blocks, STAGES, BM, BN)
    t = axis(4, 6, L)
    p_row = pn * BN + 16 * (axis(MT, 0, L) * WN + axis(WN, 1, L)) + axis(8, 3, L)
    acc, stage, phase = _sparse_sums(
        x_desc, v_desc, P, x_ring, v_ring, ready, p_row, t, pm, pn, first, blocks, N, stride_p,
        MT, WN, NT, STAGES, FP16, PIECE, L,
    )  # fmt: skip
    if HAS_LOW_RANK:
        acc = _add_low_rank(
            acc, t_desc, B, x_ring, ready, stage, phase, p_row, t, pm, N, R, MT, WN, NT, STAGES, FP16, L
        )
    x_ring._keep_alive()
    v_ring._keep_alive()
    for i in gl.static_range(STAGES):
        mbarrier.invalidate(ready.index(i))
    barrier()
    if HAS_BIAS:
        acc += bias_of_tile(BIAS, p_row, N, L)
    store_tile(acc, Y, gl.program_id(1).to(gl.int64) * M, pm, pn, M, N, BM, BN, WN)
