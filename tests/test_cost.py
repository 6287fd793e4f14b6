"""The cost model against counted FLOPs and stored bytes, and where costs cross against times around there."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import sympy
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import slope_compile as slope
from graphs import attribute_graph
from slope_compile import cost
from slope_compile.cost import Cost, Device, Layer, M
from slope_compile.kernels import flops

PATTERNS = ("1:2", "2:4", "1:4", "2:8")
SHAPES = ((16, 24), (64, 16), (40, 136))
ANY = Device("any", 1e12, 2e12, 1e10, launch=1e-6)


def counted(N: int, K: int, shape: tuple[int, ...]) -> dict[str, int]:
    """FLOPs of forward, and of forward and backward, as PyTorch counts them."""
    layer = nn.Linear(K, N, bias=False)
    x = torch.randn(*shape, K, requires_grad=True)
    with FlopCounterMode(display=False) as forward:
        y = layer(x)
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    return {"forward": forward.get_total_flops(), "training": forward.get_total_flops() + backward.get_total_flops()}


@pytest.mark.parametrize(("N", "K"), SHAPES)
@pytest.mark.parametrize("shape", [(1,), (7,), (3, 5)])
def test_dense_flops(N: int, K: int, shape: tuple[int, ...]) -> None:
    layer, found = Layer(N, K, 4, double_pruned=False), counted(N, K, shape)
    tokens = cost.tokens((*shape, K))
    assert layer.dense_forward().flops.subs(M, tokens) == found["forward"]
    assert layer.dense_training(tokens).flops == found["training"]


@pytest.mark.parametrize("backward", ["exact", "double_pruned"])
@pytest.mark.parametrize("refresh", ["never", "backward"])
@pytest.mark.parametrize("rank", [0, 3])
def test_counted_flops_of_the_rewrite(backward: Any, refresh: Any, rank: int) -> None:
    """PyTorch's counter on a transformed graph, forward and backward, with the formulas for our operators."""
    N, K, shape = 16, 24, (3, 5)
    fields = {"backward": backward, "adapter_rank": rank, "column_refresh": refresh}
    config = slope.SlopeConfig(first_dense=False, heads_dense=False, **fields)
    graph = slope.transform(attribute_graph(nn.Sequential(nn.Linear(K, N, bias=False)), torch.randn(*shape, K)), config)
    if rank:
        slope.set_adapters(graph, True)
    with FlopCounterMode(display=False, custom_mapping=flops.FORMULAS) as forward:
        y = graph(torch.randn(*shape, K, requires_grad=True))
    with FlopCounterMode(display=False, custom_mapping=flops.FORMULAS) as gradients:
        y.sum().backward()
    layer, tokens = Layer(N, K, 4, R=rank), sympy.Integer(math.prod(shape))
    add = 2 * tokens * N if rank else 0  # scale and add, which the counter leaves out
    assert forward.get_total_flops() == layer.forward(tokens).flops - add
    assert forward.get_total_flops() + gradients.get_total_flops() == layer.training(tokens).flops - add


@pytest.mark.parametrize("rank", [1, 6])
def test_low_rank_flops(rank: int) -> None:
    """The adapter's products, forward and backward, against the same products run densely."""
    N, K, tokens = 16, 24, 10
    with_rank, without = (Layer(N, K, 4, R=r).training(sympy.Integer(tokens)).flops for r in (rank, 0))
    A, B = torch.randn(rank, K, requires_grad=True), torch.randn(N, rank, requires_grad=True)
    x = torch.randn(tokens, K, requires_grad=True)
    with FlopCounterMode(display=False) as products:
        ((x @ A.T) @ B.T).sum().backward()
    assert with_rank - without == products.get_total_flops() + 2 * tokens * N  # and scale and add


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_sparse_flops(N: int, K: int, pattern: str) -> None:
    """Twice the tokens times the entries that a real mask keeps."""
    nm = slope.Pattern.parse(pattern)
    layer = Layer(N, K, 4, nm)
    kept = int(prepared(N, K, torch.float32, pattern).weight.count_nonzero())
    for product in (layer.forward(), layer.grad_input(), layer.grad_weight()):
        assert product.flops == 2 * M * kept
    assert layer.training().flops == 6 * M * kept


def prepared(N: int, K: int, dtype: torch.dtype, pattern: str) -> nn.Linear:
    model = nn.Sequential(nn.Linear(K, N, bias=False, dtype=dtype))
    slope.sparsify_(model, slope.SlopeConfig(pattern=pattern, first_dense=False, heads_dense=False))
    layer = model[0]
    assert isinstance(layer, nn.Linear)
    return layer


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("N", "K"), [*SHAPES, (8, 20), (20, 8)])
def test_stored_bytes(N: int, K: int, dtype: torch.dtype, pattern: str) -> None:
    nm = slope.Pattern.parse(pattern)
    if K % nm.group or N % nm.group:
        pytest.skip("the pattern does not divide the shape")
    stored = slope.training_state(prepared(N, K, dtype, pattern)).linears
    layer = Layer(N, K, dtype.itemsize, nm)
    assert stored.weights == layer.values_bytes
    assert stored.metadata == layer.metadata_bytes + layer.column_bytes + 8, "the age is one int64"
    assert layer.dense_bytes == nn.Linear(K, N, bias=False, dtype=dtype).weight.nbytes


@pytest.mark.parametrize("itemsize", [2, 4])
def test_moved_bytes(itemsize: int) -> None:
    """What each product reads and writes, summed over tensors of those shapes."""
    N, K, tokens = 32, 16, 5
    layer = Layer(N, K, itemsize)
    x, y = tokens * K * itemsize, tokens * N * itemsize
    values, bits = N * K // 2 * itemsize, N * K // 8
    at = {M: tokens}
    assert layer.dense_forward().moved.subs(at) == x + y + N * K * itemsize
    assert layer.forward().moved.subs(at) == x + y + values + bits
    assert layer.grad_input().moved.subs(at) == x + y + values + bits + bits // 2
    assert Layer(N, K, itemsize, double_pruned=False).grad_input().moved.subs(at) == x + y + values + bits
    assert layer.grad_weight().moved.subs(at) == x + y + values + bits
    expanded = Layer(N, K, itemsize, slope.Pattern(1, 4)).forward().moved.subs(at)
    assert expanded == N * K // 4 * itemsize + bits + 2 * N * K * itemsize + x + y


def test_symbols_of_a_graph() -> None:
    """Batch and sequence of an exported program stay symbols in the cost."""
    model = nn.Linear(16, 8)
    dims = {0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("length", max=64)}
    program = torch.export.export(model, (torch.randn(3, 5, 16),), dynamic_shapes=(dims,))
    value = next(n for n in program.graph.nodes if n.op == "call_function").meta["val"]
    count = cost.tokens(value.shape)
    assert len(count.free_symbols) == 2
    flops = Layer(8, 16, 4).dense_forward(count).flops
    batch, length = sorted(count.free_symbols, key=str)
    assert flops.subs({batch: 3, length: 5}) == counted(8, 16, (3, 5))["forward"]


# --- break-even ------------------------------------------------------------------------------------------------------


def pairs() -> list[tuple[str, Cost, Cost]]:
    found = []
    for (N, K), R, itemsize in itertools.product(((64, 64), (768, 3072), (4096, 4096)), (0, 64), (2, 4)):
        layer = Layer(N, K, itemsize, R=R)
        found.append((f"{N}x{K} r{R} i{itemsize} forward", layer.dense_forward(), layer.forward()))
        found.append((f"{N}x{K} r{R} i{itemsize} training", layer.dense_training(), layer.training()))
    return found


DEVICES = (ANY, Device("fast", 1e14, 2e14, 1e12, launch=4e-6), cost.DATA_SHEETS["H100-SXM"])


@pytest.mark.parametrize("device", DEVICES, ids=lambda d: str(d.name))
def test_profitable_counts(device: Device) -> None:
    """The sign of the difference of the times, at many counts and just beside every end of the set."""
    kinds = set()
    for name, dense, rewrite in pairs():
        gain = sympy.lambdify(M, device.time(dense) - device.time(rewrite), [{"Max": max}, "math"])
        found = cost.profitable(dense, rewrite, device)
        ends = [e for e in found.boundary if e != 0]
        kinds.add("never" if found is sympy.S.EmptySet else "cross" if ends else "always")
        for end in ends:
            assert device.time(dense).subs(M, end) == device.time(rewrite).subs(M, end), (name, end)
        around = [e * (1 + sympy.Rational(s, 10**6)) for e in ends for s in (-1, 1)]
        for count in [*(sympy.Integer(2) ** k for k in range(0, 22, 3)), *around]:
            assert (gain(count) > 0) == (count in found), (name, count)
    assert kinds >= ({"always", "cross"} if device.launch else {"always"}), kinds


def test_break_even_by_hand() -> None:
    """An adapter's launches cost 3 us: the rewrite pays where the arithmetic saved is more than that."""
    device = Device("by hand", peak=1e12, sparse_peak=2e12, bandwidth=1e30, launch=1e-6)
    layer = Layer(1000, 1000, 2, R=1)
    # dense 2e6 M / 1e12; sparse half of it; adapter 4000 M + 2000 M; three launches more
    expected = sympy.Rational(3, 10**6) / (sympy.Rational(10**6 - 6000, 10**12))
    found = cost.break_even(layer.dense_forward(), layer.forward(), device)
    assert found is not None
    assert abs(found / expected - 1) < sympy.Rational(1, 10**9)
    assert isinstance(found, sympy.Rational)


def test_never_and_always() -> None:
    layer, expanded = Layer(64, 64, 2), Layer(64, 64, 2, slope.Pattern(1, 4))
    always = cost.profitable(layer.dense_forward(), layer.forward(), ANY)
    assert always == sympy.Interval.open(0, sympy.oo)
    never = cost.profitable(expanded.dense_forward(), expanded.forward(), ANY)
    assert never is sympy.S.EmptySet
    for one in (layer, expanded):
        assert cost.break_even(one.dense_forward(), one.forward(), ANY) is None


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["peak", "sparse_peak", "bandwidth"])
@pytest.mark.parametrize("wrong", [0, -1.0, float("nan"), float("inf"), "fast"])
def test_wrong_rates(field: str, wrong: object) -> None:
    rates = {"peak": 1e12, "sparse_peak": 1e12, "bandwidth": 1e9, field: wrong}
    with pytest.raises(slope.ConfigError, match=f"'x': {field}: expected a positive number"):
        Device("x", **rates)  # type: ignore[arg-type]


def test_other_errors() -> None:
    with pytest.raises(slope.ConfigError, match="launch: expected seconds"):
        Device("x", 1, 1, 1, launch=-1)
    with pytest.raises(slope.ConfigError, match=r"'B200'; .*H200-SXM.* or give a slope_compile\.cost\.Device"):
        cost.device("B200")
    with pytest.raises(slope.ConfigError, match="K = 30 is not a multiple of 4"):
        Layer(16, 30, 2)
    with pytest.raises(slope.ConfigError, match="N = 30 is not a multiple of 4"):
        Layer(30, 16, 2)
    assert Layer(30, 16, 2, double_pruned=False).N == 30
    s = sympy.Symbol("s0")
    layer = Layer(16, 16, 2)
    with pytest.raises(slope.ConfigError, match="not linear in M"):
        cost.break_even(layer.dense_forward(s), layer.forward(s), ANY)
