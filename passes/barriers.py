"""What a product must not be moved over: writes to tensors, and changes of the mode that calls run in.

Graphs from Dynamo are not functional: ``x.add_(y)`` is a call like others, and ``x`` holds something else from there
on.  ``torch.no_grad`` and autocast are calls too, which hold for everything behind them.
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
"""Of the ``operator`` module; as methods with two underscores on either side."""
_MODES = ("_enter_", "_exit_")
"""How the names of calls begin that enter or leave autocast and inference mode."""


def stretches(graph: Graph) -> dict[Node, int]:
    """For each node the number of barriers before it: where it is equal, products may be computed at the first."""
    barriers = itertools.accumulate(map(is_barrier, graph.nodes), initial=0)
    return dict(zip(graph.nodes, barriers, strict=False))


def is_barrier(node: Node) -> bool:
    """Whether a call may write to a tensor that was there before, or change a mode.

    Modules and higher-order operators are not looked into: they may.  A call without a tensor as its result that nobody
    reads is there for something else that it does (``torch._C._set_grad_enabled``).
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
    """Whether ``inplace=True`` is said, by name or by position (``F.dropout(x, 0.1, True, True)``)."""
    position = None if isinstance(node.target, str) else _position(node.target)
    if position is not None and position < len(node.args):
        return node.args[position] is not False
    return bool(node.kwargs.get("inplace", False))


@functools.lru_cache(maxsize=1024)
def _position(function: Any) -> int | None:
    """Of the parameter ``inplace``; None where there is none."""
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # of C functions not all have a signature
        return None
    return names.index("inplace") if "inplace" in names else None
