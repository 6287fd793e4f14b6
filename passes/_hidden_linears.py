"""Operators that hold linears inside, each with a definition in which these can be seen, and how it is traced.

Private names used, tested on torch 2.11 and 2.13: ``torch._transformer_encoder_layer_fwd`` and
``torch._native_multi_head_attention`` (the fast paths of encoder layers and attention in eval mode without gradients)
with the order of their arguments, and ``make_fx`` with ``pre_dispatch=True``, which keeps ``aten.linear``.
``torch.nn.functional.multi_head_attention_forward`` is its own definition: Dynamo does not look inside.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from slope_compile.passes._higher_order import in_transform
from slope_compile.passes.graph import value


class _NotCovered(Exception):
    """A definition is asked for something that only the operator itself computes."""


def encoder_layer(
    src: Tensor, embed_dim: int, num_heads: int, qkv_weight: Tensor, qkv_bias: Tensor, proj_weight: Tensor,
    proj_bias: Tensor, use_gelu: bool, norm_first: bool, eps: float, norm_weight_1: Tensor, norm_bias_1: Tensor,
    norm_weight_2: Tensor, norm_bias_2: Tensor, ffn_weight_1: Tensor, ffn_bias_1: Tensor, ffn_weight_2: Tensor,
    ffn_bias_2: Tensor, mask: Tensor | None = None, mask_type: int | None = None,
) -> Tensor:  # fmt: skip
    """One layer of ``nn.TransformerEncoder``, ``[B, T, D] -> [B, T, D]``."""

    def attention(x: Tensor) -> Tensor:
        weights = (qkv_weight, qkv_bias, proj_weight, proj_bias)
        return self_attention(x, x, x, embed_dim, num_heads, *weights, mask, False, True, mask_type)[0]

    def mlp(x: Tensor) -> Tensor:
        x = F.linear(x, ffn_weight_1, ffn_bias_1)
        return F.linear(F.gelu(x) if use_gelu else F.relu(x), ffn_weight_2, ffn_bias_2)

    def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), weight, bias, eps)

    first, second = (norm_weight_1, norm_bias_1), (norm_weight_2, norm_bias_2)
    if norm_first:
        src = src + attention(norm(src, *first))
        return src + mlp(norm(src, *second))
    src = norm(src + attention(src), *first)
    return norm(src + mlp(src), *second)


def self_attention(
    query: Tensor, key: Tensor, value: Tensor, embed_dim: int, num_head: int, qkv_weight: Tensor, qkv_bias: Tensor,
    proj_weight: Tensor, proj_bias: Tensor, mask: Tensor | None = None, need_weights: bool = True,
    average_attn_weights: bool = True, mask_type: int | None = None,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention of ``[B, T, D]`` to itself.

    ``mask`` is true where nothing is attended to: ``[T, T]`` (type 0), ``[B, T]`` (type 1), ``[B, H, T, T]`` (type 2).

    Raises:
        _NotCovered: the call returns attention weights, or its keys are not the queries.
    """
    if need_weights or not (query is key is value):
        raise _NotCovered
    qkv = F.linear(query, qkv_weight, qkv_bias).unflatten(-1, (3, num_head, embed_dim // num_head))
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()  # [B, H, T, d] each
    keep = None if mask is None else mask.logical_not()
    if keep is not None and mask_type == 1:
        keep = keep[:, None, None]
    y = F.scaled_dot_product_attention(q, k, v, keep)
    return F.linear(y.transpose(1, 2).flatten(-2), proj_weight, proj_bias), None


DEFINITIONS: dict[Any, Callable[..., Any]] = {
    F.multi_head_attention_forward: F.multi_head_attention_forward,
    torch._transformer_encoder_layer_fwd: encoder_layer,
    torch.ops.aten._transformer_encoder_layer_fwd.default: encoder_layer,
    torch._native_multi_head_attention: self_attention,
    torch.ops.aten._native_multi_head_attention.default: self_attention,
}


def trace(node: Node) -> GraphModule | None:
    """The definition of a node's operator for its operands, as a graph that takes ``node.all_input_nodes``.

    None where the graph carries no values, or the definition does not cover the call.  Errors of the operators in the
    definition are raised: they say more than that the call is not covered.
    """
    inputs = node.all_input_nodes
    values = [value(n) for n in inputs]
    mode = next((v.fake_mode for v in values if hasattr(v, "fake_mode")), None)
    if mode is None or any(v is None or in_transform(v) for v in values):
        return None

    def run(*given: Any) -> Any:
        at = dict(zip(inputs, given, strict=True))
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: at[n])
        return DEFINITIONS[node.target](*args, **kwargs)

    try:
        with mode, torch.no_grad():
            return make_fx(run, pre_dispatch=True)(*values)
    except _NotCovered:
        return None
