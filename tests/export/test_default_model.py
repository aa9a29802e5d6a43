"""The default model as GGUF, where a run of the pipeline has left it in the repository."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ffprune.export.gguf import write_gguf
from ffprune.models.checkpoint import load_model, load_tokenizer
from ffprune.models.surgery import slice_model
from ffprune.models.view import ModelView
from tests.export.conftest import LlamaCpp
from tests.export.test_gguf_vocabulary import TEXTS
from tests.toy import REPO

DENSE = REPO / "models" / "dense"
NONE = torch.arange(0)


@pytest.mark.slow
@pytest.mark.skipif(not (DENSE / "model.safetensors").is_file(), reason="models/dense is not here: run the pipeline")
def test_llama_cpp_agrees_on_tokens_and_logits(tmp_path: Path) -> None:
    model, tokenizer = load_model(DENSE), load_tokenizer(DENSE)
    view = ModelView(model)
    # Layer 0 too: the width of a head must not follow from its heads. No FFN at all in the last layer.
    slice_model(view, [torch.arange(max(u.granules - 1 - i % 2, 1)) for i, u in enumerate(view.units[:-1])] + [NONE])
    write_gguf(model, tokenizer, tmp_path / "m.gguf", "f32")
    expected = [tokenizer(text)["input_ids"] for text in TEXTS]
    llama_cpp = LlamaCpp(tmp_path / "m.gguf")
    assert llama_cpp.ids(TEXTS) == expected
    tokens = torch.tensor([[token for ids in expected for token in ids][:16]])
    with torch.no_grad():
        other = model(tokens).logits[0].log_softmax(-1)
    mine = llama_cpp.log_probabilities(tokens, other.shape[1])
    assert float((mine - other).abs().max()) < 1e-3
    assert torch.equal(mine.argmax(-1), other.argmax(-1))
