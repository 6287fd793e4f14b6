"""See the rewrite: a model's graph before and after, as a table and as a drawing.

    python examples/inspect_graph.py                       # table on the terminal, runs/inspect/graph.svg
    python examples/inspect_graph.py --layers 1 --adapters --out runs/inspect/graph.png

The model is exported, the passes are applied to the exported program, and both graphs are drawn side by side: sparse
products, low-rank adapters and dense linears in colours of their own, everything else grey.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import networkx as nx
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Patch
from tabulate import tabulate
from torch.fx import GraphModule, Node

import slope_compile as slope
from gpt import GPT, GPTConfig

COLOURS = {"sparse": "#2a9d8f", "low-rank": "#e9a23b", "dense": "#d1495b", "other": "#c9ced6"}


def kind(node: Node) -> str:
    """``sparse``, ``low-rank``, ``dense`` (all linears) or ``other``."""
    if node.target is torch.ops.slope.linear.default:
        return "sparse"
    if node.target is not torch.ops.aten.linear.default:
        return "other"
    weight = node.args[1]
    return "low-rank" if isinstance(weight, Node) and "_adapter_" in str(weight.target) else "dense"


def densities(module: GraphModule, node: Node) -> tuple[float, float]:
    """Measured density of a sparse product's weight: forward W^R, and backward W^{R,C} picked by magnitude."""
    _, values_node, pattern_node, _, keep, group = node.args[:6]
    assert isinstance(values_node, Node)
    assert isinstance(pattern_node, Node)
    values = module.get_parameter(str(values_node.target))
    pattern = module.get_buffer(str(pattern_node.target))
    forward = torch.ops.slope.expand(values, pattern, keep, group)
    backward, _ = torch.ops.slope.compress_columns(values, pattern, keep, group)
    dense = forward.numel()
    return int(forward.count_nonzero()) / dense, int(backward.count_nonzero()) / dense


def rows(module: GraphModule, report: slope.Report) -> Iterator[tuple[str, ...]]:
    """One row per linear: node, weight, shape, pattern, densities, decision, reason."""
    products = {
        str(node.args[1].target).removesuffix(".weight_values"): node
        for node in module.graph.nodes
        if kind(node) == "sparse"
    }
    for decision in report:
        node = products.get(decision.weight)
        measured = ("1.0000", "1.0000") if node is None else tuple(f"{d:.4f}" for d in densities(module, node))
        yield (
            node.name if node is not None else decision.node,
            decision.weight,
            "x".join(map(str, decision.shape)),
            decision.pattern or "-",
            *measured,
            "sparse" if decision.sparse else "dense",
            decision.why,
        )


def label(node: Node) -> str:
    """The layer's module path for a linear, the node's own name for everything else."""
    weight = node.args[1] if kind(node) != "other" else None
    if not isinstance(weight, Node):
        return node.name
    path, _, name = str(weight.target).rpartition(".")
    return f"{path} {name[-1]}" if "_adapter_" in name else path


def draw(axes: Axes, module: GraphModule, title: str) -> None:
    """Draw a graph from top to bottom in the order of its dataflow; state and constants are left out."""
    graph: nx.DiGraph[Node] = nx.DiGraph()
    for node in module.graph.nodes:
        if node.op == "call_function" or (node.op in ("placeholder", "output")):
            graph.add_edges_from((source, node) for source in node.all_input_nodes if source.op != "get_attr")
    for depth, generation in enumerate(nx.topological_generations(graph)):
        for node in generation:
            graph.nodes[node]["depth"] = -depth
    position = nx.multipartite_layout(graph, subset_key="depth", align="horizontal")
    kinds = {node: kind(node) for node in graph}
    small = [n for n in graph if kinds[n] == "other"]
    linears = [n for n in graph if kinds[n] != "other"]
    nx.draw_networkx_edges(graph, position, ax=axes, edge_color="#8d96a3", arrowsize=6, width=0.7, node_size=120)
    nx.draw_networkx_nodes(graph, position, small, ax=axes, node_size=40, node_color=COLOURS["other"])
    nx.draw_networkx_nodes(
        graph, position, linears, ax=axes, node_size=160, node_color=[COLOURS[kinds[n]] for n in linears]
    )
    for node in graph:
        x, y = position[node]
        size = 6 if kinds[node] == "other" else 7.5
        axes.annotate(label(node), (x, y), xytext=(6, 0), textcoords="offset points", fontsize=size, va="center")
    axes.set_title(title)
    axes.margins(x=0.25)
    axes.set_axis_off()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--adapter-rank", type=int, default=4)
    parser.add_argument("--adapters", action="store_true", help="draw the graph with the adapters on")
    parser.add_argument("--out", default="runs/inspect/graph.svg", help="drawing, .svg or .png")
    given = parser.parse_args(arguments)

    torch.manual_seed(0)
    model = GPT(GPTConfig(layers=given.layers, width=given.width, heads=given.heads, context=32))
    tokens = torch.randint(0, 256, (2, 32))
    targets = torch.randint(0, 256, (2, 32))
    before = torch.export.export(model, (tokens, targets)).module()
    config = slope.SlopeConfig(pattern=given.pattern, adapter_rank=given.adapter_rank)
    assert isinstance(before, GraphModule)
    after = slope.transform(before, config)
    if given.adapters:
        slope.set_adapters(after, True)

    headers = ("node", "weight", "N x K", "pattern", "density", "density W^{R,C}", "decision", "reason")
    print(tabulate(rows(after, after.meta["slope_report"]), headers=headers, disable_numparse=True))
    losses = [module(tokens, targets).item() for module in (before, after)]
    print(f"\nloss before {losses[0]:.4f}, after {losses[1]:.4f} (untrained, half of the weights gone)")

    height = max(6.0, 0.16 * len(after.graph.nodes))
    figure, axes = plt.subplots(1, 2, figsize=(14, height), layout="constrained")
    draw(axes[0], before, "before")
    draw(axes[1], after, f"after: {config.pattern}")
    figure.legend(
        handles=[Patch(color=colour, label=name) for name, colour in COLOURS.items()], loc="lower center", ncols=4
    )
    path = Path(given.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    with plt.rc_context({"svg.fonttype": "none"}):  # text stays text, which can be searched
        figure.savefig(path, dpi=110)
    print(f"drawing: {path}")


if __name__ == "__main__":
    main()
