"""Tiny models with a byte-level tokenizer, and what llama.cpp makes of a GGUF file."""

from __future__ import annotations

import functools
import json
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from ffprune.export.gguf_vocabulary import RULES
from ffprune.models.surgery import slice_model
from ffprune.models.view import ModelView

VOCAB = 320
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 16,  # not hidden_size / num_attention_heads
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SIZES, tie_word_embeddings=True),
    "biases": lambda: LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True, tie_word_embeddings=False),
    "llama3 positions": lambda: LlamaConfig(**SIZES, rope_parameters=LLAMA3),
    "linear positions": lambda: LlamaConfig(
        **SIZES, rope_parameters={"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0}
    ),
    "mistral": lambda: MistralConfig(**SIZES, sliding_window=None),
    "qwen2": lambda: Qwen2Config(**SIZES),
}

Widths = Sequence[tuple[int, int]]
"""Key/value groups and FFN channels of every layer."""
UNEVEN: Widths = ((2, 33), (3, 40), (1, 7), (2, 32))


def build(case: str = "llama", widths: Widths | None = None, **changes: object) -> PreTrainedModel:
    """A random model whose layers keep so many groups and channels."""
    config = CONFIGS[case]()
    for name, value in changes.items():
        setattr(config, name, value)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15 + ("norm" in name))
    view = ModelView(model)
    if widths is not None:
        kept = [torch.randperm(u.granules, generator=generator) for u in view.units]
        counts = [count for pair in widths for count in pair]
        slice_model(view, [granules[:count] for granules, count in zip(kept, counts, strict=True)])
    return model.requires_grad_(False)


TEXT = (
    "the cat sat on the mat, and 12345 other cats didn't; die Katze saß   auf 3 Matten. 你好，世界 🙂\n\n\tend 2026 \n"  # noqa: RUF001 - so
)


@functools.cache
def byte_tokenizer(rule: str = "gpt-2") -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that cuts text by one of the rules, trained on a sentence; 3 special tokens."""
    steps: list[pre_tokenizers.PreTokenizer] = []
    for step in RULES[rule].steps:
        if step == "digits":
            steps.append(pre_tokenizers.Digits(individual_digits=True))
        elif step.startswith("bytes"):
            steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex="GPT-2" in step))
        else:
            steps.append(pre_tokenizers.Split(Regex(step), "isolated"))
    raw = Tokenizer(models.BPE(ignore_merges=RULES[rule].ignore_merges))
    raw.pre_tokenizer = steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)
    raw.normalizer = normalizers.NFC() if RULES[rule].normalizer else None
    raw.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - 8,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    raw.train_from_iterator([TEXT] * 8, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token=special[1], eos_token=special[2], unk_token=special[0], pad_token=special[2]
    )


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(3, VOCAB, (1, 24), generator=torch.Generator().manual_seed(1))


_PLAIN = 42
"""A token of one ASCII character."""


class LlamaCpp:
    """llama.cpp's server in this process, on one thread, with a cache in float32: xllamacpp brings it compiled."""

    def __init__(self, path: Path) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.n_gpu_layers, params.warmup, params.verbosity = 256, 1, 0, False, -1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        # It computes in float16.
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.server = xllamacpp.Server(params)

    def log_probabilities(self, tokens: Tensor, vocabulary: int) -> Tensor:
        """``[tokens, vocabulary]`` of one sequence, behind each of its tokens."""
        ids = tokens.flatten().tolist()
        found = torch.full((len(ids), vocabulary), torch.nan)
        # What is told is the model's own; of what it says itself, an end or half a character would be kept back.
        asked = {"n_predict": 1, "n_probs": vocabulary, "temperature": -1.0, "logit_bias": [[_PLAIN, 1000.0]]}
        for row in range(len(ids)):
            answer = self.server.handle_completions(asked | {"prompt": ids[: row + 1]})
            for word in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
                found[row, word["id"]] = word["logprob"]
        return found

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of texts, with what the file says is to be around them."""
        return [self._tokens(text) for text in texts]

    def _tokens(self, text: str) -> list[int]:
        body = json.dumps({"content": text, "add_special": True, "parse_special": True}).encode()
        url = f"{self.server.listening_address}/tokenize"
        asked = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        # No proxy: it is this process that answers.
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(asked, timeout=60) as answer:
            found: list[int] = json.load(answer)["tokens"]
        return found
