"""The few FX helpers that the passes share: regions, values, new nodes, weight expressions.

A *region* is a graph that runs as part of another one: the root graph, and the bodies of the higher-order operators
that passes enter (activation checkpointing, autocast and grad-mode wrappers).  A body's placeholders are bound to the
arguments of its call, so a weight can be followed to where it comes from, and a new tensor can be brought in.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from slope_compile.kernels import ops
from slope_compile.passes._higher_order import attribute, bodies

__all__ = [
    "META",
    "VALUE_KEYS",
    "Region",
    "WeightExpression",
    "attribute",
    "emit",
    "erase_unused",
    "give_value",
    "is_addmm",
    "is_expand",
    "is_transpose",
    "recompile",
    "regions",
    "replace",
    "strip_transposes",
    "value",
    "weight_expression",
    "weight_source",
]

META = "slope"
"""Key of ``node.meta`` under which passes leave notes for later passes."""


@dataclasses.dataclass(eq=False)
class Region:
    """A graph and how its placeholders are bound in the region that calls it."""

    module: GraphModule
    parent: Region | None = None
    call: Node | None = None
    bindings: dict[Node, Node] = dataclasses.field(default_factory=dict)
    entered: bool = True
    """False when passes must leave the body alone: an unknown operator, or a body with several calls."""

    @property
    def graph(self) -> Graph:
        return self.module.graph

    @property
    def root(self) -> Region:
        return self if self.parent is None else self.parent.root

    def origin(self, node: Node) -> tuple[Region, Node]:
        """Follow a placeholder outwards to the node that produces it, and its region."""
        if self.parent is not None and node in self.bindings:
            return self.parent.origin(self.bindings[node])
        return self, node

    def bring(self, node: Node, source: Region) -> Node:
        """Make a node of an enclosing region available here, as a placeholder with an argument of the call."""
        if source is self:
            return node
        assert self.parent is not None and self.call is not None
        outer = self.parent.bring(node, source)
        for placeholder, bound in self.bindings.items():
            if bound is outer:
                return placeholder
        last = [n for n in self.graph.nodes if n.op == "placeholder"]
        with self.graph.inserting_after(last[-1]) if last else self.graph.inserting_before():
            placeholder = self.graph.placeholder(f"slope_{outer.name}")
        placeholder.meta.update({k: v for k, v in outer.meta.items() if k in VALUE_KEYS})
        self.call.args = (*self.call.args, outer)
        self.bindings[placeholder] = outer
        return placeholder

    def drop(self, placeholder: Node) -> Node:
        """Inverse of :meth:`bring`: take a placeholder that nothing reads, and its operand, away.

        Returns:
            The node of the enclosing region that was the operand.
        """
        assert self.call is not None and not placeholder.users
        inputs = [n for n in self.graph.nodes if n.op == "placeholder"]
        operands = list(self.call.args)
        del operands[len(operands) - len(inputs) + inputs.index(placeholder)]
        self.call.args = tuple(operands)
        self.graph.erase_node(placeholder)
        return self.bindings.pop(placeholder)


def regions(module: GraphModule) -> list[Region]:
    """The root region and every body below it, callers first."""
    found = [Region(module)]
    for region in found:  # grows while it runs
        calls: dict[int, list[tuple[Node, GraphModule, bool]]] = collections.defaultdict(list)
        for node in region.graph.nodes:
            for body, known in bodies(region.module, node):
                calls[id(body)].append((node, body, known))
        for sites in calls.values():
            node, body, known = sites[0]
            child = Region(body, region, node, entered=region.entered and known and len(sites) == 1)
            if child.entered:
                inputs = [n for n in body.graph.nodes if n.op == "placeholder"]
                operands = node.args[len(node.args) - len(inputs) :]
                child.bindings = {p: a for p, a in zip(inputs, operands, strict=True) if isinstance(a, Node)}
            found.append(child)
    return found


# --- values ----------------------------------------------------------------------------------------------------------

VALUE_KEYS = ("example_value", "val")
"""Where a node's fake value is kept: graphs from Dynamo use the first, exported and make_fx graphs the second."""


_PROVENANCE = ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "seq_nr", "from_node")


def value(node: Node) -> Any:
    """The fake value of a node, or None where the graph carries none."""
    for key in VALUE_KEYS:
        if key in node.meta:
            return node.meta[key]
    return None


def give_value(node: Node, tensor: Tensor, like: Node) -> None:
    """Give a new node the fake value of a tensor, as ``like`` has one: in the same fake mode, under the same key.

    The sizes are numbers, not symbols.  Where ``like`` has no fake value, the node gets none.
    """
    for key in VALUE_KEYS:
        mode = getattr(like.meta.get(key), "fake_mode", None)
        if mode is not None:
            node.meta[key] = mode.from_tensor(tensor, static_shapes=True)


def recompile(found: Iterable[Region]) -> None:
    """Bring the code of every region up to date: a change in a body may have changed the calls on the way to it."""
    for region in found:
        region.module.recompile()


def emit(graph: Graph, target: Any, args: tuple[Any, ...], like: Node, **kwargs: Any) -> Node:
    """Insert a call at the graph's insertion point, with the fake value and the provenance that belong to it.

    ``like`` is the node being rewritten: its stack trace and module stack are kept, and a floating result takes its
    dtype (which differs from the operands' under autocast).
    """
    node = graph.call_function(target, args, kwargs)
    node.meta.update({key: like.meta[key] for key in _PROVENANCE if key in like.meta})
    if all(value(n) is not None for n in node.all_input_nodes):
        key = next((k for k in VALUE_KEYS if k in like.meta), "val")
        with torch.no_grad():
            result = _fake_call(target, torch.fx.node.map_arg(args, value), kwargs)
            wanted = value(like)
            if isinstance(result, Tensor) and isinstance(wanted, Tensor) and result.is_floating_point():
                result = result.to(wanted.dtype)
        node.meta[key] = result
    return node


def _fake_call(target: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if target is torch.ops.aten.linear.default:
        # By its shape alone: torch 2.11 asks a fake tensor's sizes as numbers here, which leaves a guard on them.
        x, weight = args[:2]
        return x.new_empty((*x.shape[:-1], weight.shape[0]))
    return target(*args, **kwargs)


def replace(old: Node, new: Node) -> None:
    """Give ``new`` the users and the value of ``old``, and erase ``old``."""
    for key in VALUE_KEYS:
        if key in old.meta:
            new.meta[key] = old.meta[key]
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)


def erase_unused(region: Region, node: Node) -> None:
    """Erase a weight-expression node that nothing reads any more, and what only it read, here and in enclosing regions.

    Not general dead-code elimination: a graph from Dynamo may hold in-place calls whose result nobody uses.
    """
    if node.users:
        return
    if region.parent is not None and node in region.bindings:
        erase_unused(region.parent, region.drop(node))
    elif is_transpose(node) or is_expand(node) or is_addmm(node):
        inputs = list(node.all_input_nodes)
        region.graph.erase_node(node)
        for source in inputs:
            erase_unused(region, source)


# --- weight expressions ----------------------------------------------------------------------------------------------

_ADDMM = (torch.addmm, torch.ops.aten.addmm.default)
_TRANSPOSE_2D = (
    torch.t,
    torch.ops.aten.t.default,
    torch.ops.aten.numpy_T.default,  # w.T in an exported program
    torch.ops.aten.mT.default,
)
_TRANSPOSE = (
    torch.transpose,
    torch.swapaxes,
    torch.swapdims,
    torch.ops.aten.transpose.int,
    torch.ops.aten.swapaxes.default,
    torch.ops.aten.swapdims.default,
)
_PERMUTE = (torch.permute, torch.ops.aten.permute.default)


def is_expand(node: Node) -> bool:
    """Whether the node is ``slope.expand``."""
    return node.op == "call_function" and node.target is ops.expand


def is_addmm(node: Node) -> bool:
    """Whether the node is ``addmm`` with beta = 1 and a result of its own, as a function or a method."""
    method = node.op == "call_method" and node.target == "addmm"
    function = node.op == "call_function" and node.target in _ADDMM
    beta = node.kwargs.get("beta", 1)
    plain = node.kwargs.keys() <= {"alpha", "beta"}  # with `out` it writes to a tensor
    return (method or function) and plain and isinstance(beta, int | float) and beta == 1


def is_transpose(node: Node) -> bool:
    """Whether the node is a transposition of a matrix, in any spelling that names no argument."""
    if node.kwargs:
        return False
    if node.op == "call_method":
        if node.target == "t":
            return True
        if node.target in ("transpose", "swapaxes", "swapdims"):
            return _swaps(node.args[1:])
        return node.target == "permute" and _swaps(_flat(node.args[1:]), permutation=True)
    if node.op != "call_function":
        return False
    if node.target in _TRANSPOSE_2D:
        return True
    if node.target is getattr:
        return node.args[1] in ("T", "mT")
    if node.target in _TRANSPOSE:
        return _swaps(node.args[1:])
    permutes = node.target in _PERMUTE
    return permutes and _swaps(_flat(node.args[1:]), permutation=True)


def _flat(dims: Any) -> tuple[Any, ...]:
    return tuple(dims[0]) if len(dims) == 1 and isinstance(dims[0], list | tuple) else tuple(dims)


def _swaps(dims: tuple[Any, ...], permutation: bool = False) -> bool:
    if not all(isinstance(d, int) for d in dims):
        return False
    normal = tuple(d % 2 for d in dims if -2 <= d < 2)
    return normal == (1, 0) or (not permutation and normal == (0, 1) and len(dims) == 2)


@dataclasses.dataclass(frozen=True)
class WeightExpression:
    """``W = base (or its transpose) + scale * B @ A``, as found in a graph."""

    base: Node
    transposed: bool
    A: Node | None = None
    B: Node | None = None
    scale: float = 1.0

    @property
    def low_rank(self) -> bool:
        return self.A is not None


def weight_expression(node: Node, transposed: bool = False) -> WeightExpression:
    """Read the expression of a weight ``[N, K]``; what is not transposition or a low-rank term is the base.

    ``transposed``: the node is ``[K, N]``, the transpose of the weight.
    """
    base, flipped = strip_transposes(node)
    transposed = transposed != flipped
    if not is_addmm(base) or len(base.args) != 3:
        return WeightExpression(base, transposed)
    term, left, right = base.args
    assert isinstance(term, Node) and isinstance(left, Node) and isinstance(right, Node)
    inner, inner_transposed = strip_transposes(term)
    if not (is_expand(inner) or inner.op in ("placeholder", "get_attr")):
        return WeightExpression(base, transposed)
    # W = base + s left @ right, or its transpose: base^T + s right^T @ left^T
    scale = base.kwargs.get("alpha", 1)
    B, A = (right, left) if transposed else (left, right)
    parts = [strip_transposes(part) for part in (B, A)]
    if any(flipped is not transposed for _, flipped in parts):
        return WeightExpression(base, transposed)  # a factor in another orientation: not one of our adapters
    if not isinstance(scale, int | float):  # a number that is known when the graph runs: not one of ours either
        return WeightExpression(base, transposed)
    return WeightExpression(inner, transposed != inner_transposed, parts[1][0], parts[0][0], float(scale))


def weight_source(region: Region, node: Node, transposed: bool = False) -> tuple[Region, WeightExpression]:
    """The expression of a weight and the region it stands in: an enclosing one where only its value comes in."""
    expression = weight_expression(node, transposed)
    home, base = region.origin(expression.base)
    if expression.low_rank or home is region:
        return region, expression
    return weight_source(home, base, expression.transposed)


def strip_transposes(node: Node) -> tuple[Node, bool]:
    """The node below any transpositions, and whether their number is odd."""
    flipped = False
    while is_transpose(node):
        source = node.args[0]
        assert isinstance(source, Node)
        node, flipped = source, not flipped
    return node, flipped
