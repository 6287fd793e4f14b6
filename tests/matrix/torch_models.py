"""Models of PyTorch's own modules for the coverage table."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

VOCABULARY, WIDTH, HIDDEN, LAYERS, CLASSES = 48, 32, 64, 2, 5
"""Two blocks: the first holds the method's exception, the second has none."""


def tokens(batch: int, sequence: int) -> dict[str, Tensor]:
    return {"ids": torch.randint(VOCABULARY, (batch, sequence))}


def features(batch: int, sequence: int) -> dict[str, Tensor]:
    return {"input": torch.randn(batch, sequence, WIDTH)}


def images(batch: int, _: int) -> dict[str, Tensor]:
    return {"image": torch.randn(batch, 3, 8, 8)}


class Encoder(nn.Module):
    """Ids ``[B, T]`` -> logits ``[B, T, V]`` through ``nn.TransformerEncoder``, whose eval mode has a fast path."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, HIDDEN, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, LAYERS)
        self.head = nn.Linear(WIDTH, VOCABULARY)
        for parameter in self.encoder.parameters():  # the layers are copies of one
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=WIDTH**-0.5)

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.head(self.encoder(self.embedding(ids)))
        return y


class AttentionBlock(nn.Module):
    """Attention of ``[B, T, D]`` to itself, or, with weights of their own for q, k and v, to twice as wide a memory."""

    def __init__(self, crossed: bool) -> None:
        super().__init__()
        sizes = {"kdim": 2 * WIDTH, "vdim": 2 * WIDTH} if crossed else {}
        self.crossed = crossed
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True, **sizes)
        self.up = nn.Linear(WIDTH, HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        memory = torch.cat((x, x.flip(1)), dim=-1) if self.crossed else x
        x = x + self.attention(x, memory, memory, need_weights=False)[0]
        y: Tensor = x + self.down(F.gelu(self.up(x)))
        return y


class Attention(nn.Module):
    """Token ids ``[B, T]`` -> logits ``[B, T, V]`` through blocks with ``nn.MultiheadAttention``."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(AttentionBlock(crossed) for crossed in (False, True))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        y: Tensor = self.head(x)
        return y


class Mlp(nn.Module):
    """Features ``[..., D]`` -> classes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.third, self.head = nn.Linear(HIDDEN, WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, input: Tensor) -> Tensor:
        x = F.relu(self.second(F.relu(self.first(input))))
        y: Tensor = self.head(F.relu(self.third(x)))
        return y


def sequential() -> nn.Sequential:
    """Features ``[..., D]`` -> classes, all of it PyTorch's own code."""
    sizes = (WIDTH, HIDDEN, HIDDEN, WIDTH, WIDTH, CLASSES)
    layers = [part for K, N in itertools.pairwise(sizes) for part in (nn.Linear(K, N), nn.GELU())]
    return nn.Sequential(*layers[:-1])


class Convolution(nn.Module):
    """Images ``[B, 3, 8, 8]`` -> classes: convolutions, which stay dense, and linears behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.ReLU()
        )
        self.features = nn.Sequential(nn.Linear(32, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, WIDTH), nn.ReLU())
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        y: Tensor = self.head(self.features(self.convolutions(image).flatten(1)))
        return y
