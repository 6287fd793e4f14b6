"""Weights of way A after they were pruned: the state that is kept for each, and what keeps them pruned.

The gradient that a compiled graph gives a pruned weight is zero at the pruned positions, and an elementwise optimizer
leaves a zero with zero gradient and zero state where it is.  Three things get in the way of that:

- State from before: an optimizer that took steps while the weight was dense, or that has been given such a state by
  ``load_state_dict``.  Before each step of an optimizer, state that has not been seen yet is masked; afterwards it
  stays zero there by itself.  A gradient that was accumulated before the weight was pruned is masked with it.
- Gradients from elsewhere (the model called outside of what was compiled, a penalty on the weights), and optimizers
  that are not elementwise.  After the first step of a weight, and every :data:`EVERY` steps then, the pruned positions
  are checked.  If one is not zero, a warning is logged and the weight is pruned after each step from then on.
- Something else is loaded into the weight.  Before each training call of a compiled function, a weight that was written
  to since the last one, and not by a step of a ``torch.optim`` optimizer, is checked, and pruned again if need be.
  Where that happens before every call (other optimizers), every :data:`EVERY` times.
- The model moves to another device: patterns are moved to the device of their weights at the next call.
"""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.weak import WeakTensorKeyDictionary

from slope_compile.kernels import ops
from slope_compile.kernels._versions import writing
from slope_compile.kernels.metadata import packed_width, unpack_mask
from slope_compile.log import log
from slope_compile.optimizers import check_loaded_state
from slope_compile.pattern import Pattern

EVERY = 100
"""Optimizer steps, or writes of others, from one check of the pruned positions to the next."""


@dataclasses.dataclass(eq=False)
class DenseState:
    """What is remembered about a dense weight, for as long as the Parameter lives."""

    path: str
    nm: Pattern
    transposed: bool
    pattern: Tensor
    column_mask: Tensor | None = None
    column_age: Tensor | None = None
    written: tuple[int, int] | None = None
    """:func:`~slope_compile.kernels._versions.writing` of the weight when it was last seen pruned."""
    steps: int = 0
    """Optimizer steps since the weight was pruned."""
    stepped: tuple[int, int] | None = None
    """The same of the weight after its last step or pruning, or at its last training call."""
    strangers: int = 0
    """Training calls that found the weight written to by something else than a step."""
    moves: bool = False
    """Whether something moved the pruned positions, so that they have to be cleared after each step."""
    masked: list[weakref.ref[Tensor]] = dataclasses.field(default_factory=list)
    """Tensors of optimizer state that are zero at the pruned positions."""

    def follow(self, weight: Tensor) -> None:
        """Move the metadata to the device of the weight; the age of the columns stays on the CPU."""
        if self.pattern.device != weight.device:
            self.pattern = self.pattern.to(weight.device)
            if self.column_mask is not None:
                self.column_mask = self.column_mask.to(weight.device)

    @torch.no_grad()
    def before_call(self, weight: Tensor, path: str) -> None:
        """What a training function does first: the metadata follows the weight, and what was loaded is pruned."""
        self.follow(weight)
        if weight.is_inference():  # has no version counter
            return
        before, self.stepped = self.stepped, writing(weight)
        if before is None or before == self.stepped:
            return
        self.strangers += 1
        if self.strangers % EVERY == 1 and not self.fits(weight):
            log.warning("backend 'slope' prunes %s again, in place: something was written to it", path)
            self.prune(weight)

    def kept(self, shape: torch.Size) -> Tensor:
        """bool, in the weight's own orientation: ``[N, K]``, or ``[K, N]`` if transposed."""
        mask = unpack_mask(self.pattern, shape[0] if self.transposed else shape[1])
        return mask.t() if self.transposed else mask

    def masked_weight(self, weight: Tensor) -> Tensor:
        """A copy of the weight with zeros at the pruned positions."""
        self.follow(weight)
        return weight.detach().masked_fill(~self.kept(weight.shape), 0)

    def values(self, weight: Tensor) -> Tensor:
        """The kept entries of the weight, ``[N, K keep/group]``."""
        self.follow(weight)
        dense = weight.detach().t() if self.transposed else weight.detach()
        compressed: Tensor = ops.compress(dense, self.pattern, self.nm.keep, self.nm.group)
        return compressed

    def is_for(self, weight: Tensor) -> bool:
        """Whether the pattern is one of a weight of this shape."""
        N, K = reversed(weight.shape) if self.transposed else weight.shape
        return self.pattern.shape == (N, packed_width(K))

    def fits(self, weight: Tensor) -> bool:
        """Whether the weight is zero at the pruned positions."""
        return int(weight.detach().count_nonzero()) == int(self.values(weight).count_nonzero())

    @torch.no_grad()
    def prune(self, weight: Tensor) -> None:
        """Write zeros to the pruned positions of the weight and of a gradient that was accumulated before."""
        weight.copy_(self.masked_weight(weight))
        if weight.grad is not None and weight.grad.layout == torch.strided:
            weight.grad.masked_fill_(~self.kept(weight.shape), 0)
        if not weight.is_inference():  # has no version counter
            self.stepped = writing(weight)


@dataclasses.dataclass(frozen=True)
class PrunedWeight:
    """A weight that a compiled graph reads in its dense form, so that it has to be pruned whenever the graph runs."""

    weight: Tensor
    state: DenseState
    path: str
    """The path in this model; ``state.path`` is the path in the first model compiled with this weight."""

    def compressed(self) -> tuple[Tensor, Tensor]:
        """Values and pattern."""
        return self.state.values(self.weight), self.state.pattern

    @torch.no_grad()
    def before_call(self) -> None:
        """Prune the weight again if something that is not pruned was written to it."""
        if self.state.written == writing(self.weight):
            return
        # Writing only where it is needed: a backward that is still to come may have saved the weight.
        if not self.state.fits(self.weight):
            log.info("backend 'slope' prunes %s again, in place: something was written to it", self.path)
            self.weight.copy_(self.state.masked_weight(self.weight))
        self.state.written = writing(self.weight)


_states = WeakTensorKeyDictionary()
"""Parameter -> DenseState, by identity.  So recompiles (a new shape, adapters on) find the same pattern, even where a
kept weight has become exactly 0."""

_places: weakref.WeakKeyDictionary[nn.Module, dict[str, DenseState]] = weakref.WeakKeyDictionary()
"""Model -> path -> the same.  A model that moves may be given new Parameters."""


def state_of(weight: Tensor, nm: Pattern, model: nn.Module | None, path: str) -> DenseState | None:
    """What is remembered about a weight with this pattern.

    When a model moves to another device, it may get a new Parameter in the place of a pruned one.  The new one takes
    over the state of the old one, if it has the same shape and is zero at the pruned positions.
    """
    state: DenseState | None = _states.get(weight)
    if state is None and model is not None:
        before = _places.get(model, {}).get(path)
        if before is not None and before.nm == nm and before.is_for(weight):
            moved = dataclasses.replace(before, written=None, stepped=None, masked=[])
            if moved.fits(weight):
                state = moved
                _remember(weight, state, model)
    if state is None or state.nm != nm:
        return None
    state.follow(weight)
    return state


def prune(weight: Tensor, state: DenseState, model: nn.Module | None) -> None:
    """Prune a weight in place by its state, and remember that."""
    # What was made in inference mode may be written to there only.
    with torch.inference_mode(weight.is_inference()):
        state.prune(weight)
    _remember(weight, state, model)
    state.written = state.stepped


def _remember(weight: Tensor, state: DenseState, model: nn.Module | None) -> None:
    _states[weight] = state
    if model is not None:
        _places.setdefault(model, {})[state.path] = state
    _watch_optimizers()


@functools.cache
def _watch_optimizers() -> None:
    """Keep weights pruned around every step of ``torch.optim``.  The hooks are installed once in a process."""
    register_optimizer_step_pre_hook(torch.compiler.disable(_before_step))
    register_optimizer_step_post_hook(torch.compiler.disable(_after_step))
    check_loaded_state()


def _pruned(optimizer: Optimizer) -> Iterator[tuple[Tensor, DenseState]]:
    for group in optimizer.param_groups:
        for weight in group["params"]:
            state = _states.get(weight)
            if state is not None:
                yield weight, state


@torch.no_grad()
def _before_step(optimizer: Optimizer, *_: object) -> None:
    found = 0
    for weight, state in _pruned(optimizer):
        held = optimizer.state.get(weight, {})
        tensors = [value for value in held.values() if _is_like(value, weight)]
        known = {id(tensor) for tensor in (ref() for ref in state.masked) if tensor is not None}
        new = [tensor for tensor in tensors if id(tensor) not in known]
        if new:
            state.follow(weight)
            pruned = ~state.kept(weight.shape)
            for tensor in new:
                tensor.masked_fill_(pruned.to(tensor.device), 0)
            state.masked = [weakref.ref(tensor) for tensor in tensors]
            found += state.steps == 0
    if found:
        log.info("backend 'slope' masked what %s had for %d weights from before they were pruned",
                 type(optimizer).__name__, found)  # fmt: skip


def _is_like(value: object, weight: Tensor) -> bool:
    """Whether a part of an optimizer's state belongs to the weight's elements one by one, with 0 meaning zero.

    In a quantized state 0 is a code like any other.
    """
    return type(value) in (Tensor, nn.Parameter) and value.shape == weight.shape and value.is_floating_point()  # type: ignore[attr-defined]


@torch.no_grad()
def _after_step(optimizer: Optimizer, *_: object) -> None:
    looked_at = []
    for weight, state in _pruned(optimizer):
        state.steps += 1
        state.stepped = writing(weight)
        if state.moves:
            state.prune(weight)
        elif state.steps % EVERY == 1:
            looked_at.append((weight, state))
    largest = _largest_outside(looked_at)
    moved = [i for i, value in enumerate(largest) if value != 0]
    if not moved:
        return
    for weight, state in (looked_at[i] for i in moved):
        state.moves = True
        state.prune(weight)
    worst = max(moved, key=lambda i: largest[i])
    log.warning(
        "backend 'slope': %s moved pruned weights of %d layers away from zero (farthest: %r, to %.3g). They are pruned "
        "again after each of its steps from now on. Either it does not update each element by itself, or gradients "
        "came from outside of the compiled model; slope_compile.sparsify_ leaves no pruned weights to move.",
        type(optimizer).__name__, len(moved), looked_at[worst][1].path, largest[worst],
    )  # fmt: skip


def _largest_outside(weights: Sequence[tuple[Tensor, DenseState]]) -> list[float]:
    """The largest magnitude at a pruned position of each weight."""
    found = []
    for weight, state in weights:
        state.follow(weight)
        found.append(weight.detach().masked_fill(state.kept(weight.shape), 0).abs().amax())
    return [float(value) for value in found]  # waits for the device only after all is under way
