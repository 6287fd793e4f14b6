"""Timing in CUDA graphs, limits, and the suite kernels; what only a GPU has, by stand-ins."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import benchmark_tools
from benchmark_tools import CPU, QUICK, run_cases
from benchmarks import (
    ahead,
    cases,
    choices,
    gpu_kernels,
    limits,
    peers,
    replay,
)
from benchmarks.cases import Options, Run
from benchmarks.choices import Choice
from benchmarks.products import Problem, error_of
from benchmarks.timing import CpuStopwatch
from slope_compile.cost import DenseLayer, Layer
from slope_compile.kernels import (
    _cusparselt,
    cusparselt_search,
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


@pytest.fixture(autouse=True)
def small_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark_tools.shrink_cache(monkeypatch)


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark_tools.leave_uncompiled(monkeypatch)


@pytest.fixture
def known_limits(monkeypatch: pytest.MonkeyPatch) -> limits.Limits:
    return benchmark_tools.give_limits(monkeypatch)


# --- CUDA graphs, by stand-ins ---------------------------------------------------------------------------------------


class Graphs:
    """Stands in for CUDA graphs: calls during a capture are recorded and made again at a replay."""

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
    first = [name for name in ids if re.search(r"/m\d+/", name)][:24]
    assert {re.sub(r"/t\d+$", "", name) for name in first} == {
        f"kernels/{shape}/m{M}/bf16"
        for shape in ("16384x4096", "4096x16384", "4096x4096")
        for M in gpu_kernels.TOKENS
    }
    assert all("/m16384/" in name for name in first[:3])
    assert all("/m1/" in name for name in first[3:6])
    # Seven hidden sizes, three shapes, eight numbers of tokens, two dtypes; columns once a shape.
    assert len([name for name in ids if re.search(r"/m\d+/", name)]) == 7 * 3 * 8 * 2
    assert len([name for name in ids if "/columns/" in name]) == 7 * 3 * 2


def test_kernels_are_compiled_ahead_once_for_each_number_of_tokens() -> None:
    todo = ahead.tasks(cases.cases("kernels", Options()))
    assert {(task.dtype, task.M) for task in todo} == {("bfloat16", M) for M in gpu_kernels.TOKENS}
    assert {task.op for task in todo} == set(choices.OPS)
    assert {task.way for task in todo} == set(gpu_rules.WAYS) - {"cusparselt", "expanded"}
    assert len(set(todo)) == len(todo) == 8 * 5 * 4
    assert ahead.tasks(cases.cases("correctness", Options())) == []


def test_what_does_not_compile_ahead_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    task = ahead.Task("bfloat16", 4, 16, 32, "forward", "triton")
    monkeypatch.setattr(gpu_ops, "available", lambda _: False)
    assert ahead._compile("cpu", task) == [], "by the definition"

    def fails(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no registers left\nand more")

    monkeypatch.setattr(gpu_calls, "linear", fails)
    (why,) = ahead._compile("cpu", task)
    assert why.endswith("way='triton'): RuntimeError: no registers left")


def test_processes_compile_and_end_in_time() -> None:
    todo = [ahead.Task("bfloat16", 4, 16, 32, op, "wgmma_sp") for op in ("forward", "no such operator")]
    (why,) = ahead.compile_(todo, CPU, jobs=1, seconds=120.0)
    assert "KeyError: 'no such operator'" in why
    assert ahead.compile_(todo, CPU, jobs=1, seconds=0.0) == ["0 s are over"]


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


def test_cusparselt_is_searched_once_for_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """By one search for all layers, whose child stays; on a GPU alone."""
    asked: list[Any] = []

    class Search:
        def __init__(self, device: torch.device) -> None:
            asked.append(device)

        def run(self, products: Any, seconds: float) -> None:
            asked.extend(products)

    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(cusparselt_search, "Search", Search)
    for cached in (choices.verify, choices._search):
        cached.cache_clear()
    half = torch.float16
    for M in (16, 32, 16):
        choices.verify(gpu, "float16", M, 64, 96)
        choices.verify(CPU, "float16", M, 64, 96)
    assert asked == [gpu, *((half, M, *shape) for M in (16, 32) for shape in ((64, 96), (96, 64)))]
    for cached in (choices.verify, choices._search):
        cached.cache_clear()


def test_pytorchs_tensors_are_asked_in_float16_where_their_algorithm_was_verified(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Subclass:
        @staticmethod
        def from_dense(weight: Tensor) -> Tensor:
            return weight

    known: dict[Any, Any] = {}
    monkeypatch.setattr(torch.sparse, "SparseSemiStructuredTensorCUSPARSELT", Subclass)
    monkeypatch.setattr(torch.sparse, "SparseSemiStructuredTensorCUTLASS", Subclass)
    monkeypatch.setattr(_cusparselt, "known", lambda device: known)

    def works(dtype: str, kind: str = "CUSPARSELT") -> bool:
        problem = Problem.draw(16, 32, 64, dtype, CPU)
        make = peers._semi_structured(problem, kind, problem.x, peers._expanded(problem))
        with contextlib.suppress(RuntimeError):
            return error_of(make()(0), problem.truths()["forward"]) < 1e-2
        with pytest.raises(RuntimeError, match="was not verified"):
            make()
        return False

    assert works("bfloat16")
    assert works("float16", "CUTLASS")
    assert not works("float16")
    other, fixed = _cusparselt.Algorithm(7), _cusparselt.Algorithm(0)
    for product, verified in (((torch.float16, 32, 32, 64), (fixed,)), ((torch.float16, 16, 32, 64), (other,))):
        known[product] = verified
        assert not works("float16")
    known[torch.float16, 16, 32, 64] = (other, fixed)
    assert works("float16")


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
    monkeypatch.setattr(gpu_calls, "can", lambda way, *_: way in ("triton", "expanded"))
    monkeypatch.setattr(gluon_choices, "choices", lambda *_, **__: gluon_configs.MMA_SP[:2])
    monkeypatch.setattr(choices, "_gluon_product", product)
    problem = Problem.draw(40, 64, 128, "bfloat16", CPU)
    truths = problem.truths() | {"low_rank": choices.low_rank_truth(problem, 0.0156)}
    found = [
        *choices._ways(problem, 0.0156), *choices._triton(problem), *choices._gluon(problem),
        *choices._gluon(problem, 0.0156), *choices._gluon_double_pruned(problem), *choices.library(problem, 0.0),
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
