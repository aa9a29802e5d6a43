"""Softmax in memory that is used again, against torch's own."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from ffprune.evaluate.shares import RowSoftmax, row_nll


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "words"), [(1, 3), (64, 50), (65, 50), (150, 2000)])
def test_it_is_softmax_and_cross_entropy(rows: int, words: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(rows)
    softmax = RowSoftmax()
    for _ in range(2):  # the second time in the memory of the first
        logits = (20 * torch.randn(rows, words, generator=generator)).to(dtype)
        labels = torch.randint(words, (rows,), generator=generator)
        assert torch.equal(torch.cat([exact.clone() for _, exact in softmax.exact(logits)]), logits.float())
        shares = torch.cat([shares.clone() for _, shares in softmax.shares(logits)])
        torch.testing.assert_close(shares, logits.float().softmax(1), rtol=1e-5, atol=0)
        expected = cross_entropy(logits.double(), labels, reduction="none")
        torch.testing.assert_close(row_nll(logits, labels, softmax).double(), expected, rtol=1e-6, atol=1e-5)


def test_rows_say_where_they_are_and_another_vocabulary_needs_other_memory() -> None:
    softmax = RowSoftmax()
    for words in (5, 7, 5):
        logits = torch.arange(150.0 * words).view(150, words)
        for rows, exact in softmax.exact(logits):
            assert torch.equal(exact, logits[rows])
    assert [rows for rows, _ in softmax.exact(torch.zeros(150, 5))] == [slice(0, 64), slice(64, 128), slice(128, 150)]


def test_a_word_that_the_model_thinks_impossible_costs_what_it_costs() -> None:
    logits = torch.tensor([[0.0, 300.0], [300.0, 0.0], [math.nan, 0.0], [math.inf, 0.0]])
    found = row_nll(logits, torch.tensor([0, 0, 0, 0]), RowSoftmax())
    assert found[:2].tolist() == [300.0, 0.0]
    assert not torch.isfinite(found[2:]).any()
