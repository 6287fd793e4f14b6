"""How a sparse weight is stored: its values, and packed metadata with their positions.

Every kernel and operator uses the format that is defined here.

**Pattern**: ``uint8 [N, ceil(K / 8)]``; bit ``i`` (least significant first) of byte ``[n, j]`` is 1 when the dense
element ``[n, 8 j + i]`` is kept.  Bits past ``K`` are 0.  A 2:4 group is thus one nibble with exactly two bits set (six
legal values); the first group of a byte is in its low half.  Every supported group size divides a byte.

**Values**: ``[N, K * keep / group]``, row by row in the order of their columns, neither permuted nor padded.  For 2:4
group ``g`` with kept columns ``i0 < i1``, entry ``2 g`` is ``W[n, 4 g + i0]`` and entry ``2 g + 1`` is
``W[n, 4 g + i1]``.

**Column mask**: ``uint8 [N, ceil(K * keep / group / 8)]``; bit ``i`` of byte ``[n, j]`` is 1 when the *value*
``[n, 8 j + i]`` is in W^{R,C} too.  Elements that the first pruning dropped have no bit.  In each column, at most
``keep`` of ``group`` neighbouring rows have a value whose bit is set.  Bits past the last value are 0.

=====================  ================================  =======================================================
what                   where                             bits per dense element (2:4, 16-bit weights)
=====================  ================================  =======================================================
values                 the Parameter; gradient and       8 each (dense: 16)
                       optimizer state have its shape
pattern                buffer, static                    1
column mask            buffer ``uint8 [N, ceil(K/16)]``  1/2, where the configuration stores it
column age             buffer ``int64 [1]`` on the CPU   -
=====================  ================================  =======================================================

This order suits every consumer: elementwise optimizers ignore order, checkpoints and shards by rows (of values and
pattern alike) stay natural, and each kernel finds its operands by shifts, masks and selections in registers:

- *C++ on CPUs* and *Triton* read nibbles: by bytes or, if rows are whole words, by 32-bit words (eight groups each).
- *Gluon, mma.sp and wgmma.sp*: the two values of a group already are one 32-bit word of the A fragment.  The selectors
  ``i0 | i1 << 2`` of eight groups are computed from one word of the pattern in a few operations.
- The *exact input gradient* reads the same storage, expanded along the rows that the sum runs over.
- The *double-pruned input gradient* reads the same storage and the column mask, one bit with each value.  On sparse
  tensor cores the transpose's values ``[K, N / 2]`` and pattern are derived for the call in one pass
  (``compress_columns``) and freed.
- The *weight gradient* writes ``[N, K / 2]`` in this order; no dense ``[N, K]`` is in memory.
- *cuSPARSELt* derives its packed operand for the call and frees it; ``_cusparselt.Packed`` keeps one on request.
- *expanded* derives the dense weight for the call and frees it.

So nothing derived outlives a call, and no method keeps a second copy of the weights (tested by counting live
storages).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from slope_compile.errors import PatternError
from slope_compile.pattern import Pattern


def packed_width(K: int) -> int:
    """Bytes of metadata in one row of ``K`` dense elements."""
    return (K + 7) // 8


def pack_mask(keep_mask: Tensor) -> Tensor:
    """Pack a keep mask (True = kept).

    Args:
        keep_mask: bool ``[N, K]``.

    Returns:
        uint8 ``[N, ceil(K / 8)]``.
    """
    N, K = keep_mask.shape
    padded = torch.nn.functional.pad(keep_mask.to(torch.uint8), (0, packed_width(K) * 8 - K))
    bits = padded.view(N, packed_width(K), 8)
    shifts = torch.arange(8, dtype=torch.uint8, device=keep_mask.device)
    return (bits << shifts).sum(dim=-1, dtype=torch.uint8)


def unpack_mask(pattern: Tensor, K: int) -> Tensor:
    """Inverse of :func:`pack_mask`: bool ``[N, K]``."""
    shifts = torch.arange(8, dtype=torch.uint8, device=pattern.device)
    bits = (pattern.unsqueeze(-1) >> shifts) & 1  # [N, ceil(K/8), 8]
    return bits.flatten(1)[:, :K].to(torch.bool)


def kept_columns(pattern: Tensor, K: int, keep: int, group: int) -> Tensor:
    """Position of each kept element inside its group.

    Args:
        pattern: uint8 ``[N, ceil(K / 8)]``, legal for ``keep:group``.
        K: dense length of a row, a multiple of ``group``.

    Returns:
        int64 ``[N, K / group, keep]``, ascending along the last dimension, ready for ``gather`` and ``scatter``.
    """
    N = pattern.shape[0]
    if group == 8:
        codes = pattern
    else:  # 8 / group codes per byte, the lowest bits first
        shifts = torch.arange(0, 8, group, dtype=torch.uint8, device=pattern.device)
        codes = ((pattern.unsqueeze(-1) >> shifts) & ((1 << group) - 1)).flatten(1)
    codes = codes[:, : K // group]
    # A table on a GPU must not be cached.  A tensor made while a CUDA graph is captured, or while Inductor warms up
    # before it captures, is in the graph's own memory; and another stream might read the table before it is written.
    on_cpu = pattern.device.type == "cpu"
    table = _kept_table(keep, group) if on_cpu else _made_table(keep, group, pattern.device)
    return table.index_select(0, codes.reshape(-1).to(torch.int32)).view(N, K // group, keep)


@functools.lru_cache(maxsize=64)
def _kept_table(keep: int, group: int) -> Tensor:
    """:func:`_made_table` on the CPU, a constant that is made once."""
    with torch.inference_mode(False):
        return _made_table(keep, group, torch.device("cpu"))


def _made_table(keep: int, group: int, device: torch.device) -> Tensor:
    """``[2^group, keep]``: positions of the first ``keep`` set bits of a group's code; 0 where it has fewer.

    Computed on the device without synchronization; a CUDA graph cannot contain a copy from the host.
    """
    position = torch.arange(group, device=device)
    bits = torch.arange(1 << group, device=device)[:, None] >> position & 1
    first = (position + (1 - bits) * group).sort(dim=-1).values[:, :keep]
    return first * (first < group)


def check_pattern(pattern: Tensor, K: int, nm: Pattern, name: str) -> None:
    """Check that metadata is legal for ``nm``, before it is used.

    Raises:
        PatternError: wrong dtype or shape, a group without exactly ``nm.keep`` bits, or bits past ``K``.
    """
    if pattern.dtype != torch.uint8 or pattern.dim() != 2 or pattern.shape[1] != packed_width(K):
        raise PatternError(
            f"{name}: the pattern must be uint8 [N, {packed_width(K)}] for K = {K}, "
            f"got {pattern.dtype} {list(pattern.shape)}"
        )
    bits = unpack_mask(pattern, packed_width(K) * 8)
    kept = bits[:, :K].view(pattern.shape[0], K // nm.group, nm.group).sum(-1)
    wrong = int((kept != nm.keep).sum())
    if wrong or bool(bits[:, K:].any()):
        raise PatternError(
            f"{name}: {wrong} of {kept.numel()} groups do not keep exactly {nm.keep} of {nm.group}; "
            "the metadata is corrupt or belongs to another pattern"
        )
