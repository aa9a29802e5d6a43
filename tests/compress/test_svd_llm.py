from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ffprune.compress.svd_llm import FactoredLinear, compress, rank_for
from ffprune.core.errors import ParameterError
from ffprune.core.gram import Gram
from ffprune.core.whitening import truncate
from ffprune.models.calibration import Calibration
from ffprune.models.surgery import copy_model
from ffprune.models.view import ModelView
from tests.oracles import whitening as oracle
from tests.oracles.calibration import collect
from tests.tiny import MODELS, VOCAB, llama, opt, spread

WINDOWS = torch.randint(VOCAB, (5, 20), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=sorted(MODELS))
def dense(request: pytest.FixtureRequest) -> PreTrainedModel:
    return spread(MODELS[request.param]()).requires_grad_(False)


def grams(view: ModelView) -> list[dict[str, Gram]]:
    found = collect(view, WINDOWS, list(view.prunable), 2)
    return [{role: found[f"layers.{block.index}.{role}"] for role in block.linears} for block in view.blocks]


def logits(model: PreTrainedModel) -> Tensor:
    with torch.inference_mode():
        return model(WINDOWS, use_cache=False).logits


def test_full_rank_is_the_dense_model(dense: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ffprune.compress.svd_llm.rank_for", lambda rows, columns, _: min(rows, columns))
    view = ModelView(copy_model(dense))
    compress(view, 0.2, grams(view))
    torch.testing.assert_close(logits(view.model), logits(dense), rtol=1e-3, atol=1e-3)


def test_every_linear_becomes_its_best_map_for_the_dense_inputs(dense: PreTrainedModel) -> None:
    view, original = ModelView(copy_model(dense)), ModelView(dense)
    inputs: dict[str, list[Tensor]] = {name: [] for name in original.prunable}
    for name, linear in original.prunable.items():
        linear.register_forward_pre_hook(lambda _, args, to=inputs[name]: to.append(args[0].flatten(0, -2)))
    logits(dense)
    paths = {
        name: path for path, module in dense.named_modules() for name, own in original.prunable.items() if module is own
    }
    facts = compress(view, 0.3, grams(view))
    assert [matrix.name for matrix in facts.matrices] == list(original.prunable)
    for matrix in facts.matrices:
        linear, x = original.prunable[matrix.name], torch.cat(inputs[matrix.name])
        pair = view.model.get_submodule(paths[matrix.name])
        assert isinstance(pair, FactoredLinear)
        assert pair.left.weight.shape == (linear.out_features, matrix.rank)
        assert pair.right.weight.shape == (matrix.rank, linear.in_features)
        product = pair.left.weight @ pair.right.weight
        torch.testing.assert_close(pair(x), nn.functional.linear(x, product, linear.bias), rtol=1e-4, atol=1e-3)
        assert matrix.damping < 1e-5  # not 0 where a ReLU never fires
        least = oracle.output_error(linear.weight, oracle.best(linear.weight, x, matrix.rank), x)
        assert oracle.output_error(linear.weight, product, x) == pytest.approx(least, rel=1e-3)
        assert matrix.error == pytest.approx(least, rel=1e-3)


def test_ranks_and_parameters_are_exact() -> None:
    view = ModelView(spread(llama(tied=True)))
    facts = compress(view, 0.25, grams(view))
    # 16 x 16, 8 x 16 and 24 x 16 matrices: 6 * 32, 4 * 24 and 7 * 40 parameters.
    ranks = {"q": 6, "k": 4, "v": 4, "o": 6, "gate": 7, "up": 7, "down": 7}
    assert [m.rank for m in facts.matrices] == 2 * list(ranks.values())
    assert facts.prunable_before == 2 * (2 * 256 + 2 * 128 + 3 * 384)
    assert facts.prunable_after == 2 * (2 * 192 + 2 * 96 + 3 * 280)
    whole = sum(p.numel() for p in view.model.parameters())
    assert facts.params_after == whole
    assert facts.params_before - whole == facts.prunable_before - facts.prunable_after
    assert facts.prunable_after <= 0.75 * facts.prunable_before
    assert not any(p.requires_grad for b in view.blocks for n, p in b.layer.named_parameters() if "proj" in n)
    assert not view.prunable


@pytest.mark.parametrize(
    ("rows", "columns", "sparsity", "rank"),
    [(576, 576, 0.2, 230), (192, 576, 0.3, 100), (1536, 576, 0.2, 335), (200, 200, 0.9, 10), (576, 576, 0.0, 288)],
)
def test_the_rank_that_a_sparsity_leaves(rows: int, columns: int, sparsity: float, rank: int) -> None:
    assert rank_for(rows, columns, sparsity) == rank_for(columns, rows, sparsity) == rank
    assert rank * (rows + columns) <= (1 - sparsity) * rows * columns + 1e-6
    assert (rank + 1) * (rows + columns) > (1 - sparsity) * rows * columns


def test_layer_by_layer_statistics_are_those_of_the_dense_model(dense: PreTrainedModel) -> None:
    whole, lazy = (ModelView(copy_model(dense)) for _ in range(2))
    steps: list[tuple[int, int]] = []
    facts = compress(whole, 0.4, grams(whole))
    again = compress(lazy, 0.4, Calibration(WINDOWS, 2).grams(lazy), progress=lambda *step: steps.append(step))
    assert steps == [(1, 2), (2, 2)]
    assert [m.rank for m in again.matrices] == [m.rank for m in facts.matrices]
    # A statistic of a compressed predecessor would move the second layer's errors by far more.
    assert [m.error for m in again.matrices] == pytest.approx([m.error for m in facts.matrices], rel=1e-3)
    torch.testing.assert_close(logits(lazy.model), logits(whole.model), rtol=1e-2, atol=1e-2)


def test_it_generates_with_a_cache(dense: PreTrainedModel) -> None:
    view = ModelView(dense)
    compress(view, 0.2, Calibration(WINDOWS, 5).grams(view))
    prompt = WINDOWS[:1, :8]
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(prompt), "eos_token_id": None}
    cached = dense.generate(prompt, use_cache=True, **options)
    assert cached.shape == (1, 14)
    assert torch.equal(cached, dense.generate(prompt, use_cache=False, **options))


def test_a_copy_computes_the_same_and_keeps_the_dtype() -> None:
    view = ModelView(spread(opt()).requires_grad_(False).bfloat16())
    compress(view, 0.2, grams(view))
    assert {p.dtype for p in view.model.parameters()} == {torch.bfloat16}
    assert torch.equal(logits(copy_model(view.model)), logits(view.model))


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 0.99])
def test_refuses_what_leaves_no_rank_before_any_work(sparsity: float) -> None:
    view = ModelView(spread(llama()))
    before = logits(view.model)
    with pytest.raises(ParameterError, match="parsity"):
        compress(view, sparsity, grams(view))
    assert torch.equal(logits(view.model), before)


def test_refuses_diagonal_statistics() -> None:
    view = ModelView(spread(llama()))
    found = collect(view, WINDOWS, [], 2)
    diagonal = [{role: found[f"layers.{block.index}.{role}"] for role in block.linears} for block in view.blocks]
    with pytest.raises(ParameterError, match=r"layers\.0\.q"):
        compress(view, 0.2, diagonal)


def test_a_factored_linear_takes_its_bias_along() -> None:
    linear = nn.Linear(5, 4)
    x = torch.randn(30, 5, generator=torch.Generator().manual_seed(0))
    pair = FactoredLinear(linear, truncate(linear.weight.detach(), x.T @ x, 4))
    assert pair.left.bias is linear.bias
    torch.testing.assert_close(pair(x), linear(x), rtol=1e-4, atol=1e-5)
