"""Dense copies of constant weights where there are no kernels: when they are kept, and when not."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor

from problems import Problem, Shape, draw, packed_columns
from slope_compile.kernels import cpu_library, dense_copies, ops, reference
from slope_compile.pattern import Pattern


@pytest.fixture(autouse=True)
def no_library(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a machine without a C++ compiler."""
    monkeypatch.setattr(cpu_library, "load", lambda: None)
    dense_copies.forget()
    yield
    dense_copies.forget()


@pytest.fixture
def expansions(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for every weight that was expanded."""
    calls: list[int] = []
    expand = reference.expand

    def counted(values: Tensor, pattern: Tensor, keep: int, group: int) -> Tensor:
        calls.append(values.shape[0])
        return expand(values, pattern, keep, group)

    monkeypatch.setattr(reference, "expand", counted)
    return calls


@pytest.fixture(params=[(2, 4), (1, 4)], ids=["2:4", "1:4"])
def problem(request: pytest.FixtureRequest) -> Problem:
    return draw(Pattern(*request.param), Shape((5,), 16, 8), torch.float32)


def forward(p: Problem, values: Tensor | None = None) -> Tensor:
    values = p.values if values is None else values
    y: Tensor = ops.linear(p.x, values, p.pattern, p.bias, p.nm.keep, p.nm.group)
    dense = reference.expand(values.detach(), p.pattern, p.nm.keep, p.nm.group)
    torch.testing.assert_close(y, torch.nn.functional.linear(p.x, dense, p.bias))
    return y


def new(expansions: list[int]) -> int:
    """Expansions of the last call of :func:`forward`, less the one of its own, and those before it are forgotten."""
    count = len(expansions) - 1
    expansions.clear()
    return count


def test_the_second_product_keeps_the_copy(problem: Problem, expansions: list[int]) -> None:
    counts = []
    for _ in range(4):
        forward(problem)
        counts.append(new(expansions))
    assert counts == [1, 1, 0, 0]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_parameters_in_inference(
    mode: Callable[[], AbstractContextManager[Any]], problem: Problem, expansions: list[int]
) -> None:
    values = torch.nn.Parameter(problem.values)
    for expected in (1, 1, 0):
        with mode():
            forward(problem, values)
        assert new(expansions) == expected
    # What was kept then serves a forward product with gradients too.
    y = forward(problem, values)
    assert new(expansions) == 0
    y.sum().backward()
    assert values.grad is not None


def test_changed_values_are_seen(problem: Problem, expansions: list[int]) -> None:
    for _ in range(3):
        forward(problem)
    expansions.clear()
    problem.values.mul_(2)
    forward(problem)
    assert new(expansions) == 1
    problem.values.data = problem.values * 3  # another address
    forward(problem)
    assert new(expansions) == 1
    forward(problem, problem.values.clone())  # another tensor with the same pattern
    assert new(expansions) == 1


def test_training_keeps_nothing(problem: Problem, expansions: list[int]) -> None:
    values = torch.nn.Parameter(problem.values)
    optimizer = torch.optim.AdamW([values], lr=0.1, fused=True)  # raises no version counter
    for _ in range(3):
        y = forward(problem, values)
        assert new(expansions) == 1
        y.sum().backward()
        assert len(dense_copies._uses) == 0
        optimizer.step()
        expansions.clear()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_step_gives_the_copies_of_its_weights_up(problem: Problem, fused: bool, groups: int) -> None:
    """Validation between a gradient and its step; and gradients that were computed without these operators."""
    values, other = torch.nn.Parameter(problem.values), torch.nn.Parameter(problem.values.clone())
    params: list[dict[str, Any]] = [{"params": [torch.ones(1)]}, {"params": [values]}]
    optimizer = torch.optim.AdamW(params[-groups:], lr=0.1, fused=fused)
    their_pattern = problem.pattern.clone()
    for _ in range(2):
        values.grad = torch.ones_like(values)
        with torch.no_grad():
            for _ in range(3):
                forward(problem, values)  # compares with what the values give now
                ops.linear(problem.x, other, their_pattern, None, problem.nm.keep, problem.nm.group)
        assert dense_copies.count() == 2
        optimizer.step()
        assert dense_copies.count() == 1, "the other weight has not changed"
    with torch.no_grad():
        forward(problem, values)


def test_each_gradient_gives_the_copy_up(problem: Problem) -> None:
    p, nm = problem, (problem.nm.keep, problem.nm.group)
    mask = packed_columns(p.weight, p.mask, p.nm)
    gradients: tuple[Callable[[], Tensor], ...] = (
        lambda: ops.grad_input(p.grad, p.values, p.pattern, *nm),
        lambda: ops.grad_input_columns(p.grad, p.values, p.pattern, mask, *nm),
        lambda: ops.grad_weight(p.grad, p.x, p.pattern, *nm),
    )
    for gradient in gradients:
        forward(p)
        forward(p)
        assert dense_copies._uses[p.pattern].dense is not None
        gradient()
        assert len(dense_copies._uses) == 0


def test_a_copy_goes_with_its_weight(problem: Problem) -> None:
    pattern = problem.pattern.clone()
    for _ in range(2):
        ops.linear(problem.x, problem.values, pattern, None, problem.nm.keep, problem.nm.group)
    assert len(dense_copies._uses) == 1
    del pattern
    gc.collect()
    assert len(dense_copies._uses) == 0


def test_weights_without_a_version_are_expanded(problem: Problem, expansions: list[int]) -> None:
    with torch.inference_mode():
        values = problem.values.clone()
        for _ in range(3):
            forward(problem, values)
            assert new(expansions) == 1
