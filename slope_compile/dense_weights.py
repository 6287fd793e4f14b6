"""Way in A: weights of a dense model, as inputs of a graph from Dynamo.

The weights stay dense-shaped Parameters.  When a graph that reads one is compiled for the first time, its pattern is
chosen, remembered beside the Parameter, and the weight is pruned in place.  The graph then reads
``slope.compress(weight, pattern)``; the gradient comes back expanded, zero at the pruned positions, so that an
elementwise optimizer with momentum and decay keeps them at zero.

A graph without gradients and with few tokens reads the pruned weight itself.  Before such a graph runs, a weight that
has been written to since (its version counter tells) is looked at, and pruned again where something else was loaded.
Writing through ``weight.data`` raises no counter: a dense state that was loaded that way runs dense there.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.utils.weak import WeakTensorKeyDictionary

from slope_compile import _dynamo
from slope_compile.columns import StoredColumns
from slope_compile.config import LayerConfig, SlopeConfig
from slope_compile.kernels import ops
from slope_compile.kernels.masks import choose_mask
from slope_compile.kernels.metadata import pack_mask, unpack_mask
from slope_compile.layers import decide, linear_layers
from slope_compile.log import log
from slope_compile.passes.graph import VALUE_KEYS, emit
from slope_compile.passes.weights import CompressedWeight
from slope_compile.pattern import Pattern
from slope_compile.report import Decision, Reason
from slope_compile.rules import is_router, plain_path


@dataclasses.dataclass
class DenseState:
    """What is remembered about a dense weight, for as long as the Parameter lives."""

    nm: Pattern
    pattern: Tensor
    column_mask: Tensor | None = None
    column_age: Tensor | None = None
    version: int = -1
    """Of the weight when it was last seen pruned."""


@dataclasses.dataclass(frozen=True)
class PrunedWeight:
    """A weight that a compiled graph reads as it lies there, and that has to be pruned therefore."""

    weight: Tensor
    state: DenseState
    transposed: bool
    path: str

    def compressed(self) -> tuple[Tensor, Tensor]:
        """Values and pattern."""
        dense = self.weight.detach()
        dense = dense.t() if self.transposed else dense
        return ops.compress(dense, self.state.pattern, self.state.nm.keep, self.state.nm.group), self.state.pattern

    @torch.no_grad()
    def before_call(self) -> None:
        """Prune the weight again if something that is not pruned was written to it."""
        if self.weight._version == self.state.version:
            return
        values, _ = self.compressed()
        # Writing only where it is needed: a backward that is still to come may have saved the weight.
        if int(self.weight.count_nonzero()) != int(values.count_nonzero()):
            log.info("backend 'slope' prunes %s again, in place: something was written to it", self.path)
            self.weight.copy_(_masked(self.weight, self.state, self.transposed))
        self.state.version = self.weight._version


_states = WeakTensorKeyDictionary()
"""Parameter -> DenseState, by identity.  So recompiles (a new shape, adapters on) find the same pattern, even where a
kept weight has become exactly 0."""

_warned: weakref.WeakKeyDictionary[nn.Module, SlopeConfig] = weakref.WeakKeyDictionary()
"""Model -> the configuration about which :func:`_warn` has said its word."""


class DynamoWeights:
    """The weights of one graph from Dynamo; implements ``passes.weights.WeightStore``."""

    def __init__(self, module: GraphModule, inputs: Sequence[Any], config: SlopeConfig) -> None:
        self.graph = module.graph
        self.config = config
        self.placeholders = [n for n in self.graph.nodes if n.op == "placeholder"]
        self.inputs = dict(zip(self.placeholders, inputs, strict=True))
        self.extra: list[Tensor] = []
        """Tensors for the placeholders that were added, in order."""
        self.stored: list[StoredColumns] = []
        self.read: list[PrunedWeight] = []
        """Weights that the graph reads dense."""
        self._prune: list[tuple[Tensor, DenseState, str, bool]] = []
        self._models: dict[nn.Module, tuple[nn.Module, str]] = {}
        self._rulings: dict[nn.Module, dict[str, Decision]] = {}
        self._judged: list[Node] = []
        self._named: list[Node] = []
        self._settled = True
        """Whether ``sparsify_`` has decided on all that was judged."""

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
        if origin is None or origin.root is None:
            self._settled = False
            return None
        if origin.root not in self._rulings:
            self._rulings[origin.root] = self._decide(origin.root)
        return self._rulings[origin.root].get(origin.layer)

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

    def _decide(self, model: nn.Module) -> dict[str, Decision]:
        decisions = [decision for _, decision in decide(model, self.config, adapters_stay=True)]
        if any(layer.sparse for layer in linear_layers(model)):
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
        self.read.append(PrunedWeight(weight, state, transposed, self.path(node)))
        return True

    def compressed(self, node: Node, layer: LayerConfig, transposed: bool, before: Node) -> CompressedWeight:
        weight = self.inputs[node]
        state = self._state(node, layer, transposed)
        rows = weight.shape[1] if transposed else weight.shape[0]
        stores_columns = layer.stores_columns and rows % layer.pattern.group == 0
        keep, group = layer.pattern.keep, layer.pattern.group

        def values() -> Tensor:
            dense = weight.detach()
            compressed: Tensor = ops.compress(dense.t() if transposed else dense, state.pattern, keep, group)
            return compressed

        if stores_columns and state.column_mask is None:
            masked = _masked(weight.detach(), state, transposed)
            first = ops.compress(masked.t() if transposed else masked, state.pattern, keep, group)
            state.column_mask = ops.pick_columns(first, state.pattern, keep, group)
            state.column_age = torch.full((1,), -1, dtype=torch.int64, device="cpu")
        pattern = self._input(node, "pattern", state.pattern)
        with self.graph.inserting_before(before):
            dense = emit(self.graph, torch.ops.aten.t.default, (node,), like=node) if transposed else node
            compressed = emit(self.graph, ops.compress, (dense, pattern, keep, group), like=node)
        columns = None
        if stores_columns:
            assert state.column_mask is not None and state.column_age is not None
            columns = self._input(node, "column_mask", state.column_mask)
            if layer.interval:
                self.stored.append(
                    StoredColumns(
                        weight, values, state.pattern, state.column_mask, state.column_age,
                        layer.pattern, layer.interval,
                    )
                )  # fmt: skip
        return CompressedWeight(compressed, pattern, columns)

    def commit(self, prepared: bool) -> int:
        """Prune the weights whose pattern was chosen in this run, in place, and remember the patterns.

        The graph is bound to the parameters that were judged by their place in the model.  It is not where
        ``sparsify_`` has decided already and the graph has prepared weights, whose class Dynamo checks: one graph does
        for all blocks that are alike, and another model's are not.

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
        for weight, state, _, transposed in self._prune:
            # What was made in inference mode may be written to there only.
            with torch.inference_mode(weight.is_inference()), torch.no_grad():
                weight.copy_(_masked(weight, state, transposed))
            _states[weight] = state
            if not weight.is_inference():
                state.version = weight._version
        if self._prune:
            names = [path for _, _, path, _ in self._prune]
            log.warning(
                "backend 'slope' pruned %d weights of a dense model in place (first: %s, last: %s); they stay "
                "dense-shaped. slope_compile.sparsify_ stores them compressed instead.",
                len(names), names[0], names[-1],
            )  # fmt: skip
        return len(self._prune)

    def _state(self, node: Node, layer: LayerConfig, transposed: bool) -> DenseState:
        """What is remembered about a weight; its pattern is chosen if none is, or if another is asked for."""
        weight = self.inputs[node]
        state: DenseState | None = _states.get(weight)
        if state is None or state.nm != layer.pattern:
            state = self._choose(weight, layer, transposed, self.path(node))
        return state

    def _choose(self, weight: Tensor, layer: LayerConfig, transposed: bool, path: str) -> DenseState:
        dense = weight.detach()
        dense = (dense.t() if transposed else dense).contiguous()
        mask = choose_mask(dense, layer.pattern, layer.mask, layer.seed, path)
        state = DenseState(layer.pattern, pack_mask(mask))
        self._prune.append((weight, state, path, transposed))
        return state

    def _input(self, node: Node, suffix: str, tensor: Tensor) -> Node:
        """Add a graph input that the compiled function passes on its own."""
        with self.graph.inserting_after(self.placeholders[-1]):
            placeholder = self.graph.placeholder(f"slope_{len(self.extra)}_{suffix}")
        _dynamo.mark_added_input(placeholder)
        self.placeholders.append(placeholder)
        self.inputs[placeholder] = tensor
        self.extra.append(tensor)
        mode = getattr(node.meta.get(VALUE_KEYS[0]), "fake_mode", None)
        if mode is not None:
            placeholder.meta[VALUE_KEYS[0]] = mode.from_tensor(tensor, static_shapes=True)
        return placeholder


def _masked(weight: Tensor, state: DenseState, transposed: bool) -> Tensor:
    K = weight.shape[0] if transposed else weight.shape[1]
    mask = unpack_mask(state.pattern, K)
    return weight.detach().masked_fill(~(mask.t() if transposed else mask), 0)


def _warn(model: nn.Module, config: SlopeConfig, decisions: Sequence[Decision]) -> None:
    """Say, once for a model and a configuration, what its author cannot have meant."""
    if _warned.get(model) == config:
        return
    _warned[model] = config
    for rule in config.unused([d.weight for d in decisions]):
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
    """For a model that ``sparsify_`` has prepared: what it left dense, the user wants dense."""
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
