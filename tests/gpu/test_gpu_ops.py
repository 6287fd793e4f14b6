"""The operators on CUDA tensors, whichever way each call takes, and the self-test of the kernels."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from problems import Shape, draw, draw_columns, every_dtype, kept, packed
from slope_compile.kernels import (
    gpu_ops,
    gpu_rules,
    gpu_self_test,
    metadata,
    ops,
    reference,
    self_tests,
    triton_products,
)
from slope_compile.pattern import Pattern
from tolerances import UNIT_ROUNDOFF, relative_error
from triton_interpreter import close_gaps, dtypes, interpreting

if interpreting():
    close_gaps()
    DEVICE = "cpu"
else:
    DEVICE = "cuda"
    pytestmark = pytest.mark.gpu


@pytest.fixture(params=["kernel", "dense"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of every product, whatever the rule would say; on CPU tensors the device is said to be fit."""
    monkeypatch.setattr(gpu_rules, "takes_triton", lambda *_: request.param == "kernel")
    if DEVICE == "cpu":
        monkeypatch.setattr(gpu_ops, "available", lambda _: True)
        monkeypatch.setattr(gpu_ops, "name", lambda _: "CPU")


def assert_near(result: Tensor, truth: Tensor, scale: Tensor) -> None:
    bound = 2.0 * UNIT_ROUNDOFF[result.dtype] + scale.numel() * 2.0**-24
    assert relative_error(result.cpu(), truth, scale) <= bound


@every_dtype
@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("N", [20, 7])
def test_both_ways(N: int, dtype: torch.dtype) -> None:
    p = draw(Pattern(2, 4), Shape((2, 5), N, 9), dtype)
    columns = packed(torch.rand(p.values.shape) < 0.8)
    # On a GPU through the dispatcher; interpreted, the functions that are registered for it.
    table = ops if DEVICE == "cuda" else gpu_ops

    def check(name: str, *arguments: Tensor | None) -> None:
        moved = [None if t is None else t.to(DEVICE) for t in arguments]
        result = getattr(table, name)(*moved, *p.ints)
        definition = getattr(reference, "forward" if name == "linear" else name)
        exact = [t.double() if t is not None and t.is_floating_point() else t for t in arguments]
        sizes = [t.abs() if t is not None and t.is_floating_point() else t for t in exact]
        assert_near(result, definition(*exact, *p.ints), definition(*sizes, *p.ints))

    check("linear", p.x, p.values, p.pattern, p.bias)
    check("linear", p.x, p.values, p.pattern, None)
    check("grad_input", p.grad, p.values, p.pattern)
    check("grad_input_columns", p.grad, p.values, p.pattern, columns)
    check("grad_weight", p.grad, p.x, p.pattern)
    check("expand", p.values, p.pattern)
    check("compress", p.weight, p.pattern)
    if N % 4:
        return
    values, pattern = p.values.to(DEVICE), p.pattern.to(DEVICE)
    picked = table.pick_columns(values, pattern, *p.ints)
    assert torch.equal(picked.cpu(), reference.pick_columns(p.values, p.pattern, *p.ints))
    legal = packed(kept(draw_columns(p.mask, p.nm), p.mask))  # at most two of four
    for mask in (None, legal):
        found = table.compress_columns(values, pattern, *p.ints, None if mask is None else mask.to(DEVICE))
        definition = reference.compress_columns(values, pattern, *p.ints, mask)
        assert all(map(torch.equal, found, definition))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "name", ["linear", "grad_input", "grad_input_columns", "grad_weight", "pick_columns", "compress_columns"]
)
def test_a_first_call_while_a_graph_is_captured(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is tested then, and nothing that the capture makes is kept: the definition is recorded, and is right."""
    monkeypatch.setattr(self_tests, "_results", {})
    metadata._kept_table.cache_clear()
    p = draw(Pattern(2, 4), Shape((10,), 20, 9), torch.bfloat16)
    columns = packed(kept(draw_columns(p.mask, p.nm), p.mask))
    given = {
        "linear": (p.x, p.values, p.pattern, p.bias), "grad_input": (p.grad, p.values, p.pattern),
        "grad_input_columns": (p.grad, p.values, p.pattern, columns), "grad_weight": (p.grad, p.x, p.pattern),
        "pick_columns": (p.values, p.pattern), "compress_columns": (p.values, p.pattern),
    }[name]  # fmt: skip
    arguments = [t.cuda() for t in given]
    torch.zeros(8, 8, device="cuda").mm(torch.zeros(8, 8, device="cuda"))  # cuBLAS is there
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = getattr(ops, name)(*arguments, *p.ints)
    graph.replay()
    assert not metadata._kept_table.cache_info().currsize
    found = result if isinstance(result, tuple) else (result,)
    expected = getattr(reference, "forward" if name == "linear" else name)(*arguments, *p.ints)
    for one, other in zip(found, expected if isinstance(expected, tuple) else (expected,), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.gpu
def test_a_first_call_leaves_nothing_in_the_memory_of_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor warms up in the memory of the graph that it will capture, and refuses what is left there."""
    p = draw(Pattern(2, 4), Shape((10,), 20, 9), torch.bfloat16)
    arguments = [t.cuda() for t in (p.x, p.values, p.pattern, p.bias)]
    ops.linear(*arguments, *p.ints)  # cuBLAS, which keeps its workspace, is there
    monkeypatch.setattr(self_tests, "_results", {})
    metadata._kept_table.cache_clear()
    pool = torch.cuda.MemPool()
    with torch.cuda.use_mem_pool(pool):
        ops.linear(*arguments, *p.ints)
    torch.cuda.synchronize()
    blocks = [block for segment in pool.snapshot() for block in segment["blocks"]]
    assert blocks
    assert all(block["state"] != "active_allocated" for block in blocks)


@dtypes(torch.bfloat16)
def test_the_self_test_passes(dtype: torch.dtype) -> None:
    assert gpu_self_test.passes(torch.device(DEVICE), dtype)


@pytest.mark.slow
def test_the_self_test_notices_a_wrong_kernel(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    products = {name: getattr(triton_products, name) for name in ("forward", "grad_input", "grad_weight")}

    def leaking(result: Tensor) -> Tensor:
        """Where there is a NaN, there are more."""
        return result * torch.nan if bool(result.isnan().any()) else result

    faults: tuple[tuple[str, Callable[[Tensor], Tensor], str], ...] = (
        ("grad_weight", lambda result: result.roll(1), "grad_weight"),
        ("forward", leaking, "forward of what is not finite"),
    )
    for name, fault, said in faults:
        with monkeypatch.context() as patch:
            right = products[name]
            patch.setattr(triton_products, name, lambda *given, right=right, fault=fault: fault(right(*given)))
            caplog.clear()
            assert not gpu_self_test.passes(torch.device(DEVICE), torch.float32)
            assert said in caplog.text
