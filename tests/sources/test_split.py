from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ffprune.core.errors import ParameterError, TooLittleText
from ffprune.sources.base import Article
from ffprune.sources.split import join, split_articles

SHARES = {"calibration": 0.4, "validation": 0.2, "test": 0.4}
texts = st.lists(st.integers(1, 500), min_size=12, max_size=60)


def articles_of(lengths: list[int]) -> list[Article]:
    return [Article(f"title {i}", f"{i} ".ljust(length, "x")) for i, length in enumerate(lengths)]


@given(texts, st.integers(0, 5))
def test_every_article_lands_in_exactly_one_split(lengths: list[int], seed: int) -> None:
    articles = articles_of(lengths)
    try:
        splits = split_articles(articles, SHARES, seed)
    except TooLittleText:
        return
    dealt = [article for split in splits.values() for article in split]
    assert sorted(dealt, key=lambda a: a.title) == sorted(articles, key=lambda a: a.title)


@given(texts, st.integers(0, 5))
def test_character_counts_are_near_the_shares(lengths: list[int], seed: int) -> None:
    articles = articles_of(lengths)
    try:
        splits = split_articles(articles, SHARES, seed)
    except TooLittleText:
        return
    total, longest = len(join(articles)), max(len(a.text) for a in articles)
    for name, share in SHARES.items():
        off = len(join(splits[name])) - share * total
        assert off <= longest + 1e-6
        assert off >= -longest * (len(SHARES) - 1) - 1e-6


@given(texts, st.randoms(use_true_random=False))
def test_the_order_of_the_input_does_not_matter(lengths: list[int], order: random.Random) -> None:
    articles = articles_of(lengths)
    shuffled = list(articles)
    order.shuffle(shuffled)
    try:
        assert split_articles(articles, SHARES, 1) == split_articles(shuffled, SHARES, 1)
    except TooLittleText:
        return


def test_seeds_differ() -> None:
    articles = articles_of([50] * 30)
    assert split_articles(articles, SHARES, 0) != split_articles(articles, SHARES, 1)


def test_a_repeated_article_is_not_in_two_splits() -> None:
    articles = [*articles_of([50] * 12), *(Article(f"copy {i}", "the same text") for i in range(9))]
    splits = split_articles(articles, SHARES, 0)
    assert sum(a.text == "the same text" for split in splits.values() for a in split) == 1


def test_too_few_articles_are_refused_by_name() -> None:
    with pytest.raises(TooLittleText, match="validation would be empty"):
        split_articles(articles_of([50, 50]), SHARES, 0)
    with pytest.raises(TooLittleText):
        split_articles([], SHARES, 0)


@pytest.mark.parametrize("shares", [{}, {"a": 0.5}, {"a": 1.5, "b": -0.5}])
def test_shares_must_add_up(shares: dict[str, float]) -> None:
    with pytest.raises(ParameterError):
        split_articles(articles_of([50] * 5), shares, 0)
