"""select: one graph for each reason, and a decision for every linear."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, symbolic_trace
from torch.nn import functional as F

from graphs import Chain, Siblings, attribute_graph, context, dynamo_graph, nodes, rows
from slope_compile.config import Override, SlopeConfig
from slope_compile.dense_weights import DynamoWeights
from slope_compile.options import EXPORT_FUSIONS
from slope_compile.passes.context import Context, Selection
from slope_compile.passes.graph import META
from slope_compile.passes.normalize import LINEAR, Normalize
from slope_compile.passes.select import Select
from slope_compile.report import Reason, Report
from slope_compile.sparsify import sparsify_
from toy import Toy, token_ids, toy

FLOAT = torch.float64


def linear(K: int, N: int, **more: Any) -> nn.Linear:
    return nn.Linear(K, N, dtype=FLOAT, **more)


class Layers(nn.Module):
    """Named layers and the function that runs them."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


class Tied(nn.Module):
    """An output projection that reads the embedding's table."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(12, 8, dtype=FLOAT)
        self.middle = linear(8, 8)
        self.project = linear(8, 12, bias=False)
        self.project.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.project(self.middle(self.table(ids)))
        return y


class SharedWeight(nn.Module):
    """Two layers with one Parameter, and one layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.twice, self.own = (linear(8, 8) for _ in range(4))
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.own(self.twice(torch.tanh(self.twice(self.b(self.a(x))))))
        return y


class Buffer(nn.Module):
    """A weight that is not trained."""

    weight: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", rows(8, 8))
        self.other = linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.other(F.linear(x, self.weight))
        return y


class Branches(nn.Module):
    """A linear in a body that passes do not enter."""

    def __init__(self) -> None:
        super().__init__()
        self.outside, self.inside = linear(8, 8), linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        def yes(y: Tensor) -> Tensor:
            z: Tensor = self.inside(y)
            return z

        y = self.outside(x)
        y = torch.cond(y.sum() > 0, yes, torch.sin, (y,))
        assert isinstance(y, Tensor)
        return y


class Ids(nn.Module):
    """Embedding, two linears; ``project`` makes one feature per token id."""

    def __init__(self, last: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(12, 8, dtype=FLOAT)
        self.project = linear(8, 12)
        self.after = linear(12, 8)
        self.last = last

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.project(self.table(ids))
        return y if self.last else self.after(y)


@dataclasses.dataclass(frozen=True)
class Case:
    """A module, its input, the fields of the configuration, and the reason of each linear by its weight's path."""

    module: Callable[[], nn.Module]
    x: Callable[[], Tensor]
    fields: dict[str, Any]
    expected: dict[str, Reason]
    detail: str = ""
    """Part of the detail of the first linear that is not simply selected."""


def x8() -> Tensor:
    return rows(3, 8)


def ids() -> Tensor:
    return torch.arange(5)


S, METHOD = Reason.SELECTED, {"first_dense": True, "heads_dense": True}

CASES = {
    "all_selected": Case(lambda: Chain(8, 8, 8), x8, {}, {"layers.0": S, "layers.1": S}),
    "tied_to_an_embedding": Case(
        Tied, ids, {}, {"middle": S, "project": Reason.TIED}, detail="also read by"
    ),
    "first": Case(
        lambda: Chain(8, 8, 8, 8), x8, {"first_dense": True},
        {"layers.0": Reason.FIRST, "layers.1": S, "layers.2": S},
    ),
    "first_with_its_siblings": Case(
        Siblings, x8, {"first_dense": True},
        {"q": Reason.FIRST, "k": Reason.FIRST, "v": Reason.FIRST, "out": S},
    ),
    "head_by_name": Case(
        lambda: Layers(lambda m, x: m.b(m.lm_head(m.a(x))), a=linear(8, 8), lm_head=linear(8, 8), b=linear(8, 8)),
        x8, {"heads_dense": True}, {"a": S, "lm_head": Reason.HEAD, "b": Reason.HEAD},
    ),
    "head_by_vocabulary": Case(
        lambda: Ids(last=False), ids, {"heads_dense": True}, {"project": Reason.HEAD, "after": Reason.HEAD}
    ),
    "head_as_last": Case(
        lambda: Layers(lambda m, x: m.second(m.one(x)), one=linear(8, 8), second=linear(8, 8)),
        x8, {"heads_dense": True}, {"one": S, "second": Reason.HEAD},
    ),
    "last_in_a_block_is_no_head": Case(
        lambda: nn.Sequential(nn.Sequential(linear(8, 8), nn.Tanh()), nn.Sequential(linear(8, 8))),
        x8, {"heads_dense": True}, {"0.0": S, "1.0": S},
    ),
    "K_does_not_divide": Case(
        lambda: Layers(lambda m, x: m.b(m.a(x)), a=linear(8, 6), b=linear(6, 8)),
        x8, {}, {"a": S, "b": Reason.SHAPE}, detail="K = 6 is not a positive multiple of 4",
    ),
    "K_divides_by_4_but_not_by_8": Case(
        lambda: Layers(lambda m, x: m.b(m.a(x)), a=linear(8, 12), b=linear(12, 8)),
        x8, {"overrides": (Override(path="b", pattern="2:8"),)}, {"a": S, "b": Reason.SHAPE},
        detail="K = 12 is not a positive multiple of 8",
    ),
    "N_does_not_divide": Case(
        lambda: linear(8, 6), x8, {"backward": "double_pruned"}, {"weight": S},
        detail="exact backward, as N = 6 is not a multiple of 4",
    ),
    "excluded": Case(
        lambda: Chain(8, 8, 8), x8, {"exclude": (r"layers\.1",)}, {"layers.0": S, "layers.1": Reason.EXCLUDED}
    ),
    "not_included": Case(
        lambda: Chain(8, 8, 8), x8, {"include": (r".*\.0",)}, {"layers.0": S, "layers.1": Reason.EXCLUDED}
    ),
    "computed_weight": Case(
        lambda: Layers(lambda m, x: F.linear(m.b(x), m.a.weight * 2), a=linear(8, 8), b=linear(8, 8)),
        x8, {}, {"mul": Reason.COMPUTED, "b": S},
    ),
    "buffer": Case(Buffer, x8, {}, {"weight": Reason.COMPUTED, "other": S}),
    "dtype": Case(
        lambda: Layers(lambda m, x: m.a(x), a=nn.Linear(8, 8, dtype=torch.complex64)),
        lambda: torch.randn(3, 8, dtype=torch.complex64), {}, {"a": Reason.DTYPE}, detail="torch.complex64",
    ),
    "higher_order": Case(
        Branches, x8, {}, {"outside": S, "p_inside_weight": Reason.HIGHER_ORDER}, detail="cond"
    ),
    "whole_method": Case(
        Toy, token_ids, METHOD,
        {f"blocks.{i}.{n}": S for i in (0, 1) for n in ("qkv", "out", "up", "down")}
        | {"blocks.0.qkv": Reason.FIRST, "head": Reason.HEAD},
    ),
}  # fmt: skip


def decided(module: nn.Module, x: Tensor, **fields: Any) -> Report:
    graph_module = attribute_graph(module, x)
    within = context(graph_module, **fields)
    Normalize(within)(graph_module)
    before = str(graph_module.graph)
    Select(within)(graph_module)
    assert str(graph_module.graph) == before, "select changes nothing"
    report = within.report
    chosen = [n for n in nodes(graph_module, LINEAR) if isinstance(n.meta.get(META), Selection)]
    assert [n.meta[META].path for n in chosen] == [d.weight for d in report.sparse]
    assert [n.name for n in chosen] == [d.node for d in report.sparse]
    assert report.changes["select"] == len(chosen)
    every_linear = nodes(graph_module, LINEAR)
    assert sorted(n.name for n in every_linear) == sorted(d.node for d in report), "each has one decision"
    return report


@pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in CASES.items()])
def test_reason(case: Case) -> None:
    report = decided(case.module(), case.x(), **case.fields)
    assert {decision.weight: decision.reason for decision in report} == case.expected
    assert all(decision.sparse == (decision.reason is S) for decision in report)
    if case.detail:
        assert any(case.detail in decision.detail for decision in report), str(report)


def test_shared_weight_and_shared_module() -> None:
    report = decided(SharedWeight(), x8())
    assert [d.reason for d in report] == [Reason.SHARED] * 4 + [S]
    assert all("also read by linear" in d.detail for d in report.dense)


def test_symbolic_trace_knows_tied_and_shared_weights() -> None:
    """There an embedding is a call of a module, and each call of a layer reads its weight by a node of its own."""
    for module, expected in (
        (Tied(), [S, Reason.TIED]),
        (SharedWeight(), [Reason.SHARED] * 4 + [S]),
    ):
        graph_module = symbolic_trace(module)
        within = context(graph_module)
        Normalize(within)(graph_module)
        Select(within)(graph_module)
        assert [d.reason for d in within.report] == expected


def test_symbolic_trace_knows_the_vocabulary() -> None:
    graph_module = symbolic_trace(Ids(last=False))
    within = context(graph_module, heads_dense=True)
    Normalize(within)(graph_module)
    Select(within)(graph_module)
    assert {d.weight: d.reason for d in within.report} == {"project": Reason.HEAD, "after": Reason.HEAD}


def test_a_batch_of_token_ids_is_no_vocabulary() -> None:
    """Ids ``[8, 3]`` come before the table in the call of an embedding; 8 rows say nothing of a linear with N = 8."""
    module = Layers(
        lambda m, ids: m.after(m.middle(m.table(ids))),
        table=nn.Embedding(12, 8, dtype=FLOAT),
        middle=linear(8, 8),
        after=linear(8, 8),
    )
    report = decided(module, torch.randint(0, 12, (8, 3)), heads_dense=True)
    assert {d.weight: d.reason for d in report} == {"middle": S, "after": Reason.HEAD}


def test_details_of_a_selected_linear() -> None:
    report = decided(
        linear(8, 12), x8(), pattern="2:8", backward="double_pruned", overrides=(Override(path="x"),)
    )
    (decision,) = report
    assert decision.shape == (12, 8)
    assert decision.pattern == "2:8"
    assert decision.backward == "exact"
    assert "N = 12 is not a multiple of 8" in decision.detail


def test_transposed_weight_has_its_shape_the_right_way_round() -> None:
    class Conv1D(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(rows(8, 6))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight

    (decision,) = decided(Conv1D(), x8(), backward="double_pruned")
    assert decision.shape == (6, 8)
    assert decision.backward == "exact"


def in_dynamo(function: Callable[..., Any], *inputs: Any, **fields: Any) -> Report:
    """The decisions about the graph that the backend gets for a function."""
    config = SlopeConfig(**fields)
    reports = []

    def decide(graph_module: GraphModule, real: list[Any]) -> None:
        within = Context(config, DynamoWeights(graph_module, real, config), EXPORT_FUSIONS)
        Normalize(within)(graph_module)
        Select(within)(graph_module)
        reports.append(within.report)

    dynamo_graph(function, *inputs, work=decide)
    return reports[0]


def test_plain_tensor_input_is_no_weight() -> None:
    report = in_dynamo(F.linear, x8(), rows(8, 8), first_dense=False, heads_dense=False)
    assert [d.reason for d in report] == [Reason.NOT_CONSTANT]


def test_linear_by_name_in_a_body_of_dynamo_is_reported() -> None:
    """Nothing is normalised in a body that is left alone; its linear has a decision all the same."""
    reasons = [d.reason for d in in_dynamo(Branches(), x8(), first_dense=False, heads_dense=False)]
    assert sorted(r.name for r in reasons) == ["HIGHER_ORDER", "SELECTED"]


def test_partial_graph_does_not_make_its_first_linear_the_first() -> None:
    """The graph of one block, with the whole model at hand: rules by module path decide, not the dataflow."""
    model = toy()

    class Rest(nn.Module):
        """What is left of the model after a graph break."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            down, block = self.model.blocks[0].down, self.model.blocks[1]
            assert isinstance(down, nn.Module)
            y: Tensor = block(down(x))
            return y

    report = in_dynamo(Rest(), rows(2, 5, 32))
    assert {d.reason for d in report} == {S}
    assert len(report) == 5


def test_partial_graph_without_a_model_goes_by_the_dataflow() -> None:
    report = decided(Siblings(), x8(), first_dense=True, heads_dense=True)
    assert [d.reason for d in report] == [Reason.FIRST] * 3 + [Reason.HEAD]


def test_prepared_weights_are_selected_whatever_the_configuration_says() -> None:
    model = Chain(8, 8, 8)
    sparsify_(model, SlopeConfig(first_dense=False, heads_dense=False, backward="exact"))
    report = decided(model, x8(), first_dense=True, heads_dense=True, exclude=(".*",))
    assert [d.reason for d in report] == [Reason.PREPARED] * 2
    assert all(d.shape == (8, 8) and d.pattern == "2:4" and d.backward == "exact" for d in report)
    assert [d.weight for d in report] == ["layers.0", "layers.1"]


class Bare(nn.Module):
    """Scores against a table look like a linear; a matrix called ``weight`` is taken for the weight of one."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.last = nn.Linear(8, 8), nn.Linear(8, 8)
        self.table, self.scores = nn.Parameter(torch.randn(8, 8)), nn.Module()
        self.scores.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.inner(x)) @ self.table.T
        y: Tensor = self.last(torch.einsum("bk,nk->bn", x, cast("Tensor", self.scores.weight)))
        return y


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, Reason.BARE),
        ({"include": ("table|last",)}, Reason.SELECTED),
        ({"include": ("last",)}, Reason.EXCLUDED),
        ({"exclude": ("table",)}, Reason.EXCLUDED),
    ],
)
def test_a_bare_product_is_a_linear_where_it_is_named(fields: dict[str, Any], reason: Reason) -> None:
    model = Bare()
    report = in_dynamo(model, torch.randn(2, 8), first_dense=False, heads_dense=False, **fields)
    assert {d.weight: d.reason for d in report}["table"] is reason
    if not fields:
        assert {d.weight for d in report if d.sparse} == {"inner", "scores", "last"}
