"""A prepared model in use: checkpoints, copies, dtypes, optimizers, double precision, adapters."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prepared import SPARSE, Net, assert_equals_masked_dense, keep_mask, masked_weights, net, sparse_layers
from problems import draw_mask, kept, packed
from slope_compile.config import SlopeConfig
from slope_compile.errors import PatternError
from slope_compile.kernels import ops
from slope_compile.layers import LinearLayer
from slope_compile.parametrizations import LowRank, SparseWeight
from slope_compile.schedule import set_adapters
from slope_compile.sparsify import densify_, sparsify_
from tolerances import assert_same


def prepared(dtype: torch.dtype = torch.float64, **config: Any) -> Net:
    model = net(dtype)
    sparsify_(model, SlopeConfig(**config))
    return model


def batch(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(3, 8, dtype=dtype)


def sparse_of(model: nn.Module, path: str = "blocks.0.up") -> SparseWeight:
    sparse = sparse_layers(model)[path].sparse
    assert sparse is not None
    return sparse


def adapters(model: nn.Module) -> Iterator[tuple[LinearLayer, LowRank]]:
    for layer in sparse_layers(model).values():
        assert layer.low_rank is not None
        yield layer, layer.low_rank


def switch(model: nn.Module, on: bool = True, b: Callable[[Tensor], object] | None = None) -> None:
    """Turn every adapter on or off, with other numbers in B if wanted."""
    for _, adapter in adapters(model):
        adapter.enabled = on
        if b is not None:
            b(adapter.B.data)


# --- checkpoints -----------------------------------------------------------------------------------------------------


def test_state_dict_holds_values_patterns_and_columns_under_stock_names() -> None:
    model = prepared(adapter_rank=2)
    up = "blocks.0.up.parametrizations.weight"
    keys = {k: tuple(v.shape) for k, v in model.state_dict().items() if k.startswith("blocks.0.up.")}
    assert keys == {
        "blocks.0.up.bias": (32,),
        f"{up}.original": (32, 8),
        f"{up}.0.pattern": (32, 2),
        f"{up}.0.column_mask": (32, 1),
        f"{up}.0.column_age": (1,),
        f"{up}.1.A": (2, 16),
        f"{up}.1.B": (32, 2),
        f"{up}.1._extra_state": (1,),
    }


@pytest.mark.parametrize(
    ("config", "stored"),
    [
        pytest.param({"column_refresh": 7}, True, id="every_7_steps"),
        pytest.param({"column_refresh": "never"}, True, id="never"),
        pytest.param({"column_refresh": "backward"}, False, id="each_backward"),
        pytest.param({"backward": "exact"}, False, id="exact"),
    ],
)
def test_the_column_mask_is_state_only_where_it_is_kept(config: dict[str, Any], stored: bool) -> None:
    model = prepared(**config)
    sparse = sparse_of(model)
    assert (sparse.column_mask is not None) is stored
    assert any("column_mask" in key for key in model.state_dict()) is stored
    if stored:
        values = sparse_layers(model)["blocks.0.up"].weight.detach()
        assert sparse.column_mask is not None
        assert torch.equal(sparse.column_mask, ops.pick_columns(values, sparse.pattern, 2, 4))


def test_a_checkpoint_brings_its_masks_with_it() -> None:
    saved = prepared(seed=1, adapter_rank=2)
    switch(saved, b=nn.init.normal_)
    file = io.BytesIO()
    torch.save(saved.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)

    resumed = prepared(seed=2, adapter_rank=2)  # another seed: other masks, until the checkpoint is read
    assert not torch.equal(sparse_of(resumed).pattern, sparse_of(saved).pattern)
    resumed.load_state_dict(state, strict=True)
    assert all(torch.equal(v, state[k]) for k, v in resumed.state_dict().items())
    assert all(adapter.enabled for _, adapter in adapters(resumed))
    x = batch()
    assert torch.equal(resumed(x), saved(x))


@pytest.mark.parametrize("with_patterns", [True, False])
@pytest.mark.parametrize("pattern", ["2:4", "1:4"])
def test_columns_of_an_earlier_checkpoint_stay_the_same(pattern: str, with_patterns: bool) -> None:
    """They were a pattern uint8 ``[K, ceil(N/8)]`` of the transpose; any will do here, also one not by magnitude."""
    saved = prepared(pattern=pattern, seed=1)
    state, expected = saved.state_dict(), saved.state_dict()
    for path, layer in sparse_layers(saved).items():
        N, K = layer.shape
        prefix, columns = f"{path}.parametrizations.weight.0", draw_mask(K, N, sparse_of(saved).nm)
        del state[f"{prefix}.column_mask"]
        state[f"{prefix}.column_pattern"] = packed(columns)
        expected[f"{prefix}.column_mask"] = packed(kept(columns.t(), keep_mask(layer)))
        if not with_patterns:
            del state[f"{prefix}.pattern"]
    names = list(state)
    resumed = prepared(pattern=pattern, seed=2 if with_patterns else 1)
    resumed.load_state_dict(state, strict=with_patterns)
    assert list(state) == names, "the checkpoint is as it was"
    found = resumed.state_dict()
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


@pytest.mark.parametrize("shape", [(16, 3), (8, 4)])
def test_columns_of_an_earlier_checkpoint_that_do_not_fit_are_torchs_own_error(shape: tuple[int, int]) -> None:
    model = prepared()
    state = model.state_dict()
    prefix = "blocks.0.up.parametrizations.weight.0"
    del state[f"{prefix}.column_mask"]
    state[f"{prefix}.column_pattern"] = torch.zeros(shape, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match=rf"Missing key.*{prefix}\.column_mask(.|\n)*Unexpected.*column_pattern"):
        model.load_state_dict(state)


def test_a_checkpoint_of_another_model_of_the_same_shape_is_loaded_whole_or_not() -> None:
    model = prepared(pattern="2:4")
    with pytest.raises(PatternError, match=r"^blocks\.0\.up\.parametrizations\.weight\.0: "):
        model.load_state_dict(prepared(pattern="1:4").state_dict())


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda p: p.bitwise_or_(torch.tensor(0b111, dtype=torch.uint8)), id="three_kept"),
        pytest.param(lambda p: p.zero_(), id="none_kept"),
    ],
)
def test_a_corrupt_pattern_is_refused_before_it_is_used(damage: Callable[[Tensor], Tensor]) -> None:
    model = prepared()
    state = copy.deepcopy(model.state_dict())
    damage(state["blocks.1.down.parametrizations.weight.0.pattern"])
    before = sparse_of(model, "blocks.1.down").pattern.clone()
    with pytest.raises(PatternError, match=r"blocks\.1\.down.* do not keep exactly 2 of 4"):
        model.load_state_dict(state)
    assert torch.equal(sparse_of(model, "blocks.1.down").pattern, before)


def test_missing_patterns_are_torchs_own_strict_error() -> None:
    model = prepared()
    state = {k: v for k, v in model.state_dict().items() if not k.endswith("0.up.parametrizations.weight.0.pattern")}
    with pytest.raises(RuntimeError, match=r"Missing key.*blocks\.0\.up\.parametrizations\.weight\.0\.pattern"):
        model.load_state_dict(state)


# --- copies and dtypes -----------------------------------------------------------------------------------------------


def test_a_deep_copy_is_equal_and_independent() -> None:
    model = prepared(adapter_rank=2)
    switch(model, b=nn.init.normal_)
    clone, x = copy.deepcopy(model), batch()
    expected = model(x).detach()
    assert torch.equal(clone(x), expected)
    with torch.no_grad():
        for layer, adapter in adapters(clone):
            layer.weight.zero_()
            adapter.B.zero_()
    assert torch.equal(model(x), expected)
    densify_(clone)
    assert sparse_layers(model).keys() == set(SPARSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_changing_the_dtype(dtype: torch.dtype) -> None:
    model = prepared(adapter_rank=2)
    pattern = sparse_of(model).pattern.clone()
    values = {path: layer.weight.detach().to(dtype) for path, layer in sparse_layers(model).items()}
    model.to(dtype)
    assert all(p.dtype == dtype for p in model.parameters())
    sparse = sparse_of(model)
    assert torch.equal(sparse.pattern, pattern)
    assert sparse.column_mask is not None
    assert sparse.column_mask.dtype == torch.uint8
    assert sparse.column_age is not None
    assert sparse.column_age.dtype == torch.int64
    assert all(torch.equal(layer.weight, values[path]) for path, layer in sparse_layers(model).items())
    assert model(batch(dtype)).dtype == dtype
    model.double()
    assert model(batch()).dtype == torch.float64


def test_moving_the_model_leaves_the_step_counter_on_the_host() -> None:
    model = prepared().to("meta")
    sparse = sparse_of(model)
    assert sparse.pattern.is_meta
    assert sparse.column_age is not None
    assert sparse.column_age.device.type == "cpu"


def test_autocast_is_that_of_the_masked_dense_model() -> None:
    model = net(torch.float32)
    dense = copy.deepcopy(model)
    sparsify_(model)
    x = batch(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = model(x)
        expected = torch.func.functional_call(dense, masked_weights(dense, model), x)
    assert got.dtype == expected.dtype == torch.bfloat16
    assert torch.equal(got, expected)


# --- optimizers ------------------------------------------------------------------------------------------------------


def adamw(p: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(p, lr=0.01, weight_decay=0.1)


def sgd(p: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1)


every_optimizer = pytest.mark.parametrize("make", [pytest.param(adamw, id="AdamW"), pytest.param(sgd, id="SGD")])


def test_gradients_and_moments_have_the_compressed_shape() -> None:
    model = prepared(pattern="2:8")
    optimizer = adamw(model.parameters())
    model(batch()).sum().backward()
    optimizer.step()
    for layer in sparse_layers(model).values():
        N, K = layer.shape
        assert layer.weight.shape == (N, K // 4)
        assert layer.weight.grad is not None
        assert layer.weight.grad.shape == (N, K // 4)
        state = optimizer.state[layer.weight]
        assert state["exp_avg"].shape == state["exp_avg_sq"].shape == (N, K // 4)


@every_optimizer
def test_training_is_that_of_the_masked_dense_model(
    make: Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer],
) -> None:
    model = net()
    dense = copy.deepcopy(model)
    sparsify_(model)
    masks = {path: keep_mask(layer) for path, layer in sparse_layers(model).items()}
    with torch.no_grad():
        for path, mask in masks.items():
            dense.get_parameter(f"{path}.weight").mul_(mask)
    optimizer, dense_optimizer = make(model.parameters()), make(dense.parameters())
    for _ in range(20):
        x, target = batch(), torch.randn(3, 5, dtype=torch.float64)
        loss = (model(x) - target).square().mean()
        replaced = masked_weights(dense, model)
        expected = (torch.func.functional_call(dense, replaced, x) - target).square().mean()
        assert_same(loss, expected, "loss")
        for one, o in ((loss, optimizer), (expected, dense_optimizer)):
            o.zero_grad()
            one.backward()
            o.step()
    densify_(model) if not optimizer.state else None
    for path, layer in sparse_layers(model).items():
        weight = layer.module.weight
        assert isinstance(weight, Tensor)
        assert not weight[~masks[path]].any()  # exactly zero, after momentum and decay
        assert torch.equal(keep_mask(layer), masks[path])
        assert_same(weight, dense.get_parameter(f"{path}.weight"), path)


# --- double precision ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on", [pytest.param(False, id="adapters_off"), pytest.param(True, id="adapters_on")])
def test_finite_differences_through_a_prepared_layer(on: bool) -> None:
    # Double pruning is configured, and eager mode is exact all the same.
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(8, 4), nn.Linear(4, 4)).double()
    sparsify_(model, SlopeConfig(adapter_rank=2, backward="double_pruned"))
    layer = model[1]
    switch(model, on, nn.init.normal_)
    names = [name for name, _ in layer.named_parameters() if on or not name.endswith((".A", ".B"))]
    tensors = [layer.get_parameter(name).detach().clone().requires_grad_() for name in names]

    def call(x: Tensor, *parameters: Tensor) -> Any:
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), x)

    x = torch.randn(2, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(call, (x, *tensors))
    assert torch.autograd.gradgradcheck(call, (x, *tensors))


def test_assigning_a_weight_takes_its_kept_entries() -> None:
    model = prepared()
    layer = sparse_layers(model)["blocks.0.up"]
    weight = torch.randn(32, 16, dtype=torch.float64)
    layer.module.weight = weight
    assert torch.equal(layer.module.weight, weight * keep_mask(layer))


# --- adapters --------------------------------------------------------------------------------------------------------


def test_adapters_that_are_off_take_no_part() -> None:
    model = net()
    plain = copy.deepcopy(model)
    sparsify_(model, SlopeConfig(adapter_rank=3))
    sparsify_(plain)
    x = batch()
    assert torch.equal(model(x), plain(x))
    optimizer = adamw(model.parameters())
    model(x).sum().backward()
    optimizer.step()
    for _, adapter in adapters(model):
        assert adapter.A.grad is None
        assert adapter.B.grad is None
        assert adapter.A not in optimizer.state
        assert adapter.B not in optimizer.state


def test_switching_on_does_not_change_the_output() -> None:
    model = prepared(adapter_rank=3)
    x = batch()
    before = model(x)
    switch(model)
    assert torch.equal(model(x), before)
    # But A and B are reached: B has a gradient at once, A as soon as B has left zero.
    model(x).sum().backward()
    for _, adapter in adapters(model):
        assert adapter.A.grad is not None
        assert adapter.B.grad is not None
        assert not adapter.A.grad.any()
        assert adapter.B.grad.any()
    switch(model, False)
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("scale", [pytest.param(None, id="one_over_rank"), pytest.param(0.3, id="given")])
def test_adapters_add_scale_times_B_A(scale: float | None) -> None:
    model = net()
    dense = copy.deepcopy(model)
    sparsify_(model, SlopeConfig(adapter_rank=4, adapter_scale=scale))
    switch(model, b=nn.init.normal_)
    factor = 0.25 if scale is None else scale
    replaced = masked_weights(dense, model)
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    for layer, adapter in adapters(model):
        A, B = (t.detach().clone().requires_grad_() for t in (adapter.A, adapter.B))
        factors[layer.path] = (A, B)
        replaced[f"{layer.path}.weight"] = replaced[f"{layer.path}.weight"] + factor * (B @ A)
    x = batch()
    expected, got = torch.func.functional_call(dense, replaced, x), model(x)
    assert_same(got, expected, "output")
    cotangent = torch.randn_like(expected)
    expected.backward(cotangent)
    got.backward(cotangent)
    for layer, adapter in adapters(model):
        A, B = factors[layer.path]
        mask = keep_mask(layer)
        gradient = dense.get_parameter(f"{layer.path}.weight").grad
        assert adapter.A.grad is not None
        assert adapter.B.grad is not None
        assert A.grad is not None
        assert B.grad is not None
        assert gradient is not None
        assert layer.weight.grad is not None
        assert_same(adapter.A.grad, A.grad, "A")
        assert_same(adapter.B.grad, B.grad, "B")
        # The sparse weights train on, at their own positions only.
        assert_same(layer.weight.grad, gradient[mask].view(layer.weight.shape), "values")


def test_adapters_start_the_same_for_one_seed_and_path() -> None:
    first, second, other = prepared(adapter_rank=64), prepared(adapter_rank=64), prepared(adapter_rank=64, seed=1)
    drawn = [[adapter.A.detach() for _, adapter in adapters(model)] for model in (first, second, other)]
    assert all(torch.equal(a, b) for a, b in zip(drawn[0], drawn[1], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(drawn[0], drawn[2], strict=True))
    assert not torch.equal(drawn[0][0], drawn[0][2])  # the same shape in the next block
    everything = torch.cat([a.flatten() for a in drawn[0]])
    # N(0, 1): 6,144 draws, of mean and variance the standard errors are 0.013 and 0.018.
    assert abs(float(everything.mean())) < 0.065
    assert abs(float(everything.var()) - 1) < 0.09
    assert not any(adapter.B.any() for _, adapter in adapters(first))


def test_whether_adapters_are_on_is_part_of_the_checkpoint() -> None:
    model, other = prepared(adapter_rank=2), prepared(adapter_rank=2)
    next(adapters(model))[1].enabled = True
    other.load_state_dict(model.state_dict())
    assert [adapter.enabled for _, adapter in adapters(other)] == [True, False, False, False]
    assert "rank=2, scale=0.5, on" in str(other)


def test_a_prepared_model_equals_its_twin_after_all_that() -> None:
    # What prepares a copy is not confused by one that was prepared, copied and densified before it.
    model = prepared(seed=5, adapter_rank=2)
    densify_(copy.deepcopy(model))
    densify_(model)
    dense = copy.deepcopy(model)
    sparsify_(model, SlopeConfig(seed=6))
    assert_equals_masked_dense(model, dense, batch())


@pytest.mark.parametrize("adapters", [False, True])
def test_forward_mode_differentiation(adapters: bool) -> None:
    """Tangents of values, input and bias come through: the derivative is that of finite differences."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 8)).double()
    sparsify_(model, SlopeConfig(first_dense=False, heads_dense=False, adapter_rank=2))
    set_adapters(model, adapters)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    directions = {name: torch.randn_like(p) for name, p in parameters.items()}
    x, dx = torch.randn(3, 8, dtype=torch.float64), torch.randn(3, 8, dtype=torch.float64)

    def run(state: dict[str, Tensor], x: Tensor) -> Tensor:
        y: Tensor = torch.func.functional_call(model, state, (x,))
        return y

    found = torch.func.jvp(run, (parameters, x), (directions, dx))[1]
    h = 1e-6
    ahead, behind = (
        run({n: p + s * h * directions[n] for n, p in parameters.items()}, x + s * h * dx) for s in (1, -1)
    )
    torch.testing.assert_close(found, (ahead - behind) / (2 * h), rtol=1e-6, atol=1e-8)
