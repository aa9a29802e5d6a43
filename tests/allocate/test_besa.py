from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch import Tensor

from ffprune.allocate.besa import BlockRates, Error, LearnableRate, Settings, besa, learn_rates
from ffprune.core.budget import Bounds
from ffprune.core.errors import NonFiniteLoss, ParameterError, UnreachableSparsity
from ffprune.core.masks import mask_from_ranks, ranks
from ffprune.models.masked_block import prune_in_turn
from ffprune.models.view import ModelView
from tests.allocate.worlds import assert_exact, matrices
from tests.oracles import besa as oracle
from tests.tiny import VOCAB, llama, spread

SHAPES = {"q": (8, 40), "down": (12, 60)}
FAST = Settings(penalty=20.0, learning_rate=0.1, epochs=12)


class Block:
    """A layer whose output error is the weighted share of the squared weights that are gone.

    Args:
        importance: role -> what its weights matter.
    """

    def __init__(self, importance: Mapping[str, float]) -> None:
        draw = torch.Generator().manual_seed(0)
        self.importance = importance
        self.weights = {role: torch.randn(SHAPES[role], generator=draw) for role in importance}
        self.ranks = {role: ranks(weight.abs(), "row") for role, weight in self.weights.items()}

    def error(self, masks: Mapping[str, Tensor]) -> Tensor:
        lost = [
            self.importance[role] * ((1 - mask) * self.weights[role]).square().sum() / self.weights[role].square().sum()
            for role, mask in masks.items()
        ]
        return torch.stack(lost).sum() / sum(self.importance.values())

    def error_at(self, rates: Mapping[str, float]) -> float:
        kept = {role: round((1 - rate) * self.ranks[role].numel()) for role, rate in rates.items()}
        masks = {role: mask_from_ranks(self.ranks[role], kept[role], "row").float() for role in rates}
        return float(self.error(masks))

    def learn(self, sparsity: float = 0.5, settings: Settings = FAST) -> BlockRates:
        return learn_rates(self.ranks, [self.error] * 4, sparsity, settings)


@pytest.mark.parametrize("sparsity", [0.02, 0.3, 0.5, 0.7, 0.98])
def test_it_starts_on_target(sparsity: float) -> None:
    order = Block({"down": 1.0}).ranks["down"]
    rate, mask = LearnableRate(order, 100, sparsity).rate_and_mask()
    assert float(rate.detach()) == pytest.approx(sparsity, abs=1e-5)
    removed = (mask == 0).sum(1)
    assert set(removed.tolist()) == {60 - round((1 - sparsity) * 60)}
    # The least important of every row.
    assert torch.equal(mask.detach().bool(), order < 60 - removed[:, None])


def test_at_half_it_starts_from_the_uniform_distribution() -> None:
    logits = LearnableRate(Block({"q": 1.0}).ranks["q"], 100, 0.5).logits
    assert logits.softmax(0).detach().numpy() == pytest.approx(np.full(101, 1 / 101), rel=1e-4)


@pytest.mark.parametrize("candidates", [5, 20])
def test_the_gradient_is_that_of_the_probabilities(candidates: int) -> None:
    block = Block({"q": 1.0})
    order, draw = block.ranks["q"], np.random.default_rng(1)
    learnt = LearnableRate(order, candidates, 0.4)
    with torch.no_grad():
        learnt.logits.copy_(torch.from_numpy(draw.normal(size=candidates + 1)))
    slopes = torch.from_numpy(draw.normal(size=SHAPES["q"])).float()
    rate, mask = learnt.rate_and_mask()
    (mask * slopes).sum().backward()
    logits = learnt.logits.detach().tolist()
    assert float(rate.detach()) == pytest.approx(oracle.rate(logits), abs=1e-6)
    assert int(mask.sum().round()) == 8 * round((1 - oracle.rate(logits)) * 40)
    for d in range(candidates + 1):
        above, below = ([x + h * (i == d) for i, x in enumerate(logits)] for h in (1e-4, -1e-4))
        slope = oracle.soft_loss(above, order.tolist(), slopes.tolist())
        slope -= oracle.soft_loss(below, order.tolist(), slopes.tolist())
        assert learnt.logits.grad is not None
        assert float(learnt.logits.grad[d]) == pytest.approx(slope / 2e-4, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("dear", ["q", "down"])
@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.7])
def test_the_matrix_that_matters_keeps_more_and_the_block_meets_its_target(dear: str, sparsity: float) -> None:
    block = Block({role: 20.0 if role == dear else 1.0 for role in SHAPES})
    found = block.learn(sparsity)
    (cheap,) = set(SHAPES) - {dear}
    assert found.rates[dear] < sparsity - 0.05 < sparsity + 0.05 < found.rates[cheap]
    assert found.sparsity == pytest.approx(sparsity, abs=0.02)
    sizes = {role: rows * columns for role, (rows, columns) in SHAPES.items()}
    mean = sum(found.rates[role] * size for role, size in sizes.items()) / sum(sizes.values())
    assert found.sparsity == pytest.approx(mean)
    assert len(found.errors) == 4 * FAST.epochs
    assert found.errors[0] == pytest.approx(block.error_at(dict.fromkeys(SHAPES, sparsity)), rel=0.05)
    assert block.error_at(found.rates) < 0.8 * found.errors[0]


def test_without_a_penalty_nothing_would_go() -> None:
    found = Block(dict.fromkeys(SHAPES, 1.0)).learn(settings=Settings(penalty=0.0, learning_rate=0.1, epochs=12))
    assert max(found.rates.values()) < 0.4


def test_the_same_inputs_give_the_same_rates() -> None:
    block = Block({"q": 3.0, "down": 1.0})
    one = block.learn()
    torch.manual_seed(987)
    with torch.no_grad():  # whatever the caller's mode
        assert block.learn() == one


def test_weights_behind_the_error_get_no_gradients() -> None:
    block = Block({"q": 3.0, "down": 1.0})
    for weight in block.weights.values():
        weight.requires_grad_()
    block.learn(settings=Settings())
    assert all(weight.grad is None for weight in block.weights.values())


@pytest.mark.parametrize("sparsity", [0.0, 1.0])
def test_a_target_at_the_end_of_the_range_is_refused(sparsity: float) -> None:
    with pytest.raises(ParameterError, match=r"strictly between 0 and 1"):
        Block({"q": 1.0}).learn(sparsity)


def test_an_error_that_is_not_finite_is_refused() -> None:
    with pytest.raises(NonFiniteLoss, match=r"pruned by 0\.500 is not finite"):
        learn_rates(Block({"q": 1.0}).ranks, [lambda masks: masks["q"].sum() * torch.inf], 0.5)


@pytest.mark.parametrize("sparsity", [0.5, 0.6])
def test_an_allocation_is_exact_and_keeps_the_differences(sparsity: float) -> None:
    units = matrices(30, 1_000_003)
    draw = np.random.default_rng(0)
    rates = {unit.name: float(draw.uniform(0.45, 0.6)) for unit in units}
    found = besa(units, rates, sparsity, Bounds(0.05, 1.0))
    assert_exact(found, sparsity)
    shift = [retention + rates[unit.name] for unit, retention in zip(units, found.retention, strict=True)]
    assert max(shift) - min(shift) < 1e-5
    with pytest.raises(UnreachableSparsity):
        besa(units, rates, 0.96, Bounds(0.05, 1.0))


@pytest.mark.slow
def test_on_a_tiny_llama() -> None:
    view = ModelView(spread(llama()))
    with torch.no_grad():
        # In the first layer down_proj is nearly silent: the weights of the FFN are the cheapest.
        view.blocks[0].linears["down"].weight.mul_(0.01)
    windows = torch.randint(0, VOCAB, (6, 12), generator=torch.Generator().manual_seed(1))
    blocks: list[BlockRates] = []

    def learn(order: Mapping[str, Tensor], errors: list[Error]) -> dict[str, float]:
        blocks.append(learn_rates(order, errors, 0.5, Settings(learning_rate=0.1, epochs=12)))
        return blocks[-1].rates

    rates = prune_in_turn(view, windows, 2, learn)
    for block in blocks:
        assert block.sparsity == pytest.approx(0.5, abs=0.02)
        assert max(block.rates.values()) - min(block.rates.values()) > 0.1
    assert max(blocks[0].rates["v"], blocks[0].rates["o"]) < 0.4
    assert min(blocks[0].rates[role] for role in ("gate", "up", "down")) > 0.5
    assert np.mean(blocks[0].errors[-3:]) < 0.5 * np.mean(blocks[0].errors[:3])
    assert_exact(besa(view.weight_units, rates, 0.5, Bounds(0.05, 1.0)), 0.5)
    assert prune_in_turn(view, windows, 2, learn) == rates
