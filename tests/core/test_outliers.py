from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ffprune.core.outliers import outlier_share


def joined(scores: list[Tensor], multiple: float) -> float:
    """The twin: all scores in one vector."""
    pool = torch.cat([matrix.flatten().double() for matrix in scores])
    return float((pool > multiple * pool.mean()).double().mean())


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 9)), min_size=1, max_size=5), st.integers(0, 1000))
def test_a_layers_matrices_are_one_pool(shapes: list[tuple[int, int]], seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    scores = [torch.randn(shape, generator=draw).abs() ** 3 for shape in shapes]
    for multiple in (0.5, 2.0, 5.0):
        assert outlier_share(scores, multiple) == pytest.approx(joined(scores, multiple), abs=1e-12)
    assert outlier_share(scores) == outlier_share(scores, 5.0)


def test_the_mean_is_the_layers_not_each_matrix() -> None:
    loud, quiet = torch.full((2, 5), 10.0), torch.full((9, 10), 1.0)
    # Mean of the layer 1.9: the loud matrix stands out as a whole, which its own mean would hide.
    assert outlier_share([loud, quiet], 5.0) == 0.1
    assert outlier_share([loud], 5.0) == 0.0


def test_a_score_at_the_threshold_is_none() -> None:
    scores = [torch.tensor([[0.0, 0.0, 0.0, 4.0]])]
    assert outlier_share(scores, 4.0) == 0.0
    assert outlier_share(scores, 3.99) == 0.25


def test_a_large_layer_in_half_precision_is_summed_in_full() -> None:
    scores = [torch.full((300, 300), 3.0, dtype=torch.float16), torch.full((1, 100), 3000.0, dtype=torch.float16)]
    assert outlier_share(scores) == 100 / 90_100


def test_no_scores_are_refused() -> None:
    with pytest.raises(ValueError, match="without scores"):
        outlier_share([])
