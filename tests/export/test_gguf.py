"""GGUF files, held against torch by llama.cpp, and by their own metadata."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import MistralConfig

from ffprune.core.errors import MissingInput, ParameterError, UnsupportedArchitecture
from ffprune.export import gguf_quantize, gguf_tensors
from ffprune.export.gguf import write_gguf
from ffprune.export.gguf_check import check_gguf
from ffprune.export.gguf_quantize import QuantizationFailed
from ffprune.export.inspection import inspect
from ffprune.models.checkpoint import save_model
from ffprune.models.layer_config import write_layer_config
from ffprune.models.surgery import slice_unit
from ffprune.models.view import ModelView
from ffprune.models.weights import CorruptModel
from ffprune.stages.inspect import print_inspection
from tests.export.conftest import CONFIGS, UNEVEN, LlamaCpp, build, byte_tokenizer
from tests.models.conftest import build as build_family

SHAPES = {
    "uneven": UNEVEN,
    "layer 0 alone": ((1, 8), (3, 40), (3, 40), (3, 40)),
    "heads alone": ((3, 40), (1, 40), (2, 40), (3, 40)),
    "widths alone": ((3, 40), (3, 1), (3, 39), (3, 40)),
    "all alike": ((2, 24),) * 4,
    "no FFN in layer 0": ((3, 0), (3, 40), (3, 40), (3, 40)),
    "no FFN inside": ((3, 40), (3, 0), (2, 0), (3, 40)),
    "no FFN at the end": ((3, 40), (3, 40), (3, 40), (1, 0)),
    "no FFN at all": ((3, 0),) * 4,
}


def written(path: Path, kind: str = "f32", case: str = "llama", widths=UNEVEN) -> Path:
    write_gguf(build(case, widths), byte_tokenizer(), path / f"{kind}.gguf", kind, "tiny", "apache-2.0")
    return path / f"{kind}.gguf"


def values(path: Path) -> dict[str, object]:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def both(path: Path, model, tokens) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities by llama.cpp and by torch."""
    theirs = model(tokens).logits[0].log_softmax(-1)
    return LlamaCpp(path).log_probabilities(tokens, theirs.shape[1]), theirs


def same(path: Path, model, tokens) -> None:
    mine, other = both(path, model, tokens)
    assert float((mine - other).abs().max()) < 1e-3
    assert torch.equal(mine.argmax(-1), other.argmax(-1))
    assert float(other.std()) > 0.1


@pytest.mark.parametrize("shape", list(SHAPES))
def test_llama_cpp_computes_what_torch_does(shape, tokens, tmp_path) -> None:
    same(written(tmp_path, widths=SHAPES[shape]), build(widths=SHAPES[shape]), tokens)


@pytest.mark.parametrize("case", list(CONFIGS))
@pytest.mark.parametrize("widths", [UNEVEN, None], ids=["uneven", "dense"])
def test_so_it_does_for_other_settings(case, widths, tokens, tmp_path) -> None:
    same(written(tmp_path, "f32", case, widths), build(case, widths), tokens)


def with_query_heads_gone(kept=(1, 2, 2, 1)):
    """Of two query heads of every group."""
    model = build()
    view = ModelView(model, "query")
    for index, (layer, unit) in enumerate((u.layer, u) for u in view.units):
        if unit.kind == "attention":
            slice_unit(view, index, torch.arange(unit.granules)[-kept[layer] :])
    write_layer_config(model.config, view)
    return model


def test_llama_cpp_knows_groups_with_fewer_query_heads(tokens, tmp_path) -> None:
    model = with_query_heads_gone()
    write_gguf(model, byte_tokenizer(), tmp_path / "m.gguf", "f32")
    same(tmp_path / "m.gguf", model, tokens)


def test_metadata_tell_query_heads_and_groups_apart(tmp_path) -> None:
    write_gguf(with_query_heads_gone(), byte_tokenizer(), tmp_path / "m.gguf", "f32")
    found = values(tmp_path / "m.gguf")
    assert found["deci.attention.head_count"] == [3, 6, 6, 3]
    assert found["deci.attention.head_count_kv"] == [3, 3, 3, 3]


def test_without_the_order_of_rows_it_would_not(tokens, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(gguf_tensors, "_neighbours", lambda tensor, heads: tensor)
    mine, other = both(written(tmp_path), build(widths=UNEVEN), tokens)
    assert float((mine - other).abs().max()) > 0.1


@pytest.mark.parametrize("kind", ["f16", "q8_0", "q4_k_m"])
def test_rounded_weights_are_near(kind, tokens, tmp_path) -> None:
    if kind == "q4_k_m":
        pytest.importorskip("llama_cpp", reason="pip compiles llama-cpp-python, which quantises, in half an hour")
    model = build(widths=UNEVEN, hidden_size=64)
    write_gguf(model, byte_tokenizer(), tmp_path / "m.gguf", kind)
    mine, other = both(tmp_path / "m.gguf", model, tokens)
    error = float((mine - other).pow(2).mean().sqrt() / other.std())
    assert error < {"f16": 0.002, "q8_0": 0.05, "q4_k_m": 0.5}[kind]
    assert {file.name for file in tmp_path.iterdir()} == {"m.gguf"}


def test_metadata_tell_the_widths_of_every_layer(tmp_path) -> None:
    found = values(written(tmp_path, widths=SHAPES["no FFN inside"]))
    assert found["general.architecture"] == "deci"
    assert found["deci.attention.head_count"] == [6, 6, 4, 6]
    assert found["deci.attention.head_count_kv"] == [3, 3, 2, 3]
    # llama.cpp throws the attention of a layer away that has no FFN at all.
    assert found["deci.feed_forward_length"] == [40, 32, 32, 40]
    assert found["deci.attention.key_length"] == found["deci.attention.value_length"] == 16
    assert found["deci.rope.dimension_count"] == 16
    assert found["general.name"] == "tiny"
    assert found["general.license"] == "apache-2.0"


@pytest.mark.parametrize("widths", [None, ((2, 24),) * 4])
def test_layers_alike_make_a_plain_llama(widths, tmp_path) -> None:
    found = values(written(tmp_path, widths=widths))
    assert found["general.architecture"] == "llama"
    assert found["llama.attention.head_count_kv"] == (3 if widths is None else 2)
    assert found["llama.feed_forward_length"] == (40 if widths is None else 24)
    assert found["llama.attention.key_length"] == 16


def test_every_layer_is_ordered_by_its_own_heads(tmp_path) -> None:
    """Row 2i of a head is transformers' row i, row 2i + 1 its row i + head_dim / 2."""
    found = {tensor.name: tensor.data for tensor in gguf.GGUFReader(written(tmp_path)).tensors}
    for block in ModelView(build(widths=UNEVEN)).blocks:
        for role, heads in (("q", 2 * block.groups), ("k", block.groups)):
            rows = [16 * head + row + half for head in range(heads) for row in range(8) for half in (0, 8)]
            assert torch.equal(
                torch.tensor(found[f"blk.{block.index}.attn_{role}.weight"]), block.linears[role].weight[rows]
            )
        assert np.array_equal(found[f"blk.{block.index}.attn_v.weight"], block.linears["v"].weight)


def test_widths_are_filled_up_where_rows_are_quantised(tmp_path) -> None:
    model = build(widths=UNEVEN, hidden_size=64)
    counts = write_gguf(model, byte_tokenizer(), tmp_path / "m.gguf", "q8_0").formats
    assert counts == {"Q8_0": 1 + 4 * 7, "F32": 4 * 2 + 1}
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    assert reader.fields["deci.feed_forward_length"].contents() == [64, 64, 32, 32]
    found = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    for block in ModelView(model).blocks:
        down, weight = found[f"blk.{block.index}.ffn_down.weight"], block.linears["down"].weight
        assert not down[:, block.channels :].any()
        assert not found[f"blk.{block.index}.ffn_gate.weight"][block.channels :].any()
        assert float((torch.tensor(down[:, : block.channels]) - weight).abs().max()) < 0.01


def test_rows_that_cannot_be_quantised_are_counted(tmp_path) -> None:
    counts = write_gguf(build(widths=UNEVEN), byte_tokenizer(), tmp_path / "m.gguf", "q8_0").formats
    assert counts["F16"] > 0  # the hidden width is 48
    assert counts["Q8_0"] == 4 + 4  # ffn_down and attn_output


def test_a_failure_leaves_no_file_behind(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("ffprune.export.gguf.needed", lambda *_: None)
    for code, said in (("raise SystemExit('no room')", "no room"), ("import os; os.abort()", "status -6")):
        monkeypatch.setattr(gguf_quantize, "_QUANTIZE", code)
        with pytest.raises(QuantizationFailed, match=said):
            written(tmp_path, "q4_k_m")
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("case", "changes", "said"),
    [
        ("llama", {"hidden_act": "gelu"}, "activation 'gelu'"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rotary positions"),
        ("mistral", {"sliding_window": 16}, "window of 16 tokens"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(case, changes, said, tmp_path) -> None:
    with pytest.raises(UnsupportedArchitecture, match=said):
        write_gguf(build(case, **changes), byte_tokenizer(), tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())


def test_another_family_is_refused(tmp_path) -> None:
    with pytest.raises(UnsupportedArchitecture, match="of type 'opt'.*llama, mistral, qwen2"):
        write_gguf(build_family("opt"), byte_tokenizer(), tmp_path / "m.gguf")


def test_modules_that_a_llama_does_not_have_are_refused(tmp_path) -> None:
    model = build()
    model.model.layers[1].self_attn.q_norm = torch.nn.LayerNorm(16)
    with pytest.raises(UnsupportedArchitecture, match=r"2 tensors .*'model.layers.1.self_attn.q_norm.weight'"):
        write_gguf(model, byte_tokenizer(), tmp_path / "m.gguf")


def test_weights_beyond_float16_are_refused(tmp_path) -> None:
    model = build()
    model.model.layers[0].mlp.up_proj.weight[0, 0] = 1e6
    with pytest.raises(ParameterError, match=r"blk.0.ffn_up.weight .*float16"):
        write_gguf(model, byte_tokenizer(), tmp_path / "m.gguf", "f16")
    with pytest.raises(ParameterError, match="f16, f32, q4_k_m, q8_0"):
        write_gguf(model, byte_tokenizer(), tmp_path / "m.gguf", "q2")


def test_a_file_cut_short_is_found_out(tmp_path) -> None:
    path = written(tmp_path)
    data = path.read_bytes()
    check_gguf(path)
    for size in (len(data) - 64, len(data) // 2, 40, 3, 0):
        path.write_bytes(data[:size])
        with pytest.raises(CorruptModel, match="not a whole GGUF file"):
            check_gguf(path)


@pytest.mark.parametrize("key", ["attention.head_count", "attention.head_count_kv", "feed_forward_length"])
def test_widths_that_are_not_the_tensors_are_found_out(key, tmp_path) -> None:
    path = written(tmp_path)
    field = gguf.GGUFReader(path).fields[f"deci.{key}"]
    before = struct.pack("<4i", *field.contents())
    data = path.read_bytes()
    assert data.count(before) == 1
    path.write_bytes(data.replace(before, struct.pack("<4i", *field.contents()[:3], 5)))
    with pytest.raises(CorruptModel, match=r"blk\.3\..* should be"):
        check_gguf(path)


def test_names_of_tensors_are_checked(tmp_path) -> None:
    path = written(tmp_path)
    data = path.read_bytes()
    path.write_bytes(data.replace(b"blk.2.attn_k.weight", b"blk.2.attn_x.weight"))
    with pytest.raises(CorruptModel, match=r"blk.2.attn_k.weight should be .* missing"):
        check_gguf(path)
    path.write_bytes(b"XXXX" + data[4:])
    with pytest.raises(CorruptModel, match="magic"):
        check_gguf(path)


def unsealed(path: Path, case: str = "biases") -> Path:
    """A file whose checksum nobody finds: all else must be found out without it."""
    file = written(path, case=case)
    file.write_bytes(file.read_bytes().replace(b"ffprune.sha256", b"ffprune.sha255"))
    assert not check_gguf(file).sealed
    return file


def stored(name: str) -> bytes:
    """A name as the file has it, behind its length."""
    return struct.pack("<Q", len(name)) + name.encode()


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("blk.0.attn_q.bias", "blk.9.attn_q.bias", r"blk.0.attn_q.bias should be \[64\] and is missing"),
        ("blk.3.ffn_down.bias", "blk.3.ffn_down.bins", "blk.3.ffn_down.bias should be .* missing"),
        ("output.weight", "outpux.weight", "a tensor 'outpux.weight'"),
    ],
)
def test_names_are_checked_without_a_checksum(before, after, said, tmp_path) -> None:
    path = unsealed(tmp_path)
    data = path.read_bytes()
    assert data.count(stored(before)) == 1
    path.write_bytes(data.replace(stored(before), stored(after)))
    with pytest.raises(CorruptModel, match=said):
        check_gguf(path)


@pytest.mark.parametrize(
    ("case", "name"),
    [
        ("biases", "output.weight"),
        ("biases", "blk.1.attn_k.bias"),
        ("biases", "blk.2.ffn_up.bias"),
        ("biases", "blk.2.ffn_norm.weight"),
        ("llama3 positions", "rope_freqs.weight"),
    ],
)
def test_all_shapes_are_checked_without_a_checksum(case, name, tmp_path) -> None:
    path = unsealed(tmp_path, case)
    tensor = next(t for t in gguf.GGUFReader(path).tensors if t.name == name)
    data = bytearray(path.read_bytes())
    # The name, the number of dimensions (4 bytes), the dimensions (8 bytes each).
    place = data.find(stored(name)) + len(stored(name)) + 4
    assert struct.unpack_from("<Q", data, place) == (tensor.shape[0],)
    struct.pack_into("<Q", data, place, int(tensor.shape[0]) - 1)
    path.write_bytes(data)
    with pytest.raises(CorruptModel, match=f"{name} should be"):
        check_gguf(path)


def test_bytes_of_no_tensor_are_found_out_without_a_checksum(tmp_path) -> None:
    path = unsealed(tmp_path)
    data = path.read_bytes()
    for extra in (1, 64):
        path.write_bytes(data + bytes(extra))
        with pytest.raises(CorruptModel, match=rf"ends at byte \d+, and it has {len(data) + extra} bytes"):
            check_gguf(path)
    second = gguf.GGUFReader(path).tensors[1]
    begins = struct.pack("<Q", second.data_offset - gguf.GGUFReader(path).data_offset)
    place = data.find(stored(second.name)) + len(stored(second.name)) + 4 + 8 * len(second.shape) + 4
    assert data[place : place + 8] == begins
    path.write_bytes(data[:place] + bytes(8) + data[place + 8 :])
    with pytest.raises(CorruptModel, match=f"{second.name} should begin at byte"):
        check_gguf(path)


def test_a_number_of_layers_beyond_all_tensors_is_refused(tmp_path) -> None:
    path = unsealed(tmp_path)
    key = b"deci.block_count"
    data = bytearray(path.read_bytes())
    struct.pack_into("<I", data, data.find(key) + len(key) + 4, 2**31)
    path.write_bytes(data)
    with pytest.raises(CorruptModel, match="block_count tells of 2147483648 layers"):
        check_gguf(path)


def test_numbers_that_changed_are_found_out(tmp_path) -> None:
    path = written(tmp_path)
    assert check_gguf(path).sealed
    data = bytearray(path.read_bytes())
    tensor = next(t for t in gguf.GGUFReader(path).tensors if t.name == "blk.1.ffn_up.weight")
    data[tensor.data_offset + 5] ^= 1  # as good a number as it was
    path.write_bytes(data)
    with pytest.raises(CorruptModel, match="not as ffprune wrote it"):
        check_gguf(path)


def test_metadata_that_changed_are_found_out(tmp_path) -> None:
    path = written(tmp_path)
    data = path.read_bytes()
    theta = struct.pack("<f", 10000.0)
    assert data.count(theta) == 1
    path.write_bytes(data.replace(theta, struct.pack("<f", 500.0)))
    with pytest.raises(CorruptModel, match="not as ffprune wrote it"):
        check_gguf(path)


def test_a_file_of_another_program_has_no_checksum(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("ffprune.export.gguf.add_seal", lambda writer: None)
    monkeypatch.setattr("ffprune.export.gguf.close_seal", lambda path: None)
    assert not check_gguf(written(tmp_path)).sealed


def test_a_file_is_inspected(tmp_path, capsys) -> None:
    path = written(tmp_path, widths=UNEVEN)
    print_inspection(path, as_json=False)
    shown = capsys.readouterr().out
    assert "deci" in shown
    assert "bytes are those that ffprune wrote" in shown
    print_inspection(path, as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["groups"] == [groups for groups, _ in UNEVEN]
    assert found["channels"] == [channels for _, channels in UNEVEN]
    assert found["heads"] == [2 * groups for groups, _ in UNEVEN]
    assert found["dense"] == {"heads": 6, "groups": 3, "channels": 40}
    with pytest.raises(MissingInput, match="no such file"):
        print_inspection(tmp_path / "none.gguf", as_json=False)


@pytest.mark.parametrize("kind", ["f32", "q8_0"])
@pytest.mark.parametrize("shape", ["uneven", "all alike", "no FFN inside", "query heads"])
def test_a_file_tells_what_is_gone(kind, shape, tmp_path, capsys) -> None:
    model = with_query_heads_gone() if shape == "query heads" else build(widths=SHAPES[shape])
    save_model(model, byte_tokenizer(), tmp_path / "folder")
    write_gguf(model, byte_tokenizer(), tmp_path / "m", kind)  # recognised by its bytes, not by its name
    print_inspection(tmp_path / "m", as_json=True)
    found, whole = json.loads(capsys.readouterr().out), inspect(tmp_path / "folder")
    assert found["removed"] == pytest.approx(whole.removed)
    assert found["removed"] > 0
    assert found["unfilled_channels"] == [row.channels[0] for row in whole.layers]
    assert values(tmp_path / "m")["ffprune.dense.feed_forward_length"] == 40
    print_inspection(tmp_path / "m", as_json=False)
    shown = capsys.readouterr().out
    assert f"removed: {whole.removed:.1%} of the prunable weights of the dense model" in shown
    assert ("filled up to" in shown) == (found["channels"] != found["unfilled_channels"])
    for row in whole.layers:
        for now, dense in (row.heads, row.groups, row.channels):
            assert now == dense or f"{now} of {dense}" in shown


def test_a_file_of_a_whole_model_and_an_old_one_tell_nothing(tmp_path, capsys, monkeypatch) -> None:
    whole = written(tmp_path, widths=None)
    monkeypatch.setattr("ffprune.export.gguf.add_dense", lambda *given: None)
    for path in (whole, written(tmp_path, "f16")):
        print_inspection(path, as_json=True)
        found = json.loads(capsys.readouterr().out)
        assert found["dense"] is found["removed"] is found["unfilled_channels"] is None
        print_inspection(path, as_json=False)
        shown = capsys.readouterr().out
        assert "removed" not in shown
        assert " of " not in shown


@pytest.mark.parametrize(
    ("told", "said"), [((6, 3, 20), "a layer has more"), ((6, -1, 40), "a layer has more"), ((6, 3), "are no numbers")]
)
def test_dense_widths_that_cannot_be_are_refused(told, said, tmp_path, monkeypatch) -> None:
    def add(writer: gguf.GGUFWriter, *given: object) -> None:
        names = ("attention.head_count", "attention.head_count_kv", "feed_forward_length")
        for name, width in zip(names, told, strict=False):
            writer.add_int32(f"ffprune.dense.{name}", width)

    monkeypatch.setattr("ffprune.export.gguf.add_dense", add)
    with pytest.raises(CorruptModel, match=said):
        print_inspection(written(tmp_path), as_json=True)


def test_a_window_that_is_not_used_is_none(tmp_path) -> None:
    assert MistralConfig().sliding_window  # the default of the family
    write_gguf(build("qwen2", sliding_window=16, use_sliding_window=False), byte_tokenizer(), tmp_path / "m.gguf")
