"""Calls that a product must not be moved over: writes to tensors, and changes of the mode that calls run in.

Graphs from Dynamo are not functional: ``x.add_(y)`` is a call like any other, and ``x`` has other values after it.
``torch.no_grad`` and autocast are calls too, and apply to everything after them.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from typing import Any

from torch import Tensor
from torch.fx import Graph, Node

from slope_compile.passes._higher_order import is_higher_order, says_what_it_writes
from slope_compile.passes.graph import value

_IN_PLACE = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor", "lshift", "rshift")
_WRITES = frozenset({"setitem", "delitem", *(f"i{name}" for name in _IN_PLACE)})
"""Functions of the ``operator`` module that write; as methods their names have two underscores on either side."""
_MODES = ("_enter_", "_exit_")
"""Prefixes of the names of calls that enter or leave autocast and inference mode."""


def stretches(graph: Graph) -> dict[Node, int]:
    """For each node the number of barriers before it: where it is equal, products may be computed at the first."""
    barriers = itertools.accumulate(map(is_barrier, graph.nodes), initial=0)
    return dict(zip(graph.nodes, barriers, strict=False))


def is_barrier(node: Node) -> bool:
    """Whether a call may write to a tensor that was there before, or change a mode.

    Modules and higher-order operators are not inspected, and are assumed to.  An unused call that returns no tensor is
    assumed to have side effects (``torch._C._set_grad_enabled`` has).
    """
    if node.op in ("placeholder", "get_attr", "output"):
        return False
    if node.op == "call_module" or is_higher_order(node) or not (node.users or isinstance(value(node), Tensor)):
        return True
    writes = says_what_it_writes(node.target)
    if writes is not None:
        return writes
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if name.startswith(_MODES) or name.strip("_") in _WRITES or (name.endswith("_") and not name.endswith("__")):
        return True
    return node.kwargs.get("out") is not None or _in_place(node)


def _in_place(node: Node) -> bool:
    """Whether the call has ``inplace=True``, by name or by position (``F.dropout(x, 0.1, True, True)``)."""
    position = None if isinstance(node.target, str) else _position(node.target)
    if position is not None and position < len(node.args):
        return node.args[position] is not False
    return bool(node.kwargs.get("inplace", False))


@functools.lru_cache(maxsize=1024)
def _position(function: Any) -> int | None:
    """Position of the parameter ``inplace``; None if there is none."""
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # some C functions have no signature
        return None
    return names.index("inplace") if "inplace" in names else None
