"""Every way in which the library can compute a layer's products on a GPU.

The library's operators pick one of the ways by rule.  Here each is called by name, so that tables can show which one
should have been picked, and whether a way is slow, wrong or missing.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

import slope_compile as slope
from benchmarks.cases import DTYPES
from benchmarks.products import KEEP_GROUP, Problem, Weight
from benchmarks.timing import Contender
from slope_compile.kernels import (
    cusparselt_search,
    gluon_choices,
    gluon_configs,
    gluon_products,
    gpu_calls,
    gpu_ops,
    gpu_rules,
    ops,
    triton_configs,
    triton_products,
)
from slope_compile.kernels.triton_configs import Config

SEARCH_SECONDS = 30.0
"""Limit of the search for algorithms of cuSPARSELt, for one layer."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """One contender that may turn out not to run, or to be wrong."""

    product: str
    name: str
    truth: str
    """The product in :meth:`Problem.truths` that it computes."""
    make: Callable[[], Contender]
    """The call; raises if the way does not exist on this device."""


def rank(N: int, K: int, share: float) -> int:
    """An adapter's rank as a share of the layer's smaller side, in multiples of 16."""
    return max(16, round(share * min(N, K) / 16) * 16)


def library(problem: Problem, low_rank_share: float, tiles: bool = True) -> Iterator[Choice]:
    """Every way of :mod:`gpu_calls`, with ``tiles`` every tile of the Triton and Gluon kernels too; where there are no
    ways, the dense product with the expanded weight."""
    if problem.device.type != "cuda" or not gpu_ops.available(problem.device):
        yield Choice("forward", "expanded", "forward", _each(problem, _expanded_forward(problem.x)))
        yield Choice("grad_input", "expanded_exact", "grad_input", _each(problem, _expanded_grad_input(problem.grad)))
        return
    yield from _ways(problem, low_rank_share)
    if tiles:
        yield from _triton(problem)
        yield from _gluon(problem)
        yield from _gluon_double_pruned(problem)
        yield from _gluon(problem, low_rank_share)


@functools.cache
def verify(device: torch.device, dtype: str, M: int, N: int, K: int) -> None:
    """Look for algorithms of cuSPARSELt that are right for a layer, and let the library know them.

    A child process tries them, since some end in an illegal instruction; it stays for the layers to come.
    """
    if device.type == "cuda":
        _search(device).run(cusparselt_search.layer(DTYPES[dtype], M, N, K), SEARCH_SECONDS)


@functools.cache
def _search(device: torch.device) -> cusparselt_search.Search:
    return cusparselt_search.Search(device)


OPS = ("forward", "grad_input_columns", "low_rank", "grad_weight", "grad_input")
"""What a layer computes: operators of ``gpu_calls``, and the forward product with an adapter."""


def _ways(problem: Problem, low_rank_share: float) -> Iterator[Choice]:
    """The ways that compiled code may take, as it calls them: each with the tile that it takes by default."""
    for op in OPS:
        yield from ways_of(op, problem, low_rank_share)


def ways_of(
    op: str, problem: Problem, low_rank_share: float, among: Sequence[str] = gpu_rules.WAYS
) -> Iterator[Choice]:
    """The ways out of ``among`` that compute ``op``, one of ``OPS``."""
    x, grad, dtype = problem.x, problem.grad, DTYPES[problem.dtype]
    M, N, K = problem.M, problem.N, problem.K
    y, dx, dv = x.new_empty(M, N), grad.new_empty(M, K), grad.new_empty(N, K // 2)
    A, B = adapter(problem, low_rank_share)

    def low_rank(w: Weight, way: str) -> object:
        return gpu_calls.linear_low_rank(x, w.values, w.pattern, x @ A.t(), B, out=y, way=way)

    def forward(w: Weight, way: str) -> object:
        return gpu_calls.linear(x, w.values, w.pattern, out=y, way=way)

    def exact(w: Weight, way: str) -> object:
        return gpu_calls.grad_input(grad, w.values, w.pattern, out=dx, way=way)

    def double_pruned(w: Weight, way: str) -> object:
        return gpu_calls.grad_input_columns(grad, w.values, w.pattern, w.column_mask, out=dx, way=way)

    def grad_weight(w: Weight, way: str) -> object:
        return gpu_calls.grad_weight(grad, x, w.pattern, out=dv, way=way)

    product, end, truth, call = {
        "forward": ("forward", "", "forward", forward),
        "grad_input": ("grad_input", "_exact", "grad_input", exact),
        "grad_input_columns": ("grad_input", "_double_pruned", "grad_input_double_pruned", double_pruned),
        "grad_weight": ("grad_weight", "", "grad_weight_kept", grad_weight),
        "low_rank": ("low_rank", "", "low_rank", low_rank),
    }[op]
    computed, R = ("forward", B.shape[1]) if op == "low_rank" else (op, 0)
    for way in among:
        if gpu_calls.can(way, computed, M, N, K, dtype, x.device, R):
            yield Choice(product, f"way_{way}{end}", truth, _each(problem, functools.partial(call, way=way)))


def autotuned(problem: Problem) -> Iterator[Choice]:
    """The operators as the backend compiles them with ``max_autotune``, which measures the choices, dense ones among
    them, at compilation."""
    x, grad = problem.x, problem.grad

    def compiled(operator: Callable[..., Tensor]) -> Callable[..., Tensor]:
        wrapped: Callable[..., Tensor] = torch.compile(
            operator, backend=slope.slope, dynamic=False, options={"max_autotune": True}
        )
        return wrapped

    def forward() -> Contender:
        call = compiled(lambda x, values, pattern: ops.linear(x, values, pattern, None, *KEEP_GROUP))
        return _each(problem, lambda w: call(x, w.values, w.pattern))()

    def exact() -> Contender:
        call = compiled(lambda grad, values, pattern: ops.grad_input(grad, values, pattern, *KEEP_GROUP))
        return _each(problem, lambda w: call(grad, w.values, w.pattern))()

    def double_pruned() -> Contender:
        call = compiled(
            lambda grad, values, pattern, columns: ops.grad_input_columns(grad, values, pattern, columns, *KEEP_GROUP)
        )
        return _each(problem, lambda w: call(grad, w.values, w.pattern, w.column_mask))()

    def grad_weight() -> Contender:
        call = compiled(lambda grad, x, pattern: ops.grad_weight(grad, x, pattern, *KEEP_GROUP))
        return _each(problem, lambda w: call(grad, x, w.pattern))()

    yield Choice("forward", "autotuned", "forward", forward)
    yield Choice("grad_input", "autotuned_exact", "grad_input", exact)
    yield Choice("grad_input", "autotuned_double_pruned", "grad_input_double_pruned", double_pruned)
    yield Choice("grad_weight", "autotuned", "grad_weight_kept", grad_weight)


def low_rank(problem: Problem, share: float) -> dict[str, Contender]:
    """The forward product with an adapter of two more products, beside the dense layer that has none."""
    x, weights, count = problem.x, problem.weights, len(problem.weights)
    A, B = adapter(problem, share)

    def separate(i: int) -> object:
        w = weights[i % count]
        return torch.addmm(ops.linear(x, w.values, w.pattern, None, *KEEP_GROUP), x @ A.t(), B.t())

    return {
        "dense": lambda i: F.linear(x, weights[i % count].dense),
        "slope": lambda i: ops.linear(x, weights[i % count].values, weights[i % count].pattern, None, *KEEP_GROUP),
        "slope_adapter": separate,
    }


def low_rank_truth(problem: Problem, share: float) -> Tensor:
    """In float32, from the first weight."""
    A, B = (factor.float() for factor in adapter(problem, share))
    w, x = problem.weights[0], problem.x.float()
    truth: Tensor = F.linear(x, ops.expand(w.values, w.pattern, *KEEP_GROUP).float()) + (x @ A.t()) @ B.t()
    return truth


def adapter(problem: Problem, share: float) -> tuple[Tensor, Tensor]:
    """``A [R, K]`` and ``B [N, R]``, the same at every call; the down-projection's entries are near 1."""
    R = rank(problem.N, problem.K, share)
    generator = torch.Generator(problem.device).manual_seed(1)

    def normal(rows: int, columns: int, size: float) -> Tensor:
        drawn = size * torch.randn(rows, columns, generator=generator, device=problem.device)
        return drawn.to(DTYPES[problem.dtype])

    return normal(R, problem.K, problem.K**-0.5), normal(problem.N, R, 1.0)


def _each(problem: Problem, product: Callable[[Weight], object]) -> Callable[[], Contender]:
    weights, count = problem.weights, len(problem.weights)
    return lambda: lambda i: product(weights[i % count])


def _expanded_forward(x: Tensor) -> Callable[[Weight], object]:
    return lambda w: F.linear(x, ops.expand(w.values, w.pattern, *KEEP_GROUP))


def _expanded_grad_input(grad: Tensor) -> Callable[[Weight], object]:
    return lambda w: torch.mm(grad, ops.expand(w.values, w.pattern, *KEEP_GROUP))


def _gluon_product(config: gluon_configs.Config) -> Callable[..., Tensor]:
    """The product of a configuration: of x, values, pattern, bias and (T, B)."""
    kernel: Callable[..., Tensor] = gluon_products.wgmma_sp
    if isinstance(config, gluon_configs.MmaSp):
        kernel = gluon_products.mma_sp
    return functools.partial(kernel, config=config)


def _gluon(problem: Problem, share: float | None = None) -> Iterator[Choice]:
    """The kernels on the sparse tensor cores that passed their test here; with an adapter for a ``share``."""
    x = problem.x
    factors = None if share is None else adapter(problem, share)
    R = 0 if factors is None else factors[1].shape[1]
    sizes = (problem.M, problem.N, problem.K, R)
    for config in gluon_choices.choices(*sizes, problem.device, DTYPES[problem.dtype], bias=False):
        product = _gluon_product(config)

        def forward(w: Weight, product: Callable[..., Tensor] = product) -> object:
            low_rank = None if factors is None else (x @ factors[0].t(), factors[1])
            return product(x, w.values, w.pattern, None, low_rank)

        kind = "forward" if factors is None else "low_rank"
        yield Choice(kind, str(config), kind, _each(problem, forward))


def _gluon_double_pruned(problem: Problem) -> Iterator[Choice]:
    """The input gradient on the sparse tensor cores, the transpose made anew for each call as a step does."""
    grad = problem.grad
    # dX [M, K] = dY [M, N] times the transposed weight [K, N]: K is what comes out.
    sizes = (problem.M, problem.K, problem.N, 0)
    for config in gluon_choices.choices(*sizes, problem.device, DTYPES[problem.dtype], bias=False):
        product = _gluon_product(config)

        def double_pruned(w: Weight, product: Callable[..., Tensor] = product) -> object:
            values, pattern = ops.compress_columns(w.values, w.pattern, *KEEP_GROUP, w.column_mask)
            return product(grad, values, pattern, None, None)

        name = f"{config}_double_pruned"
        yield Choice("grad_input", name, "grad_input_double_pruned", _each(problem, double_pruned))


def _triton(problem: Problem) -> Iterator[Choice]:
    x, grad, dtype = problem.x, problem.grad, DTYPES[problem.dtype]
    aligned = problem.N % 16 == 0 and problem.K % 128 == 0

    def fitting(kernel: str) -> Iterator[tuple[str, Config]]:
        for config in triton_configs.configurations(kernel, dtype, aligned, triton_products.arch(problem.device)):
            # A tile of far more tokens than there are computes nothing but padding; grad_weight sums over tokens.
            if kernel == "grad_weight" or max(16, 2 * problem.M) >= config.BM:
                yield f"triton_{config.BM}x{config.BN}x{config.BK}", config

    for name, config in fitting("forward"):

        def forward(w: Weight, config: Config = config) -> object:
            return triton_products.forward(x, w.values, w.pattern, config=config)

        yield Choice("forward", name, "forward", _each(problem, forward))
    for name, config in fitting("grad_input"):

        def exact(w: Weight, config: Config = config) -> object:
            return triton_products.grad_input(grad, w.values, w.pattern, config=config)

        def double_pruned(w: Weight, config: Config = config) -> object:
            return triton_products.grad_input(grad, w.values, w.pattern, w.column_mask, config=config)

        yield Choice("grad_input", f"{name}_exact", "grad_input", _each(problem, exact))
        yield Choice("grad_input", f"{name}_double_pruned", "grad_input_double_pruned", _each(problem, double_pruned))
    for name, config in fitting("grad_weight"):

        def grad_weight(w: Weight, config: Config = config) -> object:
            return triton_products.grad_weight(grad, x, w.pattern, config=config)

        yield Choice("grad_weight", name, "grad_weight_kept", _each(problem, grad_weight))
