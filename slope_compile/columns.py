"""Refreshes stored column masks of W^{R,C} after enough optimizer steps.

A stock training loop does not announce its optimizer steps.  Two things show them: an optimizer updates
weights in place, which raises a tensor's version counter, and every ``torch.optim.Optimizer`` calls the hooks of
``register_optimizer_step_post_hook``.  Neither is enough: fused optimizers leave the counter alone, and not every
optimizer is a ``torch.optim`` one.  FSDP's steps are those of any optimizer with sharded parameters: what it gathers
for a forward is another tensor than the shard that is updated, and its counter is left alone.  So the compiled
function looks, before each training forward, whether a weight's version or its number of hooked steps differs from
what it saw last: if so, a step has been taken since.  Micro-batches of gradient accumulation and recomputed forwards
see the same and do not count.  The count (``column_age``) and the mask are updated in place, outside the compiled
graph, so that saved addresses stay valid.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakTensorKeyDictionary

from slope_compile.errors import ConversionError
from slope_compile.kernels import ops
from slope_compile.kernels._versions import writing
from slope_compile.layers import linear_layers
from slope_compile.passes.graph import Region, attribute, regions
from slope_compile.pattern import Pattern

_seen = WeakTensorKeyDictionary()
"""column_age tensor -> state of the weight when it was last looked at.  Ephemeral, keyed by identity: models do not
share entries, and a fresh entry (a resumed run, a copied model) only means that one step is taken as done."""

_steps = WeakTensorKeyDictionary()
"""Weight with stored columns -> optimizer steps that reported themselves since it was first looked at."""

_steps_of_shards = 0
"""Steps of optimizers that have sharded parameters."""


@functools.cache
def _watch_optimizers() -> None:
    """Have every optimizer of ``torch.optim`` report its steps; once in a process, and only when there is a use."""
    register_optimizer_step_post_hook(torch.compiler.disable(_count_step))


def _count_step(optimizer: torch.optim.Optimizer, *_: object) -> None:
    global _steps_of_shards
    sharded = False
    for group in optimizer.param_groups:
        for weight in group["params"]:
            if weight in _steps:
                _steps[weight] += 1
            sharded = sharded or type(weight).__name__ == "DTensor"  # not imported for that
    _steps_of_shards += sharded


@dataclasses.dataclass(frozen=True)
class StoredColumns:
    """One weight with a stored column mask."""

    weight: Tensor
    """The tensor that the optimizer updates."""
    values: Callable[[], Tensor]
    """``[N, K keep/group]`` from it."""
    pattern: Tensor
    column_mask: Tensor
    column_age: Tensor
    """int64 ``[1]`` on the CPU; -1 before the first training forward."""
    nm: Pattern
    interval: int

    def before_forward(self) -> None:
        """Count an optimizer step if there was one since the last call, and refresh when the interval is over.

        The first training forward picks too: the model may have been loaded, or trained elsewhere, in the meantime.
        """
        if self.weight.is_inference():  # not trained
            return
        _watch_optimizers()
        state = self._state()
        if _seen.get(self.column_age) == state:
            return
        age = int(self.column_age)
        if age < 0 or age + 1 >= self.interval:
            self.refresh()
        else:
            self.column_age.add_(1)
            _seen[self.column_age] = state

    @torch.no_grad()
    def refresh(self) -> None:
        """Pick the column mask anew from the values as they are, in place."""
        self.column_mask.copy_(ops.pick_columns(self.values(), self.pattern, self.nm.keep, self.nm.group))
        self.column_age.zero_()
        _seen[self.column_age] = self._state()

    def _state(self) -> tuple[int, int, int]:
        """Differs after every optimizer step.

        An optimizer that has shards does not have the weight that was gathered from them, and the other way round: a
        weight with steps of its own is not counted with other models' shards.
        """
        own = _steps.setdefault(self.weight, 0)
        return writing(self.weight)[0], own, 0 if own else _steps_of_shards


def before_training_forward(stored: Iterable[StoredColumns]) -> None:
    """What a compiled training function does first."""
    if torch.is_grad_enabled():
        for columns in stored:
            columns.before_forward()


def refresh_columns_(model: nn.Module) -> int:
    """Refresh every stored column mask of a prepared model or a transformed GraphModule; returns how many.

    Compiled models do this on their own, every ``column_refresh`` optimizer steps; this is for transformed graphs,
    where nothing counts steps, or to refresh at another time.

    Raises:
        ConversionError: the model is not prepared.
    """
    prepared = list(_prepared(model))
    if not prepared:
        raise ConversionError("refresh_columns_: the model has no sparse weight; sparsify_ or transform it first")
    stored = [columns for columns in prepared if columns is not None]
    for columns in stored:
        columns.refresh()
    return len(stored)


def _prepared(model: nn.Module) -> Iterator[StoredColumns | None]:
    """Each sparse weight of a model with its stored columns, None if it stores none."""
    for layer in linear_layers(model):
        sparse = layer.sparse
        if sparse is not None:
            yield _stored(
                layer.weight, sparse.pattern, sparse.column_mask, sparse.column_age, sparse.nm, sparse.interval
            )
    if isinstance(model, GraphModule):
        for region in regions(model):
            for node in region.graph.nodes:
                if node.op == "call_function" and node.target is ops.linear:
                    yield _stored_in_graph(model, region, node)


def _stored_in_graph(model: GraphModule, region: Region, product: Node) -> StoredColumns | None:
    def tensor(node: Node) -> Tensor:
        found = attribute(model, str(region.origin(node)[1].target))
        assert isinstance(found, Tensor)
        return found

    _, values, pattern, _, keep, group, _, columns = (*product.args, False, None)[:8]
    assert isinstance(values, Node) and isinstance(pattern, Node)
    assert isinstance(keep, int) and isinstance(group, int)
    if not isinstance(columns, Node):
        return None
    return _stored(tensor(values), tensor(pattern), tensor(columns), None, Pattern(keep, group), 0)


def _stored(
    values: Tensor,
    pattern: Tensor,
    column_mask: Tensor | None,
    column_age: Tensor | None,
    nm: Pattern,
    interval: int,
) -> StoredColumns | None:
    if column_mask is None:
        return None
    age = torch.zeros(1, dtype=torch.int64, device="cpu") if column_age is None else column_age
    return StoredColumns(values, values.detach, pattern, column_mask, age, nm, interval)
