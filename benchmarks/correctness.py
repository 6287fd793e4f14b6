"""Suite correctness: every product in every way that there is on the device, and compiled models, against float64.

It runs before any timing.  The yardstick is PyTorch's dense product in the same dtype, on the device, with the same
numbers.  A way passes if its error is at most 1.1 times the dense one's.  In float32, where the order of sums matters,
it also passes with the error of sums in sequence.  Inputs are fresh random numbers, and outputs are checked to be
finite.  The kernels are checked as they run on the device, not in an interpreter.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks import choices, model_checks
from benchmarks.cases import Case, Measurement, Options, Run
from benchmarks.choices import Choice
from benchmarks.layers import label
from benchmarks.products import (
    KEEP_GROUP,
    Problem,
    double_pruned_product,
    forward_product,
    grad_input_product,
    grad_weight_product,
)
from benchmarks.suite_tests import suite_case
from benchmarks.timing import Contender
from slope_compile.kernels import cpu_rules, gpu_rules, ops, reference
from tolerances import UNIT_ROUNDOFF, in_sequence, relative_error, rounding

TELLING = ((512, 1024, 4096), (37, 132, 268), (16384, 768, 3072), (1, 4096, 4096))
"""``(M, N, K)``: many tokens, sizes that no tile divides, and a single token; float32 at the first two."""
OTHERS = ((16, 4096, 1024), (5, 76, 140), (2048, 3072, 768), (64, 64, 64), (300, 2564, 2052))
TINY = ((5, 76, 140), (1, 64, 64))
LOW_RANK = 0.0156
"""Rank of the adapters, as a share of the layer's smaller side."""
WAYS = {"rule": None, "kernel": "triton", "dense": "expanded"}
"""How an operator chooses: by its rule, always a 2:4 kernel, or never one."""

FACTOR = {torch.bfloat16: 1.1, torch.float16: 1.1, torch.float32: 2.0}
"""Largest error as a multiple of the dense product's error, for the whole result (root of the sum of squares) and for
the worst single entry.  The latter may have one rounding more, since a dense entry may happen to be exact.  In 16 bits
the error is the rounding of the result, the same for all.  In float32 it depends on the order of sums: cuBLAS adds up
many short sums and is several times better than one long sum, which passes by ``tolerances.in_sequence``."""

Truth = tuple[Tensor, Tensor, Tensor, int]
"""The product in float64, the sum of the magnitudes that were added up, the dense product in the dtype itself, and how
many terms an entry is the sum of, pruned ones included."""


def cases(options: Options) -> list[Case]:
    """All cases, the most informative first: the typical shapes in 16 bits and four compiled models, float32, all other
    models, the test suite's own tests, the other shapes."""
    # What takes long here takes one core: a compiler.  Several such processes share the others (``--jobs``).
    threads = options.threads[0] if options.threads else 1

    def products(shapes: Sequence[tuple[int, int, int]], *dtypes: str) -> list[Case]:
        found = []
        for (M, N, K), dtype in itertools.product(shapes, filter(options.wants, dtypes)):
            name = f"correctness/products/m{M}/{N}x{K}/{label(dtype, threads)}"
            run = functools.partial(_products, (M, N, K), dtype, options.device, options.tiles)
            found.append(Case(name, run, threads, limit=240.0, needs=6.0))
        return found

    models, half = model_checks.cases(options, forced, threads), ("bfloat16", "float16")
    if options.tiny:
        return [*products(TINY, *half, "float32"), *models, suite_case(options)]
    return [
        *models[:4], *products(TELLING, *half), *products(TELLING[:2], "float32"), *models[4:], suite_case(options),
        *products(TELLING[2:], "float32"), *products(OTHERS, *half, "float32"),
    ]  # fmt: skip


@contextlib.contextmanager
def forced(way: str | None) -> Iterator[None]:
    """Make the rules choose ``way`` for every call that supports it and "expanded" for others; None changes nothing.

    A way is one of ``gpu_rules.WAYS``.  On a CPU, and for operators outside compiled code, every way but "expanded"
    means the 2:4 kernel.
    """

    def rule(op: str, M: int, N: int, K: int, dtype: torch.dtype, gpu: str, among: tuple[str, ...] = ()) -> str:
        return way if way is not None and way in (among or gpu_rules.WAYS) else "expanded"

    with contextlib.ExitStack() as stack:
        if way is not None:
            for rules, name in ((gpu_rules, "takes_triton"), (cpu_rules, "sparse")):
                stack.enter_context(mock.patch.object(rules, name, return_value=way != "expanded"))
            stack.enter_context(mock.patch.object(gpu_rules, "way", rule))
            # What was compiled under one rule must not be found in a cache under another.
            stack.enter_context(mock.patch.object(gpu_rules, "fingerprint", return_value=f"forced {way}"))
        yield


def _products(
    shape: tuple[int, int, int], dtype: str, device: torch.device, tiles: bool, given: Run
) -> Iterator[Measurement]:
    with torch.no_grad():
        problem = Problem.draw(*shape, dtype, device, copies=1)
        truths = _truths(problem)
        checks: dict[str, dict[str, Any]] = {}
        separate = choices.low_rank(problem, LOW_RANK)["slope_adapter"]
        for way, says in WAYS.items():
            with forced(says):
                adapted = Choice("low_rank", f"separate ({way})", "low_rank", lambda: separate)
                checks[f"low_rank: {adapted.name}"] = _checked(adapted, truths)
                for choice in _operators(problem, way):
                    checks[f"{choice.product}: {choice.name}"] = _checked(choice, truths)
        if shape == TELLING[0]:
            choices.verify(device, dtype, *shape)
        for choice in choices.library(problem, LOW_RANK, tiles):
            checks[f"{choice.product}: {choice.name}"] = _checked(choice, truths)
    facts = problem.facts | {"checks": checks, "passed": all(check["passed"] for check in checks.values())}
    yield Measurement("correctness", {}, {}, facts)


def _operators(problem: Problem, way: str) -> Iterator[Choice]:
    x, grad = problem.x, problem.grad

    def operator(product: str, name: str, truth: str, call: Callable[[Any], object]) -> Choice:
        contender: Contender = lambda _: call(problem.weights[0])  # noqa: E731
        return Choice(product, f"{name} ({way})", truth, lambda: contender)

    yield operator("forward", "linear", "forward", lambda w: ops.linear(x, w.values, w.pattern, None, *KEEP_GROUP))
    yield operator(
        "grad_input", "exact", "grad_input", lambda w: ops.grad_input(grad, w.values, w.pattern, *KEEP_GROUP)
    )
    yield operator("grad_input", "double_pruned", "grad_input_double_pruned", lambda w: double_pruned_product(grad, w))
    yield operator(
        "grad_weight", "kept", "grad_weight_kept", lambda w: ops.grad_weight(grad, x, w.pattern, *KEEP_GROUP)
    )


def _truths(problem: Problem) -> dict[str, Truth]:
    """Every product: exact, in magnitudes, and dense in the problem's dtype."""
    w = problem.weights[0]
    expanded = ops.expand(w.values, w.pattern, *KEEP_GROUP)
    twice = ops.expand(reference.keep_columns(w.values, w.column_mask), w.pattern, *KEEP_GROUP)
    x, grad = problem.x, problem.grad
    A, B = choices.adapter(problem, LOW_RANK)

    def adapted(x: Tensor, weight: Tensor) -> Tensor:
        return torch.addmm(forward_product(x, weight), x @ A.to(x.dtype).t(), B.to(x.dtype).t())

    def kept(dense: Tensor) -> Tensor:
        values: Tensor = ops.compress(dense, w.pattern, *KEEP_GROUP)
        return values

    def each(product: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor, summands: int) -> Truth:
        exact = product(a.double(), b.double())
        return exact, product(a.double().abs(), b.double().abs()), product(a, b), summands

    return {
        "forward": each(forward_product, x, expanded, problem.K),
        "low_rank": (
            adapted(x.double(), expanded.double()),
            torch.addmm(
                forward_product(x.double().abs(), expanded.double().abs()),
                x.double().abs() @ A.double().abs().t(),
                B.double().abs().t(),
            ),
            adapted(x, expanded),
            problem.K + A.shape[0],
        ),
        "grad_input": each(grad_input_product, grad, expanded, problem.N),
        "grad_input_double_pruned": each(grad_input_product, grad, twice, problem.N),
        "grad_weight_kept": each(lambda a, b: kept(grad_weight_product(a, b)), grad, x, problem.M),
    }


def _checked(choice: Choice, truths: dict[str, Truth]) -> dict[str, Any]:
    """Errors of a way beside the dense product's; or why it does not run, which is no pass."""
    exact, scale, dense, summands = truths[choice.truth]
    try:
        result = choice.make()(0)
    except Exception as error:  # Whatever a compiler or a driver raises.
        return {"passed": False, "raised": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"}
    assert isinstance(result, Tensor)
    return judged(result, dense, exact, scale, summands)


def judged(result: Tensor, dense: Tensor, exact: Tensor, scale: Tensor, summands: int) -> dict[str, Any]:
    """Whether a result is as good as the dense one."""
    whole = [float((t.double() - exact).norm() / exact.norm().clamp_min(1e-300)) for t in (result, dense)]
    worst = [relative_error(t, exact, scale) for t in (result, dense)]
    dtype = dense.dtype
    # A dense result that is exact leaves the other one a rounding.
    allowed = FACTOR[dtype] * max(whole[1], UNIT_ROUNDOFF[dtype] / 16)
    if dtype is torch.float32:
        allowed = max(allowed, in_sequence(summands))
    passed = (
        result.dtype == dense.dtype
        and result.shape == dense.shape
        and bool(torch.isfinite(result).all())
        and whole[0] <= allowed
        and worst[0] <= FACTOR[dtype] * worst[1] + rounding(dtype, summands)
    )
    return {"passed": passed, "error": whole[0], "dense": whole[1], "worst": worst[0], "worst_dense": worst[1]}
