"""Measured memory: the bytes of live storages, by what they are for."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from slope_compile._storage import storage_key
from slope_compile.errors import ConfigError
from slope_compile.graph_state import ADAPTER_A, ADAPTER_B, ADAPTER_SCALE, COLUMN_MASK, PATTERN, VALUES
from slope_compile.layers import linear_layers

Groups = dict[int, tuple[str, str]]
"""id of a tensor -> group (``linears``, ``adapters``, ``rest``) and kind (``weights``, ``metadata``, ...)."""


@dataclasses.dataclass(frozen=True)
class StateBytes:
    """Bytes of one group of tensors, each storage counted once."""

    weights: int = 0
    metadata: int = 0
    gradients: int = 0
    moments: int = 0
    """Optimizer state (also scalars such as step counts)."""

    @property
    def total(self) -> int:
        return self.weights + self.metadata + self.gradients + self.moments


@dataclasses.dataclass(frozen=True)
class TrainingState:
    """Where the training state of a model is."""

    linears: StateBytes
    """The weights of the linears in question: the sparse ones, or those at ``paths``."""
    adapters: StateBytes
    rest: StateBytes
    """Everything else: embeddings, norms, biases, heads, dense linears."""

    @property
    def total(self) -> int:
        return self.linears.total + self.adapters.total + self.rest.total


def training_state(
    model: nn.Module, optimizer: torch.optim.Optimizer | None = None, paths: Iterable[str] | None = None
) -> TrainingState:
    """Measure the bytes that weights, metadata, gradients and optimizer state hold at this moment.

    Call it between ``backward()`` and ``zero_grad()`` to see the gradients.  Activations are not part of it.

    Args:
        model: any module, also a transformed GraphModule.
        optimizer: whose state to count; None counts none.
        paths: module paths of the linears to count apart; default are the prepared ones.  Give the sparse paths of a
            report to measure the same linears of a dense model.

    Raises:
        ConfigError: ``paths`` names what is not a linear of the model.
    """
    wanted = None if paths is None else set(paths)
    groups, known = _groups_of_graph(model, wanted) if isinstance(model, GraphModule) else ({}, set())
    for layer in linear_layers(model):
        known.add(layer.path)
        if layer.low_rank is not None:
            groups |= {id(p): ("adapters", "weights") for p in layer.low_rank.parameters()}
        counts_apart = layer.sparse is not None if wanted is None else layer.path in wanted
        if counts_apart:
            groups[id(layer.weight)] = ("linears", "weights")
            if layer.sparse is not None:
                groups |= {id(b): ("linears", "metadata") for b in layer.sparse.buffers()}
    unknown = sorted((wanted or set()) - known)
    if unknown:
        names = ", ".join(map(repr, unknown))
        raise ConfigError(f"training_state: paths: no linear at {names}; the linears are: {_some(known)}")

    counted: dict[str, dict[str, int]] = {"linears": {}, "adapters": {}, "rest": {}}
    seen: set[int] = set()

    def count(item: object, group: str, kind: str) -> None:
        if isinstance(item, list | tuple | dict):  # L-BFGS keeps lists of tensors
            for part in item.values() if isinstance(item, dict) else item:
                count(part, group, kind)
        if not isinstance(item, Tensor):
            return
        key = storage_key(item)
        if key not in seen:
            seen.add(key)
            counted[group][kind] = counted[group].get(kind, 0) + item.untyped_storage().nbytes()

    state = optimizer.state if optimizer is not None else {}
    for tensor in [*model.parameters(), *model.buffers()]:
        group, kind = groups.get(id(tensor), ("rest", "weights"))
        count(tensor, group, kind)
        count(tensor.grad, group, "gradients")
        count(state.get(tensor), group, "moments")
    return TrainingState(**{group: StateBytes(**kinds) for group, kinds in counted.items()})


def _some(paths: set[str], most: int = 8) -> str:
    names = sorted(paths)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "") or "none"


def _groups_of_graph(module: GraphModule, wanted: set[str] | None) -> tuple[Groups, set[str]]:
    """The state of a transformed graph, by the names of ``graph_state``, and the paths of its linears."""
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    groups: Groups = {}
    known: set[str] = set()
    for name in tensors:
        prefix = name.removesuffix(VALUES)
        if prefix == name or prefix + PATTERN not in tensors:
            continue
        path = prefix.rpartition(".")[0] or prefix
        known.add(path)
        roles = {ADAPTER_A: ("adapters", "weights"), ADAPTER_B: ("adapters", "weights")}
        roles[ADAPTER_SCALE] = ("adapters", "metadata")
        if wanted is None or path in wanted:
            roles |= {VALUES: ("linears", "weights"), PATTERN: ("linears", "metadata")}
            roles[COLUMN_MASK] = ("linears", "metadata")
        groups |= {id(tensors[prefix + suffix]): role for suffix, role in roles.items() if prefix + suffix in tensors}
    return groups, known
