"""``explain``: what the backend would do with a model, for people, without doing it."""

from __future__ import annotations

import collections
import copy
import dataclasses
import functools
import gc
import json
import math
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import networkx as nx
import sympy
import torch
from tabulate import tabulate
from torch import nn
from torch.fx import Node

from slope_compile import cost
from slope_compile._capture import Captured, Linear, capture
from slope_compile._dynamo import uncompiled
from slope_compile.config import SlopeConfig, checked_config
from slope_compile.errors import ConversionError
from slope_compile.kernels import ops
from slope_compile.layers import LinearLayer, linear_layers
from slope_compile.lowering import DENSE, EXPANDED, PRUNED, lowering
from slope_compile.passes.dataflow import dataflow
from slope_compile.passes.fuse_low_rank import UP
from slope_compile.passes.graph import regions
from slope_compile.passes.profit import example_tokens
from slope_compile.pattern import Pattern
from slope_compile.report import WAYS_OUT, Reason, ways_out
from slope_compile.rules import layer_path
from slope_compile.side_by_side import side_by_side
from slope_compile.sketch import Mark, Sketch, sketch, svg
from slope_compile.stopwatch import forward_seconds


@dataclasses.dataclass(frozen=True)
class LinearFacts:
    """One linear of one graph."""

    path: str
    sparse: bool
    reason: Reason
    why: str
    shape: tuple[int, ...]
    """``(N, K)``, ``(E, N, K)`` for E experts; empty where the weight is not a parameter."""
    tokens: str
    """M, in the graph's own symbols where it has some."""
    pattern: str
    backward: str
    density: float
    """Measured share of the weight that is not zero in the forward product; 1.0 for a dense linear."""
    column_density: float | None
    """The same share of W^{R,C}, picked by magnitude from the current values; None with the exact gradient."""
    bytes_before: int | None
    """The dense weight."""
    bytes_after: int | None
    """Values and metadata, as ``sparsify_`` stores them (a drop-in model keeps its dense-shaped weight)."""
    lowering: str
    """How the forward product is computed on the device of the model."""
    seconds_before: float | None = None
    """Roofline time of the forward product; None without a device, or where its peaks are for another element size."""
    seconds_after: float | None = None
    measured_before: float | None = None
    """Measured seconds of the forward product, on random activations; None unless asked for, and for dense linears."""
    measured_after: float | None = None
    flops_before: sympy.Expr | None = None
    """FLOPs of the forward product, in the graph's own symbols if it has some; None if the weight is not one matrix."""
    flops_after: sympy.Expr | None = None
    """FLOPs after the rewrite, with those of an adapter that is on."""
    moved_before: sympy.Expr | None = None
    """Bytes that it reads and writes."""
    moved_after: sympy.Expr | None = None
    break_even: float | None = None
    """Token count above which the rewritten forward product is faster at every count, where there is one."""

    @property
    def way_out(self) -> str:
        """What makes it sparse; "" for one that is."""
        return "" if self.sparse else WAYS_OUT[self.reason]


_SUMMED = ("bytes", "flops", "moved", "seconds", "measured")


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What :func:`explain` found.  ``str()`` is for a terminal."""

    linears: tuple[LinearFacts, ...]
    graphs: tuple[str, ...]
    """For each graph, before and after side by side."""
    before: Sketch
    after: Sketch
    device: cost.Device | None = None

    @property
    def totals(self) -> dict[str, Any]:
        """Counts, and sums over the linears that have the figure (measured seconds: the sparse ones), None where none
        has; expressions as text."""

        def total(field: str) -> Any:
            found = [value for f in self.linears if (value := getattr(f, field)) is not None]
            return sum(found) if found else None

        counts = {"linears": len(self.linears), "sparse": sum(f.sparse for f in self.linears)}
        sums = {f"{what}_{when}": total(f"{what}_{when}") for what in _SUMMED for when in ("before", "after")}
        return counts | {name: str(one) if isinstance(one, sympy.Expr) else one for name, one in sums.items()}

    def __str__(self) -> str:
        headers = ["linear", "N x K", "M", "pattern", "density", "W^{R,C}", "bytes", "after", "runs as", "reason"]
        rows = [_row(f) for f in self.linears]
        times = {
            "us, predicted": [(f.seconds_before, f.seconds_after) for f in self.linears],
            "us, measured": [(f.measured_before, f.measured_after) for f in self.linears],
        }
        for header, pairs in times.items():
            if any(pair != (None, None) for pair in pairs):
                headers.insert(-2, header)
                for row, (old, new) in zip(rows, pairs, strict=True):
                    row.insert(-2, f"{_micro(old)} -> {_micro(new)}")
        if any(f.break_even is not None for f in self.linears):
            headers.insert(-2, "pays above M")
            for row, f in zip(rows, self.linears, strict=True):
                row.insert(-2, "-" if f.break_even is None else f"{f.break_even:.0f}")
        total = self.totals
        lines = [tabulate(rows, headers=headers, disable_numparse=True), ""]
        lines.append(f"{total['sparse']} of {total['linears']} linears sparse")
        change = f"{total['bytes_before'] or 0} -> {total['bytes_after'] or 0} bytes"
        lines[-1] += f"; their weights and the dense ones: {change}"
        lines += ways_out(f.reason for f in self.linears if not f.sparse)
        if total["measured_before"] is not None:
            change = f"{_micro(total['measured_before'])} -> {_micro(total['measured_after'])} us"
            lines.append(f"measured forward products of the sparse linears, one after the other: {change}")
        if self.device is not None:
            change = f"{_micro(total['seconds_before'])} -> {_micro(total['seconds_after'])} us"
            if total["seconds_before"] is None and self.device.itemsize is not None:
                change = f"none, as these peaks are for elements of {self.device.itemsize} bytes"
            lines.append(f"predicted forward products on {self.device.name} (peaks: {self.device.source}): {change}")
        lines += ["", _costs(self.linears)]
        for number, text in enumerate(self.graphs):
            lines += ["", f"graph {number}", text]
        return "\n".join(lines)

    def to_json(self) -> str:
        """Everything as JSON: expressions as text, the drawing as its boxes and the edges between their positions."""
        linears = [dataclasses.asdict(f) | {"reason": f.reason.name, "way_out": f.way_out} for f in self.linears]
        device = None if self.device is None else dataclasses.asdict(self.device)
        drawing = {"before": dataclasses.asdict(self.before), "after": dataclasses.asdict(self.after)}
        data = {"linears": linears, "totals": self.totals, "device": device, "graphs": self.graphs, "drawing": drawing}
        return json.dumps(data, indent=2, default=str)

    def to_svg(self, path: str | Path) -> None:
        """Draw the linears before and after, from top to bottom in the order of the dataflow, alike blocks folded."""
        Path(path).write_text(svg({"before": self.before, "after": self.after}), encoding="utf-8")


def explain(
    model: nn.Module,
    *args: Any,
    config: SlopeConfig | None = None,
    device: cost.Device | str | None = None,
    measure: bool = False,
    **kwargs: Any,
) -> Explanation:
    """Say what ``torch.compile(model, backend="slope")`` would do with a model, and change nothing.

    A copy of the model runs once, forward, as it is; the passes rewrite the graphs that Dynamo captures, and nothing is
    pruned.  Works on dense models and on those that ``sparsify_`` has prepared.

    Args:
        model: a module, compiled or not.
        args, kwargs: what the model is called with.
        config: as given to the backend; a prepared model keeps what it was prepared with.
        device: for predicted times: a :class:`slope_compile.cost.Device`, or a name in ``cost.DATA_SHEETS``.
        measure: also time the forward product of each sparse linear, against the dense one, on the model's device.

    Raises:
        TypeError: ``model`` is not a module.
        ConfigError: there is no data sheet of that name, or ``config`` is no SlopeConfig.
        ConversionError: Dynamo captured no linear.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"explain: expected an nn.Module, got {type(model).__name__}")
    peaks = cost.device(device) if isinstance(device, str) else device
    try:
        return _explained(model, args, kwargs, checked_config("explain", config), peaks, measure)
    finally:
        gc.collect()  # the copy stands in cycles; what Dynamo compiled for it goes when it goes


def _explained(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    config: SlopeConfig,
    peaks: cost.Device | None,
    measure: bool,
) -> Explanation:
    copied = copy.deepcopy(uncompiled(model))
    gpus = {p.device for p in copied.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng([d.index for d in gpus]):
        captured = [c for c in capture(copied, args, kwargs, config) if c.linears]
    if not captured:
        raise ConversionError(
            f"explain: no graph of {type(model).__name__} has a linear; TORCH_LOGS=graph_breaks says what Dynamo "
            "left eager"
        )
    ranks = {
        layer.path: layer.low_rank.A.shape[0]
        for layer in linear_layers(copied)
        if layer.low_rank is not None and layer.low_rank.enabled
    }
    linears = tuple(_facts(linear, ranks, peaks, measure) for graph in captured for linear in graph.linears)
    seen = {facts.path for facts in linears}
    names = [(layer_path(name), p) for name, p in copied.named_parameters(remove_duplicate=False)]
    weights = {id(parameter) for path, parameter in names if path in seen}  # a tied one goes by one of its names
    linears += tuple(_eager(layer) for layer in linear_layers(copied) if id(layer.weight) not in weights)
    texts = tuple(side_by_side(graph.before, graph.after, graph.names) for graph in captured)
    return Explanation(linears, texts, _sketch(captured, "before"), _sketch(captured, "after"), peaks)


def _facts(linear: Linear, ranks: dict[str, int], peaks: cost.Device | None, measure: bool) -> LinearFacts:
    facts = _storage(linear)
    if measure and facts.sparse:
        facts = _measurement(facts, linear)
    if len(facts.shape) == 2:
        facts = _prediction(facts, linear, ranks.get(facts.path, 0), peaks)
    return facts


def _itemsize(linear: Linear) -> int:
    return linear.state[0].itemsize if linear.state else linear.dtype.itemsize


def _storage(linear: Linear) -> LinearFacts:
    """A record with the decision, the bytes before and after it, and the share of the weight that is left."""
    decision, shape = linear.decision, linear.decision.shape
    size = _itemsize(linear)
    density, column_density, lowered = 1.0, None, DENSE
    before = after = math.prod(shape) * size if shape else None
    if decision.sparse:
        nm = Pattern.parse(decision.pattern)
        values, pattern = linear.state[:2]
        forward = ops.expand(values, pattern, nm.keep, nm.group)
        N, K = shape = tuple(forward.shape)
        density = int(forward.count_nonzero()) / forward.numel()
        if decision.backward == "double_pruned":
            columns = ops.compress_columns(values, pattern, nm.keep, nm.group)[0]
            column_density = int(columns.count_nonzero()) / forward.numel()
        before, after = N * K * size, sum(t.nbytes for t in linear.state)
        M = _example(linear.tokens)
        lowered = PRUNED if linear.pruned else lowering("forward", M, N, K, linear.dtype, linear.device, nm)
    return LinearFacts(
        path=decision.weight,
        sparse=decision.sparse,
        reason=decision.reason,
        why=decision.why,
        shape=shape,
        tokens=str(cost.tokens(linear.tokens)),
        pattern=decision.pattern,
        backward=decision.backward,
        density=density,
        column_density=column_density,
        bytes_before=before,
        bytes_after=after,
        lowering=lowered,
    )


def _measurement(facts: LinearFacts, linear: Linear) -> LinearFacts:
    """Add the measured times of a sparse linear's forward product."""
    nm = Pattern.parse(facts.pattern)
    values, pattern = linear.state[:2]
    dense = ops.expand(values, pattern, nm.keep, nm.group)
    old, new = forward_seconds(_example(linear.tokens), dense, values.detach(), pattern, nm)
    return dataclasses.replace(facts, measured_before=old, measured_after=old if linear.pruned else new)


def _prediction(facts: LinearFacts, linear: Linear, rank: int, peaks: cost.Device | None) -> LinearFacts:
    """Add the cost of the forward product and, if there are peaks for its element size, the predicted times."""
    N, K = facts.shape
    size = _itemsize(linear)
    # A product that reads the pruned weight costs what a dense one costs.
    nm = Pattern.parse(facts.pattern) if facts.sparse and not linear.pruned else None
    dense, rewrite = _forward(N, K, size, nm, rank, cost.tokens(linear.tokens))
    facts = dataclasses.replace(
        facts,
        flops_before=dense.flops,
        flops_after=rewrite.flops,
        moved_before=dense.moved,
        moved_after=rewrite.moved,
    )
    if peaks is None or not peaks.fits(size):
        return facts
    before, after, even = _predicted(N, K, size, nm, rank, peaks)
    at = {cost.M: _example(linear.tokens)}
    return dataclasses.replace(
        facts, seconds_before=float(before.subs(at)), seconds_after=float(after.subs(at)), break_even=even
    )


def _eager(layer: LinearLayer) -> LinearFacts:
    """A linear that this call did not reach, or that Dynamo left to Python."""
    N, K = layer.shape
    weight, sparse = layer.weight, layer.sparse
    stored = weight.nbytes
    if sparse is not None:
        stored += sum(b.nbytes for b in (sparse.pattern, sparse.column_mask) if b is not None)
    return LinearFacts(
        path=layer.path,
        sparse=False,
        reason=Reason.EAGER,
        why=f"{Reason.EAGER.value}: not called, or left to Python by Dynamo",
        shape=(N, K),
        tokens="-",
        pattern="" if sparse is None else str(sparse.nm),
        backward="" if sparse is None else "exact",
        density=1.0 if sparse is None else sparse.nm.keep / sparse.nm.group,
        column_density=None,
        bytes_before=N * K * weight.itemsize,
        bytes_after=stored,
        lowering=DENSE if sparse is None else EXPANDED,
    )


@functools.lru_cache(maxsize=256)
def _predicted(
    N: int, K: int, size: int, nm: Pattern | None, rank: int, peaks: cost.Device
) -> tuple[sympy.Expr, sympy.Expr, float | None]:
    """Times of the dense and of the rewritten forward product in M, and where they cross for good."""
    old, new = _forward(N, K, size, nm, rank, cost.M)
    even = None if nm is None else cost.break_even(old, new, peaks)
    return peaks.time(old), peaks.time(new), None if even is None else float(even)


def _forward(
    N: int, K: int, size: int, nm: Pattern | None, rank: int, tokens: sympy.Expr
) -> tuple[cost.Cost, cost.Cost]:
    """The dense forward product, and what becomes of it: the same where it stays dense."""
    dense = cost.DenseLayer(N, K, size).dense_forward(tokens)
    return dense, dense if nm is None else cost.Layer(N, K, size, nm, rank, double_pruned=False).forward(tokens)


def _costs(linears: Sequence[LinearFacts]) -> str:
    """The cost of each kind of forward product, as the model of costs has it."""
    kinds = collections.Counter(
        (f.shape, f.pattern, f.flops_before, f.flops_after, f.moved_before, f.moved_after)
        for f in linears
        if f.flops_before is not None
    )
    rows = [
        (count, "x".join(map(str, shape)), pattern or "-", *(f"{a} -> {b}" for a, b in (flops, moved)))
        for (shape, pattern, *figures), count in kinds.items()
        for flops, moved in [(figures[:2], figures[2:])]
    ]
    headers = ("linears", "N x K", "pattern", "FLOPs, forward", "bytes read and written")
    return tabulate(rows, headers=headers, disable_numparse=True)


def _example(shape: Sequence[Any]) -> int:
    """M of this run; 1 where a size depends on data."""
    found = example_tokens(shape)
    return 1 if found is None else found


def _row(f: LinearFacts) -> list[str]:
    return [
        f.path,
        "x".join(map(str, f.shape)) or "-",
        f.tokens,
        f.pattern or "-",
        f"{f.density:.4f}",
        "-" if f.column_density is None else f"{f.column_density:.4f}",
        "-" if f.bytes_before is None else str(f.bytes_before),
        "-" if f.bytes_after is None else str(f.bytes_after),
        f.lowering,
        f.why,
    ]


def _micro(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e6:.2f}"


def _sketch(captured: Sequence[Captured], side: str) -> Sketch:
    """All graphs as one, in the order in which they ran."""
    whole: nx.DiGraph[Hashable] = nx.DiGraph()
    marks: dict[Hashable, Mark] = {"input": Mark("input", "other"), "output": Mark("output", "other")}
    last: Hashable = "input"
    for number, graph in enumerate(captured):
        module = graph.normal if side == "before" else graph.after
        found = regions(module)
        flow = dataflow(found)
        joint = ("end of graph", number)
        whole.add_edges_from(flow.edges)
        for node in flow:
            if node.op == "placeholder" and not flow.in_degree(node):
                whole.add_edge(last, node)
        whole.add_edge(module.graph.output_node(), joint)
        whole.add_edge(last, joint)
        for node in (n for region in found for n in region.graph.nodes):
            if node in graph.marks:
                marks[node] = _mark(graph, node, side)
        last = joint
    whole.add_edge(last, "output")
    return sketch(whole, marks)


def _mark(graph: Captured, node: Node, side: str) -> Mark:
    position = graph.marks[node]
    if position is None:
        return Mark(_adapter(graph, node), "low-rank")
    decision = graph.linears[position].decision
    detail = "x".join(map(str, decision.shape))
    if decision.sparse and side == "after":
        branch = "+ B" if len(node.args) > UP and node.args[UP] is not None else ""
        return Mark(decision.weight, "sparse", " ".join(filter(None, (detail, decision.pattern, branch))))
    return Mark(decision.weight, "dense", detail)


def _adapter(graph: Captured, node: Node) -> str:
    """``h.0.mlp.c_fc A`` from the name of the factor; a product for several adapters is named after the first."""
    weight = node.args[1]
    while isinstance(weight, Node) and weight.op != "placeholder" and weight.all_input_nodes:
        weight = weight.all_input_nodes[0]
    name = graph.names.get(str(weight), str(weight))
    layer, found, rest = name.partition(".parametrizations.weight.")
    return f"{layer} {rest.rpartition('.')[2]}" if found else name
