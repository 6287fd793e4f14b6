"""No operator keeps anything of a weight beside what it is given: counted in live storages after each call."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from problems import Shape, draw, every_dtype, packed_columns
from slope_compile.kernels import ops
from slope_compile.pattern import Pattern
from watching import Watch


@every_dtype
@pytest.mark.parametrize(
    "name", ["linear", "grad_input", "grad_input_columns", "grad_weight", "expand", "columns", "mask"]
)
def test_nothing_stays(name: str, dtype: torch.dtype) -> None:
    p = draw(Pattern(2, 4), Shape((33,), 32, 8), dtype)
    mask = packed_columns(p.weight, p.mask, p.nm)
    calls: dict[str, Callable[[], Tensor]] = {
        "linear": lambda: ops.linear(p.x, p.values, p.pattern, p.bias, 2, 4),
        "grad_input": lambda: ops.grad_input(p.grad, p.values, p.pattern, 2, 4),
        "grad_input_columns": lambda: ops.grad_input_columns(p.grad, p.values, p.pattern, mask, 2, 4),
        "grad_weight": lambda: ops.grad_weight(p.grad, p.x, p.pattern, 2, 4),
        "expand": lambda: ops.expand(p.values, p.pattern, 2, 4),
        "columns": lambda: ops.compress_columns(p.values, p.pattern, 2, 4, mask)[0],
        "mask": lambda: ops.pick_columns(p.values, p.pattern, 2, 4),
    }
    calls[name]()
    with torch.no_grad(), Watch() as watch:
        result = calls[name]()
    assert watch.kept(result, p.x, p.grad, p.values, p.pattern, p.bias, mask) == 0


def test_what_stays_is_counted() -> None:
    with Watch() as watch:
        kept = [torch.ones(3) + 1, torch.ones(2)]
        torch.ones(5)
    assert watch.kept() == 2
    assert watch.kept(kept[0]) == 1
    with pytest.raises(AssertionError, match="waits for the device"), Watch():
        kept[0].sum().item()
