"""Products in Inductor's code: called directly, measured against dense under max_autotune, operators elsewhere.

Values and gradients are compared with the same graph run without Inductor, whose own tests compare it with float64.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor import config
from torch._inductor.utils import run_and_get_code

import slope_compile as slope
from recording import compiled
from recording import fresh_dynamo as fresh_dynamo
from slope_compile.kernels import cache_files, cpu_library, cpu_tuning, dense_copies
from slope_compile.kernels.metadata import unpack_mask
from slope_compile.schedule import adapters_of
from tolerances import assert_same

pytestmark = pytest.mark.skipif(cpu_library.load() is None, reason="no CPU library could be built here")

PRODUCTS = ("linear", "grad_input", "grad_input_columns", "grad_weight")


class Net(nn.Module):
    """Two linears; the second reads a transposed tensor of three dimensions."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.one = nn.Linear(16, 24, bias=bias)
        self.two = nn.Linear(24, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.two(torch.tanh(self.one(x)).transpose(0, 1).contiguous().transpose(0, 1))
        return y


def prepared(bias: bool = True, dtype: torch.dtype = torch.float32, **fields: Any) -> nn.Module:
    net = Net(bias).to(dtype)
    slope.sparsify_(net, slope.SlopeConfig(first_dense=False, heads_dense=False, **fields))
    return net


def results(run: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output and all gradients of one step."""
    model.zero_grad()
    x = x.detach().clone().requires_grad_()
    y = run(x)
    y.square().sum().backward()
    assert x.grad is not None
    return {"y": y.detach(), "x": x.grad} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def calls(code: list[str]) -> list[str]:
    """The kernels of ours that generated code calls."""
    return re.findall(r"extern_kernels\.slope_(\w+)", "\n".join(code))


def operators(code: list[str]) -> int:
    return len(re.findall(r"torch\.ops\.slope\.\w+\.default\(", "\n".join(code)))


@pytest.mark.parametrize(
    ("backward", "dtype"),
    [
        *[("double_pruned", torch.float32), ("double_pruned", torch.bfloat16), ("exact", torch.float16)],
        pytest.param("double_pruned", torch.float16, marks=pytest.mark.slow),
        *(pytest.param("exact", dtype, marks=pytest.mark.slow) for dtype in (torch.float32, torch.bfloat16)),
    ],
)
def test_products_are_called_directly(backward: str, dtype: torch.dtype) -> None:
    model = prepared(dtype=dtype, backward=backward, column_refresh="never")
    x = torch.randn(3, 5, 16, dtype=dtype)
    expected = results(compiled(model, "eager"), model, x)
    torch._dynamo.reset()
    found, code = run_and_get_code(results, compiled(model, "inductor"), model, x)
    into_input = "grad_input_columns" if backward == "double_pruned" else "grad_input"
    assert sorted(calls(code)) == sorted([f"{n}_2" for n in ("linear", into_input, "grad_weight")] * 2)
    assert operators(code) == 0
    assert found.keys() == expected.keys()
    for name, value in found.items():
        # Inductor keeps pointwise results of half precision in float32 on their way into the next kernel.
        tolerance = 0.0 if dtype is torch.float32 else 0.02
        torch.testing.assert_close(value, expected[name], rtol=1e-4 + tolerance, atol=1e-5 + 2 * tolerance, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("tokens", [(3, 5), *(pytest.param(t, marks=pytest.mark.slow) for t in [(1, 1), (7, 6)])])
def test_adapters_are_added_up_inside_the_products(tokens: tuple[int, int], dtype: torch.dtype) -> None:
    model = prepared(dtype=dtype, adapter_rank=3, column_refresh="never")
    slope.set_adapters(model, True)
    with torch.no_grad():
        for adapter in adapters_of(model):
            adapter.B.normal_()
    x = torch.randn(*tokens, 16, dtype=dtype)
    expected = results(compiled(model, "eager", options={"fusions": []}), model, x)
    torch._dynamo.reset()
    found, code = run_and_get_code(results, compiled(model, "inductor"), model, x)
    assert calls(code).count("linear_low_rank_2") == 2
    assert "linear_2" not in calls(code)
    assert found.keys() == expected.keys()
    assert len([name for name in found if name.endswith((".A", ".B"))]) == 4
    for name, value in found.items():
        tolerance = 0.0 if dtype is torch.float32 else 0.02
        bound = float(expected[name].abs().max())
        torch.testing.assert_close(
            value, expected[name], rtol=1e-4 + tolerance, atol=(1e-5 + tolerance) * max(1.0, bound), msg=name
        )


def test_any_number_of_tokens() -> None:
    model = prepared()
    run, reference = compiled(model, "inductor", dynamic=True), compiled(model, "eager")
    for shape in ((3, 5), (1, 1), (7, 2), (0, 4)):
        x = torch.randn(*shape, 16)
        expected, found = results(reference, model, x), results(run, model, x)
        for name, value in found.items():
            assert_same(value, expected[name], f"{name} {shape}")


@pytest.mark.slow
def test_max_autotune_measures_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every product has two choices; whichever is taken, the numbers are the same."""
    from slope_compile import _inductor_lowerings

    measured: dict[str, int] = {}
    select: Callable[..., Any] = vars(_inductor_lowerings)["autotune_select_algorithm"]
    taken = ["2to4"]

    def watched(name: str, choices: list[Any], *args: Any, **kwargs: Any) -> Any:
        measured[name] = len(choices)
        select(name, choices, *args, **kwargs)
        return next(choice for choice in choices if choice.name.endswith(taken[0])).output_node()

    monkeypatch.setattr(_inductor_lowerings, "autotune_select_algorithm", watched)
    model, x = prepared(), torch.randn(3, 5, 16)
    expected = results(compiled(model, "eager"), model, x)
    for way in ("2to4", "expanded"):
        taken[0] = way
        torch._dynamo.reset()
        with config.patch({"force_disable_caches": True}):
            options = {"max_autotune": True}
            found, code = run_and_get_code(results, compiled(model, "inductor", options=options), model, x)
        assert measured == {f"slope_{n}": 2 for n in PRODUCTS if n != "grad_input"}
        assert {name.rpartition("_")[2] for name in calls(code)} == {way}
        for name, value in found.items():
            assert_same(value, expected[name], f"{name} {way}")


def test_the_autotuner_measures_with_a_column_mask_like_a_real_one() -> None:
    """13 of 16 values on average, the same whenever it is made, no bits past the last value."""
    from slope_compile import _inductor_lowerings

    state = torch.random.get_rng_state()
    first, second = (_inductor_lowerings._column_mask(64, 120)(None) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(torch.random.get_rng_state(), state)
    bits = unpack_mask(first, 64)
    assert first.shape == (64, 8)
    assert not bits[:, 60:].any()
    assert abs(float(bits[:, :60].double().mean()) - 13 / 16) < 0.03


@pytest.mark.parametrize(
    ("fields", "options"),
    [({"pattern": "1:4"}, {}), pytest.param({}, {"cpp_wrapper": True}, marks=pytest.mark.slow)],
    ids=["another_pattern", "cpp_wrapper"],
)
def test_the_operator_where_a_direct_call_cannot_be(fields: dict[str, Any], options: dict[str, Any]) -> None:
    model, x = prepared(**fields), torch.randn(3, 5, 16)
    expected = results(compiled(model, "eager"), model, x)
    torch._dynamo.reset()
    found, code = run_and_get_code(results, compiled(model, "inductor", options=options), model, x)
    assert calls(code) == []
    for name, value in found.items():
        assert_same(value, expected[name], name)


@pytest.mark.slow
def test_aot_inductor() -> None:
    """A library made ahead of time calls operators too, and takes any number of tokens."""
    net = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 8))
    tokens = torch.export.Dim("tokens", min=2, max=64)
    program = torch.export.export(net, (torch.randn(5, 16),), dynamic_shapes=({0: tokens},))
    program = slope.transform(program, slope.SlopeConfig(first_dense=False, heads_dense=False))
    with torch.no_grad():
        package = torch._inductor.aoti_compile_and_package(program)
        run = torch._inductor.aoti_load_package(package)
        for M in (5, 2, 9):
            x = torch.randn(M, 16)
            assert_same(run(x), program.module()(x))


def test_other_graphs_of_the_process_are_left_alone() -> None:
    """After the lowerings are registered, plain Inductor still compiles operators, whose code needs nothing of ours."""
    model, x = prepared(), torch.randn(5, 16)
    compiled(model, "inductor")(x)
    torch._dynamo.reset()
    state = dict(model.named_parameters()) | dict(model.named_buffers())
    values, pattern = (state[f"one.parametrizations.weight.{name}"] for name in ("original", "0.pattern"))

    def product(x: Tensor) -> Tensor:
        y: Tensor = torch.ops.slope.linear.default(x, values, pattern, None, 2, 4)
        return y

    with torch.no_grad():
        found, code = run_and_get_code(torch.compile(product), x)
        assert calls(code) == []
        assert operators(code) == 1
        assert_same(found, product(x))


class _Count:
    """A pass of the user's own, counting its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, graph: torch.fx.Graph) -> None:
        self.calls += 1


def test_a_pass_of_the_users_own_still_runs() -> None:
    model, x, own = prepared(), torch.randn(5, 16), _Count()
    with torch.no_grad():
        _, code = run_and_get_code(
            compiled(model, "inductor", options={"post_grad_custom_post_pass": own}), x
        )
    assert own.calls == 1
    assert calls(code) == ["linear_2", "linear_2"]


CACHED = """
import json, os, sys
import torch
import torch._inductor.compile_fx
from torch import nn
from torch._dynamo.utils import counters
import slope_compile as slope
from slope_compile import _inductor_gpu

# A process for each run, forked from one that has imported everything, and done nothing.
for backend, backward, table in json.loads(sys.argv[1]):
    child = os.fork()
    if not child:
        break
    if os.waitpid(child, 0)[1]:
        sys.exit(1)
else:
    sys.exit()
if table:  # as if `slope-compile tune` had measured a GPU since
    _inductor_gpu.fingerprint = lambda: table
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 8))
program = torch.export.export(net, (torch.randn(5, 16),))
config = slope.SlopeConfig(first_dense=False, heads_dense=False, backward=backward, column_refresh="never")
module = slope.transform(program, config).module()
x = torch.randn(5, 16, requires_grad=True)
y = torch.compile(module, backend=backend)(x)
y.square().sum().backward()
counted = {name: counters["inductor"][f"fxgraph_cache_{name}"] for name in ("hit", "miss", "bypass")}
counted |= {f"aot_{name}": counters["aot_autograd"][f"autograd_cache_{name}"] for name in ("hit", "miss", "bypass")}
print(json.dumps(counted | {"y": float(y.double().sum()), "dx": float(x.grad.double().sum())}))
"""


@pytest.mark.slow
def test_caches_serve_another_process_and_keep_backends_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second process takes both graphs from the caches of AOTAutograd and of Inductor; another configuration,
    another table of measurements or another backend does not."""
    libraries = cache_files.cache_folder()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    shutil.copytree(libraries, cache_files.cache_folder(), dirs_exist_ok=True)  # compiling it anew takes a while
    environment = os.environ | {
        "TORCHINDUCTOR_FX_GRAPH_CACHE": "1",
        "TORCHINDUCTOR_AUTOGRAD_CACHE": "1",
    }

    runs = [
        ("slope", "exact", ""), ("slope", "exact", ""), ("slope", "double_pruned", ""), ("slope", "exact", "another"),
        ("inductor", "exact", ""),
    ]  # fmt: skip
    command = [sys.executable, "-c", CACHED, json.dumps(runs)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    first, second, changed, tuned, plain = map(json.loads, done.stdout.strip().splitlines())
    assert (first["hit"], first["miss"], first["bypass"]) == (0, 2, 0)
    assert (first["aot_hit"], first["aot_miss"], first["aot_bypass"]) == (0, 1, 0)
    assert (second["hit"], second["miss"], second["bypass"]) == (2, 0, 0)
    assert (second["aot_hit"], second["aot_miss"], second["aot_bypass"]) == (1, 0, 0)
    assert changed["miss"] > 0
    assert changed["aot_hit"] == 0
    assert tuned["hit"] == tuned["aot_hit"] == 0
    assert plain["hit"] == plain["aot_hit"] == 0
    for other in (second, tuned, plain):
        assert other["y"] == pytest.approx(first["y"], rel=1e-5)
        assert other["dx"] == pytest.approx(first["dx"], rel=1e-5)
    assert changed["y"] == pytest.approx(first["y"], rel=1e-5)
    assert changed["dx"] != pytest.approx(first["dx"], rel=1e-5)


def test_inference_reads_copies_where_they_win_and_training_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = cpu_library.load()
    assert library is not None
    monkeypatch.setattr(cpu_tuning, "table_path", lambda isa, threads: tmp_path / f"{isa}-{threads}.json")
    cpu_tuning.save(
        cpu_tuning.Table(
            torch.get_num_threads(), (cpu_tuning.Entry("forward", "float32", 15, 16, 16, 2.0, over_copy=0.5),)
        ),
        library.isa,
    )
    dense_copies.forget()
    try:
        model = prepared()
        run = torch.compile(model, backend="slope")
        x = torch.randn(3, 5, 16)
        for _ in range(3):
            results(run, model, x)
        assert dense_copies.count() == 0
        for _ in range(4):
            with torch.no_grad():
                assert_same(run(x), model(x), "y")
        assert dense_copies.count() == 2
        results(run, model, x)
        assert dense_copies.count() == 0
    finally:
        dense_copies.forget()
        cpu_tuning.load.cache_clear()
