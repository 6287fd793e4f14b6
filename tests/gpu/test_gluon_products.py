"""The products on the sparse tensor cores against float64 and the dense one: on a GPU, elsewhere on ``gluon_cpu``."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gluon_cpu import Executor
from problems import SHAPES, Problem, Shape, draw, draw_mask, kept, packed
from slope_compile.kernels import gluon_configs, gluon_products, gluon_self_test
from slope_compile.kernels.gluon_configs import Config, MmaSp, WgmmaSp
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
SMALLEST: dict[str, Config] = {"mma_sp": gluon_configs.MMA_SP[0], "wgmma_sp": WgmmaSp(1, 4, 4, 3)}
CONFIGS: tuple[Config, ...] = (*gluon_configs.MMA_SP, *gluon_configs.WGMMA_SP)
FEW: tuple[Config, ...] = (*gluon_configs.MMA_SP[::3], gluon_configs.WGMMA_SP[0], gluon_configs.WGMMA_SP[-1])
"""Where all would take too long without a GPU: of each kernel the smallest and larger ones."""

every_shape = pytest.mark.parametrize("shape", [pytest.param(s, id=name) for name, s in AWKWARD.items()])
both_dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
both_kernels = pytest.mark.parametrize("kernel", SMALLEST)
every_config = pytest.mark.parametrize("config", CONFIGS, ids=str)
some_configs = pytest.mark.parametrize("config", CONFIGS if DEVICE.type == "cuda" else FEW, ids=str)


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if DEVICE.type == "cpu":
        mma, wgmma = Executor("gluon_mma_sp"), Executor("gluon_wgmma_sp")
        monkeypatch.setattr(gluon_products, "_kernels", lambda: mma)
        monkeypatch.setattr(gluon_products, "_wgmma_kernels", lambda: wgmma)
        return
    arguments = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    wants = arguments.get("kernel") == "wgmma_sp" or isinstance(arguments.get("config"), WgmmaSp)
    if wants and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("wgmma.sp is an instruction of compute capability 9.0")


def on_device(t: Tensor) -> Tensor:
    """Moved with its strides: a copy of an expanded or strided tensor would be contiguous."""
    if DEVICE.type == "cpu":
        return t
    whole = t.as_strided((t.untyped_storage().nbytes() // t.itemsize,), (1,), 0).to(DEVICE)
    return whole.as_strided(t.shape, t.stride(), t.storage_offset())


def product(config: Config, splits: int | None = None) -> Callable[..., Tensor]:
    """Of x, values, pattern, bias and (T, B)."""
    if isinstance(config, WgmmaSp):
        return lambda x, v, p, bias=None, low_rank=None: gluon_products.wgmma_sp(
            x, v, p, bias, low_rank, config, splits
        )
    return lambda x, v, p, bias=None, low_rank=None: gluon_products.mma_sp(x, v, p, bias, low_rank, config, splits)


def whole_rows(shape: Shape, config: Config) -> Shape:
    """With as many features as the kernel takes: a multiple of 16 for ``wgmma.sp``."""
    groups = -(-shape.groups // 4) * 4 if isinstance(config, WgmmaSp) else shape.groups
    return Shape(shape.leading, shape.N, groups, shape.layout)


def check(p: Problem, config: Config, rank: int = 0, splits: int | None = None, biases: bool = True) -> None:
    x, values, pattern, bias = map(on_device, (p.x, p.values, p.pattern, p.bias))
    dtype, N = p.x.dtype, p.weight.shape[0]
    t, b = torch.randn(*p.x.shape[:-1], rank).to(dtype), torch.randn(N, rank).to(dtype)
    low_rank = (on_device(t), on_device(b)) if rank else None
    for with_bias in (False, True) if biases else (True,):
        given = torch.cat([p.bias] if with_bias else [p.bias.new_zeros(N)])
        result = product(config, splits)(x, values, pattern, bias if with_bias else None, low_rank)
        assert result.is_contiguous()
        assert result.dtype is dtype
        left, right = torch.cat([p.x, t], -1), torch.cat([p.weight, b], -1)
        truth = F.linear(left.double(), right.double(), given.double())
        scale = F.linear(left.double().abs(), right.double().abs(), given.double().abs())
        assert_no_worse_than_dense(result.cpu(), F.linear(left, right, given), truth, scale)


@both_dtypes
@every_shape
@both_kernels
def test_products(kernel: str, shape: Shape, dtype: torch.dtype) -> None:
    config = SMALLEST[kernel]
    check(draw(TWO_FOUR, whole_rows(shape, config), dtype), config)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=["bf16", "fp16"]
)
@every_config
def test_every_configuration(config: Config, dtype: torch.dtype) -> None:
    if isinstance(config, WgmmaSp):  # each stage more than once, a rest of a block; tiles that are partial
        shape = Shape((config.BM + 4,), config.BN - 20, 16 * config.stages + 20)
        check(draw(TWO_FOUR, shape, dtype), config, 20, 1, biases=False)
        check(draw(TWO_FOUR, Shape((20,), 68, 112), dtype), config, 20, 100, biases=False)  # a pattern that is staged
        return
    for groups in (35, 48):  # 140 and 192 features: a pattern read by the byte, and by 16 bits
        p = draw(TWO_FOUR, Shape((20,), 68, groups), dtype)
        check(p, config, 0, 1)
        check(p, config, 20, 100, biases=False)


@both_dtypes
@both_kernels
@pytest.mark.parametrize("rank", [1, 8, 33, 192])
def test_low_rank_updates(kernel: str, rank: int, dtype: torch.dtype) -> None:
    check(draw(TWO_FOUR, Shape((3, 7), 70, 20), dtype), SMALLEST[kernel], rank)


@both_dtypes
@some_configs
def test_every_weight_arrives_where_it_belongs(config: Config, dtype: torch.dtype) -> None:
    """Each token is one feature alone, so that the result is the weight, bit by bit, in every lane of the tensor core.

    Each of the six patterns comes to lie in each row of 16 and each group of a block: in every register of every lane.
    """
    pairs = torch.tensor(list(itertools.combinations(range(4), 2)))
    N = max(config.BN + 12, 100)
    for K in (128, 80 if isinstance(config, WgmmaSp) else 100):
        row, group = torch.arange(N)[:, None], torch.arange(K // 4)
        code = (row + row // 16 + group) % 6
        assert all(len(code[r::16, j].unique()) == 6 for r in range(16) for j in range(16))
        mask = torch.zeros(N, K // 4, 4, dtype=torch.bool).scatter_(-1, pairs[code], True).view(N, K)
        weight = torch.randn(N, K).to(dtype) * mask
        values, pattern, x = map(on_device, (kept(weight, mask), packed(mask), torch.eye(K, dtype=dtype)))
        assert torch.equal(product(config)(x, values, pattern).cpu(), weight.t())


@pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, pytest.param(torch.float16, marks=[] if DEVICE.type == "cuda" else [pytest.mark.slow])],
    ids=["bf16", "fp16"],
)
@some_configs
def test_the_self_test_passes(config: Config, dtype: torch.dtype) -> None:
    for case in itertools.product((False, True), repeat=2) if DEVICE.type == "cuda" else [(True, False)]:
        assert gluon_self_test.passes(DEVICE, dtype, config, True, *case)


@both_dtypes
@both_kernels
def test_small_numbers_stay(kernel: str, dtype: torch.dtype) -> None:
    mask = draw_mask(16, 32, TWO_FOUR)
    tiny = torch.finfo(dtype).smallest_normal / 2
    weight = torch.full((16, 32), tiny, dtype=dtype) * mask
    values, pattern, x = map(on_device, (kept(weight, mask), packed(mask), torch.eye(32, dtype=dtype)))
    assert torch.equal(product(SMALLEST[kernel])(x, values, pattern).cpu(), weight.t())
    # And where they are the tokens.
    full = torch.randn(16, 32).to(dtype) * mask
    x = torch.eye(32, dtype=dtype) * tiny
    truth = (x.double() @ full.double().t()).to(dtype)
    result = product(SMALLEST[kernel])(on_device(x), on_device(kept(full, mask)), pattern).cpu()
    assert torch.equal(result, truth)


@both_dtypes
@both_kernels
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_was_pruned_does_not_leak(kernel: str, bad: float, dtype: torch.dtype) -> None:
    """The dense original is not finite where it was pruned: the storage does not have those, nor has the result."""
    mask = draw_mask(20, 64, TWO_FOUR)
    dense = torch.where(mask, torch.randn(20, 64).to(dtype), torch.tensor(bad, dtype=dtype))
    x = torch.randn(5, 64).to(dtype)
    values, pattern = kept(dense, mask), packed(mask)
    assert bool(values.isfinite().all())
    result = product(SMALLEST[kernel])(*map(on_device, (x, values, pattern))).cpu()
    weight = torch.where(mask, dense, 0)
    truth, scale = x.double() @ weight.double().t(), x.double().abs() @ weight.double().abs().t()
    assert_no_worse_than_dense(result, x @ weight.t(), truth, scale)


@both_dtypes
@both_kernels
def test_groups_of_zeros(kernel: str, dtype: torch.dtype) -> None:
    """Kept zeros, positive and negative, in whole groups, rows and blocks; and tokens of zeros."""
    p = draw(TWO_FOUR, Shape((9,), 24, 36), dtype)
    values = p.values.clone()
    values[::3] = 0.0
    values[1::3, :20] = -0.0
    values[:, 32:64] = 0.0
    p.x[4] = 0.0
    weight = torch.zeros(24, 144, dtype=dtype).masked_scatter_(p.mask, values)
    result = product(SMALLEST[kernel])(*map(on_device, (p.x, values, p.pattern))).cpu()
    truth, scale = p.x.double() @ weight.double().t(), p.x.double().abs() @ weight.double().abs().t()
    assert_no_worse_than_dense(result, p.x @ weight.t(), truth, scale)
    assert not bool(result[:, ::3].any())
    assert not bool(result[4].any())


@both_dtypes
@both_kernels
def test_large_sums_that_cancel(kernel: str, dtype: torch.dtype) -> None:
    """The largest numbers whose products stay in float32, twice with opposite signs, beside a small one."""
    mask = torch.zeros(16, 64, dtype=torch.bool)
    mask.view(16, 16, 4)[..., (0, 3)] = True
    weight = torch.zeros(16, 64, dtype=dtype)
    weight[:, 0::4], weight[:, 3::4] = 2.0**15, -(2.0**15)
    weight[:, 0], weight[:, 3] = 1.0, 0.0
    x = torch.full((8, 64), 2.0**7).to(dtype)
    values, pattern = map(on_device, (kept(weight, mask), packed(mask)))
    result = product(SMALLEST[kernel])(on_device(x), values, pattern).cpu()
    assert torch.equal(result, torch.full((8, 16), 2.0**7, dtype=dtype))


@both_dtypes
@both_kernels
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("K", [36, 64])
def test_what_is_not_finite(kernel: str, K: int, bad: float, dtype: torch.dtype) -> None:
    config = SMALLEST[kernel]
    p = draw(TWO_FOUR, whole_rows(Shape((5,), 16, K // 4), config), dtype)
    values = p.values.clone()
    values[3, 4] = bad
    run = product(config)
    y = run(*map(on_device, (p.x, values, p.pattern)))
    assert not bool(y[:, 3].isfinite().any())
    assert bool(y[:, torch.arange(16) != 3].isfinite().all())
    # An input that is not finite arrives in the outputs that keep a weight for it, and in no other.
    x = p.x.clone()
    x[2, 7] = bad
    y = run(*map(on_device, (x, p.values, p.pattern))).cpu()
    assert torch.equal(~y[2].isfinite(), p.mask[:, 7])
    assert bool(y[torch.arange(5) != 2].isfinite().all())


@both_dtypes
@pytest.mark.parametrize(("kernel", "K"), [("mma_sp", 36), ("mma_sp", 80), ("wgmma_sp", 80)])
@pytest.mark.parametrize("before", [1, 2, 8])
def test_nothing_outside_the_tensors_is_read(before: int, kernel: str, K: int, dtype: torch.dtype) -> None:
    # Numbers beside the views are NaN; an odd number of them before puts rows off the words.
    config = SMALLEST[kernel]
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
    t = torch.full((5, 4 + before + 9), math.nan, dtype=dtype)
    t[:, before : before + 4] = torch.randn(5, 4).to(dtype)
    b = torch.randn(12, 4).to(dtype)
    low_rank = (on_device(t[:, before : before + 4]), on_device(b))
    run = product(config)
    expected = run(*map(on_device, (p.x, p.values, p.pattern)), None, (low_rank[0].clone(), low_rank[1]))
    assert bool(expected.isfinite().all())
    assert torch.equal(run(x, values, pattern, None, low_rank), expected)


@both_dtypes
@both_kernels
def test_a_weight_that_is_a_part_of_another(kernel: str, dtype: torch.dtype) -> None:
    """Its rows are further apart than they are long; and one whose rows lie across."""
    p = draw(TWO_FOUR, Shape((5,), 20, 48), dtype)
    wider, taller = torch.cat([p.values, p.values], 1)[:, :96], p.values.t().contiguous().t()
    bits = torch.cat([p.pattern, p.pattern], 1)[:, :24]
    run = product(SMALLEST[kernel])
    expected = run(*map(on_device, (p.x, p.values, p.pattern)))
    for values in (wider, taller):
        assert torch.equal(run(*map(on_device, (p.x, values, bits))), expected)


@both_dtypes
@both_kernels
def test_decoding_is_the_same_every_time(kernel: str, dtype: torch.dtype) -> None:
    """Parts of a sum are added up in a fixed order, whatever their programs' order."""
    p = draw(TWO_FOUR, Shape((7,), 48, 160), dtype)
    config = SMALLEST[kernel]
    given = tuple(map(on_device, (p.x, p.values, p.pattern)))
    first = product(config, 5)(*given)
    for _ in range(20 if DEVICE.type == "cuda" else 1):
        assert torch.equal(product(config, 5)(*given), first)


@both_kernels
@pytest.mark.parametrize(("M", "N", "K"), [(0, 8, 16), (4, 0, 16), (4, 8, 0)])
def test_zero_sizes(kernel: str, M: int, N: int, K: int) -> None:
    values = torch.ones(N, K // 2, device=DEVICE, dtype=torch.float16)
    pattern = packed(draw_mask(N, K, TWO_FOUR)).to(DEVICE)
    x, bias, t, b = (torch.ones(*size, device=DEVICE, dtype=torch.float16) for size in ((M, K), (N,), (M, 2), (N, 2)))
    for given, low_rank in itertools.product((None, bias), (None, (t, b))):
        expected = F.linear(x, x.new_zeros(N, K), given) + (0 if low_rank is None else F.linear(*low_rank))
        assert torch.equal(product(SMALLEST[kernel])(x, values, pattern, given, low_rank), expected)


def test_the_smallest_configurations_are_of_their_kernels() -> None:
    assert isinstance(SMALLEST["mma_sp"], MmaSp)
    assert isinstance(SMALLEST["wgmma_sp"], WgmmaSp)


@pytest.mark.gpu
@both_dtypes
@both_kernels
@pytest.mark.parametrize("splits", [1, 3])
def test_a_cuda_graph_holds_it(kernel: str, splits: int, dtype: torch.dtype) -> None:
    """Also sums that several programs share, whose parts are the graph's own memory; the pattern is staged."""
    p = draw(TWO_FOUR, Shape((9,), 72, 112), dtype)
    x, values, pattern, bias = map(on_device, (p.x, p.values, p.pattern, p.bias))
    run, out = product(SMALLEST[kernel], splits), torch.empty(9, 72, dtype=dtype, device=DEVICE)
    run(x, values, pattern, bias)  # compiled, and its build checked
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out.copy_(run(x, values, pattern, bias))
    for _ in range(3):
        x.copy_(torch.randn(9, 448).to(dtype))
        values.copy_(torch.randn(72, 224).to(dtype))
        expected = run(x, values, pattern, bias)
        torch.full((1 << 20,), math.nan, device=DEVICE)  # what is left of the parts is not what they were
        graph.replay()
        assert torch.equal(out, expected)


@pytest.mark.gpu
@both_kernels
@pytest.mark.parametrize("splits", [1, 3])
def test_it_runs_on_the_current_stream(kernel: str, splits: int) -> None:
    """After what is under way there, and on no other; a remembered launch, too."""
    p = draw(TWO_FOUR, Shape((9,), 72, 112), torch.bfloat16)
    x, values, pattern = map(on_device, (p.x, p.values, p.pattern))
    run, later = product(SMALLEST[kernel], splits), torch.randn(9, 448, device=DEVICE).bfloat16()
    expected = run(later, values, pattern)
    for _ in range(2):
        x.fill_(math.nan)
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            x.copy_(later)
            result = run(x, values, pattern)
        stream.synchronize()
        assert torch.equal(result, expected)
