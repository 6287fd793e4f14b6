"""Way A: a dense model, pruned in place when it is first compiled, and sparse from then on."""

from __future__ import annotations

import copy
import gc
import logging
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slope_compile as slope
from masked import NM, assert_same_gradients, is_exactly, masked_copy, masks_of_prepared, masks_of_pruned, picked_now
from recording import compiled, record
from recording import fresh_dynamo as fresh_dynamo
from tolerances import assert_same
from toy import DENSE, SPARSE, step, token_ids, toy


def pruned(model: nn.Module, **fields: Any) -> dict[str, Tensor]:
    """Compile and run a model once; its masks.  They come before the compiler, so none is needed."""
    compiled(model, "eager", options=fields)(token_ids())
    return masks_of_pruned(model)


def outside(model: nn.Module, masks: dict[str, Tensor]) -> float:
    """The largest weight at a pruned position."""
    return max(float(model.get_parameter(f"{path}.weight").detach()[~mask].abs().max()) for path, mask in masks.items())


@pytest.mark.parametrize("pattern", ["1:2", "2:4", "2:8"])
def test_weights_are_pruned_in_place(pattern: str) -> None:
    model = toy()
    before = copy.deepcopy(model)
    parameters = dict(model.named_parameters())
    storages = {name: parameter.data_ptr() for name, parameter in parameters.items()}
    masks = pruned(model, pattern=pattern)

    assert tuple(masks) == SPARSE
    for path, mask in masks.items():
        assert is_exactly(slope.Pattern.parse(pattern), mask), path
        original = before.get_parameter(f"{path}.weight")
        assert torch.equal(model.get_parameter(f"{path}.weight"), original * mask), "kept weights keep their value"
    for path in DENSE:
        assert torch.equal(model.get_parameter(f"{path}.weight"), before.get_parameter(f"{path}.weight"))
    after = dict(model.named_parameters())
    assert list(after) == list(parameters)
    assert all(after[name] is parameter for name, parameter in parameters.items())
    assert {name: parameter.data_ptr() for name, parameter in after.items()} == storages
    assert all(after[name].shape == parameter.shape for name, parameter in before.named_parameters())


def test_magnitude_masks_keep_the_largest() -> None:
    model = toy()
    before = copy.deepcopy(model)
    for path, mask in pruned(model, mask="magnitude").items():
        groups = before.get_parameter(f"{path}.weight").detach().abs().view(-1, 4)
        smallest_kept = groups.masked_fill(~mask.reshape(-1, 4), torch.inf).amin(-1)
        largest_pruned = groups.masked_fill(mask.reshape(-1, 4), 0).amax(-1)
        assert bool((smallest_kept > largest_pruned).all()), path


@pytest.mark.parametrize("seed", [0, 5])
def test_random_masks_are_those_of_sparsify(seed: int) -> None:
    model = toy()
    prepared = copy.deepcopy(model)
    slope.sparsify_(prepared, slope.SlopeConfig(seed=seed))
    expected = masks_of_prepared(prepared)
    masks = pruned(model, seed=seed)
    assert list(masks) == list(expected)
    assert all(torch.equal(masks[path], expected[path]) for path in masks)


def test_said_once(caplog: pytest.LogCaptureFixture) -> None:
    model = toy()
    run = compiled(model, "eager")
    with caplog.at_level(logging.WARNING, "slope_compile"):
        run(token_ids())
        run(token_ids(2, 3))
        with torch.no_grad():
            run(token_ids())
    warnings = [r for r in caplog.records if r.name == "slope_compile"]
    assert [r.levelno for r in warnings] == [logging.WARNING]
    message = warnings[0].getMessage()
    for text in ("7 weights", "in place", "blocks.0.out", "blocks.1.down", "sparsify_"):
        assert text in message


def test_rules_without_effect_are_said_once_each(caplog: pytest.LogCaptureFixture) -> None:
    """A model that stays dense because of a slip of the pen must not do so in silence."""
    run = compiled(toy(), "eager", options={"include": (r"layers\..*", "head")})
    with caplog.at_level(logging.WARNING, "slope_compile"):
        run(token_ids())
        run(token_ids(2, 3))
    rule, dense = (r.getMessage() for r in caplog.records if r.name == "slope_compile")
    assert rule == r"backend 'slope': include 'layers\\..*' matches no linear layer of Toy"
    assert dense.startswith("backend 'slope': Toy runs dense, no linear layer is eligible:\n")
    assert "  blocks.0.up: excluded by the configuration" in dense
    assert "  head: output head" in dense


@pytest.mark.slow
def test_adapters_that_will_not_come_are_said_once(caplog: pytest.LogCaptureFixture) -> None:
    run = compiled(toy(), "eager", options={"adapter_rank": 4})
    with caplog.at_level(logging.WARNING, "slope_compile"):
        run(token_ids())
        run(token_ids(2, 3))
    found = [r.getMessage() for r in caplog.records if "adapter_rank" in r.getMessage()]
    assert len(found) == 1
    for text in ("adapter_rank = 4", "blocks.0.out", "dense Toy", "sparsify_"):
        assert text in found[0]


def test_exclusion_by_path() -> None:
    masks = pruned(toy(), include=(r"blocks\.\d\.(up|down)",), exclude=(r"blocks\.1\.down",))
    assert list(masks) == ["blocks.0.up", "blocks.0.down", "blocks.1.up"]


def test_overrides_by_path() -> None:
    masks = pruned(toy(), overrides=(slope.Override(path=r"blocks\.1\..*", pattern="2:8"),))
    for path, mask in masks.items():
        assert is_exactly(slope.Pattern.parse("2:8" if path.startswith("blocks.1") else "2:4"), mask), path


OPTIMIZERS = [
    pytest.param(lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1), id="AdamW"),
    pytest.param(lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, amsgrad=True), id="AdamW_amsgrad"),
    pytest.param(lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.1), id="Adam_L2"),
    pytest.param(lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=0.1), id="SGD_momentum"),
    pytest.param(
        lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True, weight_decay=0.1), id="SGD_nesterov"
    ),
]


@pytest.mark.parametrize("make_optimizer", OPTIMIZERS)
def test_pruned_weights_stay_pruned(make_optimizer: Callable[[Any], torch.optim.Optimizer]) -> None:
    """The optimizer is made from the dense model, before anything is pruned."""
    model = toy()
    optimizer = make_optimizer(model.parameters())
    run = compiled(model, "eager")
    step(run, token_ids())
    masks = masks_of_pruned(model)
    started = copy.deepcopy(model)
    for _ in range(60):
        optimizer.step()
        optimizer.zero_grad()
        step(run, token_ids())
        for path, mask in masks.items():
            grad = model.get_parameter(f"{path}.weight").grad
            assert isinstance(grad, Tensor)
            assert not bool(grad[~mask].any()), path
    assert outside(model, masks) == 0
    for path, mask in masks.items():
        moved = (model.get_parameter(f"{path}.weight") != started.get_parameter(f"{path}.weight"))[mask]
        assert bool(moved.all()), f"{path}: kept weights train"


@pytest.mark.slow
def test_a_kept_zero_lets_nothing_in_after_a_recompile() -> None:
    model = toy()
    run = compiled(model)
    step(run, token_ids())
    masks = masks_of_pruned(model)
    with torch.no_grad():
        for path, mask in masks.items():
            weight = model.get_parameter(f"{path}.weight")
            weight[:, :8] = 0  # whole groups of kept zeros
            assert bool(mask[:, :8].any())
    model.zero_grad()
    ids = token_ids(2, 7)
    step(run, ids)  # another shape, another graph
    reference = masked_copy(model, masks, picked_now)
    reference.zero_grad()
    step(reference, ids)
    for path, mask in masks.items():
        grad = model.get_parameter(f"{path}.weight").grad
        assert isinstance(grad, Tensor)
        assert_same(grad, reference.get_parameter(f"{path}.weight").grad, path)  # type: ignore[arg-type]
        assert bool((grad != 0)[mask].any())


def test_a_resumed_checkpoint_finds_its_masks() -> None:
    """Random masks do not need the zeros: they come from seed and path, kept zeros or not."""
    model, fresh = toy(), toy()
    masks = pruned(model)
    with torch.no_grad():
        for path in SPARSE:
            model.get_parameter(f"{path}.weight")[0, :8] = 0
    fresh.load_state_dict(model.state_dict())
    step(compiled(fresh, "eager"), token_ids())
    for path, mask in masks.items():
        assert torch.equal(fresh.get_parameter(f"{path}.weight"), model.get_parameter(f"{path}.weight"))
        grad = fresh.get_parameter(f"{path}.weight").grad
        assert isinstance(grad, Tensor)
        assert torch.equal(grad != 0, mask), path


@pytest.mark.parametrize("mask", ["random", "magnitude"])
def test_a_weight_with_the_pattern_keeps_it(mask: str) -> None:
    """Another seed would choose otherwise; what is 2:4 already is left alone."""
    model = toy()
    masks = pruned(model, mask=mask)
    fresh = toy()
    fresh.load_state_dict(model.state_dict())
    again = pruned(fresh, mask=mask, seed=99)
    assert all(torch.equal(masks[path], again[path]) for path in SPARSE)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"patern": "2:4"}, id="unknown"),
        pytest.param({"config": slope.SlopeConfig(), "seed": 1}, id="contradictory"),
        pytest.param({"pattern": "5:4"}, id="bad_value"),
    ],
)
def test_nothing_is_pruned_when_the_options_are_bad(options: dict[str, Any]) -> None:
    model = toy()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed):
        compiled(model, options=options)(token_ids())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_nothing_is_pruned_when_compiling_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("slope_compile.backend.compile_graph", broken)
    model = toy()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="out of memory"):
        compiled(model)(token_ids())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_frozen_weights_are_pruned_and_stay_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    recording = record(monkeypatch)
    dense, ids = toy(), token_ids()
    for path in ("blocks.0.up", "blocks.1.out"):
        dense.get_parameter(f"{path}.weight").requires_grad_(False)
    model = copy.deepcopy(dense)
    logits = step(compiled(model), ids)
    masks = masks_of_pruned(model)
    assert tuple(masks) == SPARSE
    assert recording.sparse == len(SPARSE)
    reference = masked_copy(dense, masks, picked_now)
    assert_same(logits, step(reference, ids))
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (not parameter.requires_grad), name
        if parameter.grad is not None:
            expected = reference.get_parameter(name).grad
            assert expected is not None
            assert_same(parameter.grad, expected, name)


def test_a_model_that_is_wholly_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    recording = record(monkeypatch)
    model, ids = toy().requires_grad_(False), token_ids()
    logits = compiled(model)(ids)
    assert recording.sparse_paths == list(SPARSE)
    assert recording.sparse == 0, "nothing is trained, and nothing gained by compressing at every call"
    assert tuple(masks_of_pruned(model)) == SPARSE
    assert_same(logits, model(ids))


def test_conv1d() -> None:
    """Hugging Face's transposed linear: groups run along K, the first dimension of its weight."""
    pytransformers = pytest.importorskip("transformers.pytorch_utils")
    dense = nn.Sequential(
        nn.Linear(8, 8), pytransformers.Conv1D(16, 8), nn.GELU(), pytransformers.Conv1D(8, 16), nn.Linear(8, 3)
    ).double()
    model, x = copy.deepcopy(dense), torch.randn(5, 8, dtype=torch.float64)
    out = compiled(model)(x)
    out.square().sum().backward()
    masks = masks_of_pruned(model)
    assert list(masks) == ["1", "3"]
    assert {path: tuple(mask.shape) for path, mask in masks.items()} == {"1": (16, 8), "3": (8, 16)}
    assert all(is_exactly(NM, mask) for mask in masks.values())
    reference = masked_copy(dense, masks, picked_now)
    expected = reference(x)
    expected.square().sum().backward()
    assert_same(out, expected)
    assert_same_gradients(model, reference)


def test_a_copy_is_a_model_of_its_own() -> None:
    """Its weights have the pattern already and keep it; training one leaves the other alone."""
    model, ids = toy(), token_ids()
    run = compiled(model, "eager")
    step(run, ids)
    masks = masks_of_pruned(model)
    copied = copy.deepcopy(model)
    copied.zero_grad()
    with torch.no_grad():
        for path in SPARSE:
            weight = copied.get_parameter(f"{path}.weight")
            weight.mul_(torch.rand_like(weight) + 1)
    before = copy.deepcopy(model.state_dict())
    step(compiled(copied, "eager"), ids)
    assert all(torch.equal(masks[path], mask) for path, mask in masks_of_pruned(copied).items())
    reference = masked_copy(copied, masks, picked_now)
    reference.zero_grad()
    step(reference, ids)
    assert_same_gradients(copied, reference)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_parameter_that_is_replaced_is_pruned_too() -> None:
    """A new Parameter in the place of a known one: the compiled graph is not reused for it."""
    model = toy()
    run = compiled(model, "eager")
    run(token_ids())
    layer = model.get_submodule("blocks.0.up")
    layer.weight = replacement = nn.Parameter(torch.randn_like(model.get_parameter("blocks.0.up.weight")))
    run(token_ids())
    assert is_exactly(NM, replacement != 0)


def test_models_are_not_kept_alive() -> None:
    model = toy()
    step(compiled(model), token_ids())
    weak = weakref.ref(model.get_parameter("blocks.0.up.weight"))
    del model
    torch._dynamo.reset()
    gc.collect()
    assert weak() is None
