from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from ffprune.compress.sliced_layer import SlicedRMSNorm
from ffprune.compress.slicegpt import check, compress, dimensions
from ffprune.core.errors import ParameterError, UnsupportedArchitecture
from ffprune.models.surgery import copy_model
from ffprune.models.view import ModelView
from tests.oracles.slicegpt import projected_logits
from tests.tiny import VOCAB, llama, opt, spread

WINDOWS = torch.randint(VOCAB, (5, 20), generator=torch.Generator().manual_seed(1))
HIDDEN = 16
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
GROUPED = {**SIZES, "intermediate_size": 24, "num_key_value_heads": 2}


def opt_with(**settings: bool) -> PreTrainedModel:
    return OPTForCausalLM(OPTConfig(**SIZES, ffn_dim=24, word_embed_proj_dim=HIDDEN, **settings))


BUILDERS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama_tied": llama,
    "llama_untied": lambda: llama(tied=False),
    "llama_mha": lambda: llama(kv_heads=4),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**GROUPED, sliding_window=8)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**GROUPED, tie_word_embeddings=True)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**GROUPED, head_dim=6)),
    "opt": opt,
    "opt_plain_norms": lambda: opt_with(layer_norm_elementwise_affine=False),
    "opt_no_biases": lambda: opt_with(enable_bias=False),
}


@pytest.fixture(params=BUILDERS)
def dense(request: pytest.FixtureRequest) -> PreTrainedModel:
    return spread(BUILDERS[request.param]()).requires_grad_(False)


@pytest.fixture(params=["llama_tied", "opt"])
def either(request: pytest.FixtureRequest) -> PreTrainedModel:
    """One model with each kind of norm."""
    return spread(BUILDERS[request.param]()).requires_grad_(False)


def logits(model: PreTrainedModel, windows: Tensor = WINDOWS) -> Tensor:
    with torch.inference_mode():
        return model(windows, use_cache=False).logits


def is_close(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    return float((found - expected).abs().max()) < tolerance * float(expected.abs().max())


def test_rotation_alone_is_the_dense_model(dense: PreTrainedModel) -> None:
    view = ModelView(copy_model(dense))
    facts = compress(view, HIDDEN, WINDOWS, 2)
    other = torch.randint(VOCAB, (3, 17), generator=torch.Generator().manual_seed(2))
    for windows in (WINDOWS, other):
        assert is_close(logits(view.model, windows), logits(dense, windows), 1e-4)
    assert facts.decoder_removed < 0
    first = dense.get_input_embeddings().weight
    assert not torch.allclose(view.model.get_input_embeddings().weight, first, atol=1e-2)


@pytest.mark.parametrize("width", [13, 8])
def test_slicing_is_projecting_the_residual_stream(dense: PreTrainedModel, width: int) -> None:
    view = ModelView(copy_model(dense))
    compress(view, width, WINDOWS, 2)
    expected = projected_logits(dense, WINDOWS, width, centred=dense.config.model_type == "opt")
    assert is_close(logits(view.model), expected, 1e-3)
    assert not is_close(expected, logits(dense), 1e-2)


def test_sizes_of_a_llama_are_exact() -> None:
    view = ModelView(spread(llama(tied=True)))
    assert dimensions(HIDDEN, 0.25, round_to=4) == 12
    facts = compress(view, 12, WINDOWS, 2)
    # Per layer: q and o 16 x 12, k and v 8 x 12, gate, up and down 24 x 12, shortcuts 12 x 12; but the last layer's
    # down and shortcut end in 16 dimensions.
    sliced = 2 * 16 * 12 + 2 * 8 * 12 + 3 * 24 * 12
    assert facts.decoder_before == 2 * (2 * 16 * 16 + 2 * 8 * 16 + 3 * 24 * 16 + 2 * 16)
    assert facts.shortcuts == 3 * 12 * 12 + 12 * 16
    assert facts.decoder_after == 2 * sliced + 24 * 4 + facts.shortcuts
    assert facts.decoder_removed == pytest.approx(1 - facts.decoder_after / facts.decoder_before)
    assert (facts.embeddings_before, facts.head_before) == (VOCAB * 16, 0)
    assert (facts.embeddings_after, facts.head_after) == (VOCAB * 12, VOCAB * 16)
    assert facts.params_before == facts.decoder_before + VOCAB * 16 + 16
    assert facts.params_after == sum(p.numel() for p in view.model.parameters())
    assert facts.params_after == facts.decoder_after + VOCAB * (12 + 16) + 16
    assert (facts.hidden, facts.dimensions) == (16, 12)


def test_sizes_of_an_opt_count_positions_and_biases() -> None:
    view = ModelView(spread(opt()))
    facts = compress(view, 8, WINDOWS, 2)
    positions = 128 + 2
    assert facts.embeddings_before == (VOCAB + positions) * 16
    assert facts.embeddings_after == (VOCAB + positions) * 8
    sliced = 3 * (16 * 8 + 16) + (16 * 8 + 8) + (24 * 8 + 24) + (24 * 8 + 8) + 2 * 8 * 8
    assert facts.decoder_after == 2 * sliced + (24 + 1 + 8) * 8
    assert facts.params_after == facts.decoder_after + facts.embeddings_after + VOCAB * 16 + 2 * 16


def test_modules_know_their_shapes(either: PreTrainedModel) -> None:
    compress(ModelView(either), 8, WINDOWS, 2)
    for module in either.modules():
        if isinstance(module, nn.Linear):
            assert module.weight.shape == (module.out_features, module.in_features)
        if isinstance(module, nn.Embedding):
            assert module.weight.shape == (module.num_embeddings, module.embedding_dim)
    again = ModelView(either)
    assert [unit.granules for unit in again.units][1::2] == [24, 24]


def test_a_tied_head_is_untied_for_good() -> None:
    model = spread(llama(tied=True)).requires_grad_(False)
    head = model.lm_head.weight.clone()
    compress(ModelView(model), 8, WINDOWS, 2)
    model.tie_weights()
    assert torch.equal(model.lm_head.weight, head)
    assert model.get_input_embeddings().weight.shape == (VOCAB, 8)


def test_it_generates_with_a_cache(dense: PreTrainedModel) -> None:
    compress(ModelView(dense), 8, WINDOWS, 2)
    prompt = WINDOWS[:1, :8]
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(prompt), "eos_token_id": None}
    cached = dense.generate(prompt, use_cache=True, **options)
    assert cached.shape == (1, 14)
    assert torch.equal(cached, dense.generate(prompt, use_cache=False, **options))


def test_padding_is_masked_as_in_the_dense_model(either: PreTrainedModel) -> None:
    view = ModelView(copy_model(either))
    compress(view, HIDDEN, WINDOWS, 2)
    mask = torch.ones_like(WINDOWS)
    mask[0, :6] = 0
    with torch.inference_mode():
        found, expected = (model(WINDOWS, attention_mask=mask).logits[:, 6:] for model in (view.model, either))
    assert is_close(found, expected, 1e-4)
    assert not is_close(found, logits(either)[:, 6:], 1e-3)


def test_the_view_follows_the_model_and_a_copy_computes_the_same(either: PreTrainedModel) -> None:
    view = ModelView(either)
    steps: list[tuple[int, int]] = []
    compress(view, 8, WINDOWS, 2, progress=lambda *step: steps.append(step))
    assert steps == [(1, 2), (2, 2)]
    fresh = ModelView(either)
    assert [b.layer for b in view.blocks] == [b.layer for b in fresh.blocks]
    assert list(view.prunable.items()) == list(fresh.prunable.items())
    assert torch.equal(logits(copy_model(either)), logits(either))
    assert not any(p.requires_grad for p in either.parameters())


def test_the_batch_size_does_not_matter(either: PreTrainedModel) -> None:
    views = [ModelView(copy_model(either)) for _ in range(2)]
    for view, batch_size in zip(views, (1, 5), strict=True):
        compress(view, 8, WINDOWS, batch_size)
    assert is_close(logits(views[0].model), logits(views[1].model), 1e-3)


def test_the_dtype_stays() -> None:
    for model in (spread(llama()), spread(opt())):
        model = model.requires_grad_(False).bfloat16()
        compress(ModelView(model), 8, WINDOWS, 2)
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        assert logits(model).isfinite().all()


def test_the_norm_takes_its_mean_over_the_dense_width() -> None:
    norm = SlicedRMSNorm(4, 0.5)
    x = torch.tensor([3.0, 4.0])
    torch.testing.assert_close(norm(x), x / (25 / 4 + 0.5) ** 0.5)
    assert norm(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("hidden", "sparsity", "width"),
    [(576, 0.2, 456), (576, 0.3, 400), (576, 0.0, 576), (4096, 0.25, 3072), (640, 0.9, 64)],
)
def test_the_width_that_a_sparsity_leaves(hidden: int, sparsity: float, width: int) -> None:
    assert dimensions(hidden, sparsity) == width


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 0.99])
def test_refuses_sparsities_that_leave_no_width(sparsity: float) -> None:
    with pytest.raises(ParameterError, match="parsity"):
        dimensions(576, sparsity)


def refused(model: PreTrainedModel, reason: str) -> None:
    view = ModelView(spread(model))
    before = logits(model)
    with pytest.raises(UnsupportedArchitecture, match=reason):
        check(view)
    with pytest.raises(UnsupportedArchitecture, match=reason):
        compress(view, 8, WINDOWS, 2)
    assert torch.equal(logits(model), before)


def test_refuses_models_that_cannot_be_rotated() -> None:
    refused(opt(projected=True), "do_layer_norm_before")
    refused(opt_with(do_layer_norm_before=False), "do_layer_norm_before")
    config = OPTConfig(**SIZES, ffn_dim=24, word_embed_proj_dim=8)
    refused(OPTForCausalLM(config), "8 wide in a residual stream of 16")
    refused(opt_with(_remove_final_layer_norm=True), "_remove_final_layer_norm")


def test_refuses_a_sliced_model() -> None:
    view = ModelView(spread(llama()).requires_grad_(False))
    compress(view, 8, WINDOWS, 2)
    for again in (view, ModelView(view.model)):
        with pytest.raises(UnsupportedArchitecture, match="sliced before"):
            check(again)


@pytest.mark.parametrize("width", [0, HIDDEN + 1])
def test_refuses_widths_out_of_range_and_no_text_before_any_work(width: int) -> None:
    view = ModelView(spread(llama()))
    before = logits(view.model)
    with pytest.raises(ParameterError, match="1 to 16"):
        compress(view, width, WINDOWS, 2)
    with pytest.raises(ParameterError, match="windows"):
        compress(view, 8, WINDOWS[:0], 2)
    assert torch.equal(logits(view.model), before)
