"""Dense copies of 2:4 weights, for CPUs where no kernel reads them compressed (no C++ compiler, or kernels off) and
where copies were measured to be faster (``slope-compile tune --copies``).

To expand a weight takes longer than the product itself.  While a weight does not change its expanded form is kept
instead: memory of a dense weight for each, as long as its pattern lives.  It is made at the second forward product in a
row that finds the values as the first one did (where there are kernels at the third, since training may compute a
product twice), and given up when they have changed or a gradient is asked for: training, where forward products are
followed by gradients, keeps none.

A change of the values shows in their version counter or address, or in a step of a ``torch.optim`` optimizer that has
them among its parameters: fused optimizers raise no counter.  Writing through ``values.data`` shows in neither: then
the copy is stale until :func:`forget` is called or a gradient is computed.
"""

from __future__ import annotations

import dataclasses
import functools
import weakref

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakTensorKeyDictionary

from slope_compile.kernels import reference
from slope_compile.kernels._versions import writing


@dataclasses.dataclass
class _Use:
    """The last forward product of a weight."""

    values: weakref.ref[Tensor]
    state: tuple[int, int]
    """Version and address of the values."""
    count: int = 1
    """Forward products in a row that found them so."""
    dense: Tensor | None = None


_uses = WeakTensorKeyDictionary()
"""Pattern -> its last use.  Keyed by the pattern because every product, including the weight gradient, receives it."""


@functools.cache
def _watch_optimizers() -> None:
    """Have every optimizer of ``torch.optim`` report its steps; once in a process, with the first copy."""
    register_optimizer_step_post_hook(torch.compiler.disable(_after_step))


def _after_step(optimizer: torch.optim.Optimizer, *_: object) -> None:
    """Give up the copies of the weights that an optimizer has updated."""
    if not _uses:
        return
    updated = [tensor for group in optimizer.param_groups for tensor in group["params"]]
    if any(type(tensor).__name__ == "DTensor" for tensor in updated):  # what is multiplied was gathered from shards
        forget()
    addresses = {tensor.data_ptr() for tensor in updated}
    for pattern in [pattern for pattern, use in _uses.items() if use.state[1] in addresses]:
        del _uses[pattern]


def expanded(values: Tensor, pattern: Tensor, keep: int, group: int) -> Tensor:
    """The dense weight ``[N, K]`` for a forward product; it must not be written to."""
    dense = kept(values, pattern, keep, group)
    return reference.expand(values, pattern, keep, group) if dense is None else dense


def kept(values: Tensor, pattern: Tensor, keep: int, group: int, after: int = 1) -> Tensor | None:
    """The kept copy; None until more than ``after`` forward products in a row have seen the same values."""
    if values.is_inference():  # has no version counter
        return None
    state, use = writing(values), _uses.get(pattern)
    if use is None or use.values() is not values or use.state != state:
        _uses[pattern] = _Use(weakref.ref(values), state)
        return None
    use.count += 1
    if use.dense is None and use.count > after:
        _watch_optimizers()
        use.dense = reference.expand(values, pattern, keep, group)
    dense: Tensor | None = use.dense
    return dense


def gradient(pattern: Tensor) -> None:
    """Note that a gradient of a product with this weight is computed: it is being trained."""
    if _uses:
        _uses.pop(pattern, None)


def forget() -> None:
    """Give up every copy."""
    _uses.clear()


def count() -> int:
    """Copies there are."""
    return sum(use.dense is not None for use in _uses.values())
