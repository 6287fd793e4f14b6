"""Higher-order operators: graphs that are called from other graphs, and where a call holds its body.

Private names used, tested on torch 2.11 and 2.13: ``torch._ops.HigherOrderOperator`` and the calling conventions of the
operators below (the operands follow the body).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import GraphModule, Node

_BODY_POSITION = {
    "tag_activation_checkpoint": 0,
    "wrap": 0,
    "wrap_activation_checkpoint": 0,
    "invoke_subgraph": 0,
    "wrap_with_set_grad_enabled": 1,
    "wrap_with_autocast": 4,
}
"""Operator -> position of its body among the call's arguments.  Passes enter these and no others."""


def bodies(module: GraphModule, node: Node) -> Iterator[tuple[GraphModule, bool]]:
    """The graphs that a node calls, each with whether passes may enter it."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.HigherOrderOperator):
        return
    for position, argument in enumerate(node.args):
        if isinstance(argument, Node) and argument.op == "get_attr":
            body = attribute(module, str(argument.target))
            if isinstance(body, GraphModule):
                yield body, _BODY_POSITION.get(node.target.name()) == position


def attribute(module: torch.nn.Module, target: str) -> Any:
    """``module.a.b.c`` for ``"a.b.c"``; None if there is no such attribute."""
    value: Any = module
    for part in target.split("."):
        value = getattr(value, part, None)
    return value
