from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ffprune.core.errors import ParameterError
from ffprune.core.masks import Scope, keep_mask, mask_from_ranks, parse_pattern, pattern_mask, ranks
from tests.oracles import masks as oracle

SCOPES: tuple[Scope, ...] = ("row", "matrix")


@st.composite
def tied_scores(draw: st.DrawFn, multiple: int = 1) -> Tensor:
    """Small matrices with few different scores, thus many ties."""
    outputs, width = draw(st.integers(1, 5)), multiple * draw(st.integers(1, 6))
    levels = st.sampled_from([0.0, -0.0, 0.5, 1.0, 2.0, float("inf")])
    flat = draw(st.lists(levels, min_size=outputs * width, max_size=outputs * width))
    return torch.tensor(flat).view(outputs, width)


@settings(deadline=None, max_examples=60)
@given(tied_scores(), st.sampled_from(SCOPES))
def test_a_mask_is_removal_one_by_one_for_every_count(scores: Tensor, scope: Scope) -> None:
    for kept in range(scores.numel() + 1):
        mask = keep_mask(scores, kept, scope)
        assert mask.tolist() == oracle.keep(scores, kept, scope)
        assert int(mask.sum()) == kept


@settings(deadline=None, max_examples=60)
@given(tied_scores(), st.sampled_from(SCOPES))
def test_ranks_give_the_mask_of_every_count(scores: Tensor, scope: Scope) -> None:
    found = ranks(scores, scope)
    for kept in range(scores.numel() + 1):
        assert torch.equal(mask_from_ranks(found, kept, scope), keep_mask(scores, kept, scope))


@settings(deadline=None, max_examples=40)
@given(tied_scores(), st.sampled_from(SCOPES), st.data())
def test_masks_of_fewer_are_inside_masks_of_more(scores: Tensor, scope: Scope, data: st.DataObject) -> None:
    more = data.draw(st.integers(0, scores.numel()))
    fewer = data.draw(st.integers(0, more))
    assert not (keep_mask(scores, fewer, scope) & ~keep_mask(scores, more, scope)).any()


@pytest.mark.parametrize("scope", SCOPES)
def test_ranks_of_a_large_matrix_with_ties(scope: Scope) -> None:
    scores = torch.randint(0, 50, (40, 300), generator=torch.Generator().manual_seed(0)).float()
    found = ranks(scores, scope)
    for kept in (0, 1, 39, 40, 41, 5999, 6000, 11_999, 12_000):
        mask = mask_from_ranks(found, kept, scope)
        assert int(mask.sum()) == kept
        assert torch.equal(mask, keep_mask(scores, kept, scope))


@pytest.mark.parametrize(("width", "dtype"), [(2**15 - 1, torch.int16), (2**15, torch.int32)])
def test_ranks_inside_a_row_take_the_smallest_type_that_holds_them(width: int, dtype: torch.dtype) -> None:
    scores = torch.rand(2, width, generator=torch.Generator().manual_seed(0))
    found = ranks(scores, "row")
    assert found.dtype == dtype
    assert ranks(scores, "matrix").dtype == torch.int32
    for kept in (0, 1, width, 2 * width - 1, 2 * width):
        assert torch.equal(mask_from_ranks(found, kept, "row"), keep_mask(scores, kept, "row"))


def test_in_scope_row_the_first_rows_keep_one_more() -> None:
    # The last row's scores are the highest of all, and do not count against the others'.
    scores = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [9.0, 8.0, 7.0]])
    assert keep_mask(scores, 4, "row").sum(1).tolist() == [2, 1, 1]
    assert keep_mask(scores, 4, "matrix").sum(1).tolist() == [0, 1, 3]


@settings(deadline=None, max_examples=60)
@given(tied_scores(multiple=4), st.integers(1, 3))
def test_a_pattern_is_removal_one_by_one_in_every_group(scores: Tensor, stay: int) -> None:
    mask = pattern_mask(scores, f"{stay}:4")
    assert mask.tolist() == oracle.keep_pattern(scores, stay, 4)
    assert (mask.view(-1, 4).sum(1) == stay).all()


def test_four_of_eight_is_not_two_of_four() -> None:
    scores = torch.arange(16.0).view(2, 8)
    assert pattern_mask(scores, "4:8").tolist() == [[False] * 4 + [True] * 4] * 2
    assert pattern_mask(scores, "2:4").tolist() == [[False, False, True, True] * 2] * 2


def test_scores_in_any_layout_and_dtype() -> None:
    scores = torch.rand(8, 12, generator=torch.Generator().manual_seed(0))
    for scope in SCOPES:
        expected = keep_mask(scores, 31, scope)
        assert torch.equal(keep_mask(scores.T.contiguous().T, 31, scope), expected)
        assert torch.equal(mask_from_ranks(ranks(scores.T.contiguous().T, scope), 31, scope), expected)
        assert torch.equal(keep_mask(scores.double(), 31, scope), expected)
    assert torch.equal(pattern_mask(scores.T.contiguous().T, "2:4"), pattern_mask(scores, "2:4"))


@pytest.mark.parametrize("pattern", ["2:4:8", "2/4", "", "half", "0:4", "4:4", "5:4", "-2:4", "2:0"])
def test_a_malformed_pattern_is_refused(pattern: str) -> None:
    with pytest.raises(ParameterError, match="2:4 or 4:8") as caught:
        parse_pattern(pattern, 16)
    assert repr(pattern) in str(caught.value)


def test_a_width_that_does_not_divide_is_refused() -> None:
    assert parse_pattern("4:8", 24) == (4, 8)
    with pytest.raises(ParameterError, match=r"pattern 4:8 .* 20 inputs.*groups of 8"):
        pattern_mask(torch.zeros(2, 20), "4:8")


def test_what_cannot_be_is_refused() -> None:
    scores = torch.zeros(2, 4)
    for scope in SCOPES:
        for kept in (-1, 9):
            with pytest.raises(ValueError, match=f"{kept} of 8"):
                keep_mask(scores, kept, scope)
            with pytest.raises(ValueError, match=f"{kept} of 8"):
                mask_from_ranks(ranks(scores, scope), kept, scope)


def test_nan_is_no_score() -> None:
    scores = torch.tensor([[1.0, float("nan")]])
    for scope in SCOPES:
        with pytest.raises(ValueError, match="NaN"):
            keep_mask(scores, 1, scope)
        with pytest.raises(ValueError, match="NaN"):
            ranks(scores, scope)
    with pytest.raises(ValueError, match="NaN"):
        pattern_mask(scores, "1:2")
