"""Products in Inductor's code for a GPU: lowered for an sm_90 device that is not there; nothing runs.

What the generated kernels compute is for ``tests/gpu`` to show; here it is which kernels there are, and that those
that Inductor generates around ours compile.
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import slope_compile as slope
from offline_inductor import Program, compile_kernel, generated, offline_gpu
from recording import compiled
from recording import fresh_dynamo as fresh_dynamo
from slope_compile import _inductor_gpu
from slope_compile.kernels import cache_files, gpu_calls, gpu_tuning, ops, triton_configs

pytest.importorskip("triton")

Backward = Literal["exact", "double_pruned"]
NAME = "a Hopper GPU"
"""That no table comes with."""
WIDTH, TOKENS = 64, 32


@pytest.fixture(autouse=True)
def no_tables(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No measured tables of this machine."""
    folder = tmp_path_factory.mktemp("tables")
    monkeypatch.setattr(cache_files, "cache_folder", lambda: folder)
    gpu_tuning.load.cache_clear()


class Block(nn.Module):
    """Attention of one head and MLP, pre-norm, ``[B, T, D] -> [B, T, D]``.

    Written in operations whose gradients PyTorch can trace for a device that it was not built for.
    """

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.out = nn.Linear(WIDTH, WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norms[0](x)
        weights = torch.softmax(self.q(h) @ self.k(h).transpose(-1, -2) / WIDTH**0.5, -1)
        x = x + self.out(weights @ self.v(h))
        y: Tensor = x + self.down(F.gelu(self.up(self.norms[1](x)), approximate="tanh"))
        return y


class Transformer(nn.Module):
    """Two blocks on embedded tokens, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 40, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        loss: Tensor = self.head(self.norm(x)).float().square().mean()
        return loss


def programs(monkeypatch: pytest.MonkeyPatch, run: Callable[[], Any], **patches: Any) -> list[Program]:
    """What the backend's graphs become on a GPU, while ``run`` compiles and calls them on the CPU."""
    found: list[Program] = []

    def watched(module: Any, inputs: Any, compiler: str, given: dict[str, Any]) -> Any:
        with offline_gpu():
            found.extend(generated(module, inputs, **{**given, **patches}))
        return module.forward

    monkeypatch.setattr("slope_compile.backend.compile_graph", watched)
    run()
    return found


def transformer(**fields: Any) -> nn.Module:
    model = Transformer().bfloat16()
    slope.sparsify_(model, slope.SlopeConfig(**fields))
    return model


def embedded() -> Tensor:
    return torch.randn(2, TOKENS, WIDTH, dtype=torch.bfloat16)


def test_a_whole_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every product of a rewritten layer is a sparse kernel; the first linears and the head alone stay dense."""
    model, x = transformer(), embedded().requires_grad_()
    dense = 3 + 1
    sparse = 2 * 6 - 3
    forward, backward = programs(monkeypatch, lambda: compiled(model)(x))
    assert forward.products == Counter({"forward": sparse})
    assert backward.products == Counter({"grad_input": sparse, "grad_weight": sparse})
    assert (forward.dense, backward.dense) == (dense, 2 * dense)
    assert not forward.calls + backward.calls
    torch._dynamo.reset()

    def infer() -> None:
        with torch.no_grad():
            compiled(model)(x)

    (inference,) = programs(monkeypatch, infer)
    assert inference.products == Counter({"forward": sparse})
    assert inference.dense == dense
    assert not inference.calls
    # What follows a product runs in its kernel: the GELU of the MLPs.  Inductor of torch 2.11 sees "no shared data"
    # between the rows of tokens that a product writes and the batch that the GELU reads, and gives it its own kernel.
    fused = torch.__version__ >= "2.12"
    (gelu,) = (text for text in inference.kernels.values() if "tanh" in text)
    assert ("def forward_step" in gelu) == fused
    assert inference.products.total() == sparse
    for program in (forward, backward, inference):
        assert "torch.ops.slope." not in re.sub(r"(?m)^\s*#.*$", "", program.source)


class One(nn.Module):
    """A product and what may be fused with it."""

    def __init__(self, N: int, K: int, bias: bool = True, column_refresh: int | Literal["never"] = "never") -> None:
        super().__init__()
        self.layer = nn.Linear(K, N, bias=bias).bfloat16()
        config = slope.SlopeConfig(first_dense=False, heads_dense=False, column_refresh=column_refresh)
        slope.sparsify_(self, config)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        y: Tensor = torch.relu(self.layer(x)) + residual
        return y


def call(model: nn.Module, M: int, N: int, K: int, **arguments: Any) -> Any:
    x, residual = torch.randn(M, K).bfloat16().requires_grad_(), torch.randn(M, N).bfloat16()
    return compiled(model, **arguments)(x, residual)


@pytest.mark.parametrize("fused", [True, False])
def test_bias_activation_and_residual_run_inside_the_product(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless the option of that name, Inductor's, switches it off; the bias is the product's own."""

    def infer() -> None:
        with torch.no_grad():
            options = {} if fused else {"epilogue_fusion": False}
            call(One(64, 96), 48, 64, 96, compiler="inductor", options=options)

    (program,) = programs(monkeypatch, infer)
    assert program.products == Counter({"forward": 1})
    assert len(program.kernels) == (1 if fused else 2)
    (product,) = (name for name, text in program.kernels.items() if "def forward_step(" in text)
    assert ("relu" in product) == ("add" in product) == fused


class Turned(nn.Module):
    """A product of tokens ``[K, M]``, whose features lie apart."""

    def __init__(self, N: int, K: int, bias: bool = True) -> None:
        super().__init__()
        self.layer = nn.Linear(K, N, bias=bias).bfloat16()
        slope.sparsify_(self, slope.SlopeConfig(first_dense=False, heads_dense=False, column_refresh="never"))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x.t())
        return y


def call_turned(model: nn.Module, M: int, K: int, **arguments: Any) -> Any:
    with torch.no_grad():
        return compiled(model, **arguments)(torch.randn(K, M).bfloat16())


@pytest.mark.parametrize("fused", [True, False])
def test_a_copy_of_the_tokens_runs_inside_the_product(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless the option of that name, Inductor's, switches it off; asynchronous copies stay ahead of use."""
    options = {} if fused else {"prologue_fusion": False}
    run = functools.partial(call_turned, Turned(256, 384), 128, 384, compiler="inductor", options=options)
    (program,) = programs(monkeypatch, run)
    assert program.products == Counter({"forward": 1})
    assert len(program.kernels) == (1 if fused else 2)
    (product,) = (text for text in program.kernels.values() if "def forward_step(" in text)
    result = compile_kernel(product)
    assert (result.spills, result.warnings, result.loop_loads) == (0, (), 0)
    assert "HGMMA" in result.tensor_core


@pytest.mark.parametrize("way", ["triton", "mma_sp", "cusparselt", "expanded"])
def test_a_training_step_can_be_a_cuda_graph(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is computed anywhere else, whatever the rules choose; stored column masks are refreshed outside."""
    monkeypatch.setattr(gpu_calls, "chosen", lambda *_: way)
    found = programs(monkeypatch, lambda: call(One(64, 96, column_refresh=7), 48, 64, 96))
    assert len(found) == 2
    for program in found:
        assert program.devices == {"cuda"}
        assert program.no_graph is None
        assert bool(program.calls) == (way != "triton")


def test_adapters_are_added_up_in_the_same_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(96, 64)).bfloat16()
    config = slope.SlopeConfig(first_dense=False, heads_dense=False, column_refresh="never", adapter_rank=16)
    slope.sparsify_(model, config)
    slope.set_adapters(model, True)
    x = torch.randn(48, 96).bfloat16()

    def infer() -> None:
        with torch.no_grad():
            compiled(model)(x)

    (program,) = programs(monkeypatch, infer)
    assert program.products == Counter({"forward": 1})
    assert program.dense == 1  # x A^T
    (kernel,) = (text for text in program.kernels.values() if "def forward_step" in text)
    assert "acc = low_rank_sums(" in kernel
    result = compile_kernel(kernel)
    assert (result.spills, result.warnings) == (0, ())
    torch._dynamo.reset()
    monkeypatch.setattr(gpu_calls, "chosen", lambda *_: "mma_sp")
    (program,) = programs(monkeypatch, infer)
    assert program.calls == ["linear_low_rank_2_mma_sp"]


@pytest.mark.parametrize("way", ["mma_sp", "cusparselt", "expanded"])
def test_a_measured_table_names_the_way(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_calls, "can", lambda *_: True)
    case = ("bfloat16", 48, 64, 96, {way: 1.0, "triton": 2.0})
    ops = ("forward", "grad_input_columns")
    gpu_tuning.save(gpu_tuning.Table(NAME, tuple(gpu_tuning.Entry(op, *case) for op in ops)))
    forward, backward = programs(monkeypatch, lambda: call(One(64, 96), 48, 64, 96))
    assert forward.calls == [f"linear_2_{way}"]
    assert sorted(backward.calls) == [f"grad_input_columns_2_{way}"]
    assert backward.products == Counter({"grad_weight": 1})  # by the roofline: nothing was measured


def test_symbolic_token_counts_are_looked_up_when_they_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    forward, backward = programs(monkeypatch, lambda: call(One(64, 96), 48, 64, 96, dynamic=True))
    assert forward.calls == ["linear_2"]
    assert sorted(backward.calls) == ["grad_input_columns_2", "grad_weight_2"]
    assert not forward.products + backward.products


def test_a_pattern_off_the_words_is_read_by_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph's input that does not begin at 16 bytes when it is compiled may begin anywhere; Inductor copies none."""

    def words() -> set[str]:
        torch._dynamo.reset()
        found = programs(monkeypatch, lambda: call(One(256, 384), 128, 256, 384))
        texts = [text for program in found for text in program.kernels.values() if "_sums(" in text]
        assert len(texts) == 2
        return {value for text in texts for value in re.findall(r"WORDS : tl.constexpr = (\w+)", text)}

    assert words() == {"True"}
    monkeypatch.setattr("torch._inductor.graph.should_assume_input_aligned", lambda t: t.dtype is not torch.uint8)
    assert words() == {"False"}


def test_a_weight_of_symbolic_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with symbolic token counts: by the table, when they are known."""
    values, pattern = torch.randn(64, 48).bfloat16(), torch.full((64, 12), 0x33, dtype=torch.uint8)
    for tensor in (values, pattern):
        torch._dynamo.mark_dynamic(tensor, 0)
    run = torch.compile(lambda *given: ops.linear(*given, None, 2, 4), backend=slope.slope)
    (program,) = programs(monkeypatch, lambda: run(torch.randn(32, 96).bfloat16(), values, pattern))
    assert program.calls == ["linear_2"]


@pytest.mark.parametrize("backward", ["exact", "double_pruned"])
def test_max_autotune_measures_every_choice(backward: Backward, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tile configuration as a template, each way as a call, of Gluon kernels with each of their tiles."""
    monkeypatch.setattr(gpu_calls, "can", lambda way, op, *_: way != "wgmma_sp" and "weight" not in op)
    offered: dict[str, list[str]] = {}
    tiles: dict[str, list[str]] = {}
    select: Callable[..., Any] = vars(_inductor_gpu)["autotune_select_algorithm"]

    def first(name: str, choices: list[Any], *arguments: Any, **named: Any) -> Any:
        offered[name.removeprefix("slope_gpu_")] = [choice.name for choice in choices]
        tiles[name] = [choice.kwargs["tile"] for choice in choices if "tile" in getattr(choice, "kwargs", {})]
        return select(name, choices[:1], *arguments, **named)

    monkeypatch.setattr(_inductor_gpu, "autotune_select_algorithm", first)
    monkeypatch.setattr(gpu_calls, "possible", possible)
    monkeypatch.setattr(gpu_calls, "tiles", lambda way, *_: ("small", "large") if way == "mma_sp" else ())
    model = nn.Linear(128, 64, bias=False).bfloat16()
    net = nn.Sequential(model)
    config = slope.SlopeConfig(first_dense=False, heads_dense=False, column_refresh="never", backward=backward)
    slope.sparsify_(net, config)
    x = torch.randn(48, 128, dtype=torch.bfloat16, requires_grad=True)
    programs(monkeypatch, lambda: compiled(net)(x), max_autotune=True)
    into_input = "grad_input" if backward == "exact" else "grad_input_columns"
    assert offered.keys() == {"linear", into_input, "grad_weight"}
    for name, kernel in (("linear", "forward"), (into_input, "grad_input"), ("grad_weight", "grad_weight")):
        templates = [choice for choice in offered[name] if choice.startswith("triton_slope_")]
        assert len(templates) == len(triton_configs.configurations(kernel, torch.bfloat16, arch=90))
        sparse = ["mma_sp", "mma_sp", "cusparselt"] * (name in ("linear", "grad_input_columns"))
        calls = [choice for choice in offered[name] if choice.startswith("slope_gpu_")]
        assert calls == [f"slope_gpu_{name}_2_{way}" for way in (*sparse, "expanded")]
        assert tiles[f"slope_gpu_{name}"] == ["small", "large"] * bool(sparse)


def possible(op: str, *case: Any) -> tuple[str, ...]:
    sparse = ("mma_sp", "cusparselt") if op in ("forward", "grad_input_columns") else ()
    return ("triton", *sparse, "expanded")


def test_generated_kernels_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """With their epilogues, for sm_90: tensor cores, no spills, nothing serialized, copies ahead of use."""
    found = programs(monkeypatch, lambda: call(One(256, 384), 128, 256, 384))
    results = [compile_kernel(text) for program in found for text in program.kernels.values() if "_sums(" in text]
    assert len(results) == 2
    for result in results:
        assert (result.spills, result.warnings) == (0, ())
        assert "HGMMA" in result.tensor_core
        assert result.copies
    assert "relu" in "".join(found[0].kernels)


@pytest.mark.parametrize(
    ("M", "N", "K", "bias"), [(37, 76, 140, True), pytest.param(64, 64, 128, False, marks=pytest.mark.slow)]
)
def test_generated_kernels_compute_the_product(
    M: int, N: int, K: int, bias: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Run by Triton's interpreter, in a process of its own, on awkward sizes and with the epilogues fused in."""
    kernels = []
    sizes = {"M": M, "N": N, "K": K, "bias": bias}
    for program in programs(monkeypatch, functools.partial(call, One(N, K, bias), M, N, K)):
        for name, text in program.kernels.items():
            if "def tile_of" in text:
                kernels.append({"name": name, "source": text, **sizes})
    torch._dynamo.reset()
    (program,) = programs(monkeypatch, functools.partial(call_turned, Turned(N, K, bias), M, K))
    ((name, text),) = program.kernels.items()  # the copy is in it
    kernels.append({"name": name, "source": text, **sizes, "turned": True})
    assert len(kernels) == 3 + 1
    (tmp_path / "kernels.json").write_text(json.dumps(kernels))
    done = subprocess.run(
        [sys.executable, Path(__file__).parent / "interpret_generated.py", tmp_path / "kernels.json"],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert done.stdout.count(" right") == len(kernels)
