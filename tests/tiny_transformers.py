"""Small models of Hugging Face's, with random weights, made from config classes."""

from __future__ import annotations

from torch import nn

VOCABULARY, WIDTH, HIDDEN = 48, 32, 64


def gpt2(layers: int = 2) -> nn.Module:
    """token ids ``[B, T]`` with T up to 32 -> logits ``[B, T, 48]``; the head is tied."""
    import transformers

    # As many positions as features, as in GPT-2 medium: that makes no projection an output head.
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=WIDTH, n_embd=WIDTH, n_layer=layers, n_head=2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)  # type: ignore[no-any-return]


def llama(layers: int = 2) -> nn.Module:
    """token ids ``[B, T]`` with T up to 16 -> logits ``[B, T, 48]``; the head is not tied."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=HIDDEN, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=16, tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)  # type: ignore[no-any-return]
