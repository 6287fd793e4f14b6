"""GPT-2, LLaMA, OPT and BERT from transformers' config classes: both ways in, forward and all gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import slope_compile as slope
from masked import assert_same_gradients, every_entry, is_exactly, masked_copy, masks_of, picked_now
from recording import Recording, compiled_way, record
from recording import fresh_dynamo as fresh_dynamo
from slope_compile.kernels import ops
from slope_compile.pattern import Pattern
from tiny_transformers import HIDDEN, VOCABULARY, WIDTH, gpt2, llama
from tolerances import assert_same

transformers = pytest.importorskip("transformers")

TIED, FIRST, HEAD = slope.Reason.TIED, slope.Reason.FIRST, slope.Reason.HEAD


def opt() -> nn.Module:
    config = transformers.OPTConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, ffn_dim=HIDDEN, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, dropout=0.0, attention_dropout=0.0, word_embed_proj_dim=WIDTH,
    )  # fmt: skip
    return transformers.OPTForCausalLM(config)  # type: ignore[no-any-return]


def bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=HIDDEN, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=16, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.BertForMaskedLM(config)  # type: ignore[no-any-return]


def _paths(layers: str, names: str, first: str) -> set[str]:
    """Every linear of two layers but the first ones."""
    return {f"{layers}.{i}.{name}" for i in (0, 1) for name in names.split() if i or name not in first.split()}


EXPECTED: dict[Callable[[], nn.Module], tuple[set[str], dict[str, slope.Reason]]] = {
    gpt2: (
        _paths("transformer.h", "attn.c_attn attn.c_proj mlp.c_fc mlp.c_proj", "attn.c_attn"),
        # Tied, and named by whichever of its two names Dynamo meets first.
        {"transformer.h.0.attn.c_attn": FIRST, "transformer.wte": TIED},
    ),
    llama: (
        _paths(
            "model.layers",
            "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj "
            "mlp.gate_proj mlp.up_proj mlp.down_proj",
            "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
        ),
        {f"model.layers.0.self_attn.{name}_proj": FIRST for name in "qkv"} | {"lm_head": HEAD},
    ),
    opt: (
        _paths(
            "model.decoder.layers",
            "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.out_proj fc1 fc2",
            "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
        ),
        {f"model.decoder.layers.0.self_attn.{name}_proj": FIRST for name in "qkv"}
        | {"model.decoder.embed_tokens": TIED},
    ),
    bert: (
        _paths(
            "bert.encoder.layer",
            "attention.self.query attention.self.key attention.self.value attention.output.dense "
            "intermediate.dense output.dense",
            "attention.self.query attention.self.key attention.self.value",
        )
        | {"cls.predictions.transform.dense"},
        {f"bert.encoder.layer.0.attention.self.{name}": FIRST for name in ("query", "key", "value")}
        | {"bert.embeddings.word_embeddings": TIED},
    ),
}
"""Model -> the linears that the method makes sparse, and the reason for each other one."""


def run(model: Callable[..., Any], ids: Tensor) -> Tensor:
    """Forward and backward; returns the logits."""
    logits: Tensor = model(input_ids=ids).logits
    F.cross_entropy(logits.flatten(0, 1), ids.flatten()).backward()
    return logits.detach()


def dense_model(make: Callable[[], nn.Module]) -> nn.Module:
    model = make()
    # LLaMA's norm and rotation compute in float32 whatever the model's dtype is: there float64 would show nothing.
    model = model if make is llama else model.double()
    model.config.use_cache = False  # type: ignore[union-attr]
    # In training mode some versions of OPT branch on a random number (layer drop), which breaks the graph.  There is no
    # dropout in any of these models, so nothing else depends on the mode.
    return model.train(make is not opt)


def check(recording: Recording, make: Callable[[], nn.Module]) -> None:
    """One graph, every eligible linear a sparse product, each other one dense with its reason."""
    sparse, reasons = EXPECTED[make]
    (graph,) = recording
    assert set(recording.sparse_paths) == sparse
    assert recording.reasons == reasons
    assert (graph.sparse, graph.dense) == (len(sparse), len(reasons))
    assert graph.after[ops.expand] == 0, "no dense weight is built"


def marks_of(make: Callable[[], nn.Module], way: str, backward: str) -> list[pytest.MarkDecorator]:
    """By default one cell of each model, and two of the one whose weights are transposed: each way, each backward."""
    few = {(gpt2, "A", "double_pruned"), (gpt2, "B", "exact"), (llama, "B", "exact"), (opt, "B", "double_pruned")}
    return [] if (make, way, backward) in {*few, (bert, "A", "double_pruned")} else [pytest.mark.slow]


@pytest.mark.parametrize(
    ("make", "way", "backward"),
    [
        pytest.param(make, way, backward, id=f"{make.__name__}-{way}-{backward}", marks=marks_of(make, way, backward))
        for make in EXPECTED
        for way in "AB"
        for backward in ("exact", "double_pruned")
        # All four for the one whose weights are transposed, and each way and each backward for every model.
        if make is gpt2 or ((way == "A") == (backward == "double_pruned")) == (make is not opt)
    ],
)
def test_compiled_equals_the_masked_reference(
    make: Callable[[], nn.Module], way: str, backward: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recording = record(monkeypatch)
    dense, ids = dense_model(make), torch.randint(3, VOCABULARY, (2, 7))
    model, compiled_model = compiled_way(way, dense, fields={"backward": backward}, fullgraph=True)
    logits = run(compiled_model, ids)
    check(recording, make)

    masks = masks_of(model)
    assert set(masks) == EXPECTED[make][0]
    assert all(is_exactly(Pattern(2, 4), mask) for mask in masks.values())
    reference = masked_copy(dense, masks, picked_now if backward == "double_pruned" else every_entry)
    assert_same(logits, run(reference, ids))
    assert_same_gradients(model, reference)


@pytest.mark.slow
def test_through_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    # In float32: Inductor of torch 2.11 cannot compile this model in float64, dense or not.
    recording = record(monkeypatch)
    dense, ids = dense_model(gpt2).float(), torch.randint(3, VOCABULARY, (2, 7))
    model, compiled_model = compiled_way("B", dense, "inductor")
    logits = run(compiled_model, ids)
    check(recording, gpt2)
    reference = masked_copy(dense, masks_of(model), picked_now)
    assert_same(logits, run(reference, ids))
    assert_same_gradients(model, reference)


def test_adapters_in_a_model_with_conv1d(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled equals eager with the adapters on; their down-projections are products of their own."""
    recording = record(monkeypatch)
    dense, ids = dense_model(gpt2), torch.randint(3, VOCABULARY, (2, 7))
    model, compiled_model = compiled_way("B", dense, fields={"adapter_rank": 3, "backward": "exact"})
    slope.set_adapters(model, True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".1.B"):
                parameter.normal_()
    eager = copy.deepcopy(model)
    logits = run(compiled_model, ids)
    assert_same(logits, run(eager, ids))
    for name, parameter in eager.named_parameters():
        assert parameter.grad is not None
        actual = model.get_parameter(name).grad
        assert actual is not None
        assert_same(actual, parameter.grad, name)
    sparse, reasons = EXPECTED[gpt2]
    (graph,) = recording
    assert (graph.sparse, graph.dense) == (len(sparse), len(reasons) + len(sparse))
