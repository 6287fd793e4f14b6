"""Stored column masks of W^{R,C}: when they are picked again, and that backward uses the stored mask in between."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import slope_compile as slope
from graphs import attribute_graph, exported
from masked import NM, ColumnMask, MaskedLinear, assert_same_gradients, masked_copy, masks_of, picked_now
from prepared import SPARSE, Net, net
from problems import column_mask, kept
from recording import compiled, compiled_way, every_way
from recording import fresh_dynamo as fresh_dynamo
from tolerances import assert_same

_COLUMNS, _AGE = ".parametrizations.weight.0.column_mask", ".parametrizations.weight.0.column_age"


def batch() -> Tensor:
    return torch.randn(6, 8, dtype=torch.float64)


def train_step(run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Forward and backward."""
    loss = run(x).square().mean()
    loss.backward()
    return loss.detach()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """Steps so large that other weights become the largest of their column group."""
    return torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.5)


def prepared(refresh: Any) -> Net:
    model = net()
    slope.sparsify_(model, slope.SlopeConfig(column_refresh=refresh))
    return model


def stored(model: nn.Module) -> dict[str, Tensor]:
    """Path -> which values its column mask keeps, bool ``[N, K/2]``, read bit by bit from the ``state_dict``."""
    masks = {}
    for name, tensor in model.state_dict().items():
        if name.endswith(_COLUMNS):
            path = name.removesuffix(_COLUMNS)
            values = model.get_parameter(f"{path}.parametrizations.weight.original")
            masks[path] = _bits(tensor, *values.shape)
    return masks


def picked(model: nn.Module) -> dict[str, Tensor]:
    """Path -> which values would be kept if they were picked now."""
    masks, keeps = masks_of(model), {}
    for path in SPARSE:
        weight = model.get_submodule(path).weight
        assert isinstance(weight, Tensor)
        keeps[path] = kept(column_mask(weight.detach(), NM), masks[path])
    return keeps


def ages(model: nn.Module) -> set[int]:
    return {int(tensor) for name, tensor in model.state_dict().items() if name.endswith(_AGE)}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    assert a.keys() == b.keys()
    return all(torch.equal(a[path], b[path]) for path in a)


class Twin:
    """The oracle: a masked dense model, trained alongside, whose column masks are picked when the test says so."""

    def __init__(self, dense: nn.Module, masks: dict[str, Tensor]) -> None:
        self.model = masked_copy(dense, masks, picked_now)
        self.optimizer = sgd(self.model)
        self.columns: dict[str, Tensor] = {}

    def pick(self) -> bool:
        """Pick the column masks now and use them from here on; whether they differ from those before."""
        changed = self.would_change()
        self.columns = self._picked()
        for path, mask in self.columns.items():
            layer = self.model.get_submodule(path)
            assert isinstance(layer, MaskedLinear)
            layer.columns = _always(mask)
        return changed

    def would_change(self) -> bool:
        """Whether picking now would make a difference."""
        return not self.columns or not same(self.columns, self._picked())

    def _picked(self) -> dict[str, Tensor]:
        layers = {path: layer for path, layer in self.model.named_modules() if isinstance(layer, MaskedLinear)}
        return {path: column_mask((layer.weight * layer.mask).detach(), NM) for path, layer in layers.items()}


def _always(mask: Tensor) -> ColumnMask:
    return lambda weight: mask


@every_way
@pytest.mark.parametrize("refresh", [1, 3, "backward", "never"])
def test_backward_uses_the_stored_mask(way: str, refresh: Any) -> None:
    dense = net()
    # What runs the graph makes no difference to who refreshes when: the slower one where an interval goes by.
    model, run = compiled_way(way, dense, "aot_eager" if refresh == 3 else "eager", {"column_refresh": refresh})
    with torch.no_grad():
        run(batch())  # way A prunes; no training forward, so nothing is counted
    twin, optimizer = Twin(dense, masks_of(model)), sgd(model)
    assert len(masks_of(model)) == len(SPARSE)
    changes, interval = 0, {"never": 100, "backward": 0}.get(refresh, refresh)
    for step in range(8):
        if interval and step % interval == 0:
            changes += twin.pick()  # else it picks at each backward
        for _ in range(2):  # micro-batches
            x = batch()
            assert_same(train_step(run, x), train_step(twin.model, x), f"loss of step {step}")
        assert_same_gradients(model, twin.model)
        for one in (optimizer, twin.optimizer):
            one.step()
            one.zero_grad()
        with torch.no_grad():
            run(batch())
    assert changes > 1 or not isinstance(refresh, int), "the mask must change, or this test shows nothing"
    assert twin.would_change() or refresh != "never"


def test_only_optimizer_steps_count() -> None:
    model = prepared(2)
    run, optimizer = compiled(model, "eager"), sgd(model)
    assert ages(model) == {-1}
    seen, changes = [], []
    for _ in range(5):
        masks = stored(model)
        for _ in range(3):
            train_step(run, batch())
        with torch.no_grad():
            run(batch())
        model.eval()
        run(batch())
        model.train()
        model(batch())  # eager
        seen.append(ages(model))
        changes.append(not same(stored(model), masks))
        if changes[-1]:
            assert same(stored(model), picked(model))
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        for hidden in (torch.no_grad(), torch.inference_mode()):
            with hidden:
                run(batch())
        assert ages(model) == seen[-1], "no training forward, no refresh"
    assert seen == [{0}, {1}, {0}, {1}, {0}]
    assert changes == [False, False, True, False, True]


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda p: torch.optim.AdamW(p, foreach=False), id="AdamW"),
        pytest.param(lambda p: torch.optim.AdamW(p, foreach=True), id="AdamW_foreach"),
        pytest.param(lambda p: torch.optim.AdamW(p, fused=True), id="AdamW_fused"),
        pytest.param(lambda p: torch.optim.SGD(p, lr=0.1, foreach=True), id="SGD_foreach"),
        pytest.param(lambda p: torch.optim.Adafactor(p), id="Adafactor"),
        pytest.param(lambda p: torch.optim.RMSprop(p), id="RMSprop"),
    ],
)
def test_every_optimizer_counts_once(make: Callable[[Any], torch.optim.Optimizer]) -> None:
    model = prepared(3)
    run, optimizer = compiled(model, "eager"), make(model.parameters())
    seen = []
    for _ in range(5):
        train_step(run, batch())
        seen.append(ages(model))
        optimizer.step()
    assert seen == [{0}, {1}, {2}, {0}, {1}]


def test_the_first_training_forward_picks() -> None:
    """Not the conversion: the weights may have changed since, by a checkpoint or by eager training."""
    model = prepared(100)
    at_conversion = stored(model)
    assert same(at_conversion, picked(model))
    optimizer = sgd(model)
    for _ in range(3):
        train_step(model, batch())
        optimizer.step()
    run = compiled(model, "eager")
    with torch.no_grad():
        run(batch())
    assert same(stored(model), at_conversion)
    train_step(run, batch())
    assert same(stored(model), picked(model))
    assert not same(stored(model), at_conversion)


@pytest.mark.parametrize("stop", [0, 2, 3])
def test_a_resumed_run_keeps_mask_and_age(stop: int) -> None:
    """Saved after ``stop`` of 7 steps with a refresh after every third: nothing differs from then on."""
    batches, file = [batch() for _ in range(7)], io.BytesIO()

    def go_on(model: nn.Module, steps: range) -> list[Any]:
        run, optimizer, history = compiled(model, "eager"), torch.optim.SGD(model.parameters(), lr=2.0), []
        for step in steps:
            if step == stop and steps.start == 0:
                torch.save(model.state_dict(), file)
            loss = train_step(run, batches[step])
            history.append((loss, stored(model), ages(model)))
            optimizer.step()
            optimizer.zero_grad()
        return history

    expected = go_on(prepared(3), range(7))[stop:]
    resumed = prepared(3)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    if stop:
        assert ages(resumed) == {stop - 1}
    got = go_on(resumed, range(stop, 7))
    for (loss, masks, age), (true_loss, true_masks, true_age) in zip(got, expected, strict=True):
        assert torch.equal(loss, true_loss)
        assert same(masks, true_masks)
        assert age == true_age
    assert not same(expected[0][1], expected[-1][1]), "there was a refresh on the way"


def test_models_count_on_their_own() -> None:
    """Two models of one class share compiled code, and a copy starts from the state of the original."""
    first, second = prepared(3), prepared(3)
    runs, optimizers = [compiled(first, "eager"), compiled(second, "eager")], [sgd(first), sgd(second)]
    for number, steps in ((0, 2), (1, 1)):
        for _ in range(steps):
            train_step(runs[number], batch())
            optimizers[number].step()
    assert (ages(first), ages(second)) == ({1}, {0})
    copied = copy.deepcopy(first)
    train_step(runs[0], batch())
    assert (ages(first), ages(copied), ages(second)) == ({2}, {1}, {0})

    run, optimizer = compiled(copied, "eager"), sgd(copied)
    before = stored(first), stored(second)
    for age in (2, 0):
        train_step(run, batch())
        assert ages(copied) == {age}
        assert same(stored(copied), picked(copied)) == (age == 0)
        optimizer.step()
        optimizer.zero_grad()
    assert same(stored(first), before[0])
    assert same(stored(second), before[1])
    assert (ages(first), ages(second)) == ({2}, {0})


def test_steps_of_other_models_shards_do_not_count() -> None:
    class DTensor(nn.Parameter):
        """Goes by its name, as shards do."""

    model, shard = prepared(100), DTensor(torch.ones(2))
    run, optimizer, other = compiled(model, "eager"), sgd(model), torch.optim.SGD([shard], lr=0.1)
    shard.grad = torch.ones(2)
    train_step(run, batch())
    for step in range(1, 3):
        optimizer.step()
        for _ in range(3):
            train_step(run, batch())
            other.step()
        assert ages(model) == {step}


def test_refresh_by_hand() -> None:
    model = prepared(3)
    run, optimizer = compiled(model, "eager"), sgd(model)
    for _ in range(2):
        train_step(run, batch())
        optimizer.step()
    addresses = [t.data_ptr() for name, t in model.state_dict().items() if name.endswith((_COLUMNS, _AGE))]
    assert not same(stored(model), picked(model))
    assert slope.refresh_columns_(model) == len(SPARSE)
    assert same(stored(model), picked(model))
    assert addresses == [t.data_ptr() for n, t in model.state_dict().items() if n.endswith((_COLUMNS, _AGE))]
    seen = []
    for _ in range(4):  # the three steps are counted from here
        train_step(run, batch())
        seen.append(ages(model))
        optimizer.step()
    assert seen == [{0}, {1}, {2}, {0}]


@pytest.mark.parametrize("source", ["graph_module", "exported"])
def test_refresh_of_a_transformed_graph(source: str) -> None:
    """Steps are not counted there, so the mask stays until it is refreshed by hand."""
    dense, config = net(), slope.SlopeConfig(column_refresh=3)
    if source == "exported":
        module = slope.transform(exported(dense, batch()), config).module()
    else:
        module = slope.transform(attribute_graph(dense, batch()), config)
    assert isinstance(module, GraphModule)
    assert [d.weight for d in config_report(dense)] == SPARSE
    masks = {path: _bits(module.get_buffer(f"{path}.weight_pattern"), *shape(dense, path)) for path in SPARSE}
    twin, optimizer = Twin(dense, masks), sgd(module)
    assert twin.pick()
    for step in range(6):
        if step == 4:
            assert slope.refresh_columns_(module) == len(SPARSE)
            assert twin.pick()
        x = batch()
        assert_same(train_step(module, x), train_step(twin.model, x), f"loss of step {step}")
        for name, parameter in twin.model.named_parameters():
            expected, path = parameter.grad, name.removesuffix(".weight")
            assert expected is not None
            if name.endswith(".weight") and path in masks:
                name, expected = f"{name}_values", expected[masks[path]].view(expected.shape[0], -1)
            got = module.get_parameter(name).grad
            assert got is not None, name
            assert_same(got, expected, name)
        for one in (optimizer, twin.optimizer):
            one.step()
            one.zero_grad()


def config_report(dense: nn.Module) -> list[slope.Decision]:
    return slope.sparsify_(copy.deepcopy(dense)).sparse


def shape(model: nn.Module, path: str) -> tuple[int, ...]:
    return tuple(model.get_parameter(f"{path}.weight").shape)


def _bits(stored: Tensor, N: int, K: int) -> Tensor:
    assert stored.shape == (N, -(-K // 8))
    return torch.stack([(stored[:, k // 8] >> (k % 8)) & 1 for k in range(K)], dim=1).bool()


@pytest.mark.parametrize("fields", [{"column_refresh": "backward"}, {"backward": "exact"}], ids=str)
def test_nothing_is_stored_where_nothing_needs_it(fields: dict[str, Any]) -> None:
    model = net()
    slope.sparsify_(model, slope.SlopeConfig(**fields))
    assert not stored(model)
    assert not ages(model)
    assert slope.refresh_columns_(model) == 0
    graph = slope.transform(attribute_graph(net(), batch()), slope.SlopeConfig(**fields))
    assert not [name for name, _ in graph.named_buffers() if "column" in name]
    assert slope.refresh_columns_(graph) == 0


def test_a_dense_model_has_nothing_to_refresh() -> None:
    for model in (net(), attribute_graph(net(), batch())):
        with pytest.raises(slope.ConversionError, match="refresh_columns_: the model has no sparse weight; sparsify_"):
            slope.refresh_columns_(model)
