"""decompose: operators that hold linears inside become what they compute, so that those can be decided about.

These are attention as Dynamo leaves it for ``nn.MultiheadAttention`` and the fused operators that PyTorch takes for
attention and encoder layers in eval mode (``_hidden_linears.DEFINITIONS``).  Where a definition does not cover a call,
the operator stays, and each weight that it reads gets a decision that says so.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from slope_compile.passes._hidden_linears import DEFINITIONS, trace
from slope_compile.passes.derived import origin_of
from slope_compile.passes.graph import VALUE_KEYS, Region, is_expand, replace, value
from slope_compile.passes.rewrite import Rewrite
from slope_compile.report import Decision, Reason

WAY_OUT = "torch.backends.mha.set_fastpath_enabled(False) has PyTorch take another way"


class Decompose(Rewrite):
    """See the module docstring."""

    name: ClassVar[str] = "decompose"

    def rewrite(self, region: Region) -> int:
        changes = 0
        for node in list(region.graph.nodes):
            if node.op == "call_function" and node.target in DEFINITIONS:
                definition = trace(node) if region.entered else None
                if definition is not None and inline(region, node, definition):
                    changes += 1
                else:
                    self._refuse(region, node)
        return changes

    def _refuse(self, region: Region, node: Node) -> None:
        for weight in node.all_input_nodes:
            source = origin_of(region, weight)
            if source is None or source[0].parent is not None or not _is_matrix(source[1]):
                continue
            path = self.context.weights.path(source[1].all_input_nodes[0] if is_expand(source[1]) else source[1])
            self.context.report.add(Decision(path, False, Reason.FUSED_OPERATOR, node=node.name, detail=WAY_OUT))


def _is_matrix(node: Node) -> bool:
    found = value(node)
    return isinstance(found, Tensor) and found.dim() == 2 and (is_expand(node) or isinstance(found, torch.nn.Parameter))


def inline(region: Region, node: Node, definition: GraphModule) -> bool:
    """Put a definition in the place of a call; False, and nothing is changed, where its result does not fit.

    The definition takes ``node.all_input_nodes``; a tuple that it returns is read by ``getitem`` alone.
    """
    (output,) = definition.graph.output_node().args
    parts = list(output) if isinstance(output, Sequence) else None
    if parts is not None and not all(_reads(user, parts) for user in node.users):
        return False
    if any(n.op not in ("placeholder", "call_function", "output") for n in definition.graph.nodes):
        return False
    inside: dict[Node, Node] = dict(
        zip(definition.graph.find_nodes(op="placeholder"), node.all_input_nodes, strict=True)
    )
    key = next((k for k in VALUE_KEYS if k in node.meta), "val")
    with region.graph.inserting_before(node):
        for inner in definition.graph.nodes:
            if inner.op == "call_function":
                copied = region.graph.node_copy(inner, lambda n: inside[n])
                copied.meta = {k: v for k, v in node.meta.items() if k not in VALUE_KEYS} | {key: value(inner)}
                inside[inner] = copied
    if parts is None:
        assert isinstance(output, Node)
        replace(node, inside[output])
        return True
    for user in list(node.users):
        index = user.args[1]
        assert isinstance(index, int)
        part = parts[index]
        if isinstance(part, Node):
            replace(user, inside[part])
        else:
            region.graph.erase_node(user)
    region.graph.erase_node(node)
    return True


def _reads(user: Node, parts: Sequence[Any]) -> bool:
    """Whether a reader takes one part, and one that is there if it goes on to use it."""
    if user.op != "call_function" or user.target is not operator.getitem or not isinstance(user.args[1], int):
        return False
    return isinstance(parts[user.args[1]], Node) or not user.users
