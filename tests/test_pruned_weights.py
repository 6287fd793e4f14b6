"""Pruned weights of way A stay pruned: what an optimizer has from before, what moves them, models that move."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from masked import NM, masks_of_pruned
from prepared import SPARSE, Net, net
from recording import compiled
from recording import fresh_dynamo as fresh_dynamo
from slope_compile.pruned_weights import EVERY, DenseState, state_of

MakeOptimizer = Callable[[Any], torch.optim.Optimizer]


def batch() -> Tensor:
    return torch.randn(3, 8, dtype=torch.float64)


def step(run: Any, x: Tensor) -> None:
    """Forward and backward."""
    run(x).square().sum().backward()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {path: model.get_parameter(f"{path}.weight").detach() for path in SPARSE}


def outside(model: nn.Module, masks: dict[str, Tensor]) -> float:
    """The largest weight at a pruned position."""
    return max(float(weight[~masks[path]].abs().max()) for path, weight in weights(model).items())


def one_step(run: Any, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    step(run, batch())
    optimizer.step()


OPTIMIZERS = [
    pytest.param(lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.1), id="Adam_L2"),
    pytest.param(lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, amsgrad=True), id="AdamW_amsgrad"),
    pytest.param(lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=0.1), id="SGD_momentum"),
    pytest.param(lambda p: torch.optim.Rprop(p), id="Rprop"),
]


@pytest.mark.parametrize("make_optimizer", OPTIMIZERS)
def test_state_from_before_moves_nothing(make_optimizer: MakeOptimizer, caplog: pytest.LogCaptureFixture) -> None:
    """Steps of the dense model leave moments everywhere."""
    model = net()
    optimizer = make_optimizer(model.parameters())
    one_step(model, optimizer)
    run = compiled(model)
    with caplog.at_level(logging.INFO, "slope_compile"):
        optimizer.zero_grad()
        step(run, batch())
        masks, before = masks_of_pruned(model), copy.deepcopy(weights(model))
        assert list(masks) == SPARSE
        for _ in range(3):
            optimizer.step()
            assert outside(model, masks) == 0
            optimizer.zero_grad()
            step(run, batch())
    assert [r.getMessage() for r in caplog.records if "from before" in r.getMessage()] == [
        f"backend 'slope' masked what {type(optimizer).__name__} had for 4 weights from before they were pruned"
    ]
    assert "moved" not in caplog.text
    for path, weight in weights(model).items():
        assert bool((weight != before[path])[masks[path]].any()), f"{path}: kept weights train"


def test_kept_positions_go_on_with_their_state() -> None:
    """Masking takes nothing from the others: the step is that of an optimizer whose state was masked by hand."""
    model, by_hand = net(), net()
    by_hand.load_state_dict(model.state_dict())
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (model, by_hand)]
    ids = batch()
    for m, optimizer in zip((model, by_hand), optimizers, strict=True):
        step(m, ids)
        optimizer.step()
        optimizer.zero_grad()
    run = compiled(model)
    step(run, ids)
    masks = masks_of_pruned(model)
    for name, parameter in by_hand.named_parameters():
        mask = masks.get(name.removesuffix(".weight"))
        kept = torch.ones_like(parameter) if mask is None or not name.endswith(".weight") else mask.to(parameter.dtype)
        parameter.data.mul_(kept)
        for key in ("exp_avg", "exp_avg_sq"):
            optimizers[1].state[parameter][key].mul_(kept)
        parameter.grad = model.get_parameter(name).grad
    for optimizer in optimizers:
        optimizer.step()
    for name, parameter in by_hand.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter), name


def test_a_state_that_is_loaded_later_moves_nothing() -> None:
    """Of a dense run, into an optimizer whose state was clean."""
    model, dense = net(), net()
    trained = torch.optim.Adam(dense.parameters(), lr=1e-2)
    one_step(dense, trained)
    optimizer, run = torch.optim.Adam(model.parameters(), lr=1e-2), compiled(model)
    one_step(run, optimizer)
    masks = masks_of_pruned(model)
    optimizer.load_state_dict(copy.deepcopy(trained.state_dict()))
    one_step(run, optimizer)
    assert outside(model, masks) == 0


def test_a_gradient_from_before_moves_nothing() -> None:
    """The first micro-batches of a step ran dense."""
    model = net()
    optimizer, run = torch.optim.SGD(model.parameters(), lr=0.1), compiled(model)
    step(model, batch())
    with torch.no_grad():
        run(batch())
    masks = masks_of_pruned(model)
    optimizer.step()
    assert outside(model, masks) == 0


def test_quantized_state_is_left_alone() -> None:
    """In a state of codes zero is no number: the look after the step has to do."""
    model = net()
    optimizer, run = torch.optim.SGD(model.parameters(), lr=0.1), compiled(model)
    step(run, batch())
    weight = model.get_parameter("blocks.0.up.weight")
    optimizer.state[weight]["codes"] = codes = torch.full(weight.shape, 7, dtype=torch.uint8)
    optimizer.step()
    assert bool((codes == 7).all())


def test_what_moves_pruned_weights_is_said_and_undone(caplog: pytest.LogCaptureFixture) -> None:
    """A penalty on the weights, outside of the compiled model, has gradients everywhere."""
    model = net()
    optimizer, run = torch.optim.SGD(model.parameters(), lr=0.1), compiled(model)
    step(run, batch())
    masks = masks_of_pruned(model)
    with caplog.at_level(logging.WARNING, "slope_compile"):
        for _ in range(3):
            model.get_parameter("blocks.1.up.weight").sum().backward()
            optimizer.step()
            assert outside(model, masks) == 0
            optimizer.zero_grad()
            step(run, batch())
    said = [r.getMessage() for r in caplog.records if "moved" in r.getMessage()]
    assert len(said) == 1
    for text in ("SGD", "1 layers", "'blocks.1.up'", "0.1", "outside of the compiled model", "sparsify_"):
        assert text in said[0], text


def test_later_moves_are_found(caplog: pytest.LogCaptureFixture) -> None:
    """Not at every step, which would cost; but they do not go on for ever."""
    model = net()
    optimizer, run = torch.optim.SGD(model.parameters(), lr=1e-3), compiled(model)
    one_step(run, optimizer)
    masks = masks_of_pruned(model)
    for _ in range(EVERY):
        model.get_parameter("blocks.1.up.weight").sum().backward()
        optimizer.step()
    assert "'blocks.1.up'" in caplog.text
    assert outside(model, masks) == 0


def test_an_optimizer_that_is_not_elementwise(caplog: pytest.LogCaptureFixture) -> None:
    model = net()
    matrices = [p for p in model.parameters() if p.dim() == 2]
    optimizer, run = torch.optim.Muon(matrices, lr=0.1), compiled(model)
    step(run, batch())
    masks = masks_of_pruned(model)
    for _ in range(2):
        optimizer.step()
        assert outside(model, masks) == 0
    assert caplog.text.count("Muon moved pruned weights of 4 layers") == 1


def zero_kept(model: nn.Module, masks: dict[str, Tensor]) -> None:
    """Let the kept entries of two groups be zero, which then look as if others could be kept."""
    with torch.no_grad():
        for path in masks:
            model.get_parameter(f"{path}.weight")[0, :8] = 0


def kept_now(model: nn.Module, run: Any) -> dict[str, Tensor]:
    """Where training gives a gradient."""
    model.zero_grad()
    step(run, batch().to(next(model.parameters()).dtype))
    found = {}
    for path in SPARSE:
        gradient = model.get_parameter(f"{path}.weight").grad
        assert gradient is not None
        found[path] = gradient != 0
    return found


def to_meta_and_back(model: Net) -> None:
    """What a move to a device with tensors of another kind does: every Parameter is a new one."""
    state = copy.deepcopy(model.state_dict())
    model.to("meta").to_empty(device="cpu").load_state_dict(state)


@pytest.mark.parametrize("move", [lambda model: model.float(), to_meta_and_back], ids=["dtype", "new_parameters"])
def test_patterns_follow_a_model_that_moves(
    move: Callable[[Net], object], caplog: pytest.LogCaptureFixture
) -> None:
    """Masks by magnitude cannot be found again from weights with kept zeros."""
    model = net()
    run = compiled(model, options={"mask": "magnitude"})
    step(run, batch())
    masks = masks_of_pruned(model)
    zero_kept(model, masks)
    caplog.clear()
    move(model)
    kept = kept_now(model, run)
    for path, mask in masks.items():
        assert torch.equal(kept[path], mask), path
    assert not [r for r in caplog.records if r.name == "slope_compile"], "nothing had to be pruned"


def test_other_weights_in_new_parameters_get_patterns_of_their_own() -> None:
    model, other = net(), net()
    run = compiled(model, options={"mask": "magnitude"})
    step(run, batch())
    masks = masks_of_pruned(model)
    model.to("meta").to_empty(device="cpu").load_state_dict(other.state_dict())
    kept = kept_now(model, run)
    assert not any(torch.equal(kept[path], mask) for path, mask in masks.items())
    for path, weight in weights(model).items():
        assert torch.equal(weight, other.get_parameter(f"{path}.weight") * kept[path]), path


def test_new_data_for_inference_is_pruned() -> None:
    """Dense weights put in through ``.data``, which raises no version counter, lie elsewhere in memory."""
    model, other = net(), net()
    run = compiled(model)
    with torch.no_grad():
        run(batch())
        masks = masks_of_pruned(model)
        for path in SPARSE:
            model.get_parameter(f"{path}.weight").data = other.get_parameter(f"{path}.weight").detach().clone()
        run(batch())
    assert outside(model, masks) == 0


@pytest.mark.parametrize("after_a_step", [True, False])
def test_new_data_in_training_is_pruned(after_a_step: bool, caplog: pytest.LogCaptureFixture) -> None:
    """A dense checkpoint that is loaded into a model in training: the first call finds it, the steps do not mind."""
    model, other = net(), net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    run = compiled(model)
    one_step(run, optimizer)
    if not after_a_step:
        run(batch())
    masks = masks_of_pruned(model)
    model.load_state_dict(other.state_dict())
    assert outside(model, masks) > 0
    caplog.clear()
    one_step(run, optimizer)
    assert outside(model, masks) == 0
    assert all(f"prunes {path} again" in caplog.text for path in SPARSE)
    caplog.clear()
    for _ in range(2):
        one_step(run, optimizer)
    assert not caplog.text


def test_metadata_goes_to_the_device_of_the_weight() -> None:
    """A Parameter that keeps its identity on the way to a GPU, with meta tensors in its place."""
    state = DenseState(
        "up", NM, False, torch.full((4, 1), 0b00110011, dtype=torch.uint8),
        torch.zeros(4, 1, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64),
    )  # fmt: skip
    weight = torch.empty(4, 8, device="meta")
    assert state.masked_weight(weight).device.type == "meta"
    assert state.values(weight).shape == (4, 4)
    assert state.column_mask is not None
    assert state.column_age is not None
    assert (state.pattern.device.type, state.column_mask.device.type) == ("meta", "meta")
    assert state.column_age.device.type == "cpu", "the host reads it in every step"


def test_a_compiled_graph_asks_for_the_metadata_at_each_call() -> None:
    """A model that went to another device and back finds the metadata that came with it."""
    model = net()
    run = compiled(model, options={"column_refresh": "never"})
    step(run, batch())
    masks = masks_of_pruned(model)
    for path in SPARSE:
        state = state_of(model.get_parameter(f"{path}.weight"), NM, None, path)
        assert state is not None
        state.pattern = ~state.pattern  # of 2:4: what was pruned is kept
    model.load_state_dict(net().state_dict())  # and is not zero any more
    model.zero_grad()
    step(run, batch())
    for path, mask in masks.items():
        gradient = model.get_parameter(f"{path}.weight").grad
        assert gradient is not None
        assert torch.equal(gradient != 0, ~mask), path
