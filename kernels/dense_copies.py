"""Dense copies of 2:4 weights, for CPUs where no kernel reads them compressed (no C++ compiler, or kernels off) and
where copies were measured to be faster (``slope-compile tune --copies``).

To expand a weight takes longer than the product itself.  While a weight does not change its expanded form is kept
instead: memory of a dense weight for each, as long as its pattern lives.  It is made at the second forward product in a
row that finds the values as the first one did (where there are kernels at the third, since training may compute a
product twice), and given up when they have changed or a gradient is asked for: training, where forward products are
followed by gradients, keeps none.

What changes the values is told by their version counter and address.  Writing through ``values.data`` raises no
counter: what is kept would be stale until :func:`forget` is called, or a gradient computed.
"""

from __future__ import annotations

import dataclasses
import weakref

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from slope_compile.kernels import reference


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
"""Pattern -> its last use.  The pattern, because every product has it, the weight gradient too."""


def expanded(values: Tensor, pattern: Tensor, keep: int, group: int) -> Tensor:
    """The dense weight ``[N, K]`` for a forward product; it must not be written to."""
    dense = kept(values, pattern, keep, group)
    return reference.expand(values, pattern, keep, group) if dense is None else dense


def kept(values: Tensor, pattern: Tensor, keep: int, group: int, after: int = 1) -> Tensor | None:
    """The same, or None where fewer than ``after`` forward products in a row found the values as this one does."""
    if values.is_inference():  # has no version counter
        return None
    state, use = (values._version, values.data_ptr()), _uses.get(pattern)
    if use is None or use.values() is not values or use.state != state:
        _uses[pattern] = _Use(weakref.ref(values), state)
        return None
    use.count += 1
    if use.dense is None and use.count > after:
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
