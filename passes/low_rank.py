"""low_rank: distribute the product over ``S + s B A``, so that the adapter never meets the sparse weight.

    linear(x, S + s B @ A, b)   ->   linear(x, S, b) + s * linear(linear(x, A), B)

    x [..., K], S [N, K], A [R, K], B [N, R]; cost M R (K + N) instead of R N K plus a dense S.

A linear qualifies when *select* chose it and its weight is an adapter expression (``addmm`` of a weight with two
factors, in either orientation).
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch.fx import Node

from slope_compile.passes.context import Selection
from slope_compile.passes.graph import (
    META,
    Region,
    emit,
    erase_unused,
    replace,
    weight_source,
)
from slope_compile.passes.normalize import LINEAR
from slope_compile.passes.rewrite import Rewrite

ADD = torch.ops.aten.add.Tensor
MUL = torch.ops.aten.mul.Tensor
DOWN = "down_projection"
"""``node.meta["slope"]`` of the product with A, by which *fuse* finds it."""


class DistributeLowRank(Rewrite):
    """See the module docstring."""

    name: ClassVar[str] = "low_rank"

    def rewrite(self, region: Region) -> int:
        nodes = [node for node in region.graph.nodes if isinstance(node.meta.get(META), Selection)]
        return sum(_distribute(region, node) for node in nodes)


def _distribute(region: Region, node: Node) -> int:
    x, weight, bias = node.args
    assert isinstance(x, Node) and isinstance(weight, Node)
    home, expression = weight_source(region, weight)
    if expression.A is None or expression.B is None:
        return 0
    base, A, B = (region.bring(n, home) for n in (expression.base, expression.A, expression.B))
    graph = region.graph
    with graph.inserting_before(node):
        if expression.transposed:
            base = emit(graph, torch.ops.aten.t.default, (base,), like=base)
        product = emit(graph, LINEAR, (x, base, bias), like=node)
        product.meta[META] = node.meta[META]
        down, total = add_adapter(product, x, A, B, expression.scale, like=node)
        down.meta[META] = DOWN
    replace(node, total)
    erase_unused(region, weight)
    return 1


def add_adapter(product: Node, x: Node, A: Node, B: Node, scale: float, like: Node) -> tuple[Node, Node]:
    """Insert ``product + scale * linear(linear(x, A), B)`` at the graph's insertion point.

    Args:
        product: ``[..., N]``.
        x: activation ``[..., K]``.
        A, B: factors ``[R, K]`` and ``[N, R]``.
        like: as for :func:`~slope_compile.passes.graph.emit`.

    Returns:
        The product with A, and the sum.
    """
    graph = product.graph
    down = emit(graph, LINEAR, (x, A, None), like=like)  # [..., K] @ [K, R] -> [..., R]
    up = emit(graph, LINEAR, (down, B, None), like=like)  # [..., R] @ [R, N] -> [..., N]
    # Not add(product, up, alpha=scale): Inductor's addmm fusion on torch 2.11-2.13 loses that alpha.
    scaled = emit(graph, MUL, (up, scale), like=like)
    return down, emit(graph, ADD, (product, scaled), like=like)
