"""``Y = X W^T`` on the 2:4 sparse tensor cores of sm_90: ``wgmma.mma_async.sp`` issued from Gluon's inline assembly.

Importing this module imports Triton: only ``gluon_products`` does, at the first launch.  Storage is that of
``metadata``, read as it is: values and tokens come through rings in shared memory, filled by the tensor memory
accelerator (TMA), values go on to registers (``ldmatrix``), and selectors are made from the pattern's bits in
registers.  Which lane holds what says ``gluon_fragments``; what is said of entries of X in ``gluon_mma_sp`` holds here.

The assembly refers to what Triton does not promise, so every build is checked before it is used
(``gluon_builds``): that the ring of tokens begins where shared memory does (PTX symbol ``global_smem``), and that
ptxas keeps the instructions asynchronous.

Order of things, block after block of 64 features; one group of instructions is always under way:

1. Wait until the stage's copies are there (its mbarrier).  Read its values.
2. Issue the block's instructions as one group; wait for the group of the block *before*.
3. A barrier of all threads.  Now nobody reads the stage of the block before: values were read before its group was
   issued, and the tokens by its group.  Refill it.

The fragments of a block must stay in their registers while its group is under way: blocks alternate between two sets,
by unrolling the loop.  The number of blocks is even; one past the end is all zeros, filled in by the TMA.
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
    """A group of asynchronous instructions, as PTX: ``multiplications`` per step, each a text that may say ``tile``.

    ``address``: the operand that holds the bytes from the ring's beginning to the stage ``[BM, 128 bytes]`` of B.
    ``tile`` describes where B is: the address in units of 16 bytes, 1024 bytes from eight tokens to the next, and
    swizzled within 128 bytes.  32 features, or 16 pairs, are 64 bytes further; ``steps`` is how many units a step is.
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
    """A block: two steps.  Operands, MT times 4 NT registers each: sums, A of each step, E, the address of B."""
    Q = 4 * NT
    P = MT * Q
    kind = f"m64n{8 * NT}k32.f32." + ("f16.f16" if FP16 else "bf16.bf16")
    steps = []
    for step in range(2):
        instructions = []
        for mt in range(MT):
            sums, a, e = _registers(mt * Q, Q), _registers(P * (1 + step) + mt * Q, 4), f"${3 * P + mt * Q}"
            # After E: whose selectors count (those of lanes t = 0, 1 or t = 2, 3), add to the sums, no signs, B by K.
            instructions.append(f"wgmma.mma_async.sp.sync.aligned.{kind} {sums}, {a}, tile, {e}, {step}, 1, 1, 1, 0;")
        steps.append(instructions)
    return _group(steps, f"${4 * P}") + "\nwgmma.wait_group.sync.aligned 1;\n}"


@gluon.constexpr_function
def _dense_group(MT, NT, FP16):
    """64 features of a dense product, four steps.  Operands: sums, A of each step, the address of B."""
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
    """P sums, ``inputs`` operands of P registers, and the sums before, in the same registers."""
    return ",".join(["=f"] * P + ["r"] * (P * inputs) + [str(i) for i in range(P)])


@gluon.jit
def _address(stage, BM: gl.constexpr, L: gl.constexpr, WN: gl.constexpr):
    """Bytes from the beginning of the ring of tokens to a stage of it, in every lane."""
    return gl.zeros([1, WN, 1, 8, 1, 1, 4, 1], gl.int32, L) + stage * (BM * 128)


@gluon.jit
def _multiply(
    acc, v_ring, p, q, stage,
    MT: gl.constexpr, WN: gl.constexpr, NT: gl.constexpr, FP16: gl.constexpr, L: gl.constexpr,
):  # fmt: skip
    """Issues the group of a block, after which the group before is done."""
    a0, a1 = values_of_block(v_ring.index(stage), MT, WN, 1, L)
    e = selectors(p, q)
    PACK: gl.constexpr = 4 * NT * MT
    TEXT: gl.constexpr = _sparse_group(MT, NT, FP16)
    REGISTERS: gl.constexpr = _constraints(PACK, 4)
    at = _address(stage, 8 * NT, L, WN)
    return gl.inline_asm_elementwise(TEXT, REGISTERS, [a0, a1, e, at, acc], dtype=gl.float32, is_pure=False, pack=PACK)


@gluon.jit
def _fill(x_desc, v_desc, ready, x_ring, v_ring, stage, pm, pn, block, wanted, BM: gl.constexpr, BN: gl.constexpr):
    """Copies a block's tiles to a stage; its mbarrier counts the bytes."""
    mbarrier.expect(ready.index(stage), BM * 128 + BN * 64, pred=wanted)
    load_tile(x_desc, [pm * BM, block * 32], ready.index(stage), x_ring.index(stage), pred=wanted)
    load_tile(v_desc, [pn * BN, block * 16], ready.index(stage), v_ring.index(stage), pred=wanted)


# Nothing is compiled in but what is a constexpr, so that a build that was checked is the one that is launched.
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

    x_desc: tiles ``[8 NT, 32]`` of X, int32 ``[M, K / 2]``, pairs of features.
    v_desc: tiles ``[16 MT WN, 16]`` of V, int32 ``[N, K / 4]``, the kept values of a group each.
    t_desc: tiles ``[8 NT, 32]`` of T, int32 ``[M, R / 2]``, with HAS_LOW_RANK; R at most 64 STAGES.
    P: pattern, rows ``stride_p`` bytes apart, in integers of PIECE bytes, of which ``stride_p`` is a multiple.  8: it
        comes through shared memory, almost as early as values do.  2: each thread loads its bits, two blocks ahead.
    B: int32 ``[N, R / 2]``.
    Y: ``[M, N]``; or float32 ``[splits, M, N]``, where program (_, s) adds up its ``blocks_per_split`` blocks only,
        and the first one T B^T.
    blocks: of 64 features, an even number that covers K; ``blocks_per_split`` is even, too.
    WIDE: N is a multiple of 8, so that a thread stores 8 outputs at a time.
    """
    if WIDE:
        N = N // 8 * 8  # says so to the compiler
    BN: gl.constexpr = 16 * MT * WN
    BM: gl.constexpr = 8 * NT
    PACK: gl.constexpr = 4 * NT * MT
    L: gl.constexpr = layout(MT, WN, NT, 1)
    pn, pm = tile_of_program(M, N, BM, BN, BAND)
    first = gl.program_id(1) * blocks_per_split
    blocks = gl.minimum(blocks - first, blocks_per_split)

    # The ring of tokens comes first: the assembly takes it to begin where shared memory does.
    x_ring = gl.allocate_shared_memory(gl.int32, [STAGES, BM, 32], x_desc.layout)
    v_ring = gl.allocate_shared_memory(gl.int32, [STAGES, BN, 16], v_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
    # Before the TMA and the other threads may use them.
    fence_async_shared()
    barrier()
    for i in gl.static_range(STAGES):
        _fill(x_desc, v_desc, ready, x_ring, v_ring, i, pm, pn, first + i, i < blocks, BM, BN)

    t = axis(4, 6, L)
    p_row = pn * BN + 16 * (axis(MT, 0, L) * WN + axis(WN, 1, L)) + axis(8, 3, L)
    if PIECE == 8:
        P_FROM: gl.constexpr = gl.BlockedLayout([1], [32], [WN], [0])
        p_ring = gl.allocate_shared_memory(gl.int64, [STAGES, BN], gl.SwizzledSharedLayout(1, 1, 1, order=[0]))
        p_of = pn * BN + gl.arange(0, BN, layout=P_FROM)
        p_at = P + p_of.to(gl.int64) * (stride_p // 8) + first
        in_p = p_of < N
        left = gl.minimum(stride_p // 8 - first, blocks)
        for i in gl.static_range(STAGES - 1):
            copy_async(p_ring.index(i), p_at + i, mask=in_p & (i < left))
            commit_copies()
        # Of the first block; then, block after block, of the next one before the barrier.
        wait_for_copies(STAGES - 2)
        barrier()
    else:
        in_p = p_row < N
        in_q = p_row + 8 < N
        p_at = P + p_row.to(gl.int64) * (stride_p // 2) + first * 4 + t
        q_at = p_at + 8 * (stride_p // 2)
        left = stride_p - first * 8 - 2 * t
        # Two blocks ahead: of the next even block, and of the next odd one.
        p_even = pattern_word(p_at, in_p, left, 2)
        q_even = pattern_word(q_at, in_q, left, 2)
        p_odd = pattern_word(p_at + 4, in_p, left - 8, 2)
        q_odd = pattern_word(q_at + 4, in_q, left - 8, 2)

    acc = gl.zeros([MT, WN, 2, 8, NT, 1, 4, 2], gl.float32, L)
    gl.assume(blocks > 0)
    even = 0
    phase = 0
    for k in range(0, blocks, 2):
        mbarrier.wait(ready.index(even), phase)
        if PIECE == 8:
            p_even, q_even = pattern_of_block(p_ring.index(even), MT, WN, 1, L)
        acc = _multiply(acc, v_ring, p_even, q_even, even, MT, WN, NT, FP16, L)
        if PIECE == 8:
            wait_for_copies(STAGES - 3)
        else:
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
        mbarrier.wait(ready.index(odd), phase)
        if PIECE == 8:
            p_odd, q_odd = pattern_of_block(p_ring.index(odd), MT, WN, 1, L)
        acc = _multiply(acc, v_ring, p_odd, q_odd, odd, MT, WN, NT, FP16, L)
        if PIECE == 8:
            wait_for_copies(STAGES - 3)
        else:
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
    LAST: gl.constexpr = _constraints(PACK, 0)
    acc = gl.inline_asm_elementwise(
        "wgmma.wait_group.sync.aligned 0;", LAST, [acc], dtype=gl.float32, is_pure=False, pack=PACK
    )
    if PIECE == 8:
        wait_for_copies(0)  # they still write zeros
    # Nobody reads a stage any more, whose memory is used anew below.
    barrier()

    if HAS_LOW_RANK:
        parts = gl.where(gl.program_id(1) == 0, gl.cdiv(R, 64), 0)
        into = even
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
            mbarrier.wait(ready.index(even), phase)
            at = _address(even, BM, L, WN)
            acc = gl.inline_asm_elementwise(
                TEXT, REGISTERS, [b0, b1, b2, b3, at, acc], dtype=gl.float32, is_pure=False, pack=PACK
            )
            even = gl.where(even == STAGES - 1, 0, even + 1)
            phase = gl.where(even == 0, phase ^ 1, phase)
        barrier()
    x_ring._keep_alive()
    v_ring._keep_alive()
    for i in gl.static_range(STAGES):
        mbarrier.invalidate(ready.index(i))
    barrier()
    if HAS_BIAS:
        acc += bias_of_tile(BIAS, p_row, N, L)
    store_tile(acc, Y, gl.program_id(1).to(gl.int64) * M, pm, pn, M, N, BM, BN, WN)
