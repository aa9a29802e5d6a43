"""Text must become the same tokens in llama.cpp as in the tokenizer of the folder."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import gguf
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from ffprune.export.gguf import write_gguf
from ffprune.export.gguf_vocabulary import RULES, UnsupportedTokenizer, read_vocabulary
from tests.export.conftest import TEXT, VOCAB, LlamaCpp, build, byte_tokenizer
from tests.tiny import character_tokenizer

TEXTS = (
    "",
    " ",
    TEXT,
    "  leading and trailing  ",
    "a\n\n\nb\r\n\tc",
    "1 12 123 1234 3.14   42",
    "I'M I'm they'll it's don’t",  # noqa: RUF001 - signs that look like others are what is tested
    "你好，世界。こんにちは 한국어",  # noqa: RUF001 - signs that look like others are what is tested
    "🙂👩‍👩‍👧 naïve café Straße",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    "x<|endoftext|>y <|im_end|> z",
    "def f(x):\n    return x ** 2  # ok\n",
)


@functools.cache
def sentencepiece_like(prefix: str = "Prepend") -> PreTrainedTokenizerFast:
    """BPE with byte fallback whose merges are all splits of all tokens, by score, as those made from sentencepiece."""
    bare = Tokenizer(models.BPE())
    bare.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=50, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    bare.train_from_iterator(["the cat sat on the mat and the other cats"] * 4, trainer)
    learned = json.loads(bare.to_str())["model"]["vocab"]
    pieces = [text for text, _ in sorted(learned.items(), key=lambda item: item[1]) if not text.startswith("<")]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    vocabulary = {text: number for number, text in enumerate(names)}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in pieces
        for cut in range(1, len(piece))
        if piece[:cut] in pieces and piece[cut:] in pieces
    ]
    raw = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if prefix in ("first", "always"):
        raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prefix, split=False)
    elif prefix == "Prepend":
        raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        raw.normalizer = normalizers.Replace(" ", "▁")
    raw.decoder = decoders.ByteFallback()
    raw.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def file_of(tokenizer: PreTrainedTokenizerFast, folder: Path) -> Path:
    path = folder / "m.gguf"
    write_gguf(build(), tokenizer, path)
    return path


@pytest.mark.parametrize("rule", list(RULES))
def test_llama_cpp_makes_the_same_tokens(rule, tmp_path) -> None:
    tokenizer = byte_tokenizer(rule)
    found = LlamaCpp(file_of(tokenizer, tmp_path)).ids(TEXTS)
    assert found == [tokenizer(text)["input_ids"] for text in TEXTS]


@pytest.mark.parametrize("prefix", ["Prepend", "always", "first", "none"])
def test_so_it_does_with_byte_fallback(prefix, tmp_path) -> None:
    tokenizer = sentencepiece_like(prefix)
    texts = [text for text in TEXTS if text]
    if prefix in ("always", "first"):  # which put no second space before one
        texts = [text for text in texts if not text.startswith(" ")]
    if prefix != "first":  # which puts none behind special tokens
        texts += ["the cat</s>the cat</s>sat", "</s>the"]
    found = LlamaCpp(file_of(tokenizer, tmp_path)).ids(texts)
    assert found == [tokenizer(text)["input_ids"] for text in texts]


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    return file_of(byte_tokenizer(), tmp_path_factory.mktemp("vocabulary"))


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20), min_size=20, max_size=20))
def test_any_text(written, texts) -> None:
    tokenizer = byte_tokenizer()
    assert LlamaCpp(written).ids(texts) == [tokenizer(text)["input_ids"] for text in texts]


def test_what_is_written(written) -> None:
    fields = {name: field.contents() for name, field in gguf.GGUFReader(written).fields.items()}
    tokenizer = byte_tokenizer()
    assert fields["tokenizer.ggml.model"] == "gpt2"
    assert fields["tokenizer.ggml.pre"] == "gpt-2"
    names = {text: number for number, text in enumerate(fields["tokenizer.ggml.tokens"])}
    assert {text: names[text] for text in tokenizer.get_vocab()} == tokenizer.get_vocab()
    types = fields["tokenizer.ggml.token_type"]
    # Special tokens, and the embeddings that no token has.
    assert types[1:3] == [gguf.TokenType.CONTROL] * 2
    assert types[len(tokenizer) :] == [gguf.TokenType.UNUSED] * (VOCAB - len(tokenizer))
    assert types[3] == gguf.TokenType.NORMAL
    assert (fields["tokenizer.ggml.bos_token_id"], fields["tokenizer.ggml.eos_token_id"]) == (1, 2)
    assert fields["tokenizer.ggml.add_bos_token"] is False
    assert "tokenizer.chat_template" not in fields


def test_the_chat_template_and_added_words_come_along() -> None:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(byte_tokenizer().backend_tokenizer.to_str())
    )
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.add_tokens([AddedToken("<think>", normalized=False)])
    found = read_vocabulary(tokenizer, VOCAB)
    assert found.template == "{{ messages }}"
    tokenizer.chat_template = {"tool_use": "{{ tools }}", "default": "{{ messages }}"}
    assert read_vocabulary(tokenizer, VOCAB).template == "{{ messages }}"
    assert found.types[tokenizer.get_vocab()["<think>"]] is gguf.TokenType.USER_DEFINED
    assert found.special == {}


@pytest.mark.parametrize("rule", list(RULES))
def test_rules_are_told_apart(rule) -> None:
    assert read_vocabulary(byte_tokenizer(rule), VOCAB).pre == rule


def test_what_stands_around_a_text_is_what_the_tokenizer_does() -> None:
    found = read_vocabulary(sentencepiece_like(), VOCAB)
    assert dict(found.adds) == {"bos": True, "eos": False, "space": True}
    assert not read_vocabulary(sentencepiece_like("none"), VOCAB).adds["space"]
    assert found.types[0] is gguf.TokenType.UNKNOWN
    assert found.types[3 : 3 + 256] == [gguf.TokenType.BYTE] * 256


def changed(tokenizer: PreTrainedTokenizerFast, change) -> PreTrainedTokenizerFast:
    raw = json.loads(tokenizer.backend_tokenizer.to_str())
    change(raw)
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(raw)))


def test_what_llama_cpp_has_no_twin_of_is_refused() -> None:
    with pytest.raises(UnsupportedTokenizer, match="of the kind WordLevel"):
        read_vocabulary(character_tokenizer(), VOCAB)
    with pytest.raises(UnsupportedTokenizer, match="has 312 tokens.*embeddings for 300"):
        read_vocabulary(byte_tokenizer(), 300)
    spaced = changed(byte_tokenizer(), lambda raw: raw["pre_tokenizer"].update(add_prefix_space=True))
    with pytest.raises(UnsupportedTokenizer, match="cuts text by .*add_prefix_space"):
        read_vocabulary(spaced, VOCAB)
    lower = changed(byte_tokenizer(), lambda raw: raw.update(normalizer={"type": "Lowercase"}))
    with pytest.raises(UnsupportedTokenizer, match="normalizer: Lowercase"):
        read_vocabulary(lower, VOCAB)
    stripped = changed(byte_tokenizer(), lambda raw: raw["added_tokens"][0].update(rstrip=True))
    with pytest.raises(UnsupportedTokenizer, match=r"looks at what stands around '<\|endoftext\|>'"):
        read_vocabulary(stripped, VOCAB)
    merging = changed(byte_tokenizer("llama-bpe"), lambda raw: raw["model"].update(ignore_merges=False))
    with pytest.raises(UnsupportedTokenizer, match="cuts text by"):
        read_vocabulary(merging, VOCAB)


def test_merges_that_are_not_all_splits_are_refused() -> None:
    """llama.cpp would merge what this tokenizer does not."""
    fewer = changed(sentencepiece_like(), lambda raw: raw["model"]["merges"].pop(-1))
    with pytest.raises(UnsupportedTokenizer, match="does not merge"):
        read_vocabulary(fewer, VOCAB)
    split = changed(
        sentencepiece_like(),
        lambda raw: raw.update(pre_tokenizer={"type": "Whitespace"}),
    )
    with pytest.raises(UnsupportedTokenizer, match="cuts it by"):
        read_vocabulary(split, VOCAB)


def test_bytes_that_are_no_tokens_are_refused() -> None:
    def without(raw) -> None:
        raw["model"]["vocab"]["other"] = raw["model"]["vocab"].pop("<0x80>")

    with pytest.raises(UnsupportedTokenizer, match="255 of 256"):
        read_vocabulary(changed(sentencepiece_like(), without), VOCAB)
