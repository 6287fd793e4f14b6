"""Prepared layers that Dynamo leaves to Python give a warning; layers in eager runs and in graphs do not."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import slope_compile as slope
from masked import assert_same_gradients, every_entry, masked_copy, masks_of
from recording import compiled, record
from recording import fresh_dynamo as fresh_dynamo
from slope_compile.report import WAYS_OUT
from tolerances import assert_same
from toy import SPARSE, Block, Toy, step, token_ids, toy


def broken(*blocks: int) -> Toy:
    """With a break in it a checkpointed block is left to Python: checkpoint() switches Dynamo off."""
    model = toy(checkpointed=True)
    for block in (model.blocks[i] for i in blocks):
        assert isinstance(block, Block)
        block.between = torch._dynamo.graph_break
    return model


def prepared(dense: Toy) -> Toy:
    model = copy.deepcopy(dense)
    slope.sparsify_(model, slope.SlopeConfig(backward="exact"))
    return model


def named(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The layers that messages are about."""
    found = [r for r in caplog.records if "outside of every graph" in r.getMessage()]
    assert all(r.levelno == logging.WARNING and WAYS_OUT[slope.Reason.EAGER] in r.getMessage() for r in found)
    return [r.getMessage().split("'")[1] for r in found]


def test_every_kind_of_layer_in_python_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    """Each time the first of its kind: the first block's first linear is dense."""
    for times in (1, 2):
        model, ids = prepared(broken(0, 1)), token_ids()
        run = compiled(model)
        for _ in range(2):
            step(run, ids)
            assert named(caplog) == ["blocks.0.out", "blocks.0.up", "blocks.0.down", "blocks.1.qkv"] * times


def test_the_way_out_is_one(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that are compiled by themselves are in graphs, on both sides of the break, and are recomputed."""
    recording = record(monkeypatch)
    dense, ids = broken(0, 1), token_ids()
    model = prepared(dense)
    for block in model.blocks:
        block.compile(backend=slope.slope, options={"compiler": "aot_eager"})
    logits = step(model, ids)
    assert set(recording.sparse_paths) <= set(SPARSE)
    assert sum(one.sparse * len(one.calls) for one in recording) == 2 * len(SPARSE), "forward, and recomputed"
    assert named(caplog) == []
    reference = masked_copy(dense, masks_of(model), every_entry)
    assert_same(logits, step(reference, ids))
    assert_same_gradients(model, reference)


class Reads(nn.Module):
    """Multiplies with a layer's weight, or hands it out as a function that Dynamo leaves to Python would get it."""

    def __init__(self, layer: nn.Linear, multiplies: bool) -> None:
        super().__init__()
        self.layer, self.multiplies = layer, multiplies

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.layer.weight) if self.multiplies else self.layer.weight


@pytest.mark.parametrize("multiplies", [True, False])
def test_a_graph_with_the_weight_and_without_its_product(multiplies: bool, caplog: pytest.LogCaptureFixture) -> None:
    layer = prepared(toy()).get_submodule("blocks.1.up")
    assert isinstance(layer, nn.Linear)
    reads, x = Reads(layer, multiplies), torch.randn(3, 16, dtype=torch.float64)
    assert_same(compiled(reads)(x).detach(), reads(x).detach())
    assert named(caplog) == ([] if multiplies else ["layer"])


def test_eager_runs_and_reading_weights_are_no_news(caplog: pytest.LogCaptureFixture) -> None:
    model, ids = prepared(toy()), token_ids()
    step(compiled(model), ids)
    model(ids)
    weight = model.get_submodule(SPARSE[0]).weight
    assert isinstance(weight, torch.Tensor)
    assert named(caplog) == []


def test_a_copy_speaks_for_itself(caplog: pytest.LogCaptureFixture) -> None:
    model = prepared(broken(0, 1))
    twin = copy.deepcopy(model)
    for one, times in ((model, 1), (twin, 2)):
        step(compiled(one), token_ids())
        assert named(caplog).count("blocks.0.out") == times


def test_a_model_that_is_not_compiled_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    step(prepared(broken(1)), token_ids())
    assert named(caplog) == []
