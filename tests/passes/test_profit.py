"""profit: what the cost model refuses, why, and that nothing is pruned then."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import sympy
import torch
from torch import nn

import slope_compile as slope
from graphs import Chain, attribute_graph, context, rows
from recording import fresh_dynamo as fresh_dynamo
from recording import record
from slope_compile import cost
from slope_compile.config import Override
from slope_compile.options import parse_options
from slope_compile.passes.pipeline import run_passes
from slope_compile.passes.profit import example_tokens, objection
from slope_compile.pattern import Pattern
from slope_compile.report import Reason

MODEST = cost.Device("modest", peak=1e12, sparse_peak=2e12, bandwidth=1e11, launch=1e-6)
"""Peaks for any dtype.  A pattern without a sparse unit is expanded first, one launch more and bytes besides."""
NO_GAIN = cost.Device("no gain", peak=1e12, sparse_peak=1e11, bandwidth=1e15)
"""A sparse unit slower than the dense one: 2:4 never pays."""
CROSSING = cost.Device("crossing", peak=1e12, sparse_peak=0.5e12, bandwidth=1e10)
"""Slow memory, and a slow sparse unit: 2:4 pays as long as it is bound by memory."""
ALL: dict[str, Any] = {"first_dense": False, "heads_dense": False, "backward": "exact"}


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("exact", [False, True], ids=["double_pruned", "exact"])
@pytest.mark.parametrize("nm", ["2:4", "2:8", "1:4"])
@pytest.mark.parametrize("device", [MODEST, NO_GAIN, CROSSING], ids=lambda device: device.name)
def test_it_objects_exactly_where_the_prediction_is_slower(
    device: cost.Device, nm: str, exact: bool, training: bool
) -> None:
    N, K, size = 64, 128, 4
    dense, layer = cost.DenseLayer(N, K, size), cost.Layer(N, K, size, Pattern.parse(nm), double_pruned=not exact)
    old, new = (dense.dense_training(), layer.training()) if training else (dense.dense_forward(), layer.forward())
    pays = cost.profitable(old, new, device)
    for tokens in (1, 7, 64, 1000, 100_000):
        text = objection(tokens, (N, K), size, Pattern.parse(nm), exact, training, device)
        before, after = (device.time(c).subs({cost.M: sympy.Integer(tokens)}) for c in (old, new))
        assert bool(text) == bool(after > before)
        assert not (text and pays.contains(tokens)), "the counts that the message names do not hold this one"


def test_both_outcomes_occur() -> None:
    """The test above would pass if nothing were ever refused, or everything."""
    assert not objection(64, (64, 128), 4, Pattern(2, 4), True, True, MODEST)
    assert objection(64, (64, 128), 4, Pattern(2, 8), True, True, MODEST)


def test_the_message_names_times_counts_and_the_way_out() -> None:
    never = objection(16, (64, 128), 4, Pattern(2, 4), True, False, NO_GAIN)
    for part in ("at M = 16", "on no gain", "it pays at no M", "leave 'device' out"):
        assert part in never
    some = objection(10_000, (4096, 4096), 4, Pattern(2, 4), True, False, CROSSING)
    assert "it pays at M from 1 to " in some


def test_peaks_for_another_element_size_say_nothing() -> None:
    sheet = cost.device("H200-SXM")
    assert sheet.itemsize == 2
    assert objection(16, (64, 128), 4, Pattern(2, 8), True, False, sheet) == ""


def test_tokens_of_a_shape() -> None:
    assert example_tokens((2, 3, 8)) == 6
    assert example_tokens((8,)) == 1
    program = torch.export.export(
        nn.Linear(8, 8), (torch.randn(5, 8),), dynamic_shapes={"input": {0: torch.export.Dim("rows", min=2)}}
    )
    (x,) = (n for n in program.graph.nodes if n.name == "input")
    assert isinstance(x.meta["val"].shape[0], torch.SymInt)
    assert example_tokens(x.meta["val"].shape) == 5


def test_in_a_graph() -> None:
    """One layer of two is refused, and keeps its weight."""
    module, x = Chain(8, 8, 8), rows(3, 8)
    graph_module = attribute_graph(module, x)
    within = context(graph_module, overrides=(Override(path=r"layers\.1", pattern="2:8"),))
    within.device = MODEST
    run_passes(graph_module, within)
    assert [(d.weight, d.sparse, d.reason) for d in within.report] == [
        ("layers.0", True, Reason.SELECTED),
        ("layers.1", False, Reason.UNPROFITABLE),
    ]
    assert torch.equal(graph_module.get_parameter("layers.1.weight"), module.get_parameter("layers.1.weight"))


def test_through_torch_compile(monkeypatch: pytest.MonkeyPatch, fresh_dynamo: None) -> None:
    module, x = Chain(8, 8, 8), rows(3, 8)
    before = copy.deepcopy(module)
    recording = record(monkeypatch)
    options: dict[str, Any] = {"compiler": "eager", "device": NO_GAIN, **ALL}
    assert torch.equal(torch.compile(module, backend=slope.slope, options=options)(x), before(x))
    (one,) = recording
    assert [d.reason for d in one.report] == [Reason.UNPROFITABLE] * 2
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), before.parameters(), strict=True))


def test_a_prepared_model_is_rewritten_whatever_is_predicted(
    monkeypatch: pytest.MonkeyPatch, fresh_dynamo: None
) -> None:
    """Its weights are compressed already: the dense product is not there to go back to."""
    module, x = Chain(8, 8, 8), rows(3, 8)
    slope.sparsify_(module, slope.SlopeConfig(**ALL))
    recording = record(monkeypatch)
    options: dict[str, Any] = {"compiler": "eager", "device": NO_GAIN}
    torch.compile(module, backend=slope.slope, options=options)(x)
    (one,) = recording
    assert [d.reason for d in one.report] == [Reason.PREPARED] * 2


def test_transform() -> None:
    program = torch.export.export(Chain(8, 8, 8), (rows(3, 8),), strict=False)
    config = slope.SlopeConfig(**ALL, overrides=(Override(path=r"layers\.1", pattern="2:8"),))
    report = slope.transform(program, config, device=MODEST).graph_module.meta["slope_report"]
    assert [d.reason for d in report] == [Reason.SELECTED, Reason.UNPROFITABLE]
    with pytest.raises(slope.ConversionError, match=r"leave the device out(.|\n)*predicted slower than dense"):
        slope.transform(program, config, device=NO_GAIN)


def test_options() -> None:
    assert parse_options(None, {"device": "H200-SXM"}).device is cost.DATA_SHEETS["H200-SXM"]
    assert parse_options(None, {"device": MODEST}).device is MODEST
    assert parse_options(None, {}).device is None
    assert parse_options("max-autotune", {"device": MODEST}).device is None, "measurements decide"
    with pytest.raises(slope.ConfigError, match=r"option 'device': no data sheet for 'H20'.*H200-SXM"):
        parse_options(None, {"device": "H20"})
    program = torch.export.export(nn.Linear(8, 8), (torch.randn(2, 8),))
    with pytest.raises(slope.ConfigError, match="transform: device"):
        slope.transform(program, device="H20")
