"""One suite that every model family passes; a new family adds a config and a two-line class."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CohereConfig,
    Gemma3Config,
    LlamaConfig,
    PretrainedConfig,
    StableLmConfig,
)

from ffprune.compress.cut import cut
from ffprune.core.errors import ParameterError, UnsupportedArchitecture
from ffprune.core.masks import mask_from_ranks, ranks
from ffprune.core.saliency import scores
from ffprune.core.units import Allocation
from ffprune.models.checkpoint import _tensors, load_model, save_model
from ffprune.models.experts import ExpertOutput
from ffprune.models.families import FAMILIES, family_named, family_of
from ffprune.models.layer_config import LayerShape, read_layer_config
from ffprune.models.surgery import copy_model, mask_unit, read_unit, set_unit, slice_model, slice_unit
from ffprune.models.view import ModelView, granule_indices
from tests.models.conftest import CONFIGS, LLAMA
from tests.oracles.calibration import collect


class FamilySuite:
    """What holds for every family. Subclasses state the counts, worked out by hand."""

    case: str
    granules: tuple[int, int] = (3, 20)
    params_per_granule: tuple[int, int]
    roles = ("q", "k", "v", "o", "gate", "up", "down")

    @pytest.fixture
    def model(self, make_model):
        return make_model(self.case)

    @pytest.fixture
    def view(self, model):
        return ModelView(model)

    def test_units_are_counted_to_the_last_parameter(self, view):
        names = [f"layers.{i}.{kind}" for i in range(3) for kind in ("attention", "ffn")]
        assert [u.name for u in view.units] == names
        assert [u.granules for u in view.units] == list(self.granules) * 3
        assert [u.params_per_granule for u in view.units] == list(self.params_per_granule) * 3
        assert list(view.prunable) == [f"layers.{i}.{role}" for i in range(3) for role in self.roles]
        assert view.prunable_params == sum(linear.weight.numel() for linear in view.prunable.values())

    def test_removing_a_granule_removes_its_params_and_biases(self, view):
        before = {n: p.numel() for n, p in view.model.named_parameters()}
        for index, unit in enumerate(view.units):
            slice_unit(view, index, torch.arange(unit.granules - 1))
        after = {n: p.numel() for n, p in view.model.named_parameters()}
        lost = {n: before[n] - after[n] for n in before}
        weights = sum(count for name, count in lost.items() if name.endswith("weight"))
        assert weights == sum(u.params_per_granule for u in view.units)
        family = view.family
        outputs = tuple(f"{path}.bias" for path in (family.attention_output, family.ffn_output))
        inputs = tuple(
            f"{path}.bias" for part in (family.attention_inputs, family.ffn_inputs) for path in part.values()
        )
        for name, count in lost.items():
            if name.endswith(outputs):
                assert count == 0
            elif name.endswith(inputs):
                assert count > 0

    def test_removing_a_granule_removes_its_multiply_adds(self, view, tokens):
        # Without sdpa's causal short cuts, every token is multiplied with all of its window.
        view.model.set_attn_implementation("eager")

        def counted() -> int:
            with FlopCounterMode(display=False) as counter:
                view.model(tokens)
            return counter.get_total_flops()

        before = counted()
        for index, unit in enumerate(view.units):
            slice_unit(view, index, torch.arange(unit.granules - 1))
            after = counted()
            assert before - after == 2 * tokens.numel() * view.granule_macs(tokens.shape[1])[index]
            before = after

    def test_masked_equals_sliced(self, view, tokens, uneven):
        twin = ModelView(copy_model(view.model))
        kept = uneven(view.units)
        for index, granules in enumerate(kept):
            mask_unit(twin, index, granules)
        slice_model(view, kept)
        assert [len(k) for k in kept] == [n for b in view.blocks for n in (b.groups, b.channels)]
        torch.testing.assert_close(view.model(tokens).logits, twin.model(tokens).logits, rtol=0, atol=1e-5)

    def test_masked_equals_sliced_for_each_unit_alone(self, view, tokens):
        for index, unit in enumerate(view.units):
            sliced, masked = (ModelView(copy_model(view.model)) for _ in range(2))
            kept = torch.arange(unit.granules)[1::2]
            slice_unit(sliced, index, kept)
            mask_unit(masked, index, kept)
            out = sliced.model(tokens).logits
            torch.testing.assert_close(out, masked.model(tokens).logits, rtol=0, atol=1e-5)
            assert (out - view.model(tokens).logits).abs().max() > 1e-3

    def test_generation_with_cache_equals_recomputing(self, view, tokens, uneven):
        slice_model(view, uneven(view.units))
        prompt = tokens[:1]
        options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
        cached = view.model.generate(prompt, use_cache=True, **options)
        assert torch.equal(cached, view.model.generate(prompt, use_cache=False, **options))
        for end in range(prompt.shape[1], cached.shape[1]):
            logits = view.model(cached[:, :end]).logits[0, -1]
            assert logits[cached[0, end]] > logits.max() - 1e-4

    def test_eager_attention_agrees(self, view, tokens, uneven):
        slice_model(view, uneven(view.units))
        expected = view.model(tokens).logits
        view.model.set_attn_implementation("eager")
        torch.testing.assert_close(view.model(tokens).logits, expected, rtol=0, atol=1e-5)

    def test_prefixes_of_ordered_weights_equal_slicing(self, view, tokens):
        for index, unit in enumerate(view.units):
            twin = ModelView(copy_model(view.model))
            dense = read_unit(view, index)
            order = torch.arange(unit.granules).flip(0)
            ordered = dense.select(order)
            prefix = ordered.prefix(2)
            if prefix.runs == 1:  # parts of a granule that lie apart must be copied
                for role, weight in prefix.weight.items():
                    assert weight.data_ptr() == ordered.weight[role].data_ptr()
            set_unit(view, index, prefix)
            slice_unit(twin, index, order[:2])
            torch.testing.assert_close(view.model(tokens).logits, twin.model(tokens).logits, rtol=0, atol=1e-6)
            parts = view.unit_linears(index)
            for linear in (*parts.inputs.values(), parts.last):
                assert not linear.weight.requires_grad
                assert linear.weight.shape == (linear.out_features, linear.in_features)
            set_unit(view, index, dense)

    def test_setting_what_was_read_restores_the_model(self, view, tokens):
        expected = view.model(tokens).logits
        weights = [read_unit(view, i) for i in range(len(view.units))]
        slice_model(view, [torch.tensor([1]) for _ in view.units])
        for index, unit in enumerate(weights):
            set_unit(view, index, unit)
        assert torch.equal(view.model(tokens).logits, expected)

    def test_a_pruned_model_can_be_viewed_and_pruned_again(self, view, tokens):
        twin = ModelView(copy_model(view.model))
        slice_model(view, [torch.tensor([0, 2]) for _ in view.units])
        again = ModelView(view.model)
        assert {u.granules for u in again.units} == {2}
        assert [u.params_per_granule for u in again.units] == list(self.params_per_granule) * 3
        slice_model(again, [torch.tensor([1]) for _ in again.units])
        slice_model(twin, [torch.tensor([2]) for _ in twin.units])
        assert torch.equal(view.model(tokens).logits, twin.model(tokens).logits)

    def test_attention_cannot_lose_every_group(self, view):
        with pytest.raises(ParameterError, match=r"layers\.0\.attention.*at least one group"):
            slice_unit(view, 0, torch.tensor([], dtype=torch.long))

    def test_an_empty_ffn_equals_a_masked_one(self, view, tokens):
        twin = ModelView(copy_model(view.model))
        nothing = torch.tensor([], dtype=torch.long)
        mask_unit(twin, 1, nothing)
        slice_unit(view, 1, nothing)
        torch.testing.assert_close(view.model(tokens).logits, twin.model(tokens).logits, rtol=0, atol=1e-5)

    def test_grams_equal_direct_computation(self, view, tokens, uneven):
        slice_model(view, uneven(view.units))
        inputs: dict[str, list[Tensor]] = {name: [] for name in view.prunable}
        hooks = [
            linear.register_forward_hook(lambda module, x, _, name=name: inputs[name].append(_as_read(module, x)))
            for name, linear in view.prunable.items()
        ]
        view.model(tokens)
        for hook in hooks:
            hook.remove()
        grams = collect(view, tokens, {"layers.1.k", "layers.2.down"}, 3)
        assert list(grams) == list(view.prunable)
        assert grams["layers.1.q"] is grams["layers.1.v"]
        assert {n for n, g in grams.items() if g.xx is not None} == {
            "layers.1.q",
            "layers.1.k",
            "layers.1.v",
            "layers.2.down",
        }
        for name, gram in grams.items():
            x = torch.cat([i.reshape(-1, i.shape[-1]) for i in inputs[name]]).double()
            assert gram.count == tokens.numel() == len(x)
            torch.testing.assert_close(gram.diag.double(), (x * x).sum(0), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(gram.total.double(), x.sum(0), rtol=1e-5, atol=1e-5)
            if gram.xx is not None:
                xx = x.T @ x
                if gram.xx.ndim == 3:
                    width = gram.xx.shape[1]
                    xx = torch.stack([xx[i : i + width, i : i + width] for i in range(0, len(xx), width)])
                torch.testing.assert_close(gram.xx.double(), xx, rtol=1e-5, atol=1e-4)
        assert not any(m._forward_pre_hooks for m in view.model.modules())

    def test_ridge_brings_a_cut_block_nearer_to_the_dense_one(self, view, tokens):
        """On the text it was fitted to; the last linear's input is cut to half of its granules."""
        for index in (2, 3):  # both units of a layer in the middle
            errors = []
            for repair in ("none", "ridge"):
                twin = ModelView(copy_model(view.model))
                kept = [unit.granules - (unit.granules // 2 if i == index else 0) for i, unit in enumerate(twin.units)]
                dense = _outputs(twin, index, tokens)
                cut(twin, Allocation(twin.units, tuple(kept)), tokens, 2, "wanda_column", repair, 1e-6, False)
                errors.append(float((_outputs(twin, index, tokens) - dense).norm() / dense.norm()))
            assert 0 < errors[1] < 0.9 * errors[0]

    def test_unstructured_masks_have_exact_counts(self, view, tokens):
        allocation = {name: unit.granules // 3 for name, unit in zip(view.prunable, view.weight_units, strict=True)}
        grams = collect(view, tokens, (), 2)
        for name, linear in view.prunable.items():
            order = ranks(scores("wanda", linear.weight.detach(), grams[name], 0.0), "matrix")
            mask = mask_from_ranks(order, allocation[name], "matrix")
            with torch.no_grad():
                linear.weight.mul_(mask)
        again = ModelView(copy_model(view.model)).prunable
        assert {name: int((linear.weight != 0).sum()) for name, linear in again.items()} == allocation

    def test_save_and_load(self, view, tokens, uneven, tmp_path):
        slice_model(view, uneven(view.units))
        save_model(view.model, None, tmp_path / "m")
        loaded = load_model(tmp_path / "m")
        # A fused projection is one product in a stock model and several in a view: processors round that differently.
        torch.testing.assert_close(loaded(tokens).logits, view.model(tokens).logits, rtol=0, atol=1e-5)
        stored, held = (dict(_tensors(model)) for model in (loaded, view.model))
        assert stored.keys() == held.keys()
        assert all(torch.equal(stored[name](), held[name]()) for name in held)
        assert not loaded.training
        assert not any(p.requires_grad for p in loaded.parameters())
        tied = view.model.get_output_embeddings().weight is view.model.get_input_embeddings().weight
        assert tied == (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight)
        options = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(tokens)}
        expected = view.model.generate(tokens, **options)
        assert torch.equal(loaded.generate(tokens, **options), expected)
        assert torch.equal(loaded.generate(tokens, cache_implementation="static", **options), expected)

    def test_the_config_tells_the_shapes(self, view, uneven, tmp_path):
        dense = copy.deepcopy(view.model.config)
        slice_model(view, uneven(view.units))
        save_model(view.model, None, tmp_path / "m")
        config = load_model(tmp_path / "m").config
        assert read_layer_config(config, view.family) == [
            LayerShape(b.groups * b.heads_per_group, b.groups, b.channels) for b in view.blocks
        ]
        for name in ("heads", "kv_heads", "ffn_width"):
            attribute = getattr(view.family, name)
            assert getattr(config, attribute) == getattr(dense, attribute)


def _as_read(module: nn.Module, inputs: tuple) -> Tensor:
    """What a linear reads, per token: of experts, the channels of all, 0 in those that the router did not choose."""
    if not isinstance(module, ExpertOutput):
        return inputs[0]
    rows, routing = inputs
    whole = rows.new_zeros(routing.total, module.experts, rows.shape[1])
    chosen = torch.arange(module.experts).repeat_interleave(torch.tensor(routing.sizes))
    whole[routing.tokens, chosen] = rows
    return whole.flatten(1)


def _outputs(view: ModelView, index: int, tokens: Tensor) -> Tensor:
    """What a unit's last linear answers."""
    seen: list[Tensor] = []
    hook = view.unit_linears(index).last.register_forward_hook(lambda _, __, output: seen.append(output))
    view.model(tokens)
    hook.remove()
    return seen[0]


class TestLlamaGqa(FamilySuite):
    case = "llama_gqa"
    params_per_granule = ((2 * 8 + 8 + 8 + 2 * 8) * 24, 3 * 24)


class TestLlamaMha(FamilySuite):
    case = "llama_mha"
    granules = (6, 20)
    params_per_granule = (4 * 4 * 24, 3 * 24)


class TestMistral(FamilySuite):
    case = "mistral"
    params_per_granule = ((8 + 4 + 4 + 8) * 24, 3 * 24)

    def test_the_window_stays_when_heads_go(self, view, tokens, uneven):
        """A token sees the 8 before it, itself included, in each of the 3 layers: the first of 24 is out of reach."""
        slice_model(view, uneven(view.units))
        long = torch.cat([tokens[:2], tokens[2:]], 1)
        other = long.clone()
        other[:, 0] += 1
        difference = (view.model(long).logits - view.model(other).logits).abs().amax((0, 2))
        assert (difference[:22] > 0).all()
        assert (difference[22:] == 0).all()


class TestQwen2(FamilySuite):
    case = "qwen2"
    params_per_granule = ((8 + 4 + 4 + 8) * 24, 3 * 24)


class TestQwen3(FamilySuite):
    case = "qwen3"
    params_per_granule = ((2 * 8 + 8 + 8 + 2 * 8) * 24, 3 * 24)


class TestGemma(FamilySuite):
    case = "gemma"
    params_per_granule = ((2 * 8 + 8 + 8 + 2 * 8) * 24, 3 * 24)


class TestGemma2(FamilySuite):
    case = "gemma2"
    params_per_granule = ((2 * 8 + 8 + 8 + 2 * 8) * 24, 3 * 24)


class TestGemma3(FamilySuite):
    case = "gemma3_text"
    params_per_granule = ((2 * 8 + 8 + 8 + 2 * 8) * 24, 3 * 24)


class TestGranite(FamilySuite):
    case = "granite"
    params_per_granule = ((8 + 4 + 4 + 8) * 24, 3 * 24)


class TestSmolLM3(FamilySuite):
    case = "smollm3"
    params_per_granule = ((8 + 4 + 4 + 8) * 24, 3 * 24)


class TestOlmo(FamilySuite):
    case = "olmo"
    params_per_granule = ((8 + 4 + 4 + 8) * 24, 3 * 24)


class TestExaone4(FamilySuite):
    case = "exaone4"
    params_per_granule = ((2 * 8 + 8 + 8 + 2 * 8) * 24, 3 * 24)


class TestCohere(FamilySuite):
    case = "cohere"
    params_per_granule = ((8 + 4 + 4 + 8) * 24, 3 * 24)


class TestStableLm(FamilySuite):
    case = "stablelm"
    params_per_granule = ((8 + 4 + 4 + 8) * 24, 3 * 24)


class TestStableLmParallel(TestStableLm):
    case = "stablelm_parallel"


class TestApertus(FamilySuite):
    case = "apertus"
    params_per_granule = ((8 + 4 + 4 + 8) * 24, 2 * 24)
    roles = ("q", "k", "v", "o", "up", "down")


class TestGlm(FamilySuite):
    case = "glm"
    params_per_granule = ((2 * 8 + 8 + 8 + 2 * 8) * 24, 3 * 24)


class TestStarcoder2(FamilySuite):
    case = "starcoder2"
    params_per_granule = ((8 + 4 + 4 + 8) * 24, 2 * 24)
    roles = ("q", "k", "v", "o", "up", "down")


class TestPhi3(FamilySuite):
    case = "phi3"
    params_per_granule = ((8 + 4 + 4 + 8) * 24, 3 * 24)


class Mixture:
    """What the suite counts where every layer has 4 experts, of which a token visits 2."""

    params_per_granule = ((2 * 8 + 8 + 8 + 2 * 8) * 24, 4 * 3 * 24)


class TestMixtral(Mixture, FamilySuite):
    case = "mixtral"


class TestQwen2Moe(Mixture, FamilySuite):
    case = "qwen2_moe"
    params_per_granule = ((8 + 4 + 4 + 8) * 24, 4 * 3 * 24)


class TestQwen3Moe(Mixture, FamilySuite):
    case = "qwen3_moe"


class Plain:
    """What the suite counts in families without key/value groups and gates."""

    granules = (6, 20)
    params_per_granule = (4 * 4 * 24, 2 * 24)
    roles = ("q", "k", "v", "o", "up", "down")


class TestGptNeox(Plain, FamilySuite):
    case = "gpt_neox"


class TestGptNeoxSerial(TestGptNeox):
    case = "gpt_neox_serial"


class TestGpt2(Plain, FamilySuite):
    case = "gpt2"

    def test_an_empty_ffn_equals_a_masked_one(self, view, tokens):
        """transformers' Conv1D takes no input of width 0: a folder with such a layer could not run."""
        with pytest.raises(ParameterError, match=r"layers\.0\.ffn.*at least one channel"):
            slice_unit(view, 1, torch.tensor([], dtype=torch.long))


class TestPhi(Plain, FamilySuite):
    case = "phi"


class TestOpt(Plain, FamilySuite):
    case = "opt"


class TestOpt350m(TestOpt):
    case = "opt_350m"


def test_every_row_has_a_suite():
    cases = {sub.case for base in (FamilySuite, TestOpt, TestGptNeox, TestStableLm) for sub in base.__subclasses__()}
    assert cases == set(CONFIGS)
    assert {CONFIGS[case]().model_type for case in cases} == set(FAMILIES)


#: transformers' model_type -> the nearest row, and words of what is in the way, of its default config.
STRANGERS = {
    "bloom": ("gpt2", "ALiBi"),
    "mpt": ("phi", "ALiBi"),
    "gptj": ("gpt2", "linears of their own"),
    "codegen": ("gpt2", "in four stretches"),
    "gpt_neo": ("gpt_neox", "attn.attention"),
    "olmo2": ("llama", "a norm over all query heads together"),
    "olmo3": ("llama", "a norm over all query heads together"),
    "helium": ("llama", "last linear is square"),
    "cohere2": ("cohere", "lacks use_qk_norm"),
    "glm4": ("glm", "all that marks 'glm'"),
    "xglm": ("opt", "lacks do_layer_norm_before, word_embed_proj_dim"),
    "persimmon": ("phi", "lacks num_key_value_heads"),
    "nemotron": ("llama", "lacks rms_norm_eps"),
    "mamba": ("llama", "state space model, without attention"),
    "mamba2": ("llama", "state space model, without attention"),
    "rwkv": ("llama", "recurrent network, without attention"),
    "recurrent_gemma": ("llama", "some of its layers are no attention (block_types)"),
    "jamba": ("qwen3_moe", "some of its layers are no attention (mamba_d_state)"),
    "lfm2": ("llama", "some of its layers are no attention (conv_L_cache)"),
    "falcon": ("llama", "share one key and one value head"),
    "gpt_bigcode": ("gpt2", "share one key and one value head"),
    "bert": ("gpt_neox", "it is an encoder"),
    "t5": ("gpt_neox", "an encoder beside its decoder"),
    "olmoe": ("qwen3_moe", "mixture of experts of another layout"),
    "dbrx": ("phi", "mixture of experts of another layout"),
    "deepseek_v3": ("mixtral", "a common latent vector"),
    "llama4": ("mixtral", "mixture of experts of another layout"),
    "qwen2_vl": ("llama", "(text_config, of type 'qwen2_vl_text'), and that has no row either"),
    "gemma3": ("gemma3_text", "(text_config, of type 'gemma3_text')"),
    "llava": ("llama", "(text_config, of type 'llama')"),
}


@pytest.mark.parametrize(("model_type", "nearest", "missing"), [(name, *facts) for name, facts in STRANGERS.items()])
def test_an_unknown_family_is_told_what_is_near_and_what_is_missing(model_type: str, nearest: str, missing: str):
    config = AutoConfig.for_model(model_type)
    with pytest.raises(UnsupportedArchitecture) as refusal:
        family_of(config)
    assert repr(model_type) in refusal.value.asked
    assert missing in refusal.value.asked
    assert all(name in refusal.value.possible for name in FAMILIES)
    assert f"nearest is {nearest!r}" in refusal.value.possible
    alone = getattr(config, "text_config", config).model_type == nearest
    assert ("whole.config.text_config" if alone else "FAMILIES") in refusal.value.change


@pytest.mark.parametrize("model_type", [None, "", "None"])
def test_a_config_without_a_type_is_refused_by_what_it_lacks(model_type: str | None):
    settings = LlamaConfig(**LLAMA).to_dict()
    with pytest.raises(UnsupportedArchitecture, match=r"has no model_type.*nearest is 'llama'.*into config\.json"):
        family_named(model_type, settings)


def test_a_language_model_saved_by_itself_as_the_refusal_says(tokens, tmp_path):
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config=CONFIGS["gemma3_text"]().to_dict(),
        vision_config={**vision, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=1,
    )
    whole = AutoModelForImageTextToText.from_config(config).eval()
    alone = AutoModelForCausalLM.from_config(whole.config.text_config)
    alone.model.load_state_dict(whole.model.language_model.state_dict())
    alone.lm_head.load_state_dict(whole.lm_head.state_dict())
    alone.save_pretrained(tmp_path / "m")
    with torch.no_grad():
        torch.testing.assert_close(load_model(tmp_path / "m")(tokens).logits, whole(tokens).logits)


@pytest.mark.parametrize(
    "config", [CohereConfig(use_qk_norm=True), StableLmConfig(qk_layernorm=True)], ids=lambda config: config.model_type
)
def test_norms_of_every_head_are_refused(config: PretrainedConfig):
    with pytest.raises(UnsupportedArchitecture, match=r"norm on: every head has .* no cut takes along"):
        family_of(config)


def test_granule_indices():
    assert granule_indices(torch.tensor([2, 0]), 3).tolist() == [6, 7, 8, 0, 1, 2]
