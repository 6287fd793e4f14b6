"""What is known of a symbolic size without putting a guard on it.

Experimental name used, tested on torch 2.11 and 2.13: ``torch.fx.experimental.symbolic_shapes.statically_known_true``.
"""

from __future__ import annotations

from torch import SymInt
from torch.fx.experimental.symbolic_shapes import statically_known_true


def at_least(size: int | SymInt, least: int) -> bool:
    """Whether a size is that large for every value that it can take."""
    return statically_known_true(size >= least)
