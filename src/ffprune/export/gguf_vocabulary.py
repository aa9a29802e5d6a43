"""The vocabulary of a GGUF file, out of a Hugging Face tokenizer: the same text must become the same tokens.

llama.cpp has tokenizers of its own and is told their kind (``tokenizer.ggml.model``) and, for byte-level BPE, how text
is cut before merging (``tokenizer.ggml.pre``, a name of a rule built into llama.cpp). What it has no name for is
refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gguf import GGUFWriter, TokenType
from transformers import PreTrainedTokenizerBase

from ffprune.core.errors import FfpruneError

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_BYTES, _BYTES_OF_GPT2 = "bytes", "bytes, words as in GPT-2"

_PREPEND = {"type": "Prepend", "prepend": "▁"}
_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}


class UnsupportedTokenizer(FfpruneError):
    """A tokenizer that llama.cpp has no twin of."""


@dataclass(frozen=True)
class Rule:
    """One way to cut text before byte-level BPE, as llama.cpp names it.

    Attributes:
        steps: of the tokenizer's ``pre_tokenizer``, as :func:`_steps` writes them.
        ignore_merges: whether a whole piece that is a token is taken without merging.
        normalizer: kind of the normalizer, or None. llama.cpp has none: text is to come in that form.
    """

    steps: tuple[str, ...]
    ignore_merges: bool = False
    normalizer: str | None = None


#: ``tokenizer.ggml.pre`` -> rule.
RULES: dict[str, Rule] = {
    "gpt-2": Rule((_BYTES_OF_GPT2,)),
    "smollm": Rule(("digits", _BYTES_OF_GPT2)),
    "llama-bpe": Rule((rf"{_WORDS}|\p{{N}}{{1,3}}|{_REST}", _BYTES), ignore_merges=True),
    "qwen2": Rule((rf"{_WORDS}|\p{{N}}|{_REST}", _BYTES), normalizer="NFC"),
}


@dataclass(frozen=True)
class Vocabulary:
    """What llama.cpp needs to know of a tokenizer.

    Attributes:
        model: ``gpt2`` (byte-level BPE) or ``llama`` (sentencepiece).
        pre: name of a rule, for ``gpt2``.
        tokens: by id, as many as the model has embeddings.
        types: of each token.
        merges: for ``gpt2``, ``left right``, in their order.
        scores: for ``llama``: what llama.cpp merges first, one a token.
        special: ``bos``, ``eos``, ``unk``, ``pad`` -> id, those there are.
        adds: whether ``bos`` and ``eos`` are put around a text, and a space before it.
        template: the chat template, or None.
    """

    model: str
    pre: str | None
    tokens: list[str]
    types: list[TokenType]
    merges: list[str]
    scores: list[float]
    special: Mapping[str, int]
    adds: Mapping[str, bool]
    template: str | None

    def write(self, writer: GGUFWriter) -> None:
        """Add it to a file's metadata."""
        writer.add_tokenizer_model(self.model)
        if self.pre is not None:
            writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.scores:
            writer.add_token_scores(self.scores)
        if self.merges:
            writer.add_token_merges(self.merges)
        setters = {
            "bos": writer.add_bos_token_id,
            "eos": writer.add_eos_token_id,
            "unk": writer.add_unk_token_id,
            "pad": writer.add_pad_token_id,
        }
        for name, number in self.special.items():
            setters[name](number)
        writer.add_add_bos_token(self.adds["bos"])
        writer.add_add_eos_token(self.adds["eos"])
        writer.add_add_space_prefix(self.adds["space"])
        if self.template is not None:
            writer.add_chat_template(self.template)


def read_vocabulary(tokenizer: PreTrainedTokenizerBase, size: int) -> Vocabulary:
    """The vocabulary of a tokenizer.

    Args:
        tokenizer: of a model folder; one with a tokenizer.json.
        size: rows of the model's embedding; rows without a token get an unused one.

    Raises:
        UnsupportedTokenizer: neither byte-level BPE cut by a known rule nor BPE as sentencepiece does it, or more
            tokens than embeddings.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _refused(f"is a {type(tokenizer).__name__} without a tokenizer.json")
    raw = json.loads(backend.to_str())
    model = raw["model"]
    if model["type"] != "BPE":
        raise _refused(f"is of the kind {model['type']}")
    if len(tokenizer) > size:
        raise UnsupportedTokenizer(
            f"The tokenizer has {len(tokenizer)} tokens",
            f"The model has embeddings for {size}",
            "Use the tokenizer that belongs to the model",
        )
    added = {token["id"]: token for token in raw["added_tokens"]}
    for token in added.values():
        if token["lstrip"] or token["rstrip"] or token["single_word"]:
            raise _refused(f"looks at what stands around {token['content']!r}")
    names = {number: text for text, number in tokenizer.get_vocab().items()}
    tokens = [names.get(number, f"[PAD{number}]") for number in range(size)]
    pairs = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
    unknown = None if model["unk_token"] is None else model["vocab"][model["unk_token"]]
    types = [_type(number, text, added, names, unknown, model["byte_fallback"]) for number, text in enumerate(tokens)]
    sentencepiece = bool(model["byte_fallback"])
    if sentencepiece and types.count(TokenType.BYTE) != 256:
        raise _refused(f"falls back to bytes, and has tokens for {types.count(TokenType.BYTE)} of 256")
    return Vocabulary(
        model="llama" if sentencepiece else "gpt2",
        pre=None if sentencepiece else _rule(raw),
        tokens=tokens,
        types=types,
        merges=[] if sentencepiece else [" ".join(pair) for pair in pairs],
        scores=_scores(tokens, types, pairs) if sentencepiece else [],
        special={
            name: number
            for name in ("bos", "eos", "unk", "pad")
            if (number := getattr(tokenizer, f"{name}_token_id")) is not None
        },
        adds={**_around(tokenizer), "space": sentencepiece and _adds_space(raw)},
        template=_template(tokenizer.chat_template),
    )


def _type(
    number: int, text: str, added: Mapping[int, Any], names: Mapping[int, str], unknown: int | None, bytes_too: bool
) -> TokenType:
    if number not in names:
        return TokenType.UNUSED
    if number == unknown:
        return TokenType.UNKNOWN
    if number in added:
        return TokenType.CONTROL if added[number]["special"] else TokenType.USER_DEFINED
    is_byte = bytes_too and len(text) == 6 and text.startswith("<0x") and text.endswith(">")
    return TokenType.BYTE if is_byte else TokenType.NORMAL


def _rule(raw: Mapping[str, Any]) -> str:
    """The name of the rule that cuts text as a tokenizer's ``pre_tokenizer`` does."""
    normalizer = None if raw["normalizer"] is None else raw["normalizer"]["type"]
    found = Rule(_steps(raw["pre_tokenizer"]), bool(raw["model"]["ignore_merges"]), normalizer)
    for name, rule in RULES.items():
        if rule == found:
            return name
    raise _refused(f"cuts text by {' then '.join(found.steps) or 'nothing'} (normalizer: {normalizer})")


def _steps(pre: Mapping[str, Any] | None) -> tuple[str, ...]:
    """A ``pre_tokenizer`` in short: regular expressions that pieces are, and names of other steps."""
    if pre is None:
        return ()
    if pre["type"] == "Sequence":
        return tuple(step for part in pre["pretokenizers"] for step in _steps(part))
    if pre["type"] == "Digits" and pre["individual_digits"]:
        return ("digits",)
    if pre["type"] == "ByteLevel" and not pre["add_prefix_space"]:
        return (_BYTES_OF_GPT2 if pre["use_regex"] else _BYTES,)
    if pre["type"] == "Split" and pre["behavior"] == "Isolated" and not pre["invert"]:
        return (str(pre["pattern"].get("Regex")),)
    return (json.dumps(pre),)


def _scores(tokens: Sequence[str], types: Sequence[TokenType], pairs: Sequence[tuple[str, ...]]) -> list[float]:
    """Minus the rank of a token's merge: llama.cpp joins the neighbours whose joint token scores highest.

    It joins *any* neighbours that make up a token. That is what these merges say only if they hold every split of every
    token in two, as those made from sentencepiece models do.
    """
    rank: dict[str, int] = {}
    for number, pair in enumerate(pairs):
        rank.setdefault("".join(pair), number)
    normal = {text for text, kind in zip(tokens, types, strict=True) if kind is TokenType.NORMAL}
    listed = set(pairs)
    for text in normal:
        for cut in range(1, len(text)):
            pair = (text[:cut], text[cut:])
            if normal.issuperset(pair) and pair not in listed:
                raise _refused(f"does not merge {pair[0]!r} and {pair[1]!r}, though {text!r} is a token")
    return [-float(rank.get(text, len(pairs))) for text in tokens]


def _adds_space(raw: Mapping[str, Any]) -> bool:
    """Whether a space is put before a text, by sentencepiece's convention; refuses what is not that convention.

    llama.cpp puts one before every piece of text, as sentencepiece and ``Prepend`` do. ``Metaspace`` puts none before
    a piece that starts with a space and, by its scheme ``first``, none behind special tokens. transformers 5 loads
    Llama 2 so: it is taken all the same, and differs in these two places.
    """
    steps = raw["normalizer"]["normalizers"] if (raw["normalizer"] or {}).get("type") == "Sequence" else []
    steps = steps or ([raw["normalizer"]] if raw["normalizer"] else [])
    pre = raw["pre_tokenizer"]
    if pre is None and steps in ([_PREPEND, _REPLACE], [_REPLACE]):
        return _PREPEND in steps
    if pre is not None and pre["type"] == "Metaspace" and pre["replacement"] == "▁" and not pre["split"] and not steps:
        return bool(pre["prepend_scheme"] != "never")
    raise _refused(f"with byte fallback changes text by {steps} and cuts it by {pre}")


def _around(tokenizer: PreTrainedTokenizerBase) -> dict[str, bool]:
    """Whether a text gets a first and a last token, as the tokenizer really does it."""
    ids, bare = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    return {
        "bos": len(ids) > len(bare) and ids[0] == tokenizer.bos_token_id,
        "eos": len(ids) > len(bare) and ids[-1] == tokenizer.eos_token_id,
    }


def _template(told: str | Mapping[str, str] | None) -> str | None:
    """The chat template; of several, the one that is called ``default``."""
    return told.get("default") if isinstance(told, Mapping) else told


def _refused(what: str) -> UnsupportedTokenizer:
    return UnsupportedTokenizer(
        f"The tokenizer {what}",
        f"GGUF takes byte-level BPE that cuts text as {', '.join(RULES)} do, and BPE with byte fallback as "
        "sentencepiece models have it",
        "Export to hf or onnx, which keep the tokenizer as it is, or add a rule to RULES in "
        "ffprune/export/gguf_vocabulary.py if llama.cpp has one for it",
    )
