"""A graph reduced to its linears, repeated blocks folded, and its drawing as SVG."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Hashable, Iterable, Mapping, Sequence
from xml.sax.saxutils import escape

import networkx as nx

COLOURS = {"sparse": "#2a9d8f", "low-rank": "#e9a23b", "dense": "#d1495b", "other": "#c9ced6"}
"""Kind of a mark -> its colour."""
ROW, CHARACTER, GAP, HEIGHT, MARGIN = 46, 6.4, 14, 26, 24


@dataclasses.dataclass(frozen=True)
class Mark:
    """One box of the drawing."""

    path: str
    kind: str
    detail: str = ""
    """Shape and pattern; blocks fold where path, kind and detail of all their marks agree."""
    times: int = 1

    @property
    def label(self) -> str:
        text = f"{self.path}  {self.detail}".rstrip()
        return f"{text}  ×{self.times}" if self.times > 1 else text


@dataclasses.dataclass(frozen=True)
class Sketch:
    """Marks in the order of the dataflow, and edges between them by position."""

    marks: tuple[Mark, ...]
    edges: tuple[tuple[int, int], ...]


def sketch(flow: nx.DiGraph[Hashable], marks: Mapping[Hashable, Mark]) -> Sketch:
    """Contract everything that is not marked, and fold what repeats; an edge stands for a path between two marks."""
    order: list[Hashable] = []
    before: dict[Hashable, frozenset[Hashable]] = {}
    edges: set[tuple[Hashable, Hashable]] = set()
    for node in nx.topological_sort(flow):
        sources = frozenset[Hashable]().union(*(before[p] for p in flow.predecessors(node)))
        if node in marks:
            order.append(node)
            edges.update((source, node) for source in sources)
            sources = frozenset([node])
        before[node] = sources
    positions = {node: position for position, node in enumerate(order)}
    return _folded([marks[node] for node in order], [(positions[a], positions[b]) for a, b in edges])


def _folded(marks: list[Mark], edges: Iterable[tuple[int, int]]) -> Sketch:
    stands_for = list(range(len(marks)))
    depth = 0
    while depth < max((mark.path.count(".") for mark in marks), default=0):
        for run in _runs(marks, [i for i in range(len(marks)) if stands_for[i] == i], depth):
            first, times = run[0], len(run)
            for block in run[1:]:
                for kept, dropped in zip(first, block, strict=True):
                    stands_for = [kept if s == dropped else s for s in stands_for]
            last = marks[run[-1][0]].path.split(".")[depth]
            for i in first:
                parts = marks[i].path.split(".")
                parts[depth] += f"-{last}"
                marks[i] = dataclasses.replace(marks[i], path=".".join(parts), times=marks[i].times * times)
        depth += 1
    left = [i for i in range(len(marks)) if stands_for[i] == i]
    flow: nx.DiGraph[int] = nx.DiGraph()
    flow.add_nodes_from(left)
    # An edge back from one repetition to the next is what folding hides.
    flow.add_edges_from(e for e in ((stands_for[a], stands_for[b]) for a, b in edges) if e[0] < e[1])
    position = {i: p for p, i in enumerate(left)}
    reduced = nx.transitive_reduction(flow)
    return Sketch(tuple(marks[i] for i in left), tuple(sorted((position[a], position[b]) for a, b in reduced.edges)))


def _runs(marks: Sequence[Mark], kept: Iterable[int], depth: int) -> list[list[list[int]]]:
    """Neighbouring numbered blocks that are alike: runs of blocks, each the positions of its marks."""
    blocks: dict[tuple[str, ...], dict[int, list[int]]] = collections.defaultdict(dict)
    for i in kept:
        parts = marks[i].path.split(".")
        if len(parts) > depth + 1 and parts[depth].isdecimal():
            blocks[tuple(parts[:depth])].setdefault(int(parts[depth]), []).append(i)
    runs = []
    for numbered in blocks.values():
        run: list[list[int]] = []
        previous: tuple[int, object] | None = None
        for number in sorted(numbered):
            block = numbered[number]
            looks = [(marks[i].path.split(".")[depth + 1 :], marks[i].kind, marks[i].detail) for i in block]
            if previous == (number - 1, looks):
                run.append(block)
            else:
                runs.append(run)
                run = [block]
            previous = number, looks
        runs.append(run)
    return [run for run in runs if len(run) > 1]


def svg(panels: Mapping[str, Sketch]) -> str:
    """The text of an SVG file: titled drawings side by side from top to bottom, and a legend."""
    parts: list[str] = []
    left, bottom = float(MARGIN), 0.0
    for title, drawn in panels.items():
        width, height = _draw(parts, title, drawn, left)
        left, bottom = left + width + 2 * MARGIN, max(bottom, height)
    x = float(MARGIN)
    for kind, colour in COLOURS.items():
        parts.append(f'<rect class="legend" x="{x}" y="{bottom + 10}" width="14" height="14" fill="{colour}"/>')
        parts.append(f'<text x="{x + 20}" y="{bottom + 21}">{kind}</text>')
        x += 100
    size = f'width="{max(left, x):.0f}" height="{bottom + 40:.0f}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="monospace" font-size="10.5">'
    arrow = (
        '<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" markerHeight="6" orient="auto">'
        '<path d="M0 0L8 4L0 8z" fill="#8d96a3"/></marker></defs><rect width="100%" height="100%" fill="white"/>'
    )
    return "\n".join([head, arrow, *parts, "</svg>", ""])


def _draw(parts: list[str], title: str, drawn: Sketch, left: float) -> tuple[float, float]:
    """Append one drawing; returns its width and its lower end."""
    flow: nx.DiGraph[int] = nx.DiGraph()
    flow.add_nodes_from(range(len(drawn.marks)))
    flow.add_edges_from(drawn.edges)
    layers = [sorted(layer) for layer in nx.topological_generations(flow)]
    wide = [len(mark.label) * CHARACTER + 16 for mark in drawn.marks]
    rows = [sum(wide[i] for i in layer) + GAP * (len(layer) - 1) for layer in layers]
    width = max([*rows, 80.0])
    middle: dict[int, tuple[float, float]] = {}
    for depth, (layer, row) in enumerate(zip(layers, rows, strict=True)):
        x = left + (width - row) / 2
        for i in layer:
            middle[i] = x + wide[i] / 2, 60.0 + depth * ROW
            x += wide[i] + GAP
    parts.append(f'<text x="{left}" y="24" font-size="14" font-weight="bold">{escape(title)}</text>')
    for a, b in drawn.edges:
        (x1, y1), (x2, y2) = middle[a], middle[b]
        line = f'x1="{x1:.1f}" y1="{y1 + HEIGHT / 2}" x2="{x2:.1f}" y2="{y2 - HEIGHT / 2}"'
        parts.append(f'<line {line} stroke="#8d96a3" marker-end="url(#arrow)"/>')
    for i, mark in enumerate(drawn.marks):
        x, y = middle[i]
        box = f'x="{x - wide[i] / 2:.1f}" y="{y - HEIGHT / 2}" width="{wide[i]:.1f}" height="{HEIGHT}"'
        parts.append(f'<rect {box} rx="5" fill="white"/>')  # hides the edges that pass below
        parts.append(f'<rect class="node" {box} rx="5" fill="{COLOURS[mark.kind]}" fill-opacity="0.75"/>')
        parts.append(f'<text x="{x:.1f}" y="{y + 4}" text-anchor="middle">{escape(mark.label)}</text>')
    return width, 60.0 + len(layers) * ROW
