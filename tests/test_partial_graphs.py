"""Graphs that are a part of the model: graph breaks, checkpointed bodies, blocks compiled one by one.

Whatever part Dynamo hands over, the decisions are those for the whole model, and each block trains on its own weights.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import slope_compile as slope
from masked import assert_same_gradients, is_exactly, masked_copy, masks_of, masks_of_prepared, picked_now
from recording import compiled, compiled_way, every_way, record
from recording import fresh_dynamo as fresh_dynamo
from slope_compile.pattern import Pattern
from tolerances import assert_same
from toy import DENSE, SPARSE, Toy, step, token_ids, toy

NM = Pattern(2, 4)


def break_inside_blocks(model: Toy) -> Callable[[], None]:
    for block in model.blocks:
        block.between = torch._dynamo.graph_break
    stop: Callable[[], None] = torch._dynamo.graph_break
    return stop


def compile_blocks(model: Toy, **options: Any) -> Toy:
    for block in model.blocks:
        block.compile(backend=slope.slope, options={"compiler": "eager", **options})
    return model


def wrap_blocks(model: Toy, **options: Any) -> Toy:
    for i, block in enumerate(list(model.blocks)):
        model.blocks[i] = compiled(block, "eager", options=options)
    return model


@every_way
def test_graph_break_inside_a_block(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recording = record(monkeypatch)
    dense, ids = toy(), token_ids()
    break_inside_blocks(dense)
    model, run = compiled_way(way, dense)
    logits = step(run, ids)

    if way == "A":
        assert len(recording) >= 4, "one graph before and one after each break"
        assert recording.sparse_paths == list(SPARSE)
    else:
        assert len(recording) == 3, "what follows the break is alike in both blocks, prepared, and has one graph"
        assert recording.sparse_paths == list(SPARSE[:5])
    assert recording.sparse == len(recording.sparse_paths)
    reference = masked_copy(dense, masks_of(model), picked_now)
    assert_same(logits, step(reference, ids))
    assert_same_gradients(model, reference)


@pytest.mark.parametrize(
    "compile_them",
    [pytest.param(compile_blocks, id="block.compile()"), pytest.param(wrap_blocks, id="torch.compile(block)")],
)
@every_way
def test_compiling_block_by_block(
    way: str, compile_them: Callable[..., Toy], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first linear of a block is not that of the model, and its last one is no head."""
    recording = record(monkeypatch)
    dense, ids = toy(), token_ids()
    model = copy.deepcopy(dense)
    if way == "B":
        slope.sparsify_(model)
    compile_them(model)
    logits = step(model, ids)
    assert recording.sparse_paths == list(SPARSE)

    # Masks read from a model whose blocks have their plain names.
    plain = copy.deepcopy(dense)
    plain.load_state_dict(copy.deepcopy(dense).state_dict())
    slope.sparsify_(plain)
    reference = masked_copy(dense, masks_of_prepared(plain), picked_now)
    assert_same(logits, step(reference, ids))
    if compile_them is compile_blocks:
        assert_same_gradients(model, reference)


def test_one_graph_for_alike_models_keeps_each_its_own_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of a prepared model may share one compiled graph; the column masks of each are refreshed."""
    recording = record(monkeypatch)
    models = [prepared(toy(), column_refresh=1, first_dense=False, heads_dense=False)]
    models.append(copy.deepcopy(models[0]))
    holder = types.SimpleNamespace(model=models[0])
    run = torch.compile(
        lambda ids: holder.model(ids), backend=slope.slope, options={"compiler": "eager"}, fullgraph=True
    )
    ids = token_ids()
    for model in models:
        holder.model = model
        step(run, ids)
        before = column_masks(model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn_like(parameter))
        step(run, ids)
        after = column_masks(model)
        assert len(after) == len(SPARSE) + len(DENSE)
        assert [name for name in after if torch.equal(before[name], after[name])] == []
    assert len(recording) == 1


def prepared(model: Toy, **fields: Any) -> Toy:
    slope.sparsify_(model, slope.SlopeConfig(**fields))
    return model


def column_masks(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items() if name.endswith("column_mask")}


@every_way
def test_more_blocks_than_dynamo_recompiles_one_function(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a dense model every block is compiled by itself, and Dynamo's limit counts each on its own; prepared blocks
    that are alike share a graph.  None is left to eager."""
    recording = record(monkeypatch)
    counters.clear()
    model = toy()
    for _ in range(2):
        model.blocks.append(copy.deepcopy(model.blocks[1]))
    if way == "B":
        prepared(model)
    compile_blocks(model)
    with torch._dynamo.config.patch(recompile_limit=2):
        step(model, token_ids())
    assert recording.sparse == (len(SPARSE) + 8 if way == "A" else len(SPARSE))
    assert len(recording) == (4 if way == "A" else 2)
    assert counters["frames"]["ok"] == counters["frames"]["total"]
    assert all(is_exactly(NM, mask) for mask in masks_of(model).values())


def test_block_by_block_in_a_wrapper_goes_by_the_paths_of_the_model() -> None:
    """A module around the whole model changes no path, so the random masks are those of ``sparsify_``."""

    class Wrapper(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.model(ids)
            return y

    dense = toy()
    break_inside_blocks(dense)
    model = copy.deepcopy(dense)
    wrapper = Wrapper(compiled(model, "eager"))
    step(wrapper, token_ids())
    prepared = copy.deepcopy(dense)
    slope.sparsify_(prepared)
    expected = masks_of_prepared(prepared)
    actual = masks_of(model)
    assert list(actual) == list(expected) == list(SPARSE)
    assert all(torch.equal(actual[path], expected[path]) for path in SPARSE)


@pytest.mark.parametrize(
    ("way", "backward"),
    [
        pytest.param("A", "double_pruned", id="A_dense-double_pruned"),
        pytest.param("B", "exact", id="B_prepared-exact"),
        pytest.param("A", "exact", id="A_dense-exact", marks=pytest.mark.slow),
        pytest.param("B", "double_pruned", id="B_prepared-double_pruned", marks=pytest.mark.slow),
    ],
)
def test_activation_checkpointing(way: str, backward: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The linears stand in the bodies of ``tag_activation_checkpoint`` calls."""
    recording = record(monkeypatch)
    dense, ids = toy(checkpointed=True), token_ids()
    model, run = compiled_way(way, dense, fields={"backward": backward}, fullgraph=True)
    logits = step(run, ids)
    (graph,) = recording
    assert sum("checkpoint" in str(target) for target in graph.after.elements()) == 2
    assert sorted(recording.sparse_paths) == sorted(SPARSE)
    assert (graph.sparse, graph.dense) == (len(SPARSE), len(DENSE))
    columns = {} if backward == "exact" else {"columns": picked_now}
    reference = masked_copy(dense, masks_of(model), **columns)
    assert_same(logits, step(reference, ids))
    assert_same_gradients(model, reference)


class Encoder(nn.Module):
    """Containers of PyTorch's own around the linears: Dynamo starts no graph in their code."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.net = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16), nn.Linear(16, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.net(self.encoder(x))
        return y


@pytest.mark.parametrize("backward", [pytest.param("exact", marks=pytest.mark.slow), "double_pruned"])
def test_breaks_inside_containers_of_pytorch(backward: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prepared layers get graphs of their own where a break leaves the container to Python."""
    if backward == "double_pruned" and torch.__version__ < "2.12":
        pytest.skip("the attention's products run in Python, whose input gradient is the exact one")
    recording = record(monkeypatch)
    dense = Encoder().double()
    for module in dense.modules():
        if isinstance(module, nn.MultiheadAttention | nn.GELU):
            module.register_forward_hook(lambda *_: torch._dynamo.graph_break())
    model, run = compiled_way("B", dense, fields={"backward": backward})
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    run(x).square().sum().backward()
    # Dynamo of torch 2.11 leaves the attention's own products to Python, and the log says so.
    attention = 3 if torch.__version__ >= "2.12" else 0
    assert sum(one.sparse * len(one.calls) for one in recording) == attention + 4 + 2
    reference = masked_copy(dense, masks_of(model), *([] if backward == "exact" else [picked_now]))
    reference(x).square().sum().backward()
    assert_same_gradients(model, reference)
    model.zero_grad()
    slope.densify_(model)
    assert all(type(layer).forward is nn.Linear.forward for layer in model.modules() if isinstance(layer, nn.Linear))


@pytest.mark.parametrize("transform", [lambda f: torch.vmap(f), lambda f: torch.func.grad(lambda x: f(x).sum())])
@pytest.mark.parametrize("way", ["A", "B"])
def test_linears_inside_a_function_transform_stay_dense(way: str, transform: Any) -> None:
    dense = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)).double()
    if way == "B":
        slope.sparsify_(dense)
    x = torch.randn(3, 8, dtype=torch.float64)

    def transformed(x: torch.Tensor) -> Any:
        return transform(dense)(x)

    run = torch.compile(transformed, backend=slope.slope, options={"compiler": "aot_eager"})
    assert_same(run(x).detach(), transform(dense)(x).detach())
