"""Tiny random models and a character tokenizer."""

from __future__ import annotations

import string
from collections.abc import Callable

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

CHARACTERS = string.ascii_letters + string.digits + string.punctuation + " \n"
VOCAB = len(CHARACTERS) + 1


def llama(
    tied: bool = True,
    kv_heads: int = 2,
    hidden_size: int = 16,
    intermediate_size: int = 24,
    num_hidden_layers: int = 2,
) -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        max_position_embeddings=1024,
        tie_word_embeddings=tied,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config)


def opt(projected: bool = False) -> PreTrainedModel:
    config = OPTConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        ffn_dim=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        word_embed_proj_dim=8 if projected else 16,
        do_layer_norm_before=not projected,
        dropout=0.5,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=0,
    )
    return OPTForCausalLM(config)


def mixtral() -> PreTrainedModel:
    """A mixture of experts; not among MODELS, for much is refused of it."""
    config = MixtralConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=1024,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=0,
    )
    return MixtralForCausalLM(config)


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama_tied": lambda: llama(),
    "llama_untied": lambda: llama(tied=False),
    "opt": lambda: opt(),
    "opt_projected": lambda: opt(projected=True),  # as OPT-350M
}


def spread(model: PreTrainedModel) -> PreTrainedModel:
    """Random weights large enough for logits that differ."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


def character_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token a character."""
    vocabulary = {"<unk>": 0} | {c: i + 1 for i, c in enumerate(CHARACTERS)}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    raw.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", eos_token="<unk>", model_max_length=64)
