"""Training runs of many steps: ways A and B against dense layers times a mask, written out by hand.

One right step does not guarantee two hundred: masks must stay, moments must belong to their weights, and column
patterns must be picked when the configuration asks for it and at no other time.
"""

from __future__ import annotations

import copy
import dataclasses
import io
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slope_compile as slope
from masked import MaskedLinear, every_entry, masked_copy, masks_of, picked_now
from recording import compiled, compiled_way, every_way
from recording import fresh_dynamo as fresh_dynamo
from toy import SPARSE, Block, Toy, loss_of, token_ids, toy

DRIFT = {torch.float64: 1e-9, torch.float32: 1e-5}
"""Relative to the largest entry: what the roundings of 200 (20) steps may grow to.  Runs with another policy of the
column masks are apart by more than a thousand times that, see ``test_policies_are_told_apart``."""

Make = Callable[[nn.Module], torch.optim.Optimizer]


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=5e-3, betas=(0.9, 0.99), weight_decay=0.1)


def adamw_coarse(model: nn.Module) -> torch.optim.Optimizer:
    """For float32.  The gradient of a bias of attention's keys is 0 but for rounding: Adam must not normalise that."""
    return torch.optim.AdamW(model.parameters(), lr=5e-3, betas=(0.9, 0.99), weight_decay=0.1, eps=1e-3)


@dataclasses.dataclass
class Clock:
    """Optimizer steps taken so far."""

    now: int = 0


@dataclasses.dataclass
class PickedEvery:
    """Column masks of one layer: picked before step 0 and every ``interval`` steps after it (0: never again)."""

    clock: Clock
    interval: int
    picked_at: int = -1
    mask: Tensor | None = None

    def __call__(self, weight: Tensor) -> Tensor:
        at = self.clock.now // self.interval if self.interval else 0
        if at != self.picked_at:
            self.mask, self.picked_at = picked_now(weight), at
        assert self.mask is not None
        return self.mask


POLICIES: dict[str, dict[str, Any]] = {
    "exact": {"backward": "exact"},
    "each_backward": {"column_refresh": "backward"},
    "never": {"column_refresh": "never"},
    "every_20_steps": {"column_refresh": 20},
}


def reference(dense: Toy, masks: dict[str, Tensor], fields: dict[str, Any]) -> tuple[nn.Module, Clock]:
    """The masked dense model with the column masks that these fields of SlopeConfig ask for."""
    clock, refresh = Clock(), fields.get("column_refresh", 100)
    exact = fields.get("backward") == "exact"
    model = masked_copy(dense, masks, every_entry if exact else picked_now)
    for layer in model.modules():
        if isinstance(layer, MaskedLinear):
            with torch.no_grad():
                layer.weight.mul_(layer.mask)  # as way A does: what is pruned neither decays nor counts
            if not exact and refresh != "backward":
                layer.columns = PickedEvery(clock, 0 if refresh == "never" else refresh)
    return model, clock


def batches(first: int = 0) -> Iterator[Tensor]:
    """The same tokens for every model that asks, from this step on."""
    for number in itertools.count(first):
        yield torch.randint(0, 20, (3, 5), generator=torch.Generator().manual_seed(number))


def train(
    run: Callable[[Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    steps: int,
    clock: Clock | None = None,
    first: int = 0,
    micro: int = 1,
) -> Tensor:
    """Take optimizer steps of ``micro`` batches each; returns all losses in float64."""
    data, losses = batches(first * micro), []
    for _ in range(steps):
        optimizer.zero_grad()
        for _ in range(micro):
            ids = next(data)
            loss = loss_of(run(ids), ids) / micro
            loss.backward()
            losses.append(loss.detach().double())
        optimizer.step()
        if clock is not None:
            clock.now += 1
    return torch.stack(losses)


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter by its dense name; of a prepared layer its weight, with zeros where pruned."""
    found = {}
    for name, _ in model.named_parameters():
        name = name.replace(".parametrizations.weight.original", ".weight")
        path, _, attribute = name.rpartition(".")
        tensor = getattr(model.get_submodule(path), attribute)
        assert isinstance(tensor, Tensor)
        found[name] = tensor.detach()
    return found


def apart(a: Tensor, b: Tensor) -> float:
    """Largest difference over the largest entry."""
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-3))


def assert_same_run(losses: Tensor, model: nn.Module, expected: Tensor, twin: nn.Module) -> None:
    """Losses of every step and all weights at the end."""
    theirs = weights(twin)
    bound = DRIFT[next(iter(theirs.values())).dtype]
    assert losses.shape == expected.shape
    assert apart(losses, expected) <= bound, f"losses differ by {apart(losses, expected):.3g}"
    ours = weights(model)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert apart(tensor, theirs[name]) <= bound, f"{name}: {apart(tensor, theirs[name]):.3g}"


def check(
    ways: str,
    dense: Toy,
    fields: dict[str, Any],
    steps: int,
    make: Make = adamw,
    micro: int = 1,
    compiler: str = "aot_eager",
) -> None:
    """Train these ways, and the reference with the masks of each."""
    expected: tuple[dict[str, Tensor], Tensor, nn.Module] | None = None
    for way in ways:
        model, run = compiled_way(way, dense, compiler, fields)
        optimizer = make(model)  # way A: made from a model that is still dense
        losses = train(run, optimizer, steps, micro=micro)
        # The masks at the end: had they been others at the start, the runs would not agree.
        masks = masks_of(model)
        if expected is None:
            assert tuple(masks) == tuple(path for path in SPARSE if path in dict(dense.named_modules()))
            twin, clock = reference(dense, masks, fields)
            expected = masks, train(twin, make(twin), steps, clock, micro=micro), twin
        assert float(expected[1][0]) - float(expected[1][-1]) > 0.1, "the run has learnt something"
        assert all(torch.equal(masks[path], mask) for path, mask in expected[0].items())
        assert_same_run(losses, model, *expected[1:])


@pytest.mark.parametrize(
    ("policy", "steps"),
    # More where something accumulates; the other two would be wrong from the second step on.
    [
        *[("exact", 60), ("each_backward", 40), ("never", 40), ("every_20_steps", 70)],
        *(pytest.param(policy, 200, marks=pytest.mark.slow) for policy in ("exact", "every_20_steps")),
    ],
)
def test_both_ways_against_the_masked_dense_model(policy: str, steps: int) -> None:
    check("AB", toy(), POLICIES[policy], steps)


def test_eager_execution_against_the_masked_dense_model() -> None:
    """A prepared model that nobody compiles trains with the exact gradient, whatever its configuration says."""
    dense = toy()
    model = copy.deepcopy(dense)
    slope.sparsify_(model, slope.SlopeConfig(backward="double_pruned"))
    losses = train(model, adamw(model), 100)
    twin, _ = reference(dense, masks_of(model), POLICIES["exact"])
    assert_same_run(losses, model, train(twin, adamw(twin), 100), twin)


def test_policies_are_told_apart() -> None:
    """What the other tests rely on: a wrong policy would be seen."""
    dense = toy()
    prepared = copy.deepcopy(dense)
    slope.sparsify_(prepared)
    ends = {}
    for policy, fields in POLICIES.items():
        twin, clock = reference(dense, masks_of(prepared), fields)
        train(twin, adamw(twin), 50, clock)
        ends[policy] = weights(twin)["blocks.0.up.weight"]
    for one, other in itertools.combinations(ends, 2):
        assert apart(ends[one], ends[other]) > 1000 * DRIFT[torch.float64], (one, other)


@pytest.mark.parametrize("checkpointed", [pytest.param(False, id="plain"), pytest.param(True, id="checkpointed")])
@every_way
def test_micro_batches_and_recomputation_are_no_steps(way: str, checkpointed: bool) -> None:
    """Three micro-batches to a step, columns picked every four steps: by optimizer steps, not by forwards."""
    # Who recomputes is AOTAutograd; without recomputation nothing here depends on it.
    compiler = "aot_eager" if checkpointed else "eager"
    check(way, toy(checkpointed=checkpointed), {"column_refresh": 4}, 12, micro=3, compiler=compiler)


@every_way
def test_a_graph_break_in_every_block_is_no_step(way: str) -> None:
    dense = toy()
    for block in dense.blocks:
        assert isinstance(block, Block)
        block.between = torch._dynamo.graph_break
    check(way, dense, {"column_refresh": 4}, 12, compiler="eager")


@pytest.mark.parametrize(
    ("way", "fields", "at"),
    [
        pytest.param("A", POLICIES["each_backward"], 11, id="A-each_backward"),
        # Way A stores no column mask in the model: they are picked anew, which here is due anyway.
        pytest.param("A", {"column_refresh": 6}, 12, id="A-every_6_steps"),
        pytest.param("B", POLICIES["never"], 11, id="B-never"),
        pytest.param("B", {"column_refresh": 6}, 11, id="B-every_6_steps_just_before"),
        pytest.param("B", {"column_refresh": 6}, 12, id="B-every_6_steps_when_due"),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one(way: str, fields: dict[str, Any], at: int) -> None:
    """Model and optimizer through a file into objects made anew, with other initial weights: bit for bit the same."""
    # The columns are picked outside of the graphs, or by operators in them: either way, before any compiler.
    model, run = compiled_way(way, toy(), "eager", fields)
    optimizer = adamw(model)
    train(run, optimizer, at)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    losses = train(run, optimizer, 8, first=at)

    torch._dynamo.reset()
    file.seek(0)
    state = torch.load(file)
    resumed, run = compiled_way(way, toy(), "eager", fields)
    resumed.load_state_dict(state["model"])
    optimizer = adamw(resumed)
    optimizer.load_state_dict(state["optimizer"])
    again = train(run, optimizer, 8, first=at)
    assert torch.equal(again, losses)
    theirs = weights(model)
    assert [name for name, tensor in weights(resumed).items() if not torch.equal(tensor, theirs[name])] == []
    if way == "B":
        buffers = dict(model.named_buffers())
        assert all(torch.equal(buffer, buffers[name]) for name, buffer in resumed.named_buffers())


@every_way
def test_loading_into_a_model_that_is_compiled_already(way: str) -> None:
    """The compiled function follows the weights that ``load_state_dict`` brings."""
    fields = POLICIES["each_backward"]
    model, run = compiled_way(way, toy(), "eager", fields)
    train(run, adamw(model), 5)
    other, run_other = compiled_way(way, toy(), "eager", fields)
    train(run_other, adamw(other), 3)
    run_other.load_state_dict(run.state_dict())
    ids = token_ids()
    assert torch.equal(run_other(ids), run(ids))
    assert all(torch.equal(mask, masks_of(model)[path]) for path, mask in masks_of(other).items())
    losses = train(run_other, adamw(other), 5)
    twin, clock = reference(toy(), masks_of(model), fields)
    with torch.no_grad():
        for name, tensor in weights(model).items():
            twin.get_parameter(name).copy_(tensor)
    assert_same_run(losses, other, train(twin, adamw(twin), 5, clock), twin)


@pytest.mark.parametrize(
    "way", [pytest.param("A", id="A_dense", marks=pytest.mark.slow), pytest.param("B", id="B_prepared")]
)
def test_through_inductor(way: str) -> None:
    """In float32, a single block; the columns are picked at step 0 and by age at steps 7 and 14."""
    dense = toy(torch.float32)
    del dense.blocks[1]
    check(way, dense, {"column_refresh": 7}, 20, adamw_coarse, compiler="inductor")


def test_a_compiled_model_trains_on_after_it_was_densified() -> None:
    """The way back in the middle of a run: dense from there on, starting from the sparse weights."""
    model = toy()
    slope.sparsify_(model)
    train(compiled(model, "eager"), torch.optim.SGD(model.parameters(), lr=0.1), 5)
    kept = weights(model)
    model.zero_grad(set_to_none=True)
    slope.densify_(model)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in weights(model).items())
    twin = copy.deepcopy(model)
    losses, expected = (train(m, adamw(m), 10) for m in (model, twin))
    assert_same_run(losses, model, expected, twin)
