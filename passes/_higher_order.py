"""Higher-order operators: graphs that are called from other graphs, and where a call holds its body.

Function transforms (``torch.vmap``, ``torch.func.grad``) are no such operators: Dynamo leaves calls in the graph that
begin and end them, and wrapped values between.

Private names used, tested on torch 2.11 and 2.13: ``torch._ops.HigherOrderOperator`` and the calling conventions of the
operators below (the operands follow the body); ``torch._ops.OpOverload`` and its schema;
``torch._C._functorch.is_functorch_wrapped_tensor``.
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


def is_higher_order(node: Node) -> bool:
    """Whether the node is a call of a higher-order operator."""
    return node.op == "call_function" and isinstance(node.target, torch._ops.HigherOrderOperator)


def says_what_it_writes(target: object) -> bool | None:
    """Whether an overload of an operator writes to an argument, by its schema; None for what has none."""
    return bool(target._schema.is_mutable) if isinstance(target, torch._ops.OpOverload) else None


def in_transform(value: object) -> bool:
    """Whether a value is one inside a function transform: what wraps it is gone when passes run."""
    return isinstance(value, torch.Tensor) and bool(torch._C._functorch.is_functorch_wrapped_tensor(value))


def bodies(module: GraphModule, node: Node) -> Iterator[tuple[GraphModule, bool]]:
    """The graphs that a node calls, each with whether passes may enter it."""
    if not is_higher_order(node):
        return
    assert isinstance(node.target, torch._ops.HigherOrderOperator)
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
