"""Model families: one row per family says where its prunable linears live."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ffprune.core.errors import UnsupportedArchitecture
from ffprune.models.unsupported import no_row

if TYPE_CHECKING:  # `import ffprune` reads this table and must stay fast
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Fusion:
    """One linear of a family that does what others do by several, or whose weight is stored transposed.

    Attributes:
        path: inside a layer.
        roles: whose rows it has, in this order.
        by_head: rows alternate head by head (q, k and v of the first head, then of the second), not role by role.
        transposed: the weight is [in, out] (GPT-2's Conv1D).
    """

    path: str
    roles: tuple[str, ...]
    by_head: bool = False
    transposed: bool = False


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in the place of a family's FFN (:mod:`ffprune.models.experts`).

    Attributes:
        path: inside a layer, of the module with all experts' weights.
        router: inside a layer, of the module that chooses among them; it is never pruned.
        stored: what files call the module that has both.
        linears: role -> what files call it in every expert.
    """

    path: str
    router: str
    stored: str
    linears: Mapping[str, str]


@dataclass(frozen=True)
class Family:
    """Where one family of decoder-only models keeps its prunable linears (METHODS 1).

    Whether a linear has a bias is read off the module, never stated here.

    Attributes:
        model_type: the ``model_type`` of the family's config in transformers.
        architecture: transformers' class of its causal language model.
        package: folder of the family's code in ``transformers.models``.
        layers: dotted path from the causal-LM model to its list of decoder layers.
        attention: path of the attention module inside a layer.
        attention_inputs: role -> path inside a layer of the linears that lose output rows (q, k, v).
        attention_output: path inside a layer of the attention's last linear, role ``o``.
        ffn_inputs: role -> path inside a layer of the FFN's linears that lose output rows
            (``gate`` and ``up``, or ``up`` alone where the FFN is not gated).
        ffn_output: path inside a layer of the FFN's last linear, role ``down``.
        heads: config attribute with the number of query heads.
        kv_heads: config attribute with the number of key/value heads (``heads`` again without GQA).
        ffn_width: config attribute with the number of FFN channels; its value None means four times the hidden width.
        attributes: attribute of the attention module that its forward reads -> ``heads`` (query heads), ``groups``
            (key/value heads), ``ratio`` (the first by the second) or ``width`` (of all query heads). After ``config.``
            it is an attribute of the module's config.
        marks: config attributes that give the layout away, used to name the nearest row in refusals
            (:mod:`ffprune.models.unsupported`).
        head_dim: attribute of the attention module with the width of a head.
        fused: linears that are taken apart (:mod:`ffprune.models.fused`); the paths of their roles end in the role.
        stored_as: tensor -> its name in the family's files, where that is another.
        experts: where the FFN is a mixture of experts; ``ffn_width`` is then an expert's.
        refused: config attribute -> why a model that has it on cannot be pruned.
    """

    model_type: str
    architecture: str
    package: str
    layers: str
    attention: str
    attention_inputs: Mapping[str, str]
    attention_output: str
    ffn_inputs: Mapping[str, str]
    ffn_output: str
    heads: str
    kv_heads: str
    ffn_width: str
    attributes: Mapping[str, str]
    marks: tuple[str, ...]
    head_dim: str = "head_dim"
    fused: tuple[Fusion, ...] = ()
    stored_as: Mapping[str, str] = field(default_factory=dict)
    experts: Experts | None = None
    refused: Mapping[str, str] = field(default_factory=dict)

    @property
    def paths(self) -> dict[str, str]:
        """Role -> path inside a layer, of all prunable linears."""
        return {
            **self.attention_inputs,
            "o": self.attention_output,
            **self.ffn_inputs,
            "down": self.ffn_output,
        }

    @property
    def needs_channels(self) -> bool:
        """Whether transformers cannot run its FFN without any channel: a Conv1D takes no empty input."""
        return any(fusion.transposed and fusion.roles == ("down",) for fusion in self.fused)

    @property
    def layout(self) -> dict[str, Any]:
        """The row as :mod:`ffprune.models.modeling_pruned` reads it: plain values, fit to be written into a file."""
        linears: dict[str, Any] = {}
        for role, path in self.paths.items():
            if self.experts is not None and path.startswith(f"{self.experts.path}."):
                continue  # in tensors of all experts
            fusion = next((f for f in self.fused if role in f.roles), Fusion(path, (role,)))
            linears[fusion.path] = {
                "roles": fusion.roles,
                "by_head": fusion.by_head,
                "transposed": fusion.transposed,
            }
        names = ("layers", "attention", "heads", "kv_heads", "ffn_width", "head_dim", "attributes")
        experts = None if self.experts is None else self.experts.path
        return {**{name: getattr(self, name) for name in names}, "linears": linears, "experts": experts}


def _llama_layout(model_type: str, architecture: str, package: str | None = None) -> Family:
    return Family(
        model_type=model_type,
        architecture=architecture,
        package=package or model_type,
        layers="model.layers",
        attention="self_attn",
        attention_inputs={"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj"},
        attention_output="self_attn.o_proj",
        ffn_inputs={"gate": "mlp.gate_proj", "up": "mlp.up_proj"},
        ffn_output="mlp.down_proj",
        heads="num_attention_heads",
        kv_heads="num_key_value_heads",
        ffn_width="intermediate_size",
        attributes={"num_key_value_groups": "ratio"},
        marks=("num_key_value_heads", "rms_norm_eps", "hidden_act", "intermediate_size"),
    )


def _mixture(model_type: str, architecture: str, width: str, mark: str, experts: Experts) -> Family:
    return replace(
        _llama_layout(model_type, architecture),
        ffn_inputs={role: f"{experts.path}.{role}" for role in ("gate", "up")},
        ffn_output=f"{experts.path}.down",
        ffn_width=width,
        marks=("num_key_value_heads", "rms_norm_eps", "hidden_act", "num_experts_per_tok", mark),
        experts=experts,
    )


_QWEN_EXPERTS = Experts(
    "mlp.experts", "mlp.gate", stored="mlp", linears={"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
)


_ROWS = (
    _llama_layout("llama", "LlamaForCausalLM"),
    _llama_layout("mistral", "MistralForCausalLM"),
    _llama_layout("qwen2", "Qwen2ForCausalLM"),
    _llama_layout("qwen3", "Qwen3ForCausalLM"),
    _mixture(
        "mixtral",
        "MixtralForCausalLM",
        "intermediate_size",
        "num_local_experts",
        Experts("mlp.experts", "mlp.gate", stored="block_sparse_moe", linears={"gate": "w1", "up": "w3", "down": "w2"}),
    ),
    # The expert that all tokens share, where there is one, stays whole (decision 0012).
    _mixture(
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        "moe_intermediate_size",
        "shared_expert_intermediate_size",
        _QWEN_EXPERTS,
    ),
    _mixture("qwen3_moe", "Qwen3MoeForCausalLM", "moe_intermediate_size", "num_experts", _QWEN_EXPERTS),
    _llama_layout("gemma", "GemmaForCausalLM"),
    _llama_layout("gemma2", "Gemma2ForCausalLM"),
    _llama_layout("gemma3_text", "Gemma3ForCausalLM", "gemma3"),
    _llama_layout("granite", "GraniteForCausalLM"),
    _llama_layout("smollm3", "SmolLM3ForCausalLM"),
    replace(
        _llama_layout("olmo", "OlmoForCausalLM"),
        marks=("num_key_value_heads", "clip_qkv", "hidden_act", "intermediate_size"),
    ),
    replace(
        _llama_layout("exaone4", "Exaone4ForCausalLM"),
        marks=("num_key_value_heads", "rms_norm_eps", "sliding_window_pattern", "intermediate_size"),
    ),
    replace(
        _llama_layout("stablelm", "StableLmForCausalLM"),
        attributes={"num_heads": "heads", "num_key_value_heads": "groups", "num_key_value_groups": "ratio"},
        marks=("num_key_value_heads", "layer_norm_eps", "use_qkv_bias", "use_parallel_residual"),
        refused={"qk_layernorm": "every head has a norm of its own, which no cut takes along"},
    ),
    replace(
        _llama_layout("apertus", "ApertusForCausalLM"),
        ffn_inputs={"up": "mlp.up_proj"},
    ),
    replace(
        _llama_layout("glm", "GlmForCausalLM"),
        ffn_inputs={"gate": "mlp.gate_up_proj.gate", "up": "mlp.gate_up_proj.up"},
        fused=(Fusion("mlp.gate_up_proj", ("gate", "up")),),
    ),
    replace(
        _llama_layout("starcoder2", "Starcoder2ForCausalLM"),
        ffn_inputs={"up": "mlp.c_fc"},
        ffn_output="mlp.c_proj",
        marks=("num_key_value_heads", "norm_epsilon", "use_bias", "residual_dropout"),
    ),
    replace(
        _llama_layout("phi", "PhiForCausalLM"),
        attention_output="self_attn.dense",
        ffn_inputs={"up": "mlp.fc1"},
        ffn_output="mlp.fc2",
        marks=("num_key_value_heads", "qk_layernorm", "resid_pdrop", "layer_norm_eps"),
    ),
    replace(
        _llama_layout("phi3", "Phi3ForCausalLM"),
        attention_inputs={role: f"self_attn.qkv_proj.{role}" for role in "qkv"},
        ffn_inputs={"gate": "mlp.gate_up_proj.gate", "up": "mlp.gate_up_proj.up"},
        attributes={
            "num_key_value_groups": "ratio",
            "num_key_value_heads": "groups",
            "config.num_attention_heads": "heads",
        },
        marks=("num_key_value_heads", "rms_norm_eps", "hidden_act", "original_max_position_embeddings"),
        fused=(Fusion("self_attn.qkv_proj", ("q", "k", "v")), Fusion("mlp.gate_up_proj", ("gate", "up"))),
    ),
    Family(
        model_type="gpt_neox",
        architecture="GPTNeoXForCausalLM",
        package="gpt_neox",
        layers="gpt_neox.layers",
        attention="attention",
        attention_inputs={role: f"attention.query_key_value.{role}" for role in "qkv"},
        attention_output="attention.dense",
        ffn_inputs={"up": "mlp.dense_h_to_4h"},
        ffn_output="mlp.dense_4h_to_h",
        heads="num_attention_heads",
        kv_heads="num_attention_heads",
        ffn_width="intermediate_size",
        attributes={},
        marks=("use_parallel_residual", "rotary_pct", "classifier_dropout", "layer_norm_eps"),
        head_dim="head_size",
        fused=(Fusion("attention.query_key_value", ("q", "k", "v"), by_head=True),),
        stored_as={"lm_head.weight": "embed_out.weight"},
    ),
    Family(
        model_type="gpt2",
        architecture="GPT2LMHeadModel",
        package="gpt2",
        layers="transformer.h",
        attention="attn",
        attention_inputs={role: f"attn.c_attn.{role}" for role in "qkv"},
        attention_output="attn.c_proj.o",
        ffn_inputs={"up": "mlp.c_fc.up"},
        ffn_output="mlp.c_proj.down",
        heads="n_head",
        kv_heads="n_head",
        ffn_width="n_inner",
        attributes={"num_heads": "heads", "split_size": "width"},
        marks=("n_embd", "n_head", "n_layer", "n_inner"),
        fused=(
            Fusion("attn.c_attn", ("q", "k", "v"), transposed=True),
            Fusion("attn.c_proj", ("o",), transposed=True),
            Fusion("mlp.c_fc", ("up",), transposed=True),
            Fusion("mlp.c_proj", ("down",), transposed=True),
        ),
    ),
    Family(
        model_type="opt",
        architecture="OPTForCausalLM",
        package="opt",
        layers="model.decoder.layers",
        attention="self_attn",
        attention_inputs={"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj"},
        attention_output="self_attn.out_proj",
        ffn_inputs={"up": "fc1"},
        ffn_output="fc2",
        heads="num_attention_heads",
        kv_heads="num_attention_heads",
        ffn_width="ffn_dim",
        attributes={"num_heads": "heads"},
        marks=("ffn_dim", "do_layer_norm_before", "word_embed_proj_dim", "activation_function"),
    ),
    replace(
        _llama_layout("cohere", "CohereForCausalLM"),
        marks=("num_key_value_heads", "layer_norm_eps", "hidden_act", "use_qk_norm"),
        refused={"use_qk_norm": "every head has norm weights of its own, which no cut takes along"},
    ),
)

#: The supported families by transformers ``model_type``.
FAMILIES: dict[str, Family] = {row.model_type: row for row in _ROWS}


def family_of(config: PretrainedConfig) -> Family:
    """The row of the table that fits a model's config.

    Args:
        config: a transformers config.

    Returns:
        The row for ``config.model_type``.

    Raises:
        UnsupportedArchitecture: no row has this ``model_type``; names the nearest row, and what stands in the way. Or
            only some of its layers have experts, or a setting is on that the family's row refuses.
    """
    family = family_named(config.model_type, config.to_dict())
    dense, step = getattr(config, "mlp_only_layers", None), getattr(config, "decoder_sparse_step", 1)
    if family.experts is not None and (dense or step != 1):
        raise UnsupportedArchitecture(
            f"The model is of type {config.model_type!r} with mlp_only_layers {dense} and decoder_sparse_step {step}",
            "Layers without experts among layers with them have an FFN of another kind and width; published models "
            "have experts in every layer",
            "Choose a model with mlp_only_layers [] and decoder_sparse_step 1",
        )
    for setting, why in family.refused.items():
        if getattr(config, setting, False):
            raise UnsupportedArchitecture(
                f"The model is of type {config.model_type!r} with {setting} on: {why}",
                f"Models of this type are supported with {setting} off",
                f"Choose a model with {setting} false, or one of another type",
            )
    return family


def family_named(model_type: str | None, settings: Mapping[str, Any]) -> Family:
    """:func:`family_of` for a config that transformers may not know either.

    Args:
        model_type: the config's ``model_type``; None where it has none.
        settings: the config's settings, which give its layout away.

    Returns:
        The row for ``model_type``.

    Raises:
        UnsupportedArchitecture: no row has this ``model_type``; names the nearest row, and what stands in the way.
    """
    if model_type not in FAMILIES:
        raise no_row(model_type, settings, FAMILIES)
    return FAMILIES[model_type]
