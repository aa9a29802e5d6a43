"""Windows of tokens."""

from __future__ import annotations

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from ffprune.core.errors import ParameterError, TooLittleText
from ffprune.models.windows import token_windows

TEXT = "The quick brown fox jumps over the lazy dog. " * 4  # 180 characters, one token each


def test_windows_are_the_text_in_order(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer(TEXT, verbose=False)["input_ids"]
    windows = token_windows(tokenizer, TEXT, 50)
    assert windows.shape == (3, 50)
    assert windows.dtype == torch.long
    assert windows.flatten().tolist() == ids[:150]


@pytest.mark.parametrize("count", [None, 0])
def test_no_count_means_all(tokenizer: PreTrainedTokenizerFast, count: int | None) -> None:
    assert token_windows(tokenizer, TEXT, 18, count).shape == (10, 18)
    assert token_windows(tokenizer, TEXT, 18, count, offset=7).shape == (3, 18)


def test_offset_skips_windows(tokenizer: PreTrainedTokenizerFast) -> None:
    every = token_windows(tokenizer, TEXT, 20)
    assert torch.equal(token_windows(tokenizer, TEXT, 20, 2, offset=3), every[3:5])


def test_bos_only_where_the_tokenizer_adds_it_and_once(tokenizer: PreTrainedTokenizerFast) -> None:
    plain = token_windows(tokenizer, TEXT, 20)
    assert (plain == 0).sum() == 0
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<unk> $A", special_tokens=[("<unk>", 0)])
    with_bos = token_windows(tokenizer, TEXT, 20)
    assert (with_bos == 0).nonzero().tolist() == [[0, 0]]
    assert torch.equal(with_bos.flatten()[1:], plain.flatten()[:-1])


def test_too_long_for_the_model_is_not_warned_about(
    tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    token_windows(tokenizer, TEXT, 20)
    assert caplog.text == "" and capsys.readouterr().err == ""


def test_too_little_text_says_what_there_is(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(TooLittleText) as refusal:
        token_windows(tokenizer, TEXT, 50, 4)
    message = str(refusal.value)
    assert "4 windows of 50 tokens, 200 tokens" in message
    assert "has 180 tokens, at most 3 windows" in message
    assert "Lower" in message


@pytest.mark.parametrize(("seqlen", "count", "offset"), [(200, None, 0), (50, None, 3), (50, 1, 9)])
def test_no_window_at_all(tokenizer: PreTrainedTokenizerFast, seqlen: int, count: int | None, offset: int) -> None:
    with pytest.raises(TooLittleText, match="at most 0 windows"):
        token_windows(tokenizer, TEXT, seqlen, count, offset)


@pytest.mark.parametrize(("seqlen", "count", "offset"), [(1, 1, 0), (8, -1, 0), (8, 1, -1)])
def test_senseless_numbers(tokenizer: PreTrainedTokenizerFast, seqlen: int, count: int, offset: int) -> None:
    with pytest.raises(ParameterError):
        token_windows(tokenizer, TEXT, seqlen, count, offset)
