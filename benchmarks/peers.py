"""2:4 products of others, as contenders: cuSPARSELt and CUTLASS through PyTorch's semi-structured tensors.

Both exist on NVIDIA GPUs alone; PyTorch's CUTLASS products run on compute capability 8.x alone.  torchao reaches the
same two: its training layer is a contender of the suite ``layer`` (see :mod:`benchmarks.torchao_layer`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.choices import Choice
from benchmarks.products import KEEP_GROUP, TOLERANCE, Problem, error_of
from benchmarks.timing import Contender, Plan, measure, stopwatch
from slope_compile.kernels import ops

_SEARCH = Plan(seconds=0.2, min_rounds=3, max_rounds=5)
_MOST_ALGORITHMS = 128
"""Where the library does not say how many it has."""


def choices(problem: Problem, search: bool = False) -> Iterator[Choice]:
    """Forward with the 2:4 weight, and the double-pruned input gradient with its transposed copy.

    Args:
        search: also look for cuSPARSELt's fastest right algorithm: its own default is not, and some are wrong.
    """
    if problem.device.type != "cuda":
        return
    for name, kind in (("cusparselt", "CUSPARSELT"), ("cutlass", "CUTLASS")):
        yield Choice("forward", name, "forward", _semi_structured(problem, kind, problem.x, _expanded(problem)))
        yield Choice(
            "grad_input",
            f"{name}_double_pruned",
            "grad_input_double_pruned",
            _semi_structured(problem, kind, problem.grad, _expanded_columns(problem)),
        )
    if search:
        yield Choice("forward", "cusparselt_searched", "forward", _searched(problem, problem.x, _expanded(problem)))


Expand = Callable[[int], Tensor]
"""Number of a copy -> its weight as ``[out, in]``, with the zeros of its pattern."""


def _expanded(problem: Problem) -> Expand:
    def expanded(i: int) -> Tensor:
        w = problem.weights[i]
        weight: Tensor = ops.expand(w.values, w.pattern, *KEEP_GROUP)
        return weight

    return expanded


def _expanded_columns(problem: Problem) -> Expand:
    def expanded(i: int) -> Tensor:
        w = problem.weights[i]
        values = ops.recompress_columns(w.values, w.pattern, w.column_pattern, *KEEP_GROUP)
        weight: Tensor = ops.expand(values, w.column_pattern, *KEEP_GROUP)
        return weight

    return expanded


def _semi_structured(problem: Problem, kind: str, x: Tensor, weight: Expand) -> Callable[[], Contender]:
    def make() -> Contender:
        subclass: Any = getattr(torch.sparse, f"SparseSemiStructuredTensor{kind}")
        weights = [subclass.from_dense(weight(0).contiguous())]
        F.linear(x, weights[0])  # Where the product is not to be had, before all the others are compressed.
        weights += [subclass.from_dense(weight(i).contiguous()) for i in range(1, len(problem.weights))]
        return lambda i: F.linear(x, weights[i % len(weights)])

    return make


def _searched(problem: Problem, x: Tensor, weight: Expand) -> Callable[[], Contender]:
    def make() -> Contender:
        packed = [torch._cslt_compress(weight(i).contiguous()) for i in range(len(problem.weights))]

        def product(algorithm: int) -> Contender:
            def call(i: int) -> Tensor:
                chosen = packed[i % len(packed)]
                return torch._cslt_sparse_mm(chosen, x.t(), transpose_result=True, alg_id=algorithm)

            return call

        return product(fastest(product, F.linear(x, weight(0)), x.dtype, x.device))

    return make


def fastest(
    product: Callable[[int], Contender], expected: Tensor, dtype: torch.dtype, device: torch.device
) -> int:
    """The algorithm that is fastest among those that run and are right, twice, whatever lay in their output before.

    Raises:
        RuntimeError: none is.
    """
    right: dict[int, float] = {}
    for algorithm in range(_algorithms()):
        call = product(algorithm)
        try:
            poison = torch.full_like(expected, torch.nan)
            del poison  # What the allocator hands out next is likely to be this.
            if any(not error_of(call(0), expected.float()) <= TOLERANCE[dtype] for _ in range(2)):
                continue
            samples = measure({"call": call}, _SEARCH, stopwatch_of(device))
        except RuntimeError:
            if right and algorithm > 2 * max(right) + 8:
                break  # Past the last one.
            continue
        right[algorithm] = min(itertools.chain.from_iterable(samples.rounds.values()))
    if not right:
        raise RuntimeError("cuSPARSELt: no algorithm runs and is right")
    return min(right, key=lambda algorithm: right[algorithm])


def stopwatch_of(device: torch.device) -> Any:
    """Apart, for tests."""
    return stopwatch(device)


def _algorithms() -> int:
    known = getattr(torch.backends.cusparselt, "get_max_alg_id", lambda: None)()
    return int(known) if known else _MOST_ALGORITHMS
