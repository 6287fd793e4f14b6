"""Products of up to eight tokens against float64 and the dense one: on a GPU, elsewhere on ``gluon_cpu``."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from gluon_cpu import Executor
from problems import Shape, draw, draw_mask, kept, packed
from slope_compile.kernels import few_self_test, few_tokens, gpu_self_test
from slope_compile.kernels.few_tokens import FewTokens
from slope_compile.pattern import Pattern
from tolerances import assert_no_worse_than_dense
from triton_interpreter import interpreting

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.skipif(interpreting(), reason="the interpreter does not know Gluon; the default suite has run")

TWO_FOUR = Pattern(2, 4)
CASES = [(tokens, config) for tokens, configs in few_tokens.CONFIGS.items() for config in configs]
every_config = pytest.mark.parametrize(("tokens", "config"), CASES, ids=lambda value: str(value))
both_dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE.type == "cpu":
        executor = Executor("gluon_few_tokens")
        monkeypatch.setattr(few_tokens, "_kernels", lambda: executor)


@both_dtypes
@every_config
@pytest.mark.parametrize("N", [1, 30])
def test_products(N: int, tokens: int, config: FewTokens, dtype: torch.dtype) -> None:
    """A part of a step and, with one step more than the lanes hold, several; rows that no program divides."""
    lanes = 32 * config.WK * config.EACH
    for M, groups in itertools.product({tokens, tokens // 2 + 1}, (2 * config.EACH, lanes + config.EACH)):
        p = draw(TWO_FOUR, Shape((M,), N, groups), dtype)
        x, values, pattern, bias = (t.to(DEVICE) for t in (p.x.contiguous(), p.values, p.pattern, p.bias))
        for given, added in ((None, torch.zeros_like(p.bias)), (bias, p.bias)):
            result = few_tokens.forward(x, values, pattern, given, config)
            assert result.is_contiguous()
            assert result.dtype is dtype
            truth = F.linear(p.x.double(), p.weight.double(), added.double())
            scale = F.linear(p.x.double().abs(), p.weight.double().abs(), added.double().abs())
            assert_no_worse_than_dense(result.cpu(), F.linear(p.x, p.weight, added), truth, scale)


@both_dtypes
@every_config
def test_every_weight_arrives_where_it_belongs(tokens: int, config: FewTokens, dtype: torch.dtype) -> None:
    """Each token is one feature alone, so that the results are the weight, bit by bit, in every place of a lane."""
    pairs = torch.tensor(list(itertools.combinations(range(4), 2)))
    N, K = config.ROWS + 3, 64
    row, group = torch.arange(N)[:, None], torch.arange(K // 4)
    mask = torch.zeros(N, K // 4, 4, dtype=torch.bool).scatter_(-1, pairs[(row + group) % 6], True).view(N, K)
    weight = torch.randn(N, K).to(dtype) * mask
    values, pattern = kept(weight, mask).to(DEVICE), packed(mask).to(DEVICE)
    for some in torch.eye(K, dtype=dtype).split(tokens):
        result = few_tokens.forward(some.to(DEVICE), values, pattern, None, config)
        assert torch.equal(result.cpu(), some @ weight.t())


@both_dtypes
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_where_it_is_kept(bad: float, dtype: torch.dtype) -> None:
    mask = draw_mask(24, 64, TWO_FOUR)
    weight = torch.randn(24, 64).to(dtype) * mask
    x = torch.randn(2, 64).to(dtype)
    x[1, 7] = bad
    result = few_tokens.forward(x.to(DEVICE), kept(weight, mask).to(DEVICE), packed(mask).to(DEVICE)).cpu()
    assert torch.equal(~result[1].isfinite(), mask[:, 7])
    assert bool(result[0].isfinite().all())


@both_dtypes
@pytest.mark.parametrize("before", [1, 4])
def test_nothing_outside_the_tensors_is_read(before: int, dtype: torch.dtype) -> None:
    p = draw(TWO_FOUR, Shape((3,), 12, 20), dtype)
    frame = torch.full((5, 80 + before + 9), math.nan, dtype=dtype)
    frame[1:-1, before : before + 80] = p.x
    around = torch.full((p.values.numel() + before + 8,), math.nan, dtype=dtype)
    around[before : before + p.values.numel()] = p.values.flatten()
    bits = torch.full((p.pattern.numel() + before + 8,), 255, dtype=torch.uint8)
    bits[before : before + p.pattern.numel()] = p.pattern.flatten()
    x, values, pattern = (
        frame.to(DEVICE)[1:-1, before : before + 80],
        around.to(DEVICE)[before : before + p.values.numel()].view_as(p.values),
        bits.to(DEVICE)[before : before + p.pattern.numel()].view_as(p.pattern),
    )
    expected = few_tokens.forward(p.x.contiguous().to(DEVICE), p.values.to(DEVICE), p.pattern.to(DEVICE))
    assert bool(expected.isfinite().all())
    assert torch.equal(few_tokens.forward(x, values, pattern), expected)


@both_dtypes
def test_a_weight_that_is_a_part_of_another(dtype: torch.dtype) -> None:
    """Its rows are further apart than they are long; and one whose rows lie across."""
    p = draw(TWO_FOUR, Shape((3,), 12, 48), dtype)
    x, values, pattern = (t.to(DEVICE) for t in (p.x.contiguous(), p.values, p.pattern))
    expected = few_tokens.forward(x, values, pattern)
    bits = torch.cat([pattern, pattern], 1)[:, :24]
    for view in (torch.cat([values, values], 1)[:, :96], values.t().contiguous().t()):
        assert not view.is_contiguous()
        assert torch.equal(few_tokens.forward(x, view, bits), expected)


def test_no_tokens_and_no_outputs() -> None:
    for M, N in ((0, 8), (2, 0)):
        x, values = torch.ones(M, 32, dtype=torch.float16), torch.ones(N, 16, dtype=torch.float16)
        pattern = packed(draw_mask(N, 32, TWO_FOUR))
        result = few_tokens.forward(x.to(DEVICE), values.to(DEVICE), pattern.to(DEVICE))
        assert result.shape == (M, N)


@both_dtypes
def test_the_self_test_passes(dtype: torch.dtype) -> None:
    for tokens, config in CASES if DEVICE.type == "cuda" else CASES[:1]:
        assert few_self_test.passes(DEVICE, dtype, config, tokens)


def test_the_self_test_notices_a_wrong_kernel(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    right = few_tokens.forward
    for fault in (lambda result: result.roll(1), torch.nan_to_num):
        monkeypatch.setattr(few_tokens, "forward", lambda *given, fault=fault: fault(right(*given)))
        caplog.clear()
        assert not few_self_test.passes(DEVICE, torch.float16, CASES[0][1], 1)
        assert str(CASES[0][1]) in caplog.text


def test_the_self_test_meets_every_pattern_in_every_place_of_a_lane() -> None:
    """Output and group of a step, as the lanes hold them, and pattern."""
    for tokens, config in CASES:
        step = 32 * config.WK * config.EACH
        codes = gpu_self_test._mask(few_self_test.N, 4 * (2 * step + 8)).view(few_self_test.N, -1, 4).long()
        codes = codes @ torch.tensor([1, 2, 4, 8])
        row, group = torch.arange(few_self_test.N)[:, None] % config.ROWS, torch.arange(codes.shape[1]) % step
        places = (row * step + group) * 16 + codes
        assert len(places.unique()) == 6 * config.ROWS * step, tokens


@pytest.mark.parametrize(
    ("capability", "dtype", "M", "K", "why"),
    [
        ((7, 5), torch.float16, 1, 64, "compute capability"),
        ((9, 0), torch.float32, 1, 64, "float32"),
        ((9, 0), torch.float16, 9, 64, "up to 8 tokens"),
        ((9, 0), torch.float16, 1, 72, "multiple of 16"),
    ],
)
def test_what_it_cannot_do(capability: tuple[int, int], dtype: torch.dtype, M: int, K: int, why: str) -> None:
    found = few_tokens.unsupported(capability, dtype, M, K)
    assert found is not None
    assert why in found


def test_what_it_can_do() -> None:
    assert few_tokens.unsupported((8, 0), torch.bfloat16, 5, 48) is None
    assert all(c.EACH == 4 for c in few_tokens.configurations(1, 48))
    assert few_tokens.configurations(3, 64)[0] == few_tokens.CONFIGS[4][0]


@pytest.mark.gpu
@both_dtypes
def test_a_cuda_graph_holds_it_on_any_stream(dtype: torch.dtype) -> None:
    p = draw(TWO_FOUR, Shape((3,), 72, 112), dtype)
    x, values, pattern = (t.to(DEVICE) for t in (p.x.contiguous(), p.values, p.pattern))
    few_tokens.forward(x, values, pattern)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        out = few_tokens.forward(x, values, pattern)
    for _ in range(3):
        x.copy_(torch.randn(3, 448).to(dtype))
        expected = few_tokens.forward(x, values, pattern)
        graph.replay()
        assert torch.equal(out, expected)
