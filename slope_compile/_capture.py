"""A model's graphs before and after the passes, taken from Dynamo while the model runs as it was."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from slope_compile import _dynamo
from slope_compile.config import SlopeConfig
from slope_compile.dense_weights import DynamoWeights
from slope_compile.kernels import ops
from slope_compile.options import DEFAULT_FUSIONS
from slope_compile.passes.context import Context
from slope_compile.passes.decompose import Decompose
from slope_compile.passes.graph import Region, regions, value
from slope_compile.passes.normalize import LINEAR, Normalize, stays
from slope_compile.passes.pipeline import run_passes
from slope_compile.report import Decision, Reason

OPERATORS = (Reason.EXPERTS, Reason.FUSED_OPERATOR)
"""Reasons of decisions about operators that are no linears by themselves."""


@dataclasses.dataclass(frozen=True)
class Linear:
    """One decision, with what the graph knows about the linear."""

    decision: Decision
    tokens: tuple[Any, ...]
    """Sizes of the activations ``[..., K]``; SymInts where the graph has symbols."""
    dtype: torch.dtype
    device: torch.device
    state: tuple[Tensor, ...] = ()
    """Values, pattern and, if stored, column mask of a sparse one."""
    pruned: bool = False
    """Whether its product stays dense and reads the pruned weight."""


@dataclasses.dataclass(frozen=True)
class Captured:
    """One graph."""

    before: GraphModule
    normal: GraphModule
    """As before, each linear in one form."""
    after: GraphModule
    linears: tuple[Linear, ...]
    marks: dict[Node, int | None]
    """Node of ``normal`` or ``after`` that computes a linear -> position in ``linears``; None: a product of an
    adapter."""
    names: dict[str, str]
    """Graph input -> the model's name for it."""


def capture(model: nn.Module, args: Sequence[Any], kwargs: dict[str, Any], config: SlopeConfig) -> list[Captured]:
    """Run the model once under Dynamo and keep what the passes make of each of its graphs; what runs is the original.

    Frames that Dynamo compiles on their own after a graph break still count for the code that they run.
    """
    _dynamo.avoid_dangling_guards()
    found: list[Captured] = []

    def backend(module: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        for placeholder in module.graph.find_nodes(op="placeholder"):
            _dynamo.guard_module(placeholder)  # else one graph would do for all blocks after a graph break
        found.append(_rewrite(module, inputs, config))
        run: Callable[..., Any] = module.forward
        return run

    # Dynamo counts recompilations by code object, and the code of the forward is shared with the user's own model; so
    # what is compiled is a function of our own with a code object of this call, into which the forward is inlined.
    run = types.FunctionType(_call.__code__.replace(), globals())
    with _dynamo.unlimited_recompiles():
        torch.compile(run, backend=backend)(model, args, kwargs)
    return found


def _call(model: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    return model(*args, **kwargs)


def _rewrite(module: GraphModule, inputs: Sequence[Any], config: SlopeConfig) -> Captured:
    before, normal, after = (_dynamo.working_copy(module) for _ in range(3))
    _spell_out(normal, Context(config, DynamoWeights(normal, inputs, config), DEFAULT_FUSIONS))
    weights = DynamoWeights(after, inputs, config)
    _spell_out(after, Context(config, weights, DEFAULT_FUSIONS))
    sites = _linears(after)
    context = Context(config, weights, DEFAULT_FUSIONS)
    run_passes(after, context)  # without weights.commit(): nothing is pruned
    # Decisions stand in the order of the graph, products too, and what stays a dense linear keeps its node.
    operators = {n.name: (r, n) for r in regions(after) for n in r.graph.nodes}
    kept = {n for _, n in operators.values()}
    read = {weight.path: weight for weight in weights.read}
    products = iter([(r, n) for r in regions(after) for n in r.graph.nodes if _calls(n, ops.linear)])
    linears: list[Linear] = []
    marks: dict[Node, int | None] = {}
    positions: list[int] = []
    for position, decision in enumerate(context.report):
        if decision.reason in OPERATORS:
            region, node = operators[decision.node]
        else:
            region, node = sites[len(positions)]
            if decision.sparse and node not in kept:
                region, node = next(products)
            positions.append(position)
        marks[node] = position
        x = value(node.all_input_nodes[0])
        state: tuple[Tensor, ...] = ()
        pruned = decision.sparse and not _calls(node, ops.linear)
        if pruned:
            state = read[decision.weight].compressed()
        elif decision.sparse:
            parts = (node.args[1], node.args[2], node.args[7] if len(node.args) > 7 else None)
            state = tuple(_tensor(region, part, weights) for part in parts if isinstance(part, Node))
        linears.append(Linear(decision, tuple(x.shape), x.dtype, x.device, state, pruned))
    marks |= {node: None for _, node in _linears(after) if node not in marks}
    marks |= {node: position for position, (_, node) in zip(positions, _linears(normal), strict=True)}
    named = {one.decision.node: position for position, one in enumerate(linears) if one.decision.reason in OPERATORS}
    marks |= {n: named[n.name] for r in regions(normal) for n in r.graph.nodes if n.name in named}
    origins = {node.name: _dynamo.origin(node) for node in module.graph.find_nodes(op="placeholder")}
    names = {name: origin.name for name, origin in origins.items() if origin is not None}
    return Captured(before, normal, after, tuple(linears), marks, names)


def _spell_out(module: GraphModule, context: Context) -> None:
    """Each linear in one form."""
    for make in (Decompose, Normalize):
        make(context).call(module)


def _calls(node: Node, target: object) -> bool:
    return node.op == "call_function" and node.target is target


def _linears(module: GraphModule) -> list[tuple[Region, Node]]:
    """Those that *select* decides about, in its order."""
    return [
        (region, node)
        for region in regions(module)
        for node in region.graph.nodes
        if _calls(node, LINEAR) or stays(region, node)
    ]


def _tensor(region: Region, node: Node, weights: DynamoWeights) -> Tensor:
    """An input of the graph, or what ``slope.compress`` (of a transposed weight, too) makes of one."""
    home, node = region.origin(node)
    if node in weights.inputs:
        given = weights.inputs[node]
        assert isinstance(given, Tensor)
        return given.detach()
    assert callable(node.target)
    result = node.target(*(_tensor(home, a, weights) if isinstance(a, Node) else a for a in node.args))
    assert isinstance(result, Tensor)
    return result
