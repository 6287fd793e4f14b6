"""``sparsify_`` and ``densify_`` on small models: what is converted, to what, why the rest is not, and back."""

from __future__ import annotations

import copy
import logging
from collections import OrderedDict
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from prepared import SPARSE, Net, assert_equals_masked_dense, keep_mask, net, sparse_layers
from slope_compile.config import Override, SlopeConfig
from slope_compile.layers import decide
from slope_compile.report import Reason
from slope_compile.sparsify import add_adapters_, densify_, sparsify_
from tolerances import assert_same

# --- what becomes sparse ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["1:2", "2:4", "1:4", "2:8", "4:8"])
@pytest.mark.parametrize("backward", ["double_pruned", "exact"])
def test_a_prepared_model_is_the_masked_dense_one(pattern: str, backward: Any) -> None:
    # Eager computes the exact gradient whatever ``backward`` says: double pruning is the compiled rewrite's.
    model = net()
    dense = copy.deepcopy(model)
    report = sparsify_(model, SlopeConfig(pattern=pattern, backward=backward))
    assert [d.weight for d in report.sparse] == SPARSE
    assert {d.backward for d in report.sparse} == {backward}
    assert_equals_masked_dense(model, dense, torch.randn(3, 7, 8, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_kept_numbers_are_not_touched(dtype: torch.dtype) -> None:
    model = net(dtype)
    dense = copy.deepcopy(model)
    sparsify_(model)
    for path, layer in sparse_layers(model).items():
        original = dense.get_parameter(f"{path}.weight").detach()
        assert torch.equal(layer.weight.detach(), original[keep_mask(layer)].view(layer.shape[0], -1))
        assert torch.equal(cast(Tensor, layer.module.weight), original * keep_mask(layer))


def test_the_parameter_is_the_same_object_with_another_shape() -> None:
    model = net()
    before = {path: model.get_parameter(f"{path}.weight") for path in SPARSE}
    optimizer = torch.optim.AdamW(model.parameters())  # without state it may be there already
    sparsify_(model)
    for path, layer in sparse_layers(model).items():
        N, K = layer.shape
        assert layer.weight is before[path]
        assert layer.weight.shape == (N, K // 2)
        assert isinstance(layer.weight, nn.Parameter)
        assert any(layer.weight is p for group in optimizer.param_groups for p in group["params"])
    model(torch.randn(2, 8, dtype=torch.float64)).sum().backward()
    values = sparse_layers(model)["blocks.0.up"].weight
    old = values.detach().clone()
    optimizer.step()
    assert not torch.equal(values, old)


def test_frozen_weights_stay_frozen() -> None:
    model = net()
    model.blocks[0].requires_grad_(False)
    sparsify_(model, SlopeConfig(adapter_rank=2))
    layers = sparse_layers(model)
    assert [layers[path].weight.requires_grad for path in SPARSE] == [False, False, True, True]


def test_overrides_give_blocks_other_patterns() -> None:
    model = net()
    dense = copy.deepcopy(model)
    config = SlopeConfig(overrides=(Override(path=r"blocks\.1\..*", pattern="2:8", backward="exact"),))
    report = sparsify_(model, config)
    assert [(d.pattern, d.backward) for d in report.sparse] == [("2:4", "double_pruned")] * 2 + [("2:8", "exact")] * 2
    assert_equals_masked_dense(model, dense, torch.randn(3, 8, dtype=torch.float64))


def test_first_linear_and_head_become_sparse_on_request() -> None:
    model = net()
    # The head's five classes are no multiple of 4: it is sparse with the exact gradient, and the report says so.
    report = sparsify_(model, SlopeConfig(first_dense=False, heads_dense=False))
    assert [d.weight for d in report.sparse] == ["first", *SPARSE, "head"]
    head = report.sparse[-1]
    assert head.backward == "exact"
    assert "N = 5 is not a multiple of 4" in head.why
    sparse = sparse_layers(model)["head"].sparse
    assert sparse is not None
    assert sparse.column_mask is None


# --- what stays dense, and why ---------------------------------------------------------------------------------------


class Scaled(nn.Linear):
    """Not a linear layer any more, though its class says so."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Foreign(torch.Tensor):
    """Some library's tensor subclass."""


class Zoo(nn.Module):
    """One linear layer for each rule."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 16)
        self.first = nn.Linear(16, 16)
        self.good = nn.Linear(16, 16)
        self.odd_inputs = nn.Linear(18, 16)
        self.odd_outputs = nn.Linear(16, 6)
        self.skipped = nn.Linear(16, 16)
        self.twin_a = nn.Linear(16, 16)
        self.twin_b = nn.Linear(16, 16)
        self.twin_b.weight = self.twin_a.weight
        self.twice = nn.Linear(16, 16)
        self.again = self.twice
        self.normed = parametrizations.weight_norm(nn.Linear(16, 16))
        self.subclass = nn.Linear(16, 16)
        self.subclass.weight = nn.Parameter(torch.randn(16, 16).as_subclass(Foreign))
        self.scaled = Scaled(16, 16)
        self.hooked = nn.Linear(16, 16)
        forward = self.hooked.forward
        self.hooked.__dict__["forward"] = lambda x: forward(x)
        self.complex = nn.Linear(16, 16, dtype=torch.complex64)
        self.head = nn.Linear(16, 12, bias=False)
        self.head.weight = cast(nn.Parameter, self.embedding.weight)
        self.to_tokens = nn.Linear(16, 12)
        self.output = nn.Linear(16, 16)


EXPECTED = {
    "first": (Reason.FIRST, ""),
    "good": (Reason.SELECTED, ""),
    "odd_inputs": (Reason.SHAPE, "K = 18 is not a positive multiple of 4"),
    "odd_outputs": (Reason.SELECTED, "exact backward, as N = 6 is not a multiple of 4"),
    "skipped": (Reason.EXCLUDED, ""),
    "twin_a": (Reason.TIED, "twin_a.weight and twin_b.weight"),
    "twin_b": (Reason.TIED, "twin_a.weight and twin_b.weight"),
    "twice": (Reason.SHARED, "the module has 2 paths"),
    "normed": (Reason.PARAMETRIZED, "_WeightNorm; remove it before converting"),
    "subclass": (Reason.SUBCLASS, "Foreign"),
    "scaled": (Reason.FORWARD_REPLACED, "Scaled"),
    "hooked": (Reason.FORWARD_REPLACED, "Linear"),
    "complex": (Reason.DTYPE, "torch.complex64"),
    "head": (Reason.TIED, "embedding.weight and head.weight"),
    "to_tokens": (Reason.HEAD, ""),
    "output": (Reason.HEAD, ""),
}


def test_every_reason_is_in_the_report_and_on_the_model() -> None:
    model = Zoo()
    report = sparsify_(model, SlopeConfig(exclude=("skipped",)))
    assert {d.weight: (d.reason, d.detail) for d in report} == EXPECTED
    selected = [path for path, (reason, _) in EXPECTED.items() if reason is Reason.SELECTED]
    assert [d.weight for d in report.sparse] == list(sparse_layers(model)) == selected
    table = str(report)
    assert "2 of 16 linears sparse" in table
    for decision in report:
        assert decision.why in table
        if not decision.sparse:
            assert f"dense: {decision.why}" in str(model.get_submodule(decision.weight))


def test_tied_weights_are_found_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = Zoo()
    found = {layer.path: (decision.reason, decision.detail) for layer, decision in decide(model, SlopeConfig())}
    tied = {path: expected for path, expected in EXPECTED.items() if expected[0] is Reason.TIED}
    assert len(tied) == 3
    assert {path: found[path] for path in tied} == tied


def test_print_shows_pattern_and_backward_of_sparse_layers() -> None:
    model = net()
    sparsify_(model, SlopeConfig(adapter_rank=4, overrides=(Override(path="blocks.1.up", backward="exact"),)))
    text = str(model)
    assert "2:4 of [32, 16], values [32, 8], backward=double_pruned, columns refreshed every 100 steps" in text
    assert str(model.get_submodule("blocks.1.up")).count("backward=exact") == 1
    assert "rank=4, scale=0.25, off" in text
    assert "Linear(in_features=8, out_features=16, bias=True, dense: first linear after the input)" in text


def test_print_says_why_a_conv1d_is_dense() -> None:
    """Hugging Face's class has a ``__repr__`` of its own, which ignores ``extra_repr``."""
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    Conv1D = pytorch_utils.Conv1D
    names = ("first", "up", "normed", "down", "head")
    layers = [Conv1D(8, 8), Conv1D(16, 8), parametrizations.weight_norm(Conv1D(16, 16)), Conv1D(8, 16), Conv1D(6, 8)]
    model = nn.Sequential(OrderedDict(zip(names, layers, strict=True)))
    others = [model.first, model.up, model.down, model.head]
    plain = [(str(layer), type(layer)) for layer in others]
    report = sparsify_(model)
    lines = str(model).splitlines()
    assert "  (first): Conv1D(nf=8, nx=8, dense: first linear after the input)" in lines
    assert "  (head): Conv1D(nf=6, nx=8, dense: output head)" in lines
    assert f"dense: {report.dense[1].why}" in str(model.normed)
    assert "_WeightNorm" in report.dense[1].why
    assert str(model).count("dense: ") == 3

    first, copied = model.first, copy.deepcopy(model)
    assert isinstance(first, Conv1D)
    assert str(copied) == str(model)
    assert type(model.head) is type(first), "one class for all, or each block would be compiled on its own"
    densify_(model)
    assert [(str(layer), type(layer)) for layer in others] == plain
    assert "dense: output head" in str(copied), "the copy keeps its notes"


def test_rules_that_match_nothing_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="slope_compile"):
        sparsify_(net(), SlopeConfig(exclude=("blocks.7.*",)))
    assert [r.getMessage() for r in caplog.records] == ["sparsify_: exclude 'blocks.7.*' matched no linear layer"]


def test_adapters_of_more_than_full_rank_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="slope_compile"):
        sparsify_(net(), SlopeConfig(adapter_rank=90, overrides=(Override(path=r"blocks\.1\.up", adapter_rank=16),)))
    assert [r.getMessage() for r in caplog.records] == [
        "adapter_rank 90 is more than the full rank of 3 of 4 layers (smallest: 'blocks.0.up', 32 x 16); an adapter of "
        "rank 16 can already be any matrix of that shape"
    ]


def test_adapters_of_more_than_full_rank_on_a_dense_model(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="slope_compile"):
        add_adapters_(net(), SlopeConfig(adapter_rank=17))
    (said,) = (r.getMessage() for r in caplog.records)
    assert said.startswith("adapter_rank 17 is more than the full rank of 4 of 4 layers")


# --- masks -----------------------------------------------------------------------------------------------------------


def patterns(model: nn.Module) -> dict[str, Tensor]:
    return {path: keep_mask(layer) for path, layer in sparse_layers(model).items()}


def same_patterns(a: nn.Module, b: nn.Module) -> bool:
    one, other = patterns(a), patterns(b)
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_random_masks_do_not_depend_on_the_weights_or_on_other_layers() -> None:
    # So every rank finds the same ones, whatever its generator has done so far.
    first, second, third = net(), net(torch.float32), net()
    state = torch.get_rng_state()
    sparsify_(first)
    assert torch.equal(torch.get_rng_state(), state)
    sparsify_(second, SlopeConfig(first_dense=False))
    sparsify_(third, SlopeConfig(seed=1))
    masks = patterns(second)
    assert all(torch.equal(mask, masks[path]) for path, mask in patterns(first).items())
    assert not same_patterns(first, third)
    assert not torch.equal(masks["blocks.0.up"], masks["blocks.1.up"])


def test_magnitude_masks_keep_the_largest() -> None:
    model = net()
    dense = copy.deepcopy(model)
    sparsify_(model, SlopeConfig(mask="magnitude"))
    for path, mask in patterns(model).items():
        groups = dense.get_parameter(f"{path}.weight").detach().abs().view(-1, 4)
        kept, dropped = groups[mask.view(-1, 4)].view(-1, 2), groups[~mask.view(-1, 4)].view(-1, 2)
        assert bool((kept.min(1).values >= dropped.max(1).values).all())


@pytest.mark.parametrize("mask", ["random", "magnitude"])
def test_a_weight_that_is_sparse_already_keeps_its_pattern(mask: Any) -> None:
    model = net()
    sparsify_(model, SlopeConfig(seed=3))
    before = patterns(model)
    densify_(model)
    sparsify_(model, SlopeConfig(seed=4, mask=mask))
    assert all(torch.equal(m, before[path]) for path, m in patterns(model).items())


# --- and back --------------------------------------------------------------------------------------------------------


def test_densify_is_the_inverse() -> None:
    model = net()
    names, modules = list(model.state_dict()), str(model)
    parameters = [(name, id(p)) for name, p in model.named_parameters()]
    config = SlopeConfig(adapter_rank=2)
    sparsify_(model, config)
    x = torch.randn(4, 8, dtype=torch.float64)
    output, masks = model(x), patterns(model)
    report = densify_(model)
    assert not report.sparse
    assert str(model) == modules
    # The order too: optimizers number the parameters of a checkpoint by it.
    assert list(model.state_dict()) == names
    assert [(name, id(p)) for name, p in model.named_parameters()] == parameters
    assert all(type(m) is type(n) for m, n in zip(model.modules(), Net().modules(), strict=True))
    assert_same(model(x), output)
    for path, mask in masks.items():
        weight = model.get_parameter(f"{path}.weight")
        assert weight.is_leaf
        assert weight.requires_grad
        assert not weight[~mask].any()
    sparsify_(model, config)
    assert torch.equal(model(x), output)
    assert all(torch.equal(mask, masks[path]) for path, mask in patterns(model).items())


def test_kept_weights_that_are_zero_find_their_place_again() -> None:
    model = net()
    config = SlopeConfig(seed=11)
    sparsify_(model, config)
    masks = patterns(model)
    with torch.no_grad():
        for layer in sparse_layers(model).values():
            layer.weight[torch.rand_like(layer.weight) < 0.4] = 0.0
        sparse_layers(model)["blocks.0.up"].weight.zero_()
    densify_(model)
    sparsify_(model, config)
    assert all(torch.equal(mask, masks[path]) for path, mask in patterns(model).items())


def test_densify_merges_adapters_that_are_on_and_drops_the_others() -> None:
    model = net()
    sparsify_(model, SlopeConfig(adapter_rank=2))
    layers = sparse_layers(model)
    for path in ("blocks.0.up", "blocks.1.up"):
        low_rank = layers[path].low_rank
        assert low_rank is not None
        nn.init.normal_(low_rank.B)
        low_rank.enabled = path == "blocks.0.up"
    x = torch.randn(4, 8, dtype=torch.float64)
    output, masks = model(x), patterns(model)
    densify_(model)
    assert_same(model(x), output)
    assert bool(model.blocks[0].up.weight[~masks["blocks.0.up"]].any())  # type: ignore[union-attr, index]
    assert not model.blocks[1].up.weight[~masks["blocks.1.up"]].any()  # type: ignore[union-attr, index]


def test_densify_leaves_weights_as_they_lay() -> None:
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    model = nn.Sequential(nn.Linear(8, 8), conv1d(16, 8), conv1d(8, 16), nn.Linear(8, 3))
    strides = [parameter.stride() for parameter in model.parameters()]
    sparsify_(model)
    densify_(model)
    assert [parameter.stride() for parameter in model.parameters()] == strides


def test_a_model_prepared_in_inference_mode_can_be_trained() -> None:
    model = net()
    with torch.inference_mode():
        sparsify_(model, SlopeConfig(adapter_rank=2))
    assert not any(tensor.is_inference() for tensor in [*model.parameters(), *model.buffers()])


def test_a_model_made_in_inference_mode_can_be_prepared() -> None:
    with torch.inference_mode():
        model = net().requires_grad_(False)
    sparsify_(model)
    x = torch.randn(3, 8, dtype=torch.float64)
    torch.testing.assert_close(torch.compile(model, backend="slope")(x), model(x))
