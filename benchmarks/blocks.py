"""Transformer blocks of published models in plain PyTorch: sizes as published, random weights, any number of blocks.

Nothing but torch is needed.  Two families: pre-norm blocks with LayerNorm, biases and a two-layer MLP (GPT-2, OPT), and
with RMSNorm, rotary positions, grouped key/value heads and a gated MLP (LLaMA, Mistral).  The attention is
``scaled_dot_product_attention``; for decoding each block has a key/value cache of fixed length.

Shapes: ``B`` sequences of ``T`` tokens, ``D`` = width, ``H`` heads of ``D / H``, ``G`` key/value heads.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """One published model."""

    width: int
    mlp: int
    heads: int
    layers: int
    vocabulary: int
    kv_heads: int = 0
    """Key/value heads; 0 = as many as heads."""
    family: Literal["gpt", "llama"] = "gpt"
    activation: Literal["gelu", "relu", "silu"] = "gelu"
    fused_qkv: bool = False
    """One projection for queries, keys and values, as GPT-2 has it."""
    positions: int = 0
    """Learned positions; 0 = none (rotary)."""
    tied: bool = False
    """Whether the head shares the token embedding's weight."""

    @property
    def groups(self) -> int:
        return self.kv_heads or self.heads

    @property
    def block_parameters(self) -> int:
        """Weights of the linears of one block."""
        attention = 2 * self.width**2 + 2 * self.width * (self.width // self.heads) * self.groups
        return attention + (3 if self.family == "llama" else 2) * self.width * self.mlp


def _opt(width: int, heads: int, layers: int) -> Size:
    return Size(
        width=width, mlp=4 * width, heads=heads, layers=layers, vocabulary=50272, activation="relu", positions=2050,
        tied=True,
    )  # fmt: skip


SIZES = {
    "llama-3-8b": Size(
        width=4096, mlp=14336, heads=32, kv_heads=8, layers=32, vocabulary=128256, family="llama", activation="silu",
    ),
    "opt-13b": _opt(5120, 40, 40),
    "gpt2-large": Size(
        width=1280, mlp=5120, heads=20, layers=36, vocabulary=50257, fused_qkv=True, positions=1024, tied=True,
    ),
    "opt-6.7b": _opt(4096, 32, 32),
    "mistral-7b": Size(
        width=4096, mlp=14336, heads=32, kv_heads=8, layers=32, vocabulary=32768, family="llama", activation="silu",
    ),
    "opt-2.7b": _opt(2560, 32, 32),
    "opt-30b": _opt(7168, 56, 48),
    "opt-66b": _opt(9216, 72, 64),
}  # fmt: skip
"""In the order in which a run measures them: those with a bar of their own first."""

TINY = {
    "tiny-llama": Size(width=64, mlp=160, heads=4, kv_heads=2, layers=2, vocabulary=64, family="llama",
                       activation="silu"),
    "tiny-opt": Size(width=64, mlp=256, heads=4, layers=2, vocabulary=64, activation="relu", positions=64, tied=True),
}  # fmt: skip


class Cache:
    """Keys and values of one block, ``[B, G, L, D / H]`` each, full: a step replaces the newest entry."""

    def __init__(self, size: Size, batch: int, length: int, like: Tensor) -> None:
        shape = (batch, size.groups, length, size.width // size.heads)
        self.keys, self.values = torch.randn_like(like.new_empty(shape)), torch.randn_like(like.new_empty(shape))
        self.position = torch.tensor([length - 1], device=like.device)


class Attention(nn.Module):
    """Causal self-attention, ``[B, T, D] -> [B, T, D]``."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.size = size
        bias, kv = size.family == "gpt", size.groups * (size.width // size.heads)
        if size.fused_qkv:
            self.qkv = nn.Linear(size.width, 3 * size.width, bias=bias)
        else:
            self.q = nn.Linear(size.width, size.width, bias=bias)
            self.k = nn.Linear(size.width, kv, bias=bias)
            self.v = nn.Linear(size.width, kv, bias=bias)
        self.out = nn.Linear(size.width, size.width, bias=bias)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor] | None, cache: Cache | None) -> Tensor:
        B, T, D = x.shape
        H, G = self.size.heads, self.size.groups
        parts = self.qkv(x).chunk(3, -1) if self.size.fused_qkv else (self.q(x), self.k(x), self.v(x))
        # [B, T, heads x D/H] -> [B, heads, T, D/H]
        q, k, v = (part.view(B, T, heads, D // H).transpose(1, 2) for part, heads in zip(parts, (H, G, G), strict=True))
        if turn is not None:
            q, k = _turned(q, turn), _turned(k, turn)
        if cache is not None:
            k = cache.keys.index_copy_(2, cache.position, k)
            v = cache.values.index_copy_(2, cache.position, v)
        # With a cache, the one new token sees all of it.
        y = F.scaled_dot_product_attention(q, k, v, is_causal=cache is None, enable_gqa=G != H)
        attended: Tensor = self.out(y.transpose(1, 2).reshape(B, T, D))
        return attended


class MLP(nn.Module):
    """``[B, T, D] -> [B, T, D]``, gated for LLaMA."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        bias = size.family == "gpt"
        self.activation: Any = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}[size.activation]
        self.gate = nn.Linear(size.width, size.mlp, bias=False) if size.family == "llama" else None
        self.up = nn.Linear(size.width, size.mlp, bias=bias)
        self.down = nn.Linear(size.mlp, size.width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.activation(self.up(x)) if self.gate is None else self.activation(self.gate(x)) * self.up(x)
        y: Tensor = self.down(inner)
        return y


class Block(nn.Module):
    """One pre-norm block, ``[B, T, D] -> [B, T, D]``."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        norm: Any = nn.RMSNorm if size.family == "llama" else nn.LayerNorm
        self.attention_norm, self.mlp_norm = norm(size.width), norm(size.width)
        self.attention, self.mlp = Attention(size), MLP(size)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor] | None = None, cache: Cache | None = None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), turn, cache)
        y: Tensor = x + self.mlp(self.mlp_norm(x))
        return y


class Blocks(nn.Module):
    """A stack of blocks without embeddings and head: hidden states ``[B, T, D]`` in and out."""

    def __init__(self, size: Size, layers: int) -> None:
        super().__init__()
        self.size = size
        self.blocks = nn.ModuleList(Block(size) for _ in range(layers))

    def forward(self, x: Tensor, caches: list[Cache] | None = None) -> Tensor:
        turn = None
        if self.size.family == "llama":
            start = 0 if caches is None else caches[0].keys.shape[2] - 1
            turn = _turn(x.shape[1], self.size.width // self.size.heads, start, x)
        for i, block in enumerate(self.blocks):
            x = block(x, turn, None if caches is None else caches[i])
        return x


class Whole(nn.Module):
    """The whole language model, embeddings and head included: tokens ``[B, T]`` -> logits ``[B, T, V]``."""

    def __init__(self, size: Size, layers: int = 0) -> None:
        super().__init__()
        self.tokens = nn.Embedding(size.vocabulary, size.width)
        self.positions = nn.Embedding(size.positions, size.width) if size.positions else None
        self.stack = Blocks(size, layers or size.layers)
        norm: Any = nn.RMSNorm if size.family == "llama" else nn.LayerNorm
        self.norm = norm(size.width)
        self.head = nn.Linear(size.width, size.vocabulary, bias=False)
        if size.tied:
            self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens)
        if self.positions is not None:
            x = x + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        logits: Tensor = self.head(self.norm(self.stack(x)))
        return logits


def _turn(T: int, head: int, start: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary positions from ``start`` on, ``[T, head]`` each."""
    rates = 1e4 ** (-torch.arange(0, head, 2, device=like.device, dtype=torch.float32) / head)
    angles = torch.arange(start, start + T, device=like.device, dtype=torch.float32)[:, None] * rates
    angles = torch.cat((angles, angles), -1)
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def _turned(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """``[B, heads, T, head]`` at its positions."""
    first, second = x.chunk(2, -1)
    return x * turn[0] + torch.cat((-second, first), -1) * turn[1]
