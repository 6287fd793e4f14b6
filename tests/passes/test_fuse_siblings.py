"""fuse_siblings: sparse products of one activation become one, and compute what they did."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.nn import functional as F

import slope_compile as slope
from graphs import ALL, Siblings, attribute_graph, checked_run, context, nodes, rows
from recording import compiled_way, every_way, record
from recording import fresh_dynamo as fresh_dynamo
from slope_compile.config import SlopeConfig
from slope_compile.kernels import ops
from slope_compile.passes.fuse_siblings import pays
from slope_compile.passes.pipeline import FUSIONS, run_passes
from tolerances import assert_same

MANY = 64
"""Tokens for which joining three products of width 8 pays."""


def config(**fields: Any) -> SlopeConfig:
    """The configuration of graphs so small that every linear would be a first one or a head."""
    return SlopeConfig(**{**ALL, **fields})


def run_all(graph_module: GraphModule, **fields: Any) -> slope.Report:
    within = context(graph_module, **fields)
    within.fusions = frozenset(FUSIONS)
    run_passes(graph_module, within)
    return within.report


@pytest.mark.parametrize("form", ["prepared", "dense"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"pattern": "1:2"},
        {"backward": "double_pruned", "column_refresh": "backward"},
        {"backward": "double_pruned", "column_refresh": "never"},
        {"pattern": "1:4", "backward": "double_pruned", "column_refresh": "never"},
    ],
)
def test_three_products_become_one(form: str, fields: dict[str, Any]) -> None:
    module, x = Siblings(), rows(MANY, 8)
    if form == "prepared":
        slope.sparsify_(module, config(**fields))
    graph_module = attribute_graph(module, x)
    if form == "prepared":
        assert run_all(graph_module, **fields).changes["fuse_siblings"] == 1
        assert_same(checked_run(graph_module, x), module(x))
    else:
        graph_module = slope.transform(graph_module, config(**fields), fusions=FUSIONS)
        apart = slope.transform(attribute_graph(module, x), config(**fields), fusions=())
        assert len(nodes(apart, ops.linear)) == 4
        assert_same(checked_run(graph_module, x), checked_run(apart, x))
    assert sorted(value.shape[0] for value in products(graph_module)) == [8, 24]


def products(graph_module: GraphModule) -> list[Tensor]:
    """The fake values of the products' weights."""
    return [node.args[1].meta["val"] for node in nodes(graph_module, ops.linear)]  # type: ignore[union-attr]


class Mixed(nn.Module):
    """Siblings of several kinds: with bias and without, of another pattern, and of another activation."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"a": 8, "b": 16, "other": 8, "c": 24, "plain": 8}
        self.layers = nn.ModuleDict(
            {name: nn.Linear(16, N, bias=name != "plain", dtype=torch.float64) for name, N in sizes.items()}
        )

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([self.layers[name](x) for name in ("a", "b", "other", "plain")], -1)
        z: Tensor = self.layers["c"](torch.tanh(x))
        return torch.cat([y, z], -1)


def test_only_what_is_alike_is_joined() -> None:
    module, x = Mixed(), rows(MANY, 16)
    slope.sparsify_(module, config(overrides=(slope.Override(path=r".*\.other", pattern="1:4"),)))
    graph_module = attribute_graph(module, x)
    report = run_all(graph_module)
    assert report.changes["fuse_siblings"] == 1
    assert sorted(value.shape[0] for value in products(graph_module)) == [8, 8, 24, 24]
    assert_same(checked_run(graph_module, x), module(x))


class Rows(nn.Module):
    """Siblings with these numbers of rows."""

    def __init__(self, *rows: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(12, N, dtype=torch.float64) for N in rows)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([layer(x) for layer in self.layers], -1)


def test_stored_columns_are_joined_row_by_row() -> None:
    """Numbers of rows that fill no byte, six bits a row, and columns other than would be picked now."""
    module, x = Rows(4, 12, 4), rows(MANY, 12).requires_grad_()
    slope.sparsify_(module, config(backward="double_pruned", column_refresh="never"))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter))
    results = []
    for fusions in (FUSIONS, ("fuse",)):
        graph_module = attribute_graph(module, x)
        within = context(graph_module)
        within.fusions = frozenset(fusions)
        run_passes(graph_module, within)
        columns = [node.args[7] for node in nodes(graph_module, ops.linear)]
        assert len(columns) == (1 if fusions == FUSIONS else 3)
        assert all(isinstance(node, Node) for node in columns)
        y = checked_run(graph_module, x)
        assert_same(y, module(x))
        wanted = {"x": x, **dict(graph_module.named_parameters())}
        gradients = torch.autograd.grad(y, list(wanted.values()), torch.cos(y.detach()))
        results.append(dict(zip(wanted, gradients, strict=True)))
    together, apart = results
    assert together.keys() == apart.keys()
    for name, gradient in apart.items():
        assert_same(together[name], gradient, name)


@pytest.mark.parametrize("double_pruned", [True, False])
def test_no_group_of_rows_is_made_of_two_siblings(double_pruned: bool) -> None:
    """Six rows have no groups of four; twelve would have, and the second pruning would go across both."""

    class Products(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.values = nn.ParameterList(rows(6, 4) for _ in range(2))
            self.register_buffer("pattern", torch.full((6, 1), 0x33, dtype=torch.uint8))

        def forward(self, x: Tensor) -> Tensor:
            products = (ops.linear(x, v, self.pattern, None, 2, 4, double_pruned) for v in self.values)
            return torch.cat(list(products), -1)

    graph_module = attribute_graph(Products(), rows(MANY, 8))
    run_all(graph_module)
    assert len(nodes(graph_module, ops.linear)) == (2 if double_pruned else 1)


def test_few_tokens_and_symbols_stay_apart() -> None:
    module = Siblings()
    slope.sparsify_(module, config())
    graph_module = attribute_graph(module, rows(4, 8))
    assert run_all(graph_module).changes["fuse_siblings"] == 0
    assert len(nodes(graph_module, ops.linear)) == 4
    batch = torch.export.Dim("batch", max=4096)
    program = torch.export.export(Siblings(), (rows(MANY, 8),), dynamic_shapes={"x": {0: batch}})
    dynamic = slope.transform(program, config(), fusions=FUSIONS)
    assert len(nodes(dynamic.graph_module, ops.linear)) == 4


def test_the_rule_counts_bytes() -> None:
    # Three products of 8 rows in float32, per in_feature: 2 x 4 M bytes are saved, 2 x 24 x 2.125 are copied.
    assert not pays(12, 24, 4, 3)
    assert pays(13, 24, 4, 3)


@pytest.mark.parametrize("refresh", ["backward", 2])
@every_way
def test_training_is_the_same(way: str, refresh: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs and every gradient equal those of the graph with the fusion switched off."""
    recording = record(monkeypatch)
    dense, x = Siblings(), rows(MANY, 8)
    fields = {**ALL, "backward": "double_pruned", "column_refresh": refresh}
    results = []
    choices: tuple[dict[str, Any], ...] = ({"fusions": ["fuse", "fuse_siblings"]}, {})
    for options in choices:
        torch._dynamo.reset()
        if way == "A":
            model, run = compiled_way("A", dense, fields={**fields, **options})
        else:
            model, run = compiled_way("B", dense, fields=fields, options=options)
        y = run(x)
        F.mse_loss(y, torch.zeros_like(y), reduction="sum").backward()
        results.append((y.detach(), {n: p.grad for n, p in model.named_parameters()}))
    assert [graph.sparse for graph in recording] == [2, 4]
    (together, gradients), (apart, expected) = results
    assert_same(together, apart)
    for name, gradient in expected.items():
        assert gradient is not None
        found = gradients[name]
        assert found is not None
        assert_same(found, gradient, name)


def test_a_wrong_name_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(slope.ConfigError, match="'fuse_sibling' is no fusion; did you mean 'fuse_siblings'"):
        slope.transform(attribute_graph(Siblings(), rows(4, 8)), config(), fusions=["fuse_sibling"])
