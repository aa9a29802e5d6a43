"""Tiny random models, one per family and variant that ffprune supports."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    ApertusConfig,
    AutoModelForCausalLM,
    CohereConfig,
    Exaone4Config,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GlmConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OlmoConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
    StableLmConfig,
    Starcoder2Config,
)

from ffprune.models.checkpoint import save_model
from ffprune.models.surgery import slice_model
from ffprune.models.view import ModelView
from tests.tiny import character_tokenizer

VOCAB = 64
LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
NEOX = {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}
GPT2 = {
    "vocab_size": VOCAB,
    "n_embd": 24,
    "n_layer": 3,
    "n_head": 6,
    "n_positions": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
OPT = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "ffn_dim": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "dropout": 0.0,
}
EXPERTS = {"moe_intermediate_size": 20, "num_experts": 4, "num_experts_per_tok": 2}
CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama_gqa": lambda: LlamaConfig(**LLAMA, head_dim=8, tie_word_embeddings=True),
    "llama_mha": lambda: LlamaConfig(
        **{**LLAMA, "num_key_value_heads": 6}, attention_bias=True, mlp_bias=True, tie_word_embeddings=False
    ),
    "mistral": lambda: MistralConfig(**LLAMA, sliding_window=8),
    "qwen2": lambda: Qwen2Config(**LLAMA, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**LLAMA, head_dim=8, tie_word_embeddings=False),
    "mixtral": lambda: MixtralConfig(**LLAMA, head_dim=8, num_local_experts=4, num_experts_per_tok=2),
    "qwen2_moe": lambda: Qwen2MoeConfig(
        **{**LLAMA, "intermediate_size": 28},
        **EXPERTS,
        shared_expert_intermediate_size=12,
        tie_word_embeddings=True,
    ),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **{**LLAMA, "intermediate_size": 28}, **EXPERTS, head_dim=8, norm_topk_prob=True
    ),
    "gemma": lambda: GemmaConfig(**LLAMA, head_dim=8),
    "gemma2": lambda: Gemma2Config(
        **LLAMA, head_dim=8, sliding_window=8, attn_logit_softcapping=1.0, final_logit_softcapping=2.0
    ),
    "gemma3_text": lambda: Gemma3TextConfig(
        **LLAMA, head_dim=8, sliding_window=8, layer_types=["sliding_attention", "full_attention", "sliding_attention"]
    ),
    "granite": lambda: GraniteConfig(
        **LLAMA, embedding_multiplier=3.0, logits_scaling=2.0, residual_multiplier=0.5, attention_multiplier=0.4
    ),
    "smollm3": lambda: SmolLM3Config(**LLAMA, no_rope_layers=[1, 0, 1], tie_word_embeddings=True),
    "olmo": lambda: OlmoConfig(**LLAMA, clip_qkv=1.0),
    "exaone4": lambda: Exaone4Config(**LLAMA, head_dim=8, sliding_window=8, sliding_window_pattern=2),
    "cohere": lambda: CohereConfig(**LLAMA, logit_scale=0.5),
    "stablelm": lambda: StableLmConfig(**LLAMA, partial_rotary_factor=0.5, use_qkv_bias=True),
    "stablelm_parallel": lambda: StableLmConfig(**LLAMA, partial_rotary_factor=0.5, use_parallel_residual=True),
    "apertus": lambda: ApertusConfig(**LLAMA),
    "glm": lambda: GlmConfig(**LLAMA, head_dim=8),
    "starcoder2": lambda: Starcoder2Config(**LLAMA, sliding_window=8),
    "phi3": lambda: Phi3Config(**LLAMA, sliding_window=8),
    "gpt_neox": lambda: GPTNeoXConfig(**NEOX),
    "gpt_neox_serial": lambda: GPTNeoXConfig(**NEOX, use_parallel_residual=False, tie_word_embeddings=True),
    "gpt2": lambda: GPT2Config(**GPT2, n_inner=20),
    "phi": lambda: PhiConfig(**{**LLAMA, "num_key_value_heads": 6}, partial_rotary_factor=0.5),
    "opt": lambda: OPTConfig(**OPT),
    "opt_350m": lambda: OPTConfig(**OPT, do_layer_norm_before=False, word_embed_proj_dim=16),
}


#: Families that are laid out like another one here: their share of the suite runs with the slow tests.
ALIKE = (
    *("llama_mha", "qwen2", "qwen3", "gemma3_text", "granite", "smollm3", "starcoder2", "phi", "gpt_neox_serial"),
    *("qwen3_moe", "gemma", "olmo", "exaone4", "cohere", "stablelm", "stablelm_parallel", "apertus", "glm"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent) and isinstance(item, pytest.Function):
            given = item.callspec.params.values() if hasattr(item, "callspec") else ()
            if getattr(item.cls, "case", None) in ALIKE or any(value in ALIKE for value in given if type(value) is str):
                item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


def build(name: str) -> PreTrainedModel:
    """A tiny random model with every parameter random: zero biases and unit norms would hide mistakes."""
    model = AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.requires_grad_(False)


@pytest.fixture
def make_model() -> Callable[[str], PreTrainedModel]:
    return build


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(2, VOCAB, (4, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def uneven() -> Callable[..., list[Tensor]]:
    """For every unit another number of granules, in a shuffled order; at least one each."""

    def kept(units: tuple) -> list[Tensor]:
        generator = torch.Generator().manual_seed(2)
        return [
            torch.randperm(u.granules, generator=generator)[: 1 + (7 * i + 3) % u.granules] for i, u in enumerate(units)
        ]

    return kept


@pytest.fixture
def model(make_model, uneven) -> PreTrainedModel:
    """A model whose layers were all pruned to different shapes."""
    model = make_model("llama_gqa")
    view = ModelView(model)
    slice_model(view, uneven(view.units))
    return model


@pytest.fixture
def folder(model, tmp_path) -> Path:
    save_model(model, None, tmp_path / "model")
    return tmp_path / "model"


def edit_config(folder: Path, **changes) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def edit_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return character_tokenizer()
