"""Conversions that are refused, or that fail half way: a clear error, and a model that is bitwise as it was."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from prepared import SPARSE, Net, assert_unchanged, net, snapshot, sparse_layers
from slope_compile.config import SlopeConfig
from slope_compile.errors import ConfigError, ConversionError, SlopeError
from slope_compile.sparsify import densify_, sparsify_


def refused(convert: Callable[[], object], model: nn.Module, says: str) -> None:
    """The conversion raises this ConversionError and leaves the model alone."""
    before = snapshot(model)
    with pytest.raises(ConversionError, match=says):
        convert()
    assert_unchanged(model, before)


def prepared() -> Net:
    model = net()
    sparsify_(model, SlopeConfig(adapter_rank=2))
    return model


def on_meta(paths: list[str]) -> Net:
    """A net in which the weights of these modules are on the meta device."""
    model = net()
    for path in paths:
        module = model.get_submodule(path)
        module.to("meta")
    return model


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.randn(2, 8, dtype=torch.float64)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_errors_are_ours_and_runtime_errors() -> None:
    assert issubclass(ConversionError, SlopeError)
    assert issubclass(ConversionError, RuntimeError)


def test_twice() -> None:
    model = prepared()
    refused(
        lambda: sparsify_(model, SlopeConfig(pattern="2:8")),
        model,
        r"prepared already \(4 layers, the first is 'blocks.0.up'\); densify_ it first",
    )


@pytest.mark.parametrize(
    ("model", "config", "says"),
    [
        pytest.param(
            net(),
            SlopeConfig(exclude=(".*",)),
            "no layer of the model is eligible; change .*\n  first: excluded by the configuration",
            id="all_excluded",
        ),
        pytest.param(
            nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)),
            SlopeConfig(),
            "0: first linear after the input\n  1: output head",
            id="only_first_and_head",
        ),
        pytest.param(
            nn.Sequential(nn.Linear(8, 18), nn.Linear(18, 8), nn.Linear(8, 8)),
            SlopeConfig(),
            "1: shape does not divide: K = 18 is not a positive multiple of 4",
            id="no_shape_divides",
        ),
        pytest.param(nn.Sequential(nn.ReLU()), SlopeConfig(), "it has no linear layers", id="no_linear"),
        pytest.param(nn.Linear(8, 8), SlopeConfig(), "\n  the model: first linear after the input", id="alone"),
        pytest.param(net(), SlopeConfig(include=(r"h\d",)), r"include 'h.*d' matches no linear layer", id="no_match"),
    ],
)
def test_nothing_to_convert(model: nn.Module, config: SlopeConfig, says: str) -> None:
    refused(lambda: sparsify_(model, config), model, says)


@pytest.mark.parametrize("convert", [sparsify_, densify_])
def test_no_module(convert: Callable[[Any], object]) -> None:
    with pytest.raises(TypeError, match=rf"{convert.__name__}: expected a torch.nn.Module, got list"):
        convert([net()])


@pytest.mark.parametrize("config", [{"pattern": "2:4"}, "2:4"], ids=["dict", "string"])
def test_no_configuration(config: Any) -> None:
    model = net()
    before = snapshot(model)
    with pytest.raises(ConfigError, match=r"sparsify_: config: expected a SlopeConfig, got .*2:4.*from_dict"):
        sparsify_(model, config)
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("paths", "named"),
    [
        pytest.param([""], "blocks.0.up", id="whole_model"),
        pytest.param(["blocks.1.down"], "blocks.1.down", id="one_layer"),
    ],
)
def test_weights_without_numbers(paths: list[str], named: str) -> None:
    model = on_meta(paths)
    refused(lambda: sparsify_(model), model, f"weight of '{named}' is on the meta device.*to_empty")


def test_a_layer_that_stays_dense_may_be_without_numbers() -> None:
    assert [d.weight for d in sparsify_(on_meta(["head"])).sparse] == SPARSE


def test_pending_gradients() -> None:
    model = net()
    model(torch.randn(2, 8, dtype=torch.float64)).sum().backward()
    refused(lambda: sparsify_(model), model, "'blocks.0.up' has a gradient of the old shape; call optimizer.zero_grad")
    model.zero_grad()
    sparsify_(model)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda p: torch.optim.AdamW(p), id="AdamW"),
        pytest.param(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), id="SGD_with_momentum"),
    ],
)
def test_an_optimizer_with_state(make: Callable[[Any], torch.optim.Optimizer]) -> None:
    model = net()
    optimizer = make(model.parameters())
    step(model, optimizer)
    refused(lambda: sparsify_(model), model, "an optimizer already has state for the weight of 'blocks.0.up'")
    assert len(optimizer.state) == len(list(model.parameters()))
    # The way out that the message gives.
    del optimizer
    sparsify_(model)


def test_an_optimizer_that_keeps_no_state_is_no_obstacle() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step(model, optimizer)
    sparsify_(model)
    step(model, optimizer)


def test_state_of_layers_that_stay_dense_is_no_obstacle() -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.head.parameters())
    step(model, optimizer)
    model.zero_grad()
    sparsify_(model)
    assert len(optimizer.state) == 2


# --- densify_ --------------------------------------------------------------------------------------------------------


def test_a_dense_checkpoint_is_to_be_loaded_first(caplog: pytest.LogCaptureFixture) -> None:
    model = prepared()
    for strict in (True, False):
        caplog.clear()
        with contextlib.suppress(RuntimeError), caplog.at_level(logging.WARNING, "slope_compile"):
            model.load_state_dict(net().state_dict(), strict=strict)
        (said,) = caplog.messages
        assert said.startswith(f"load_state_dict: '{SPARSE[0]}.weight' is dense in this checkpoint and compressed")
        assert said.endswith("load a dense checkpoint first, then sparsify_")
    caplog.clear()
    model.load_state_dict(prepared().state_dict())
    assert not caplog.messages


def test_densify_a_dense_model() -> None:
    model = net()
    refused(lambda: densify_(model), model, "the model has no prepared layer; sparsify_ it first")


def test_densify_with_pending_gradients() -> None:
    model = prepared()
    model(torch.randn(2, 8, dtype=torch.float64)).sum().backward()
    refused(lambda: densify_(model), model, "densify_: the weight of 'blocks.0.up' has a gradient of the old shape")


def test_densify_under_an_optimizer_with_state() -> None:
    model = prepared()
    optimizer = torch.optim.AdamW(model.parameters())
    step(model, optimizer)
    refused(lambda: densify_(model), model, "densify_: an optimizer already has state")
    assert optimizer.state


# --- half way --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()], ids=["error", "interrupt"])
@pytest.mark.parametrize(
    "call",
    [
        pytest.param(1, id="first_weight"),
        pytest.param(2, id="first_adapter"),
        pytest.param(5, id="third_weight"),
        pytest.param(8, id="last_adapter"),
    ],
)
def test_a_failure_half_way_leaves_the_model_as_it_was(
    call: int, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = net()
    model.blocks[1].requires_grad_(False)
    before = snapshot(model)
    real, calls = parametrize.register_parametrization, 0

    def failing(*args: Any, **kwargs: Any) -> nn.Module:
        nonlocal calls
        calls += 1
        if calls == call:
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(parametrize, "register_parametrization", failing)
    with pytest.raises(type(error)):
        sparsify_(model, SlopeConfig(adapter_rank=2))
    assert calls == call
    assert_unchanged(model, before)
    monkeypatch.undo()
    # And it is still a model that can be converted.
    sparsify_(model)
    assert list(sparse_layers(model)) == SPARSE


def test_a_failure_after_the_weight_changed_its_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    before = snapshot(model)
    calls = 0

    def failing(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise RuntimeError("no memory for the columns")

    monkeypatch.setattr("slope_compile.parametrizations.SparseWeight.pick_columns", failing)
    with pytest.raises(RuntimeError, match="no memory for the columns"):
        sparsify_(model)
    assert_unchanged(model, before)
