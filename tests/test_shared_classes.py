"""Prepared layers that are alike share a class, and changes to one layer do not affect the others."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.utils import parametrize

import slope_compile as slope
from recording import fresh_dynamo as fresh_dynamo
from slope_compile import _shared_classes

ALL = slope.SlopeConfig(first_dense=False, heads_dense=False)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.down(torch.relu(self.up(x)))
        return y


def blocks(count: int = 3, config: slope.SlopeConfig = ALL) -> nn.Sequential:
    model = nn.Sequential(*(Block() for _ in range(count)))
    slope.sparsify_(model, config)
    return model


def block(model: nn.Sequential, index: int) -> Block:
    found = model[index]
    assert isinstance(found, Block)
    return found


def test_blocks_that_are_compiled_one_by_one_are_compiled_once() -> None:
    model = blocks(12)
    expected = model(x := torch.randn(4, 8, requires_grad=True))
    for each in model:
        each.compile(backend="slope")
    counters.clear()
    torch.testing.assert_close(model(x), expected)
    assert counters["stats"]["unique_graphs"] == 1


def test_layers_that_are_alike_share_a_class() -> None:
    model = blocks()
    classes = {type(layer) for each in model for layer in (each.up, each.down)}
    assert len(classes) == 1
    prepared = [layer for layer in model.modules() if parametrize.is_parametrized(layer)]
    assert len(prepared) == 6
    assert all(isinstance(layer, nn.Linear) for layer in prepared)
    # Another model's too; other kinds of layers have their own.
    assert type(block(blocks(), 0).up) in classes
    attention = nn.MultiheadAttention(8, 2)
    slope.sparsify_(attention, ALL)
    assert type(attention) not in classes


def test_layers_with_other_weights_parametrized_have_another_class() -> None:
    """Of an attention with weights of its own for q, k and v, one alone may be sparse."""
    some, every = (nn.MultiheadAttention(8, 2, kdim=16, vdim=16) for _ in range(2))
    slope.sparsify_(some, slope.SlopeConfig(first_dense=False, heads_dense=False, exclude=("q_proj_weight",)))
    slope.sparsify_(every, ALL)
    assert type(some) is not type(every)
    assert not parametrize.is_parametrized(some, "q_proj_weight")
    assert parametrize.is_parametrized(every, "q_proj_weight")
    x, y = torch.randn(3, 1, 8), torch.randn(5, 1, 16)
    for model in (some, every):
        assert torch.isfinite(model(x, y, y)[0]).all()


@pytest.mark.parametrize("remove", ["densify_", "torch"])
def test_one_layer_can_leave(remove: str) -> None:
    model = blocks()
    first, second = block(model, 0), block(model, 1)
    dense = first.up.weight.detach().clone()
    if remove == "densify_":
        slope.densify_(first)
    else:
        parametrize.remove_parametrizations(first.up, "weight")
    assert type(first.up) is nn.Linear
    assert torch.equal(first.up.weight, dense)
    assert parametrize.is_parametrized(second.up)
    assert second.up.weight.shape == (16, 8)
    assert torch.isfinite(model(torch.randn(4, 8))).all()
    # And it can come back.
    slope.sparsify_(first.up if remove == "torch" else first, ALL)
    assert type(first.up) is type(second.up)


def test_a_copy_can_leave() -> None:
    model = blocks()
    twin = copy.deepcopy(model)
    slope.densify_(twin)
    assert type(block(twin, 0).up) is nn.Linear
    assert torch.equal(model(x := torch.randn(4, 8)), twin(x))


def test_adapters_are_added_to_one_layer_alone() -> None:
    model = blocks()
    other = blocks(1, slope.SlopeConfig(first_dense=False, heads_dense=False, adapter_rank=2))
    slope.set_adapters(other, True)
    assert type(block(other, 0).up) is type(block(model, 0).up)
    assert torch.isfinite(model(torch.randn(4, 8))).all()


class Double(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def test_another_parametrization_is_of_one_layer_alone() -> None:
    model = blocks()
    first, second = block(model, 0), block(model, 1)
    bias = first.up.bias.detach().clone()
    parametrize.register_parametrization(first.up, "bias", Double())
    assert torch.equal(first.up.bias, 2 * bias)
    assert type(first.up) is not type(second.up)
    assert not parametrize.is_parametrized(second.up, "bias")
    # On the sparse weight it is one more of its list.
    parametrize.register_parametrization(second.up, "weight", Double())
    assert torch.isfinite(model(torch.randn(4, 8))).all()
    slope.densify_(model)
    assert parametrize.is_parametrized(first.up, "bias")
    assert not parametrize.is_parametrized(first.up, "weight")


def test_a_parametrization_from_before_stays_the_layer_s_own() -> None:
    early = Block()
    parametrize.register_parametrization(early.up, "bias", Double())
    slope.sparsify_(early, ALL)
    assert type(early.up) is not type(block(blocks(), 0).up)
    assert parametrize.is_parametrized(early.up, "bias")
    assert torch.isfinite(early(torch.randn(4, 8))).all()


def test_other_changes_of_a_shared_class_are_refused() -> None:
    shared = type(block(blocks(), 0).up)
    with pytest.raises(RuntimeError, match="'scale' of a class that layers prepared by sparsify_ share"):
        shared.scale = 3  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="'weight' of a class"):
        del shared.weight


def test_classes_go_with_their_layers() -> None:
    class Own(nn.Linear):
        pass

    model = nn.Sequential(Own(8, 8))
    slope.sparsify_(model, ALL)
    assert Own in _shared_classes._shared
    assert len(_shared_classes._shared[Own]) == 1
    del model
    gc.collect()
    assert len(_shared_classes._shared.get(Own, ())) == 0


def test_cached_parametrizations_are_each_layer_s_own() -> None:
    model = blocks()
    x = torch.randn(4, 8)
    expected = model(x)
    with parametrize.cached():
        assert torch.equal(model(x), expected)
        up = block(model, 0).up
        assert up.weight is up.weight
        assert not torch.equal(up.weight, block(model, 1).up.weight)


def test_the_class_keeps_no_layer_alive() -> None:
    first = blocks(1)
    kept = blocks(1)
    gone = weakref.ref(block(first, 0).up)
    assert type(block(kept, 0).up) is type(block(first, 0).up)
    del first
    gc.collect()
    assert gone() is None
