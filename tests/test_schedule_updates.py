"""Optimizers beside lazy adapters: parameter groups, LR schedulers, and a learning rate of the adapters' own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import slope_compile as slope
from adapters import adapters, batch, prepared, train_step
from tolerances import assert_same


def test_param_groups_and_lr_schedulers_are_left_alone() -> None:
    model = prepared()
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    given: list[dict[str, Any]] = [{"params": decayed}, {"params": others, "weight_decay": 0.0, "lr": 2e-3}]
    optimizer = torch.optim.AdamW(given, lr=1e-3)
    groups = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    lr = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    schedule = slope.AdapterSchedule(model, total_steps=6, start_step=3, optimizer=optimizer, lr_scale=0.5)
    for step in range(6):
        assert [group["lr"] for group in optimizer.param_groups] == [1e-3 / (1 + step), 2e-3 / (1 + step)]
        train_step(model, batch(), optimizer)
        lr.step()
        schedule.step()
        for parameter in adapters(model).values():
            state = optimizer.state.get(parameter)
            assert (state is not None) == (step >= 3)
            assert state is None or int(state["step"]) == step - 2
    assert [[id(p) for p in group["params"]] for group in optimizer.param_groups] == groups


def adamw_update(
    p: Tensor, gradients: list[Tensor], lr: float, decay: float, betas: tuple[float, float] = (0.9, 0.999)
) -> Tensor:
    """The last of these steps, written out: Loshchilov and Hutter's algorithm 2."""
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    for g in gradients:
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g * g
    t = len(gradients)
    direction = (m / (1 - betas[0] ** t)) / ((v / (1 - betas[1] ** t)).sqrt() + 1e-8)
    return p - lr * (direction + decay * p)


def sgd_update(p: Tensor, gradients: list[Tensor], lr: float, decay: float) -> Tensor:
    """Momentum 0.9, L2 decay: ``decay`` times the weight is part of every gradient but only the last is needed here."""
    buffer = torch.zeros_like(p)
    for g in gradients:
        buffer = 0.9 * buffer + g
    return p - lr * buffer


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
@pytest.mark.parametrize(
    ("lr_scale", "warmup", "scales"),
    [
        pytest.param(1.0, 3, [1 / 4, 2 / 4, 3 / 4, 1, 1], id="warmup"),
        pytest.param(0.1, 0, [0.1] * 5, id="smaller"),
        pytest.param(4.0, 1, [2.0, 4.0, 4.0, 4.0, 4.0], id="larger_with_warmup"),
    ],
)
def test_updates_of_adapters_are_scaled(name: str, lr_scale: float, warmup: int, scales: list[float]) -> None:
    """What a learning rate ``scale`` times as large would do, for the adapters alone."""
    model, lr = prepared(), 0.01
    decay = 0.1 if name == "AdamW" else 0.0
    make: Any = {"AdamW": torch.optim.AdamW, "SGD": torch.optim.SGD}[name]
    extra = {} if name == "AdamW" else {"momentum": 0.9}
    optimizer = make(model.parameters(), lr=lr, weight_decay=decay, **extra)
    schedule = slope.AdapterSchedule(
        model, total_steps=7, start_step=2, optimizer=optimizer, lr_scale=lr_scale, warmup_steps=warmup
    )
    update = adamw_update if name == "AdamW" else sgd_update
    history: dict[str, list[Tensor]] = {}
    applied = []
    for _ in range(7):
        train_step(model, batch())
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        for n, p in model.named_parameters():
            if p.grad is not None:
                history.setdefault(n, []).append(p.grad.clone())
        if schedule.active:
            applied.append(schedule.update_scale())
        optimizer.step()
        for n, p in model.named_parameters():
            scale = applied[-1] if n in adapters(model) and applied else 1.0
            expected = update(before[n], history[n], lr * scale, decay) if n in history else before[n]
            assert_same(p.detach(), expected, n)
        optimizer.zero_grad()
        schedule.step()
    assert applied == pytest.approx(scales)
