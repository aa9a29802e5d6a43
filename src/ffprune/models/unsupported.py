"""Why the table of families has no row for a model: what is near, and what stands in the way."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ffprune.core.errors import UnsupportedArchitecture

if TYPE_CHECKING:  # which raises what is made here
    from ffprune.models.families import Family

_SIMILAR = 0.7
"""Names more alike than this count as those of relatives (gemma2 and gemma4, not smollm3 and olmo2)."""

#: Settings of a config, and what a model that has one of them on does, which no row can say yet.
_OBSTACLES: tuple[tuple[tuple[str, ...], str], ...] = (
    (("is_encoder_decoder", "encoder_layers"), "it has an encoder beside its decoder"),
    (("type_vocab_size",), "it is an encoder, which predicts no next token"),
    (
        ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "ffn_config"),
        "its FFN is a mixture of experts of another layout than those that ffprune knows",
    ),
    (("kv_lora_rank",), "keys and values come from a common latent vector, not from heads of their own"),
    (("state_size",), "it is a state space model, without attention"),
    (("rescale_every",), "it is a recurrent network, without attention"),
    (
        ("mamba_d_state", "ssm_state_size", "block_types", "lru_width", "conv_L_cache", "linear_conv_kernel_dim"),
        "some of its layers are no attention",
    ),
    (("multi_query",), "all query heads share one key and one value head, in one linear with them"),
    (("alibi",), "its positions are ALiBi, whose slopes follow from the number of heads"),
)

#: What stands in the way of types whose configs do not tell.
_OF_TYPE: dict[str, str] = {
    "bloom": "its positions are ALiBi, whose slopes follow from the number of heads",
    "codegen": "queries, values and keys lie in one linear, in four stretches that have some heads of each",
    "gptj": "queries, keys and values are linears of their own, in a layer otherwise like GPT-2's",
    "gpt_neo": "its attention is a module inside another (attn.attention), and some layers see a window only",
    "helium": "its attention's last linear is square, so layers that all keep as few heads make no stock model",
    **dict.fromkeys(
        ("olmo2", "olmo3"),
        "a norm over all query heads together, and one over all keys, would have to be cut with them",
    ),
}


def no_row(model_type: str | None, settings: Mapping[str, Any], rows: Mapping[str, Family]) -> UnsupportedArchitecture:
    """The refusal of a model whose type has no row.

    Args:
        model_type: the config's; None or empty where it says none.
        settings: the config, of which nothing need be known to transformers.
        rows: the table of families.
    """
    known = f"Supported types are {', '.join(rows)}"
    near = _nearest(model_type or "", settings, rows)
    if not model_type or model_type == "None":
        return UnsupportedArchitecture(
            "The model's config has no model_type, so nothing says how its layers are laid out",
            f"{known}; by its settings the nearest is {near.model_type!r}",
            "Write the model_type that its publisher gives into config.json, or choose a folder that save_pretrained "
            "wrote",
        )
    asked = f"The model is of type {model_type!r}, which ffprune has no row for"
    text = settings.get("text_config")
    if isinstance(text, Mapping) and text:
        return _part(asked, known, text, rows)
    return UnsupportedArchitecture(
        f"{asked}: {_missing(model_type, settings, near)}",
        f"{known}; the nearest is {near.model_type!r}",
        "Choose a model of a supported type, or, if its layers are laid out like the nearest one's, "
        "add a row to FAMILIES in ffprune/models/families.py and run the family suite in tests/models",
    )


def _part(asked: str, known: str, text: Mapping[str, Any], rows: Mapping[str, Family]) -> UnsupportedArchitecture:
    """Of a larger model, whose language model has a config of its own."""
    inner = str(text.get("model_type") or "")
    near = _nearest(inner, text, rows)
    asked = f"{asked}: its language model is a part of a larger one (text_config, of type {inner!r})"
    if inner in rows:
        return UnsupportedArchitecture(
            asked,
            f"{known}; the nearest is {inner!r}: the language model alone is supported",
            "Save the language model by itself: load the whole with AutoModelForImageTextToText, make "
            "AutoModelForCausalLM.from_config(whole.config.text_config), give its `model` the state_dict of "
            "whole.model.language_model and its `lm_head` that of whole.lm_head, and save_pretrained it with the "
            "tokenizer",
        )
    return UnsupportedArchitecture(
        f"{asked}, and that has no row either: {_missing(inner, text, near)}",
        f"{known}; the nearest is {near.model_type!r}",
        "Choose a model of a supported type, or add a row for its language model to FAMILIES in "
        "ffprune/models/families.py and run the family suite in tests/models",
    )


def _missing(model_type: str, settings: Mapping[str, Any], near: Family) -> str:
    """What stands in the way; failing that, what marks the nearest row and is not in the config."""
    nested = settings.get("attn_config")
    found = {**settings, **(nested if isinstance(nested, Mapping) else {})}
    reasons = [_OF_TYPE[model_type]] if model_type in _OF_TYPE else []
    for names, why in _OBSTACLES:
        name = next((name for name in names if found.get(name)), None)
        if name is not None:
            reasons.append(f"{why} ({name})")
    if reasons:
        return "; ".join(reasons)
    lacking = [name for name in _settings(near) if name not in settings]
    if lacking:
        return f"its config lacks {', '.join(lacking)}, which {near.model_type!r} has"
    return f"its config has all that marks {near.model_type!r}, but whether its layers are laid out alike is untried"


def _settings(row: Family) -> dict[str, None]:
    """The settings that a row reads or is known by, in order."""
    return dict.fromkeys((*row.marks, row.heads, row.kv_heads, row.ffn_width))


def _nearest(model_type: str, settings: Mapping[str, Any], rows: Mapping[str, Family]) -> Family:
    """Most marks in common first, then settings, the fewest that are lacking, a similar name, the table's order."""

    def likeness(row: Family) -> tuple[int, int, int, float]:
        wanted = _settings(row)
        marks, common = (sum(name in settings for name in names) for names in (row.marks, wanted))
        name = difflib.SequenceMatcher(None, model_type, row.model_type).ratio()
        return marks, common, common - len(wanted), name if name >= _SIMILAR else 0.0

    return max(rows.values(), key=likeness)
