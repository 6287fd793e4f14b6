"""sparsify: selected linears become products with compressed weights, in every kind of graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.utils.checkpoint import checkpoint

import slope_compile as slope
from graphs import (
    ALL,
    Chain,
    Parameters,
    attribute_graph,
    checked_run,
    context,
    dynamo_graph,
    exported,
    nodes,
    rows,
)
from problems import column_mask, kept
from slope_compile.config import SlopeConfig
from slope_compile.dense_weights import DynamoWeights
from slope_compile.kernels import ops
from slope_compile.options import EXPORT_FUSIONS
from slope_compile.passes.context import ColumnSite, Context, Selection
from slope_compile.passes.graph import META, is_expand
from slope_compile.passes.normalize import LINEAR, Normalize
from slope_compile.passes.select import Select
from slope_compile.passes.sparsify import Sparsify
from slope_compile.pattern import Pattern
from tolerances import assert_same

N, K = 16, 8

FIELDS: dict[str, Any] = dict(ALL)


def selected(graph_module: GraphModule, within: Context) -> Context:
    """Everything that comes before the pass under test, adapters apart."""
    Normalize(within)(graph_module)
    Select(within)(graph_module)
    return within


def sparsified(graph_module: GraphModule, **fields: Any) -> Context:
    """The pass on a graph whose weights are attributes."""
    within = selected(graph_module, context(graph_module, **fields))
    Sparsify(within)(graph_module)
    return within


def in_dynamo(function: Callable[..., Any], *inputs: Any, **fields: Any) -> tuple[GraphModule, list[Any], Context]:
    """The pass on a graph from Dynamo; the inputs include those that were added."""
    config = SlopeConfig(**{**ALL, **fields})
    done = []

    def work(graph_module: GraphModule, real: list[Any]) -> None:
        weights = DynamoWeights(graph_module, real, config)
        within = selected(graph_module, Context(config, weights, EXPORT_FUSIONS))
        Sparsify(within)(graph_module)
        weights.commit(prepared=False)
        done.append((within, [get() for get in weights.extra]))

    graph_module, real = dynamo_graph(function, *inputs, work=work)
    within, extra = done[0]
    return graph_module, [*real, *extra], within


def mask_of(pattern: Tensor, columns: int) -> Tensor:
    """bool ``[N, K]`` from the documented bits."""
    return torch.stack([(pattern[:, k // 8] >> (k % 8)) & 1 for k in range(columns)], dim=1).bool()


def product_of(graph_module: GraphModule) -> Node:
    (product,) = nodes(graph_module, ops.linear)
    return product


def stored(graph_module: GraphModule, node: Any) -> Tensor:
    """The tensor behind an attribute node."""
    assert isinstance(node, Node)
    assert node.op == "get_attr"
    tensor = dict(graph_module.named_parameters()) | dict(graph_module.named_buffers())
    return tensor[str(node.target)]


# --- dense weights ---------------------------------------------------------------------------------------------------

SPELLINGS: dict[str, tuple[Callable[..., Tensor], tuple[int, int]]] = {
    "linear": (lambda x, w, b: nn.functional.linear(x, w, b), (N, K)),
    "conv1d": (lambda x, w, b: torch.addmm(b, x, w), (K, N)),
    "transposed_twice": (lambda x, w, b: x @ w.t().t() + b, (K, N)),
}
POLICIES: dict[str, tuple[dict[str, Any], bool, bool]] = {
    "exact": ({"backward": "exact"}, False, False),
    "each_backward": ({"backward": "double_pruned", "column_refresh": "backward"}, True, False),
    "never": ({"backward": "double_pruned", "column_refresh": "never"}, True, True),
    "every_20_steps": ({"backward": "double_pruned", "column_refresh": 20}, True, True),
}
"""Fields of SlopeConfig, whether the product is double-pruned, whether it reads a stored column mask."""


@pytest.mark.parametrize("policy", list(POLICIES))
@pytest.mark.parametrize("spelling", list(SPELLINGS))
@pytest.mark.parametrize("pattern", ["2:4", "1:2"])
def test_dense_weight(pattern: str, spelling: str, policy: str) -> None:
    """Node by node, and forward and all gradients against products with hand-made masks."""
    function, shape = SPELLINGS[spelling]
    fields, double_pruned, stores = POLICIES[policy]
    nm = Pattern.parse(pattern)
    module, x = Parameters(function, *shape), rows(5, K).requires_grad_()
    graph_module = attribute_graph(module, x)
    within = sparsified(graph_module, pattern=pattern, **fields)
    assert within.report.changes["sparsify"] == 1
    assert not nodes(graph_module, LINEAR)

    product = product_of(graph_module)
    assert product.args[4:7] == (nm.keep, nm.group, double_pruned)
    assert (product.args[7] is not None) is stores
    values, mask = stored(graph_module, product.args[1]), mask_of(stored(graph_module, product.args[2]), K)
    dense = module.w.detach() if shape == (N, K) else module.w.detach().t()
    assert torch.equal(mask.view(N, -1, nm.group).sum(-1), torch.full((N, K // nm.group), nm.keep))
    assert torch.equal(values, kept(dense, mask))

    masked = dense * mask
    columns = column_mask(masked, nm) if double_pruned else torch.ones_like(mask)
    if stores:  # one bit per value
        picked = mask_of(stored(graph_module, product.args[7]), values.shape[1])
        assert torch.equal(picked, kept(columns, mask))
    result, grad = checked_run(graph_module, x), rows(5, N)
    assert_same(result, x @ masked.t() + module.b)
    result.backward(grad)
    assert x.grad is not None
    assert_same(x.grad, grad @ (masked * columns))
    assert values.grad is not None
    assert_same(values.grad, kept(grad.t() @ x.detach(), mask))
    bias = dict(graph_module.named_parameters())["b"].grad
    assert bias is not None
    assert_same(bias, grad.sum(0))


def test_rows_that_do_not_divide_keep_the_exact_gradient() -> None:
    graph_module = attribute_graph(nn.Linear(8, 6), torch.randn(3, 8))
    sparsified(graph_module, backward="double_pruned", column_refresh=20)
    assert product_of(graph_module).args[4:8] == (2, 4, False, None)


def test_overrides_by_path() -> None:
    override = slope.Override(path=r"layers\.1", pattern="2:8", backward="double_pruned", column_refresh="backward")
    graph_module = attribute_graph(Chain(8, 16, 8), rows(3, 8))
    sparsified(graph_module, overrides=(override,))
    first, second = nodes(graph_module, ops.linear)
    assert first.args[4:7] == (2, 4, False)
    assert second.args[4:7] == (2, 8, True)


# --- prepared weights ------------------------------------------------------------------------------------------------


def prepared_chain(**fields: Any) -> nn.Module:
    module = Chain(8, 16, 8)
    slope.sparsify_(module, SlopeConfig(**{**ALL, **fields}))
    return module


@pytest.mark.parametrize("policy", list(POLICIES))
def test_prepared_weight(policy: str) -> None:
    """The product reads what was stored, and nothing dense-shaped is left in the graph."""
    fields, double_pruned, stores = POLICIES[policy]
    module, x = prepared_chain(**fields), rows(3, 8)
    expected = module(x)
    graph_module = attribute_graph(module, x)
    before = {id(t) for t in graph_module.state_dict(keep_vars=True).values()}
    within = sparsified(graph_module)
    assert within.report.changes["sparsify"] == 2
    assert not nodes(graph_module, LINEAR)
    assert not [n for n in graph_module.graph.nodes if is_expand(n)]
    state = graph_module.state_dict(keep_vars=True)
    assert {id(t) for t in state.values()} == before, "no weight was made anew"
    for i, product in enumerate(nodes(graph_module, ops.linear)):
        prefix = f"layers.{i}.parametrizations.weight"
        tensors = [product.args[1], product.args[2], product.args[7]]
        names = [f"{prefix}.original", f"{prefix}.0.pattern", f"{prefix}.0.column_mask" if stores else None]
        assert [str(n.target) if isinstance(n, Node) else None for n in tensors] == names
        assert product.args[6] is double_pruned
    assert_same(checked_run(graph_module, x), expected)


def test_stored_columns_with_an_interval_are_reported() -> None:
    """Only those: whoever runs the graph has to refresh them."""
    for policy, (fields, _, _) in POLICIES.items():
        graph_module = attribute_graph(prepared_chain(**fields), rows(3, 8))
        sites = sparsified(graph_module).columns
        if policy != "every_20_steps":
            assert sites == []
            continue
        products = nodes(graph_module, ops.linear)
        read = [(site.values, site.pattern, site.column_mask) for site in sites]
        assert read == [(p.args[1], p.args[2], p.args[7]) for p in products]
        assert [(site.nm, site.interval) for site in sites] == [(Pattern(2, 4), 20)] * 2
        assert all(str(site.column_age.target).endswith("column_age") for site in sites)


# --- bodies of higher-order operators --------------------------------------------------------------------------------


def inside(module: nn.Module) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        y = checkpoint(module, x, use_reentrant=False)
        assert isinstance(y, Tensor)
        return y

    return forward


@pytest.mark.parametrize("policy", list(POLICIES))
@pytest.mark.parametrize("prepared", [pytest.param(False, id="dense"), pytest.param(True, id="prepared")])
def test_inside_a_checkpointed_body(prepared: bool, policy: str) -> None:
    fields, _, stores = POLICIES[policy]
    module, x = prepared_chain(**fields) if prepared else Chain(8, 16, 8), rows(3, 8)
    forward = inside(module)
    graph_module, inputs, within = in_dynamo(forward, x, **fields)
    assert within.report.changes["sparsify"] == 2
    products = nodes(graph_module, ops.linear)
    assert all(n.graph is not graph_module.graph for n in products), "the products stay in the body"
    assert [isinstance(n.args[7], Node) for n in products] == [stores, stores]
    assert len(nodes(graph_module, ops.compress)) == (0 if prepared else 2)
    assert not nodes(graph_module, ops.expand)
    for site in within.columns:
        assert all(n.graph is graph_module.graph for n in _nodes_of(site)), "named as inputs of the whole graph"
    assert len(within.columns) == (2 if prepared and policy == "every_20_steps" else 0)
    # A dense module has been pruned in place by now, so that its own forward is the truth.
    assert_same(checked_run(graph_module, *inputs)[0], module(x))


def _nodes_of(site: ColumnSite) -> list[Node]:
    return [site.values, site.pattern, site.column_mask, site.column_age]


@pytest.mark.parametrize("prepared", [pytest.param(False, id="dense"), pytest.param(True, id="prepared")])
def test_transposed_on_both_sides_of_a_call(prepared: bool) -> None:
    """The weight is transposed before a checkpointed function and again in it."""
    module = nn.Linear(K, N, dtype=torch.float64)
    if prepared:
        slope.sparsify_(module, SlopeConfig(**FIELDS))

    def forward(x: Tensor) -> Tensor:
        y = checkpoint(lambda x, w: x @ w.t().t(), x, module.weight.t(), use_reentrant=False)
        assert isinstance(y, Tensor)
        return y

    x = rows(5, K)
    graph_module, inputs, within = in_dynamo(forward, x)
    assert within.report.changes["sparsify"] == 1
    assert not nodes(graph_module, ops.expand)
    masked = module.weight.detach()
    assert float((masked == 0).double().mean()) == 0.5
    assert_same(checked_run(graph_module, *inputs)[0], x @ masked.t())


# --- alone, on any graph ---------------------------------------------------------------------------------------------


def by_hand() -> tuple[GraphModule, Node]:
    """A graph without metadata that no other pass has seen: a linear with a note of selection on it."""
    module = nn.Module()
    module.register_parameter("w", nn.Parameter(rows(N, K)))
    graph = Graph()
    x, w = graph.placeholder("x"), graph.get_attr("w")
    linear = graph.call_function(LINEAR, (x, w, None))
    graph.output(linear)
    return GraphModule(module, graph), linear


def test_graph_that_no_other_pass_has_seen() -> None:
    graph_module, linear = by_hand()
    linear.meta[META] = Selection(path="w")
    dense = graph_module.get_parameter("w").detach().clone()
    within = context(graph_module)
    result = Sparsify(within)(graph_module)
    assert result is not None
    assert result.modified
    mask = mask_of(stored(graph_module, product_of(graph_module).args[2]), K)
    x = rows(2, 3, K)
    assert_same(checked_run(graph_module, x), x @ (dense * mask).t())


def test_linear_that_was_not_selected_is_left_alone() -> None:
    graph_module, _ = by_hand()
    before = str(graph_module.graph)
    within = context(graph_module)
    result = Sparsify(within)(graph_module)
    assert result is not None
    assert not result.modified
    assert within.report.changes == {"sparsify": 0}
    assert str(graph_module.graph) == before


def test_second_run_changes_nothing() -> None:
    graph_module = attribute_graph(Chain(8, 16, 8), rows(3, 8))
    sparsified(graph_module)
    before = str(graph_module.graph)
    within = context(graph_module)
    result = Sparsify(within)(graph_module)
    assert result is not None
    assert not result.modified
    assert within.report.changes == {"sparsify": 0}
    assert str(graph_module.graph) == before


def test_provenance_and_other_readers_are_kept() -> None:
    """The product says where it came from; a weight that something else reads too stays in the graph."""
    module = prepared_chain()

    class Penalised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.chain = module

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            layer = self.chain.get_submodule("layers.0")
            weight = layer.weight
            assert isinstance(weight, Tensor)
            return torch.nn.functional.linear(x, weight), weight.square().sum()

    penalised, x = Penalised(), rows(3, 8)
    graph_module = attribute_graph(penalised, x)
    within = selected(graph_module, context(graph_module))
    traces = [n.meta["stack_trace"] for n in nodes(graph_module, LINEAR)]
    Sparsify(within)(graph_module)
    assert [n.meta["stack_trace"] for n in nodes(graph_module, ops.linear)] == traces
    assert len(nodes(graph_module, ops.expand)) == 1
    for result, expected in zip(checked_run(graph_module, x), penalised(x), strict=True):
        assert_same(result, expected)


def test_graph_of_an_exported_program_keeps_symbolic_sizes() -> None:
    """The number of rows stays free: the graph computes with another one than it was traced with."""
    module = prepared_chain()
    batch = torch.export.Dim("batch")
    program = exported(module, rows(3, 8), dynamic_shapes={"x": {0: batch}})
    graph_module = program.module()
    assert isinstance(graph_module, GraphModule)
    sparsified(graph_module)
    assert all(isinstance(n.meta["val"].shape[0], torch.SymInt) for n in nodes(graph_module, ops.linear))
    graph_module.recompile()
    x = rows(7, 8)
    assert_same(graph_module(x), module(x))
