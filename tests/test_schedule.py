"""Lazy adapters: when they come on, that nothing else notices, and that they train as they should."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slope_compile as slope
from adapters import CONFIG, SCALE, adapters, batch, draw_B, every_way, factors, in_three_ways, prepared, train_step
from graphs import attribute_graph
from masked import MaskedLinear, masked_copy, masks_of_prepared, picked_now
from prepared import SPARSE, net
from recording import compiled, record
from recording import fresh_dynamo as fresh_dynamo
from tolerances import assert_same


class Adapted(nn.Module):
    """The oracle of one layer: a masked dense linear plus ``scale * (x A^T) B^T``."""

    def __init__(self, linear: nn.Module, A: Tensor, B: Tensor) -> None:
        super().__init__()
        self.linear = linear
        self.A, self.B = (nn.Parameter(t.detach().clone()) for t in (A, B))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x) + SCALE * ((x @ self.A.t()) @ self.B.t())
        return y


def oracle(dense: nn.Module, model: nn.Module, masks: dict[str, Tensor]) -> nn.Module:
    """``dense`` masked by hand, with the adapters of ``model`` beside its linears."""
    reference = masked_copy(dense, masks, picked_now)
    for path in masks:
        parent, _, name = path.rpartition(".")
        layer = reference.get_submodule(path)
        setattr(reference.get_submodule(parent), name, Adapted(layer, *factors(model, path)))
    return reference


# --- when ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("total", "arguments", "start"),
    [
        pytest.param(10_000, {}, 9900, id="one_percent"),
        pytest.param(150, {}, 148, id="rounded_up"),
        pytest.param(1, {}, 0, id="one_step"),
        pytest.param(7, {"fraction": 0.5}, 3, id="half"),
        pytest.param(7, {"fraction": 1.0}, 0, id="all"),
        pytest.param(9, {"fraction": 1 / 3}, 6, id="a_third"),
        pytest.param(10, {"fraction": 1e-9}, 9, id="at_least_one"),
        # 100 * 0.07 = 7.000000000000001
        pytest.param(100, {"fraction": 0.07}, 93, id="not_more_by_rounding"),
        pytest.param(10, {"start_step": 0}, 0, id="from_the_start"),
        pytest.param(10, {"start_step": 4}, 4, id="start_step"),
        pytest.param(10, {"start_step": 10}, 10, id="never"),
    ],
)
def test_start_step(total: int, arguments: dict[str, Any], start: int) -> None:
    model = prepared()
    schedule = slope.AdapterSchedule(model, total_steps=total, **arguments)
    assert schedule.start_step == start
    assert schedule.active == enabled(model) == (start == 0)
    schedule.step_count = max(start - 2, 0)
    for done in range(schedule.step_count + 1, min(start + 3, total) + 1):
        schedule.step()
        assert schedule.active == enabled(model) == (done >= start)


def enabled(model: nn.Module) -> bool:
    """Whether all adapters of a prepared model are on, or all off."""
    states = {bool(t) for name, t in model.state_dict().items() if name.endswith("_extra_state")}
    assert len(states) == 1
    return states.pop()


def test_set_adapters_says_how_many() -> None:
    model = prepared()
    assert slope.set_adapters(model, True) == len(SPARSE)
    assert enabled(model)
    assert slope.set_adapters(model, False) == len(SPARSE)
    assert not enabled(model)
    graph = slope.transform(attribute_graph(net(), batch()), CONFIG)
    before = graph.code
    assert slope.set_adapters(graph, False) == len(SPARSE)
    assert graph.code == before
    assert slope.set_adapters(graph, True) == len(SPARSE)
    switched = graph.code
    assert slope.set_adapters(graph, True) == len(SPARSE)
    assert graph.code == switched
    assert switched.count("aten.linear.default") == before.count("aten.linear.default") + 2 * len(SPARSE)
    slope.set_adapters(graph, False)
    assert graph.code == before


# --- before ----------------------------------------------------------------------------------------------------------


def test_disabled_adapters_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    recording = record(monkeypatch)
    plain = net()
    model = copy.deepcopy(plain)
    slope.sparsify_(plain, slope.SlopeConfig(column_refresh="backward"))
    slope.sparsify_(model, CONFIG)
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = slope.AdapterSchedule(model, total_steps=10, start_step=5)
    x, before = batch(), {name: p.detach().clone() for name, p in adapters(model).items()}
    assert len(before) == 2 * len(SPARSE)
    for one, run in ((plain, compiled(plain, "eager")), (model, compiled(model, "eager"))):
        y = run(x)
        y.square().mean().backward()
        assert one is model or y.equal(model(x)), "the same numbers too"
    without, disabled = recording
    assert disabled.after == without.after
    assert len(disabled.module.graph.nodes) == len(without.module.graph.nodes)
    optimizer.step()
    schedule.step()
    for name, parameter in adapters(model).items():
        assert parameter.grad is None, name
        assert parameter not in optimizer.state, name
        assert torch.equal(parameter, before[name]), name
    assert len(optimizer.state) == len(list(plain.parameters()))


# --- at the switch ---------------------------------------------------------------------------------------------------


@every_way
def test_the_switch(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No other output, one recompilation, and from then on both parts train."""
    recording = record(monkeypatch)
    model, schedule, run = in_three_ways(way, net(), 6, start=2, compiler="aot_eager" if way == "B" else "eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(2):
        assert not schedule.active
        x = batch()
        train_step(run, x, optimizer)
        before = run(x).detach()
        schedule.step()
    assert schedule.active
    assert len(recording) == (0 if way == "C" else 1)
    assert all(torch.equal(p, first[name]) for name, p in adapters(model).items())
    switched = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert torch.equal(run(x).detach(), before), "B is zero"
    for _ in range(3):
        train_step(run, batch(), optimizer)
        schedule.step()
    assert len(recording) == (0 if way == "C" else 2)
    for name, parameter in model.named_parameters():
        assert not torch.equal(parameter, switched[name]), f"{name} does not train"


@every_way
def test_all_gradients_with_adapters(way: str) -> None:
    """Against dense linears masked by hand plus the adapters' product."""
    dense = net()
    model, schedule, run = in_three_ways(way, dense, 1, start=0)
    assert schedule.active
    draw_B(model)
    twin_model = copy.deepcopy(dense)
    slope.sparsify_(twin_model, CONFIG)
    masks = masks_of_prepared(twin_model)  # by seed and path, so those of every way
    assert list(masks) == SPARSE
    reference, x = oracle(dense, model, masks), batch()
    assert_same(train_step(run, x), train_step(reference, x))
    named = dict(model.named_parameters())
    for path in SPARSE:
        twin = reference.get_submodule(path)
        assert isinstance(twin, Adapted)
        assert isinstance(twin.linear, MaskedLinear)
        for got, true in zip(factors(model, path), (twin.A, twin.B), strict=True):
            assert got.grad is not None
            assert true.grad is not None
            assert_same(got.grad, true.grad, f"adapter of {path}")
        expected = twin.linear.weight.grad
        assert expected is not None
        kept = expected[masks[path]].view(expected.shape[0], -1)
        grad = named[path + (".weight_values" if way == "C" else ".parametrizations.weight.original")].grad
        assert grad is not None
        assert_same(grad, expected if way == "A" else kept, f"values of {path}")
    for name in ("first.weight", "first.bias", "head.weight", "blocks.1.up.bias"):
        got_grad = named[name].grad
        true_grad = reference.get_parameter(name.replace("up.", "up.linear.")).grad
        assert got_grad is not None
        assert true_grad is not None
        assert_same(got_grad, true_grad, name)


@every_way
def test_the_scale_is_the_same_in_training_and_inference(way: str) -> None:
    model, _, run = in_three_ways(way, net(), 1, start=0, compiler="eager")
    draw_B(model)
    x = batch()
    training = run(x).detach()
    if way != "C":
        model.eval()
        assert_same(run(x).detach(), training)
    with torch.no_grad():
        assert_same(run(x), training)
        eager = model(x)  # way A: its weights have been pruned by now
    assert_same(eager, training)
    slope.set_adapters(model, False)
    without = run(x).detach()
    assert not torch.allclose(without, training)


@pytest.mark.parametrize(("rank", "scale", "expected"), [(4, None, 0.25), (1, None, 1.0), (4, 2.5, 2.5)])
def test_the_scale_of_a_rank(rank: int, scale: float | None, expected: float) -> None:
    config = slope.SlopeConfig(adapter_rank=rank, adapter_scale=scale)
    dense = net()
    prepared_model, dense_model = copy.deepcopy(dense), copy.deepcopy(dense)
    slope.sparsify_(prepared_model, config)
    slope.AdapterSchedule(dense_model, total_steps=1, config=config)
    graph = slope.transform(attribute_graph(dense, batch()), config)
    for model in (prepared_model, dense_model):
        layer = model.get_submodule("blocks.0.up")
        assert isinstance(layer.weight, Tensor)
        base = layer.weight.detach().clone()
        draw_B(model)
        slope.set_adapters(model, True)
        A, B = factors(model, "blocks.0.up")
        assert A.shape == (rank, 16)
        assert_same(layer.weight.detach() - base, expected * (B @ A).detach())
    slope.set_adapters(graph, True)
    factors_read = {n.args[1] for n in graph.graph.nodes if n.target is torch.ops.aten.mul.Tensor}
    assert factors_read == {expected}


# --- resuming --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("way", "stop"),
    [
        *(pytest.param(way, 3, id=f"at-{way}") for way in "ABC"),
        *(pytest.param(way, stop, id=f"{when}-{way}") for way, stop, when in [("A", 4, "after"), ("B", 2, "before")]),
        *(
            pytest.param(way, stop, id=f"{when}-{way}", marks=pytest.mark.slow)
            for way, stop, when in [("A", 2, "before"), ("B", 4, "after"), ("C", 2, "before"), ("C", 4, "after")]
        ),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one(way: str, stop: int) -> None:
    """The state goes through a file; the model that it is loaded into started from other weights."""
    batches, file = [batch() for _ in range(7)], io.BytesIO()

    def go_on(first: int) -> list[float]:
        model, _, run = in_three_ways(way, net(), 7, start=3, compiler="eager")
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
        schedule = slope.AdapterSchedule(
            model, total_steps=7, start_step=3, optimizer=optimizer, lr_scale=0.5, warmup_steps=2
        )
        if first:
            state = torch.load(file, weights_only=True)
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            schedule.load_state_dict(state["schedule"])
        losses = []
        for step in range(first, 7):
            if not first and step == stop:
                objects: dict[str, Any] = {"model": model, "optimizer": optimizer, "schedule": schedule}
                torch.save({key: one.state_dict() for key, one in objects.items()}, file)
                file.seek(0)
            losses.append(train_step(run, batches[step], optimizer).item())
            schedule.step()
        assert schedule.active
        return losses

    expected = go_on(0)
    assert go_on(stop) == expected[stop:]


def test_loading_switches_on_and_off() -> None:
    model = prepared()
    schedule = slope.AdapterSchedule(model, total_steps=4, start_step=2)
    early = schedule.state_dict()
    schedule.step()
    schedule.step()
    late = schedule.state_dict()
    assert late == {"step_count": 2, "start_step": 2, "total_steps": 4, "lr_scale": 1.0, "warmup_steps": 0}
    schedule.load_state_dict(early)
    assert not enabled(model)
    fresh = slope.AdapterSchedule(model, total_steps=100)
    fresh.load_state_dict(late)
    assert enabled(model)
    assert (fresh.start_step, fresh.total_steps, fresh.step_count) == (2, 4, 2)


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"total_steps": 0}, "total_steps: expected 1 or more, got 0"),
        ({"total_steps": "100"}, "total_steps: expected a number of optimizer steps, an int, got '100'"),
        ({"total_steps": 1e4}, "total_steps: expected a number of optimizer steps, an int, got 10000.0"),
        ({"total_steps": 10, "start_step": 5.5}, "start_step: expected a number of optimizer steps, an int, got 5.5"),
        ({"total_steps": 5, "fraction": 0.1, "start_step": 2}, "fraction and start_step both say when"),
        ({"total_steps": 5, "fraction": 0.0}, r"fraction: expected above 0, up to 1 .*, got 0\.0"),
        ({"total_steps": 5, "fraction": 1.5}, r"fraction: expected above 0, up to 1 .*, got 1\.5"),
        ({"total_steps": 5, "fraction": math.nan}, "fraction: expected above 0, up to 1 .*, got nan"),
        ({"total_steps": 5, "start_step": -1}, "start_step: expected 0 or more, got -1"),
        ({"total_steps": 5, "start_step": 6}, r"start_step: expected up to total_steps = 5 .*, got 6"),
        ({"total_steps": 5, "lr_scale": 0.0}, "lr_scale must be positive"),
        ({"total_steps": 5, "lr_scale": math.nan}, "lr_scale must be positive"),
        ({"total_steps": 5, "warmup_steps": -1}, "warmup_steps not negative, got 1.0 and -1"),
        ({"total_steps": 5, "lr_scale": 2.0}, r"act on the optimizer's updates; pass optimizer=\.\.\."),
        ({"total_steps": 5, "warmup_steps": 2}, r"act on the optimizer's updates; pass optimizer=\.\.\."),
        ({"total_steps": 5, "config": CONFIG}, "config: the model has its adapters already; leave config out"),
    ],
    ids=str,
)
def test_arguments_that_cannot_be_used(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(slope.ScheduleError, match=message):
        slope.AdapterSchedule(prepared(), **arguments)


@pytest.mark.parametrize("remedy", ["", "add", "freeze", "never", "another"])
def test_an_optimizer_without_the_adapters(remedy: str) -> None:
    """Made before ``sparsify_``, which the weights do not mind: it would never train the adapters."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    slope.sparsify_(model, CONFIG)
    schedule = slope.AdapterSchedule(model, total_steps=4, start_step=4 if remedy == "never" else 2)
    adapters = schedule.adapter_parameters()
    others = [torch.optim.SGD(adapters, lr=0.1)] if remedy == "another" else []
    if remedy == "add":
        optimizer.add_param_group({"params": adapters})
    if remedy == "freeze":
        for parameter in adapters:
            parameter.requires_grad_(False)
    if remedy:
        schedule.step()
        assert schedule.step_count == 1
        return
    with pytest.raises(slope.ScheduleError, match=r"SGD trains the model, but not .*A'\); make the optimizer after"):
        schedule.step()
    assert (schedule.step_count, others) == (0, [])


def test_models_without_adapters() -> None:
    plain = slope.SlopeConfig()
    sparse = net()
    slope.sparsify_(sparse, plain)
    graph = slope.transform(attribute_graph(net(), batch()), plain)
    for model in (net(), sparse, graph):
        before = [name for name, _ in model.named_parameters()]
        with pytest.raises(slope.ScheduleError, match="AdapterSchedule: the model has no adapters; sparsify_ it with"):
            slope.AdapterSchedule(model, total_steps=5)
        for on in (True, False):
            with pytest.raises(slope.ScheduleError, match="set_adapters: the model has no adapters; sparsify_"):
                slope.set_adapters(model, on)
        assert [name for name, _ in model.named_parameters()] == before
    with pytest.raises(slope.ScheduleError, match="no eligible layer has an adapter_rank above 0"):
        slope.AdapterSchedule(net(), total_steps=5, config=plain)
    with pytest.raises(slope.ConfigError, match="AdapterSchedule: config: expected a SlopeConfig"):
        slope.AdapterSchedule(net(), total_steps=5, config={"adapter_rank": 2})  # type: ignore[arg-type]


def test_a_state_that_is_not_one() -> None:
    schedule = slope.AdapterSchedule(prepared(), total_steps=5)
    with pytest.raises(slope.ScheduleError, match="load_state_dict: lr_scale, warmup_steps missing; not the state"):
        schedule.load_state_dict({"step_count": 1, "start_step": 2, "total_steps": 3})
    assert schedule.step_count == 0


# --- other graphs ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_scale_is_a_constant_of_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where shapes are symbols, or one code runs with several scales, a float would become an input of the graph."""
    recording = record(monkeypatch)
    for scale in (0.3, 0.7, 1.1):
        model = prepared(slope.SlopeConfig(adapter_rank=2, adapter_scale=scale, backward="exact"))
        draw_B(model)
        slope.set_adapters(model, True)
        x = batch()
        for dynamic in (True, None):
            assert_same(compiled(model, dynamic=dynamic)(x), model(x))
    assert all(one.sparse == len(SPARSE) for one in recording)
