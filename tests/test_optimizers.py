"""State that an optimizer loads has to be that of a model with the same layers compressed."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import slope_compile as slope
from prepared import net
from recording import fresh_dynamo as fresh_dynamo

PATH = "blocks.0.up"
"""A sparse layer of the model."""

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, amsgrad=True),
    "AdamW_fused": lambda parameters: torch.optim.AdamW(parameters, fused=True),
    "SGD": lambda parameters: torch.optim.SGD(parameters, momentum=0.9),
    "Adagrad": lambda parameters: torch.optim.Adagrad(parameters),
    "Adadelta": lambda parameters: torch.optim.Adadelta(parameters),
    "RMSprop": lambda parameters: torch.optim.RMSprop(parameters, centered=True, momentum=0.5),
    "Adamax": lambda parameters: torch.optim.Adamax(parameters),
}


def made(prepared: bool) -> nn.Module:
    torch.manual_seed(0)
    model = net()
    if prepared:
        slope.sparsify_(model, slope.SlopeConfig())
    return model


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.ones(3, 8, dtype=torch.float64)).square().mean().backward()
    optimizer.step()


def trained(prepared: bool, make: Callable[[Any], torch.optim.Optimizer]) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = made(prepared)
    optimizer = make(model.parameters())
    step(model, optimizer)
    return model, optimizer


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("prepared", [True, False], ids=["dense_into_prepared", "prepared_into_dense"])
def test_moments_of_another_shape_are_refused(prepared: bool, make: Callable[[Any], torch.optim.Optimizer]) -> None:
    _, other = trained(not prepared, make)
    model, optimizer = trained(prepared, make)
    saved = copy.deepcopy(other.state_dict())
    optimizer.load_state_dict(saved)
    before = copy.deepcopy(model.state_dict())
    name = f"{PATH}.parametrizations.weight.original" if prepared else f"{PATH}.weight"
    with pytest.raises(slope.SlopeError, match=f"of '{PATH}.*' is .* but the parameter is .*same SlopeConfig"):
        step(model, optimizer)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    # The way out that the message names.
    step(model, make(model.parameters()))
    assert not torch.equal(dict(model.named_parameters())[name], before[name])


def test_fitting_state_is_taken_and_looked_at_once() -> None:
    model, optimizer = trained(True, OPTIMIZERS["AdamW"])
    saved = copy.deepcopy(optimizer.state_dict())
    step(model, optimizer)
    expected = copy.deepcopy(model.state_dict())
    again, resumed = trained(True, OPTIMIZERS["AdamW"])
    resumed.load_state_dict(saved)
    step(again, resumed)
    for key, value in again.state_dict().items():
        assert torch.equal(value, expected[key]), key


def test_factored_moments_and_optimizers_of_others_may_have_any_shape() -> None:
    made(True)

    class Projected(torch.optim.SGD):
        """As optimizers do that keep moments of a projected gradient."""

        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for group in self.param_groups:
                for weight in group["params"]:
                    self.state[weight]["exp_avg"] = weight.new_zeros(1)

    for make in (lambda p: Projected(p, lr=0.1), lambda p: torch.optim.Adafactor(p)):
        model = made(True).float()
        optimizer = make(model.parameters())
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.ones(3, 8)).square().mean().backward()
            optimizer.step()


class Shampoo(torch.optim.SGD):
    """An optimizer of others, by its name one that looks at whole matrices."""


@pytest.mark.parametrize("make", [torch.optim.Muon, torch.optim.Adafactor, lambda p: Shampoo(p, lr=0.1)])
@pytest.mark.parametrize("prepared", [True, False])
def test_an_optimizer_of_whole_matrices_is_named_once(
    prepared: bool, make: Callable[[Any], torch.optim.Optimizer], caplog: pytest.LogCaptureFixture
) -> None:
    """Compressed weights are no matrices of the layer's form; dense ones are, beside a prepared model too."""
    other, model = made(True), made(prepared)
    optimizer = make([p for p in model.parameters() if p.ndim == 2])
    with caplog.at_level(logging.WARNING, "slope_compile"):
        for _ in range(2):
            step(model, optimizer)
        copied = copy.deepcopy(optimizer.state_dict())
        optimizer.load_state_dict(copied)
        step(model, optimizer)
    said = [r.getMessage() for r in caplog.records if "as a whole" in r.getMessage()]
    assert len(said) == prepared
    assert all(f"'{PATH}.parametrizations.weight.original'" in text for text in said)
    del other


def test_elementwise_optimizers_are_not_named(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "slope_compile"):
        for make in OPTIMIZERS.values():
            trained(True, make)
    assert not caplog.records
