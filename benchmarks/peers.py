"""2:4 products of others, as contenders: cuSPARSELt and CUTLASS through PyTorch's semi-structured tensors.

Both exist on NVIDIA GPUs alone; PyTorch's CUTLASS products run on compute capability 8.x alone.  torchao reaches the
same two: its training layer is a contender of the suite ``layer`` (see :mod:`benchmarks.torchao_layer`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.choices import Choice
from benchmarks.products import KEEP_GROUP, Problem, Weight
from benchmarks.timing import Contender
from slope_compile.kernels import _cusparselt, ops


def choices(problem: Problem) -> Iterator[Choice]:
    """Forward with the 2:4 weight, and the double-pruned input gradient with its transposed copy.

    ``cusparselt_packed`` is this library's call of cuSPARSELt with the fastest verified algorithm, on an operand that
    stays packed.  It shows the speed available to a program that has memory for a second copy of its weights.

    PyTorch's tensors always use the algorithm with id 0, whether it is right or not.  In float16 some algorithms end in
    an illegal instruction, which ends the whole run, so there they take part only if id 0 was verified (see
    ``choices.verify``).
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
    yield Choice("forward", "cusparselt_packed", "forward", _packed(problem, problem.x, columns=False))
    yield Choice(
        "grad_input",
        "cusparselt_packed_double_pruned",
        "grad_input_double_pruned",
        _packed(problem, problem.grad, columns=True),
    )


FIXED = _cusparselt.Algorithm(0)
"""What PyTorch's tensors take."""

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
        weight: Tensor = ops.expand(*ops.compress_columns(w.values, w.pattern, *KEEP_GROUP, w.column_mask), *KEEP_GROUP)
        return weight

    return expanded


def _semi_structured(problem: Problem, kind: str, x: Tensor, weight: Expand) -> Callable[[], Contender]:
    def make() -> Contender:
        first = weight(0).contiguous()
        case = (x.dtype, x.shape[0], *first.shape)
        if kind == "CUSPARSELT" and x.dtype is torch.float16 and FIXED not in _cusparselt.known(x.device).get(case, ()):
            raise RuntimeError(f"{FIXED} was not verified for {case}")
        subclass: Any = getattr(torch.sparse, f"SparseSemiStructuredTensor{kind}")
        weights = [subclass.from_dense(first)]
        F.linear(x, weights[0])  # Where the product is not to be had, before all the others are compressed.
        weights += [subclass.from_dense(weight(i).contiguous()) for i in range(1, len(problem.weights))]
        return lambda i: F.linear(x, weights[i % len(weights)])

    return make


def _packed(problem: Problem, x: Tensor, columns: bool) -> Callable[[], Contender]:
    def operand(w: Weight) -> Tensor:
        if columns:
            return _cusparselt.pack(*ops.compress_columns(w.values, w.pattern, *KEEP_GROUP, w.column_mask))
        return _cusparselt.pack(w.values, w.pattern)

    def make() -> Contender:
        N, K = (problem.K, problem.N) if columns else (problem.N, problem.K)
        if why := _cusparselt.missing(x.device, x.dtype, problem.M, N, K):
            raise RuntimeError(why)
        packed = [operand(w) for w in problem.weights]
        return lambda i: _cusparselt.product(x, packed[i % len(packed)], N, K)

    return make
