"""``explain``: its facts against what the library really does, its drawing, and that it leaves the model alone."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import sympy
import torch
from torch import nn
from torch.fx import GraphModule
from torch.utils.flop_counter import FlopCounterMode

import slope_compile as slope
from problems import column_mask
from recording import fresh_dynamo as fresh_dynamo
from slope_compile import cost
from slope_compile._capture import capture
from slope_compile.sketch import COLOURS, Mark
from toy import DENSE, SPARSE, Block, Toy, token_ids, toy

SVG = "{http://www.w3.org/2000/svg}"
PEAKS = cost.Device("mine", 1e12, 2e12, 1e11, launch=1e-6)


def plain(dtype: torch.dtype = torch.float32) -> Toy:
    torch.manual_seed(0)
    return toy(dtype)


@pytest.mark.parametrize(
    ("way", "dtype"),
    [
        *[("dense", torch.float32), ("prepared", torch.bfloat16)],
        *(
            pytest.param(way, dtype, marks=pytest.mark.slow)
            for way, dtype in [("dense", torch.bfloat16), ("prepared", torch.float32)]
        ),
    ],
)
def test_facts(way: str, dtype: torch.dtype) -> None:
    """Densities and bytes equal those of a model that has really been converted."""
    model, converted = plain(dtype), plain(dtype)
    slope.sparsify_(converted)
    found = slope.explain(converted if way == "prepared" else model, token_ids(3, 5), device=PEAKS)
    facts = {f.path: f for f in found.linears}
    assert tuple(f.path for f in found.linears if f.sparse) == SPARSE
    assert {f.path for f in found.linears if not f.sparse} == set(DENSE)
    nm = slope.Pattern(2, 4)
    for path in SPARSE:
        f, layer = facts[path], converted.get_submodule(path)
        assert isinstance(layer, nn.Linear)
        weight = layer.weight.detach()
        twice = weight * column_mask(weight.float(), nm)
        assert (f.shape, f.tokens, f.pattern) == (tuple(weight.shape), "15", "2:4")
        assert f.density == int(weight.count_nonzero()) / weight.numel() == 0.5
        assert f.column_density == int(twice.count_nonzero()) / weight.numel()
        stored = slope.training_state(converted, paths=[path]).linears
        assert f.bytes_before == weight.nbytes
        assert f.bytes_after == stored.weights + stored.metadata - 8, "the age is not part of it"
        sparse = cost.Layer(f.shape[0], f.shape[1], dtype.itemsize)
        assert f.seconds_after == pytest.approx(float(PEAKS.time(sparse.forward()).subs(cost.M, 15)))
        assert f.seconds_before == pytest.approx(float(PEAKS.time(sparse.dense_forward()).subs(cost.M, 15)))
    assert facts["head"].reason is slope.Reason.HEAD
    assert facts["head"].bytes_before == facts["head"].bytes_after
    assert found.totals["bytes_after"] == sum(f.bytes_after or 0 for f in found.linears)


@pytest.mark.parametrize("way", ["dense", "prepared", "compiled", "pruned"])
def test_the_model_is_left_alone(way: str) -> None:
    model = plain()
    if way == "prepared":
        slope.sparsify_(model, slope.SlopeConfig(adapter_rank=2))
    if way == "pruned":
        torch.compile(model, backend=slope.slope, options={"compiler": "eager"})(token_ids())
    given: nn.Module = torch.compile(model, backend="eager") if way == "compiled" else model  # type: ignore[assignment]
    before = {name: t.clone() for name, t in model.state_dict().items()}
    modules = [(name, type(m)) for name, m in model.named_modules()]
    seed = torch.random.get_rng_state()
    slope.explain(given, torch.ones(2, 4).long())
    assert torch.equal(seed, torch.random.get_rng_state())
    after = model.state_dict()
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor.view(torch.uint8) if tensor.ndim else tensor, after[name].view(torch.uint8)), name
    assert modules == [(name, type(m)) for name, m in model.named_modules()]
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.slow
def test_many_calls_do_not_use_up_recompilations() -> None:
    """More calls than Dynamo allows recompilations, and the model itself still compiles."""
    model, ids = plain(), token_ids()
    graphs = []

    def backend(module: torch.fx.GraphModule, inputs: object) -> Any:
        graphs.append(module)
        return module.forward

    with torch._dynamo.config.patch(recompile_limit=3):
        for _ in range(5):
            assert len(slope.explain(model, ids).linears) == len(SPARSE) + len(DENSE)
        torch.compile(model, backend=backend)(ids)
    assert len(graphs) == 1


def test_symbols() -> None:
    ids = token_ids(3, 6)
    torch._dynamo.mark_dynamic(ids, 0)
    facts = slope.explain(plain(), ids, device=PEAKS).linears[1]
    assert facts.tokens.count("s") >= 1
    assert facts.seconds_before == pytest.approx(
        float(PEAKS.time(cost.DenseLayer(16, 16, 4).dense_forward()).subs(cost.M, 18))
    )


@pytest.mark.parametrize("shape", ["checkpointed", "broken"])
def test_several_graphs(shape: str) -> None:
    """Bodies of checkpointed blocks, and graph breaks: every linear once, in both drawings."""
    model = toy(torch.float32, checkpointed=shape == "checkpointed")
    if shape == "broken":
        for block in model.blocks:
            assert isinstance(block, Block)
            block.between = torch._dynamo.graph_break
    found = slope.explain(model, token_ids())
    assert Counter(f.path for f in found.linears) == Counter((*SPARSE, *DENSE))
    # A break inside the loop over the blocks leaves the loop, and with it the head, to Python; each block is 2 graphs.
    eager = {"head"} if shape == "broken" else set()
    assert {f.path for f in found.linears if f.reason is slope.Reason.EAGER} == eager
    assert len(found.graphs) == (4 if eager else 1)
    assert {m.path for m in found.after.marks} == {*SPARSE, *DENSE, "input", "output"} - eager
    assert sum(m.times for m in found.before.marks) == len(SPARSE) + len(DENSE) + 2 - len(eager)


def test_linears_in_no_graph() -> None:
    """A prepared layer that the call does not reach is listed with what it stores."""
    model = plain()
    model.spare = nn.Linear(16, 8)
    slope.sparsify_(model, slope.SlopeConfig(heads_dense=False))
    (spare,) = (f for f in slope.explain(model, token_ids()).linears if f.path == "spare")
    assert (spare.sparse, spare.reason, spare.density) == (False, slope.Reason.EAGER, 0.5)
    stored = slope.training_state(model, paths=["spare"]).linears
    assert spare.bytes_after == stored.weights + stored.metadata - 8


# --- what a reader sees ----------------------------------------------------------------------------------------------


def deep(layers: int) -> Toy:
    model = plain()
    model.blocks.extend(Block() for _ in range(layers - 2))
    return model


def test_repeated_blocks_are_folded(tmp_path: Path) -> None:
    found = slope.explain(deep(5), token_ids())
    labels = [mark.label for mark in found.after.marks]
    # Block 0 keeps its first linear dense and so is another block than the four that follow.
    assert len(labels) == 2 + 4 + 4 + 1
    assert "blocks.1-4.qkv  48x16 2:4  ×4" in labels
    assert [m.label for m in found.before.marks][1] == "blocks.0-4.qkv  48x16  ×5"
    assert len(found.before.marks) == 2 + 4 + 1
    found.to_svg(tmp_path / "graph.svg")
    root = ET.parse(tmp_path / "graph.svg").getroot()
    boxes = Counter(e.get("fill") for e in root.iter(f"{SVG}rect") if e.get("class") == "node")
    assert boxes == {COLOURS["sparse"]: 7, COLOURS["dense"]: 2 + 5, COLOURS["other"]: 4}
    legend = {e.get("fill") for e in root.iter(f"{SVG}rect") if e.get("class") == "legend"}
    assert legend == set(COLOURS.values())
    texts = ["".join(e.itertext()) for e in root.iter(f"{SVG}text")]
    assert {*labels, *COLOURS, "before", "after"} <= set(texts)
    assert len(list(root.iter(f"{SVG}line"))) == len(found.before.edges) + len(found.after.edges)


@pytest.mark.slow
def test_boxes_of_a_deep_model_with_adapters_stay_apart(tmp_path: Path) -> None:
    model = deep(12)
    slope.sparsify_(model, slope.SlopeConfig(adapter_rank=2))
    slope.set_adapters(model, True)
    found = slope.explain(model, token_ids())
    found.to_svg(tmp_path / "graph.svg")
    root = ET.parse(tmp_path / "graph.svg").getroot()
    boxes = [
        tuple(float(e.get(side, "")) for side in ("x", "y", "width", "height"))
        for e in root.iter(f"{SVG}rect")
        if e.get("class") == "node"
    ]
    assert len(boxes) == len(found.before.marks) + len(found.after.marks) < 50
    for i, (x, y, width, height) in enumerate(boxes):
        assert x >= 0
        assert x + width <= float(root.get("width", ""))
        assert y + height <= float(root.get("height", ""))
        for left, top, wide, high in boxes[:i]:
            assert x + width < left or left + wide < x or y + height < top or top + high < y


def test_edges_follow_the_dataflow() -> None:
    found = slope.explain(plain(), token_ids()).after
    names = [m.path for m in found.marks]
    assert {(names[a], names[b]) for a, b in found.edges} >= {
        ("input", "blocks.0.qkv"),
        ("blocks.0.qkv", "blocks.0.out"),
        ("blocks.0.up", "blocks.0.down"),
        ("blocks.1.down", "head"),
        ("head", "output"),
    }
    assert all(a < b for a, b in found.edges)


def test_adapters_are_drawn() -> None:
    model = plain()
    slope.sparsify_(model, slope.SlopeConfig(adapter_rank=2))
    off = slope.explain(model, token_ids(), device=PEAKS)
    slope.set_adapters(model, True)
    on = slope.explain(model, token_ids(), device=PEAKS)
    assert not [m for m in off.after.marks if m.kind == "low-rank"]
    assert {m.path for m in on.after.marks if m.kind == "low-rank"} == {f"{p} A" for p in SPARSE}
    assert {m.path for m in on.after.marks if m.detail.endswith("2:4 + B")} == set(SPARSE)
    for a, b in zip(off.linears, on.linears, strict=True):
        assert a.seconds_after is not None
        assert b.seconds_after is not None
        assert (b.seconds_after > a.seconds_after) == a.sparse


def test_the_graph_is_that_of_the_backend(fresh_dynamo: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """With adapters on, every pass has something to do."""
    handed: list[list[str]] = []

    def targets(module: GraphModule) -> list[str]:
        return [str(node.target) for node in module.graph.nodes if node.op == "call_function"]

    def compile_graph(module: GraphModule, *_: Any) -> Any:
        handed.append(targets(module))
        return module.forward

    model = plain()
    slope.sparsify_(model, slope.SlopeConfig(adapter_rank=2))
    slope.set_adapters(model, True)
    monkeypatch.setattr("slope_compile.backend.compile_graph", compile_graph)
    torch.compile(model, backend="slope")(token_ids())
    (graph,) = capture(model, (token_ids(),), {}, slope.SlopeConfig())
    assert handed == [targets(graph.after)]


@pytest.mark.parametrize("symbols", [pytest.param(False, marks=pytest.mark.slow), True])
def test_flops_and_bytes_are_those_of_the_cost_model_and_of_pytorch(symbols: bool, fresh_dynamo: None) -> None:
    model, ids = plain(), token_ids(3, 5)
    with FlopCounterMode(display=False) as counter:
        model(ids)
    counts = counter.get_flop_counts()["Global"]
    attention = sum(n for op, n in counts.items() if "attention" in str(op) or "bmm" in str(op))
    if symbols:
        for dim in (0, 1):
            torch._dynamo.mark_dynamic(ids, dim)
    found = slope.explain(model, ids)
    whole: Any = sum(sympy.sympify(f.flops_before) for f in found.linears)
    names = sorted(whole.free_symbols, key=str)
    assert len(names) == 2 * symbols
    at = dict(zip(names, (3, 5), strict=True)) if symbols else {}
    assert whole.subs(at) == sum(counts.values()) - attention > 0
    for f in found.linears:
        layer = cost.Layer(f.shape[0], f.shape[1], 4)
        dense, rewrite = layer.dense_forward(), layer.forward() if f.sparse else layer.dense_forward()
        expressions = (f.flops_before, f.flops_after, f.moved_before, f.moved_after)
        expected = (dense.flops, rewrite.flops, dense.moved, rewrite.moved)
        for expression, other in zip(expressions, expected, strict=True):
            assert sympy.sympify(expression).subs(at) == other.subs(cost.M, 15)
        assert f"{f.flops_before} -> {f.flops_after}" in str(found)
        assert f"{f.moved_before} -> {f.moved_after}" in str(found)
    totals, linears = found.totals, json.loads(found.to_json())["linears"]
    assert totals["flops_before"] == str(whole)
    assert [row["moved_after"] for row in linears] == [str(f.moved_after) for f in found.linears]


def test_text_and_json() -> None:
    found = slope.explain(plain(), token_ids(3, 5), device="H100-SXM")
    text = str(found)
    for part in (*SPARSE, *DENSE, "7 of 9 linears sparse", "slope.linear", "slope.compress", "output head"):
        assert part in text
    assert "NVIDIA H100 data sheet" in text
    data = json.loads(found.to_json())
    assert [row["path"] for row in data["linears"]] == [f.path for f in found.linears]
    assert data["totals"] == found.totals
    for side, sketch in (("before", found.before), ("after", found.after)):
        drawn = data["drawing"][side]
        assert [(m["path"], m["kind"], m["times"]) for m in drawn["marks"]] == [
            (m.path, m.kind, m.times) for m in sketch.marks
        ]
        assert [tuple(edge) for edge in drawn["edges"]] == list(sketch.edges)
    assert data["linears"][1]["seconds_before"] is None, "the sheet's peaks hold for 16 bits only"
    assert slope.explain(plain(torch.bfloat16), token_ids(), device="H100-SXM").linears[1].seconds_before is not None


def test_a_tied_head_is_one_linear_under_one_of_its_names() -> None:
    model = plain()
    model.head = nn.Linear(model.embedding.embedding_dim, model.embedding.num_embeddings, bias=False)
    model.head.weight = model.embedding.weight
    found = slope.explain(model, token_ids())
    tied = [f.path for f in found.linears if f.reason is slope.Reason.TIED]
    assert len(tied) == 1
    assert len(found.linears) == len(SPARSE) + len(DENSE)


def test_break_even_counts_and_peaks_for_other_elements_are_in_the_text() -> None:
    slow_to_start = cost.Device("mine", 1e12, 2e12, 1e11, launch=1e-6)
    found = slope.explain(plain(), token_ids(), device=slow_to_start)
    text = str(found)
    counts = [f.break_even for f in found.linears if f.break_even is not None]
    assert ("pays above M" in text) == bool(counts)
    assert all(f" {count:.0f} " in text for count in counts)
    half = str(slope.explain(plain(), token_ids(), device="H200-SXM"))
    assert "none, as these peaks are for elements of 2 bytes" in half


def test_labels_are_escaped() -> None:
    from slope_compile.sketch import Sketch, svg

    text = svg({"a<b": Sketch((Mark("x&y", "dense"),), ())})
    assert ET.fromstring(text) is not None


def test_errors() -> None:
    with pytest.raises(TypeError, match=r"expected an nn\.Module, got int"):
        slope.explain(3)  # type: ignore[arg-type]
    with pytest.raises(slope.ConfigError, match="no data sheet for 'B200'"):
        slope.explain(plain(), token_ids(), device="B200")
    with pytest.raises(slope.ConversionError, match="no graph of ReLU has a linear"):
        slope.explain(nn.ReLU(), torch.ones(3))


def test_measured_times() -> None:
    """Sparse linears are timed when asked, and only then."""
    model, ids = plain(), token_ids()
    found = slope.explain(model, ids, measure=True)
    for f in found.linears:
        assert (f.measured_before is not None) == (f.measured_after is not None) == f.sparse
        assert not f.sparse or 0 < (f.measured_after or 0) < 1
    for when in ("before", "after"):
        times = [getattr(f, f"measured_{when}") for f in found.linears if f.sparse]
        assert found.totals[f"measured_{when}"] == pytest.approx(sum(times))
    assert "measured forward products of the sparse linears" in str(found)
    without = slope.explain(model, ids)
    assert all(f.measured_before is None for f in without.linears)
    assert without.totals["measured_before"] is without.totals["measured_after"] is None
    assert "measured" not in str(without)
