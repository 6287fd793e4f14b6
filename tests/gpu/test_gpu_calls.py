"""Every way of every product, each forced in turn: right to 1.1 of the dense product's error, leaving nothing behind.

On a GPU, all ways that it has; in Triton's interpreter, those that need no GPU (see ``test_triton_products``).
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from problems import Problem, Shape, column_mask, draw, draw_columns, kept, packed
from slope_compile.kernels import gpu_calls, gpu_ops, gpu_rules
from slope_compile.pattern import Pattern
from tolerances import relative_error, rounding
from triton_interpreter import close_gaps, dtypes, interpreting
from watching import Watch

if interpreting():
    close_gaps()
    DEVICE = torch.device("cpu")
else:
    DEVICE = torch.device("cuda", 0)
    pytestmark = pytest.mark.gpu

TWO_FOUR = Pattern(2, 4)
OPS = ("forward", "grad_input", "grad_input_columns", "grad_weight")
every_way = pytest.mark.parametrize("way", gpu_rules.WAYS)
every_dtype = dtypes(torch.float32, torch.bfloat16)
every_op = pytest.mark.parametrize("op", OPS)


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    if interpreting():
        monkeypatch.setattr(gpu_ops, "available", lambda _: True)
        monkeypatch.setattr(gpu_ops, "name", lambda _: "CPU")


class Case:
    """One product of a problem: how to call it, its definition on dense tensors, and the sums of the magnitudes."""

    def __init__(self, op: str, p: Problem) -> None:
        columns = column_mask(p.weight, TWO_FOUR) if p.weight.shape[0] % 4 == 0 else torch.rand(p.mask.shape) < 0.8
        self.op, self.mask = op, p.mask
        x, grad = p.x.contiguous(), p.grad.contiguous()
        stored = (p.values, p.pattern)
        dense = p.weight * columns if op == "grad_input_columns" else p.weight
        self.left, self.right = {
            "forward": (x, dense.t()),
            "grad_input": (grad, dense),
            "grad_input_columns": (grad, dense),
            "grad_weight": (grad.t(), x),
        }[op]
        self.arguments = {
            "forward": (x, *stored),
            "grad_input": (grad, *stored),
            "grad_input_columns": (grad, *stored, packed(kept(columns, p.mask))),
            "grad_weight": (grad, x, p.pattern),
        }[op]
        self.sizes = (x.shape[0], p.weight.shape[0], p.weight.shape[1])
        self.dtype = p.values.dtype

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        return kept(a @ b, self.mask) if self.op == "grad_weight" else a @ b

    def skip_unless(self, way: str) -> None:
        if not gpu_calls.can(way, self.op, *self.sizes, self.dtype, DEVICE):
            pytest.skip(f"{way} does not compute {self.op} of {self.sizes} in {self.dtype} on {DEVICE}")

    def call(self, way: str, arguments: tuple[Tensor, ...], out: Tensor) -> Tensor:
        name = "linear" if self.op == "forward" else self.op
        result: Tensor = getattr(gpu_calls, name)(*arguments, out=out, way=way)
        return result

    def on_device(self) -> tuple[tuple[Tensor, ...], Tensor]:
        size = self.product(self.left, self.right).shape
        out = torch.full(size, math.nan, dtype=self.dtype, device=DEVICE)
        return tuple(t.to(DEVICE) for t in self.arguments), out

    def check(self, way: str) -> None:
        arguments, out = self.on_device()
        assert self.call(way, arguments, out) is out
        truth = self.product(self.left.double(), self.right.double())
        scale = self.product(self.left.double().abs(), self.right.double().abs())
        dense = (self.left.to(DEVICE) @ self.right.to(DEVICE)).cpu()
        dense = kept(dense, self.mask) if self.op == "grad_weight" else dense
        bound = 1.1 * relative_error(dense, truth, scale) + rounding(self.dtype, self.left.shape[1])
        assert relative_error(out.cpu(), truth, scale) <= bound


@every_dtype
@every_op
@every_way
def test_as_good_as_dense(way: str, op: str, dtype: torch.dtype) -> None:
    checked = 0
    for M, N, groups in ((48, 64, 24), (37, 76, 35), (1, 16, 16)):
        case = Case(op, draw(TWO_FOUR, Shape((M,), N, groups), dtype))
        if gpu_calls.can(way, op, *case.sizes, dtype, DEVICE):
            case.check(way)
            checked += 1
    if not checked:
        pytest.skip(f"{way} does not compute {op} in {dtype} on {DEVICE}")


@every_way
def test_rows_without_groups(way: str) -> None:
    """No way on sparse tensor cores has a transpose of seven rows to multiply with, and none needs one."""
    case = Case("grad_input_columns", draw(TWO_FOUR, Shape((5,), 7, 9), torch.bfloat16))
    assert gpu_calls.can(way, case.op, *case.sizes, torch.bfloat16, DEVICE) == (way in ("triton", "expanded"))
    case.check(way)


@every_dtype
@pytest.mark.parametrize("R", [8, 40])
@every_way
def test_low_rank_update(way: str, R: int, dtype: torch.dtype) -> None:
    p = draw(TWO_FOUR, Shape((48,), 64, 24), dtype)
    if not gpu_calls.can(way, "forward", 48, 64, 96, dtype, DEVICE, R):
        pytest.skip(f"{way} does not add an update of rank {R} on {DEVICE}")
    down, up = torch.randn(48, R).to(dtype), torch.randn(64, R).to(dtype)
    x = p.x.contiguous()
    given = [t.to(DEVICE) for t in (x, p.values, p.pattern, down, up, p.bias)]
    out = torch.full((48, 64), math.nan, dtype=dtype, device=DEVICE)
    assert gpu_calls.linear_low_rank(*given, out=out, way=way) is out
    parts = [(x, p.weight), (down, up)]
    truth = sum((a.double() @ b.double().t() for a, b in parts), p.bias.double())
    scale = sum((a.double().abs() @ b.double().abs().t() for a, b in parts), p.bias.double().abs())
    dense = (torch.addmm(given[5], given[0], p.weight.to(DEVICE).t()) + given[3] @ given[4].t()).cpu()
    bound = 1.1 * relative_error(dense, truth, scale) + rounding(dtype, 96 + R + 1)
    assert relative_error(out.cpu(), truth, scale) <= bound


def adversarial(dtype: torch.dtype) -> Problem:
    """All six patterns at every place, groups of zeros, denormals, and magnitudes from small to large side by side."""
    p = draw(TWO_FOUR, Shape((48,), 64, 24), dtype)
    pairs = list(itertools.combinations(range(4), 2))
    rows = [[i in pairs[(r + g) % 6] for g in range(24) for i in range(4)] for r in range(64)]
    mask = torch.tensor(rows)
    info = torch.finfo(dtype)
    weight = torch.randn(64, 96, dtype=torch.float64)
    weight[:, 16:32] *= 0
    weight[:, 32:48] *= info.smallest_normal / 8
    weight[:, 48:64] *= 2.0**6
    weight[7] = 0
    weight = weight.to(dtype) * mask
    x = p.x.contiguous().clone()
    x[:, 64:80] *= 2.0**-6
    x[3] = 0
    return Problem(TWO_FOUR, x, p.grad, mask, weight, kept(weight, mask), packed(mask), p.bias)


@every_dtype
@every_op
@every_way
def test_adversarial_numbers(way: str, op: str, dtype: torch.dtype) -> None:
    case = Case(op, adversarial(dtype))
    case.skip_unless(way)
    case.check(way)


@every_dtype
@every_way
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_the_columns_drop_does_not_leak(bad: float, way: str, dtype: torch.dtype) -> None:
    p = draw(TWO_FOUR, Shape((48,), 64, 24), dtype)
    stays = kept(draw_columns(p.mask, TWO_FOUR), p.mask)
    poisoned = torch.where(stays, p.values, bad)
    case = Case("grad_input_columns", p)
    case.skip_unless(way)
    grad, pattern, stored = (t.to(DEVICE) for t in (p.grad.contiguous(), p.pattern, packed(stays)))
    results = []
    for values in (p.values, poisoned):
        out = torch.empty(48, 96, dtype=dtype, device=DEVICE)
        results.append(case.call(way, (grad, values.to(DEVICE), pattern, stored), out))
    assert torch.equal(*results)


@every_op
@every_way
def test_nothing_is_read_back_and_nothing_stays(way: str, op: str) -> None:
    """No second copy of a weight outlives a call, in any form; nothing waits for the device, as in no CUDA graph."""
    case = Case(op, draw(TWO_FOUR, Shape((48,), 64, 24), torch.bfloat16))
    case.skip_unless(way)
    arguments, out = case.on_device()
    case.call(way, arguments, out)  # self-tests and searches are over
    with Watch() as watch:
        case.call(way, arguments, out)
    assert watch.kept(*arguments, out) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_op
@pytest.mark.parametrize("way", sorted(gpu_calls.REPLAYED))
def test_replayed_calls(way: str, op: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """With other operands of the same kind; a call that is replayed looks at nothing again."""
    M, N, groups = (4, 64, 96) if op == "forward" else (48, 64, 24)  # few tokens share the sum
    cases = [Case(op, draw(TWO_FOUR, Shape((M,), N, groups), dtype)) for _ in range(5)]
    cases[0].skip_unless(way)
    for case in cases[:3]:
        case.check(way)

    def looked_again(*_: object) -> bool:
        raise AssertionError("the call is not replayed")

    monkeypatch.setattr(gpu_ops, "usable", looked_again)
    for case in cases[3:]:
        case.check(way)


@pytest.mark.gpu
@every_op
@every_way
def test_a_cuda_graph_holds_it(way: str, op: str) -> None:
    """Captured once; replayed after activations and weights changed in place, it computes with the new ones."""
    case = Case(op, draw(TWO_FOUR, Shape((48,), 64, 24), torch.bfloat16))
    case.skip_unless(way)
    arguments, out = case.on_device()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        case.call(way, arguments, out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        case.call(way, arguments, out)
    for _ in range(2):
        for tensor in arguments:
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape))
        expected = case.call("expanded", arguments, torch.empty_like(out))
        graph.replay()
        torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-1)
