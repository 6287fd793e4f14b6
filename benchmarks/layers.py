"""Cases of single layers, for any device: the three products, their sum, and the second compression."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.cases import Case, Measurement, Run, compare
from benchmarks.products import STEPS, Problem

_SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "autocast": "autocast"}


def label(dtype: str, threads: int) -> str:
    """The end of a case's id."""
    return f"{_SHORT[dtype]}/t{threads}"


def product_case(
    prefix: str,
    shape: tuple[int, int, int],
    dtype: str,
    threads: int,
    device: torch.device,
    compiled: dict[str, Any] | None = None,
) -> Case:
    """All products at ``shape = (M, N, K)``, in one set of rounds so that sums over products are exact."""
    M, N, K = shape

    @torch.no_grad()
    def run(given: Run) -> Iterator[Measurement]:
        problem = Problem.draw(M, N, K, dtype, device)
        errors = problem.errors()
        products = problem.products(compiled)
        parts = {f"{p}:{c}": call for p, contenders in products.items() for c, call in contenders.items()}
        samples = given.measure(parts)
        baselines = ("dense", "compiled")
        for product, contenders in products.items():
            names = {contender: [f"{product}:{contender}"] for contender in contenders}
            facts = problem.facts | {"errors": {k: v for k, v in errors.items() if k.startswith(product)}}
            yield compare(product, samples, names, baselines, facts)
        steps = {c: [f"{p}:{part}" for p, part in pairs] for c, pairs in STEPS.items()}
        yield compare("step", samples, steps, baselines, problem.facts)

    return Case(f"{prefix}/{N}x{K}/m{M}/{label(dtype, threads)}", run, threads, seconds=15.0)


def column_case(prefix: str, shape: tuple[int, int], dtype: str, threads: int, device: torch.device) -> Case:
    """The second compression of a weight ``shape = (N, K)``, which no dense training step has."""
    N, K = shape

    @torch.no_grad()
    def run(given: Run) -> Iterator[Measurement]:
        problem = Problem.draw(1, N, K, dtype, device)
        contenders = problem.columns()
        samples = given.measure(contenders, calls=len(problem.weights))
        facts = problem.facts | {"shape": {"N": N, "K": K}}
        yield compare("columns", samples, {name: [name] for name in contenders}, ("copy",), facts)

    return Case(f"{prefix}/{N}x{K}/columns/{label(dtype, threads)}", run, threads, seconds=5.0)
