"""normalize: every promised spelling becomes ``aten.linear``, what only looks like one stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import GraphModule, Node, symbolic_trace
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from graphs import Parameters, attribute_graph, checked_run, context, dynamo_graph, exported, nodes, rows
from recording import DENSE_PRODUCTS, targets
from slope_compile.config import SlopeConfig
from slope_compile.dense_weights import DynamoWeights
from slope_compile.kernels import ops
from slope_compile.options import EXPORT_FUSIONS
from slope_compile.passes.context import Context
from slope_compile.passes.graph import is_transpose
from slope_compile.passes.normalize import LINEAR, Normalize
from slope_compile.passes.select import Select
from slope_compile.report import Reason

N, K = 16, 8

NK: dict[str, Callable[..., Tensor]] = {
    "functional": lambda x, w, b: F.linear(x, w, b),
    "functional_no_bias": lambda x, w, b: F.linear(x, w),
    "functional_keywords": lambda x, w, b: F.linear(input=x, weight=w, bias=b),
    "aten": lambda x, w, b: torch.ops.aten.linear.default(x, w, b),
    "aten_no_bias": lambda x, w, b: torch.ops.aten.linear.default(x, w),
    "at_T": lambda x, w, b: x @ w.T,
    "at_mT": lambda x, w, b: x @ w.mT,
    "at_t": lambda x, w, b: x @ w.t(),
    "torch_t": lambda x, w, b: x @ torch.t(w),
    "matmul_transpose": lambda x, w, b: torch.matmul(x, w.transpose(0, 1)),
    "matmul_transpose_negative": lambda x, w, b: torch.matmul(x, w.transpose(-1, -2)),
    "matmul_torch_transpose": lambda x, w, b: torch.matmul(x, torch.transpose(w, 1, 0)),
    "matmul_method": lambda x, w, b: x.matmul(w.swapaxes(0, 1)),
    "matmul_permute": lambda x, w, b: x @ w.permute(1, 0),
    "matmul_torch_permute": lambda x, w, b: x @ torch.permute(w, (-1, 0)),
    "twice_transposed": lambda x, w, b: F.linear(x, w.t().t(), b),
    "matmul_thrice_transposed": lambda x, w, b: x @ w.t().T.permute(1, 0),
    "einsum_nk": lambda x, w, b: torch.einsum("...k,nk->...n", x, w),
    "einsum_letters": lambda x, w, b: torch.einsum("b t k, n k -> b t n", x, w),
}
"""Spellings with the weight as ``[N, K]``, of activations ``[2, 3, K]``."""

KN: dict[str, Callable[..., Tensor]] = {
    "at": lambda x, w, b: x @ w,
    "matmul": lambda x, w, b: torch.matmul(x, w),
    "einsum_kn": lambda x, w, b: torch.einsum("bti,io->bto", x, w),
    "functional_t": lambda x, w, b: F.linear(x, w.t(), b),
    "conv1d": lambda x, w, b: torch.addmm(b, x.view(-1, x.size(-1)), w).view(*x.shape[:-1], N),
    "mm": lambda x, w, b: torch.mm(x.flatten(0, 1), w),
}
"""Spellings with the weight as ``[K, N]``."""

NK_2D: dict[str, Callable[..., Tensor]] = {
    "mm_T": lambda x, w, b: torch.mm(x.flatten(0, 1), w.T),
    "mm_method": lambda x, w, b: x.flatten(0, 1).mm(w.t()),
    "addmm_t": lambda x, w, b: torch.addmm(b, x.flatten(0, 1), w.t()),
}

SPELLINGS = [
    *[pytest.param(f, (N, K), id=f"nk-{name}") for name, f in (NK | NK_2D).items()],
    *[pytest.param(f, (K, N), id=f"kn-{name}") for name, f in KN.items()],
]

LOOKALIKES: dict[str, tuple[Callable[..., Tensor], tuple[int, ...]]] = {
    "two_activations": (lambda x, w, b: x @ x.mT, (N, K)),
    "weight_on_the_left": (lambda x, w, b: w @ x.mT, (N, K)),
    "batched_weight": (lambda x, w, b: torch.bmm(x, w), (2, K, N)),
    "matmul_batched_weight": (lambda x, w, b: x @ w, (2, K, N)),
    "addmm_alpha": (lambda x, w, b: torch.addmm(b, x[0], w, alpha=0.5), (K, N)),
    "addmm_beta": (lambda x, w, b: torch.addmm(b, x[0], w, beta=2), (K, N)),
    "addmm_matrix_bias": (lambda x, w, b: torch.addmm(b.expand(3, N), x[0], w), (K, N)),
    "addmm_broadcast_bias": (lambda x, w, b: torch.addmm(b[:1], x[0], w), (K, N)),
    "einsum_batched": (lambda x, w, b: torch.einsum("btk,bkn->btn", x, w), (2, K, N)),
    "einsum_weight_first": (lambda x, w, b: torch.einsum("nk,btk->btn", w, x), (N, K)),
    "einsum_sums_a_row": (lambda x, w, b: torch.einsum("btk,nk->tn", x, w), (N, K)),
    "einsum_output_transposed": (lambda x, w, b: torch.einsum("btk,nk->bnt", x, w), (N, K)),
    "einsum_elementwise": (lambda x, w, b: torch.einsum("btk,tk->btk", x, w), (3, K)),
    "einsum_outer": (lambda x, w, b: torch.einsum("btj,nk->btjnk", x, w), (N, K)),
}
"""What only looks like a linear of ``w``: function, shape of w."""


def captured(how: str, module: nn.Module, x: Tensor) -> tuple[GraphModule, list[Any], Context]:
    """A graph of the module with its inputs and a context, from Dynamo or from export."""
    if how == "dynamo":
        graph_module, inputs = dynamo_graph(module, x)
        store = DynamoWeights(graph_module, inputs, SlopeConfig())
        return graph_module, inputs, Context(SlopeConfig(), store, EXPORT_FUSIONS)
    graph_module = attribute_graph(module, x)
    return graph_module, [x], context(graph_module)


every_capture = pytest.mark.parametrize(
    "how", [pytest.param("dynamo", id="dynamo"), pytest.param("export", id="export")]
)


def _product(node: Node) -> bool:
    return any(name in str(node.target) for name in ("linear", "matmul", "mm", "einsum"))


def result_of(graph_module: GraphModule, *inputs: Any) -> Tensor:
    found = checked_run(graph_module, *inputs)
    found = found[0] if isinstance(found, tuple | list) else found
    assert isinstance(found, Tensor)
    return found


@every_capture
@pytest.mark.parametrize(("function", "shape"), SPELLINGS)
def test_spelling_becomes_linear(how: str, function: Callable[..., Tensor], shape: tuple[int, ...]) -> None:
    module, x = Parameters(function, *shape), rows(2, 3, K)
    graph_module, inputs, within = captured(how, module, x)
    before = next(n.target for n in graph_module.graph.nodes if _product(n))
    result = Normalize(within)(graph_module)
    found = targets(graph_module)
    assert result is not None
    assert found[LINEAR] == 1
    assert sum(found[target] for target in DENSE_PRODUCTS) == 1, "another product is left"
    assert not any(name in str(target) for target in found for name in ("einsum", "matmul", "mm"))
    (linear,) = nodes(graph_module, LINEAR)
    assert len(linear.args) == 3
    assert not linear.kwargs
    # All transpositions of the weight are gone but one where it is stored as [K, N].
    if function is not NK["twice_transposed"]:  # a linear already when it is exported, so nothing is touched
        assert sum(is_transpose(n) for n in graph_module.graph.nodes) == (shape == (K, N))
    torch.testing.assert_close(result_of(graph_module, *inputs), module(x), rtol=1e-13, atol=1e-13)
    assert within.report.changes == {"normalize": int(result.modified)}
    assert result.modified or before == LINEAR


@every_capture
@pytest.mark.parametrize(
    ("function", "shape"), [pytest.param(*case, id=name) for name, case in LOOKALIKES.items()]
)
def test_lookalike_is_left_alone(how: str, function: Callable[..., Tensor], shape: tuple[int, ...]) -> None:
    module, x = Parameters(function, *shape), rows(2, 3, K)
    graph_module, inputs, within = captured(how, module, x)
    before = [n.format_node() for n in graph_module.graph.nodes]
    result = Normalize(within)(graph_module)
    assert result is not None
    assert not result.modified
    assert within.report.changes == {"normalize": 0}
    assert [n.format_node() for n in graph_module.graph.nodes] == before
    torch.testing.assert_close(result_of(graph_module, *inputs), module(x), rtol=0, atol=0)


def test_conjugate_transpose_of_a_complex_weight_is_not_a_transpose() -> None:
    module = Parameters(lambda x, w, b: x.to(torch.complex128) @ w.adjoint(), N, K)
    module.w = nn.Parameter(torch.randn(N, K, dtype=torch.complex128))
    x = rows(3, K)
    graph_module, inputs, within = captured("dynamo", module, x)
    Normalize(within)(graph_module)
    torch.testing.assert_close(result_of(graph_module, *inputs), module(x))


def test_module_calls_of_a_symbolic_trace() -> None:
    class Calls(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(K, N), nn.Linear(N, K, bias=False)
            self.norm = nn.LayerNorm(N)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.second(self.norm(self.first(x)))
            return y

    module, x = Calls(), torch.randn(3, K)
    graph_module = symbolic_trace(module)
    within = context(graph_module)
    Normalize(within)(graph_module)
    assert within.report.changes == {"normalize": 2}
    assert targets(graph_module)[LINEAR] == 2
    assert [n.target for n in graph_module.graph.nodes if n.op == "call_module"] == ["norm"]
    with_bias, without = nodes(graph_module, LINEAR)
    assert with_bias.args[2] is not None
    assert without.args[2] is None
    torch.testing.assert_close(result_of(graph_module, x), module(x), rtol=0, atol=0)


def test_module_with_another_forward_is_left_alone() -> None:
    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            y: Tensor = 2 * super().forward(input)
            return y

    class Leaf(torch.fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return isinstance(m, nn.Linear)

    module = nn.Sequential(Doubled(K, N))
    graph_module = GraphModule(module, Leaf().trace(module))
    within = context(graph_module)
    Normalize(within)(graph_module)
    assert within.report.changes == {"normalize": 0}
    x = torch.randn(2, K)
    torch.testing.assert_close(result_of(graph_module, x), module(x), rtol=0, atol=0)


def test_matmul_with_an_expanded_weight_is_a_linear() -> None:
    """A prepared Conv1D: its weight is the transpose of an expansion, not a parameter."""

    def forward(x: Tensor, values: Tensor, pattern: Tensor) -> Tensor:
        y: Tensor = x @ ops.expand(values, pattern, 2, 4).t()
        return y

    x, values = rows(3, K), rows(N, K // 2)
    pattern = torch.full((N, 1), 0b01010101, dtype=torch.uint8)
    graph_module, inputs = dynamo_graph(forward, x, values, pattern)
    Normalize(context(graph_module))(graph_module)
    assert targets(graph_module)[LINEAR] == 1
    torch.testing.assert_close(result_of(graph_module, *inputs), forward(x, values, pattern))


def test_weight_of_ordinary_input_is_not_taken_for_a_parameter() -> None:
    def forward(x: Tensor, y: Tensor) -> Tensor:
        return x @ y.T

    graph_module, inputs = dynamo_graph(forward, rows(3, K), rows(N, K))
    within = Context(SlopeConfig(), DynamoWeights(graph_module, inputs, SlopeConfig()), EXPORT_FUSIONS)
    Normalize(within)(graph_module)
    assert within.report.changes == {"normalize": 0}


@pytest.mark.parametrize(
    "autocast", [pytest.param(False, id="plain"), pytest.param(True, id="under_autocast")]
)
def test_bodies_are_normalised_and_stay_true(autocast: bool) -> None:
    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(N, K))
            self.b = nn.Parameter(torch.randn(N))

        def product(self, x: Tensor) -> Tensor:
            return torch.tanh(x @ self.w.T + self.b)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                y = checkpoint(self.product, x, use_reentrant=False)
            assert isinstance(y, Tensor)
            return y

    module, x = Body(), torch.randn(3, K)
    graph_module, inputs, within = captured("dynamo", module, x)
    Normalize(within)(graph_module)
    (linear,) = nodes(graph_module, LINEAR)
    assert linear.graph is not graph_module.graph, "the linear is in the body"
    assert within.report.changes == {"normalize": 1}
    graph_module.recompile()
    torch.testing.assert_close(graph_module(*inputs)[0], module(x), rtol=0, atol=0)
    dtype = torch.bfloat16 if autocast else torch.float32
    assert linear.meta["example_value"].dtype == dtype


def test_second_run_changes_nothing() -> None:
    graph_module, _, within = captured("export", Parameters(lambda x, w, b: x @ w.T + b, N, K), rows(3, K))
    Normalize(within)(graph_module)
    before = str(graph_module.graph)
    result = Normalize(context(graph_module))(graph_module)
    assert result is not None
    assert not result.modified
    assert str(graph_module.graph) == before


def test_provenance_is_kept() -> None:
    graph_module, _, within = captured("export", Parameters(lambda x, w, b: x @ w.T, N, K), rows(3, K))
    (product,) = (n for n in graph_module.graph.nodes if "matmul" in str(n.target))
    trace = product.meta["stack_trace"]
    Normalize(within)(graph_module)
    (linear,) = nodes(graph_module, LINEAR)
    assert linear.meta["stack_trace"] == trace


@pytest.mark.parametrize(
    "product",
    [
        pytest.param(lambda x, w, b, y: torch.mm(x, w.t(), out=y), id="mm"),
        pytest.param(lambda x, w, b, y: torch.addmm(b, x, w.t(), out=y), id="addmm"),
        pytest.param(lambda x, w, b, y: torch.matmul(x, w.t(), out=y), id="matmul"),
    ],
)
def test_product_that_writes_to_a_tensor_is_left_alone(product: Callable[..., Tensor]) -> None:
    def forward(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        y = x.new_zeros(len(x), N)
        product(x, w, b, y)
        return y

    module, x = Parameters(forward, N, K), rows(3, K)
    graph_module, inputs = dynamo_graph(module.requires_grad_(False), x)
    store = DynamoWeights(graph_module, inputs, SlopeConfig())
    Normalize(Context(SlopeConfig(), store, EXPORT_FUSIONS)).call(graph_module)
    assert not nodes(graph_module, LINEAR)
    assert torch.equal(graph_module(*inputs)[0], module(x))


def test_module_calls_with_hooks_and_keywords() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hooked, self.plain = (nn.Linear(K, K, dtype=torch.float64) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.plain(input=self.hooked(x))
            return y

    module, x = Net(), rows(3, K)
    module.hooked.register_forward_hook(lambda layer, given, result: result * 2)
    graph_module = symbolic_trace(module)
    within = context(graph_module)
    Normalize(within).call(graph_module)
    assert len(nodes(graph_module, LINEAR)) == 1
    assert [(d.weight, d.sparse, d.detail) for d in within.report] == [("hooked", False, "it has hooks")]
    assert torch.equal(graph_module(x), module(x))


def test_module_call_with_a_forward_of_its_own() -> None:
    module: Any = nn.Sequential(*(nn.Linear(K, K, dtype=torch.float64) for _ in range(2)))
    linear = type(module[0]).forward
    module[0].forward = lambda x: linear(module[0], x) * 2
    graph_module, x = symbolic_trace(module), rows(3, K)
    within = context(graph_module)
    Normalize(within).call(graph_module)
    assert len(nodes(graph_module, LINEAR)) == 1
    (decision,) = within.report
    assert (decision.reason, decision.detail) == (Reason.FORWARD_REPLACED, "the instance has a forward of its own")
    assert torch.equal(graph_module(x), module(x))


class LoRA(nn.Module):
    """An adapter of another library: its product is written into the weight."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.A, self.B = nn.Linear(K, N).double(), nn.Parameter(rows(4, K)), nn.Parameter(rows(N, 4))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.linear.weight + self.B @ self.A, self.linear.bias)


@pytest.mark.parametrize("source", ["dynamo", "export"])
def test_product_of_parameters_is_no_linear(source: str) -> None:
    graph_module, _, within = captured(source, LoRA(), rows(3, K))
    Normalize(within)(graph_module)
    linears = nodes(graph_module, LINEAR)
    assert len(linears) == 1
    assert "weight" not in str(linears[0].args[0])


class Strided(nn.Module):
    """Decompositions make a batched product of a linear whose activation is not contiguous."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(K, N), nn.Linear(N, K)
        self.other = nn.Parameter(torch.randn(3, K, N))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.first(x.transpose(0, 1))) + torch.bmm(x, self.other).mean()
        return y


@pytest.mark.parametrize("dynamic", [False, True])
def test_decomposed_linear_of_a_strided_activation(dynamic: bool) -> None:
    module, x = Strided(), torch.randn(3, 5, K)
    shapes: Any = ({1: Dim("tokens")},) if dynamic else None
    program = exported(module, x, dynamic_shapes=shapes).run_decompositions()
    graph_module = program.module()
    assert isinstance(graph_module, GraphModule)
    assert nodes(graph_module, torch.ops.aten.bmm.default), "or this test shows nothing"
    within = context(graph_module)
    Normalize(within)(graph_module)
    Select(within)(graph_module)
    linears = nodes(graph_module, LINEAR)
    assert len(linears) == 2
    assert [str(n.args[1]) for n in nodes(graph_module, torch.ops.aten.bmm.default)] == ["other"]
    reasons = {d.weight: d.reason for d in within.report}
    assert reasons == {"first": Reason.SELECTED, "second": Reason.SELECTED, "other": Reason.EXPERTS}
    graph_module.recompile()
    for tokens in (5, 7 if dynamic else 5):
        x = torch.randn(3, tokens, K)
        torch.testing.assert_close(graph_module(x), module(x))
