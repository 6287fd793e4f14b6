"""Stored column patterns of W^{R,C}: who refreshes them, and when.

A stock training loop tells nobody that it took an optimizer step.  But an optimizer updates weights in place, and every
in-place update raises a tensor's version counter.  So the compiled function looks, before each training forward, whether
a weight's version differs from the one it saw last: if so, a step has been taken since.  Micro-batches of gradient
accumulation and recomputed forwards see the same version and do not count.  The count (``column_age``) and the pattern
are updated in place, outside the compiled graph, so that saved addresses stay valid.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from slope_compile.errors import ConversionError
from slope_compile.kernels import ops
from slope_compile.parametrizations import SparseWeight
from slope_compile.pattern import Pattern

_seen = WeakTensorKeyDictionary()
"""column_age tensor -> version of the weight when it was last looked at.  Ephemeral, keyed by identity: models do not
share entries, and a fresh entry (a resumed run, a copied model) only means that one step is taken as done."""


@dataclasses.dataclass(frozen=True)
class StoredColumns:
    """One weight with a stored column pattern."""

    weight: Tensor
    """The tensor that the optimizer updates."""
    values: Callable[[], Tensor]
    """``[N, K keep/group]`` from it."""
    pattern: Tensor
    column_pattern: Tensor
    column_age: Tensor
    """int64 ``[1]`` on the CPU; -1 before the first training forward."""
    nm: Pattern
    interval: int

    def before_forward(self) -> None:
        """Count an optimizer step if there was one since the last call, and refresh when the interval is over."""
        version = self.weight._version
        if _seen.get(self.column_age) == version:
            return
        _seen[self.column_age] = version
        self.column_age += 1
        if int(self.column_age) >= self.interval:
            self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Pick the column pattern anew from the values as they are, in place."""
        _, picked = ops.compress_columns(self.values(), self.pattern, self.nm.keep, self.nm.group)
        self.column_pattern.copy_(picked)
        self.column_age.zero_()


def before_training_forward(stored: Iterable[StoredColumns]) -> None:
    """What a compiled training function does first."""
    if torch.is_grad_enabled():
        for columns in stored:
            columns.before_forward()


def refresh_columns_(model: nn.Module) -> int:
    """Refresh every stored column pattern of a prepared model now; returns how many there are.

    Compiled models do this on their own, every ``column_refresh`` optimizer steps; this is for loops that want another
    moment, and for models that run without the backend.

    Raises:
        ConversionError: the model is not prepared.
    """
    count, prepared = 0, False
    for module in model.modules():
        for parametrizations in getattr(module, "parametrizations", {}).values():
            sparse = next((p for p in parametrizations if isinstance(p, SparseWeight)), None)
            if sparse is None:
                continue
            prepared = True
            if sparse.column_pattern is not None and sparse.column_age is not None:
                values = parametrizations.original.detach()
                _, picked = ops.compress_columns(values, sparse.pattern, sparse.nm.keep, sparse.nm.group)
                sparse.column_pattern.copy_(picked)
                sparse.column_age.zero_()
                count += 1
    if not prepared:
        raise ConversionError("refresh_columns_: the model has no prepared layer; sparsify_ it first")
    return count
