"""Tiny random models and a character tokenizer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.tiny import MODELS, VOCAB, character_tokenizer, llama, spread


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return spread(MODELS[request.param]())


@pytest.fixture
def small_llama() -> PreTrainedModel:
    return spread(llama())


@pytest.fixture
def windows() -> Tensor:
    return torch.randint(VOCAB, (5, 17), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return character_tokenizer()
