"""Rewards of a search, against perplexity computed directly."""

from __future__ import annotations

import math
from dataclasses import asdict

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div
from transformers import PreTrainedModel

from ffprune.core.errors import NonFiniteLoss, ParameterError, TooLittleText
from ffprune.core.outcome import Samples, pooled
from ffprune.core.units import Allocation
from ffprune.evaluate import reward as module
from ffprune.evaluate.divergence import Teacher
from ffprune.evaluate.reward import REWARDS, ModelReward
from ffprune.models.surgery import UnitWeights, copy_model, read_unit, set_unit
from ffprune.models.view import ModelView
from tests.tiny import VOCAB

WINDOWS = torch.randint(VOCAB, (12, 15), generator=torch.Generator().manual_seed(5))


class Pruned:
    """A model whose units are cut to prefixes, and what the reward asks of it."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.view = ModelView(model)
        self.whole = [read_unit(self.view, i) for i in range(len(self.view.units))]
        self.dense = Allocation.dense(self.view.units)
        self.cut = Allocation(self.view.units, tuple(max(1, unit.granules // 2) for unit in self.view.units))
        self.asked: list[Allocation] = []

    def weights(self, index: int, kept: int) -> UnitWeights:
        return self.whole[index].prefix(kept)

    def apply(self, allocation: Allocation) -> None:
        self.asked.append(allocation)
        for index, kept in enumerate(allocation.kept):
            set_unit(self.view, index, self.weights(index, kept))

    def reward(self, kind: str = "perplexity_ratio", **change: object) -> ModelReward:
        options = {
            "windows": WINDOWS,
            "trial_samples": 4,
            "fixed": 3,
            "batch_size": 2,
            "threads": 1,
            "seed": 0,
            **change,
        }
        return ModelReward(model=self.view.model, apply=self.apply, dense=self.dense, kind=kind, **options)  # type: ignore[arg-type]


class Broken(Pruned):
    """Anything but the dense model has weights that are not numbers."""

    bad = math.nan

    def weights(self, index: int, kept: int) -> UnitWeights:
        prefix = super().weights(index, kept)
        if kept == self.view.units[index].granules:
            return prefix
        return prefix.replace_last(torch.full_like(prefix.weight[prefix.last_role], self.bad))


@pytest.fixture
def pruned(small_llama: PreTrainedModel) -> Pruned:
    return Pruned(small_llama.requires_grad_(False))


def direct(pruned: Pruned, allocation: Allocation, windows: Tensor) -> float:
    """Perplexity with whole logits in float64."""
    pruned.apply(allocation)
    model = copy_model(pruned.view.model).double()
    with torch.no_grad():
        logits = model(input_ids=windows).logits[:, :-1]
    return math.exp(float(cross_entropy(logits.transpose(1, 2), windows[:, 1:])))


def test_rewards_are_the_papers_of_the_perplexities(pruned: Pruned) -> None:
    fixed = WINDOWS[:3]
    dense, cut = direct(pruned, pruned.dense, fixed), direct(pruned, pruned.cut, fixed)
    assert cut > 1.02 * dense
    for kind, expected in (("perplexity_ratio", dense / cut), ("inverse_perplexity", 10 / cut)):
        outcome = pruned.reward(kind)(pruned.cut, Samples(4, None))
        assert outcome.reward == pytest.approx(expected, rel=1e-5)
        assert outcome.perplexity == pytest.approx(cut, rel=1e-5)
        assert outcome.dense_perplexity == pytest.approx(dense, rel=1e-5)
        assert outcome.finite
        assert outcome.tokens == 3 * 14


@pytest.mark.parametrize("batch_size", [1, 2, 3])
@pytest.mark.parametrize("draw", [None, 3])
def test_the_divergence_is_the_mean_of_kl_over_positions(pruned: Pruned, batch_size: int, draw: int | None) -> None:
    reward = pruned.reward("divergence", batch_size=batch_size)
    outcome = reward(pruned.cut, Samples(4, draw))
    windows = WINDOWS[reward._choose(Samples(4, draw))]
    expected = kl_div(
        log_probabilities(pruned, pruned.cut, windows),
        log_probabilities(pruned, pruned.dense, windows),
        reduction="none",
        log_target=True,
    ).sum(-1)
    assert outcome.loss == pytest.approx(float(expected.mean()), rel=1e-4)
    assert outcome.reward == pytest.approx(math.exp(-outcome.loss))
    assert outcome.perplexity == pytest.approx(direct(pruned, pruned.cut, windows), rel=1e-5)
    assert outcome.dense_perplexity == pytest.approx(direct(pruned, pruned.dense, windows), rel=1e-5)
    assert reward(pruned.dense, Samples(4, draw)).loss == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("top", [1, 5, VOCAB - 1, VOCAB, 10 * VOCAB])
def test_unlikely_words_are_lumped_together(pruned: Pruned, top: int) -> None:
    teacher, windows = Teacher(top), WINDOWS[:2]
    pruned.apply(pruned.dense)
    for i in range(2):
        teacher.learn(pruned.view.model, i, windows[i])
    pruned.apply(pruned.cut)
    found, _ = teacher.compare(pruned.view.model, [0, 1], windows, 1)
    p = log_probabilities(pruned, pruned.dense, windows).exp()
    q = log_probabilities(pruned, pruned.cut, windows).exp()
    words = p.topk(min(top, VOCAB)).indices

    def lumped(shares: Tensor) -> Tensor:
        likely = shares.gather(2, words)
        return torch.cat([likely, (1 - likely.sum(2, keepdim=True)).clamp(min=1e-12)], 2)

    expected = (lumped(p) * (lumped(p) / lumped(q)).log()).sum(2)
    torch.testing.assert_close(found, expected.float(), rtol=1e-3, atol=2e-6)
    whole = (p * (p / q).log()).sum(2).float()
    assert (found <= whole + 1e-5).all()


def test_a_model_that_finds_all_likely_words_impossible_is_infinitely_far_from_none(pruned: Pruned) -> None:
    teacher, windows = Teacher(2), WINDOWS[:2]
    pruned.apply(pruned.dense)
    model = pruned.view.model
    for i in range(2):
        teacher.learn(model, i, windows[i])
    with torch.no_grad():
        head = model.get_output_embeddings()
        head.weight = torch.nn.Parameter(-3e5 * head.weight)  # its own: the embeddings may share the other
    kl, nll = teacher.compare(model, [0, 1], windows, 2)
    with torch.no_grad():
        logits = model(input_ids=windows).logits[:, :-1].double()
    expected = cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction="none").view_as(nll)
    torch.testing.assert_close(nll.double(), expected, rtol=1e-5, atol=1e-3)
    assert float(expected.max()) > 1000
    assert torch.isfinite(kl).all()
    assert float(kl.mean()) > 100


def log_probabilities(pruned: Pruned, allocation: Allocation, windows: Tensor) -> Tensor:
    pruned.apply(allocation)
    model = copy_model(pruned.view.model).double()
    with torch.no_grad():
        return model(input_ids=windows).logits[:, :-1].log_softmax(-1)


def test_the_dense_policy_has_a_ratio_of_one(pruned: Pruned) -> None:
    assert pruned.reward()(pruned.dense, Samples(4, 0)).reward == pytest.approx(1.0, abs=1e-6)


def test_a_trial_is_scored_on_the_windows_of_its_draw(pruned: Pruned) -> None:
    reward = pruned.reward()
    for draw in range(3):
        outcome = reward(pruned.cut, Samples(2, draw))
        windows = WINDOWS[reward._choose(Samples(2, draw))]
        assert outcome.perplexity == pytest.approx(direct(pruned, pruned.cut, windows), rel=1e-5)
        assert outcome.dense_perplexity == pytest.approx(direct(pruned, pruned.dense, windows), rel=1e-5)
        assert outcome.tokens == 2 * 14


def test_the_same_draw_is_the_same_windows_and_another_is_not(pruned: Pruned) -> None:
    reward, again = pruned.reward(), pruned.reward()
    assert [reward._choose(Samples(4, d)) for d in range(20)] == [again._choose(Samples(4, d)) for d in range(20)]
    assert len({tuple(reward._choose(Samples(4, d))) for d in range(20)}) > 10
    assert pruned.reward(seed=1)._choose(Samples(4, 0)) != reward._choose(Samples(4, 0))
    assert reward(pruned.cut, Samples(4, 7)) == again(pruned.cut, Samples(4, 7))


def test_trials_never_see_the_fixed_windows(pruned: Pruned) -> None:
    reward = pruned.reward()
    fixed = set(reward._choose(Samples(3, None)))
    assert fixed == {0, 1, 2}
    seen = {i for draw in range(200) for i in reward._choose(Samples(4, draw))}
    assert seen == set(range(3, 12))
    for draw in range(20):
        chosen = reward._choose(Samples(4, draw))
        assert len(chosen) == len(set(chosen)) == 4


def test_fidelity_is_the_number_of_windows(pruned: Pruned) -> None:
    reward = pruned.reward()
    assert reward.most_samples == 4
    assert [reward(pruned.cut, Samples(n, 0)).tokens for n in (1, 3, 4)] == [14, 42, 56]


def test_fixed_windows_in_parts_are_the_fixed_windows(pruned: Pruned) -> None:
    for kind in REWARDS:
        reward = pruned.reward(kind, batch_size=1)
        whole = reward(pruned.cut, Samples(3, None))
        parts = pooled([reward(pruned.cut, Samples(1, None)), reward(pruned.cut, Samples(2, None, 1))])
        assert asdict(parts) == pytest.approx(asdict(whole), rel=1e-6)
    # There are no more.
    assert reward._choose(Samples(9, None, 2)) == [2]


def test_no_policy_is_run_twice_on_the_same_windows(pruned: Pruned) -> None:
    reward = pruned.reward()
    for draw in (0, 0, None, 0, None):
        reward(pruned.cut, Samples(4, draw))
    assert pruned.asked.count(pruned.dense) == 2
    assert pruned.asked.count(pruned.cut) == 2


def test_an_outcome_does_not_depend_on_what_was_asked_before(pruned: Pruned, monkeypatch: pytest.MonkeyPatch) -> None:
    def beside_others(model: PreTrainedModel, windows: Tensor, size: int) -> Tensor:
        """A window's loss changes with the batch that it is in, as it does in half precision."""
        batches = [batch + 1e-3 * len(batch) for batch in windows.float().split(size)]
        return torch.cat(batches)[:, 1:] / VOCAB

    monkeypatch.setattr(module, "token_nll", beside_others)
    reward = pruned.reward(batch_size=4)
    draws = [*range(10), None]
    assert len({tuple(reward._choose(Samples(4, draw))) for draw in draws}) == len(draws)
    for draw in draws:
        assert reward(pruned.cut, Samples(4, draw)) == pruned.reward(batch_size=4)(pruned.cut, Samples(4, draw)), draw


def test_beyond_a_limit_what_the_dense_model_predicts_is_kept_of_one_round_and_the_fixed_windows(
    pruned: Pruned, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "DENSE_BYTES", 0)
    reward = pruned.reward("divergence", trial_samples=2)
    teacher, rounds = reward._teacher, [Samples(2, draw) for draw in (0, 1, 2, 0)]
    assert teacher is not None
    fixed = reward(pruned.cut, Samples(3, None))
    found = [reward(pruned.cut, samples) for samples in rounds]
    assert {number for number in range(len(WINDOWS)) if teacher.knows(number)} <= {0, 1, 2, *reward._choose(rounds[2])}
    # What is learnt again is what was learnt before.
    reward._known.clear()
    assert [reward(pruned.cut, samples) for samples in rounds] == found
    pruned.asked.clear()
    reward._known.clear()
    assert reward(pruned.cut, Samples(3, None)) == fixed
    assert pruned.asked == [pruned.cut]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("kind", REWARDS)
def test_a_loss_that_is_not_finite_gives_reward_zero(small_llama: PreTrainedModel, bad: float, kind: str) -> None:
    broken = Broken(small_llama.requires_grad_(False))
    broken.bad = bad
    outcome = broken.reward(kind)(broken.cut, Samples(4, 0))
    assert (outcome.reward, outcome.perplexity, outcome.finite) == (0.0, math.inf, False)
    assert math.isfinite(outcome.dense_perplexity)
    # And the next trial is scored as if nothing had happened.
    assert broken.reward(kind)(broken.dense, Samples(4, 0)).finite


def test_a_loss_too_large_for_exp_gives_reward_zero(pruned: Pruned, monkeypatch: pytest.MonkeyPatch) -> None:
    reward = pruned.reward()
    reward(pruned.dense, Samples(4, 0))
    monkeypatch.setattr(module, "token_nll", lambda model, windows, size: torch.full((len(windows), 14), 800.0))
    outcome = reward(pruned.cut, Samples(4, 0))
    assert (outcome.reward, outcome.perplexity, outcome.finite) == (0.0, math.inf, False)


def test_a_broken_dense_model_is_refused(pruned: Pruned) -> None:
    pruned.view.model.get_input_embeddings().weight.fill_(math.nan)
    with pytest.raises(NonFiniteLoss, match="dense model"):
        pruned.reward()(pruned.cut, Samples(4, 0))


def test_too_few_windows_are_refused_with_the_numbers(pruned: Pruned) -> None:
    with pytest.raises(TooLittleText, match=r"9 windows for comparisons and 4 for trials") as caught:
        pruned.reward(fixed=9)
    assert "12 windows of 15 tokens" in str(caught.value)
    assert "search.final_samples" in str(caught.value)
    pruned.reward(fixed=8)


def test_an_unknown_reward_lists_the_known_ones(pruned: Pruned) -> None:
    with pytest.raises(ParameterError, match="'happiness'") as caught:
        pruned.reward("happiness")
    for name in (*REWARDS, "search.reward"):
        assert name in str(caught.value)
