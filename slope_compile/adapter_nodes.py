"""Adapters of a transformed GraphModule: nodes that are inserted into its graph and removed from it again.

    y = slope.linear(x, values, pattern, b)   <->   y = slope.linear(x, ...) + scale * linear(linear(x, A), B)
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from slope_compile.graph_state import ADAPTER_A, ADAPTER_B, ADAPTER_SCALE, VALUES, adapter_scale
from slope_compile.kernels import ops
from slope_compile.passes.graph import Region, attribute, give_value, recompile, regions
from slope_compile.passes.low_rank import ADD, MUL, add_adapter
from slope_compile.passes.normalize import LINEAR


def has_adapters(module: GraphModule) -> bool:
    """Whether any product of the graph has an adapter, on or off."""
    return bool(_products(module))


def set_adapter_nodes(module: GraphModule, on: bool) -> int:
    """Insert or remove the adapter nodes of every product that has an adapter; returns how many there are."""
    products = _products(module)
    changed = False
    for region, product, prefix in products:
        total = _total(region, product, prefix)
        if on and total is None:
            _insert(region, product, prefix)
            changed = True
        elif not on and total is not None:
            _remove(region, total, product)
            changed = True
    if changed:
        found = regions(module)
        for region in found:
            region.graph.lint()
        recompile(found)
    return len(products)


def _products(module: GraphModule) -> list[tuple[Region, Node, str]]:
    """``slope.linear`` nodes with an adapter, and the prefix of its tensors' names."""
    products = []
    for region in regions(module):
        for node in region.graph.nodes:
            if node.op != "call_function" or node.target is not ops.linear:
                continue
            home, values = region.origin(node.args[1])
            if home.parent is None and values.op == "get_attr" and str(values.target).endswith(VALUES):
                prefix = str(values.target).removesuffix(VALUES)
                if attribute(module, prefix + ADAPTER_A) is not None:
                    products.append((region, node, prefix))
    return products


def _total(region: Region, product: Node, prefix: str) -> Node | None:
    """The sum that adds the adapter to this product, if it is on."""
    for user in product.users:
        if user.target is ADD and user.args[0] is product and isinstance(user.args[1], Node):
            reads = _chain(user.args[1])
            if any(region.origin(n)[1].target == prefix + ADAPTER_B for n in reads):
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


def _insert(region: Region, product: Node, prefix: str) -> None:
    graph = region.graph
    x = product.args[0]
    assert isinstance(x, Node)
    scale = adapter_scale(attribute(region.root.module, prefix + ADAPTER_SCALE))
    with graph.inserting_after(product):
        anchor = graph.create_node("call_function", torch.ops.aten.alias.default, (product,))
    users = [user for user in product.users if user is not anchor]
    A = _attribute(region, product, prefix + ADAPTER_A)
    B = _attribute(region, product, prefix + ADAPTER_B)
    with graph.inserting_before(anchor):
        _, total = add_adapter(product, x, A, B, scale, like=product)
    graph.erase_node(anchor)
    for user in users:
        user.replace_input_with(product, total)


def _attribute(region: Region, product: Node, target: str) -> Node:
    """A parameter of the root module, available in this region: read beside the product's values."""
    values = product.args[1]
    assert isinstance(values, Node)
    root, like = region.origin(values)
    with root.graph.inserting_after(like):
        node = root.graph.get_attr(target)
    give_value(node, attribute(root.module, target), like)
    return region.bring(node, root)


def _remove(region: Region, total: Node, product: Node) -> None:
    scaled = total.args[1]
    assert isinstance(scaled, Node)
    chain = _chain(scaled)
    total.replace_all_uses_with(product)
    product.graph.erase_node(total)
    for node in chain:
        _erase(region, node)


def _erase(region: Region, node: Node) -> None:
    """Erase a node that nothing reads, and what brings it here."""
    if node.users:
        return
    if region.parent is not None and node in region.bindings:
        _erase(region.parent, region.drop(node))
    elif node.op != "placeholder":
        region.graph.erase_node(node)
