"""Every choice there is for a product, each kernel in each configuration, on numbers with one answer.

Sums are exact: small whole numbers, and multiples of a subnormal one.  Each of the six patterns lies in every place of
every lane.  Among the weights are whole groups, rows and tokens of zeros (positive and negative), subnormal rows, an
infinity and a NaN, which must arrive in their own outputs and nowhere else.  Results are those of float64 to the last
bit.

On a GPU all choices, also through the calls of compiled code; elsewhere Triton's in its interpreter, Gluon's on
``gluon_cpu``.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from torch import Tensor

from gluon_cpu import Executor
from problems import kept, packed
from slope_compile.kernels import (
    few_tokens,
    gluon_configs,
    gluon_products,
    gpu_calls,
    gpu_ops,
    gpu_rules,
    triton_configs,
    triton_products,
)
from slope_compile.kernels.few_tokens import FewTokens
from slope_compile.kernels.gluon_configs import MmaSp, WgmmaSp
from slope_compile.kernels.triton_configs import Config
from triton_interpreter import close_gaps, interpreting

if interpreting():
    close_gaps()
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HALF = {torch.bfloat16: "bf16", torch.float16: "fp16"}
DTYPES = HALF | {torch.float32: "fp32"}
OPS = ("forward", "grad_input", "grad_input_columns", "grad_weight")
ON_A_CPU = pytest.mark.skipif(DEVICE.type == "cpu" and not interpreting(), reason="the interpreter runs this elsewhere")


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE.type == "cuda":
        return
    mma, wgmma, few = (Executor(f"gluon_{name}") for name in ("mma_sp", "wgmma_sp", "few_tokens"))
    monkeypatch.setattr(gluon_products, "_kernels", lambda: mma)
    monkeypatch.setattr(gluon_products, "_wgmma_kernels", lambda: wgmma)
    monkeypatch.setattr(few_tokens, "_kernels", lambda: few)
    monkeypatch.setattr(gpu_ops, "available", lambda _: True)
    monkeypatch.setattr(gpu_ops, "name", lambda _: "CPU")


# --- numbers ---------------------------------------------------------------------------------------------------------


def whole(rows: int, columns: int, most: int = 1) -> Tensor:
    """Whole numbers from -most to most, float64."""
    return torch.randint(-most, most + 1, (rows, columns)).double()


def every_pattern(rows: int, columns: int, period: int) -> Tensor:
    """A mask in which rows ``period`` apart have other patterns: six of them all six."""
    pairs = torch.tensor(list(itertools.combinations(range(4), 2)))
    row, group = torch.arange(rows)[:, None], torch.arange(columns // 4)
    code = (row // period + row % period + group) % 6
    return torch.zeros(rows, columns // 4, 4, dtype=torch.bool).scatter_(-1, pairs[code], True).view(rows, columns)


@dataclasses.dataclass(frozen=True)
class Case:
    """A weight and what it meets, in a dtype; everything exact in it."""

    mask: Tensor
    columns: Tensor
    """bool ``[N, K]``, 2:4 along N."""
    weight: Tensor
    """Dense, zero where pruned."""
    x: Tensor
    grad: Tensor

    @classmethod
    def draw(cls, M: int, N: int, K: int, dtype: torch.dtype, period: int = 16) -> Case:
        mask = every_pattern(N, K, period)
        columns = every_pattern(K, N // 4 * 4, 16).t()
        columns = torch.cat([columns, torch.ones(N % 4, K, dtype=torch.bool)])
        return cls(mask, columns, (whole(N, K) * mask).to(dtype), whole(M, K).to(dtype), whole(M, N).to(dtype))

    def unusual(self, op: str, subnormal: bool = True) -> Case:
        """The same case with zeros, subnormal, infinite and NaN entries; every sum that contains one is still exact."""
        x, grad = self.x.clone(), self.grad.clone()
        tiny = torch.finfo(x.dtype).smallest_normal / 8 if subnormal else 1.0
        if op == "grad_weight":
            x[:, 3::8] *= tiny
            x[0, 5], x[1, 9] = math.nan, math.inf
            grad[1, 2], grad[:, 6] = -math.inf, 0.0
            return dataclasses.replace(self, x=x, grad=grad)
        x[-1], grad[-1] = 0, -0.0
        across = op == "forward"
        weight, mask = (t.clone() if across else t.t().clone() for t in (self.weight, self.mask))  # outputs, summands
        weight[1::7] = 0
        weight[2::7, : weight.shape[1] // 8 * 4] *= -0.0
        weight[:, 4:8] = 0  # a group of everybody
        weight[3::7] *= tiny
        for row, bad in ((4, math.nan), (5, math.inf), (6, -math.inf)):
            if row < len(weight):
                weight[row, mask[row].nonzero()[-1]] = bad
        return dataclasses.replace(self, weight=weight if across else weight.t().contiguous(), x=x, grad=grad)

    def arguments(self, op: str) -> tuple[Tensor, ...]:
        stored = (kept(self.weight, self.mask), packed(self.mask))
        found = {
            "forward": (self.x, *stored),
            "grad_input": (self.grad, *stored),
            "grad_input_columns": (self.grad, *stored, packed(kept(self.columns, self.mask))),
            "grad_weight": (self.grad, self.x, stored[1]),
        }[op]
        return tuple(t.to(DEVICE) for t in found)

    def check(self, op: str, result: Tensor) -> None:
        """Compare with float64 sums of the kept entries only: pruned entries are left out, not counted as zeros."""
        result, dtype = result.cpu(), self.weight.dtype
        assert result.dtype is dtype
        if op == "grad_weight":
            truth = kept(self.grad.double().t() @ self.x.double(), self.mask)
        else:
            mask = self.mask & self.columns if op == "grad_input_columns" else self.mask
            dense = torch.where(mask, self.weight, torch.zeros((), dtype=dtype)).double()
            truth = self.x.double() @ dense.t() if op == "forward" else self.grad.double() @ dense
        assert bool(truth[truth.isfinite()].to(dtype).double().eq(truth[truth.isfinite()]).all()), "not exact"
        same = (result == truth.to(dtype)) | (result.isnan() & truth.isnan())
        assert bool(same.all()), f"{int((~same).sum())} of {same.numel()} entries, the first {(~same).nonzero()[0]}"


def dropped(case: Case) -> Case:
    """Not finite where the columns drop what the rows keep."""
    lost = case.mask & ~case.columns
    bad = torch.tensor([math.nan, math.inf, -math.inf], dtype=case.weight.dtype)
    return dataclasses.replace(case, weight=torch.where(lost, bad[torch.arange(lost.shape[1]) % 3], case.weight))


# --- choices ---------------------------------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Choice:
    """Something that computes a product, and sizes at which each of its lanes has work, whole and in part."""

    op: str
    config: Config | MmaSp | WgmmaSp | FewTokens
    tokens: int = 0
    """Of a kernel for few."""
    splits: int = 1

    def __str__(self) -> str:
        c = self.config
        name = f"{c.BM}x{c.BN}x{c.BK}" if isinstance(c, Config) else str(c)
        return f"{self.op}-{name}" + f"-m{self.tokens}" * bool(self.tokens) + f"-split{self.splits}" * (self.splits > 1)

    def sizes(self) -> tuple[int, int, int, int]:
        """M, N, K, and after how many outputs the same lane comes again."""
        c = self.config
        if isinstance(c, FewTokens):
            return self.tokens, 6 * c.ROWS + 1, 4 * (32 * c.WK * c.EACH + 2 * c.EACH), c.ROWS
        if isinstance(c, Config):
            return 19, 100, 136, 16
        blocks = 3 * self.splits + 1
        return min(c.BM + 3, 40), max(c.BN + 4, 100), 64 * blocks + (16 if isinstance(c, WgmmaSp) else 12), 16

    def fits(self) -> bool:
        if isinstance(self.config, WgmmaSp) and DEVICE.type == "cuda":
            return torch.cuda.get_device_capability() == (9, 0)
        return True

    def __call__(self, left: Tensor, right: Tensor, *patterns: Tensor) -> Tensor:
        c = self.config
        if isinstance(c, FewTokens):
            return few_tokens.forward(left, right, patterns[0], None, c)
        if isinstance(c, MmaSp):
            return gluon_products.mma_sp(left, right, patterns[0], None, None, c, self.splits)
        if isinstance(c, WgmmaSp):
            return gluon_products.wgmma_sp(left, right, patterns[0], None, None, c, self.splits)
        if self.op == "grad_weight":
            return triton_products.grad_weight(left, right, patterns[0], c)
        if self.op == "forward":
            return triton_products.forward(left, right, patterns[0], config=c)
        return triton_products.grad_input(left, right, patterns[0], patterns[1] if patterns[1:] else None, c)


GLUON = [
    *(Choice("forward", c, tokens) for tokens, some in few_tokens.CONFIGS.items() for c in some),
    *(Choice("forward", c, 0, n) for c in (*gluon_configs.MMA_SP, *gluon_configs.WGMMA_SP) for n in (1, 3)),
]
TRITON = [
    (Choice(op, config), dtype)
    for op, dtype in itertools.product(OPS, DTYPES)
    for config in triton_configs.configurations(
        op.removesuffix("_columns"), dtype, True, triton_products.arch(DEVICE) if DEVICE.type == "cuda" else 90
    )
]
every_gluon = pytest.mark.parametrize("choice", GLUON, ids=str)
every_triton = pytest.mark.parametrize(
    ("choice", "dtype"), [pytest.param(c, d, id=f"{c}-{DTYPES[d]}") for c, d in TRITON]
)


def slow_but_bf16(dtypes: dict[torch.dtype, str]) -> pytest.MarkDecorator:
    """Each dtype; all but one are slow."""
    slow = {dtype: [] if dtype is torch.bfloat16 else [pytest.mark.slow] for dtype in dtypes}
    return pytest.mark.parametrize("dtype", [pytest.param(d, id=name, marks=slow[d]) for d, name in dtypes.items()])


needs_gluon = pytest.mark.skipif(interpreting(), reason="the interpreter does not know Gluon; run elsewhere")


def check(choice: Choice, case: Case) -> None:
    case.check(choice.op, choice(*case.arguments(choice.op)))


@needs_gluon
@slow_but_bf16(HALF)
@every_gluon
def test_gluon(choice: Choice, dtype: torch.dtype) -> None:
    if not choice.fits():
        pytest.skip("wgmma.sp is an instruction of compute capability 9.0")
    M, N, K, period = choice.sizes()
    case = Case.draw(M, N, K, dtype, period)
    check(choice, case)
    check(choice, case.unusual(choice.op))


@ON_A_CPU
@every_triton
def test_triton(choice: Choice, dtype: torch.dtype) -> None:
    M, N, K, period = choice.sizes()
    case = Case.draw(M, N, K, dtype, period)
    check(choice, case.unusual(choice.op))
    if choice.op == "grad_input_columns":
        check(choice, dropped(case))


@ON_A_CPU
@slow_but_bf16(DTYPES)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("way", gpu_rules.WAYS)
def test_through_the_calls_of_compiled_code(way: str, op: str, dtype: torch.dtype) -> None:
    """Every way, with its tiles where it has some, into memory that holds something else."""
    checked = 0
    for M, N, K in ((48, 64, 96), (5, 64, 96)):
        sizes = (M, N, K, dtype, DEVICE)
        if not gpu_calls.can(way, op, *sizes):
            continue
        for tile in gpu_calls.tiles(way, op, *sizes) or ("",):
            case = Case.draw(M, N, K, dtype)
            # Some CPUs' instructions for bfloat16 take subnormal numbers for zeros.
            for numbers in (case, case.unusual(op, subnormal=way != "expanded" or DEVICE.type == "cuda")):
                arguments = numbers.arguments(op)
                size = {"forward": (M, N), "grad_weight": (N, K // 2)}.get(op, (M, K))
                out = torch.full(size, -7.0, dtype=dtype, device=DEVICE)
                call = getattr(gpu_calls, "linear" if op == "forward" else op)
                assert call(*arguments, out=out, way=way, **({"tile": tile} if tile else {})) is out
                numbers.check(op, out)
                checked += 1
    if not checked:
        pytest.skip(f"{way} does not compute {op} in {dtype} on {DEVICE}")


def test_the_numbers_are_what_they_are_said_to_be() -> None:
    for choice in GLUON:
        _, N, K, period = choice.sizes()
        mask = every_pattern(N, K, period)
        codes = mask.view(N, K // 4, 4).long() @ torch.tensor([1, 2, 4, 8])
        step = min(16, K // 4) if choice.tokens == 0 else K // 4
        found = {(r % period, g, int(codes[r, g])) for r in range(N) for g in range(step)}
        assert len(found) == 6 * period * step, choice
    case = Case.draw(5, 40, 64, torch.bfloat16).unusual("forward")
    values = kept(case.weight, case.mask)
    assert not bool(values.isfinite().all())
    tiny = torch.finfo(torch.bfloat16).smallest_normal
    assert bool(((values.abs() < tiny) & (values != 0)).any())
    assert bool((values == 0).view(40, -1, 2).all(-1).any()), "a group of zeros"
    y = case.x.double() @ case.weight.double().t()
    assert y.isnan()[:, 4].all()
    assert y[:, [0, 1, 2, 3]].isfinite().all()
    assert not dropped(case).weight[case.mask & ~case.columns].isfinite().any()
