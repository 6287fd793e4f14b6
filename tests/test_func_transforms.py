"""``torch.func`` over the parameters of a prepared model: the same as of its dense twin under hand-made masks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacrev, vjp, vmap

import slope_compile as slope
from prepared import Net, net
from recording import compiled
from recording import fresh_dynamo as fresh_dynamo
from slope_compile.schedule import adapters_of
from tolerances import assert_same

Parameters = dict[str, Tensor]


def prepared(on: bool = True) -> Net:
    model = net()
    slope.sparsify_(model, slope.SlopeConfig(adapter_rank=2))
    for adapter in adapters_of(model):
        nn.init.normal_(adapter.B)
    slope.set_adapters(model, on)
    return model


def batch() -> Tensor:
    return torch.randn(3, 8, dtype=torch.float64)


def parameters(model: nn.Module) -> Parameters:
    return {name: p.detach() for name, p in model.named_parameters()}


def loss_in(model: nn.Module) -> Callable[[Parameters, Tensor], Tensor]:
    def loss(given: Parameters, x: Tensor) -> Tensor:
        y: Tensor = functional_call(model, given, (x,)).square().sum()
        return y

    return loss


def by_backward(model: nn.Module, x: Tensor) -> Parameters:
    """Gradients of the same loss by ``backward()``; zero where a parameter takes no part."""
    model.zero_grad()
    model(x).square().sum().backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def assert_all_same(got: Parameters, expected: Parameters) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert_same(got[name], value, name)


@pytest.mark.parametrize("on", [False, True], ids=["adapters_off", "adapters_on"])
def test_grad(on: bool) -> None:
    model, x = prepared(on), batch()
    assert_all_same(grad(loss_in(model))(parameters(model), x), by_backward(model, x))


def test_vjp() -> None:
    model, x = prepared(), batch()
    pull = vjp(lambda given: loss_in(model)(given, x), parameters(model))[1]
    (got,) = pull(torch.ones((), dtype=torch.float64))
    assert_all_same(got, by_backward(model, x))


def test_gradients_of_each_sample() -> None:
    model, x = prepared(), batch()
    per_sample = vmap(grad(lambda given, one: loss_in(model)(given, one[None])), in_dims=(None, 0))
    got = per_sample(parameters(model), x)
    for i in range(len(x)):
        assert_all_same({name: value[i] for name, value in got.items()}, by_backward(model, x[i : i + 1]))


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_an_ensemble() -> None:
    """Models with patterns of their own, which are stacked with the parameters."""
    models, x = [prepared(), prepared()], batch()
    with torch.no_grad():
        for buffer in models[1].buffers():
            if buffer.dtype == torch.uint8:
                buffer.copy_(~buffer)  # of 2:4: the other half is kept
    stacked = torch.func.stack_module_state(models)
    got = vmap(lambda p, b: functional_call(models[0], (p, b), (x,)))(*stacked)
    for one, model in zip(got, models, strict=True):
        assert_same(one, model(x))


def test_jacobian_and_hessian() -> None:
    model, x = prepared(False), batch()
    name = "blocks.0.up.parametrizations.weight.original"
    chosen = parameters(model)[name]

    def loss(values: Tensor) -> Tensor:
        y: Tensor = functional_call(model, {name: values}, (x,)).square().sum()
        return y

    assert_same(jacrev(loss)(chosen), by_backward(model, x)[name])
    direction = torch.randn_like(chosen)
    expected = torch.autograd.functional.hvp(loss, chosen, direction)[1]
    assert_same((hessian(loss)(chosen) * direction).sum((-2, -1)), expected)


def test_in_a_compiled_function(caplog: pytest.LogCaptureFixture) -> None:
    """Right, and said to be no 2:4 product."""
    model, x = prepared(), batch()
    expected = by_backward(model, x)
    loss = loss_in(model)
    run: Any = compiled(lambda given, x: grad(loss)(given, x))  # type: ignore[arg-type]
    assert_all_same(run(parameters(model), x), expected)
    assert [r.getMessage() for r in caplog.records if "torch.func" in r.getMessage()] == [
        "backend 'slope': a graph has transforms of torch.func in it; linears inside of them run dense, with prepared "
        "weights expanded; backward() gives the same gradients with 2:4 products"
    ]


def test_a_dense_model_in_a_compiled_function_stays_dense_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model, x = net(), batch()
    before, expected = copy.deepcopy(model.state_dict()), by_backward(model, x)
    loss = loss_in(model)
    run: Any = compiled(lambda given, x: grad(loss)(given, x))  # type: ignore[arg-type]
    assert_all_same(run(dict(model.named_parameters()), x), expected)
    assert caplog.text.count("transforms of torch.func") == 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_one_compiled_model_in_and_outside_of_a_transform() -> None:
    """Whether a transform is under way is no constant of the code."""
    model, x = prepared(), batch()
    expected, run = by_backward(model, x), compiled(model, options={"backward": "double_pruned"})
    model.zero_grad()
    run(x).square().sum().backward()
    given = {f"_orig_mod.{name}": value for name, value in parameters(model).items()}
    got = grad(loss_in(run))(given, x)
    assert_all_same({name.removeprefix("_orig_mod."): value for name, value in got.items()}, expected)


def test_nothing_of_it_is_left_in_a_graph() -> None:
    seen: list[Any] = []

    def backend(module: torch.fx.GraphModule, _: Any) -> Any:
        seen.extend(node for node in module.graph.nodes if node.op == "call_function" and not node.users)
        return module.forward

    torch.compile(prepared(), backend=backend)(batch())
    assert not seen
