"""The rules by name and shape: what is a head, what reads the first input.

The paths are those of real model code; where a rule once misjudged one, the case says so.
"""

from __future__ import annotations

import pytest
import torch

from slope_compile.config import SlopeConfig
from slope_compile.dtypes import DTYPES
from slope_compile.report import Reason
from slope_compile.rules import (
    HEAD_NAMES,
    first_linears,
    fits,
    holds_experts,
    in_block,
    is_head,
    is_router,
    layer_path,
)

NO_EMBEDDING: frozenset[int] = frozenset()
GPT2_MEDIUM = frozenset({50257, 1024})
"""Rows of the token and of the position table; the second is also the number of features."""


@pytest.mark.parametrize(
    ("path", "N", "vocabularies", "last", "head"),
    [
        pytest.param("lm_head", 100, NO_EMBEDDING, False, True, id="by_name"),
        pytest.param("model.decoder.lm_head", 100, NO_EMBEDDING, False, True, id="by_name_inside_a_module"),
        pytest.param("0.lm_head", 100, NO_EMBEDDING, False, True, id="by_name_in_a_sequential"),
        pytest.param("cls.predictions.decoder", 100, NO_EMBEDDING, False, True, id="bert_mlm_decoder"),
        pytest.param("cls.seq_relationship", 2, NO_EMBEDDING, False, True, id="bert_nsp"),
        pytest.param("classifier", 2, NO_EMBEDDING, False, True, id="classifier"),
        pytest.param("model.decoder.layers.0.fc1", 100, NO_EMBEDDING, False, False, id="decoder_in_the_path"),
        pytest.param("to_tokens", 50257, GPT2_MEDIUM, False, True, id="one_feature_per_token"),
        pytest.param("transformer.h.0.attn.c_proj", 1024, GPT2_MEDIUM, False, False, id="as_many_as_positions"),
        pytest.param("to_bytes", 99, NO_EMBEDDING, True, True, id="last_linear"),
        pytest.param("net.4", 10, NO_EMBEDDING, True, True, id="last_of_a_sequential"),
        pytest.param("layers.3.mlp.down", 64, NO_EMBEDDING, True, False, id="last_linear_of_a_backbone"),
        pytest.param("layers.3.mlp.up", 64, NO_EMBEDDING, False, False, id="ordinary"),
        pytest.param("blocks.3.attention.output", 64, GPT2_MEDIUM, False, False, id="by_name_in_a_block"),
        pytest.param("layers.61.shared_head.head", 50257, GPT2_MEDIUM, False, True, id="for_tokens_in_a_block"),
        pytest.param("bert.pooler.dense", 64, NO_EMBEDDING, False, False, id="bert_pooler_is_pruned"),
    ],
)
def test_heads(path: str, N: int, vocabularies: frozenset[int], last: bool, head: bool) -> None:
    assert is_head(path, N, vocabularies, last) is head


def test_every_head_name_is_one() -> None:
    assert all(is_head(f"model.{name}", 7, NO_EMBEDDING, False) for name in HEAD_NAMES)
    assert not any(is_head(f"model.{name}_block", 7, NO_EMBEDDING, False) for name in HEAD_NAMES)


@pytest.mark.parametrize(
    ("path", "inside"),
    [
        ("layers.3.mlp.up", True),
        ("h.0.attn", True),
        ("net.4", False),
        ("lm_head", False),
        ("layer3.mlp", False),
        ("", False),
    ],
)
def test_blocks_are_numbers_in_the_path(path: str, inside: bool) -> None:
    assert in_block(path) is inside


@pytest.mark.parametrize(
    ("paths", "first"),
    [
        pytest.param([], set(), id="no_linear"),
        pytest.param(["up", "down"], {"up"}, id="plain"),
        pytest.param(["h.0.attn.c_attn", "h.0.attn.c_proj"], {"h.0.attn.c_attn"}, id="gpt2_fused"),
        pytest.param(
            [f"layers.{i}.self_attn.{n}_proj" for i in (0, 1) for n in "qkvo"],
            {f"layers.0.self_attn.{n}_proj" for n in "qkv"},
            id="llama",
        ),
        pytest.param(
            [f"layers.0.self_attn.{n}" for n in ("k_proj", "v_proj", "q_proj", "out_proj")],
            {f"layers.0.self_attn.{n}_proj" for n in "qkv"},
            id="opt",
        ),
        pytest.param(
            [
                *(f"layer.0.attention.self.{n}" for n in ("query", "key", "value")),
                *("layer.0.attention.output.dense", "layer.0.intermediate.dense"),
            ],
            {f"layer.0.attention.self.{n}" for n in ("query", "key", "value")},
            id="bert",
        ),
        pytest.param(["attn.qkv", "attn.proj"], {"attn.qkv"}, id="fused_qkv"),
        pytest.param(["a.wq", "a.wk", "a.wv", "a.wo"], {"a.wq", "a.wk", "a.wv"}, id="w_names"),
        pytest.param(["h.0.attn.o_proj", "h.0.attn.qkv_proj", "h.0.up"], {"h.0.attn.qkv_proj"}, id="phi3_output_first"),
        pytest.param(["kvbox", "q_proj"], {"kvbox"}, id="letters_inside_a_word"),
    ],
)
def test_first_linears(paths: list[str], first: set[str]) -> None:
    assert first_linears(paths) == first


MIXTURE = ("0.mlp", "0.mlp.gate", "0.mlp.experts", "0.mlp.experts.0.up", "1.mlp.gate")


@pytest.mark.parametrize(
    ("path", "router"),
    [
        pytest.param("0.mlp.gate", True, id="beside_experts"),
        pytest.param("0.mlp.gate.classifier", True, id="inside_a_router"),
        pytest.param("1.mlp.gate", False, id="gate_of_a_gated_mlp"),
        pytest.param("0.mlp.experts.0.up", False, id="expert"),
        pytest.param("0.mlp.gate_proj", False, id="another_name"),
    ],
)
def test_routers(path: str, router: bool) -> None:
    assert is_router(path, MIXTURE) is router


@pytest.mark.parametrize(
    ("parameter", "path"),
    [
        ("h.0.mlp.c_fc.weight", "h.0.mlp.c_fc"),
        ("weight", ""),
        ("h.0.mlp.c_fc.parametrizations.weight.original", "h.0.mlp.c_fc"),
        ("h.0.mlp.c_fc.parametrizations.weight.1.B", "h.0.mlp.c_fc"),
        ("parametrizations.weight.original", ""),
        ("attn.in_proj_weight", "attn.in_proj_weight"),
        ("attn.parametrizations.in_proj_weight.original", "attn.in_proj_weight"),
    ],
)
def test_a_weight_goes_by_its_module_and_any_other_parameter_by_its_own_name(parameter: str, path: str) -> None:
    assert layer_path(parameter) == path


@pytest.mark.parametrize(
    ("name", "shape", "experts"),
    [
        ("mlp.experts.gate_up_proj", (4, 128, 32), True),
        ("mlp.experts.scale", (4, 32), False),
        ("embeddings.position_embeddings", (1, 5, 32), False),
        ("conv1.weight", (32, 8, 3), False),
    ],
)
def test_tensors_of_several_experts(name: str, shape: tuple[int, ...], experts: bool) -> None:
    assert holds_experts(name, shape) is experts


@pytest.mark.parametrize(
    ("dtype", "shape", "reason", "detail"),
    [
        *((dtype, (8, 8), Reason.SELECTED, "") for dtype in DTYPES),
        (torch.complex64, (8, 8), Reason.DTYPE, "torch.complex64"),
        (torch.float32, (8, 6), Reason.SHAPE, "K = 6 is not a positive multiple of 4"),
        (torch.float32, (8, 0), Reason.SHAPE, "K = 0 is not a positive multiple of 4"),
        (torch.float32, (6, 8), Reason.SELECTED, "exact backward, as N = 6 is not a multiple of 4"),
    ],
)
def test_dtype_and_shape(dtype: torch.dtype, shape: tuple[int, int], reason: Reason, detail: str) -> None:
    assert fits(dtype, shape, SlopeConfig().layer("a")) == (reason, detail)


def test_the_exact_backward_has_nothing_to_explain() -> None:
    assert fits(torch.float32, (6, 8), SlopeConfig(backward="exact").layer("a")) == (Reason.SELECTED, "")
