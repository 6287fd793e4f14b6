"""Models with lazy adapters, by the three ways in, for the tests of the schedule."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slope_compile as slope
from graphs import attribute_graph
from prepared import Net, net
from recording import compiled

RANK, SCALE = 2, 0.3
CONFIG = slope.SlopeConfig(adapter_rank=RANK, adapter_scale=SCALE, column_refresh="backward")
Run = Callable[[Tensor], Tensor]


def batch() -> Tensor:
    return torch.randn(6, 8, dtype=torch.float64)


def prepared(config: slope.SlopeConfig = CONFIG) -> Net:
    model = net()
    slope.sparsify_(model, config)
    return model


def train_step(run: Run, x: Tensor, optimizer: torch.optim.Optimizer | None = None) -> Tensor:
    """Forward, backward and, with an optimizer, its step; returns the loss."""
    loss = run(x).square().mean()
    loss.backward()
    if optimizer is not None:
        optimizer.step()
        optimizer.zero_grad()
    return loss.detach()


def adapters(model: nn.Module) -> dict[str, Tensor]:
    """A and B by name, whichever way the model was prepared."""
    endings = (".A", ".B", "_adapter_A", "_adapter_B")
    return {name: p for name, p in model.named_parameters() if name.endswith(endings)}


def factors(model: nn.Module, path: str) -> tuple[Tensor, Tensor]:
    """A and B of one layer."""
    A, B = (p for name, p in adapters(model).items() if name.startswith(f"{path}."))
    return A, B


def draw_B(model: nn.Module) -> None:
    """Give the adapters something to say."""
    with torch.no_grad():
        for name, parameter in adapters(model).items():
            if name.endswith("B"):
                parameter.normal_()


def in_three_ways(
    way: str, dense: nn.Module, steps: int, start: int, compiler: str = "aot_eager"
) -> tuple[nn.Module, slope.AdapterSchedule, Any]:
    """Model, schedule and what runs it: A dense and compiled, B prepared and compiled, C a graph as it is."""
    if way == "C":
        model: nn.Module = slope.transform(attribute_graph(dense, batch()), CONFIG)
        return model, slope.AdapterSchedule(model, total_steps=steps, start_step=start), model
    model = copy.deepcopy(dense)
    if way == "B":
        slope.sparsify_(model, CONFIG)
        return model, slope.AdapterSchedule(model, total_steps=steps, start_step=start), compiled(model, compiler)
    schedule = slope.AdapterSchedule(model, total_steps=steps, start_step=start, config=CONFIG)
    return model, schedule, compiled(model, compiler, options={"column_refresh": "backward"})


every_way = pytest.mark.parametrize("way", ["A", "B", "C"])
