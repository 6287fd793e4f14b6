"""normalize: every spelling of a linear layer becomes ``aten.linear(x, weight [N, K], bias)``.

Recognised, with ``w`` a weight expression (a parameter, ``slope.expand`` of one, its transposes, plus an adapter):

1. ``F.linear(x, w, b)``, ``aten.linear``
2. ``x @ w.T``, ``matmul``, ``mm`` with the weight on the right, in either orientation
3. ``addmm(b, x, w.T)`` (Hugging Face's Conv1D: ``addmm(b, x, w)`` with w ``[K, N]``), alpha = beta = 1
4. ``einsum("...k,nk->...n", x, w)`` and the other equations that are a linear with the weight second
5. ``bmm(x, w)`` with one weight for the whole batch, as decompositions of ``torch.export`` write a linear whose
   activation is not contiguous: ``w`` is a parameter that was expanded to ``[B, K, N]``
6. a ``call_module`` of ``nn.Linear`` without hooks (a symbolically traced graph)

Products of two parameters (the ``B @ A`` of an adapter) are no linears: nothing there is an activation.  A linear whose
spelling does not say that it is one (2., 4. and 5.) is marked as :data:`BARE`, so that *select* can be more careful:
scores against a table of relative positions look the same.
"""

from __future__ import annotations

import operator
from typing import ClassVar

import torch
from torch.fx import Node

from slope_compile.passes._higher_order import in_transform
from slope_compile.passes.graph import (
    Region,
    attribute,
    emit,
    erase_unused,
    is_expand,
    replace,
    strip_transposes,
    value,
    weight_source,
)
from slope_compile.passes.rewrite import Rewrite
from slope_compile.report import Decision, Reason

BARE = "slope_bare"
"""Key in ``node.meta`` of a linear that was a product of two matrices."""
LINEAR = torch.ops.aten.linear.default
_LINEARS = (torch.nn.functional.linear, LINEAR)
_MATMULS = (torch.matmul, torch.mm, operator.matmul, torch.ops.aten.mm.default, torch.ops.aten.matmul.default)
_ADDMMS = (torch.addmm, torch.ops.aten.addmm.default)
_BMMS = (torch.bmm, torch.ops.aten.bmm.default)
_BROADCASTS = (torch.ops.aten.expand.default, torch.ops.aten.view.default)
_EINSUMS = (torch.einsum, torch.functional.einsum, torch.ops.aten.einsum.default)


class Normalize(Rewrite):
    """See the module docstring."""

    name: ClassVar[str] = "normalize"

    def rewrite(self, region: Region) -> int:
        return sum(self._linear(region, node) for node in list(region.graph.nodes)) if region.entered else 0

    def _linear(self, region: Region, node: Node) -> int:
        changed = _changed(region, node)
        if changed:
            self.context.report.add(
                Decision(str(node.target), False, Reason.FORWARD_REPLACED, node=node.name, detail=changed)
            )
            return 0
        found = _module_call(region, node) or _function_call(node)
        if found is None or _in_transform(node):
            return 0
        x, weight, transposed, bias = found
        spelled = node.op == "call_module" or says_linear(node)
        if not spelled and (self._is_parameter(region, x) or not self._is_weight(region, weight, transposed)):
            return 0
        with region.graph.inserting_before(node):
            # The weight as [N, K]: what matmul reads is [K, N], so a transposition more or less.
            base, flipped = strip_transposes(weight)
            if flipped != transposed:
                base = emit(region.graph, torch.ops.aten.t.default, (base,), like=base)
            linear = emit(region.graph, LINEAR, (x, base, bias), like=node)
        if not spelled and bias is None:
            linear.meta[BARE] = True
        operands = node.all_input_nodes
        replace(node, linear)
        for operand in operands:
            _erase_broadcast(region, operand)
        erase_unused(region, weight)
        return 1

    def _is_parameter(self, region: Region, node: Node) -> bool:
        home, base = region.origin(strip_transposes(node)[0])
        return home.parent is None and self.context.weights.tensor(base) is not None

    def _is_weight(self, region: Region, node: Node, transposed: bool) -> bool:
        value_ = value(node)
        if isinstance(value_, torch.Tensor) and value_.dim() != 2:
            return False
        home, expression = weight_source(region, node, transposed)
        home, base = home.origin(expression.base)
        if is_expand(base):
            return True
        tensor = self.context.weights.tensor(base) if home.parent is None else None
        return tensor is not None and tensor.dim() == 2


Found = tuple[Node, Node, bool, Node | None]
"""x, weight node, whether the weight node is [K, N], bias."""


def _module_call(region: Region, node: Node) -> Found | None:
    if node.op != "call_module":
        return None
    module = attribute(region.module, str(node.target))
    plain = getattr(module.forward, "__func__", None) is torch.nn.Linear.forward
    if not plain or len(node.args) + len(node.kwargs) != 1:
        return None
    with region.graph.inserting_before(node):
        weight = region.graph.get_attr(f"{node.target}.weight")
        bias = None if module.bias is None else region.graph.get_attr(f"{node.target}.bias")
    x = node.args[0] if node.args else node.kwargs.get("input")
    return (x, weight, False, bias) if isinstance(x, Node) else None


def _changed(region: Region, node: Node) -> str:
    """Why a call of an ``nn.Linear`` may do something else than a linear; "" where it does not."""
    module = attribute(region.module, str(node.target)) if node.op == "call_module" else None
    if not isinstance(module, torch.nn.Linear):
        return ""
    if "forward" in vars(module):
        return "the instance has a forward of its own"
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return "it has hooks" if any(getattr(module, name) for name in hooks) else ""


def _function_call(node: Node) -> Found | None:
    if node.op == "call_method" and node.target in ("matmul", "mm", "__matmul__"):
        if len(node.args) != 2 or node.kwargs:
            return None
        x, weight, transposed, bias = *node.args, True, None
    elif node.op != "call_function":
        return None
    elif says_linear(node):
        if node.target is LINEAR and len(node.args) == 3:
            return None
        names = ("input", "weight", "bias")
        x, weight, bias = (node.args[i] if i < len(node.args) else node.kwargs.get(names[i]) for i in range(3))
        transposed = False
    elif node.target in _MATMULS and len(node.args) == 2 and not node.kwargs:  # with `out` it writes to a tensor
        x, weight, transposed, bias = *node.args, True, None
    elif node.target in _ADDMMS and len(node.args) == 3:
        if any(name not in ("alpha", "beta") or factor != 1 for name, factor in node.kwargs.items()):
            return None
        bias, x, weight, transposed = *node.args, True
        if not (isinstance(bias, Node) and _is_row(bias, node)):
            return None
    elif node.target in _EINSUMS and not node.kwargs:
        return _einsum(node)
    elif node.target in _BMMS and len(node.args) == 2 and not node.kwargs:
        return _bmm(node)
    else:
        return None
    if not (isinstance(x, Node) and isinstance(weight, Node) and (bias is None or isinstance(bias, Node))):
        return None
    if isinstance(value(x), torch.Tensor) and value(x).dim() < 1:
        return None
    return x, weight, transposed, bias


def says_linear(node: Node) -> bool:
    """Whether the call is a linear by name, so that its second argument is a weight whatever it is.

    ``aten.linear`` comes without its third argument from ``torch.export`` when there is no bias.
    """
    return node.op == "call_function" and (node.target in _LINEARS)


def stays(region: Region, node: Node) -> bool:
    """Whether a linear by name is left as it is, since passes do not enter what it stands in."""
    return says_linear(node) and (not region.entered or _in_transform(node))


def _in_transform(node: Node) -> bool:
    return any(in_transform(value(n)) for n in (node, *node.all_input_nodes))


def _is_row(bias: Node, sum_: Node) -> bool:
    """Whether a bias has one entry per output feature; without values the graph is trusted to be a Conv1D's."""
    shape, result = value(bias), value(sum_)
    if not (isinstance(shape, torch.Tensor) and isinstance(result, torch.Tensor)):
        return True
    return shape.dim() == 1 and shape.shape[0] == result.shape[-1]


def _einsum(node: Node) -> Found | None:
    equation = node.args[0]
    operands = node.args[1:]
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = tuple(operands[0])
    if not isinstance(equation, str) or len(operands) != 2 or "->" not in equation:
        return None
    left, output = equation.replace(" ", "").replace("...", ".").split("->")
    first, _, second = left.partition(",")
    if len(second) != 2 or len(set(second)) != 2 or not first or len(set(first)) != len(first):
        return None
    k = first[-1]
    n = second.replace(k, "")
    if len(n) != 1 or n in first or output != first[:-1] + n:
        return None
    x, weight = operands
    if not (isinstance(x, Node) and isinstance(weight, Node)):
        return None
    return x, weight, second[0] == k, None


def _bmm(node: Node) -> Found | None:
    x, batched = node.args
    if not (isinstance(x, Node) and isinstance(batched, Node)):
        return None
    weight = batched
    while weight.op == "call_function" and weight.target in _BROADCASTS and isinstance(weight.args[0], Node):
        weight = weight.args[0]
    one, many = value(weight), value(batched)
    if not (isinstance(one, torch.Tensor) and isinstance(many, torch.Tensor)) or weight is batched:
        return None
    return (x, weight, True, None) if one.dim() == 2 and one.shape == many.shape[1:] else None


def _erase_broadcast(region: Region, node: Node) -> None:
    """Erase what expanded a weight, so that it does not count as another reader of it."""
    while node.op == "call_function" and node.target in _BROADCASTS and not node.users:
        source = node.args[0]
        region.graph.erase_node(node)
        assert isinstance(source, Node)
        node = source
