"""Whole prepared models through pickle: ``torch.save``, copies, and processes that are spawned."""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import slope_compile as slope
from matrix.torch_models import Attention, tokens
from prepared import assert_unchanged, net, snapshot
from recording import fresh_dynamo as fresh_dynamo
from tolerances import assert_same

CONFIG = slope.SlopeConfig(adapter_rank=2)


def through_pickle(model: nn.Module) -> nn.Module:
    loaded = pickle.loads(pickle.dumps(model))
    assert isinstance(loaded, nn.Module)
    return loaded


def through_save(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert isinstance(loaded, nn.Module)
    return loaded


every_copy = pytest.mark.parametrize(
    "copied",
    [
        pytest.param(through_pickle, id="pickle"),
        pytest.param(through_save, id="save"),
        pytest.param(copy.deepcopy, id="deepcopy"),
    ],
)


def conv1d() -> nn.Module:
    """Hugging Face's layers, whose class prints without children, first and head of them dense."""
    Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D
    return nn.Sequential(Conv1D(8, 8), Conv1D(16, 8), nn.GELU(), Conv1D(8, 16), Conv1D(3, 8)).double()


MODELS = [
    pytest.param(net, lambda: torch.randn(3, 8, dtype=torch.float64), id="linear"),
    pytest.param(conv1d, lambda: torch.randn(3, 8, dtype=torch.float64), id="conv1d"),
    pytest.param(lambda: Attention().double(), lambda: tokens(2, 5)["ids"], id="attention"),
]


@every_copy
@pytest.mark.parametrize(("make", "data"), MODELS)
def test_a_copy_is_the_same_model(
    make: Callable[[], nn.Module], data: Callable[[], Tensor], copied: Callable[[nn.Module], nn.Module]
) -> None:
    model, x = make(), data()
    slope.sparsify_(model, CONFIG)
    slope.set_adapters(model, True)
    before, expected = snapshot(model), model(x)
    other = copied(model)
    assert str(other) == str(model)
    assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()], "compiled code serves both"
    assert torch.equal(other(x), expected)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    slope.densify_(other)
    assert not any(parametrize.is_parametrized(module) for module in other.modules())
    assert_unchanged(model, before)


def test_a_dense_layer_beside_prepared_ones() -> None:
    """Its class shows a note in ``print``; alone it goes through pickle too, and loses the note with densify_."""
    model = conv1d()
    slope.sparsify_(model, CONFIG)
    assert isinstance(model, nn.Sequential)
    head = through_save(model[4])
    assert "dense: output head" in str(head)
    x = torch.randn(3, 8, dtype=torch.float64)
    assert torch.equal(head(x), model[4](x))


def test_a_layer_of_a_foreign_parametrization_is_still_refused() -> None:
    """Its class is not ours to make again."""
    model = net()
    slope.sparsify_(model, CONFIG)
    torch.nn.utils.parametrizations.weight_norm(model.head)
    with pytest.raises(RuntimeError, match="state_dict"):
        pickle.dumps(model)


def train_one_step(model: nn.Module, x: Tensor, file: str) -> None:
    """Runs in a process that has never seen the model's classes."""
    run = torch.compile(model, backend="slope", options={"compiler": "aot_eager"})
    run(x).square().sum().backward()
    torch.save({name: p.grad for name, p in model.named_parameters()}, file)


@pytest.mark.slow
def test_a_model_goes_to_a_process_that_is_spawned(tmp_path: object) -> None:
    model, x, file = net(), torch.randn(3, 8, dtype=torch.float64), f"{tmp_path}/gradients.pt"
    slope.sparsify_(model, slope.SlopeConfig(adapter_rank=2, backward="exact"))
    process = multiprocessing.get_context("spawn").Process(target=train_one_step, args=(model, x, file))
    process.start()
    process.join()
    assert process.exitcode == 0
    model(x).square().sum().backward()
    for name, gradient in torch.load(file).items():
        expected = model.get_parameter(name).grad
        assert (gradient is None) == (expected is None), name
        if expected is not None:
            assert_same(gradient, expected, name)
