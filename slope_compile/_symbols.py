"""The expression behind a symbolic size.

Private names used, tested on torch 2.11 and 2.13: ``SymInt.node`` and its ``expr``.
"""

from __future__ import annotations

from typing import Any

import sympy


def expression(size: Any) -> sympy.Expr:
    """A size, an int or a ``torch.SymInt``, as an expression in the graph's symbols; no guard is put on it."""
    return size.node.expr if hasattr(size, "node") else sympy.Integer(int(size))
