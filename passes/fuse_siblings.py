"""fuse_siblings: sparse products of the same activation (q/k/v, gate/up) become one.

    slope.linear(x, values_1, ...), ..., slope.linear(x, values_n, ...)
        ->  split(slope.linear(x, cat(values), cat(patterns), cat(biases), ...), out_features)

The activation is then read (and packed, on a CPU) once instead of n times, in the backward pass too, where in addition
one input gradient takes the place of n and of the sum of them.  The price is a copy of the compressed weights, so it
pays for many tokens and not for few: see :func:`pays`.  Products with a barrier between them stay apart (see
``barriers``).
"""

from __future__ import annotations

import collections
import itertools
import math
from collections.abc import Hashable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from slope_compile.kernels import ops
from slope_compile.passes.barriers import stretches
from slope_compile.passes.graph import Region, emit, replace, value
from slope_compile.passes.rewrite import Rewrite

X, VALUES, PATTERN, BIAS, KEEP, GROUP, DOUBLE_PRUNED, COLUMNS = range(8)
"""Arguments of ``slope.linear``."""


def pays(tokens: Any, rows: int, itemsize: int, count: int) -> bool:
    """Whether one product moves fewer bytes than ``count`` of them; both sides per in_feature.

    Args:
        tokens: M, a number; for a symbol the answer is no, since its values are not known.
        rows: sum of the out_features.
        itemsize: of values and activations, in bytes.
    """
    saved, copied = (count - 1) * itemsize, 2 * rows * (itemsize / 2 + 1 / 8)
    return isinstance(tokens, int) and tokens * saved > copied


class FuseSiblings(Rewrite):
    """See the module docstring."""

    name: ClassVar[str] = "fuse_siblings"

    def rewrite(self, region: Region) -> int:
        siblings: dict[Hashable, list[Node]] = collections.defaultdict(list)
        stretch = stretches(region.graph)
        for node in region.graph.nodes:
            if node.target is ops.linear and (kind := _kind(node)) is not None:
                siblings[kind, stretch[node]].append(node)
        groups = [group for group in siblings.values() if len(group) > 1 and _profitable(group)]
        for group in groups:
            _fuse(region, group)
        return len(groups)


def _arguments(node: Node) -> list[Any]:
    return [*node.args, *(None,) * (COLUMNS + 1 - len(node.args))]


def _kind(node: Node) -> Hashable | None:
    """A key that is equal for siblings; None for a product that cannot be joined with others."""
    given = _arguments(node)
    if len(node.args) > COLUMNS + 1:  # with a low-rank branch of its own
        return None
    tensors = [given[i] for i in (VALUES, PATTERN, BIAS, COLUMNS) if given[i] is not None]
    if any(not isinstance(value(n), Tensor) for n in (given[X], *tensors)) or not all(map(_early, tensors)):
        return None
    values = value(given[VALUES])
    if given[DOUBLE_PRUNED] and values.shape[0] % given[GROUP]:  # a group of rows would hold those of two siblings
        return None
    biased, stored = given[BIAS] is not None, given[COLUMNS] is not None
    settings = (given[KEEP], given[GROUP], bool(given[DOUBLE_PRUNED]))
    return (given[X], biased, stored, settings, values.dtype, values.shape[1])


def _early(node: Node) -> bool:
    """Whether a node can stand anywhere: state, or the compressed form of a weight that is state."""
    if node.op in ("placeholder", "get_attr"):
        return True
    return node.target is ops.compress and all(map(_early, node.all_input_nodes))


def _profitable(group: Sequence[Node]) -> bool:
    given = [_arguments(node) for node in group]
    x, values = value(given[0][X]), [value(each[VALUES]) for each in given]
    return pays(math.prod(x.shape[:-1]), sum(int(v.shape[0]) for v in values), values[0].itemsize, len(group))


def _fuse(region: Region, group: Sequence[Node]) -> None:
    graph, first = region.graph, group[0]
    given = [_arguments(node) for node in group]
    for tensor in (each[i] for each in given for i in (VALUES, PATTERN, BIAS, COLUMNS) if each[i] is not None):
        _move_before(tensor, first)

    def joined(argument: int) -> Node | None:
        if given[0][argument] is None:
            return None
        return emit(graph, torch.ops.aten.cat.default, ([each[argument] for each in given], 0), like=first)

    with graph.inserting_before(first):
        # With N = N_1 + ... + N_n: values [N, K keep/group], pattern [N, ceil(K/8)], bias [N],
        # column mask [N, ceil(K keep/group / 8)].
        values, pattern, bias, columns = map(joined, (VALUES, PATTERN, BIAS, COLUMNS))
        settings = given[0][KEEP : DOUBLE_PRUNED + 1]
        product = emit(graph, ops.linear, (given[0][X], values, pattern, bias, *settings, columns), like=first)
        ends = list(itertools.accumulate(int(value(each[VALUES]).shape[0]) for each in given))
        slices = [
            emit(graph, torch.ops.aten.slice.Tensor, (product, -1, start, end), like=node)
            for node, start, end in zip(group, [0, *ends], ends, strict=False)
        ]
    # Only now: the first of the group is the insertion point.
    for node, part in zip(group, slices, strict=True):
        replace(node, part)


def _move_before(node: Node, point: Node) -> None:
    """State may be read right before its own product, which is not the first."""
    if node.op == "placeholder":
        return
    for source in node.all_input_nodes:
        _move_before(source, point)
    point.prepend(node)
