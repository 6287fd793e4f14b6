"""The rows of the coverage table: small models with random weights, and what becomes of each of their linears."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from matrix import torch_models
from matrix.torch_models import HIDDEN, LAYERS, VOCABULARY, WIDTH
from slope_compile.report import Reason

FIRST, HEAD, TIED, ROUTER, EXPERTS = Reason.FIRST, Reason.HEAD, Reason.TIED, Reason.ROUTER, Reason.EXPERTS
Reasons = dict[str, Reason]
Inputs = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Model:
    """One row."""

    name: str
    title: str
    make: Callable[[], nn.Module]
    inputs: Callable[[int, int], Inputs]
    """``inputs(batch, sequence)``: what the model is called with."""
    dense: Mapping[str, Reason]
    """Every linear that stays dense, with its reason; all others are eligible."""
    middle: str
    """Regular expression on paths of modules in the middle of each block: graphs are broken behind them."""
    blocks: str = ""
    """Regular expression on paths of the blocks that are recomputed; "" for models with a switch of their own."""
    dtype: torch.dtype = torch.float64
    """float32 for models that compute some parts in float32 whatever they are given: there float64 shows nothing."""
    dense_in_graph: Mapping[str, Reason] = dataclasses.field(default_factory=dict)
    """The same for an exported program, in addition: there the dataflow decides, not the order of registration."""
    skipped: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Mode -> why it does not apply."""
    compiled: Mapping[str, tuple[str, Reason]] = dataclasses.field(default_factory=dict)
    """Path of a decision in Dynamo's graphs -> the linear's path and the reason it has there, where these differ, and
    the release of torch is one whose Dynamo takes that place into a graph."""
    apart: Mapping[str, tuple[str, str]] = dataclasses.field(default_factory=dict)
    """Mode -> paths of blocks, as a regular expression, that are compiled one by one there, and why."""
    left: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Mode -> paths of linears, as a regular expression, that Dynamo of torch 2.11 leaves to Python there."""
    partial: str = ""
    """Why the model is not one graph, where it is not."""

    @property
    def generates(self) -> bool:
        return "generate" not in self.skipped


def ids(batch: int, sequence: int) -> Inputs:
    return {"input_ids": torch.randint(4, VOCABULARY, (batch, sequence))}  # no padding, begin or end among them


def _pairs(batch: int, sequence: int) -> Inputs:
    return {**ids(batch, sequence), "decoder_input_ids": torch.randint(4, VOCABULARY, (batch, sequence - 2))}


def _pixels(batch: int, _: int) -> Inputs:
    return {"pixel_values": torch.randn(batch, 3, 8, 8)}


def _sounds(batch: int, sequence: int) -> Inputs:
    tokens = torch.randint(4, VOCABULARY, (batch, sequence))
    return {"input_features": torch.randn(batch, 8, 32), "decoder_input_ids": tokens}


def hugging_face(kind: str, task: str, **settings: Any) -> Callable[[], nn.Module]:
    """A model of transformers from its configuration class; nothing is downloaded."""

    def make() -> nn.Module:
        import transformers

        config = getattr(transformers, f"{kind}Config")(**settings)
        config.use_cache = False  # before: an encoder and a decoder take copies of it
        model: nn.Module = getattr(transformers, f"{kind.removesuffix('Text')}{task}")(config)
        return model

    return make


_IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
_BASE = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": HIDDEN, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "max_position_embeddings": 32, **_IDS,
}  # fmt: skip
_UNTIED = {**_BASE, "tie_word_embeddings": False}
_GROUPED = {**_UNTIED, "num_key_value_heads": 2}
_GEMMA = {**_BASE, "num_key_value_heads": 1, "head_dim": 8}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_T5 = {
    "vocab_size": VOCABULARY, "d_model": WIDTH, "d_kv": 8, "d_ff": HIDDEN, "num_layers": LAYERS, "num_heads": 4,
    "dropout_rate": 0.0, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
_NO_GENERATE = "the model generates no text"


def _qkv(path: str, names: str = "q_proj k_proj v_proj") -> Reasons:
    return {f"{path}.{name}": FIRST for name in names.split()}


def _llama_like(name: str, title: str, kind: str, settings: Mapping[str, Any], head: Reason = HEAD) -> Model:
    return Model(
        name, title, hugging_face(kind, "ForCausalLM", **settings), ids,
        {**_qkv("model.layers.0.self_attn"), "lm_head": head},
        middle=r"model\.layers\.\d+\.self_attn", dtype=torch.float32,
    )  # fmt: skip


def _bert_like(name: str, title: str, kind: str, head: str) -> Model:
    return Model(
        name, title, hugging_face(kind, "ForMaskedLM", **_BASE, **_NO_DROPOUT), ids,
        {**_qkv(f"{name}.encoder.layer.0.attention.self", "query key value"), head: TIED},
        middle=rf"{name}\.encoder\.layer\.\d+\.attention", skipped={"generate": _NO_GENERATE},
    )  # fmt: skip


_BLOCKS = r"(encoder|decoder)\.block\.\d+"
_LEAF = (
    "blocks compiled one by one: transformers sets `requires_grad` inside the decoder's first checkpoint, and compiled "
    "as a whole, the model leaves that block to Python and says so"
)
_EXPERTS = {
    f"model.layers.{i}.mlp.{name}": reason
    for i in range(LAYERS)
    for name, reason in (("gate", ROUTER), ("experts.gate_up_proj", EXPERTS), ("experts.down_proj", EXPERTS))
}
_ROUTED = "which experts run depends on the data"

MODELS = (
    Model(
        "gpt2", "GPT-2 (Conv1D)",
        hugging_face(
            "GPT2", "LMHeadModel", vocab_size=VOCABULARY, n_positions=WIDTH, n_embd=WIDTH, n_layer=LAYERS, n_head=4,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **_IDS,
        ),
        ids, {"transformer.h.0.attn.c_attn": FIRST, "lm_head": TIED}, middle=r"transformer\.h\.\d+\.attn",
    ),
    Model(
        "opt", "OPT",
        hugging_face(
            "OPT", "ForCausalLM", vocab_size=VOCABULARY, hidden_size=WIDTH, ffn_dim=HIDDEN, num_hidden_layers=LAYERS,
            num_attention_heads=4, max_position_embeddings=32, dropout=0.0, attention_dropout=0.0,
            word_embed_proj_dim=WIDTH, **_IDS,
        ),
        ids, {**_qkv("model.decoder.layers.0.self_attn"), "lm_head": TIED},
        middle=r"model\.decoder\.layers\.\d+\.self_attn", partial="layer drop asks a random number in training",
    ),
    _llama_like("llama", "LLaMA (GQA)", "Llama", _GROUPED),
    _llama_like("mistral", "Mistral", "Mistral", {**_GROUPED, "sliding_window": 8}),
    _llama_like("qwen2", "Qwen 2", "Qwen2", _GROUPED),
    _llama_like("qwen3", "Qwen 3", "Qwen3", {**_GROUPED, "head_dim": 8}),
    _llama_like("gemma", "Gemma", "Gemma", _GEMMA, TIED),
    _llama_like("gemma3", "Gemma 3", "Gemma3Text", _GEMMA, TIED),
    Model(
        "phi", "Phi", hugging_face("Phi", "ForCausalLM", **_UNTIED), ids,
        {**_qkv("model.layers.0.self_attn"), "lm_head": HEAD}, middle=r"model\.layers\.\d+\.self_attn",
        dense_in_graph={"model.layers.0.mlp.fc1": FIRST},
    ),
    Model(
        "phi3", "Phi-3", hugging_face("Phi3", "ForCausalLM", **_GROUPED), ids,
        {"model.layers.0.self_attn.qkv_proj": FIRST, "lm_head": HEAD}, middle=r"model\.layers\.\d+\.self_attn",
        dtype=torch.float32,
    ),
    _bert_like("bert", "BERT", "Bert", "cls.predictions.decoder"),
    _bert_like("roberta", "RoBERTa", "Roberta", "lm_head.decoder"),
    Model(
        "t5", "T5", hugging_face("T5", "ForConditionalGeneration", **_T5), _pairs,
        {**_qkv("encoder.block.0.layer.0.SelfAttention", "q k v"), "lm_head": TIED},
        middle=r"(encoder|decoder)\.block\.\d+\.layer\.0", dtype=torch.float32,
        dense_in_graph=_qkv("decoder.block.0.layer.0.SelfAttention", "q k v"),
        apart={"checkpointing": (_BLOCKS, _LEAF)}, partial="checkpointing breaks the graph",
    ),
    Model(
        "vit", "ViT",
        hugging_face(
            "ViT", "ForImageClassification", hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=4,
            intermediate_size=HIDDEN, image_size=8, patch_size=4, num_labels=5, **_NO_DROPOUT,
        ),
        _pixels, {**_qkv("vit.layers.0.attention"), "classifier": HEAD},
        middle=r"vit\.layers\.\d+\.attention", skipped={"generate": _NO_GENERATE},
    ),
    Model(
        "whisper", "Whisper",
        hugging_face(
            "Whisper", "ForConditionalGeneration", vocab_size=VOCABULARY, num_mel_bins=8, d_model=WIDTH,
            encoder_layers=LAYERS, decoder_layers=LAYERS, encoder_attention_heads=4, decoder_attention_heads=4,
            encoder_ffn_dim=HIDDEN, decoder_ffn_dim=HIDDEN, max_source_positions=16, max_target_positions=32,
            dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, decoder_start_token_id=3, **_IDS,
        ),
        _sounds, {**_qkv("model.encoder.layers.0.self_attn"), "proj_out": TIED},
        middle=r"model\.(encoder|decoder)\.layers\.\d+\.self_attn",
        dense_in_graph=_qkv("model.decoder.layers.0.self_attn"),
        partial="layer drop asks a random number in training",
    ),
    Model(
        "mixtral", "Mixtral (fused experts)",
        hugging_face("Mixtral", "ForCausalLM", **_GROUPED, num_local_experts=4, num_experts_per_tok=2), ids,
        {**_qkv("model.layers.0.self_attn"), "lm_head": HEAD, **_EXPERTS},
        middle=r"model\.layers\.\d+\.self_attn", dtype=torch.float32,
    ),
    Model(
        "switch", "Switch (experts as linears)",
        hugging_face(
            "SwitchTransformers", "ForConditionalGeneration", **_T5, num_decoder_layers=LAYERS,
            num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, num_experts=2, expert_capacity=64,
            router_jitter_noise=0.0,
        ),
        _pairs,
        {
            **_qkv("encoder.block.0.layer.0.SelfAttention", "q k v"), "lm_head": TIED,
            "encoder.block.1.layer.1.mlp.router.classifier": ROUTER,
            "decoder.block.1.layer.2.mlp.router.classifier": ROUTER,
        },
        middle=r"(encoder|decoder)\.block\.\d+\.layer\.0", dtype=torch.float32, partial=_ROUTED,
        compiled={  # the router casts its weight in place in each forward; torch 2.11 leaves that to Python
            f"{path}.mlp.router": (f"{path}.mlp.router.classifier", TIED)
            for path in ("encoder.block.1.layer.1", "decoder.block.1.layer.2")
        },
        apart={"checkpointing": (_BLOCKS, _LEAF)},
        skipped={"export": f"torch.export does not take the dense model: {_ROUTED}"},
    ),
    Model(
        "encoder", "`nn.TransformerEncoder`", torch_models.Encoder, torch_models.tokens,
        {"encoder.layers.0.self_attn.in_proj_weight": FIRST, "head": HEAD},
        middle=r"encoder\.layers\.\d+\.self_attn", blocks=r"encoder\.layers\.\d+",
        left={"breaks": r".*\.self_attn\..*"},
        skipped={"generate": _NO_GENERATE},
    ),
    Model(
        "attention", "`nn.MultiheadAttention`", torch_models.Attention, torch_models.tokens,
        {"blocks.0.attention.in_proj_weight": FIRST, "head": HEAD},
        middle=r"blocks\.\d+\.attention", blocks=r"blocks\.\d+", skipped={"generate": _NO_GENERATE},
    ),
    Model(
        "sequential", "`nn.Sequential`", torch_models.sequential, torch_models.features, {"0": FIRST, "8": HEAD},
        middle="3", blocks="[24]", skipped={"generate": _NO_GENERATE},
    ),
    Model(
        "mlp", "MLP", torch_models.Mlp, torch_models.features, {"first": FIRST, "head": HEAD},
        middle="second", blocks="second|third", skipped={"generate": _NO_GENERATE},
    ),
    Model(
        "convolution", "Convolutions, linear head", torch_models.Convolution, torch_models.images,
        {"features.0": FIRST, "head": HEAD}, middle="convolutions", blocks="convolutions",
        skipped={"generate": _NO_GENERATE},
    ),
)  # fmt: skip

BY_NAME = {model.name: model for model in MODELS}
__all__ = ["BY_NAME", "MODELS", "Model", "Reasons", "ids"]
