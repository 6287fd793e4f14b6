"""sparsify: the selected linears become products with compressed weights.

    prepared   linear(x, slope.expand(values, pattern, ...), b)  ->  slope.linear(x, values, pattern, b, ...)
    dense      linear(x, w, b), w a parameter                    ->  the same, with values = slope.compress(w, pattern)

The weight store decides where the compressed form of a dense weight is kept.

If no gradient is needed and there are too few tokens to pay for compressing the weight at every call, a dense weight is
pruned in place and its product stays dense: the result is the same, in the time of a dense product.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from slope_compile.kernels import compressing, ops
from slope_compile.passes._symbols import at_least
from slope_compile.passes.context import ColumnSite, Selection
from slope_compile.passes.graph import (
    META,
    Region,
    emit,
    erase_unused,
    is_expand,
    replace,
    strip_transposes,
    value,
)
from slope_compile.passes.rewrite import Rewrite
from slope_compile.pattern import Pattern


class Sparsify(Rewrite):
    """See the module docstring."""

    name: ClassVar[str] = "sparsify"

    def rewrite(self, region: Region) -> int:
        selected = [node for node in region.graph.nodes if isinstance(node.meta.get(META), Selection)]
        for node in selected:
            self._product(region, node)
        for node in list(region.graph.nodes):
            if is_expand(node):  # left over where a module reads a weight before its product
                erase_unused(region, node)
        return len(selected)

    def _product(self, region: Region, node: Node) -> None:
        x, weight, bias = node.args
        assert isinstance(weight, Node)
        # Transposes may stand on both sides of a call's boundary, hence twice.
        inner, inner_flip = strip_transposes(weight)
        outer_region, outer = region.origin(inner)
        outer, outer_flip = strip_transposes(outer)
        base_region, base = outer_region.origin(outer)
        transposed = inner_flip != outer_flip
        if is_expand(base):
            arguments = self._prepared(region, base_region, base)
        elif self._stays_dense(base, transposed, node):
            return
        else:
            arguments = self._dense(region, base, transposed, node)
        values, pattern, keep, group, double_pruned, column_mask = arguments
        with region.graph.inserting_before(node):
            product = emit(
                region.graph,
                ops.linear,
                (x, values, pattern, bias, keep, group, double_pruned, column_mask),
                like=node,
            )
        replace(node, product)
        erase_unused(region, weight)

    def _stays_dense(self, base: Node, transposed: bool, node: Node) -> bool:
        """Whether the product goes on reading the dense weight, which is then kept pruned."""
        x, weight = value(node.all_input_nodes[0]), self.context.weights.tensor(base)
        if not isinstance(x, Tensor) or weight is None:
            return False
        if torch.is_grad_enabled() and (weight.requires_grad or x.requires_grad):
            return False
        settings = self.context.config.layer(node.meta[META].path)
        N, K = reversed(weight.shape) if transposed else weight.shape
        least = compressing.least_tokens(N, K, x.dtype, weight.device, settings.pattern)
        if least is not None and at_least(math.prod(x.shape[:-1]), least):
            return False
        return self.context.weights.pruned(base, settings, transposed)

    def _prepared(self, region: Region, home: Region, expand: Node) -> tuple[object, ...]:
        defaults = (None, None, None, None, False, None, None, 0)
        given = (*expand.args, *defaults[len(expand.args) :])
        values, pattern, keep, group, double_pruned, columns, age, interval = given
        tensors = [n for n in (values, pattern, columns) if isinstance(n, Node)]
        local = {n: region.bring(n, home) for n in tensors}
        if double_pruned and isinstance(columns, Node) and isinstance(age, Node) and interval:
            assert isinstance(values, Node) and isinstance(pattern, Node)
            assert isinstance(keep, int) and isinstance(group, int) and isinstance(interval, int)
            site = ColumnSite(
                values=home.origin(values)[1],
                pattern=home.origin(pattern)[1],
                column_mask=home.origin(columns)[1],
                column_age=home.origin(age)[1],
                nm=Pattern(keep, group),
                interval=interval,
            )
            self.context.columns.append(site)
        brought = [local[n] if isinstance(n, Node) else n for n in (values, pattern, columns)]
        return brought[0], brought[1], keep, group, double_pruned, brought[2]

    def _dense(self, region: Region, base: Node, transposed: bool, node: Node) -> tuple[object, ...]:
        settings = self.context.config.layer(node.meta[META].path)
        before, outermost = node, region
        while outermost.parent is not None:
            assert outermost.call is not None
            before, outermost = outermost.call, outermost.parent
        weight = self.context.weights.compressed(base, settings, transposed, before)
        tensor = self.context.weights.tensor(base)
        assert tensor is not None
        N = tensor.shape[1] if transposed else tensor.shape[0]
        columns = None if weight.column_mask is None else region.bring(weight.column_mask, outermost)
        return (
            region.bring(weight.values, outermost),
            region.bring(weight.pattern, outermost),
            settings.pattern.keep,
            settings.pattern.group,
            settings.double_prunes(N),
            columns,
        )
