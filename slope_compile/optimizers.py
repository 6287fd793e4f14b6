"""What optimizers and compressed weights have to do with each other.

Finds live optimizers that hold state for given weights, rejects loaded state of the wrong shape, and names optimizers
that take the compressed values for the layer's matrix.

``Optimizer.load_state_dict`` assigns state by the order of parameters, which differs in a prepared model, and accepts
moments of any shape.  With a dense weight's moments on a compressed weight, a fused optimizer silently reads part of
them; the reverse reads out of bounds.
"""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from slope_compile.errors import ConversionError
from slope_compile.log import log
from slope_compile.parametrizations import SparseWeight

ELEMENTWISE = frozenset(
    (
        "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "momentum_buffer",
        "square_avg", "grad_avg", "acc_delta", "sum",
    )
)  # fmt: skip
"""Names of state that the optimizers of ``torch.optim`` keep for each element of a weight."""

WHOLE_MATRIX = ("muon", "shampoo", "soap", "adafactor")
"""Parts of the names of optimizers whose steps depend on where an element is in its matrix."""

_looked_at: weakref.WeakKeyDictionary[Optimizer, Any] = weakref.WeakKeyDictionary()
"""Optimizer -> its state when it was last checked; loading a state replaces the object."""


def optimizers_with_state(weights: Sequence[Tensor]) -> list[Optimizer]:
    """The live optimizers that have state for any of these weights."""
    # An optimizer's state is a dict with parameters as keys.  Looking for one is a scan of the heap in C; only when
    # there is one do we pay for the scan in Python (half a second) that finds its optimizer.
    holders = gc.get_referrers(*weights)
    if not any(isinstance(holder, dict) and any(isinstance(key, Tensor) for key in holder) for holder in holders):
        return []
    return [optimizer for optimizer in _live() if any(weight in optimizer.state for weight in weights)]


def left_out(some: Sequence[Tensor], of: Sequence[Tensor]) -> tuple[list[Tensor], list[Optimizer]]:
    """Which of ``some`` trainable parameters no live optimizer has, and the optimizers that have any ``of`` the others.

    Both are empty where no optimizer can be seen: one that is no ``torch.optim.Optimizer``, that has copies, or that
    was there when the program called ``gc.freeze()``.
    """
    given = {id(p) for p in of}
    having = {}
    for optimizer in _live():
        held = {id(p) for group in getattr(optimizer, "param_groups", ()) for p in group["params"]}
        if held & given:
            having[optimizer] = held
    everything = set().union(*having.values())
    missing = [p for p in some if p.requires_grad and id(p) not in everything]
    return (missing, list(having)) if having else ([], [])


def _live() -> list[Optimizer]:
    # type() rather than isinstance(), which would run __class__ of lazy proxies.
    return [o for o in gc.get_objects() if issubclass(type(o), Optimizer)]


@functools.cache
def check_loaded_state() -> None:
    """Check the state that optimizers have loaded, before their next step.  The hook is installed once in a process.

    ``Optimizer.step`` then raises :class:`ConversionError` where a moment has another shape than its weight.
    """
    register_optimizer_step_pre_hook(torch.compiler.disable(_check))


def _check(optimizer: Optimizer, *_: object) -> None:
    if _looked_at.get(optimizer) is optimizer.state:
        return
    if optimizer not in _looked_at:
        _warn_of_whole_matrices(optimizer)
    # Optimizers of others may keep moments of any shape under these names (projected ones, say).
    if type(optimizer).__module__.startswith("torch.optim"):
        _check_shapes(optimizer)
    _looked_at[optimizer] = optimizer.state


def _check_shapes(optimizer: Optimizer) -> None:
    for group in optimizer.param_groups:
        for weight in group["params"]:
            for name, value in optimizer.state.get(weight, {}).items():
                if name in ELEMENTWISE and isinstance(value, Tensor) and value.shape != weight.shape:
                    raise ConversionError(
                        f"{type(optimizer).__name__}: {name!r} of {_path(weight)!r} is {tuple(value.shape)}, but the "
                        f"parameter is {tuple(weight.shape)}: the state is that of a model that was prepared in "
                        "another way, or not at all; prepare this one as it was (sparsify_ with the same SlopeConfig) "
                        "before states are loaded, or go on with a new optimizer"
                    )


def _warn_of_whole_matrices(optimizer: Optimizer) -> None:
    """Say so where an optimizer that treats a matrix as a whole has compressed weights."""
    name = type(optimizer).__name__
    if not any(part in name.lower() for part in WHOLE_MATRIX):
        return
    compressed = {
        id(o.original)
        for o in gc.get_objects()
        if issubclass(type(o), ParametrizationList) and any(isinstance(p, SparseWeight) for p in o)
    }
    found = [p for group in optimizer.param_groups for p in group["params"] if id(p) in compressed]
    if found:
        log.warning(
            "%s treats a matrix as a whole, but %d of its weights (%r, ...) are the compressed values of sparse "
            "layers, in which columns have moved: how such a run trains has not been studied; give these weights to an "
            "elementwise optimizer (AdamW, SGD) to be safe", name, len(found), _path(found[0]),
        )  # fmt: skip


def _path(parameter: Tensor) -> str:
    """Where a parameter is, by the longest name that a live module has for it."""
    modules = [o for o in gc.get_objects() if issubclass(type(o), nn.Module)]
    names = [name for module in modules for name, p in module.named_parameters() if p is parameter]
    return max(names, key=len, default="a parameter of no module")
