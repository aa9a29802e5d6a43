from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ffprune.core import importance
from ffprune.core.errors import ParameterError
from ffprune.core.gram import damped
from ffprune.core.importance import CRITERIA, compensated_elimination, rank
from tests.oracles import importance as oracle

DAMPING = 0.01


def problem(n: int, d_out: int = 5, tokens: int = 60, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight and the Gram of correlated inputs of uneven sizes, so that repairs matter."""
    draw = torch.Generator().manual_seed(seed)
    mixing = torch.randn(n, n, generator=draw, dtype=torch.float64)
    x = torch.randn(tokens, n, generator=draw, dtype=torch.float64) @ (mixing / n**0.5 + torch.eye(n))
    x = x * torch.rand(n, generator=draw, dtype=torch.float64).add(0.2)
    return torch.randn(d_out, n, generator=draw, dtype=torch.float64), x.T @ x


def check_against_twin(weight: Tensor, xx: Tensor, width: int) -> None:
    found = compensated_elimination(weight, xx, width, DAMPING)
    order, error = oracle.eliminate(weight, damped(xx, DAMPING), width)
    assert found.order.tolist() == order
    torch.testing.assert_close(found.error, torch.tensor(error, dtype=torch.float64), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(("n", "width"), [(9, 1), (14, 1), (12, 2), (12, 3), (8, 4), (6, 6), (1, 1)])
def test_elimination_is_obs_solved_from_scratch_at_every_step(n: int, width: int) -> None:
    check_against_twin(*problem(n), width)


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 7), st.integers(1, 3), st.integers(1, 6), st.integers(1, 20), st.integers(0, 1000))
def test_elimination_is_obs_for_any_shape(granules: int, width: int, d_out: int, tokens: int, seed: int) -> None:
    # Fewer tokens than columns too: the Gram is singular then, and only the damping makes it invertible.
    weight, xx = problem(granules * width, d_out, tokens, seed)
    found = compensated_elimination(weight, xx, width, DAMPING)
    _, error = oracle.eliminate(weight, damped(xx, DAMPING), width)
    assert sorted(found.order.tolist()) == list(range(granules))
    # Costs that tie to the last digits may be taken in either order; the error curve then still agrees.
    torch.testing.assert_close(found.error, torch.tensor(error, dtype=torch.float64), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("width", [1, 3])
def test_the_error_is_what_the_ridge_objective_loses(width: int) -> None:
    weight, xx = problem(12)
    found, h = compensated_elimination(weight, xx, width, DAMPING), damped(xx, DAMPING)
    for k in range(len(found.order) + 1):
        columns = [int(g) * width + j for g in found.order[:k] for j in range(width)]
        assert float(found.error[k]) == pytest.approx(oracle.objective(weight, h, columns), rel=1e-7, abs=1e-8)


@pytest.mark.parametrize("panel", [1, 2, 5, 63, 64])
def test_the_panel_size_does_not_change_the_result(panel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, xx = problem(63)
    expected = compensated_elimination(weight, xx, 1, DAMPING)
    monkeypatch.setattr(importance, "_PANEL", panel)
    found = compensated_elimination(weight, xx, 1, DAMPING)
    assert torch.equal(found.order, expected.order)
    torch.testing.assert_close(found.error, expected.error, rtol=1e-7, atol=1e-9)


def test_columns_and_groups_of_one_are_the_same_elimination() -> None:
    weight, xx = problem(10)
    inverse = torch.linalg.inv(damped(xx, DAMPING))
    columns, groups = importance._eliminate_columns(weight, inverse), importance._eliminate_groups(weight, inverse, 1)
    assert torch.equal(columns[0], groups[0])
    torch.testing.assert_close(columns[1], groups[1], rtol=1e-7, atol=1e-9)


def test_float32_statistics_are_solved_in_float64() -> None:
    weight, xx = problem(20)
    single = compensated_elimination(weight.float(), xx.float(), 1, DAMPING)
    assert single.error.dtype == torch.float64
    double = compensated_elimination(weight.float().double(), xx.float().double(), 1, DAMPING)
    assert torch.equal(single.order, double.order)
    torch.testing.assert_close(single.error, double.error)


def test_a_repeated_channel_costs_next_to_nothing_only_to_who_knows_the_repair() -> None:
    # Two equal channels, the loudest of all: one can go for free, and one-shot scores cannot see it.
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(200, 6, generator=draw, dtype=torch.float64)
    x[:, 0] *= 5
    x[:, 1] = x[:, 0]
    weight = torch.ones(4, 6, dtype=torch.float64)
    assert int(compensated_elimination(weight, x.T @ x, 1, 1e-6).order[-1]) in (0, 1)
    assert sorted(rank("wanda_column", weight, x.T @ x, 1, 1e-6).order[:2].tolist()) == [0, 1]


@pytest.mark.parametrize("width", [1, 2, 3])
def test_one_shot_scores_are_their_definitions(width: int) -> None:
    weight, xx = problem(12)
    norms = [float(xx[j, j]) for j in range(12)]
    squares = [float((weight[:, j] ** 2).sum()) for j in range(12)]
    scores = {
        "activation_norm": norms,
        "wanda_column": [n * s for n, s in zip(norms, squares, strict=True)],
    }
    for name, columns in scores.items():
        granules = [sum(columns[g * width : (g + 1) * width]) for g in range(12 // width)]
        found = rank(name, weight, xx, width, DAMPING)
        assert found.order.tolist() == sorted(range(len(granules)), key=lambda g: -granules[g])
        for k in range(len(granules) + 1):
            expected = sum(granules[int(g)] for g in found.order[k:])
            assert float(found.error[k]) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("name", ["activation_norm", "wanda_column"])
def test_ties_keep_the_order_of_the_channels(name: str) -> None:
    weight, xx = torch.ones(3, 40), torch.eye(40)
    xx[7, 7] = 2.0
    assert rank(name, weight, xx, 1, DAMPING).order.tolist() == [7, *(j for j in range(40) if j != 7)]


@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("name", CRITERIA)
def test_error_falls_to_zero_as_more_is_kept_and_inputs_stay(name: str, width: int) -> None:
    weight, xx = problem(16)
    before = weight.clone(), xx.clone()
    found = rank(name, weight, xx, width, DAMPING)
    assert found.order.dtype == torch.int64
    assert sorted(found.order.tolist()) == list(range(16 // width))
    assert found.error.dtype == torch.float64
    assert found.error.shape == (16 // width + 1,)
    assert float(found.error[-1]) == 0
    assert (found.error.diff() <= 0).all()
    assert torch.equal(weight, before[0])
    assert torch.equal(xx, before[1])


def test_an_unknown_criterion_lists_the_known_ones() -> None:
    with pytest.raises(ParameterError, match="compensated_elimination") as caught:
        rank("magic", *problem(4), 1, DAMPING)
    for name in ("'magic'", *CRITERIA, "sensitivity.criterion"):
        assert name in str(caught.value)
