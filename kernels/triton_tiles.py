"""Parts shared by the Triton kernels: the tile of a program, and conversions of tiles between stored and dense form.

Importing this module imports Triton.  Weights are stored as ``metadata`` describes.  A tile of a weight has ROWS rows
and ``4 GROUPS`` columns; its pattern is one nibble per group, int32 ``[ROWS, GROUPS]``.  There are only integer
arithmetic and selections, without inline assembly, so that Triton's interpreter runs the same code as a GPU.
"""

import triton
import triton.language as tl


@triton.jit
def tile_of(rows, columns, BROWS: tl.constexpr, BCOLUMNS: tl.constexpr, GROUP: tl.constexpr):
    """The output tile of this program, (row, column).  Programs go through bands of GROUP tile rows, so that
    neighbouring programs read the same data."""
    program = tl.program_id(0)
    tile_rows = tl.cdiv(rows, BROWS)
    band = GROUP * tl.cdiv(columns, BCOLUMNS)
    first = program // band * GROUP
    height = tl.minimum(tile_rows - first, GROUP)
    return first + (program % band) % height, (program % band) // height


@triton.jit
def nibbles(codes, ROWS: tl.constexpr, GROUPS: tl.constexpr, EACH: tl.constexpr):
    """The nibbles, int32 ``[ROWS, GROUPS]``, of integers ``[ROWS, GROUPS / EACH]``; the lowest nibble comes first."""
    shifts = (tl.arange(0, EACH) * 4)[None, None, :]
    return tl.reshape((codes.to(tl.int32)[:, :, None] >> shifts) & 15, (ROWS, GROUPS))


@triton.jit
def flags(codes, ROWS: tl.constexpr, COLUMNS: tl.constexpr, EACH: tl.constexpr):
    """The bits, int32 ``[ROWS, COLUMNS]``, of integers ``[ROWS, COLUMNS / EACH]``; the lowest bit comes first."""
    bytes_at = (tl.arange(0, EACH // 8) * 8)[None, None, :]
    # First into bytes: splitting a word into its bits directly takes more registers.
    codes = tl.reshape((codes.to(tl.int32)[:, :, None] >> bytes_at) & 255, (ROWS, COLUMNS // 8))
    return tl.reshape((codes[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1, (ROWS, COLUMNS))


@triton.jit
def staying(v, codes, ROWS: tl.constexpr, VALUES: tl.constexpr, EACH: tl.constexpr):
    """Values ``[ROWS, VALUES]`` of W^{R,C}: 0 where the column mask ``codes``, EACH bits per integer, drops them.

    They are selected, so that dropped values never enter a sum.
    """
    return tl.where(flags(codes, ROWS, VALUES, EACH) != 0, v, tl.zeros_like(v))


@triton.jit
def expanded(v, nibble, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    """Dense tile ``[ROWS, 4 GROUPS]`` from the values ``v [ROWS, 2 GROUPS]``; pruned entries are 0."""
    first, second = tl.split(tl.reshape(v, (ROWS, GROUPS, 2)))
    zero = tl.zeros_like(first)
    b0 = (nibble & 1) != 0
    b1 = (nibble & 2) != 0
    b2 = (nibble & 4) != 0
    b3 = (nibble & 8) != 0
    # Two are kept.  If element 1 is kept, it is the first unless 0 is kept; element 2 is the second unless 3 is kept.
    d0 = tl.where(b0, first, zero)
    d1 = tl.where(b1, tl.where(b0, second, first), zero)
    d2 = tl.where(b2, tl.where(b3, first, second), zero)
    d3 = tl.where(b3, second, zero)
    return tl.reshape(tl.join(tl.join(d0, d2), tl.join(d1, d3)), (ROWS, 4 * GROUPS))


@triton.jit
def elements(dense, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    """The four elements of every group of ``[ROWS, 4 GROUPS]``, ``[ROWS, GROUPS]`` each."""
    even, odd = tl.split(tl.reshape(dense, (ROWS, GROUPS, 2, 2)))
    d0, d2 = tl.split(even)
    d1, d3 = tl.split(odd)
    return d0, d1, d2, d3


@triton.jit
def kept(dense, nibble, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    """Values ``[ROWS, 2 GROUPS]`` of a dense tile ``[ROWS, 4 GROUPS]``, selected by its nibbles."""
    d0, d1, d2, d3 = elements(dense, ROWS, GROUPS)
    first = tl.where((nibble & 1) != 0, d0, tl.where((nibble & 2) != 0, d1, d2))
    second = tl.where((nibble & 8) != 0, d3, tl.where((nibble & 4) != 0, d2, d1))
    return tl.reshape(tl.join(first, second), (ROWS, 2 * GROUPS))


@triton.jit
def larger(earlier, later):
    """1 where the earlier of two elements ranks before the later one, else 0; on a tie the earlier does."""
    return (earlier >= later).to(tl.int32)


@triton.jit
def largest_two(keys, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    """Nibbles ``[ROWS, GROUPS]`` that keep the two largest integers of each group, on a tie the first."""
    k0, k1, k2, k3 = elements(keys, ROWS, GROUPS)
    g01, g02, g03 = larger(k0, k1), larger(k0, k2), larger(k0, k3)
    g12, g13, g23 = larger(k1, k2), larger(k1, k3), larger(k2, k3)
    # An element is kept if fewer than two of the other three rank before it.
    b0 = 3 - g01 - g02 - g03 < 2
    b1 = g01 + 2 - g12 - g13 < 2
    b2 = g02 + g12 + 1 - g23 < 2
    b3 = g03 + g13 + g23 < 2
    return b0.to(tl.int32) | b1.to(tl.int32) << 1 | b2.to(tl.int32) << 2 | b3.to(tl.int32) << 3


@triton.jit
def filled_two(keys, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    """Nibbles ``[ROWS, GROUPS]`` that keep the nonzero integers of each group, at most two, and the first zeros.

    That is what :func:`largest_two` gives there, without comparing pairs: a table of 16 nibbles, which the nonzero
    integers index.
    """
    k0, k1, k2, k3 = elements(keys, ROWS, GROUPS)
    code = (k0 != 0).to(tl.int32) | (k1 != 0).to(tl.int32) << 1 | (k2 != 0).to(tl.int32) << 2
    low = 0x36553333  # of 8 codes, the first in the lowest nibble
    high = 0x365C3A99
    return (tl.where(k3 != 0, high, low) >> (code * 4)) & 15


@triton.jit
def magnitude_keys(dense):
    """Integers in the order of magnitudes: the bits without the sign.  All NaN are equal, and larger than infinity."""
    if dense.dtype == tl.float32:
        keys = tl.minimum(dense.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0x7F800001)
    else:
        bits = dense.to(tl.int16, bitcast=True).to(tl.int32) & 0x7FFF
        keys = tl.minimum(bits, 0x7C01 if dense.dtype == tl.float16 else 0x7F81)
    return keys


@triton.jit
def packed(nibble, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    """Nibbles ``[ROWS, GROUPS]`` packed into uint8 ``[ROWS, GROUPS / 2]``, the first group in the low half."""
    low, high = tl.split(tl.reshape(nibble, (ROWS, GROUPS // 2, 2)))
    return (low | high << 4).to(tl.uint8)


@triton.jit
def packed_flags(flag, ROWS: tl.constexpr, BYTES: tl.constexpr):
    """Flags int32 ``[ROWS, 8 BYTES]``, 0 or 1, packed into uint8 ``[ROWS, BYTES]``; the first is the lowest bit."""
    shifted = tl.reshape(flag, (ROWS, BYTES, 8)) << tl.arange(0, 8)[None, None, :]
    return tl.sum(shifted, axis=2).to(tl.uint8)
