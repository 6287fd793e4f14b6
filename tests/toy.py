"""A small transformer for the tests of the backend, and how to run one training step of it.

It has what the rules of the method speak of: a first linear after the input, blocks of attention and MLP, a head.
Everything is float64 unless a test says otherwise, so that two orders of the same sums agree to many digits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

VOCABULARY, WIDTH, HIDDEN = 20, 16, 32

SPARSE = tuple(
    f"blocks.{block}.{name}" for block in (0, 1) for name in ("qkv", "out", "up", "down") if (block, name) != (0, "qkv")
)
"""The linears that the method makes sparse, in order."""
DENSE = ("blocks.0.qkv", "head")


class Block(nn.Module):
    """Pre-norm attention and MLP, ``[B, T, D] -> [B, T, D]``; ``between`` runs in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.up = nn.Linear(WIDTH, HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH)
        self.between: Callable[[], None] | None = None

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v))
        if self.between is not None:
            self.between()
        y: Tensor = x + self.down(F.gelu(self.up(x)))
        return y


class Toy(nn.Module):
    """Token ids ``[B, T]`` -> logits ``[B, T, V]``."""

    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.checkpointed = checkpointed

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        y: Tensor = self.head(x)
        return y


def toy(dtype: torch.dtype = torch.float64, checkpointed: bool = False) -> Toy:
    """A fresh model with random weights."""
    return Toy(checkpointed).to(dtype)


def token_ids(*shape: int) -> Tensor:
    """Random tokens, ``[B, T]`` for two sizes."""
    return torch.randint(0, VOCABULARY, shape or (3, 5))


def loss_of(logits: Tensor, ids: Tensor) -> Tensor:
    """Cross entropy with the inputs as targets: any scalar with gradients everywhere would do."""
    return F.cross_entropy(logits.flatten(0, -2), ids.flatten())


def step(model: Callable[[Tensor], Tensor], ids: Tensor) -> Tensor:
    """Forward and backward; returns the logits.  Gradients add up in the model's parameters."""
    logits = model(ids)
    loss_of(logits, ids).backward()
    return logits.detach()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Name -> gradient of every trained parameter, which must all have one."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, f"{name} has no gradient"
            found[name] = parameter.grad.clone()
    return found
