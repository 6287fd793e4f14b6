"""Adapters of a transformed GraphModule: nodes that are inserted into its graph and removed from it again.

    y = slope.linear(x, values, pattern, b)   <->   y = slope.linear(x, ...) + scale * linear(linear(x, A), B)
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from slope_compile.graph_state import ADAPTER_A, ADAPTER_B, ADAPTER_SCALE, VALUES, adapter_scale
from slope_compile.kernels import ops
from slope_compile.passes.graph import attribute, emit
from slope_compile.passes.low_rank import ADD, MUL
from slope_compile.passes.normalize import LINEAR


def has_adapters(module: GraphModule) -> bool:
    """Whether any product of the graph has an adapter, on or off."""
    return bool(_products(module))


def set_adapter_nodes(module: GraphModule, on: bool) -> int:
    """Insert or remove the adapter nodes of every product that has an adapter; returns how many there are."""
    products = _products(module)
    changed = False
    for product, prefix in products:
        total = _total(module, product, prefix)
        if on and total is None:
            _insert(module, product, prefix)
            changed = True
        elif not on and total is not None:
            _remove(total, product)
            changed = True
    if changed:
        module.graph.lint()
        module.recompile()
    return len(products)


def _products(module: GraphModule) -> list[tuple[Node, str]]:
    """``slope.linear`` nodes with an adapter, and the prefix of its tensors' names."""
    found = []
    for node in module.graph.nodes:
        if node.op != "call_function" or node.target is not ops.linear:
            continue
        values = node.args[1]
        if values.op == "get_attr" and str(values.target).endswith(VALUES):
            prefix = str(values.target).removesuffix(VALUES)
            if attribute(module, prefix + ADAPTER_A) is not None:
                found.append((node, prefix))
    return found


def _total(module: GraphModule, product: Node, prefix: str) -> Node | None:
    """The sum that adds the adapter to this product, if it is on."""
    for user in product.users:
        if user.target is ADD and user.args[0] is product and isinstance(user.args[1], Node):
            reads = _chain(user.args[1])
            if any(n.op == "get_attr" and n.target == prefix + ADAPTER_B for n in reads):
                return user
    return None


def _chain(scaled: Node) -> list[Node]:
    """scaled, up, down, and the factors, from the scaled up-projection backwards."""
    if scaled.target is not MUL or not isinstance(scaled.args[0], Node):
        return []
    up = scaled.args[0]
    if up.target is not LINEAR or not isinstance(up.args[0], Node) or not isinstance(up.args[1], Node):
        return []
    down, B = up.args[0], up.args[1]
    A = [down.args[1]] if down.target is LINEAR and isinstance(down.args[1], Node) else []
    return [scaled, up, down, B, *A]


def _insert(module: GraphModule, product: Node, prefix: str) -> None:
    graph = module.graph
    x = product.args[0]
    scale = adapter_scale(attribute(module, prefix + ADAPTER_SCALE))
    with graph.inserting_after(product):
        anchor = graph.create_node("call_function", torch.ops.aten.alias.default, (product,))
    users = [user for user in product.users if user is not anchor]
    with graph.inserting_before(anchor):
        A = _attribute(module, product, prefix + ADAPTER_A)
        B = _attribute(module, product, prefix + ADAPTER_B)
        down = emit(graph, LINEAR, (x, A, None), like=product)  # [..., K] @ [K, R] -> [..., R]
        up = emit(graph, LINEAR, (down, B, None), like=product)  # [..., R] @ [R, N] -> [..., N]
        scaled = emit(graph, MUL, (up, scale), like=product)
        total = emit(graph, ADD, (product, scaled), like=product)
    graph.erase_node(anchor)
    for user in users:
        user.replace_input_with(product, total)


def _attribute(module: GraphModule, product: Node, target: str) -> Node:
    node = module.graph.get_attr(target)
    like = product.args[1]
    assert isinstance(like, Node)
    mode = getattr(like.meta.get("val"), "fake_mode", None)
    if mode is not None:
        node.meta["val"] = mode.from_tensor(attribute(module, target), static_shapes=True)
    return node


def _remove(total: Node, product: Node) -> None:
    scaled = total.args[1]
    assert isinstance(scaled, Node)
    chain = _chain(scaled)
    total.replace_all_uses_with(product)
    product.graph.erase_node(total)
    for node in chain:
        if not node.users:
            product.graph.erase_node(node)
