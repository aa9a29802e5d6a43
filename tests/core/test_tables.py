"""Picking a row by its name."""

from __future__ import annotations

import pytest

from ffprune.core.errors import ParameterError
from ffprune.core.tables import look_up


def test_an_unknown_name_lists_the_known_ones() -> None:
    assert look_up({"a": 1, "b": 2}, "a", "search.agent") == 1
    with pytest.raises(ParameterError, match=r"search\.agent 'c' was asked for\. Known names: a, b\."):
        look_up({"a": 1, "b": 2}, "c", "search.agent")


def test_an_empty_table_says_so() -> None:
    with pytest.raises(ParameterError, match=r"the model 'x' was asked for\. No name is known: .*is empty\. Add 'x'"):
        look_up({}, "x", "the model")
