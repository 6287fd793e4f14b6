"""Facts about a symbolic size that put no guard on it.

Private names used, tested on torch 2.11 and 2.13: ``torch.fx.experimental.symbolic_shapes.statically_known_true``, and
``SymInt.node`` with ``has_hint`` and ``hint``.
"""

from __future__ import annotations

from torch import SymInt
from torch.fx.experimental.symbolic_shapes import statically_known_true


def at_least(size: int | SymInt, least: int) -> bool:
    """Whether a size is that large for every value that it can take."""
    return statically_known_true(size >= least)


def example(size: int | SymInt) -> int | None:
    """The size in the run that was traced; None where it has no value yet."""
    if not isinstance(size, SymInt):
        return int(size)
    return int(size.node.hint) if size.node.has_hint() else None
