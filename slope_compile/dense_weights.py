"""Way in A: weights of a dense model, as inputs of a graph from Dynamo.

The weights stay dense-shaped Parameters.  When a graph that reads one is compiled for the first time, its pattern is
chosen, remembered beside the Parameter, and the weight is pruned in place.  The graph then reads
``slope.compress(weight, pattern)``; the gradient comes back expanded, zero at the pruned positions, so that an
elementwise optimizer with momentum and decay keeps them at zero (``pruned_weights`` handles the other cases).

A graph without gradients and with few tokens reads the pruned weight itself.  If the version counter of the weight has
changed since the last call, the weight is checked before the graph runs, and pruned again if it has lost its pattern.
Writing through ``weight.data`` does not change the counter: a dense state that was loaded that way runs dense there.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from slope_compile import _dynamo
from slope_compile.columns import StoredColumns
from slope_compile.config import LayerConfig, SlopeConfig
from slope_compile.distributed import is_sharded
from slope_compile.errors import ConfigError
from slope_compile.kernels import ops
from slope_compile.layers import decide, linear_layers
from slope_compile.log import log
from slope_compile.parametrizations import choose_pattern
from slope_compile.passes.graph import emit, give_value, regions
from slope_compile.passes.weights import CompressedWeight
from slope_compile.pruned_weights import DenseState, PrunedWeight, prune, state_of
from slope_compile.report import Decision, Reason
from slope_compile.rules import is_router, layer_path, plain_path

_warned: weakref.WeakKeyDictionary[nn.Module, SlopeConfig] = weakref.WeakKeyDictionary()
"""Model -> the configuration that :func:`_warn` has warned about."""


UNPREPARED = "its graph has weights that were made sparse beforehand, and this one was not among them"


class DynamoWeights:
    """The weights of one graph from Dynamo; implements ``passes.weights.WeightStore``."""

    def __init__(self, module: GraphModule, inputs: Sequence[Any], config: SlopeConfig) -> None:
        self.graph = module.graph
        self.config = config
        self.placeholders = [n for n in self.graph.nodes if n.op == "placeholder"]
        given = zip(self.placeholders, inputs, strict=True)
        self.inputs = {placeholder: _dynamo.parameter_behind(placeholder, value) for placeholder, value in given}
        self.extra: list[Callable[[], Tensor]] = []
        """Tensors for the placeholders that were added, in order; the model may move between two calls."""
        self.stored: list[Callable[[], StoredColumns]] = []
        self.read: list[PrunedWeight] = []
        """Weights that the graph reads dense."""
        self.states: list[tuple[Tensor, DenseState, str]] = []
        """Weights that the graph compresses, with their paths in this model."""
        self._prune: list[tuple[Tensor, DenseState, nn.Module | None]] = []
        self._models: dict[nn.Module, tuple[nn.Module, str]] = {}
        self._rulings: dict[nn.Module, dict[str, Decision]] = {}
        self._prepared: dict[nn.Module, bool] = {}
        self._judged: list[Node] = []
        self._named: list[Node] = []
        self._settled = True
        """Whether ``sparsify_`` has decided on all that was judged."""
        calls = (node.target for region in regions(module) for node in region.graph.nodes)
        self._among_prepared = any(target in (ops.expand, ops.linear) for target in calls)
        """Whether the graph has weights that ``sparsify_`` or ``transform`` made sparse."""

    def tensor(self, node: Node) -> Tensor | None:
        value = self.inputs.get(node)
        return value if isinstance(value, nn.Parameter) and _dynamo.is_real(value) else None

    def path(self, node: Node) -> str:
        self._named.append(node)
        origin = self._origin(node)
        return origin.layer if origin is not None else str(node)

    def ruling(self, node: Node) -> Decision | None:
        self._judged.append(node)
        origin = self._origin(node)
        model = None if origin is None else origin.root
        prepared = model is not None and self._is_prepared(model)
        if model is not None and model not in self._rulings and (prepared or not self._among_prepared):
            self._rulings[model] = self._decide(model)
        if origin is not None and model in self._rulings and origin.layer in self._rulings[model]:
            return self._rulings[model][origin.layer]
        if prepared or self._among_prepared:
            # Adapters of a transformed graph, what was left dense there, a teacher beside a prepared model: what
            # becomes sparse has been chosen, and these were not.
            return Decision(self.path(node), False, Reason.EXCLUDED, tuple(self.inputs[node].shape), detail=UNPREPARED)
        if model is None:
            self._settled = False
        return None

    def owned(self, node: Node) -> bool:
        origin = self._origin(node)
        return origin is None or origin.root is None or origin.layer != origin.name

    def router(self, node: Node) -> bool:
        origin = self._origin(node)
        if origin is None or origin.root is None:
            return False
        return is_router(origin.layer, (plain_path(name) for name, _ in origin.root.named_modules()))

    def _origin(self, node: Node) -> _dynamo.Origin | None:
        """Relative to the whole model, also where Dynamo compiles a block of it."""
        origin = _dynamo.origin(node)
        if origin is None or origin.root is None:
            return origin
        if origin.root not in self._models:
            self._models[origin.root] = _dynamo.model_of(origin.root)
        model, path = self._models[origin.root]
        return _dynamo.Origin(model, f"{path}.{origin.name}" if path else origin.name)

    def _is_prepared(self, model: nn.Module) -> bool:
        if model not in self._prepared:
            self._prepared[model] = any(layer.sparse for layer in linear_layers(model))
        return self._prepared[model]

    def _decide(self, model: nn.Module) -> dict[str, Decision]:
        decisions = [decision for _, decision in decide(model, self.config, adapters_stay=True)]
        if self._is_prepared(model):
            decisions = [_settled(decision) for decision in decisions]
        else:
            self._settled = False
            _warn(model, self.config, decisions)
        return {decision.weight: decision for decision in decisions}

    def pruned(self, node: Node, layer: LayerConfig, transposed: bool) -> bool:
        weight = self.inputs[node]
        if weight.is_inference():  # has no version counter
            return False
        state = self._state(node, layer, transposed)
        self.read.append(PrunedWeight(weight, state, self.path(node)))
        return True

    def compressed(self, node: Node, layer: LayerConfig, transposed: bool, before: Node) -> CompressedWeight:
        weight = self.inputs[node]
        state = self._state(node, layer, transposed)
        stores_columns = layer.stores_columns_for(weight.shape[1] if transposed else weight.shape[0])
        keep, group = layer.pattern.keep, layer.pattern.group

        if stores_columns and state.column_mask is None:
            first = state.values(weight)
            state.column_mask = ops.pick_columns(first, state.pattern, keep, group)
            state.column_age = torch.full((1,), -1, dtype=torch.int64, device="cpu")
        self.states.append((weight, state, self.path(node)))
        pattern = self._input(node, "pattern", lambda: state.pattern)
        with self.graph.inserting_before(before):
            dense = emit(self.graph, torch.ops.aten.t.default, (node,), like=node) if transposed else node
            compressed = emit(self.graph, ops.compress, (dense, pattern, keep, group), like=node)
        columns = None
        if stores_columns:
            columns = self._input(node, "column_mask", lambda: _there(state.column_mask))
            if layer.interval:
                self.stored.append(lambda: _stored(weight, state, layer))
        return CompressedWeight(compressed, pattern, columns)

    def commit(self, prepared: bool) -> int:
        """Prune the weights whose pattern was chosen in this run, in place, and remember the patterns.

        Dynamo guards on every parameter judged by its module path.  No guard is added when ``sparsify_`` made all
        decisions: Dynamo already guards on the prepared class, so identical blocks share a graph.

        Args:
            prepared: whether the graph has weights that ``sparsify_`` prepared.

        Returns:
            How many were pruned.
        """
        if not (prepared and self._settled):
            for node in self._judged:
                _dynamo.guard_parameter(node)
            for node in self._named:
                _dynamo.guard_module(node)
        for weight, state, model in self._prune:
            prune(weight, state, model)
        if self._prune:
            names = [state.path for _, state, _ in self._prune]
            log.warning(
                "backend 'slope' pruned %d weights of a dense model in place (first: %s, last: %s); they stay "
                "dense-shaped. slope_compile.sparsify_ stores them compressed instead.",
                len(names), names[0], names[-1],
            )  # fmt: skip
        return len(self._prune)

    def _state(self, node: Node, layer: LayerConfig, transposed: bool) -> DenseState:
        """What is remembered about a weight; its pattern is chosen if none is, or if another is asked for."""
        weight, path = self.inputs[node], self.path(node)
        origin = self._origin(node)
        model = None if origin is None else origin.root
        state = state_of(weight, layer.pattern, model, path)
        if state is None:
            if model is not None and is_sharded(model):
                raise ConfigError(
                    f"backend 'slope': {path!r} is dense and sharded by fully_shard, and pruning what is gathered for "
                    "a forward does not reach the shards; sparsify_ the model first, then fully_shard and compile it"
                )
            pattern = choose_pattern(weight, layer, transposed, path)
            state = DenseState(path, layer.pattern, transposed, pattern)
            self._prune.append((weight, state, model))
        return state

    def _input(self, node: Node, suffix: str, get: Callable[[], Tensor]) -> Node:
        """Add a graph input that the compiled function passes on its own."""
        tensor = get()
        with self.graph.inserting_after(self.placeholders[-1]):
            placeholder = self.graph.placeholder(f"slope_{len(self.extra)}_{suffix}")
        _dynamo.mark_added_input(placeholder)
        self.placeholders.append(placeholder)
        self.inputs[placeholder] = tensor
        self.extra.append(get)
        give_value(placeholder, tensor, like=node)
        return placeholder


def _there(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


def _stored(weight: Tensor, state: DenseState, layer: LayerConfig) -> StoredColumns:
    return StoredColumns(
        weight, lambda: state.values(weight), state.pattern, _there(state.column_mask), _there(state.column_age),
        layer.pattern, layer.interval,
    )  # fmt: skip


def _warn(model: nn.Module, config: SlopeConfig, decisions: Sequence[Decision]) -> None:
    """Warn, once for a model and a configuration, about settings that have no effect on the model."""
    if _warned.get(model) == config:
        return
    _warned[model] = config
    others = [layer_path(name) for name, weight in model.named_parameters() if weight.dim() == 2]
    for rule in config.unused([*(d.weight for d in decisions), *others]):
        log.warning("backend 'slope': %s matches no linear layer of %s", rule, type(model).__name__)
    with_rank = next((d.weight for d in decisions if d.sparse and config.layer(d.weight).adapter_rank), None)
    if with_rank is not None:
        log.warning(
            "backend 'slope': adapter_rank = %d (first: %s) has no effect on a dense %s; adapters need "
            "slope_compile.sparsify_ before the model is compiled",
            config.layer(with_rank).adapter_rank, with_rank, type(model).__name__,
        )  # fmt: skip
    if not any(d.sparse for d in decisions):
        reasons = "\n".join(f"  {d.weight or 'the model'}: {d.why}" for d in decisions)
        log.warning("backend 'slope': %s runs dense, no linear layer is eligible:\n%s", type(model).__name__, reasons)


def _settled(decision: Decision) -> Decision:
    """The decision for a prepared model: a layer that ``sparsify_`` left dense stays dense."""
    if not decision.sparse:
        return decision
    return dataclasses.replace(
        decision,
        sparse=False,
        reason=Reason.EXCLUDED,
        pattern="",
        backward="",
        detail="sparsify_ left it dense",
    )
