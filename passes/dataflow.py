"""The dataflow between the linears of a graph, with the bodies of higher-order operators in place of their calls."""

from __future__ import annotations

from collections.abc import Iterable

import networkx as nx
from torch.fx import Node

from slope_compile.passes.graph import Region


def dataflow(found: Iterable[Region]) -> nx.DiGraph[Node]:
    """A graph over all nodes: an edge from each producer to each consumer.

    A call of an entered body has edges from its operands to the body's placeholders and from the body's output to
    the call, and none past the body.
    """
    graph: nx.DiGraph[Node] = nx.DiGraph()
    entered = {region.call: region for region in found if region.entered and region.call is not None}
    for region in found:
        if not region.entered:
            continue
        for node in region.graph.nodes:
            graph.add_node(node)
            body = entered.get(node)
            if body is None:
                graph.add_edges_from((source, node) for source in node.all_input_nodes)
                continue
            graph.add_edges_from((outer, placeholder) for placeholder, outer in body.bindings.items())
            graph.add_edge(body.graph.output_node(), node)
    return graph


def without_predecessor(graph: nx.DiGraph[Node], marked: set[Node]) -> set[Node]:
    """The marked nodes that no other marked node comes before.  One sweep, linear in the size of the graph.

    On the reversed graph these are the marked nodes that no other marked node comes after.
    """
    reached: set[Node] = set()
    for node in nx.topological_sort(graph):
        if any(p in reached or p in marked for p in graph.predecessors(node)):
            reached.add(node)
    return marked - reached
