"""``training_state``: bytes of weights, metadata, gradients and optimizer state, against sums done by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slope_compile as slope
from graphs import attribute_graph
from prepared import CLASSES, HIDDEN, SPARSE, WIDTH, net
from slope_compile import StateBytes

LINEARS = 4
ELEMENTS = LINEARS * HIDDEN * WIDTH
"""Two ups [32, 16] and two downs [16, 32]."""
REST = (8 * WIDTH + WIDTH) + 2 * HIDDEN + (WIDTH * CLASSES + CLASSES)
"""First linear with bias, the two biases of the ups, head with bias."""
REST_TENSORS = 2 + 2 + 2
AGE = 8
"""An int64 beside each column mask."""
BITS = ELEMENTS // 8 + ELEMENTS // 2 // 8
"""Bytes of patterns and column masks: one bit per element, and one per value."""
METADATA = BITS + LINEARS * AGE
STEP = 4
"""AdamW counts the steps of each parameter in a float32."""

every_dtype = pytest.mark.parametrize(
    ("dtype", "size"), [pytest.param(torch.float32, 4, id="fp32"), pytest.param(torch.bfloat16, 2, id="bf16")]
)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, dtype: torch.dtype) -> None:
    """One step, and a backward after it, so that gradients and moments are there."""
    for _ in range(2):
        model(torch.randn(3, 8, dtype=dtype)).float().square().mean().backward()
        optimizer.step()


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters())


@every_dtype
def test_dense(dtype: torch.dtype, size: int) -> None:
    model = net(dtype)
    optimizer = adamw(model)
    before = slope.training_state(model, optimizer, SPARSE)
    assert before.linears == StateBytes(weights=ELEMENTS * size)
    assert before.rest == StateBytes(weights=REST * size)
    assert before.adapters == StateBytes()
    assert before.total == (ELEMENTS + REST) * size
    train(model, optimizer, dtype)
    after = slope.training_state(model, optimizer, SPARSE)
    weights = ELEMENTS * size
    assert after.linears == StateBytes(weights, 0, weights, 2 * weights + LINEARS * STEP)
    weights = REST * size
    assert after.rest == StateBytes(weights, 0, weights, 2 * weights + REST_TENSORS * STEP)
    assert after.total == 4 * (ELEMENTS + REST) * size + (LINEARS + REST_TENSORS) * STEP
    # Without paths nothing of a dense model counts apart; without the optimizer its state is not counted.
    assert slope.training_state(model, optimizer).linears == StateBytes()
    assert slope.training_state(model, optimizer).total == after.total
    assert slope.training_state(model).total == 2 * (ELEMENTS + REST) * size


@every_dtype
def test_prepared(dtype: torch.dtype, size: int) -> None:
    model = net(dtype)
    slope.sparsify_(model)
    optimizer = adamw(model)
    weights = ELEMENTS * size // 2
    before = slope.training_state(model, optimizer)
    assert before.linears == StateBytes(weights, METADATA)
    assert before.rest == StateBytes(REST * size)
    train(model, optimizer, dtype)
    after = slope.training_state(model, optimizer)
    assert after.linears == StateBytes(weights, METADATA, weights, 2 * weights + LINEARS * STEP)
    assert after.linears.total == sum((weights, METADATA, weights, 2 * weights, LINEARS * STEP))
    assert after.rest.total == 4 * REST * size + REST_TENSORS * STEP
    assert slope.training_state(model, optimizer, SPARSE) == after, "the default paths are the prepared ones"
    optimizer.zero_grad()
    assert slope.training_state(model, optimizer).linears.gradients == 0
    one = slope.training_state(model, optimizer, SPARSE[:1])
    assert one.linears.weights * LINEARS == weights
    assert one.total == slope.training_state(model, optimizer).total


@pytest.mark.parametrize("fields", [{"column_refresh": "backward"}, {"backward": "exact"}], ids=str)
def test_no_column_mask_no_bytes_for_it(fields: dict[str, Any]) -> None:
    model = net(torch.float32)
    slope.sparsify_(model, slope.SlopeConfig(**fields))
    assert slope.training_state(model).linears.metadata == ELEMENTS // 8


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd(momentum: float) -> None:
    dense, sparse = net(torch.float32), net(torch.float32)
    slope.sparsify_(sparse)
    moments = []
    for model in (dense, sparse):
        optimizer = torch.optim.SGD(model.parameters(), momentum=momentum)
        train(model, optimizer, torch.float32)
        state = slope.training_state(model, optimizer, SPARSE)
        moments.append(state.linears.moments)
        assert state.rest.moments == (REST * 4 if momentum else 0)
    assert moments == ([ELEMENTS * 4, ELEMENTS * 2] if momentum else [0, 0])


@every_dtype
def test_the_sparse_linears_hold_about_half(dtype: torch.dtype, size: int) -> None:
    """With AdamW four numbers a weight when dense: half of them, an eighth of a byte and a sixteenth of metadata."""
    totals = []
    for prepare in (False, True):
        model = nn.Sequential(*(nn.Linear(128, 128, dtype=dtype) for _ in range(4)))
        if prepare:
            slope.sparsify_(model)
        optimizer = adamw(model)
        for _ in range(2):
            model(torch.randn(2, 128, dtype=dtype)).square().mean().backward()
            optimizer.step()
        totals.append(slope.training_state(model, optimizer, ["1", "2"]).linears.total)
    dense, sparse = totals
    assert dense == 2 * (128 * 128 * 4 * size + STEP)
    assert sparse == 2 * (128 * 128 * (2 * size + 1 / 8 + 1 / 16) + STEP + AGE)
    assert sparse / dense == pytest.approx({4: 0.5117, 2: 0.5234}[size], rel=1e-3)


@pytest.mark.parametrize("way", ["dense", "prepared"])
def test_adapters_are_apart(way: str) -> None:
    rank, model = 3, net(torch.float32)
    config = slope.SlopeConfig(adapter_rank=rank, column_refresh="backward")
    if way == "prepared":
        slope.sparsify_(model, config)
        schedule = slope.AdapterSchedule(model, total_steps=4, start_step=1)
    else:
        schedule = slope.AdapterSchedule(model, total_steps=4, start_step=1, config=config)
    weights = LINEARS * rank * (HIDDEN + WIDTH) * 4
    optimizer = adamw(model)
    train(model, optimizer, torch.float32)
    off = slope.training_state(model, optimizer, SPARSE)
    assert off.adapters == StateBytes(weights), "no gradient, no moments"
    schedule.step()
    train(model, optimizer, torch.float32)
    on = slope.training_state(model, optimizer, SPARSE)
    assert on.adapters == StateBytes(weights, 0, weights, 2 * weights + 2 * LINEARS * STEP)
    assert (on.linears, on.rest) == (off.linears, off.rest)
    assert on.linears.weights == ELEMENTS * (2 if way == "prepared" else 4)
    assert on.linears.metadata == (ELEMENTS // 8 if way == "prepared" else 0)


def test_a_storage_counts_once() -> None:
    """Tied weights, and views of one flat buffer, as wrappers for data parallelism make them."""
    model = nn.Sequential(nn.Embedding(10, 16), nn.Linear(16, 16, bias=False), nn.Linear(16, 10, bias=False))
    table, last = model[0], model[2]
    assert isinstance(table, nn.Embedding)
    assert isinstance(last, nn.Linear)
    last.weight = table.weight
    assert slope.training_state(model).total == (10 * 16 + 16 * 16) * 4
    flat = torch.zeros(2 * 16)
    model.register_buffer("a", flat[:16])
    model.register_buffer("b", flat[16:])
    assert slope.training_state(model).total == (10 * 16 + 16 * 16 + 2 * 16) * 4


def test_a_transformed_graph() -> None:
    """Compressed state of a graph is told apart as that of a model is."""
    dense = attribute_graph(net(torch.float32), torch.randn(3, 8))
    graph = slope.transform(dense, slope.SlopeConfig(adapter_rank=3))
    optimizer = adamw(graph)
    slope.set_adapters(graph, True)
    train(graph, optimizer, torch.float32)
    state = slope.training_state(graph, optimizer)
    weights = ELEMENTS * 2
    assert state.linears == StateBytes(weights, BITS, weights, 2 * weights + LINEARS * STEP)
    weights = LINEARS * 3 * (HIDDEN + WIDTH) * 4
    assert state.adapters == StateBytes(weights, LINEARS * 8, weights, 2 * weights + 2 * LINEARS * STEP)
    assert state.rest.weights == REST * 4
    one = slope.training_state(graph, optimizer, SPARSE[:1])
    assert one.linears.total * LINEARS == state.linears.total
    assert one.adapters == state.adapters
    assert one.total == state.total


def test_tensors_in_other_containers_of_the_state() -> None:
    """An optimizer may keep lists of tensors, and what is no tensor."""
    model = net(torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    parameter = next(model.parameters())
    optimizer.state[parameter] = {"name": "x", "count": 3, "history": [torch.zeros(5)], "moment": torch.zeros(7)}
    kept: Tensor = optimizer.state[parameter]["history"][0]
    assert slope.training_state(model, optimizer).rest.moments == 7 * 4 + kept.numel() * 4


def test_paths_that_are_no_linears_are_refused() -> None:
    model = net(torch.float32)
    message = r"paths: no linear at 'no\.such', 'nothing'; the linears are: blocks\.0\.down"
    with pytest.raises(slope.ConfigError, match=message):
        slope.training_state(model, paths=[*SPARSE, "nothing", "no.such"])
