from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ffprune.core.errors import ParameterError
from ffprune.core.gram import Gram, damped
from ffprune.core.masks import keep_mask
from ffprune.core.saliency import SALIENCIES, scores
from tests.oracles import masks as masks_oracle
from tests.oracles import saliency as oracle

DAMPING = 0.01
NEED_INVERSE = [name for name, row in SALIENCIES.items() if row.needs_inverse]


def problem(n: int = 7, d_out: int = 4, tokens: int = 40, seed: int = 0) -> tuple[Tensor, Gram]:
    """A float64 weight and the Gram of correlated inputs of uneven sizes."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, n, generator=draw) @ (torch.eye(n) + torch.randn(n, n, generator=draw) / n**0.5)
    x = x * torch.rand(n, generator=draw).add(0.1)
    return torch.randn(d_out, n, generator=draw, dtype=torch.float64), Gram.zeros(n, full=True).update(x)


def full(gram: Gram) -> Tensor:
    assert gram.xx is not None
    return gram.xx.double()


def diagonal(gram: Gram) -> Gram:
    return Gram(gram.n, None, gram.diag, gram.total, gram.count)


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(sorted(SALIENCIES)), st.integers(1, 9), st.integers(1, 5), st.integers(1, 30), st.integers(0, 99)
)
def test_scores_are_their_formulas(name: str, n: int, d_out: int, tokens: int, seed: int) -> None:
    weight, gram = problem(n, d_out, tokens, seed)
    xx = full(gram)
    # Sums are float32, and with them the mean diagonal that the damping is a share of.
    torch.testing.assert_close(
        scores(name, weight, gram, DAMPING), oracle.scores(name, weight, xx, damped(xx, DAMPING)), rtol=1e-5, atol=1e-12
    )


def test_the_table_says_who_competes_and_what_is_read() -> None:
    assert {name: row.scope for name, row in SALIENCIES.items()} == {
        "magnitude": "matrix",
        "wanda": "row",
        "obd": "matrix",
        "obs": "matrix",
        "isc": "matrix",
    }
    assert NEED_INVERSE == ["obs", "isc"]
    weight, gram = problem()
    for name, row in SALIENCIES.items():
        assert row.paper
        assert row.section
        if row.needs_inverse:
            with pytest.raises(ValueError, match="needs a full Gram"):
                scores(name, weight, diagonal(gram), DAMPING)
            with pytest.raises(ValueError, match="diagonal of H"):
                row.score(weight, gram.diag, None)
        else:
            assert torch.equal(scores(name, weight, diagonal(gram), DAMPING), scores(name, weight, gram, DAMPING))


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 6), st.integers(1, 10), st.integers(0, 10), st.integers(0, 99))
def test_wanda_zeroes_what_a_stable_sort_of_each_row_puts_first(
    outputs: int, width: int, tenths: int, seed: int
) -> None:
    # Whole numbers and powers of two make scores that tie exactly.
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randint(-2, 3, (outputs, width), generator=draw).float()
    x = 2.0 ** torch.randint(0, 2, (1, width), generator=draw)
    gone = int(width * tenths / 10)
    found = scores("wanda", weight, Gram.zeros(width, full=False).update(x), DAMPING)
    mask = keep_mask(found, outputs * (width - gone), SALIENCIES["wanda"].scope)
    for i in range(outputs):
        row = [abs(float(weight[i, j])) * float(x[0, j]) for j in range(width)]
        assert mask[i].tolist() == masks_oracle.highest(row, width - gone)
        first = sorted(range(width), key=row.__getitem__)[:gone]
        assert sorted(first) == [j for j in range(width) if not mask[i, j]]


@pytest.mark.parametrize("name", SALIENCIES)
def test_a_dead_input_counts_for_nothing_except_in_magnitude(name: str) -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(30, 5, generator=draw)
    x[:, 3] = 0
    weight = torch.randn(4, 5, generator=draw)
    found = scores(name, weight, Gram.zeros(5, full=True).update(x), DAMPING)
    assert found.isfinite().all()
    assert (found[:, [0, 1, 2, 4]] > 0).all()
    assert bool((found[:, 3] == 0).all()) == (name != "magnitude")


def test_damping_enters_the_inverse_only_and_is_never_raised() -> None:
    weight, gram = problem()
    for name in SALIENCIES:
        same = torch.equal(scores(name, weight, gram, 0.01), scores(name, weight, gram, 0.1))
        assert same == (name not in NEED_INVERSE)
    indefinite = torch.tensor([[1.0, 1.05], [1.05, 1.0]])
    broken = Gram(2, indefinite, indefinite.diagonal().double(), torch.zeros(2, dtype=torch.float64), 1)
    for name in NEED_INVERSE:
        with pytest.raises(ParameterError, match="damping 0.01"):
            scores(name, torch.ones(1, 2), broken, DAMPING)
        assert scores(name, torch.ones(1, 2), broken, 0.1).isfinite().all()


@pytest.mark.parametrize("name", SALIENCIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_weights_are_scored_in_float32(name: str, dtype: torch.dtype) -> None:
    weight, gram = problem()
    weight = torch.nn.Parameter(weight.to(dtype))
    before = weight.detach().clone(), full(gram).clone(), gram.diag.clone()
    found = scores(name, weight, gram, DAMPING)
    assert (found.dtype, found.requires_grad) == (torch.float32, False)
    torch.testing.assert_close(found.double(), scores(name, weight.double(), gram, DAMPING), rtol=1e-5, atol=1e-10)
    for left, right in zip(before, (weight.detach(), full(gram), gram.diag), strict=True):
        assert torch.equal(left, right)


def test_an_unknown_criterion_lists_the_known_ones() -> None:
    with pytest.raises(ParameterError, match="'magic'") as caught:
        scores("magic", *problem(), DAMPING)
    assert all(name in str(caught.value) for name in SALIENCIES)
