"""The suites for a GPU: their cases once at tiny sizes on the CPU, and what only a GPU has by stand-ins."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import (
    __main__ as command,
)
from benchmarks import (
    blocks,
    cases,
    choices,
    contestants,
    correctness,
    gpu_kernels,
    gpu_layer,
    gpu_model,
    limits,
    memory_state,
    model_checks,
    peers,
    profiling,
    quality,
    replay,
    rotation,
)
from benchmarks.cases import Measurement, Options, Run
from benchmarks.choices import Choice
from benchmarks.products import Problem, error_of
from benchmarks.timing import CpuStopwatch, Plan
from slope_compile.cost import DenseLayer, Layer
from slope_compile.kernels import (
    _cusparselt,
    cpu_rules,
    gluon_choices,
    gluon_configs,
    gpu_calls,
    gpu_ops,
    gpu_rules,
    ops,
    reference,
    triton_configs,
    triton_products,
)

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
QUICK = Plan(seconds=0.0, min_rounds=2)


@pytest.fixture(autouse=True)
def small_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rotation, "cache_bytes", lambda _: 1 << 14)


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling takes most of a tiny case's time, and is tested elsewhere."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


@pytest.fixture
def known_limits(monkeypatch: pytest.MonkeyPatch) -> limits.Limits:
    known = limits.Limits(bandwidth=1e10, flops=1e11)
    for module in (gpu_kernels, gpu_layer, gpu_model):
        monkeypatch.setattr(module, "limits", lambda *_: known)
    return known


def run_cases(suite: str, pattern: str) -> list[Measurement]:
    """What the tiny cases whose id matches yield."""
    chosen = [c for c in cases.cases(suite, Options(tiny=True, threads=(1,))) if re.fullmatch(pattern, c.id)]
    assert chosen
    return [measurement for c in chosen for measurement in c.measure(Run(QUICK, CpuStopwatch()))]


# --- CUDA graphs, by stand-ins ---------------------------------------------------------------------------------------


class Graphs:
    """Stands in for CUDA graphs: what is called during a capture is noted and called again at a replay."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.capturing: list[int] | None = None
        self.log: list[str] = []
        outer = self

        class Graph:
            def __init__(self) -> None:
                self.calls: list[int] = []

            def replay(self) -> None:
                outer.log += [f"replayed {call}" for call in self.calls]

        class Stream:
            def wait_stream(self, _: Any) -> None:
                pass

        @contextlib.contextmanager
        def graph(captured: Graph, pool: Any) -> Iterator[None]:
            assert pool == "the pool"
            self.capturing = captured.calls
            try:
                yield
            finally:
                self.capturing = None

        fakes = {
            "CUDAGraph": Graph, "graph": graph, "graph_pool_handle": lambda: "the pool", "Stream": Stream,
            "current_stream": Stream, "stream": lambda _: contextlib.nullcontext(), "synchronize": lambda: None,
        }  # fmt: skip
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)

    def contender(self, name: str, permitted: bool = True) -> Any:
        def call(index: int) -> None:
            if self.capturing is None:
                self.log.append(f"{name} {index}")
            elif not permitted:
                raise RuntimeError("operation not permitted when stream is capturing")
            else:
                self.capturing.append(index)

        return call


class Seconds:
    """A stopwatch by which each call takes so many seconds."""

    shortest = 0.5

    def __init__(self, each: float) -> None:
        self.each = each

    def seconds(self, calls: Any) -> float:
        return self.each * len([call() for call in calls])


def test_calls_are_replayed_as_many_at_a_time_as_there_are_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = Graphs(monkeypatch)
    found = replay.measure({"a": graphs.contender("a")}, 4, QUICK, Seconds(8.0))
    assert found.rounds == {"a": [2.0, 2.0]}
    assert found.how == {"a": replay.REPLAYED}
    # Warm before the capture; then every copy in turn, in every replay.
    assert graphs.log[:3] == ["a 0", "a 1", "a 2"]
    assert graphs.log[3:7] == ["replayed 0", "replayed 1", "replayed 2", "replayed 3"]


def test_what_cannot_be_recorded_is_launched_and_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = Graphs(monkeypatch)
    contenders = {"a": graphs.contender("a"), "b": graphs.contender("b", permitted=False)}
    found = Run(QUICK, Seconds(8.0), replays=True).measure(contenders, calls=4)
    assert found.rounds == {"a": [2.0, 2.0], "b": [8.0, 8.0]}
    assert cases.compare("x", found, {"b": ["b"]}, (), {}).facts == {"timed": {"a": "replayed", "b": "launched"}}
    # Long calls are launched one by one anyway.
    assert Run(QUICK, Seconds(8.0), replays=True).measure(contenders).how == {}


# --- limits ----------------------------------------------------------------------------------------------------------


def test_floors() -> None:
    known = limits.Limits(bandwidth=100.0, flops=1000.0)
    dense, sparse = DenseLayer(64, 64, 2), Layer(64, 64, 2)
    tokens: Any = 1
    # One token: bytes; 2 * 64 * 64 of the weight and 2 * 2 * 64 of activations, at 100 bytes a second.
    for cost, moved in ((dense.dense_forward(tokens), 8192 + 256), (sparse.forward(tokens), 4096 + 512 + 256)):
        seconds, bound = known.floor(cost)
        assert seconds == pytest.approx(moved / 100)
        assert bound == "memory"
    tokens = 1 << 20
    assert known.floor(dense.dense_forward(tokens))[1] == "arithmetic"
    ratio = known.floor(dense.dense_forward(tokens))[0] / known.floor(sparse.forward(tokens))[0]
    assert ratio == pytest.approx(2.0)


def test_limits_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    (found,) = limits.limits_case("kernels", "float32", CPU).measure(Run(QUICK, CpuStopwatch()))
    assert found.facts["bandwidth"] == pytest.approx(2 * found.facts["copied"] / found.seconds["copy"].median)
    assert found.facts["flops"] == pytest.approx(2 * 1024**3 / found.seconds["matmul"].median)


# --- kernels ---------------------------------------------------------------------------------------------------------


def test_the_first_cases_tell_most() -> None:
    ids = [c.id for c in cases.cases("kernels", Options())]
    assert ids[:2] == ["kernels/limits/bfloat16", "kernels/limits/float16"]
    first = [name for name in ids if re.search(r"/m\d+/", name)][:6]
    assert {re.sub(r"/t\d+$", "", name) for name in first} == {
        f"kernels/{shape}/m{M}/bf16" for shape in ("16384x4096", "4096x16384", "4096x4096") for M in (1, 16384)
    }
    # Seven hidden sizes, three shapes, eight numbers of tokens, two dtypes; columns once a shape.
    assert len([name for name in ids if re.search(r"/m\d+/", name)]) == 7 * 3 * 8 * 2
    assert len([name for name in ids if "/columns/" in name]) == 7 * 3 * 2


def test_choices_that_fail_or_are_wrong_are_left_out_with_the_reason(
    uncompiled: None, known_limits: limits.Limits, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails() -> Any:
        raise NotImplementedError("only on other devices\nand more")

    def offered(problem: Problem) -> list[Choice]:
        wrong = torch.zeros(problem.M, problem.N, dtype=problem.x.dtype)
        return [
            Choice("forward", "absent", "forward", fails),
            Choice("forward", "wrong", "forward", lambda: lambda _: wrong),
            Choice("forward", "right", "forward", lambda: lambda _: F.linear(problem.x, expanded(problem))),
        ]

    def expanded(problem: Problem) -> Tensor:
        w = problem.weights[0]
        result: Tensor = ops.expand(w.values, w.pattern, 2, 4)
        return result

    monkeypatch.setattr(peers, "choices", offered)
    found = {m.name: m for m in run_cases("kernels", "kernels/64x64/m16/bf16/t1")}
    assert set(found) == {"forward", "grad_input", "grad_weight", "low_rank", "step"}
    forward = found["forward"]
    assert "right" in forward.seconds
    assert not {"absent", "wrong"} & set(forward.seconds)
    assert forward.facts["left_out"]["forward: absent"] == "NotImplementedError: only on other devices"
    assert forward.facts["left_out"]["forward: wrong"].startswith("wrong: its error is 1 ")
    assert forward.facts["floor"]["dense"]["seconds"] > forward.facts["floor"]["sparse"]["seconds"] > 0
    assert forward.facts["limits"] == {"bandwidth": known_limits.bandwidth, "flops": known_limits.flops}
    assert set(found["low_rank"].seconds) == {"dense", "slope", "slope_adapter"}
    assert found["low_rank"].facts["errors"]["low_rank_slope_adapter"] < 1e-2


def test_dense_numbers_have_no_zeros_and_truths_are_of_the_sparse_weight() -> None:
    problem = Problem.draw(8, 16, 32, "float32", CPU)
    assert all(bool((weight.dense != 0).all()) for weight in problem.weights)
    w = problem.weights[0]
    expected = F.linear(problem.x, ops.expand(w.values, w.pattern, 2, 4))
    assert torch.allclose(problem.truths()["forward"], expected, atol=1e-5)


def test_peers_keep_their_operands(monkeypatch: pytest.MonkeyPatch) -> None:
    """On stand-ins: an operand is packed once for each copy of the weight, and each call reads the next."""
    problem = Problem.draw(16, 32, 64, "float32", CPU)
    packs: list[Tensor] = []

    def pack(values: Tensor, pattern: Tensor) -> Tensor:
        packs.append(ops.expand(values, pattern, 2, 4))
        return packs[-1]

    monkeypatch.setattr(_cusparselt, "pack", pack)
    monkeypatch.setattr(_cusparselt, "product", lambda x, packed, N, K: F.linear(x, packed))
    monkeypatch.setattr(_cusparselt, "missing", lambda *_: None)
    truths = problem.truths()
    for x, columns, truth in ((problem.x, False, "forward"), (problem.grad, True, "grad_input_double_pruned")):
        packs.clear()
        call = peers._packed(problem, x, columns)()
        assert error_of(call(0), truths[truth]) < 1e-5
        assert len(packs) == len(problem.weights) > 1
        assert torch.equal(torch.as_tensor(call(1)), F.linear(x, packs[1]))
    monkeypatch.setattr(_cusparselt, "missing", lambda *_: "not here")
    with pytest.raises(RuntimeError, match="not here"):
        peers._packed(problem, problem.x, False)()
    assert list(peers.choices(problem)) == []


def test_every_choice_computes_the_product_that_it_is_listed_under(monkeypatch: pytest.MonkeyPatch) -> None:
    """With definitions in the place of kernels: each choice hands the right tensors to the right one."""

    def forward(x: Tensor, values: Tensor, pattern: Tensor, bias: Any = None, low_rank: Any = None, config: Any = None,
                ) -> Tensor:  # fmt: skip
        tiles.append(config)
        y = reference.forward(x, values, pattern, bias, 2, 4)
        return y if low_rank is None else y + low_rank[0] @ low_rank[1].t()

    def grad_input(grad: Tensor, values: Tensor, pattern: Tensor, columns: Any = None, config: Any = None) -> Tensor:
        tiles.append(config)
        if columns is None:
            return reference.grad_input(grad, values, pattern, 2, 4)
        return reference.grad_input_columns(grad, values, pattern, columns, 2, 4)

    def grad_weight(grad: Tensor, x: Tensor, pattern: Tensor, config: Any) -> Tensor:
        tiles.append(config)
        return reference.grad_weight(grad, x, pattern, 2, 4)

    def product(config: Any) -> Any:
        return lambda x, values, pattern, bias, low_rank: forward(x, values, pattern, bias, low_rank, config)

    tiles: list[Any] = []
    for function in (forward, grad_input, grad_weight):
        monkeypatch.setattr(triton_products, function.__name__, function)
    monkeypatch.setattr(gpu_ops, "available", lambda _: False)  # so that the ways compute their definitions
    monkeypatch.setattr(gpu_calls, "possible", lambda *_: ("triton", "expanded"))
    monkeypatch.setattr(gluon_choices, "choices", lambda *_, **__: gluon_configs.MMA_SP[:2])
    monkeypatch.setattr(gluon_choices, "product", product)
    problem = Problem.draw(40, 64, 128, "bfloat16", CPU)
    truths = problem.truths() | {"low_rank": choices.low_rank_truth(problem, 0.0156)}
    found = [
        *choices._ways(problem), *choices._triton(problem), *choices._gluon(problem), *choices._gluon(problem, 0.0156),
        *choices._gluon_double_pruned(problem), choices._fused_low_rank(problem, 0.0156),
        *choices.library(problem, 0.0),
    ]  # fmt: skip
    assert len({(choice.product, choice.name) for choice in found}) == len(found)
    for choice in found:
        contender = choice.make()
        for copy in (0, len(problem.weights)):  # that many on, it is the first weight again
            assert error_of(contender(copy), truths[choice.truth]) < 2e-2, choice
        assert not error_of(contender(1), truths[choice.truth]) < 2e-2 or choice.product == "grad_weight", choice
    for kernel in ("forward", "grad_input", "grad_weight"):
        configurations = triton_configs.configurations(kernel, torch.bfloat16, aligned=True)
        fitting = {c for c in configurations if kernel == "grad_weight" or c.BM <= 80}
        assert fitting <= set(tiles), "every tile that is not twice as large as the tokens"


def test_what_is_autotuned_computes_the_products(uncompiled: None) -> None:
    problem = Problem.draw(4, 16, 32, "float32", CPU)
    truths = problem.truths()
    for choice in choices.autotuned(problem):
        contender, error = gpu_kernels._tried(choice, truths, 1e-4)
        assert callable(contender)
        assert error < 1e-5


def test_ranks_are_multiples_of_16() -> None:
    assert [choices.rank(4096, d, 0.0156) for d in (768, 4096, 16384)] == [16, 64, 64]
    assert choices.rank(5120, 5120, 0.0625) == 320


# --- blocks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "billions"), [("llama-3-8b", 8.0), ("opt-13b", 12.9), ("opt-2.7b", 2.65),
                                                ("gpt2-large", 0.77), ("mistral-7b", 7.2)])  # fmt: skip
def test_sizes_are_the_published_ones(name: str, billions: float) -> None:
    size = blocks.SIZES[name]
    with torch.device("meta"):
        count = sum(p.numel() for p in blocks.Whole(size, 2).parameters())
        one = sum(p.numel() for p in blocks.Block(size).parameters() if p.dim() == 2)
    assert one == size.block_parameters
    assert (count + (size.layers - 2) * one) / 1e9 == pytest.approx(billions, rel=0.01)


@pytest.mark.parametrize("name", blocks.TINY)
def test_a_step_with_a_full_cache_is_the_last_token_of_the_whole(name: str) -> None:
    size = blocks.TINY[name]
    stack = blocks.Blocks(size, 2).double()
    x = torch.randn(2, 6, size.width, dtype=torch.float64)
    caches = [blocks.Cache(size, 2, 6, x) for _ in range(2)]
    for position in range(6):
        # Entries that are still to come take no part: they are masked by asking for the last position's result alone,
        # and are all filled by then.
        for cache in caches:
            cache.position.fill_(position)
    whole = stack(x)
    filled = _filled(stack, x, size)
    step = stack(x[:, -1:], filled)
    assert torch.allclose(step[:, 0], whole[:, -1], atol=1e-9)


def _filled(stack: blocks.Blocks, x: Tensor, size: blocks.Size) -> list[blocks.Cache]:
    """Caches as a prefill of all tokens leaves them: the keys and values that each block computes."""
    caches = [blocks.Cache(size, x.shape[0], x.shape[1], x) for _ in stack.blocks]
    turn = None
    if size.family == "llama":
        turn = blocks._turn(x.shape[1], size.width // size.heads, 0, x)
    for block, cache in zip(stack.blocks, caches, strict=True):
        assert isinstance(block, blocks.Block)
        attention, normed = block.attention, block.attention_norm(x)
        shape = (*x.shape[:2], size.groups, size.width // size.heads)
        k, v = (part(normed).view(shape).transpose(1, 2) for part in (attention.k, attention.v))
        cache.keys, cache.values = (k if turn is None else blocks._turned(k, turn)), v
        x = block(x, turn)
    return caches


def test_blocks_alike_share_one_graph() -> None:
    def make() -> nn.Module:
        return blocks.Blocks(blocks.TINY["tiny-llama"], 3)

    found = contestants.draw(make, 64, 0.25, torch.float32, Options(), "double_pruned")
    graphs = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    for contender in found.names():
        model = found.of(contender)
        assert isinstance(model, blocks.Blocks)
        contestants._share_classes(list(model.blocks))
        for block in model.blocks:
            block.compile(backend=backend)
        model(torch.randn(1, 4, 64, requires_grad=True))
    torch.compiler.reset()
    assert len(graphs) == 3, "one each for dense, sparse, and sparse with adapters"


# --- the other suites ------------------------------------------------------------------------------------------------


def test_model_cases(uncompiled: None, known_limits: limits.Limits) -> None:
    found = run_cases("model", r"model/tiny-.*/(train/b2x16/r1.56%|prefill/b2x16|decode/b2)/bf16/t1")
    assert {m.name for m in found} == {"block_train", "block_prefill", "block_decode"}
    for m in found:
        assert set(m.seconds) == {"dense", "slope", "slope_adapters"}
        assert set(m.speedup["slope_adapters"]) == {"dense", "slope"}
        assert m.facts["weights"]["slope"] > 0
        assert m.facts["floor"]["dense"]["seconds"] > m.facts["floor"]["sparse"]["seconds"] > 0
    for m in (m for m in found if m.name == "block_train"):
        state, adapted = m.facts["state"], m.facts["state"]["slope_adapters"]
        dense, sparse = (memory_state.total(state[n], "linears") for n in ("dense", "slope"))
        assert sparse / dense < 0.55
        assert state["slope"]["adapters"]["gradients"] == 0 < adapted["adapters"]["gradients"]
        assert m.facts["activations"]["dense"] is None, "nobody counts a CPU's allocations"


def test_models_shrink_until_they_fit() -> None:
    asked = []

    def measured(layers: int) -> Measurement:
        asked.append(layers)
        if layers > 15:
            raise torch.OutOfMemoryError("too large")
        return Measurement("x", {}, {}, {"layers": layers})

    size = blocks.SIZES["llama-3-8b"]
    assert gpu_model._fitting(measured, 1.0, size, Options()).facts == {"layers": 15}
    assert asked == [32, 22, 15]

    def never(layers: int) -> Measurement:
        raise torch.OutOfMemoryError("too large")

    with pytest.raises(torch.OutOfMemoryError):
        gpu_model._fitting(never, 1.0, size, Options(layers=2))


def test_layer_cases(uncompiled: None, known_limits: limits.Limits) -> None:
    forward, train = run_cases("layer", r"layer/tiny-llama/(forward|train)/m4/bf16/t1")
    assert forward.name == "linears_forward"
    assert set(forward.seconds) == {"dense", "slope", "slope_adapters"}
    assert train.name == "linears_train"
    assert train.facts["floor"]["dense"]["seconds"] > 0
    assert len(train.facts["shapes"]) == 7
    assert "torchao" in {*train.seconds, *train.facts["left_out"]}


def test_memory_grows_by_the_same_with_every_block() -> None:
    size, options = blocks.TINY["tiny-opt"], Options(tiny=True)
    one, two, three = (memory_state._states(size, depth, "bfloat16", options) for depth in (1, 2, 3))
    for contender in three:
        assert memory_state.continued(one[contender], two[contender], 3) == three[contender]
    linears = {name: memory_state.total(state, "linears") for name, state in three.items()}
    assert linears["slope"] / linears["dense"] < 0.55
    assert linears["slope_inference"] / linears["dense_inference"] == 0.5625
    assert memory_state.total(three["slope_r6.25%"], "adapters") > 0
    assert memory_state.total(three["slope"], "adapters") == 0


def test_quality_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = [c.id for c in cases.cases("quality", Options())]
    assert [name.split("/")[2] for name in ids[: len(quality.VARIANTS)]] == list(quality.VARIANTS)
    assert {name.split("/")[3] for name in ids[: len(quality.VARIANTS)]} == {"s0"}
    dense, exact, adapters = run_cases("quality", r"quality/.*/(dense|exact|adapters)/s0")
    torch.compiler.reset()
    assert [m.facts["variant"] for m in (dense, exact, adapters)] == ["dense", "exact", "adapters"]
    assert dense.facts["state_bytes"] > exact.facts["state_bytes"]
    assert all(0 < m.facts["validation_loss"] < 8 for m in (dense, exact, adapters))
    assert adapters.facts["settings"]["adapter_rank"] == 2
    half = quality.settings("dense_half", quality.SMALL, 1)
    assert (half.layers, half.sparse, half.seed) == (quality.SMALL["layers"] // 2, False, 1)
    assert quality.settings("refresh_10", quality.SMALL, 0).slope_config().column_refresh == 10


# --- correctness -----------------------------------------------------------------------------------------------------


def test_products_are_checked_in_every_way() -> None:
    for m in run_cases("correctness", r"correctness/products/m5/76x140/(bf16|fp32)/t1"):
        assert m.facts["passed"], m.facts["checks"]
        ways = {way for way in correctness.WAYS for name in m.facts["checks"] if name.endswith(f"({way})")}
        assert ways == set(correctness.WAYS)
        assert "forward: expanded" in m.facts["checks"]


def test_a_forced_way_is_taken_and_given_back() -> None:
    before = gpu_rules.sparse, cpu_rules.sparse, gpu_rules.way, gpu_rules.fingerprint
    call = ("forward", 1, 4, 4, torch.float32, "GPU")
    with correctness.forced("mma_sp"):
        assert gpu_rules.sparse(*call) is True
        assert gpu_rules.way(*call, ("triton", "mma_sp", "expanded")) == "mma_sp"
        assert gpu_rules.way(*call, ("triton", "expanded")) == "expanded", "where it cannot be"
        assert gpu_rules.fingerprint("GPU") == "forced mma_sp"
    with correctness.forced("expanded"):
        assert cpu_rules.sparse("forward", 64, torch.float32, "avx2") is False
    assert (gpu_rules.sparse, cpu_rules.sparse, gpu_rules.way, gpu_rules.fingerprint) == before
    assert {setting.way for setting in model_checks.SETTINGS} == {None, *gpu_rules.WAYS}, "every way in a model"


def test_a_wrong_product_does_not_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.linear
    monkeypatch.setattr(ops, "linear", lambda x, *rest: right(x, *rest) * 1.02)
    (m,) = run_cases("correctness", r"correctness/products/m5/76x140/bf16/t1")
    assert not m.facts["passed"]
    assert not m.facts["checks"]["forward: linear (rule)"]["passed"]
    assert m.facts["checks"]["grad_weight: kept (rule)"]["passed"]


def test_what_raises_does_not_pass() -> None:
    def fails() -> Any:
        raise RuntimeError("no image")

    truth = (torch.ones(1), torch.ones(1), torch.ones(1))
    checked = correctness._checked(Choice("forward", "x", "forward", fails), {"forward": truth}, torch.float32)
    assert checked == {"passed": False, "raised": "RuntimeError: no image"}


def test_models_are_compared_gradient_by_gradient(uncompiled: None) -> None:
    """Uncompiled, so that the exact gradient is what runs."""
    setting = model_checks.Setting("gpt", "bfloat16", None, "exact")
    (m,) = model_checks._run(setting, Options(tiny=True), correctness.forced, Run(QUICK, CpuStopwatch()))
    assert m.facts["passed"], m.facts["errors"]
    assert m.facts["errors"]["gradients"]["slope"] > 0
    with pytest.raises(ArithmeticError, match="some parameters only: b"):
        model_checks._error({"a": torch.ones(1)}, {"a": torch.ones(1), "b": torch.ones(1)})


@pytest.mark.slow
def test_model_checks_compiled() -> None:
    (m,) = run_cases("correctness", "correctness/model/.*")
    assert m.facts["passed"], m.facts["errors"]


# --- profiles --------------------------------------------------------------------------------------------------------


def test_a_profile_is_a_note(tmp_path: Path, uncompiled: None, known_limits: limits.Limits,
                             capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    words = ["profile", "--suite", "layer", "--case", "layer/tiny-llama/forward/m4", "--tiny", "--out", str(tmp_path)]
    assert command.main(words) == 0
    (path,) = tmp_path.iterdir()
    assert str(path) in capsys.readouterr().out
    text = path.read_text()
    for contender in ("dense", "slope", "slope_adapters"):
        assert re.search(rf"^## {contender}: \d+\.\d+ ms$", text, re.MULTILINE)
    assert "`slope::expand`" in text.split("## slope:")[1].split("## slope_adapters")[0]
    assert "`python -m benchmarks profile --suite layer --case layer/tiny-llama/forward/m4 --tiny`" in text
    with pytest.raises(SystemExit):
        command.main([*words[:4], "no such case", "--tiny"])


def test_own_times_are_those_of_a_call() -> None:
    a = torch.randn(64, 64)
    found = profiling.kernels(lambda _: a @ a, CPU)
    assert next(kernel for kernel in found if kernel.name == "aten::mm").calls == 1


# --- with nothing but torch ------------------------------------------------------------------------------------------

BARE = """
import importlib.machinery
import sys
missing = {"tabulate", "tqdm", "matplotlib", "transformers", "pytest"}
find = importlib.machinery.PathFinder.find_spec
importlib.machinery.PathFinder.find_spec = staticmethod(
    lambda name, *rest: None if name.partition(".")[0] in missing else find(name, *rest)
)
import torch
torch.compile = lambda function, **_: function
from benchmarks import __main__, rotation
rotation.cache_bytes = lambda _: 1 << 14
status = __main__.main(sys.argv[1:])
assert not missing & set(sys.modules), missing & set(sys.modules)
sys.exit(status)
"""


def test_suites_run_with_nothing_but_torch(tmp_path: Path) -> None:
    only = "products/m5/76x140/bf16|64x64/m1/bf16|tiny-opt/(state/bf16|decode/b1|train/m4)"
    words = ["--suite", "correctness", "kernels", "layer", "model", "memory", "--tiny", "--threads", "1"]
    words += ["--only", only, "--case-seconds", "0", "--out", str(tmp_path), "--minutes", "5"]
    done = subprocess.run(
        [sys.executable, "-c", BARE, "run", *words], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "5 done, 0 failed, 0 done before, 0 left" in done.stdout
    assert "[1/1, 0 s] correctness/products/m5/76x140/bf16/t1" in done.stderr
