"""select: which linears become sparse, and why the others do not.

Every ``aten.linear`` gets exactly one decision in the report.  In order:

1. its weight is ``slope.expand``: prepared by ``sparsify_``, selected
2. it stands in a body that passes do not enter: dense
3. its weight is not a parameter of the graph: dense
4. the same weight is read elsewhere too (tied, shared): dense
5. the whole model is at hand (``WeightStore.ruling``): what its rules say
6. else by the graph: configuration, first linear after the input (no linear comes before it), output head (by name,
   by vocabulary, or no linear comes after it), dtype, shape
7. a device was given: dense where the rewrite is predicted slower on it, at the token count that was traced

A selected node carries a :class:`~slope_compile.passes.context.Selection` in ``node.meta["slope"]``; nothing else
is changed.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import networkx as nx
import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from slope_compile.config import LayerConfig
from slope_compile.kernels import ops
from slope_compile.passes.context import Context, Selection
from slope_compile.passes.dataflow import dataflow, without_predecessor
from slope_compile.passes.derived import expert_products, is_stack, origin_of
from slope_compile.passes.graph import (
    META,
    Region,
    attribute,
    is_expand,
    regions,
    value,
    weight_expression,
    weight_source,
)
from slope_compile.passes.normalize import BARE, LINEAR, stays
from slope_compile.passes.profit import example_tokens, objection
from slope_compile.pattern import Pattern
from slope_compile.report import EXPERTS_DETAIL, Decision, Reason, decision_about
from slope_compile.rules import fits, is_head

_EMBEDDINGS = (torch.nn.functional.embedding, torch.embedding, torch.ops.aten.embedding.default)
PART = "it is a part or a cast of the parameter, and products take whole ones; give the part a linear of its own"


@dataclasses.dataclass(frozen=True)
class Site:
    """A linear node, and where its weight comes from."""

    region: Region
    node: Node
    base_region: Region
    base: Node
    transposed: bool


class Select(PassBase):
    """See the module docstring."""

    name: ClassVar[str] = "select"

    def __init__(self, context: Context) -> None:
        self.context = context

    def call(self, graph_module: GraphModule) -> PassResult:
        found = regions(graph_module)
        for node in (n for region in found for n in region.graph.nodes):
            node.meta.pop(META, None)  # notes of an earlier run, on a graph that was transformed before
        sites = [_site(region, n) for region in found for n in region.graph.nodes if _is_site(region, n)]
        judge = _Judge(self.context, found, sites)
        selected = 0
        for site in sites:
            decision = judge(site)
            self.context.report.add(decision)
            if decision.sparse:
                site.node.meta[META] = Selection(path=decision.weight)
                selected += 1
        for node, weight in expert_products(found, self.context.weights):
            self.context.report.add(judge.experts(node, weight))
        for region in found:
            for node in region.graph.nodes:
                if node.op == "call_function" and node.target is ops.linear:
                    self.context.report.add(
                        Decision(weight=str(node.args[1]), sparse=True, reason=Reason.ALREADY_SPARSE, node=node.name)
                    )
        self.context.report.count(self.name, selected)
        return PassResult(graph_module, False)


def _is_linear(node: Node) -> bool:
    return node.op == "call_function" and node.target is LINEAR


def _is_site(region: Region, node: Node) -> bool:
    """In a body that passes leave alone nothing has been normalised: what is a linear by name gets its decision too."""
    return _is_linear(node) or stays(region, node)


def _site(region: Region, node: Node) -> Site:
    weight = node.args[1] if len(node.args) > 1 else node.kwargs["weight"]
    assert isinstance(weight, Node)
    home, expression = weight_source(region, weight)
    base_region, base = home.origin(expression.base)
    transposed = expression.transposed
    if not is_expand(base):  # below an adapter the expression may go on in the region that calls this one
        home, inner = weight_source(base_region, base, transposed)
        if not inner.low_rank:
            base_region, base = home.origin(inner.base)
            transposed = inner.transposed
    return Site(region, node, base_region, base, transposed)


class _Judge:
    """Decides about each site, with the facts about the whole graph gathered once."""

    def __init__(self, context: Context, found: list[Region], sites: list[Site]) -> None:
        self.context = context
        flow = dataflow(found)
        linears = {site.node for site in sites}
        self.first = without_predecessor(flow, linears)
        self.last = without_predecessor(flow.reverse(copy=False), linears)
        self.readers = _readers(found)
        self.owners = self._owners(found)
        self.vocabularies = frozenset(self._vocabularies(found))

    def _vocabularies(self, found: list[Region]) -> set[int]:
        shapes: list[Sequence[int]] = []
        for region in found:
            for node in region.graph.nodes:
                module = attribute(region.module, str(node.target)) if node.op == "call_module" else None
                if isinstance(module, torch.nn.Embedding):
                    shapes.append((module.num_embeddings, module.embedding_dim))
                if node.op == "call_function" and node.target in _EMBEDDINGS:
                    shapes += [value(n).shape for n in node.all_input_nodes if _is_table(n)]
        # A square table holds positions: were it the vocabulary, every square projection would count as a head.
        return {int(rows) for rows, columns in shapes if rows != columns}

    def _owners(self, found: list[Region]) -> dict[Tensor, list[Node]]:
        """For each parameter, the nodes that read it: under any of its names, or as part of a module call."""
        owners: dict[Tensor, list[Node]] = collections.defaultdict(list)
        root = found[0]
        for node in root.graph.nodes:
            tensor = self.context.weights.tensor(node)
            if tensor is not None:
                owners[tensor] += self.readers.get(node, [])
            elif node.op == "call_module":
                for parameter in attribute(root.module, str(node.target)).parameters():
                    owners[parameter].append(node)
        return owners

    def __call__(self, site: Site) -> Decision:
        if is_expand(site.base):
            return self._prepared(site)
        if stays(site.region, site.node):
            name, around = site.node.name, _around(site)
            return Decision(site.base.name, sparse=False, reason=Reason.HIGHER_ORDER, node=name, detail=around)
        store = self.context.weights
        tensor = store.tensor(site.base) if site.base_region.parent is None else None
        if tensor is None or tensor.dim() != 2:
            return self._computed(site)
        path = store.path(site.base)
        rows, columns = tensor.shape
        N, K = (columns, rows) if site.transposed else (rows, columns)
        settings = self.context.config.layer(path)
        reason, detail = self._reason(site, path, tensor, (N, K))
        if reason is Reason.SELECTED and (objection := self._objection(site, tensor, (N, K), settings)):
            reason, detail = Reason.UNPROFITABLE, objection
        return decision_about(path, (N, K), settings, reason, detail, site.node.name)

    def _computed(self, site: Site) -> Decision:
        """Decide about a weight that is no parameter; if it is part of one, under the path of that parameter."""
        source = origin_of(site.base_region, site.base)
        if source is not None and source[0].parent is None:
            tensor = self.context.weights.tensor(source[1])
            if is_stack(tensor):
                return self.experts(site.node, source[1])
            if tensor is not None or is_expand(source[1]):
                return Decision(self._path(source[1]), False, Reason.COMPUTED, node=site.node.name, detail=PART)
        return Decision(weight=site.base.name, sparse=False, reason=_no_parameter(site), node=site.node.name)

    def _path(self, node: Node) -> str:
        values = node.args[0] if is_expand(node) else node
        assert isinstance(values, Node)
        return self.context.weights.path(values)

    def experts(self, node: Node, weight: Node) -> Decision:
        """The decision about a product with the matrices of several experts."""
        tensor = self.context.weights.tensor(weight)
        shape = () if tensor is None else tuple(tensor.shape)
        path = self.context.weights.path(weight)
        return Decision(path, False, Reason.EXPERTS, shape, node=node.name, detail=EXPERTS_DETAIL)

    def _reason(self, site: Site, path: str, tensor: Tensor, shape: tuple[int, int]) -> tuple[Reason, str]:
        config = self.context.config
        others = [reader for reader in self.owners[tensor] if reader is not site.node]
        if others:
            shared = all(_is_linear(reader) for reader in others)
            names = ", ".join(sorted(reader.name for reader in others))
            return (Reason.SHARED if shared else Reason.TIED), f"also read by {names}"
        ruling = self.context.weights.ruling(site.base)
        if ruling is not None:
            return ruling.reason, ruling.detail
        if not config.selects(path):
            return Reason.EXCLUDED, ""
        if site.node.meta.get(BARE) and not self.context.weights.owned(site.base) and not config.names(path):
            return Reason.BARE, ""
        if config.heads_dense and self.context.weights.router(site.base):
            return Reason.ROUTER, ""
        if config.first_dense and site.node in self.first:
            return Reason.FIRST, ""
        if config.heads_dense and is_head(path, shape[0], self.vocabularies, site.node in self.last):
            return Reason.HEAD, ""
        return fits(tensor.dtype, shape, config.layer(path))

    def _objection(self, site: Site, tensor: Tensor, shape: tuple[int, int], settings: LayerConfig) -> str:
        device, x = self.context.device, value(site.node.all_input_nodes[0])
        if device is None or not isinstance(x, Tensor):
            return ""
        tokens = example_tokens(x.shape)
        if tokens is None:
            return ""
        training = tensor.requires_grad and torch.is_grad_enabled()
        exact = not settings.double_prunes(shape[0])
        return objection(tokens, shape, x.element_size(), settings.pattern, exact, training, device)

    def _prepared(self, site: Site) -> Decision:
        values, _, keep, group, double_pruned, *_ = (*site.base.args, False)
        assert isinstance(values, Node) and isinstance(keep, int) and isinstance(group, int)
        left = stays(site.region, site.node)
        root, origin = site.base_region.origin(values)
        path = self.context.weights.path(origin) if root.parent is None else origin.name
        shape: tuple[int, ...] = ()
        if isinstance(value(values), Tensor):
            N, kept = value(values).shape
            shape = (int(N), int(kept) // keep * group)
        return Decision(
            weight=path,
            sparse=not left,
            reason=Reason.HIGHER_ORDER if left else Reason.PREPARED,
            shape=shape,
            pattern=str(Pattern(keep, group)),
            backward="double_pruned" if double_pruned else "exact",
            node=site.node.name,
            detail=_around(site) if left else "",
        )


def _around(site: Site) -> str:
    """The operator or transform around a site that passes do not enter."""
    return "a function transform" if site.region.entered else str(site.region.call)


def _no_parameter(site: Site) -> Reason:
    """Why the weight has no parameter behind it that could be converted."""
    if site.base.op == "placeholder":
        return Reason.NOT_CONSTANT
    frozen = site.base.op == "get_attr" and isinstance(
        attribute(site.base_region.module, str(site.base.target)), torch.nn.Parameter
    )
    return Reason.FROZEN if frozen else Reason.COMPUTED


def _is_table(node: Node) -> bool:
    """Whether an input of an embedding is its table; the other one, the token ids, may be a matrix as well."""
    found = value(node)
    return isinstance(found, Tensor) and found.dim() == 2 and found.is_floating_point()


def _readers(found: list[Region]) -> dict[Node, list[Node]]:
    """For each node of a region, the nodes that in the end read it, through transposes, adapters and calls."""
    flow: nx.DiGraph[Node] = dataflow(found)
    entered = {region.call for region in found if region.entered}
    readers: dict[Node, list[Node]] = {}
    for source in [n for region in found for n in region.graph.nodes if n.op in ("placeholder", "get_attr")]:
        pending, seen = [source], set()
        while pending:
            node = pending.pop()
            for user in flow.successors(node) if node in flow else ():
                if user in seen or user in entered:
                    continue
                seen.add(user)
                through = user.op == "placeholder" or any(
                    weight_expression(user, transposed).base is not user for transposed in (False, True)
                )
                if through:
                    pending.append(user)
                else:
                    readers.setdefault(source, []).append(user)
    return readers
