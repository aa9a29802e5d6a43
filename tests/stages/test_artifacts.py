from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch

from ffprune.core.errors import DiskFull, MissingInput, UnsafeFile
from ffprune.stages import artifacts


def test_json_csv_and_tensors_come_back(tmp_path: Path) -> None:
    artifacts.write_json(tmp_path / "new" / "x.json", {"a": [1, 2.5]})
    assert artifacts.read_json(tmp_path / "new" / "x.json") == {"a": [1, 2.5]}
    artifacts.write_csv(tmp_path / "x.csv", [{"step": 1, "reward": 0.5}])
    assert artifacts.read_csv(tmp_path / "x.csv") == [{"step": "1", "reward": "0.5"}]
    tensors = {"w": torch.arange(6.0).reshape(2, 3).T}
    artifacts.write_tensors(tmp_path / "x.safetensors", tensors, {"of": "test"})
    assert torch.equal(artifacts.read_tensors(tmp_path / "x.safetensors")["w"], tensors["w"])
    assert artifacts.read_metadata(tmp_path / "x.safetensors") == {"of": "test"}
    assert {p.name for p in tmp_path.iterdir()} == {"new", "x.csv", "x.safetensors"}


def test_the_same_tensors_and_metadata_make_the_same_file(tmp_path: Path) -> None:
    facts = dict.fromkeys("abcdef", "1")
    for name, given in (("x", facts), ("y", dict(reversed(facts.items())))):
        artifacts.write_tensors(tmp_path / name, {"w": torch.ones(2)}, given)
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    artifacts.write_json(path, 1)
    with pytest.raises(ValueError, match="not JSON compliant"):
        artifacts.write_json(path, float("nan"))
    assert artifacts.read_json(path) == 1
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "said",
    ["IoError: No space left on device", "Not enough free space to write 9 bytes", "9 requested and 0 written"],
)
def test_libraries_say_in_their_own_words_that_the_disk_is_full(said: str, tmp_path: Path) -> None:
    with pytest.raises(DiskFull, match="filled the disk"), artifacts.atomic_file(tmp_path / "new") as file:
        file.write_text("half")
        raise OSError(said)
    with pytest.raises(OSError, match="other"), artifacts.atomic_file(tmp_path / "new"):
        raise OSError("other")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_refused_and_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.txt"
    artifacts.write_text(path, "old")

    def full(target: Path, data: bytes) -> None:
        target.write_bytes(data[:1])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(artifacts, "_write_bytes", full)
    with pytest.raises(DiskFull, match=r"what was there before is untouched"):
        artifacts.write_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_output_larger_than_the_disk_is_refused_before_work(tmp_path: Path) -> None:
    with pytest.raises(DiskFull, match="needs"):
        artifacts.check_room(tmp_path / "not" / "yet" / "there", 10**18)


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with artifacts.atomic_dir(target) as built:
        (built / "one").write_text("1")
        assert not target.exists()
    with artifacts.atomic_dir(target) as built:
        (built / "two").write_text("2")
    assert [p.name for p in target.iterdir()] == ["two"]
    assert list(tmp_path.iterdir()) == [target]


def test_a_failed_folder_leaves_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with artifacts.atomic_dir(target) as built:
        (built / "one").write_text("1")
    with pytest.raises(RuntimeError), artifacts.atomic_dir(target) as built:
        (built / "two").write_text("2")
        raise RuntimeError
    assert [p.name for p in target.iterdir()] == ["one"]
    assert list(tmp_path.iterdir()) == [target]


def test_a_cut_file_says_how_to_get_a_whole_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path("data/stats/grams/layers.0.safetensors")
    artifacts.write_tensors(path, {"g": torch.eye(8)})
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UnsafeFile, match="dvc repro calibrate"):
        artifacts.read_tensors(path)
    broken = Path("broken.json")
    broken.write_text("{")
    with pytest.raises(UnsafeFile, match=r"cannot be read as JSON"):
        artifacts.read_json(broken)


def test_a_missing_input_names_the_stage_that_makes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for path in (Path("models/dense/config.json"), tmp_path / "models" / "dense"):
        with pytest.raises(MissingInput, match="the stage 'download' makes it"):
            artifacts.require(path)
    with pytest.raises(MissingInput, match="no stage of the pipeline makes it"):
        artifacts.require(Path("my.txt"))
