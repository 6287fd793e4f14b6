"""Operators that hide linears are spelled out, with the same results in every way that they are called."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import slope_compile as slope
from graphs import dynamo_graph, nodes
from slope_compile.dense_weights import DynamoWeights
from slope_compile.options import EXPORT_FUSIONS
from slope_compile.passes._hidden_linears import DEFINITIONS
from slope_compile.passes.context import Context
from slope_compile.passes.decompose import Decompose
from slope_compile.passes.graph import regions
from slope_compile.report import Reason
from tolerances import assert_same

D, H, T, B = 8, 2, 5, 3
CAUSAL = torch.ones(T, T, dtype=torch.bool).triu(1)
PADDED = torch.arange(T) >= torch.tensor([[5], [4], [2]])


def decomposed(function: Any, *inputs: Any) -> tuple[Any, Context]:
    """A function's graph after the pass, ready to run, and the context of the pass."""
    found: list[Context] = []

    def work(module: torch.fx.GraphModule, given: list[Any]) -> None:
        assert any(nodes(module, target) for target in DEFINITIONS), "there is nothing hidden"
        found.append(Context(slope.SlopeConfig(), DynamoWeights(module, given, slope.SlopeConfig()), EXPORT_FUSIONS))
        Decompose(found[0])(module)
        for region in regions(module):
            region.graph.lint()

    module, given = dynamo_graph(function, *inputs, work=work)
    return (lambda: module(*given)), found[0]


ATTENTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "without_bias": ({"bias": False}, {}),
    "sequence_first": ({"batch_first": False}, {}),
    "weights_wanted": ({}, {"need_weights": True}),
    "causal": ({}, {"attn_mask": CAUSAL, "is_causal": True}),
    "padded": ({}, {"key_padding_mask": PADDED}),
    "added_keys": ({"add_bias_kv": True, "add_zero_attn": True}, {}),
}


@pytest.mark.parametrize("way", ATTENTIONS)
@pytest.mark.parametrize("training", [True, False])
def test_attention(way: str, training: bool) -> None:
    settings, given = ATTENTIONS[way]
    module = nn.MultiheadAttention(D, H, **{"batch_first": True, "dtype": torch.float64, **settings}).train(training)
    first = settings.get("batch_first", True)
    x = torch.randn(B, T, D, dtype=torch.float64) if first else torch.randn(T, B, D, dtype=torch.float64)
    given = {"need_weights": False, **given}

    def call(x: Tensor) -> list[Tensor]:
        return [part for part in module(x, x, x, **given) if part is not None]

    run, within = decomposed(call, x)
    expected, result = call(x), run()
    assert len(result) == len(expected) == 1 + given["need_weights"]
    for ours, theirs in zip(result, expected, strict=True):
        assert_same(ours, theirs)
    assert within.report.changes == {"decompose": 1}
    assert not within.report.decisions


@pytest.mark.parametrize("sizes", [{}, {"kdim": 6, "vdim": 4}], ids=["packed", "separate"])
def test_attention_to_something_else(sizes: dict[str, int]) -> None:
    module = nn.MultiheadAttention(D, H, dtype=torch.float64, **sizes)
    widths = (D, sizes.get("kdim", D), sizes.get("vdim", D))
    x, keys, values = (torch.randn(T, B, width, dtype=torch.float64) for width in widths)
    run, _ = decomposed(lambda: module(x, keys, values, need_weights=False)[0])
    assert_same(run()[0], module(x, keys, values)[0])


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("activation", [F.relu, F.gelu])
@pytest.mark.parametrize("mask", ["none", "causal", "padded", "both"])
def test_encoder_layers_in_eval_mode(norm_first: bool, activation: Any, mask: str) -> None:
    layer = nn.TransformerEncoderLayer(
        D, H, 16, activation=activation, norm_first=norm_first, batch_first=True, dtype=torch.float64
    ).eval()
    x = torch.randn(B, T, D, dtype=torch.float64)
    given = {
        "src_mask": CAUSAL if mask in ("causal", "both") else None,
        "src_key_padding_mask": PADDED if mask in ("padded", "both") else None,
    }
    with torch.no_grad():
        run, within = decomposed(lambda x: layer(x, **given), x)
        result = run()[0]
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            expected = layer(x, **given)
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
    # The fused operator leaves padded rows of the output undefined in part; the rest is the layer's.
    kept = ~PADDED if given["src_key_padding_mask"] is not None else torch.ones(B, T, dtype=torch.bool)
    assert_same(result[kept], expected[kept])
    assert within.report.changes == {"decompose": 1}


def test_what_no_definition_covers_is_refused_with_a_way_out() -> None:
    weights = [nn.Parameter(torch.randn(*shape)) for shape in ((3 * D, D), (3 * D,), (D, D), (D,))]
    x, keys = torch.randn(B, T, D), torch.randn(B, T, D)

    def call(x: Tensor, keys: Tensor) -> Tensor:
        operator: Any = torch._native_multi_head_attention
        output: Tensor = operator(x, keys, keys, D, H, *weights, None, False)[0]
        return output

    with torch.no_grad():
        _, within = decomposed(call, x, keys)
    assert [d.reason for d in within.report] == [Reason.FUSED_OPERATOR] * 2
    assert all("set_fastpath_enabled(False)" in d.why for d in within.report)


def test_an_error_of_an_operator_inside_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a definition itself can say that it does not cover a call; the way out would be wrong for anything else."""

    def fail(*_: object) -> Tensor:
        raise NotImplementedError("no such kernel")

    layer = nn.TransformerEncoderLayer(D, H, 16, batch_first=True).eval()
    monkeypatch.setattr(F, "scaled_dot_product_attention", fail)
    with torch.no_grad(), pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="no such kernel"):
        decomposed(layer, torch.randn(B, T, D))
