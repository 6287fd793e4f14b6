"""Weights that are not parameters themselves but come from one: a part of it, or one of several experts' matrices."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.fx import Node

from slope_compile.passes.graph import Region, is_expand, is_transpose, value
from slope_compile.passes.weights import WeightStore

_PARTS = frozenset(
    {
        *("getitem", "select", "index", "index_select", "split", "chunk", "unbind", "slice", "narrow", "unflatten"),
        *("to", "_to_copy", "float", "type_as", "contiguous", "clone", "view", "reshape", "unsqueeze", "squeeze"),
        *("transpose", "permute", "t", "T", "mT", "getattr", "split_with_sizes", "unsafe_chunk", "tensor_split"),
    }
)
"""Operations that pick, cast or rearrange: what they return is still made of weights."""
_PRODUCTS = ("mm", "linear", "matmul", "einsum")


def origin_of(region: Region, node: Node) -> tuple[Region, Node] | None:
    """The input, attribute or ``slope.expand`` that a weight was picked, cast or rearranged from; None for others."""
    region, node = region.origin(node)
    while node.op in ("call_function", "call_method") and not is_expand(node):
        if not (_picks(node) or is_transpose(node)) or not node.all_input_nodes:
            return None
        region, node = region.origin(node.all_input_nodes[0])
    return region, node


def expert_products(found: list[Region], store: WeightStore) -> Iterator[tuple[Node, Node]]:
    """Products with parameters ``[E, N, K]``: the first product behind each such parameter, and the parameter.

    Linears by name are left out: they are decided about one by one.
    """
    for region in found:
        for node in region.graph.nodes:
            if node.op not in ("call_function", "call_method") or _name(node) in ("linear", "default"):
                continue
            if not any(word in _name(node) for word in _PRODUCTS):
                continue
            for factor in node.all_input_nodes:
                source = origin_of(region, factor)
                if source is not None and source[0].parent is None and is_stack(store.tensor(source[1])):
                    yield node, source[1]


def is_stack(tensor: Tensor | None) -> bool:
    """Whether a parameter is several matrices; ``[1, T, K]`` is a table of positions or the like."""
    return tensor is not None and tensor.dim() == 3 and tensor.shape[0] > 1 and tensor.is_floating_point()


def _picks(node: Node) -> bool:
    return _name(node) in _PARTS and not (isinstance(value(node), Tensor) and value(node).dtype == torch.bool)


def _name(node: Node) -> str:
    """``getitem``, ``select``, ``_grouped_mm``: the operation without its library and overload."""
    operation = getattr(node.target, "overloadpacket", node.target)
    return operation if isinstance(operation, str) else str(getattr(operation, "__name__", ""))
