"""A GPT-2-like language model in stock PyTorch: nothing in it knows about sparsity.

Pre-norm blocks ``x + attention(norm(x))`` and ``x + mlp(norm(x))``, one fused query/key/value projection,
causal attention through ``scaled_dot_product_attention``, a GELU MLP four times as wide, learned positions,
and a head that may share its weight with the token embedding.  There is no dropout, so a run draws random
numbers only when the weights are made, and a resumed run sees what the uninterrupted one saw.

Shapes: ``B`` sequences of ``T`` tokens, ``D`` = width, ``H`` heads, ``V`` = vocabulary.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """Size of a :class:`GPT`."""

    vocabulary: int = 256
    layers: int = 4
    width: int = 256
    heads: int = 4
    context: int = 128
    tied: bool = False
    """Whether the head's weight is the token embedding's."""

    def __post_init__(self) -> None:
        for name in ("vocabulary", "layers", "width", "heads", "context"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected 1 or more, got {getattr(self, name)}")
        if self.width % self.heads:
            raise ValueError(f"heads: {self.heads} heads do not divide width {self.width}")


class Attention(nn.Module):
    """Causal self-attention, ``[B, T, D] -> [B, T, D]``."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        B, T, D = x.shape
        # [B, T, 3D] -> three of [B, H, T, D / H]
        q, k, v = self.qkv(x).view(B, T, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        attended: Tensor = self.out(y.transpose(1, 2).reshape(B, T, D))
        return attended


class MLP(nn.Module):
    """Two linears with a GELU between them, ``[B, T, D] -> [B, T, 4D] -> [B, T, D]``."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.width, 4 * config.width)
        self.down = nn.Linear(4 * config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(F.gelu(self.up(x), approximate="tanh"))
        return y


class Block(nn.Module):
    """One pre-norm transformer block, ``[B, T, D] -> [B, T, D]``."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.width)
        self.attention = Attention(config)
        self.mlp_norm = nn.LayerNorm(config.width)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        y: Tensor = x + self.mlp(self.mlp_norm(x))
        return y


class GPT(nn.Module):
    """The language model; its forward returns the mean cross entropy, so a compiler sees the loss too."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocabulary, config.width)
        self.positions = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)
        if config.tied:
            self.head.weight = self.tokens.weight
        for name, parameter in self.named_parameters():
            _init(name, parameter, layers=config.layers)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross entropy in nats of ``targets [B, T]`` given ``tokens [B, T]``, T at most ``context``."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.tokens(tokens) + self.positions(positions)
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        # The softmax runs in float32 under autocast too: bfloat16 keeps too few digits of a small loss.
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def _init(name: str, parameter: nn.Parameter, *, layers: int) -> None:
    """Start embeddings and head from N(0, 0.02), linears from N(0, 1 / in_features); leave norms at one.

    GPT-2 starts its linears from N(0, 0.02) too, which suits its width; in a narrow model attention and MLP would
    then begin with hardly any output, and a short run would spend its steps on growing them.
    """
    if name.endswith("bias"):
        nn.init.zeros_(parameter)
    elif name.startswith(("tokens", "positions", "head")):
        nn.init.normal_(parameter, std=0.02)
    elif parameter.dim() == 2:
        std = 1 / math.sqrt(parameter.shape[1])
        if name.endswith(("attention.out.weight", "mlp.down.weight")):
            # The residual stream is a sum of 2 * layers outputs; GPT-2 starts each of them smaller by that root.
            std /= math.sqrt(2 * layers)
        nn.init.normal_(parameter, std=std)
