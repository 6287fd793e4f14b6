"""Way A without gradients: few tokens are multiplied with the pruned weight as it is, many with the compressed one."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slope_compile as slope
from masked import masked_copy, masks_of_pruned, picked_now
from recording import compiled, record
from recording import fresh_dynamo as fresh_dynamo
from slope_compile.kernels import compressing, cpu_library
from slope_compile.pattern import Pattern
from tolerances import assert_same
from toy import SPARSE, step, token_ids, toy

NM = Pattern(2, 4)
CPU = torch.device("cpu")
FEW, MANY = (3, 5), (16, 32)
"""Shapes of tokens on either side of every threshold."""


@pytest.fixture
def library() -> None:
    if cpu_library.load() is None:
        pytest.skip("no CPU library here")


def has_compressed(model: nn.Module, run: Any, ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> int:
    """Sparse products in the graphs that a call compiles, which must be right."""
    recording = record(monkeypatch)
    found = run(ids)
    reference = masked_copy(model, masks_of_pruned(model))
    with torch.no_grad():
        torch.testing.assert_close(found.detach(), reference(ids), rtol=1e-4, atol=1e-5)
    last = recording[-1]  # Dynamo may have begun again
    assert [d.weight for d in last.report.sparse] == list(SPARSE)
    assert last.sparse in (0, len(SPARSE))
    return last.sparse


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(("shape", "products"), [(FEW, 0), (MANY, len(SPARSE))], ids=["few", "many"])
def test_tokens_decide(
    shape: tuple[int, int], products: int, context: Any, library: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = toy(torch.float32)
    with context():
        assert has_compressed(model, compiled(model), token_ids(*shape), monkeypatch) == products


def test_training_is_compressed_with_few_tokens_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model = toy(torch.float32)
    assert has_compressed(model, compiled(model), token_ids(*FEW), monkeypatch) == len(SPARSE)


def test_a_gradient_for_the_input_alone_is_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frozen blocks under something that trains: their input gradient is the double-pruned one."""
    model, ids = toy().requires_grad_(False), token_ids(*FEW)
    model.embedding.weight.requires_grad_(True)
    recording = record(monkeypatch)
    step(compiled(model), ids)
    assert recording.sparse == len(SPARSE)
    reference = masked_copy(model, masks_of_pruned(model), picked_now)
    reference.zero_grad()
    step(reference, ids)
    assert model.embedding.weight.grad is not None
    expected = reference.get_parameter("embedding.weight").grad
    assert expected is not None
    assert_same(model.embedding.weight.grad, expected)


@pytest.mark.slow
def test_unknown_numbers_of_tokens_stay_dense(library: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph for few and many: it must not be slower than dense with few."""
    model = toy(torch.float32)
    run = compiled(model, dynamic=True)
    with torch.no_grad():
        assert has_compressed(model, run, token_ids(*MANY), monkeypatch) == 0
        recording = record(monkeypatch)
        run(token_ids(*FEW))
    assert not recording, "the same graph"


@pytest.mark.parametrize("pattern", ["2:8", "1:2"])
def test_patterns_without_kernels_stay_dense(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = toy(torch.float32)
    with torch.no_grad():
        run = compiled(model, options={"pattern": pattern})
        assert has_compressed(model, run, token_ids(*MANY), monkeypatch) == 0


def test_least_tokens(library: None) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        least = compressing.least_tokens(64, 64, dtype, CPU, NM)
        assert least is not None
        assert 1 < least <= MANY[0] * MANY[1]
    assert compressing.least_tokens(64, 64, torch.float64, CPU, NM) is None
    assert compressing.least_tokens(64, 64, torch.float32, torch.device("meta"), NM) is None


@pytest.mark.parametrize("gradients_on", [False, True], ids=["inference", "between_training"])
def test_a_dense_state_that_is_loaded_is_pruned(gradients_on: bool, caplog: pytest.LogCaptureFixture) -> None:
    model, other, ids = toy(), toy(), token_ids()
    run = compiled(model)
    if gradients_on:
        step(run, ids)
    with torch.no_grad():
        run(ids)
        masks = masks_of_pruned(model)
        model.load_state_dict(other.state_dict())
        with caplog.at_level(logging.INFO, "slope_compile"):
            found = run(ids)
        assert_same(found, masked_copy(other, masks)(ids))
    again = [r.getMessage() for r in caplog.records if "again" in r.getMessage()]
    assert len(again) == len(SPARSE)
    assert "blocks.0.out" in again[0]
    for path, mask in masks.items():
        weight = model.get_parameter(f"{path}.weight")
        assert torch.equal(weight, other.get_parameter(f"{path}.weight") * mask), path


def test_evaluating_between_forward_and_backward() -> None:
    """Nothing is written to a weight that is still pruned, although an optimizer has changed it."""
    model, ids = toy(), token_ids()
    run = compiled(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with torch.no_grad():
        run(ids)
    step(run, ids)
    optimizer.step()
    loss = run(ids).square().mean()
    versions = {path: model.get_parameter(f"{path}.weight")._version for path in SPARSE}
    with torch.no_grad():
        run(ids)
    assert versions == {path: model.get_parameter(f"{path}.weight")._version for path in SPARSE}
    loss.backward()


def test_weights_without_version_counters_are_compressed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Made in inference mode: nothing would tell that they have been written to."""
    with torch.inference_mode():
        model = toy(torch.float32)
        assert has_compressed(model, compiled(model), token_ids(*FEW), monkeypatch) == len(SPARSE)


def test_hugging_face_conv1d_stays_dense_and_pruned() -> None:
    """Its weight lies transposed."""
    transformers = pytest.importorskip("transformers.pytorch_utils")
    dense = nn.Sequential(nn.Linear(8, 8), transformers.Conv1D(16, 8), nn.GELU(), nn.Linear(16, 3)).double()
    model, x = copy.deepcopy(dense), torch.randn(5, 8, dtype=torch.float64)
    with torch.no_grad():
        run = compiled(model)
        run(x)
        masks = masks_of_pruned(model)
        assert list(masks) == ["1"]
        model.get_parameter("1.weight").copy_(dense.get_parameter("1.weight"))
        assert_same(run(x), masked_copy(dense, masks)(x))


@pytest.mark.parametrize("shape", [FEW, MANY], ids=["few", "many"])
def test_explained(shape: tuple[int, int], library: None) -> None:
    model = toy(torch.float32)
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        found = slope.explain(model, token_ids(*shape), measure=True)
    sparse = [f for f in found.linears if f.sparse]
    assert [f.path for f in sparse] == list(SPARSE)
    for facts in sparse:
        assert facts.density == 0.5
        assert facts.measured_before
        assert facts.flops_before is not None
        assert facts.flops_after is not None
        dense = facts.lowering == "dense with pruned weight"
        assert dense == (shape == FEW)
        assert (facts.flops_after == facts.flops_before) == dense
        assert (facts.measured_after == facts.measured_before) == dense
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items()), "nothing is pruned"


@pytest.mark.slow
def test_through_inductor(library: None) -> None:
    model, ids = toy(torch.float32), token_ids(1, 4)
    run = compiled(model, "inductor")
    with torch.no_grad():
        found = run(ids)
        torch.testing.assert_close(found, masked_copy(model, masks_of_pruned(model))(ids), rtol=1e-4, atol=1e-5)


def test_the_log_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "slope_compile"), torch.no_grad():
        compiled(toy())(token_ids())
    (line,) = [r.getMessage() for r in caplog.records if "few tokens" in r.getMessage()]
    assert line.startswith(f"{len(SPARSE)} of them")
    assert "sparsify_" in line
