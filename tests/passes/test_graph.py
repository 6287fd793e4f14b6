"""The FX helpers: regions, what is brought into a body and taken out again, weight expressions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from graphs import checked_run, dynamo_graph, exported, lifted_inputs, nodes, weight_node
from slope_compile.kernels import ops
from slope_compile.passes.graph import (
    Region,
    attribute,
    emit,
    erase_unused,
    give_value,
    is_transpose,
    recompile,
    regions,
    replace,
    value,
    weight_expression,
    weight_source,
)

aten = torch.ops.aten


class Nested(nn.Module):
    """A linear in a body in a body: checkpointing inside a checkpointed block."""

    def __init__(self) -> None:
        super().__init__()
        self.outer, self.inner = nn.Linear(4, 4), nn.Linear(4, 4)

    def block(self, x: Tensor) -> Tensor:
        y = checkpoint(self.inner, self.outer(x), use_reentrant=False)
        assert isinstance(y, Tensor)
        return torch.tanh(y)

    def forward(self, x: Tensor) -> Tensor:
        y = checkpoint(self.block, x, use_reentrant=False)
        assert isinstance(y, Tensor)
        return y


@pytest.fixture
def nested() -> tuple[GraphModule, list[Tensor], list[Region]]:
    graph_module, inputs = dynamo_graph(Nested(), torch.randn(2, 4))
    return graph_module, inputs, regions(graph_module)


Captured = tuple[GraphModule, list[Tensor], list[Region]]


def test_regions_come_callers_first_and_are_bound(nested: Captured) -> None:
    graph_module, _, found = nested
    assert [region.parent for region in found] == [None, found[0], found[1]]
    assert all(region.entered and region.root is found[0] for region in found)
    weights = {}
    for region in found:
        for node in region.graph.nodes:
            if node.target is torch._C._nn.linear:
                home, source = region.origin(node.args[1])
                assert home is found[0]
                weights[str(source.target)] = region
    assert len(weights) == 2
    assert all(source in str(graph_module.graph) for source in weights)


def test_origin_of_a_node_that_is_no_placeholder_is_itself(nested: Captured) -> None:
    _, _, found = nested
    (linear,) = (n for n in found[2].graph.nodes if n.target is torch._C._nn.linear)
    assert found[2].origin(linear) == (found[2], linear)


def test_bring_through_two_calls_and_drop_again(nested: Captured) -> None:
    graph_module, inputs, found = nested
    expected = graph_module(*inputs)[0]
    x = next(n for n in found[0].graph.nodes if n.op == "placeholder")
    with found[0].graph.inserting_before(found[1].call):
        extra = emit(found[0].graph, aten.mul.Tensor, (x, 2.0), like=x)
    before = [str(region.graph) for region in found]
    local = found[2].bring(extra, found[0])
    assert local.op == "placeholder"
    assert value(local).shape == (2, 4)
    assert found[2].origin(local) == (found[0], extra)
    assert found[2].bring(extra, found[0]) is local, "brought once"
    recompile(found)
    torch.testing.assert_close(checked_run(graph_module, *inputs)[0], expected, rtol=0, atol=0)

    outer = found[2].drop(local)
    assert found[1].drop(outer) is extra
    assert [str(region.graph) for region in found] == before
    recompile(found)
    torch.testing.assert_close(checked_run(graph_module, *inputs)[0], expected, rtol=0, atol=0)


def test_drop_from_the_middle_keeps_the_other_operands(nested: Captured) -> None:
    graph_module, _, found = nested
    body = found[2]
    (linear,) = (n for n in body.graph.nodes if n.target is torch._C._nn.linear)
    weight = linear.args[1]
    others = {p: outer for p, outer in body.bindings.items() if p is not weight}
    linear.args = (linear.args[0], linear.args[0], linear.args[2])  # x @ x^T needs 4 rows
    outer = body.drop(weight)
    assert body.bindings == others
    assert outer not in body.call.args  # type: ignore[union-attr]
    fresh = regions(graph_module)[2]
    assert {p.name: o.name for p, o in fresh.bindings.items()} == {p.name: o.name for p, o in others.items()}


def test_body_that_is_called_twice_is_not_entered() -> None:
    body = GraphModule({}, _tanh_graph())
    graph = Graph()
    x = graph.placeholder("x")
    wrap = torch.ops.higher_order.tag_activation_checkpoint
    for _ in range(2):
        x = graph.call_function(wrap, (graph.get_attr("body"), x))
    graph.output(x)
    found = regions(GraphModule({"body": body}, graph))
    assert [region.entered for region in found] == [True, False]


def test_unknown_operator_is_not_entered() -> None:
    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,))
            assert isinstance(y, Tensor)
            return y

    graph_module = exported(Branches(), torch.randn(3)).graph_module
    assert [region.entered for region in regions(graph_module)] == [True, False, False]


def _tanh_graph() -> Graph:
    graph = Graph()
    graph.output(graph.call_function(torch.tanh, (graph.placeholder("x"),)))
    return graph


def test_attribute() -> None:
    module = nn.Sequential(nn.Linear(2, 3))
    assert attribute(module, "0.weight") is module[0].weight
    assert attribute(module, "1.weight") is None


def test_emit_takes_the_dtype_of_what_it_replaces() -> None:
    """Under autocast a product's result does not have its operands' dtype, and fake evaluation ignores autocast."""

    class Autocast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                y: Tensor = self.linear(x)
            return y

    program = exported(Autocast(), torch.randn(2, 4))
    graph_module = program.graph_module
    (linear,) = nodes(graph_module, aten.linear.default)
    with linear.graph.inserting_before(linear):
        again = emit(linear.graph, aten.linear.default, linear.args, like=linear)
    assert value(again).dtype == torch.bfloat16
    assert again.meta["nn_module_stack"] == linear.meta["nn_module_stack"]
    replace(linear, again)
    checked_run(graph_module, *lifted_inputs(program, torch.randn(2, 4)))


def test_emit_without_values_makes_none() -> None:
    graph = Graph()
    x = graph.placeholder("x")
    node = emit(graph, torch.tanh, (x,), like=x)
    assert value(node) is None


TRANSPOSES: dict[str, tuple[Callable[[Graph, Node], Node], bool]] = {
    "method_t": (lambda g, w: g.call_method("t", (w,)), True),
    "getattr_T": (lambda g, w: g.call_function(getattr, (w, "T")), True),
    "getattr_mT": (lambda g, w: g.call_function(getattr, (w, "mT")), True),
    "aten_numpy_T": (lambda g, w: g.call_function(aten.numpy_T.default, (w,)), True),
    "aten_mT": (lambda g, w: g.call_function(aten.mT.default, (w,)), True),
    "aten_t": (lambda g, w: g.call_function(aten.t.default, (w,)), True),
    "transpose_0_1": (lambda g, w: g.call_method("transpose", (w, 0, 1)), True),
    "transpose_1_0": (lambda g, w: g.call_method("transpose", (w, 1, 0)), True),
    "transpose_negative": (lambda g, w: g.call_function(torch.transpose, (w, -1, -2)), True),
    "transpose_same": (lambda g, w: g.call_method("transpose", (w, 1, 1)), False),
    "transpose_same_negative": (lambda g, w: g.call_method("transpose", (w, 1, -1)), False),
    "transpose_of_three": (lambda g, w: g.call_method("transpose", (w, 1, 2)), False),
    "aten_swapaxes": (lambda g, w: g.call_function(aten.swapaxes.default, (w, 0, 1)), True),
    "permute_list": (lambda g, w: g.call_function(aten.permute.default, (w, [1, 0])), True),
    "permute_numbers": (lambda g, w: g.call_method("permute", (w, 1, 0)), True),
    "permute_negative": (lambda g, w: g.call_function(torch.permute, (w, (-1, -2))), True),
    "permute_identity": (lambda g, w: g.call_function(torch.permute, (w, (0, 1))), False),
    "permute_identity_method": (lambda g, w: g.call_method("permute", (w, 0, 1)), False),
    "permute_three": (lambda g, w: g.call_function(torch.permute, (w, (0, 2, 1))), False),
    "getattr_H": (lambda g, w: g.call_function(getattr, (w, "H")), False),
    "adjoint": (lambda g, w: g.call_method("adjoint", (w,)), False),
    "placeholder": (lambda g, w: w, False),
}


@pytest.mark.parametrize(
    ("build", "expected"), [pytest.param(*case, id=name) for name, case in TRANSPOSES.items()]
)
def test_is_transpose(build: Callable[[Graph, Node], Node], expected: bool) -> None:
    graph = Graph()
    assert is_transpose(build(graph, graph.placeholder("w"))) is expected


@pytest.mark.parametrize(
    ("transposed", "weight_flips", "factor_flips"),
    [
        pytest.param(False, 0, 0, id="linear"),
        pytest.param(True, 0, 1, id="conv1d"),
        pytest.param(False, 2, 0, id="linear_base_flipped_twice"),
        pytest.param(True, 1, 1, id="conv1d_base_flipped"),
    ],
)
@pytest.mark.parametrize("scale", [pytest.param(None, id="scale_1"), pytest.param(0.25, id="scale_quarter")])
def test_weight_expression_means_what_it_computes(
    transposed: bool, weight_flips: int, factor_flips: int, scale: float | None
) -> None:
    N, K, R = 6, 4, 2
    A, B = torch.randn(R, K), torch.randn(N, R)
    stored = torch.randn(K, N) if transposed != bool(weight_flips % 2) else torch.randn(N, K)

    def forward(stored: Tensor, A: Tensor, B: Tensor, x: Tensor) -> Tensor:
        base = stored
        for _ in range(weight_flips):
            base = base.t()
        factors = (A.t(), B.t()) if factor_flips else (B, A)
        weight = torch.addmm(base, *factors, alpha=1 if scale is None else scale)
        return F.linear(x, weight.t() if transposed else weight)

    x = torch.randn(3, K)
    graph_module, inputs = dynamo_graph(forward, stored, A, B, x)
    (linear,) = nodes(graph_module, torch._C._nn.linear)
    expression = weight_expression(weight_node(linear))
    assert expression.low_rank
    assert expression.scale == (1.0 if scale is None else scale)
    tensors = dict(zip([n for n in graph_module.graph.nodes if n.op == "placeholder"], inputs, strict=True))
    assert expression.A is not None
    assert expression.B is not None
    base = tensors[expression.base]
    rebuilt = (base.t() if expression.transposed else base) + expression.scale * tensors[expression.B] @ tensors[
        expression.A
    ]
    torch.testing.assert_close(x @ rebuilt.t(), forward(stored, A, B, x))


NOT_ADAPTERS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "beta": lambda w, A, B: torch.addmm(w, B, A, beta=2),
    "factor_of_another_orientation": lambda w, A, B: torch.addmm(w, B, A.t()),
    "sum_of_a_product": lambda w, A, B: w * 2 + B @ A,
    "base_is_computed": lambda w, A, B: torch.addmm(w * 2, B, A),
}


@pytest.mark.parametrize("weight", [pytest.param(f, id=name) for name, f in NOT_ADAPTERS.items()])
def test_what_is_not_an_adapter_is_the_base(weight: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    def forward(x: Tensor, w: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return F.linear(x, weight(w, A, B))

    square = [torch.randn(4, 4) for _ in range(4)]
    graph_module, _ = dynamo_graph(forward, *square)
    (linear,) = nodes(graph_module, torch._C._nn.linear)
    expression = weight_expression(weight_node(linear))
    assert not expression.low_rank
    assert expression.base is linear.args[1]


def test_expression_is_read_through_a_call() -> None:
    """A property of a Parameter (``w.T``) is read outside the body by Dynamo, the product inside."""

    def inside(x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight.t())

    def forward(x: Tensor, w: Tensor, A: Tensor, B: Tensor) -> Tensor:
        y = checkpoint(inside, x, torch.addmm(w, B, A).t(), use_reentrant=False)
        assert isinstance(y, Tensor)
        return y

    inputs = torch.randn(3, 4), torch.randn(6, 4), torch.randn(2, 4), torch.randn(6, 2)
    graph_module, _ = dynamo_graph(forward, *inputs)
    root, body = regions(graph_module)
    (linear,) = nodes(graph_module, torch._C._nn.linear)
    home, expression = weight_source(body, weight_node(linear))
    assert home is root
    assert expression.low_rank
    assert not expression.transposed
    assert value(expression.B).shape == (6, 2)  # type: ignore[arg-type]


def test_erase_unused_removes_weight_expressions_only() -> None:
    def forward(x: Tensor, values: Tensor, pattern: Tensor) -> Tensor:
        weight: Tensor = ops.expand(values, pattern, 2, 4).t()
        x.add_(1)
        return weight + 0

    graph_module, _ = dynamo_graph(
        forward, torch.randn(2), torch.randn(4, 2), torch.full((4, 1), 5, dtype=torch.uint8)
    )
    (root,) = regions(graph_module)
    transpose = next(n for n in root.graph.nodes if is_transpose(n))
    erase_unused(root, transpose)
    assert len(nodes(graph_module, ops.expand)) == 1, "it is read, so it stays"
    add = next(iter(transpose.users))
    add.replace_all_uses_with(next(n for n in root.graph.nodes if n.op == "placeholder"))
    root.graph.erase_node(add)
    erase_unused(root, transpose)
    assert not nodes(graph_module, ops.expand)
    assert [n.target for n in root.graph.nodes if n.op == "call_method"] == ["add_"], "in-place calls stay"
    assert len([n for n in root.graph.nodes if n.op == "placeholder"]) == 3, "inputs of the root stay"


@pytest.mark.parametrize("key", ["example_value", "val"])
def test_a_new_node_gets_a_fake_value_like_another(key: str) -> None:
    graph = Graph()
    like, new, plain = (graph.placeholder(name) for name in ("like", "new", "plain"))
    mode = FakeTensorMode()
    like.meta[key] = mode.from_tensor(torch.randn(2, 3))
    give_value(new, torch.ones(4, 5, dtype=torch.uint8), like)
    assert new.meta.keys() == {key}
    assert new.meta[key].fake_mode is mode
    assert (new.meta[key].shape, new.meta[key].dtype) == ((4, 5), torch.uint8)
    give_value(like, torch.ones(1), plain)
    assert like.meta[key].shape == (2, 3)
