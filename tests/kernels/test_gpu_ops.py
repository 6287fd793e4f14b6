"""The operators on CUDA tensors, and the products of compiled code: operands that do not fit reach no kernel.

No GPU is needed: the kernels are replaced by functions that fail, and the device is said to be fit.  What the kernels
compute is checked in ``tests/gpu``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

import pytest
import torch
from torch import Tensor

from problems import Operands
from slope_compile.kernels import gpu_calls, gpu_ops, gpu_rules, triton_products

KERNELS = ("forward", "grad_input", "grad_weight", "expand", "compress", "pick_columns", "compress_columns")


class ReachedAKernel(Exception):
    """A kernel was given operands."""


def kernel(*operands: object, **options: object) -> NoReturn:
    raise ReachedAKernel


@pytest.fixture(autouse=True, params=["triton", "expanded"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of each product, whatever the rules would say."""
    monkeypatch.setattr(gpu_ops, "usable", lambda *_: True)
    monkeypatch.setattr(gpu_ops, "name", lambda _: "a GPU")
    monkeypatch.setattr(gpu_rules, "way", lambda *_: request.param)
    for name in KERNELS:
        monkeypatch.setattr(triton_products, name, kernel)


def products(given: Operands) -> dict[str, Callable[[], Tensor]]:
    """Those that compiled code calls."""
    x, grad, weight = given.x, given.grad, (given.values, given.pattern)
    y, dx, dv = torch.empty(grad.shape), torch.empty(x.shape), torch.empty(given.values.shape)
    low_rank = (given.down, given.up)
    return {
        "linear": lambda: gpu_calls.linear(x, *weight, given.bias, out=y),
        "linear_low_rank": lambda: gpu_calls.linear_low_rank(x, *weight, *low_rank, given.bias, out=y),
        "grad_input": lambda: gpu_calls.grad_input(grad, *weight, out=dx),
        "grad_input_columns": lambda: gpu_calls.grad_input_columns(grad, *weight, given.column_mask, out=dx),
        "grad_weight": lambda: gpu_calls.grad_weight(grad, x, given.pattern, out=dv),
    }


def calls(given: Operands) -> dict[str, Callable[[], Tensor]]:
    """Every operator and every product, by name."""
    operators = {f"gpu_ops.{name}": call for name, call in given.calls(gpu_ops).items()}
    return operators | {f"gpu_calls.{name}": call for name, call in products(given).items()}


ROWS, COLUMNS = (slice(8),), (slice(None), slice(2))
of_half = pytest.mark.parametrize("part", [ROWS, COLUMNS], ids=["rows", "columns"])
every_call = pytest.mark.parametrize("name", calls(Operands(1, 4, 4)))


@every_call
def test_operands_that_fit_reach_the_kernels(name: str) -> None:
    with pytest.raises(ReachedAKernel):
        calls(Operands(5, 16, 40))[name]()


@of_half
@every_call
def test_a_pattern_of_another_weight_is_an_error(name: str, part: tuple[slice, ...]) -> None:
    """The kernels check nothing: they would read past its end."""
    given = Operands(5, 16, 40)
    given.pattern = given.pattern[part]
    with pytest.raises(RuntimeError):
        calls(given)[name]()


@of_half
@pytest.mark.parametrize(
    "name", ["gpu_ops.grad_input_columns", "gpu_ops.compress_columns", "gpu_calls.grad_input_columns"]
)
def test_a_column_mask_of_another_weight_is_an_error(name: str, part: tuple[slice, ...]) -> None:
    given = Operands(5, 16, 40)
    given.column_mask = given.column_mask[part]
    with pytest.raises(RuntimeError):
        calls(given)[name]()


@pytest.mark.parametrize("short", ["bias", "down", "up"])
@pytest.mark.parametrize("name", ["gpu_ops.linear", "gpu_calls.linear_low_rank"])
def test_what_is_added_must_fit(name: str, short: str) -> None:
    given = Operands(5, 16, 40)
    setattr(given, short, getattr(given, short)[:2])
    with pytest.raises(RuntimeError):
        calls(given)[name]()


@pytest.mark.parametrize(
    ("name", "cut"),
    [
        (f"{module}.{name}", cut)
        for module in ("gpu_ops", "gpu_calls")
        for name, cut in (("linear", "x"), ("grad_input", "grad"), ("grad_input_columns", "grad"))
    ],
)
def test_activations_of_another_weight_are_an_error(name: str, cut: str) -> None:
    given = Operands(5, 16, 40)
    setattr(given, cut, getattr(given, cut)[:, :8])
    with pytest.raises(RuntimeError):
        calls(given)[name]()


@pytest.mark.parametrize("module", ["gpu_ops", "gpu_calls"])
def test_gradients_of_other_tokens_are_an_error(module: str) -> None:
    given = Operands(5, 16, 40)
    given.grad = given.grad[:3]
    with pytest.raises(RuntimeError):
        calls(given)[f"{module}.grad_weight"]()


def test_a_bias_for_every_token_is_added_as_the_definition_does() -> None:
    given = Operands(5, 16, 40)
    given.bias = torch.randn(5, 16)
    expected = given.definitions()["linear"]()
    for name in ("gpu_ops.linear", "gpu_calls.linear_low_rank"):
        torch.testing.assert_close(calls(given)[name](), expected)
