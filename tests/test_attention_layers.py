"""``nn.MultiheadAttention``: its input projections are weights of the module itself, packed in one or three."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import slope_compile as slope
from masked import assert_same_gradients, masked_copy, masks_of
from matrix.torch_models import VOCABULARY, Attention, Encoder, tokens
from prepared import assert_unchanged, snapshot
from recording import compiled, record
from recording import fresh_dynamo as fresh_dynamo
from slope_compile.kernels import ops
from tolerances import assert_same

PACKED, SEPARATE = "blocks.0.attention", "blocks.1.attention"
EVERYTHING = slope.SlopeConfig(first_dense=False, adapter_rank=2, backward="exact")


def model() -> nn.Module:
    return Attention().double()


def ids() -> Tensor:
    return tokens(2, 5)["ids"]


def test_each_projection_is_a_layer_of_its_own() -> None:
    prepared = model()
    report = slope.sparsify_(prepared, EVERYTHING)
    paths = [d.weight for d in report.sparse if "attention" in d.weight]
    separate = [f"{SEPARATE}.{name}_proj_weight" for name in "qkv"]
    assert paths == [f"{PACKED}.in_proj_weight", f"{PACKED}.out_proj", *separate, f"{SEPARATE}.out_proj"]
    packed = prepared.get_parameter(f"{PACKED}.parametrizations.in_proj_weight.original")
    assert packed.shape == (96, 16)


def test_the_first_one_stays_dense_with_its_siblings() -> None:
    report = slope.sparsify_(model())
    assert {d.weight for d in report.dense} == {f"{PACKED}.in_proj_weight", "head"}
    alone = nn.Sequential(nn.MultiheadAttention(8, 2, kdim=16, vdim=16), nn.Linear(8, 8), nn.Linear(8, 8))
    report = slope.sparsify_(alone)
    first = {d.weight for d in report.dense if d.reason is slope.Reason.FIRST}
    assert first == {f"0.{name}_proj_weight" for name in "qkv"}


def test_there_and_back_again_leaves_an_ordinary_module() -> None:
    dense = model()
    names = [name for name, _ in dense.named_parameters()]
    prepared = copy.deepcopy(dense)
    slope.sparsify_(prepared, EVERYTHING)
    masks = masks_of(prepared)
    slope.densify_(prepared)
    assert [name for name, _ in prepared.named_parameters()] == names
    assert type(prepared.get_submodule(PACKED)) is nn.MultiheadAttention
    for name, parameter in prepared.named_parameters():
        mask = masks.get(name.removesuffix(".weight"))
        assert torch.equal(parameter, dense.get_parameter(name) * (1 if mask is None else mask))


def test_a_refused_conversion_changes_nothing() -> None:
    prepared = model()
    prepared.get_parameter(f"{SEPARATE}.v_proj_weight").grad = torch.zeros(32, 64, dtype=torch.float64)
    before = snapshot(prepared)
    with pytest.raises(slope.ConversionError, match=rf"'{SEPARATE}.v_proj_weight' has a gradient"):
        slope.sparsify_(prepared, EVERYTHING)
    assert_unchanged(prepared, before)


def test_checkpoints() -> None:
    prepared, other = model(), model()
    for one in (prepared, other):
        slope.sparsify_(one, EVERYTHING)
    other.load_state_dict(prepared.state_dict())
    given = ids()
    assert torch.equal(other(given), prepared(given))


def test_adapters_on_every_projection(monkeypatch: pytest.MonkeyPatch) -> None:
    recording = record(monkeypatch)
    prepared = model()
    report = slope.sparsify_(prepared, EVERYTHING)
    slope.set_adapters(prepared, True)
    with torch.no_grad():
        for name, parameter in prepared.named_parameters():
            if name.endswith(".B"):
                parameter.normal_(std=0.1)
    eager, given = copy.deepcopy(prepared), ids()
    results = [run(given) for run in (compiled(prepared, fullgraph=True), eager)]
    assert_same(*results)
    for result in results:
        result.square().sum().backward()
    for name, parameter in eager.named_parameters():
        gradient = prepared.get_parameter(name).grad
        assert (gradient is None) == (parameter.grad is None)
        if gradient is not None and parameter.grad is not None:
            assert_same(gradient, parameter.grad, name)
    assert recording.sparse == len(report.sparse)


@pytest.mark.parametrize("way", ["eager", "compiled"])
def test_the_fast_path_of_an_encoder_reads_sparse_weights(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In eval mode without gradients the encoder has a fused operator; compiled, its linears are sparse products."""
    recording = record(monkeypatch)
    dense = Encoder().double().eval()
    prepared = copy.deepcopy(dense)
    slope.sparsify_(prepared, slope.SlopeConfig(first_dense=False))
    reference = masked_copy(dense, masks_of(prepared)).train()  # training takes no fast path
    given = tokens(2, 5)["ids"]
    with torch.no_grad():
        run = compiled(prepared) if way == "compiled" else prepared
        assert_same(run(given), reference(given))
    if way == "compiled":
        assert recording.sparse == 8
        assert all(one.after[ops.expand] == 0 for one in recording)


def test_drop_in() -> None:
    dense = model()
    trained = copy.deepcopy(dense)
    given = ids()
    result = compiled(trained, options={"backward": "exact"})(given)
    masks = masks_of(trained)
    assert {f"{SEPARATE}.{name}_proj_weight" for name in "qkv"} < set(masks)
    reference = masked_copy(dense, masks)
    expected = reference(given)
    assert_same(result, expected)
    for one in (result, expected):
        one.square().sum().backward()
    assert_same_gradients(trained, reference)
    assert result.shape[-1] == VOCABULARY
