"""Split a text by article, so that no article is in two splits."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence

from ffprune.core.errors import ParameterError, TooLittleText
from ffprune.sources.base import Article


def _order(article: Article, seed: int) -> tuple[bytes, str]:
    return hashlib.sha256(f"{seed}\n{article.title}".encode(errors="replace")).digest(), article.text


def split_articles(articles: Sequence[Article], shares: Mapping[str, float], seed: int) -> dict[str, list[Article]]:
    """Deal articles out to splits whose character counts are near their shares.

    Articles are taken in the order of a hash of seed and title (the order of the input does not matter), each
    to the split that lacks most characters. No split ends up with more than its share plus one article. Exact
    repetitions of an article are dropped: they would put the same text into two splits.

    Args:
        articles: the whole text.
        shares: split name -> share of the characters, each positive, together 1.
        seed: of the hash.

    Returns:
        Split name -> articles, in hash order.

    Raises:
        ParameterError: the shares are not positive or do not add up to 1.
        TooLittleText: a split would be empty.
    """
    if not shares or any(share <= 0 for share in shares.values()) or abs(sum(shares.values()) - 1) > 1e-6:
        raise ParameterError(
            f"data.shares is {dict(shares)}", "Shares are positive and add up to 1", "Change data.shares"
        )
    ordered = sorted(articles, key=lambda article: _order(article, seed))
    pending = list({article.text: article for article in reversed(ordered)}.values())[::-1]
    total = sum(len(article.text) for article in pending)
    lacking = {name: share * total for name, share in shares.items()}
    splits: dict[str, list[Article]] = {name: [] for name in shares}
    for article in pending:
        name = max(lacking, key=lacking.__getitem__)
        splits[name].append(article)
        lacking[name] -= len(article.text)
    require_text(splits)
    return splits


def require_text(splits: Mapping[str, Sequence[Article]]) -> None:
    """Refuse splits without any text.

    Raises:
        TooLittleText: naming the empty splits.
    """
    empty = [name for name, articles in splits.items() if not join(articles).strip()]
    if empty:
        found = sum(len(articles) for articles in splits.values())
        raise TooLittleText(
            f"Articles were asked for the splits {', '.join(splits)}; {', '.join(empty)} would be empty",
            f"The text has {found} articles, and an article is never cut in two",
            "Give data.source a longer text, or raise the share of the empty split",
        )


def join(articles: Iterable[Article]) -> str:
    """The articles as one string, in their order (each article ends with its own blank lines)."""
    return "".join(article.text for article in articles)
