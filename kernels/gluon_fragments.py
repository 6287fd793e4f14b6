"""Parts shared by the kernels on the 2:4 sparse tensor cores: fragment layouts, selectors, and the epilogue.

The tensor core takes a sparse left operand, so a product is computed as ``W X^T``.  One instruction multiplies a
*step* of 32 input features.  Two steps form a *block*: one word of selectors covers a block, and tiles are copied to
shared memory block by block.

Every operand is a tensor over the same eight dimensions ``[MT, WN, r1, g, NT, WM, t, r0]`` in one :func:`layout`: lane
``4 g + t`` of warp ``(WN, WM)`` holds register ``r0 + 2 r1`` of the instruction ``(MT, NT)``.  These are the fragments
that PTX defines for ``mma.sp.m16n8k32`` with 16-bit operands.  For ``wgmma.mma_async.sp`` the 16 rows of each warp
have the same fragments, repeated for every eight tokens:

- A, ``[MT, WN, 2, 8, 1, 1, 4, 2]``: the two kept values of a group; the low half of the word comes first in the row.
  Row ``16 (mt WN + wn) + 8 r0 + g``, group ``t + 4 r1`` of the step.  In a dense operand (``mma.m16n8k16``) each word
  holds two neighbouring features of a row: the first is feature ``2 (t + 4 r1)`` of 16.
- B, ``[1, 1, 2, 8, NT, WM, 4, 2]``: two neighbouring features of a token.  Token ``8 (nt WM + wm) + g``; the first is
  feature ``8 (r0 + 2 r1) + 2 t`` of the step.
- E, ``[MT, WN, 1, 8, 1, 1, 4, 1]``: the selectors of four groups in row ``g`` (bits 0-15) and of four in row ``g + 8``
  (bits 16-31).  The groups are those of features ``16 t`` to ``16 t + 15`` of the block, so lanes t = 0, 1 hold the
  selectors of the first step and t = 2, 3 those of the second.  Each group takes four bits, ``i0 | i1 << 2``: its kept
  positions in ascending order.
- C, ``[MT, WN, 2, 8, NT, WM, 4, 2]``: the sum for row ``16 (mt WN + wn) + 8 r1 + g`` and token
  ``8 (nt WM + wm) + 2 t + r0``.

Importing this module imports Triton.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.constexpr_function
def _bases(rank, fields):
    """Basis vectors of a linear layout.  ``fields``: (dimension, first step, size) of each, the fastest first."""
    found = []
    for dimension, step, size in fields:
        for bit in range(size.bit_length() - 1):
            found.append([step << bit if d == dimension else 0 for d in range(rank)])
    return found


@gluon.constexpr_function
def layout(MT, WN, NT, WM):
    """The layout of every operand.  r0 and r1 vary fastest, so four consecutive registers belong to one instruction."""
    return gl.DistributedLinearLayout(
        reg_bases=_bases(8, [(7, 1, 2), (2, 1, 2), (4, 1, NT), (0, 1, MT)]),
        lane_bases=_bases(8, [(6, 1, 4), (3, 1, 8)]),
        warp_bases=_bases(8, [(1, 1, WN), (5, 1, WM)]),
        block_bases=[],
        shape=[MT, WN, 2, 8, NT, WM, 4, 2],
    )


@gluon.constexpr_function
def _a_layout(MT, WN, WM):
    """Layout to read a tile of values, int32 ``[16 MT WN, 16]``, from shared memory: A of step 0, then of step 1."""
    return gl.DistributedLinearLayout(
        reg_bases=_bases(2, [(0, 8, 2), (1, 4, 2), (0, 16 * WN, MT), (1, 8, 2)]),
        lane_bases=_bases(2, [(1, 1, 4), (0, 1, 8)]),
        warp_bases=_bases(2, [(0, 16, WN)]) + [[0, 0]] * (WM.bit_length() - 1),
        block_bases=[],
        shape=[16 * MT * WN, 16],
    )


@gluon.constexpr_function
def _slice(L, dimension):
    for d in range(7, -1, -1):
        if d != dimension:
            L = gl.SliceLayout(d, L)
    return L


@gluon.jit
def axis(size: gl.constexpr, dimension: gl.constexpr, L: gl.constexpr):
    """The indices 0 to size - 1 along one of the eight dimensions."""
    along: gl.constexpr = _slice(L, dimension)
    index = gl.arange(0, size, layout=along)
    for d in gl.static_range(8):
        if d != dimension:
            index = gl.expand_dims(index, d)
    return index


@gluon.jit
def tile_of_program(M, N, BM: gl.constexpr, BN: gl.constexpr, BAND: gl.constexpr):
    """The tile of this program, ``(pn, pm)``.  Programs go through bands of BAND tiles along N, so that neighbouring
    programs read the same data."""
    tiles_m = gl.cdiv(M, BM)
    tiles_n = gl.cdiv(N, BN)
    first_n = gl.program_id(0) // (BAND * tiles_m) * BAND
    height = gl.minimum(tiles_n - first_n, BAND)
    pn = first_n + gl.program_id(0) % (BAND * tiles_m) % height
    pm = gl.program_id(0) % (BAND * tiles_m) // height
    return pn, pm


@gluon.jit
def values_of_block(stage, MT: gl.constexpr, WN: gl.constexpr, WM: gl.constexpr, L: gl.constexpr):
    """A of both steps, from a tile of values ``[16 MT WN, 16]`` in shared memory."""
    a = stage.load(_a_layout(MT, WN, WM)).reshape([MT, WN, 2, 8, 2, 2, 4])  # mt wn r0 g step r1 t
    a0, a1 = gl.split(gl.permute(a, (0, 1, 5, 3, 6, 2, 4)))
    a0 = gl.convert_layout(a0.reshape([MT, WN, 2, 8, 1, 1, 4, 2]), L, assert_trivial=True)
    a1 = gl.convert_layout(a1.reshape([MT, WN, 2, 8, 1, 1, 4, 2]), L, assert_trivial=True)
    return a0, a1


@gluon.jit
def selectors(p, q):
    """E, from 16 bits of the pattern in row g (``p``) and 16 in row g + 8 (``q``).

    A group without bits, past the end, gets positions 0 and 2.
    """
    bits = p | (q << 16)
    b0 = bits & 0x11111111
    b1 = (bits >> 1) & 0x11111111
    b2 = (bits >> 2) & 0x11111111
    b3 = (bits >> 3) & 0x11111111
    both = b0 & b1
    # i0 is 0 if b0 is set, else 1 if b1 is, else 2.  i1 is 3 if b3 is set, else 1 if b0 and b1 are, else 2.
    return (b1 & (b0 ^ 0x11111111)) | ((b2 & b3) << 1) | ((b3 | both) << 2) | ((both ^ 0x11111111) << 3)


@gluon.jit
def pattern_word(at, in_rows, left, PIECE: gl.constexpr):
    """16 bits of the pattern from ``at`` on, as int32.

    left: bytes of the row from ``at`` on; bits past them are 0.
    PIECE: size of the integers that ``at`` points to, 2 or 1 bytes.
    """
    if PIECE == 2:
        return gl.load(at, mask=in_rows & (left > 0), other=0).to(gl.int32) & 0xFFFF
    low = gl.load(at, mask=in_rows & (left > 0), other=0).to(gl.int32)
    high = gl.load(at + 1, mask=in_rows & (left > 1), other=0).to(gl.int32)
    return low | (high << 8)


@gluon.constexpr_function
def _pattern_layout(MT, WN, WM):
    """Layout to read a block's pattern, int64 ``[16 MT WN]``, from shared memory: row g, then row g + 8."""
    return gl.DistributedLinearLayout(
        reg_bases=_bases(1, [(0, 8, 2), (0, 16 * WN, MT)]),
        lane_bases=[[0], [0], *_bases(1, [(0, 1, 8)])],
        warp_bases=_bases(1, [(0, 16, WN)]) + [[0]] * (WM.bit_length() - 1),
        block_bases=[],
        shape=[16 * MT * WN],
    )


@gluon.jit
def pattern_of_block(stage, MT: gl.constexpr, WN: gl.constexpr, WM: gl.constexpr, L: gl.constexpr):
    """:func:`pattern_word` of rows g and g + 8, from a block's pattern in shared memory."""
    shift = (16 * axis(4, 6, L)).to(gl.int64)
    rows = stage.load(_pattern_layout(MT, WN, WM)).reshape([MT, WN, 2, 8])
    p, q = gl.split(gl.permute(rows, (0, 1, 3, 2)))
    p = gl.convert_layout(p.reshape([MT, WN, 1, 8, 1, 1, 1, 1]), L, assert_trivial=True)
    q = gl.convert_layout(q.reshape([MT, WN, 1, 8, 1, 1, 1, 1]), L, assert_trivial=True)
    return ((p >> shift) & 0xFFFF).to(gl.int32), ((q >> shift) & 0xFFFF).to(gl.int32)


@gluon.jit
def bias_of_tile(BIAS, row, N, L: gl.constexpr):
    """The bias of C's outputs, float32.  ``row``: the output of A's row g."""
    out = row + 8 * axis(2, 2, L)
    return gl.load(BIAS + out, mask=out < N, other=0.0).to(gl.float32)


@gluon.jit
def store_tile(acc, Y, first, pm, pn, M, N, BM: gl.constexpr, BN: gl.constexpr, WARPS: gl.constexpr):
    """Store C to tile (pm, pn) of ``Y [.., N]``, where token 0 is row ``first``.  Goes through shared memory."""
    # First as [nt, wm, t, r0] x [mt, wn, r1, g], then in a layout in which a warp writes contiguous pieces of rows.
    ACROSS: gl.constexpr = 16 if BN >= 128 else BN // 8
    OUT: gl.constexpr = gl.BlockedLayout([1, 8], [32 // ACROSS, ACROSS], [WARPS, 1], [1, 0])
    y = gl.permute(acc.to(Y.dtype.element_ty), (4, 5, 6, 7, 0, 1, 2, 3)).reshape([BM, BN])
    y = gl.convert_layout(y, OUT)
    row = pm * BM + gl.arange(0, BM, layout=gl.SliceLayout(1, OUT))
    column = pn * BN + gl.arange(0, BN, layout=gl.SliceLayout(0, OUT))
    at = Y + (first + row.to(gl.int64))[:, None] * N + column[None, :]
    gl.store(at, y, mask=(row < M)[:, None] & (column < N)[None, :])
