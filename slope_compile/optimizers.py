"""Optimizers that have state for given weights: no one hands them over, so they are looked for among all objects."""

from __future__ import annotations

import gc
from collections.abc import Sequence

from torch import Tensor
from torch.optim import Optimizer


def optimizers_with_state(weights: Sequence[Tensor]) -> list[Optimizer]:
    """The live optimizers that have state for any of these weights."""
    # An optimizer's state is a dict with parameters as keys.  Looking for one is a scan of the heap in C; only when
    # there is one do we pay for the scan in Python (half a second) that finds whose it is.
    holders = gc.get_referrers(*weights)
    if not any(isinstance(holder, dict) and any(isinstance(key, Tensor) for key in holder) for holder in holders):
        return []
    # type() rather than isinstance(), which would run __class__ of lazy proxies.
    optimizers = [o for o in gc.get_objects() if issubclass(type(o), Optimizer)]
    return [optimizer for optimizer in optimizers if any(weight in optimizer.state for weight in weights)]
