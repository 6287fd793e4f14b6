"""fuse: products that read the same activation become one.

First version: the down-projections of adapters on sibling layers (q/k/v, gate/up).

    linear(x, A_1), ..., linear(x, A_n)   ->   split(linear(x, cat([A_1, ..., A_n])), ranks)

One pass over ``x [..., K]`` instead of n; the concatenation is ``[R_1 + ... + R_n, K]``, small beside x.
A group qualifies when its members are down-projections of the same node in the same region with parameters as factors,
there are two or more with no barrier between them (see ``barriers``), and the graph says how large the factors are.
"""

from __future__ import annotations

import collections
import itertools
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from slope_compile.passes.barriers import stretches
from slope_compile.passes.graph import META, Region, emit, replace, value
from slope_compile.passes.low_rank import DOWN
from slope_compile.passes.normalize import LINEAR
from slope_compile.passes.rewrite import Rewrite


class Fuse(Rewrite):
    """See the module docstring."""

    name: ClassVar[str] = "fuse"

    def rewrite(self, region: Region) -> int:
        siblings: dict[tuple[Any, int], list[Node]] = collections.defaultdict(list)
        stretch = stretches(region.graph)
        for node in region.graph.nodes:
            if node.meta.get(META) == DOWN and _factor(node).op in ("placeholder", "get_attr"):
                siblings[node.args[0], stretch[node]].append(node)
        groups = [
            group
            for group in siblings.values()
            if len(group) > 1 and all(isinstance(value(_factor(n)), Tensor) for n in group)
        ]
        for group in groups:
            _fuse(region, group)
        return len(groups)


def _factor(product: Node) -> Node:
    """A of a down-projection ``linear(x, A)``."""
    factor = product.args[1]
    assert isinstance(factor, Node)
    return factor


def _fuse(region: Region, group: list[Node]) -> None:
    graph, first = region.graph, group[0]
    x = first.args[0]
    factors = [_factor(node) for node in group]
    ranks = [int(value(factor).shape[0]) for factor in factors]
    for factor in factors:
        if factor.op == "get_attr":  # may stand right before its own product, which is not the first
            first.prepend(factor)
    with graph.inserting_before(first):
        stacked = emit(graph, torch.ops.aten.cat.default, (factors,), like=first)  # [sum R, K]
        product = emit(graph, LINEAR, (x, stacked, None), like=first)  # [..., K] @ [K, sum R] -> [..., sum R]
        ends = list(itertools.accumulate(ranks))
        parts = [
            emit(graph, torch.ops.aten.slice.Tensor, (product, -1, end - rank, end), like=node)
            for node, rank, end in zip(group, ranks, ends, strict=True)
        ]
    # Only now: the first of the group is the insertion point.
    for node, part in zip(group, parts, strict=True):
        replace(node, part)
