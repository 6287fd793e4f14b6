"""What ``torch.compile`` relies on: schemas, fakes and autograd of every operator agree with what it does.

``torch.library.opcheck`` costs a quarter of a second a call (nearly all of it tracing with AOTAutograd; the first
call pays some four seconds of imports), so dtypes and shapes are sampled: their values are checked elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from problems import SHAPES, Problem, Shape, draw, packed_columns
from slope_compile.kernels import ops
from slope_compile.pattern import Pattern
from tolerances import assert_same

TWO_FOUR = Pattern(2, 4)


def columns(p: Problem) -> Tensor:
    """The column mask ``[N, ceil(K keep/group / 8)]`` of the second pruning."""
    return packed_columns(p.weight, p.mask, p.nm)


def leaf(t: Tensor) -> Tensor:
    return t.detach().requires_grad_()


CALLS: dict[str, tuple[Any, Callable[[Problem], tuple[Any, ...]]]] = {
    "compress": (ops.compress, lambda p: (leaf(torch.randn_like(p.weight)), p.pattern, *p.ints)),
    "expand": (ops.expand, lambda p: (leaf(p.values), p.pattern, *p.ints)),
    "expand_with_directions": (
        ops.expand,
        lambda p: (leaf(p.values), p.pattern, *p.ints, True, columns(p), torch.tensor([-1]), 100),
    ),
    "linear": (ops.linear, lambda p: (leaf(p.x), leaf(p.values), p.pattern, None, *p.ints)),
    "linear_bias": (ops.linear, lambda p: (leaf(p.x), leaf(p.values), p.pattern, leaf(p.bias), *p.ints)),
    "linear_double_pruned": (
        ops.linear,
        lambda p: (leaf(p.x), leaf(p.values), p.pattern, leaf(p.bias), *p.ints, True),
    ),
    "linear_stored_columns": (
        ops.linear,
        lambda p: (leaf(p.x), leaf(p.values), p.pattern, None, *p.ints, True, columns(p)),
    ),
    "grad_input": (ops.grad_input, lambda p: (leaf(p.grad), leaf(p.values), p.pattern, *p.ints)),
    "grad_input_columns": (
        ops.grad_input_columns,
        lambda p: (leaf(p.grad), leaf(p.values), p.pattern, columns(p), *p.ints),
    ),
    "grad_weight": (ops.grad_weight, lambda p: (leaf(p.grad), leaf(p.x), p.pattern, *p.ints)),
    "compress_columns": (ops.compress_columns, lambda p: (leaf(p.values), p.pattern, *p.ints)),
    "compress_columns_of_a_mask": (
        ops.compress_columns,
        lambda p: (leaf(p.values), p.pattern, *p.ints, columns(p)),
    ),
    "pick_columns": (ops.pick_columns, lambda p: (leaf(p.values), p.pattern, *p.ints)),
}


@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name: str) -> None:
    operator, arguments = CALLS[name]
    # N = 12 and K = 36: neither the bytes of a pattern nor those of a column mask are all used.
    torch.library.opcheck(operator, arguments(draw(TWO_FOUR, Shape((2, 3), 12, 9), torch.float32)))


@pytest.mark.parametrize(
    ("name", "shape", "nm", "dtype"),
    [
        pytest.param("linear_bias", SHAPES["zero_tokens"], TWO_FOUR, torch.float32, id="linear_no_tokens"),
        pytest.param("linear_bias", SHAPES["transposed_batch"], TWO_FOUR, torch.bfloat16, id="linear_layout"),
        pytest.param("linear", SHAPES["one_token_without_batch"], TWO_FOUR, torch.float32, id="linear_1d"),
        pytest.param("linear_double_pruned", SHAPES["4d"], Pattern(2, 8), torch.float16, id="linear_2:8"),
        pytest.param("grad_input", SHAPES["transposed_batch"], TWO_FOUR, torch.bfloat16, id="grad_input"),
        pytest.param("grad_weight", SHAPES["zero_tokens"], TWO_FOUR, torch.float32, id="grad_weight_empty"),
        pytest.param("compress_columns", SHAPES["plain"], Pattern(1, 2), torch.bfloat16, id="columns_1:2"),
        pytest.param("pick_columns", SHAPES["plain"], Pattern(1, 4), torch.bfloat16, id="pick_1:4"),
    ],
)
def test_opcheck_of_awkward_inputs(name: str, shape: Shape, nm: Pattern, dtype: torch.dtype) -> None:
    operator, arguments = CALLS[name]
    # Without the comparison of gradients through AOTAutograd, whose tolerance is made for float32.
    torch.library.opcheck(
        operator,
        arguments(draw(nm, shape, dtype)),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


@pytest.mark.parametrize("name", CALLS)
def test_traced_with_symbolic_sizes(name: str) -> None:
    operator, arguments = CALLS[name]

    def tensors(p: Problem) -> tuple[list[Tensor], list[Any]]:
        given = [a.detach() if isinstance(a, Tensor) else a for a in arguments(p)]
        return [a for a in given if isinstance(a, Tensor)], given

    traced_with, template = tensors(draw(TWO_FOUR, Shape((6,), 12, 9), torch.float32))

    def call(*inputs: Tensor) -> Any:
        remaining = iter(inputs)
        return operator(*(next(remaining) if isinstance(a, Tensor) else a for a in template))

    graph = make_fx(call, tracing_mode="symbolic")(*traced_with)
    (node,) = (n for n in graph.graph.nodes if n.target is operator)  # one opaque node, not its definition
    results = node.meta["val"] if isinstance(node.meta["val"], tuple) else (node.meta["val"],)
    assert all(any(isinstance(size, torch.SymInt) for size in result.shape) for result in results)

    inputs, _ = tensors(draw(TWO_FOUR, Shape((5,), 24, 7), torch.float32))
    got, expected = graph(*inputs), call(*inputs)
    for result, true in zip(*((r if isinstance(r, tuple) else (r,)) for r in (got, expected)), strict=True):
        assert torch.equal(result, true)


@pytest.mark.parametrize("double_pruned", [pytest.param(False, id="exact"), pytest.param(True, id="double_pruned")])
def test_compiled_once_for_every_number_of_tokens(double_pruned: bool) -> None:
    def layer(x: Tensor, values: Tensor, pattern: Tensor, bias: Tensor) -> Tensor:
        output: Tensor = ops.linear(x, values, pattern, bias, 2, 4, double_pruned)
        return output

    torch.compiler.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    p = draw(TWO_FOUR, Shape((6,), 12, 9), torch.float64)
    for tokens in (6, 11, 2):
        x = torch.randn(tokens, 36, dtype=torch.float64, requires_grad=True)
        grad = torch.randn(tokens, 12, dtype=torch.float64)
        inputs = (x, leaf(p.values), p.pattern, leaf(p.bias))
        wanted = (inputs[0], inputs[1], inputs[3])
        stance = "default" if tokens == 6 else "fail_on_recompile"
        with torch.compiler.set_stance(stance):
            output = compiled(*inputs)
            grads = torch.autograd.grad(output, wanted, grad)
        expected = layer(*inputs)
        assert_same(output, expected, "output")
        for got, true in zip(grads, torch.autograd.grad(expected, wanted, grad), strict=True):
            assert_same(got, true, "gradient")


def test_autocast_under_compile() -> None:
    p = draw(TWO_FOUR, Shape((6,), 12, 9), torch.float32)

    def layer(x: Tensor, values: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output: Tensor = ops.linear(x, values, p.pattern, None, 2, 4)
            return output

    torch.compiler.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)(p.x, p.values)
    assert compiled.dtype == torch.bfloat16
    assert torch.equal(compiled, layer(p.x, p.values))


def test_features_that_do_not_fit_are_an_error_while_tracing() -> None:
    p = draw(TWO_FOUR, Shape((6,), 12, 9), torch.float32)
    with pytest.raises(RuntimeError, match="x has 32 features, the weight 12 x 36"):
        make_fx(lambda *tensors: ops.linear(*tensors, None, 2, 4), tracing_mode="fake")(
            p.x[:, :32], p.values, p.pattern
        )


def test_nothing_dense_shaped_is_saved_for_backward() -> None:
    p = draw(TWO_FOUR, SHAPES["plain"], torch.float32)
    saved: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = ops.linear(leaf(p.x), leaf(p.values), p.pattern, leaf(p.bias), *p.ints, True)
    assert {tuple(t.shape) for t in saved} == {tuple(t.shape) for t in (p.x, p.values, p.pattern)}
    output.sum().backward()
