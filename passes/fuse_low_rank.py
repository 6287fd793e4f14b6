"""fuse_low_rank: the up-projection of an adapter is added up inside the sparse product.

    slope.linear(x, values, pattern, b) + s * linear(t, B)   ->   slope.linear(x, values, pattern, b, down=s * t, up=B)

    t = x A^T [..., R], B [N, R]: the kernel reads R further columns of the activation and writes Y [..., N] once, where
    a product of its own would read and write all of Y again.

A sum qualifies when

1. one side is a sparse product that only this sum reads, and that has no low-rank branch yet;
2. the other is a scaled product without bias, of the shape that ``low_rank`` leaves, that only this sum reads;
3. everything is on one device whose kernels take the branch: the CPU (``kernels.cpu_products.forward``) or a GPU
   (``kernels.triton_products.forward``, and see ``kernels.gpu_calls``).
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from torch.fx import Node

from slope_compile.kernels import ops
from slope_compile.passes.graph import Region, emit, replace, value
from slope_compile.passes.low_rank import ADD, MUL
from slope_compile.passes.normalize import LINEAR
from slope_compile.passes.rewrite import Rewrite

_PLAIN = 8
"""Arguments of ``slope.linear`` before those of the low-rank branch, ``down`` and ``up``."""
UP = _PLAIN + 1
"""Position of ``up``."""


class FuseLowRank(Rewrite):
    """See the module docstring."""

    name: ClassVar[str] = "fuse_low_rank"

    def rewrite(self, region: Region) -> int:
        sums = [n for n in region.graph.nodes if n.target is ADD and len(n.args) == 2 and not n.kwargs]
        return sum(_fuse(node) for node in sums)


def _fuse(total: Node) -> int:
    product, scaled = total.args
    if not (_only_read_by(product, total) and _only_read_by(scaled, total)):
        return 0
    assert isinstance(product, Node) and isinstance(scaled, Node)
    given = [*product.args, *(None,) * (_PLAIN - len(product.args))]
    if product.target is not ops.linear or product.kwargs or len(given) > _PLAIN:  # 1
        return 0
    if scaled.target is not MUL or not _only_read_by(scaled.args[0], scaled):  # 2
        return 0
    up, scale = scaled.args
    if not isinstance(up, Node) or up.target is not LINEAR or up.args[2] is not None or isinstance(scale, Node):
        return 0
    down, B = up.args[:2]
    tensors = [value(n) for n in (product, down, B) if isinstance(n, Node)]
    if len(tensors) < 3 or not all(isinstance(t, Tensor) for t in tensors):
        return 0
    devices = {t.device for t in tensors}
    if len(devices) > 1 or next(iter(devices)).type not in ("cpu", "cuda"):  # 3
        return 0
    graph = total.graph
    with graph.inserting_before(total):
        assert isinstance(down, Node)
        small = emit(graph, MUL, (down, scale), like=down)  # [..., R]
        arguments: tuple[Any, ...] = (*given[:6], bool(given[6]), given[7], small, B)
        fused = emit(graph, ops.linear, arguments, like=total)
    replace(total, fused)
    for node in (scaled, up, product):
        graph.erase_node(node)
    return 1


def _only_read_by(node: Any, reader: Node) -> bool:
    return isinstance(node, Node) and set(node.users) == {reader}
