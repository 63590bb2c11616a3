"""Flipped bits: every kind of file of a run and of an export is found at the load or by `student verify`."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from student.cli import main
from student.inference.verify import verify_folder
from student.models.registry import load_student
from student.models.run_file import DTYPES, load_weights, read_run, write_tensors
from teachercache.core.digests import NAME
from teachercache.core.errors import UserError
from teachercache.teachers.clip.loading import open_folder

LOGS = {"metrics.jsonl"}  # they stop nothing


def flip(path: Path, place: float = 0.5) -> None:
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 4
    path.write_bytes(content)


def names_of(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def run(finished_run, tmp_path):
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


@pytest.fixture(scope="module")
def whole_export(finished_run, tmp_path_factory):
    out = tmp_path_factory.mktemp("export") / "out"
    assert main(["export", str(finished_run), "--format", "open_clip", "--out", str(out)]) == 0
    return out


def test_a_whole_run_and_a_whole_export_verify(run, whole_export, capsys):
    assert main(["verify", str(run)]) == 0
    assert "no digest: metrics.jsonl" in capsys.readouterr().out
    assert main(["verify", str(whole_export), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["checked"], report["damaged"], report["without_digest"]) == (3, [], [])


@pytest.mark.parametrize("place", [0.0, 0.3, 1.0])
def test_a_flip_in_any_file_of_a_run_is_found(place, run):
    for name in names_of(run):
        if name in LOGS:
            continue
        before = (run / name).read_bytes()
        flip(run / name, place)
        assert name in [damage.file for damage in verify_folder(run).damaged]
        (run / name).write_bytes(before)
    assert verify_folder(run).damaged == []
    assert {"run.json", "model.safetensors", "curve.png", "speed.json", NAME} < set(names_of(run))


def test_a_flip_in_any_file_of_an_export_is_found(whole_export, tmp_path, capsys):
    folder = Path(shutil.copytree(whole_export, tmp_path / "out"))
    for name in names_of(folder):
        before = (folder / name).read_bytes()
        flip(folder / name)
        assert name in [damage.file for damage in verify_folder(folder).damaged]
        if name != "README.md":  # no loader reads it
            with pytest.raises(UserError, match="is damaged: cop"):
                open_folder(str(folder))
        (folder / name).write_bytes(before)
    (folder / "open_clip_config.json").unlink()
    assert main(["verify", str(folder)]) == 2
    assert "is damaged" not in capsys.readouterr().out
    assert [damage.problem for damage in verify_folder(folder).damaged] == ["is missing"]


@pytest.mark.parametrize("name", ["run.json", "model.safetensors", NAME])
def test_a_damaged_run_is_not_loaded_and_not_exported(name, run, tmp_path, capsys):
    flip(run / name)
    for load in (load_student, lambda folder: open_folder(str(folder))):
        with pytest.raises(UserError, match="is damaged: "):
            load(run)
    words = ["export", str(run), "--format", "open_clip", "--out", str(tmp_path / "out")]
    assert main(words) == 2
    assert f"{run / name} is damaged: " in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_a_run_of_an_older_version_has_no_digests_and_loads(run):
    (run / NAME).unlink()
    before = load_file(run / "model.safetensors")
    assert all(value.equal(load_weights(run)[name]) for name, value in before.items())
    report = verify_folder(run)
    assert (report.checked, report.damaged) == (0, [])
    assert "model.safetensors" in report.without_digest
    (run / "model.safetensors").write_bytes(b"\xff" * 100)  # a torn header is one line
    with pytest.raises(UserError, match=r"model\.safetensors is damaged \("):
        load_weights(run)
    for text in ("[]", "{", '{"format": 2}', '{"format": 2, "student": []}', "\x00"):
        (run / "run.json").write_text(text)
        with pytest.raises(UserError):
            read_run(run)


def test_what_is_no_run_is_not_verified(tmp_path, capsys):
    assert main(["verify", str(tmp_path)]) == 2
    assert "is neither a run nor an export" in capsys.readouterr().err


@pytest.mark.parametrize("metadata", [None, {"step": "3", "a": 'é"'}])
def test_tensors_have_the_bytes_that_safetensors_writes(metadata, tmp_path):
    state = {f"{letter}{i}": torch.ones(3, 2).to(kind) for letter in "za" for i, kind in enumerate(DTYPES)}
    state |= {"scalar": torch.tensor(0.5), "empty": torch.zeros(0, 4), "turned": torch.rand(3, 5).T}
    write_tensors(state, tmp_path / "ours", tmp_path, metadata)
    save_file({name: value.contiguous() for name, value in state.items()}, tmp_path / "theirs", metadata)
    ours, theirs = load_file(tmp_path / "ours"), load_file(tmp_path / "theirs")
    assert all(value.equal(ours[name]) for name, value in theirs.items())
    if metadata is None:  # safetensors writes metadata in any order
        assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
