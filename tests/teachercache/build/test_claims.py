"""Builders that share a cache: one waits for the other, takes over from a dead one, and needs no locks of bytes."""

import dataclasses
import errno
import fcntl
import json
import os
import signal
import socket
import time
from pathlib import Path

import pytest
from disturbed import run_build
from small import make_folder, run, tree

from teachercache.build import claims
from teachercache.cache import locks, store
from teachercache.cache.lease import NAME
from teachercache.core.errors import UserError
from teachercache.core.paths import machine
from teachercache.teachers.registry import load
from teachercache.teachers.teacher import Teacher

HERE = ("--device", "cpu", "--workers", "0")


@pytest.fixture(scope="module")
def teacher(teacher_folder: Path) -> Teacher:
    return load(str(teacher_folder))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("data") / "data", 20)


@pytest.fixture
def one_block_left(teacher, data, tmp_path) -> store.Cache:
    run_build(teacher, data, tmp_path / "whole.zarr")
    run_build(teacher, data, tmp_path / "c.zarr")
    cache = store.open_cache(tmp_path / "c.zarr")
    store.forget_block(cache, 1)
    (cache.path / "quarantine.jsonl").unlink()
    return cache


class Holder:
    """Another process that holds a block of a cache."""

    def __init__(self, cache: store.Cache, block: int):
        ready, told = os.pipe()
        self.process = os.fork()
        if not self.process:
            locks.try_lock(locks.open_lock(cache.path), block)
            os.write(told, b"x")
            signal.pause()
            os._exit(0)
        os.read(ready, 1)
        os.close(ready)
        os.close(told)

    def kill(self) -> None:
        """End it, if it is there."""
        if self.process:
            os.kill(self.process, signal.SIGKILL)
            os.waitpid(self.process, 0)
            self.process = 0


@pytest.fixture
def holder(one_block_left):
    held = Holder(one_block_left, 1)
    yield held
    held.kill()


def test_no_wait_leaves_a_block_to_its_builder_with_exit_code_3(
    one_block_left, holder, teacher_folder, data, capsys
):
    words = ("build", "--teacher", teacher_folder, "--data", data, "--out", one_block_left.path, *HERE)
    assert run(*words, "--no-wait") == 3
    assert "1 blocks are being written by another builder" in capsys.readouterr().err
    holder.kill()
    assert run(*words, "--no-wait") == 0


def test_a_builder_waits_and_takes_over_from_a_dead_one(
    one_block_left, holder, teacher, data, tmp_path, monkeypatch
):
    looks = []

    def look(seconds):  # instead of a sleep
        looks.append(seconds)
        if len(looks) == 3:
            holder.kill()

    monkeypatch.setattr(claims.time, "sleep", look)
    summary = run_build(teacher, data, one_block_left.path, wait=True)
    assert (summary.blocks_left, summary.rows_written, len(looks)) == (0, 8, 3)
    assert tree(one_block_left.path) == tree(tmp_path / "whole.zarr")


def test_a_builder_waits_until_the_other_has_written(
    one_block_left, holder, teacher, data, tmp_path, monkeypatch
):
    record = store.record_path(one_block_left, 1)
    content = (tmp_path / "whole.zarr/done" / record.name).read_bytes()
    monkeypatch.setattr(claims.time, "sleep", lambda seconds: record.write_bytes(content))
    summary = run_build(teacher, data, one_block_left.path, wait=True)
    assert (summary.blocks_left, summary.rows_written) == (0, 0)
    assert tree(one_block_left.path) == tree(tmp_path / "whole.zarr")


@pytest.fixture(params=["ENOLCK", "EOPNOTSUPP", "EINVAL", "ENOSYS"])
def no_locks(request, monkeypatch):
    """A file system that refuses locks of bytes."""
    code = getattr(errno, request.param)

    def refuse(*arguments):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "lockf", refuse)


def test_what_dead_builders_left_in_a_cache_and_beside_it_goes(one_block_left, teacher, data, tmp_path):
    tag = f"999999999-{machine()}.partial"
    left = [tmp_path / f"c.zarr.{tag}", one_block_left.path / f"valid/c/0.{tag}"]
    left[0].mkdir()
    left[1].touch()
    run_build(teacher, data, one_block_left.path)
    assert not any(path.exists() for path in left)
    assert tree(one_block_left.path) == tree(tmp_path / "whole.zarr")


def leases(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"*{NAME}*"))


def test_without_locks_a_lease_lets_one_job_build(no_locks, teacher, data, tmp_path):
    out = tmp_path / "c.zarr"
    held, encode = [], teacher.encode

    def look(module, inputs):
        held.extend(leases(tmp_path))
        return encode(module, inputs)

    summary = run_build(dataclasses.replace(teacher, encode=look), data, out, wait=True)
    assert (summary.blocks_left, summary.rows_written) == (0, 20)
    assert held
    assert leases(tmp_path) == []
    store.forget_block(store.open_cache(out), 1)
    other = tmp_path / f"c.zarr{NAME}other-0.json"
    owner = {
        "job": "other",
        "host": socket.gethostname(),
        "pid": os.getppid(),
        "start": 0,
        "time": time.time(),
    }
    other.write_text(json.dumps(owner))
    with pytest.raises(UserError, match=r"is being built by process \d+ .*wait for it"):
        run_build(teacher, data, out, wait=True)
    other.write_text(json.dumps({**owner, "pid": 999999999}))
    assert run_build(teacher, data, out, wait=True).rows_written == 8


def test_without_locks_ranks_of_one_job_write_disjoint_blocks(teacher, data, tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    monkeypatch.setenv("WORLD_SIZE", "2")
    written = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        written.append(run_build(teacher, data, tmp_path / "c.zarr", wait=True).rows_written)
    assert written == [12, 8]
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.delenv("RANK")
    assert len(store.done_blocks(store.open_complete(tmp_path / "c.zarr"))) == 3


def test_a_failing_lock_is_an_error_and_no_held_block(teacher, data, tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "lockf", fail)
    with pytest.raises(OSError, match="Input/output error"):
        run_build(teacher, data, tmp_path / "c.zarr")
