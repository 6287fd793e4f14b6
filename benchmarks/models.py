"""The models of the benchmarks: stock PyTorch and transformers, random weights, reducible in depth."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import slope_compile as slope
from benchmarks.cases import AUTOCAST, DTYPES, Options
from training import Settings


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model and the batch it is trained on."""

    name: str
    make: Callable[[], nn.Module]
    """A module whose forward takes tokens and targets ``[B, T]`` and returns the loss."""
    batch: int
    context: int
    vocabulary: int
    decodes: bool
    """Whether there is a model of transformers inside (``.model``), which can decode with a cache."""

    def build(self, dtype: str, seed: int = 0) -> nn.Module:
        """The model in training mode, always with the same weights."""
        torch.manual_seed(seed)
        module = self.make().train()
        return module if dtype == AUTOCAST else module.to(DTYPES[dtype])

    def tokens(self, batch: int, length: int, device: torch.device) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        return torch.randint(self.vocabulary, (batch, length), generator=generator).to(device)


class CausalLoss(nn.Module):
    """A model of transformers and its loss in one module, so that both are compiled together."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross entropy in nats of ``targets [B, T]`` given ``tokens [B, T]``."""
        logits = self.model(input_ids=tokens, use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def subjects(options: Options) -> list[Subject]:
    """Demo model, GPT-2 small, and a LLaMA-like model of 300 million parameters."""
    return [_demo(options), _gpt2(options), _llama(options)]


def prepared(module: nn.Module, backward: str) -> list[str]:
    """Prepare a model with the default configuration; return the paths of its sparse linears."""
    config = slope.SlopeConfig(backward="exact" if backward == "exact" else "double_pruned")
    return [decision.weight for decision in slope.sparsify_(module, config).sparse]


def adamw(module: nn.Module, kind: str) -> torch.optim.Optimizer:
    """AdamW in one of PyTorch's implementations."""
    flags: dict[str, dict[str, Any]] = {
        "fused": {"fused": True},
        "foreach": {"foreach": True},
        "forloop": {"fused": False, "foreach": False},
    }
    return torch.optim.AdamW(module.parameters(), lr=1e-4, weight_decay=0.1, **flags[kind])


def _demo(options: Options) -> Subject:
    from gpt import GPT

    settings = Settings(width=48, heads=2, context=32, batch=2) if options.tiny else Settings()
    config = settings.gpt_config()
    return Subject("demo", lambda: GPT(config), settings.batch, settings.context, config.vocabulary, decodes=False)


def _gpt2(options: Options) -> Subject:
    def make() -> nn.Module:
        import transformers

        small: dict[str, Any] = {"n_embd": 64, "n_head": 2, "n_positions": 64} if options.tiny else {}
        config = transformers.GPT2Config(
            **small, vocab_size=vocabulary, n_layer=layers, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
            bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        return CausalLoss(transformers.GPT2LMHeadModel(config))

    layers, name = _depth("gpt2", 12, options)
    batch, context, vocabulary = (2, 16, 128) if options.tiny else (4, 256, 50257)
    return Subject(name, make, batch, context, vocabulary, decodes=True)


def _llama(options: Options) -> Subject:
    def make() -> nn.Module:
        import transformers

        width, hidden, heads = (64, 128, 2) if options.tiny else (1024, 2816, 16)
        config = transformers.LlamaConfig(
            vocab_size=vocabulary, hidden_size=width, intermediate_size=hidden, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=2048,
            tie_word_embeddings=False, bos_token_id=0, eos_token_id=0, pad_token_id=0,
        )  # fmt: skip
        return CausalLoss(transformers.LlamaForCausalLM(config))

    layers, name = _depth("llama-300m", 24, options)
    batch, context, vocabulary = (2, 16, 128) if options.tiny else (2, 256, 32000)
    return Subject(name, make, batch, context, vocabulary, decodes=True)


def _depth(name: str, layers: int, options: Options) -> tuple[int, str]:
    """Number of blocks, and a name that says so where it is not the model's own."""
    if options.layers and options.layers != layers:
        return options.layers, f"{name}-l{options.layers}"
    return (2, name) if options.tiny else (layers, name)
