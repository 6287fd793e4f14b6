"""dataflow: which marked nodes come first, through the bodies of higher-order operators."""

from __future__ import annotations

import itertools

import networkx as nx
import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.utils.checkpoint import checkpoint

from graphs import Siblings, attribute_graph, dynamo_graph, nodes
from slope_compile.passes.dataflow import dataflow, without_predecessor
from slope_compile.passes.graph import regions
from slope_compile.passes.normalize import LINEAR

CASES = {
    "chain": ("0>1 1>2 2>3", {1, 3}, {1}),
    "two_roots": ("0>2 1>2", {0, 1, 2}, {0, 1}),
    "diamond": ("0>1 0>2 1>3 2>3", {1, 2, 3}, {1, 2}),
    "through_an_unmarked_node": ("0>1 1>2", {0, 2}, {0}),
    "side_branch": ("0>2 1>2 2>3", {1, 3}, {1}),
    "none_marked": ("0>1", set(), set()),
    "one_marked": ("0>1 1>2", {2}, {2}),
}
"""Edges, marked nodes, and those that no marked one comes before."""


@pytest.mark.parametrize(
    ("edges", "marked", "expected"), [pytest.param(*case, id=name) for name, case in CASES.items()]
)
def test_without_predecessor(edges: str, marked: set[int], expected: set[int]) -> None:
    plain = Graph()
    made = [plain.placeholder(f"n{i}") for i in range(4)]
    graph: nx.DiGraph[Node] = nx.DiGraph()
    graph.add_nodes_from(made)
    graph.add_edges_from((made[int(a)], made[int(b)]) for a, b in (edge.split(">") for edge in edges.split()))
    found = without_predecessor(graph, {made[i] for i in marked})
    assert found == {made[i] for i in expected}
    # The definition, spelled out.
    assert found == {
        n for n in (made[i] for i in marked) if not (nx.ancestors(graph, n) & {made[i] for i in marked})
    }


def test_siblings_are_first_together_and_the_output_projection_is_last() -> None:
    graph_module = attribute_graph(Siblings(), torch.randn(2, 8, dtype=torch.float64))
    graph = dataflow(regions(graph_module))
    linears = nodes(graph_module, LINEAR)
    assert len(linears) == 4
    assert without_predecessor(graph, set(linears)) == set(linears[:3])
    assert without_predecessor(graph.reverse(copy=False), set(linears)) == {linears[3]}


def test_order_is_known_through_bodies() -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            x = self.layers[0](x)
            for layer in (self.layers[1], self.layers[2]):
                y = checkpoint(layer, x, use_reentrant=False)
                assert isinstance(y, Tensor)
                x = y
            x = self.layers[3](x)
            return x

    graph_module, _ = dynamo_graph(Checkpointed(), torch.randn(2, 4))
    found = regions(graph_module)
    assert len(found) == 3
    graph = dataflow(found)
    assert nx.is_directed_acyclic_graph(graph)
    linears = nodes(graph_module, torch._C._nn.linear)
    assert [n.graph is graph_module.graph for n in linears] == [True, True, False, False]
    (first,) = without_predecessor(graph, set(linears))
    (last,) = without_predecessor(graph.reverse(copy=False), set(linears))
    assert "layers_modules_0" in str(first.args[1])
    assert "layers_modules_3" in str(last.args[1])
    ordered = sorted(linears, key=lambda n: len(nx.ancestors(graph, n)))
    assert all(nx.has_path(graph, a, b) for a, b in itertools.pairwise(ordered))


def test_weights_reach_linears_inside_bodies() -> None:
    def forward(x: Tensor, w: Tensor) -> Tensor:
        y = checkpoint(torch.nn.functional.linear, x, w, use_reentrant=False)
        assert isinstance(y, Tensor)
        return y

    graph_module, _ = dynamo_graph(forward, torch.randn(2, 4), torch.randn(4, 4))
    (linear,) = nodes(graph_module, torch._C._nn.linear)
    graph = dataflow(regions(graph_module))
    inputs = [n for n in graph_module.graph.nodes if n.op == "placeholder"]
    assert len(inputs) == 2
    assert all(nx.has_path(graph, n, linear) for n in inputs)
