"""FLOP formulas of this library's operators for ``torch.utils.flop_counter``.

    from torch.utils.flop_counter import FlopCounterMode
    with FlopCounterMode(custom_mapping=flops.FORMULAS) as counter: ...

As in ``slope_compile.cost``, a multiplication with its addition counts as 2 FLOPs, and only kept positions count.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from slope_compile.kernels import ops as ops  # defines the operators

Shape = Sequence[int]


def _linear(x: Shape, values: Shape, pattern: Shape, *given: Any, out_shape: Shape | None = None, **named: Any) -> int:
    """``x [..., K]``, values ``[N, K keep/group]``; with a low-rank branch ``down [..., R]``, ``up [N, R]``."""
    up = given[6] if len(given) > 6 else named.get("up")
    M = math.prod(x[:-1])
    return 2 * M * (math.prod(values) + (0 if up is None else math.prod(up)))


def _grad_input(grad: Shape, values: Shape, *given: Any, out_shape: Shape | None = None, **named: Any) -> int:
    return 2 * math.prod(grad[:-1]) * math.prod(values)


def _grad_weight(grad: Shape, *given: Any, out_shape: Shape, **named: Any) -> int:
    return 2 * math.prod(grad[:-1]) * math.prod(out_shape)


FORMULAS: dict[Any, Callable[..., int]] = {
    torch.ops.slope.linear: _linear,
    torch.ops.slope.grad_input: _grad_input,
    torch.ops.slope.grad_input_columns: _grad_input,
    torch.ops.slope.grad_weight: _grad_weight,
}
"""Operator -> function from the shapes of its arguments to its FLOPs.  Products with W^{R,C} count as if nothing was
pruned the second time, because their kernels compute all kept positions."""
