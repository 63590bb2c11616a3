"""What killed commands leave is removed, what living ones write is not; a failed write leaves the old file."""

import errno
import os
import time

import pytest

from teachercache.core import leftovers, paths
from teachercache.core.leftovers import STALE, sweep, sweep_beside
from teachercache.core.paths import machine, partial_name, stream_whole, write_whole

DEAD = 999999999
ELSEWHERE = "00000000"


def put(path, *, age=0.0):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"half")
    os.utime(path, (time.time() - age,) * 2)
    return path


@pytest.mark.parametrize(
    ("name", "age", "goes"),
    [
        (f"zarr.json.{DEAD}-{machine()}.partial", 0, True),
        (f"zarr.json.{os.getpid()}-{machine()}.partial", 0, False),
        (f"zarr.json.{os.getppid()}-{machine()}.partial", 0, False),
        (f"zarr.json.1-{machine()}.partial", 1e10, True),  # process 1 began later: the number was given again
        (f"zarr.json.{DEAD}-{ELSEWHERE}.partial", 0, False),
        (f"zarr.json.{DEAD}-{ELSEWHERE}.partial", STALE + 60, True),
        (".tmpA1b2C3", 1e6, True),  # of safetensors
        (".tmpA1b2C3", -60, False),
        ("model.safetensors.partial", 1e6, True),  # of an older version
        ("notes.partial.txt", 1e6, False),
        (".tmp-notes", 1e6, False),
    ],
    ids=[str(k) for k in range(11)],  # process numbers differ between workers
)
def test_sweep_removes_what_the_dead_left_alone(tmp_path, name, age, goes):
    left, whole = put(tmp_path / "a" / name, age=age), put(tmp_path / "a/whole", age=1e6)
    assert sweep(tmp_path) == [left] * goes
    assert (left.exists(), whole.exists()) == (not goes, True)


def test_sweep_keeps_a_nameless_file_that_a_process_has_open(tmp_path):
    left = put(tmp_path / ".tmpA1b2C3", age=1e6)
    with open(left, "ab"):
        assert sweep(tmp_path) == []
    assert sweep(tmp_path) == [left]


def test_sweep_follows_no_links_and_takes_folders_whole(tmp_path):
    theirs = put(tmp_path / "theirs" / f"x.{DEAD}-{machine()}.partial")
    own = put(tmp_path / "own" / f"export.{DEAD}-{machine()}.partial" / "model")
    (tmp_path / "own/link").symlink_to(tmp_path / "theirs")
    assert sweep(tmp_path / "own") == [own.parent]
    assert theirs.exists()


def test_sweep_beside_takes_the_files_of_one_name(tmp_path):
    mine, other = (put(tmp_path / f"{name}.{DEAD}-{machine()}.partial") for name in ("c.zarr", "d.zarr"))
    assert sweep_beside(tmp_path / "c.zarr") == [mine]
    assert other.exists()


def test_sweep_of_what_it_may_not_change_raises_nothing(tmp_path, monkeypatch):
    left = put(tmp_path / f"x.{DEAD}-{machine()}.partial")

    def refuse(path):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(type(left), "unlink", refuse)
    assert sweep(tmp_path) == sweep(tmp_path / "missing") == []


def test_a_start_that_is_not_known_is_long_ago():
    assert leftovers._start(DEAD) == 0
    assert abs(leftovers._start(os.getpid()) - time.time()) < 1e6


@pytest.mark.parametrize("name", ["fsync", "replace", "write"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, name, code):
    write_whole(tmp_path / "report.json", "old")

    def fail(*arguments):
        raise OSError(code, os.strerror(code))

    def hidden(file):  # as libraries in C++ do
        try:
            file.write(b"new")
            file.flush()
        except OSError as error:
            raise RuntimeError("write error") from error

    def fail_in_the_system(file, content):
        file.failed = OSError(code, os.strerror(code))
        raise file.failed

    with monkeypatch.context() as patch:
        if name == "write":
            patch.setattr(paths._Noting, "write", fail_in_the_system)
        else:
            patch.setattr(os, name, fail)
        with pytest.raises(OSError, match=r"report\.json") as raised:
            stream_whole(tmp_path / "report.json", hidden)
    assert (raised.value.errno, raised.value.filename) == (code, str(tmp_path / "report.json"))
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"report.json": "old"}
    write_whole(tmp_path / "report.json", "new")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"report.json": "new"}


def test_an_interrupted_write_leaves_the_old_file_and_no_other(tmp_path):
    write_whole(tmp_path / "a", "old")

    def stop(file):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stream_whole(tmp_path / "a", stop)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "old"}


@pytest.mark.parametrize(("code", "raises"), [(errno.EINVAL, False), (errno.EIO, True)])
def test_a_file_system_that_flushes_no_folder_is_no_error(tmp_path, monkeypatch, code, raises):
    def refuse(descriptor):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", refuse)
    failed = None
    try:
        paths.flush_folder(tmp_path)
    except OSError as error:
        failed = error.errno
    assert failed == (code if raises else None)


def test_temporary_names_tell_the_process():
    assert partial_name("a") == f"a.{os.getpid()}-{machine()}.partial"
