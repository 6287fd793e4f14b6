"""Two graphs as text: what differs, side by side, each kind of difference once."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping

from tabulate import tabulate
from torch.fx import GraphModule, Node

from slope_compile.passes.graph import regions

WIDTH = 76


def side_by_side(before: GraphModule, after: GraphModule, names: Mapping[str, str]) -> str:
    """The differing calls of two graphs in two columns; differences that look alike but for numbers are counted."""
    old, new = _lines(before, names), _lines(after, names)
    shown: dict[str, list[tuple[str, str]]] = {}
    counts: dict[str, int] = {}
    for tag, a, b, c, d in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if tag == "equal":
            continue
        left, right = old[a:b], new[c:d]
        height = max(len(left), len(right))
        pairs = [(_cell(left, i), _cell(right, i)) for i in range(height)]
        key = re.sub(r"_?\d+", "#", repr((left, right)))
        shown.setdefault(key, pairs)
        counts[key] = counts.get(key, 0) + 1
    rows = []
    for key, pairs in shown.items():
        rows += pairs
        more = counts[key] - 1
        rows.append((f"... and {more} more like this" if more else "", ""))
    return tabulate(rows, headers=("before", "after"), disable_numparse=True) if rows else "the graph is unchanged"


def _target(node: Node) -> str:
    if isinstance(node.target, str) or hasattr(node.target, "overloadpacket"):
        return str(node.target)
    return str(getattr(node.target, "__name__", node.target))


def _cell(lines: list[str], i: int) -> str:
    text = lines[i] if i < len(lines) else ""
    return text if len(text) <= WIDTH else text[: WIDTH - 3] + "..."


def _short(match: re.Match[str]) -> str:
    return ".values" if match[2] else "."


def _lines(module: GraphModule, names: Mapping[str, str]) -> list[str]:
    def say(node: Node) -> str:
        name = names.get(node.name, node.name)
        return re.sub(r"\.parametrizations\.(\w+)\.(?:(original)|\d+\.)", _short, name)

    lines = []
    for region in regions(module):
        for node in region.graph.nodes:
            if node.op.startswith("call"):
                target = _target(node).removesuffix(".default")
                given = [say(a) if isinstance(a, Node) else repr(a) for a in node.args]
                given += [f"{k}={say(v) if isinstance(v, Node) else v!r}" for k, v in node.kwargs.items()]
                lines.append(f"{node.name} = {target}({', '.join(given)})")
    return lines
