"""Rows that could not be used for a while: errors of the machine stop a build, --retry computes unusable rows again."""

import errno
import json
import os
from pathlib import Path

import pytest
from disturbed import run_build
from PIL import Image
from small import make_folder, run, tree

from teachercache.build.decode import Rows
from teachercache.cache import store
from teachercache.core.errors import MachineError
from teachercache.data import pictures
from teachercache.data.manifest import make_manifest
from teachercache.data.pictures import read_bytes, unreadable
from teachercache.data.sample import BadSample, Sample
from teachercache.search.index import build_index, read_record
from teachercache.teachers.registry import load
from teachercache.teachers.teacher import Teacher


@pytest.fixture(scope="module")
def teacher(teacher_folder: Path) -> Teacher:
    return load(str(teacher_folder))


def reasons(cache: Path) -> dict[str, str]:
    entries = map(json.loads, (cache / "quarantine.jsonl").read_text().splitlines())
    return {entry["key"]: entry["reason"] for entry in entries}


# ----------------------------------------------------------------------------------------------------
# What an error of reading means


@pytest.mark.parametrize("name", ["EIO", "ESTALE", "ETIMEDOUT", "EMFILE", "ENFILE", "ENOMEM", "ENOTCONN"])
@pytest.mark.parametrize("size", [0, 9])
def test_errors_of_the_machine_are_no_reason_of_a_row(name: str, size: int):
    number = getattr(errno, name)
    error = unreadable(OSError(number, os.strerror(number)), Path("d/a.png"), size=size)
    assert isinstance(error, MachineError)
    assert "d/a.png" in str(error)
    assert "\n" not in str(error)


@pytest.mark.parametrize("name", ["ENOENT", "ENOTDIR"])
def test_a_file_that_is_away_is_a_bad_row_only_if_it_never_had_bytes(name: str):
    error = OSError(getattr(errno, name), "no such file")
    assert isinstance(unreadable(error, Path("a.png"), size=9), MachineError)
    assert isinstance(unreadable(error, Path("a.png"), size=0), BadSample)
    assert isinstance(unreadable(OSError(errno.EACCES, "denied"), Path("a.png"), size=9), BadSample)


@pytest.mark.parametrize("image", ["a.tar", "a.parquet", "a.arrow", "a.png"])
def test_every_form_of_data_that_is_away_is_an_error_of_the_machine(image: str, tmp_path: Path):
    sample = Sample("k", image, offset=-1 if image == "a.png" else 0, size=9)
    with pytest.raises(MachineError, match=image):
        read_bytes(make_manifest("d", tmp_path, [sample]), sample)


def test_a_file_that_lost_its_bytes_is_an_error_of_the_machine(tmp_path: Path):
    (tmp_path / "a.png").touch()
    sample = Sample("k", "a.png", size=9)
    with pytest.raises(MachineError, match="no bytes now"):
        read_bytes(make_manifest("d", tmp_path, [sample]), sample)


def test_a_pipe_is_no_picture(tmp_path: Path):
    os.mkfifo(tmp_path / "a.png")
    sample = Sample("k", "a.png")
    with pytest.raises(BadSample, match="pipe"):
        read_bytes(make_manifest("d", tmp_path, [sample]), sample)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_build_stops_and_the_same_build_goes_on(workers: int, teacher, tmp_path, monkeypatch):
    data, own = make_folder(tmp_path / "data", 12), pictures._content

    def failing(path: Path, sample: Sample) -> bytes:
        if sample.key.endswith("011"):
            raise OSError(errno.EIO, "Input/output error", str(path))
        return own(path, sample)

    monkeypatch.setattr(pictures, "_content", failing)
    with pytest.raises(MachineError) as stopped:
        run_build(teacher, data, tmp_path / "c.zarr", workers=workers)
    assert str(stopped.value).startswith(f"cannot read {data}/class2/011.png: Input/output error")
    monkeypatch.setattr(pictures, "_content", own)
    run_build(teacher, data, tmp_path / "c.zarr")
    run_build(teacher, data, tmp_path / "undisturbed.zarr")
    assert tree(tmp_path / "c.zarr") == tree(tmp_path / "undisturbed.zarr")


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")]
)
def test_a_picture_that_does_not_fit_into_memory_is_the_reason_of_its_row(error, teacher, tmp_path):
    data = make_folder(tmp_path / "data", 6)
    Image.new("RGB", (99, 1)).save(data / "wide.png")
    (data / "wide.txt").write_text("a line\n")
    view = teacher.view

    def hungry(image: Image.Image):
        if image.width == 99:
            raise error
        return view(image)

    hungry_teacher = load(teacher.spec.name)
    object.__setattr__(hungry_teacher, "view", hungry)
    run_build(hungry_teacher, data, tmp_path / "c.zarr")
    assert reasons(tmp_path / "c.zarr") == {"wide": "the picture does not fit into memory"}


# ----------------------------------------------------------------------------------------------------
# --retry


def spoiled_build(teacher: Teacher, data: Path, out: Path, keys: set[str]) -> None:
    """A build in which the pictures of some keys cannot be opened."""
    own = Rows._content

    def denied(self: Rows, sample: Sample) -> bytes:
        if sample.key in keys:
            raise BadSample("cannot open the picture: Permission denied")
        return own(self, sample)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Rows, "_content", denied)
        run_build(teacher, data, out)


def test_retry_computes_unusable_rows_again(teacher, teacher_folder, tmp_path, capsys):
    data = make_folder(tmp_path / "data", 20, texts=2)
    (data / "class0/006.txt").write_text("\n\n")
    (data / "class2/002.png").write_bytes(b"no picture")
    cache = tmp_path / "c.zarr"
    spoiled_build(teacher, data, cache, {"class0/000", "class2/017"})
    build_index(store.open_cache(cache))
    assert len(reasons(cache)) == 4
    words = (
        "build",
        "--teacher",
        teacher_folder,
        "--data",
        data,
        "--out",
        cache,
        "--device",
        "cpu",
        "--workers",
        "0",
    )
    assert run(*words) == 0  # the plain command changes nothing
    assert "--retry" in capsys.readouterr().err
    assert len(reasons(cache)) == 4
    assert run(*words, "--retry") == 0
    run_build(teacher, data, tmp_path / "undisturbed.zarr")
    assert reasons(cache).keys() == {"class0/006", "class2/002"}
    assert tree(cache) == tree(tmp_path / "undisturbed.zarr")
    assert read_record(store.open_cache(cache), "image_emb").vectors == 18
    assert run("verify", cache, "--samples", "0") == 0


def test_retry_that_stops_goes_on_with_any_build(teacher, tmp_path, monkeypatch):
    data = make_folder(tmp_path / "data", 40)
    spoiled_build(
        teacher, data, tmp_path / "c.zarr", {"class0/000", "class0/024", "class1/010", "class2/038"}
    )
    own = pictures._content

    def failing(path: Path, sample: Sample) -> bytes:
        if sample.key == "class2/038":
            raise OSError(errno.ESTALE, "Stale file handle", str(path))
        return own(path, sample)

    monkeypatch.setattr(pictures, "_content", failing)
    with pytest.raises(MachineError):
        run_build(teacher, data, tmp_path / "c.zarr", retry=True)
    monkeypatch.setattr(pictures, "_content", own)
    assert run_build(teacher, data, tmp_path / "c.zarr").rows_written == 3  # one of four is done
    run_build(teacher, data, tmp_path / "undisturbed.zarr")
    assert tree(tmp_path / "c.zarr") == tree(tmp_path / "undisturbed.zarr")


def test_retry_of_a_row_that_is_still_bad_keeps_its_reason(teacher, tmp_path):
    data = make_folder(tmp_path / "data", 8)
    (data / "class2/002.png").write_bytes(b"no picture")
    run_build(teacher, data, tmp_path / "c.zarr")
    before = tree(tmp_path / "c.zarr")
    assert run_build(teacher, data, tmp_path / "c.zarr", retry=True).rows_written == 1
    assert tree(tmp_path / "c.zarr") == before
