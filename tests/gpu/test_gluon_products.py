"""The ``mma.sp`` product against float64 and the dense one: on a GPU, elsewhere on the executor of ``gluon_cpu``."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gluon_cpu import Executor, mma_sp_source
from problems import SHAPES, Problem, Shape, draw, draw_mask, kept, packed
from slope_compile.kernels import gluon_configs, gluon_products, gpu_self_test
from slope_compile.pattern import Pattern
from tolerances import assert_no_worse_than_dense
from triton_interpreter import interpreting

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.skipif(interpreting(), reason="the interpreter does not know Gluon; the default suite has run")

TWO_FOUR = Pattern(2, 4)
AWKWARD = {
    **SHAPES,
    "N_not_multiple_of_4": Shape((9,), 7, 5),
    "several_tiles": Shape((70,), 132, 67),
    "whole_blocks": Shape((40,), 64, 48),
}
every_shape = pytest.mark.parametrize("shape", [pytest.param(s, id=name) for name, s in AWKWARD.items()])
both_dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
every_config = pytest.mark.parametrize("config", gluon_configs.MMA_SP, ids=str)


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE.type == "cpu":
        executor = Executor(mma_sp_source())
        monkeypatch.setattr(gluon_products, "_kernels", lambda: executor)
        gpu_self_test.mma_sp_passes.cache_clear()


def on_device(t: Tensor) -> Tensor:
    """Moved with its strides: a copy of an expanded or strided tensor would be contiguous."""
    if DEVICE.type == "cpu":
        return t
    whole = t.as_strided((t.untyped_storage().nbytes() // t.itemsize,), (1,), 0).to(DEVICE)
    return whole.as_strided(t.shape, t.stride(), t.storage_offset())


def run(*tensors: Tensor) -> Tensor:
    x, values, pattern = map(on_device, tensors)
    return gluon_products.forward(x, values, pattern)


def check(p: Problem, config: gluon_configs.MmaSp | None = None, splits: int | None = None) -> None:
    x, values, pattern, bias = map(on_device, (p.x, p.values, p.pattern, p.bias))
    dtype = p.x.dtype
    for b in (None, p.bias):
        result = gluon_products.forward(x, values, pattern, None if b is None else bias, config, splits)
        assert result.is_contiguous()
        truth = F.linear(p.x.double(), p.weight.double(), None if b is None else b.double())
        scale = F.linear(p.x.double().abs(), p.weight.double().abs(), None if b is None else b.double().abs())
        assert result.dtype is dtype
        assert_no_worse_than_dense(result.cpu(), F.linear(p.x, p.weight, b), truth, scale)


@both_dtypes
@every_shape
def test_products(shape: Shape, dtype: torch.dtype) -> None:
    check(draw(TWO_FOUR, shape, dtype))


@both_dtypes
@every_config
def test_every_configuration(config: gluon_configs.MmaSp, dtype: torch.dtype) -> None:
    for groups in (35, 48):  # 140 and 192 features: a pattern read by the byte, and by 16 bits
        p = draw(TWO_FOUR, Shape((20,), 68, groups), dtype)
        for splits in (1, 100):
            check(p, config, splits)


@both_dtypes
@every_config
def test_every_weight_arrives_where_it_belongs(config: gluon_configs.MmaSp, dtype: torch.dtype) -> None:
    # Each token is one feature alone, so that the result is the weight, bit by bit, in every lane of the tensor core.
    for K in (128, 100):
        mask = draw_mask(76, K, TWO_FOUR)
        weight = torch.randn(76, K).to(dtype) * mask
        values, pattern, x = map(on_device, (kept(weight, mask), packed(mask), torch.eye(K, dtype=dtype)))
        assert torch.equal(gluon_products.forward(x, values, pattern, None, config).cpu(), weight.t())


@both_dtypes
def test_the_self_test_passes(dtype: torch.dtype) -> None:
    for config in gluon_configs.MMA_SP[::5]:
        assert gpu_self_test.mma_sp_passes(DEVICE, dtype, config)


@both_dtypes
def test_small_numbers_stay(dtype: torch.dtype) -> None:
    mask = draw_mask(16, 32, TWO_FOUR)
    tiny = torch.finfo(dtype).smallest_normal / 2
    weight = torch.full((16, 32), tiny, dtype=dtype) * mask
    values, pattern, x = map(on_device, (kept(weight, mask), packed(mask), torch.eye(32, dtype=dtype)))
    assert torch.equal(gluon_products.forward(x, values, pattern).cpu(), weight.t())


@both_dtypes
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("K", [36, 64])
def test_what_is_not_finite(K: int, bad: float, dtype: torch.dtype) -> None:
    p = draw(TWO_FOUR, Shape((5,), 16, K // 4), dtype)
    values = p.values.clone()
    values[3, 4] = bad
    y = run(p.x, values, p.pattern)
    assert not bool(y[:, 3].isfinite().any())
    assert bool(y[:, torch.arange(16) != 3].isfinite().all())
    # An input that is not finite arrives in the outputs that keep a weight for it, and in no other.
    x = p.x.clone()
    x[2, 7] = bad
    y = run(x, p.values, p.pattern).cpu()
    assert torch.equal(~y[2].isfinite(), p.mask[:, 7])
    assert bool(y[torch.arange(5) != 2].isfinite().all())


@both_dtypes
@pytest.mark.parametrize("K", [36, 80])
@pytest.mark.parametrize("before", [1, 2, 8])
def test_nothing_outside_the_tensors_is_read(before: int, K: int, dtype: torch.dtype) -> None:
    # Numbers beside the views are NaN; an odd number of them before puts rows off the words.
    p = draw(TWO_FOUR, Shape((5,), 12, K // 4), dtype)
    frame = torch.full((7, K + before + 9), math.nan, dtype=dtype)
    frame[1:-1, before : before + K] = p.x
    x = on_device(frame[1:-1, before : before + K])
    around = torch.full((p.values.numel() + before + 8,), math.nan, dtype=dtype)
    around[before : before + p.values.numel()] = p.values.flatten()
    values = on_device(around[before : before + p.values.numel()].view_as(p.values))
    bits = torch.full((p.pattern.numel() + before + 8,), 255, dtype=torch.uint8)
    bits[before : before + p.pattern.numel()] = p.pattern.flatten()
    pattern = on_device(bits[before : before + p.pattern.numel()].view_as(p.pattern))
    expected = run(p.x, p.values, p.pattern)
    assert bool(expected.isfinite().all())
    assert torch.equal(gluon_products.forward(x, values, pattern), expected)


@pytest.mark.parametrize(("M", "N", "K"), [(0, 8, 16), (4, 0, 16), (4, 8, 0)])
def test_zero_sizes(M: int, N: int, K: int) -> None:
    values = torch.ones(N, K // 2, device=DEVICE, dtype=torch.float16)
    pattern = packed(draw_mask(N, K, TWO_FOUR)).to(DEVICE)
    x, bias = (torch.ones(*size, device=DEVICE, dtype=torch.float16) for size in ((M, K), (N,)))
    for b in (None, bias):
        assert torch.equal(gluon_products.forward(x, values, pattern, b), F.linear(x, x.new_zeros(N, K), b))
