"""The suites layer, model, memory and quality: their cases once at tiny sizes on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import benchmark_tools
from benchmark_tools import run_cases
from benchmarks import (
    blocks,
    cases,
    contestants,
    gpu_model,
    limits,
    memory_state,
    quality,
)
from benchmarks.cases import Measurement, Options


@pytest.fixture(autouse=True)
def small_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark_tools.shrink_cache(monkeypatch)


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark_tools.leave_uncompiled(monkeypatch)


@pytest.fixture
def known_limits(monkeypatch: pytest.MonkeyPatch) -> limits.Limits:
    return benchmark_tools.give_limits(monkeypatch)


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
        if layers > 1:
            raise torch.OutOfMemoryError("too large")
        return Measurement("x", {}, {}, {"layers": layers})

    size = blocks.SIZES["llama-3-8b"]
    assert gpu_model._fitting(measured, 1.0, size, Options()).facts == {"layers": 1}
    assert asked == [4, 2, 1]

    def never(layers: int) -> Measurement:
        raise torch.OutOfMemoryError("too large")

    with pytest.raises(torch.OutOfMemoryError):
        gpu_model._fitting(never, 1.0, size, Options(layers=2))


def test_the_first_models_are_those_with_a_bar_of_their_own() -> None:
    ids = [case.id.removeprefix("model/").rpartition("/bf16")[0] for case in cases.cases("model", Options())]
    assert tuple(ids[: len(gpu_model.FIRST)]) == gpu_model.FIRST
    assert len(set(ids)) == len(gpu_model.MEASURED) * 9


def test_layer_cases(uncompiled: None, known_limits: limits.Limits) -> None:
    forward, train = run_cases("layer", r"layer/tiny-llama/(forward|train)/m4/bf16/t1")
    assert forward.name == "linears_forward"
    assert set(forward.seconds) == {"dense", "slope", "slope_adapters"}
    assert train.name == "linears_train"
    assert train.facts["floor"]["dense"]["seconds"] > 0
    assert len(train.facts["shapes"]) == 7
    assert "torchao" in {*train.seconds, *train.facts["left_out"]}


@pytest.mark.slow
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


@pytest.mark.slow
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
