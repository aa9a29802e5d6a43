"""Folders to publish: they load as before, and their card tells what is known and nothing else."""

from __future__ import annotations

import json
import subprocess
import tomllib
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer

import ffprune
from ffprune.core.units import Allocation
from ffprune.export.card import TRANSFORMERS
from ffprune.export.huggingface import write_huggingface
from ffprune.export.provenance import Provenance
from ffprune.models.checkpoint import load_model, save_model
from ffprune.models.view import ModelView
from tests.export.conftest import UNEVEN, build, byte_tokenizer
from tests.toy import REPO

KNOWN = Provenance(
    name="tiny-searched-0.2",
    license="apache-2.0",
    source={"name": "tiny", "revision": "abc"},
    base_model="someone/tiny",
    method={"policy": "searched"},
    data=["Text: t.", "Calibrated on 2 windows."],
    params={"ridge": {"damping": 0.01}},
    results={
        "protocol": {"text": "t.txt", "windows": 6, "seqlen": 8, "tokens": 1234, "dtype": "float32", "seed": 0},
        "dense": {"perplexity": 19.57, "params": 10, "bytes": 20, "nll_stderr": 0.16},
        "row": {"perplexity": 26.4, "params": 8, "bytes": 16, "prefill_over_dense": 1.2, "decode_over_dense": 1.1},
    },
    runs={"ridge": "0123abcd"},
    version="0.0.9",
)


class Drawn:
    """Remembers what was to be drawn."""

    left: Allocation | None = None

    def __call__(self, left: Allocation) -> bytes:
        self.left = left
        return b"a picture"


def exported(model, tmp_path: Path, known: Provenance = KNOWN) -> tuple[Path, Drawn]:
    save_model(model, byte_tokenizer(), tmp_path / "m")
    (tmp_path / "out").mkdir()
    draw = Drawn()
    write_huggingface(tmp_path / "m", tmp_path / "out", known, draw)
    return tmp_path / "out", draw


def test_the_folder_is_the_same_model(tokens, tmp_path) -> None:
    model = build(widths=UNEVEN)
    out, draw = exported(model, tmp_path)
    for loaded in (load_model(out), AutoModelForCausalLM.from_pretrained(out)):
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert AutoTokenizer.from_pretrained(out)("the cat")["input_ids"] == byte_tokenizer()("the cat")["input_ids"]
    assert draw.left is not None
    assert draw.left.kept == (2, 33, 3, 40, 1, 7, 2, 32)
    assert draw.left.retention[:2] == (2 / 3, 33 / 40)
    assert (out / "policy.png").read_bytes() == b"a picture"
    done = subprocess.run(["sha256sum", "--check", "SHA256SUMS"], cwd=out, capture_output=True, text=True, check=True)
    assert done.stdout.count(": OK") == len(list(out.iterdir())) - 1


def test_the_card_tells_what_is_known(tmp_path) -> None:
    out, _ = exported(build(widths=UNEVEN), tmp_path)
    card = ModelCard.load(out / "README.md")
    assert card.data.license == "apache-2.0"
    assert card.data.base_model == "someone/tiny"
    assert card.data.library_name == "transformers"
    for said in (
        "# tiny-searched-0.2",
        "- revision: abc",
        "- policy: searched",
        "## Data\n\nText: t. Calibrated on 2 windows.",
        "Made with ffprune 0.0.9.",
        "% of the weights of its decoder layers' projections removed",
        f"Needs transformers >= {TRANSFORMERS}.",
        "![What is left of every layer](policy.png)",
        "| 2 | 2 of 6 | 1 of 3 | 7 of 40 |",
        "6 windows of 8 tokens, 1,234 scored tokens, float32, seed 0",
        "| this model | 26.400 | 8 | 0.0 | 1.20 | 1.10 |",
        "trust_remote_code=True",
        "import ffprune",
        "ridge:\n  damping: 0.01",
        "- ridge: 0123abcd",
    ):
        assert said in card.text, said
    assert "zero" not in card.text
    assert card.data.tags == ["ffprune", "pruned"]


def test_layers_that_lost_alike_are_told_as_pruned(tmp_path) -> None:
    out, draw = exported(build(widths=((2, 24),) * 4), tmp_path)
    text = (out / "README.md").read_text()
    assert "an ordinary model. Needs transformers >= " in text
    assert "| 3 | 4 of 6 | 2 of 3 | 24 of 40 | " in text
    assert "tiny with 35.3% of the weights of its decoder layers' projections removed" in text
    assert "![What is left" in text
    assert draw.left is not None
    assert draw.left.retention == (2 / 3, 24 / 40) * 4


def test_the_version_of_transformers_is_the_one_that_is_asked_for() -> None:
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    assert any(needed.startswith(f"transformers>={TRANSFORMERS},") for needed in project["dependencies"])


@pytest.mark.parametrize("dense", [None, 19.5])
def test_the_results_of_a_recipe_are_told(dense, tmp_path) -> None:
    text = {
        "text": "t.txt",
        "windows": 4,
        "seqlen": 24,
        "tokens": 92,
        "perplexity": 26.4,
        "stderr": 0.1,
        "dense": dense,
    }
    results = {
        "texts": [text, {**text, "text": "u.txt", "perplexity": None}],
        "dtype": "float32",
        "seed": 0,
        "params_before": 1000,
        "params_after": 700,
        "zero_shot": {"toy": {"acc": 0.5, "acc_stderr": 0.1, "n": 16}},
        "speed": {"prefill_over_dense": 1.2, "decode_over_dense": 1.1},
    }
    method = {"recipe": "gptq", "quantisation": "GPTQ, 4 bits in groups of 8"}
    out, _ = exported(build(), tmp_path, Provenance("m", method=method, results=results))
    card = (out / "README.md").read_text()
    for said in (
        "A model of unknown origin with weights rounded (GPTQ, 4 bits in groups of 8).",
        "The method left 700 of the dense model's 1,000 parameters.",
        f"| t.txt | 26.400 | {'not measured' if dense is None else '19.500'} | 4 x 24 | 92 | 0.100 |",
        "| u.txt | not finite |",
        "prefill 1.20, decode 1.10",
        "| this model | toy | 0.500 | 0.100 | 16 |",
    ):
        assert said in card, said


def test_what_is_not_known_is_said_to_be(tmp_path) -> None:
    out, draw = exported(build(), tmp_path, Provenance("m"))
    card = ModelCard.load(out / "README.md")
    assert card.data.license == "unknown"
    assert card.data.base_model is None
    assert "A model of unknown origin, as it is." in card.text
    assert f"Exported with ffprune {ffprune.__version__}." in card.text
    assert "## Data\n\nUnknown." in card.text
    assert card.data.tags == ["ffprune"]
    assert "Unknown. License: unknown." in card.text
    assert "Not known: no evaluation" in card.text
    assert "an ordinary model" in card.text
    assert draw.left is None
    assert not (out / "policy.png").exists()


def test_zeros_are_told_and_drawn_by_matrix(tmp_path) -> None:
    model = build()
    view = ModelView(model)
    with torch.no_grad():
        view.prunable["layers.1.gate"].weight[:20] = 0
    out, draw = exported(model, tmp_path)
    text = (out / "README.md").read_text()
    assert "of the weights set to zero" in text
    assert "| layer | query heads | key/value heads | FFN channels | weights | zero |" in text
    assert draw.left is not None
    assert dict(zip((u.name for u in draw.left.units), draw.left.retention, strict=True))["layers.1.gate"] == 0.5


def test_a_model_whose_loss_is_not_finite_has_a_card(tmp_path) -> None:
    results = {**KNOWN.results, "row": {**KNOWN.results["row"], "perplexity": None, "zero_shot": {"t": {"acc": 0.5}}}}
    out, _ = exported(build(), tmp_path, Provenance("m", results=results))
    text = (out / "README.md").read_text()
    assert "| this model | not finite |" in text
    assert "| this model | t | 0.500 | nan |" in text


@pytest.mark.parametrize("channels", [0, 40])
def test_a_layer_without_channels_is_counted(channels, tmp_path) -> None:
    out, _ = exported(build(widths=((3, channels), *UNEVEN[1:])), tmp_path)
    assert f"| 0 | 6 of 6 | 3 of 3 | {channels} of 40 |" in (out / "README.md").read_text()
    assert json.loads((out / "config.json").read_text())["num_hidden_layers"] == 4
