"""--out at fsspec URLs, on a real S3 server on loopback: the same bytes as locally, one builder at a time."""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from disturbed import run_build
from small import make_folder, tree
from zarr.core.sync import sync

from student.contract import PictureView, RowInputs
from student.inputs.caches import training_rows
from student.inputs.order import StepPlan
from student.inputs.pairs import PairBatches, TeacherFields
from teachercache.cache import store
from teachercache.cache.lease import is_lease, lease
from teachercache.cache.repair import damaged_blocks
from teachercache.cli import main
from teachercache.core.errors import UserError
from teachercache.core.paths import as_path
from teachercache.core.urls import read_range
from teachercache.data.read import read_manifest
from teachercache.teachers.registry import load
from teachercache.teachers.teacher import Teacher

pytestmark = pytest.mark.usefixtures("s3")
HERE = ("--device", "cpu", "--workers", "0")


@pytest.fixture(scope="module")
def teacher(teacher_folder: Path) -> Teacher:
    return load(str(teacher_folder))


@pytest.fixture
def url(s3) -> Any:
    return as_path(f"{s3()}/caches/c.zarr")


@pytest.fixture(scope="module")
def finished(s3, squares: Path, teacher: Teacher) -> Any:
    """A cache of `squares` at a URL; read it, change nothing in it."""
    out = as_path(f"{s3()}/c.zarr")
    run_build(teacher, squares, out)
    return out


def objects(cache: Any) -> dict[str, bytes]:
    """Every object of a cache."""
    start = len(cache.path.rstrip("/")) + 1
    return {name[start:]: content for name, content in cache.fs.cat(cache.fs.find(cache.path)).items()}


def assert_same(cache: Any, local: Path) -> None:
    """Byte for byte, but for the lock that only a local cache has."""
    expected = tree(local)
    expected.pop(store.LOCK)
    assert objects(cache) == expected


class Killed(Exception):
    pass


def kill_at_write(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Every write of a cache from the `number`-th on fails, as of a process that is not there any more."""
    from teachercache.core import paths

    whole, seen = paths.stream_whole, [0]

    def stream(path: Any, write: Any, *, tag: str = "") -> None:
        seen[0] += 1
        if seen[0] >= number:
            raise Killed
        whole(path, write, tag=tag)

    for module in ("core.paths", "data.manifest"):  # write_whole is a stream of what is there
        monkeypatch.setattr(f"teachercache.{module}.stream_whole", stream)


def error_of(capsys: pytest.CaptureFixture, *words: object) -> str:
    """The one error line of a command that must fail."""
    capsys.readouterr()
    assert main([str(word) for word in words]) == 2
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
    assert "Traceback" not in out + err
    return lines[-1]


# ----------------------------------------------------------------------------------------------------
# The same bytes


@pytest.mark.parametrize("write", [12, 30])
def test_a_killed_build_goes_on_and_is_what_a_local_one_is(write: int, url, teacher, tmp_path, monkeypatch):
    data = make_folder(tmp_path / "data", 20, texts=2)
    sorted(data.rglob("*.png"))[9].write_bytes(b"no picture")
    kill_at_write(monkeypatch, write)
    with pytest.raises(Killed):
        run_build(teacher, data, url)
    monkeypatch.undo()
    run_build(teacher, data, url)
    run_build(teacher, data, tmp_path / "local.zarr")
    assert_same(url, tmp_path / "local.zarr")
    cache = store.open_complete(url)
    assert damaged_blocks(cache) == {}
    assert run_build(teacher, data, url).rows_written == 0


@pytest.mark.parametrize("write", [20])
def test_rows_views_and_texts_grow_as_they_do_locally(write: int, url, teacher, tmp_path, monkeypatch):
    data = make_folder(tmp_path / "data", 12)
    for out in (url, tmp_path / "local.zarr"):
        run_build(teacher, data, out, views=1)
    for path in data.rglob("*.txt"):
        path.write_text(path.read_text() + "another\n")
    shutil.copytree(make_folder(tmp_path / "more", 7, texts=2), data / "z")
    kill_at_write(monkeypatch, write)
    with pytest.raises(Killed):
        run_build(teacher, data, url, views=2)
    monkeypatch.undo()
    for out in (url, tmp_path / "local.zarr"):
        run_build(teacher, data, out, views=2)
    assert_same(url, tmp_path / "local.zarr")
    local = store.open_complete(tmp_path / "local.zarr")
    for name in local.fields:
        assert np.array_equal(store.read_field(store.open_complete(url), name), store.read_field(local, name))


def test_ranks_share_the_blocks(url, teacher, tmp_path, monkeypatch):
    data = make_folder(tmp_path / "data", 30)
    for name, value in {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29501"}.items():
        monkeypatch.setenv(name, value)
    written = []
    for rank in "10":
        monkeypatch.setenv("RANK", rank)
        written.append(run_build(teacher, data, url).rows_written)
    assert written == [8 + 6, 16]
    monkeypatch.undo()
    run_build(teacher, data, tmp_path / "local.zarr")
    assert_same(url, tmp_path / "local.zarr")


# ----------------------------------------------------------------------------------------------------
# Read in place


def test_plain_zarr_through_fsspec_reads_it(finished, squares, teacher, tmp_path):
    group = zarr.open_group(str(finished), mode="r")
    local = run_build(teacher, squares, tmp_path / "local.zarr").cache
    for name in local.fields:
        assert np.array_equal(group[name][:], store.read_field(local, name))
    assert group["key"][:].tolist() == store.read_keys(local).tolist()
    assert group.attrs["spec"]["digest"] == teacher.spec.digest
    sync(group.store.fs._s3.close())  # zarr has a loop of its own, and leaves its connections open


def test_a_student_reads_it(finished, squares, teacher, tmp_path):
    manifest, local = read_manifest(str(squares)), run_build(teacher, squares, tmp_path / "local.zarr").cache
    inputs = RowInputs(
        picture=PictureView(lambda picture: torch.zeros(3)),
        tokenize=lambda texts: torch.tensor([[len(text)] for text in texts]),
    )
    there, here = (
        PairBatches(
            manifest,
            training_rows(manifest, cache),
            inputs,
            StepPlan(batch=4, steps=3, seed=0),
            teachers=TeacherFields((cache,), ("image_emb", "text_emb")),
        )
        for cache in (store.open_complete(finished), local)
    )
    for step in range(3):
        ours, theirs = there[step], here[step]
        assert ours.keys() == theirs.keys() > {"image_emb", "text_emb"}
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_commands_work_on_it(finished, teacher_folder, squares, capsys):
    assert main(["verify", str(finished), "--samples", "8"]) == 0
    capsys.readouterr()
    assert main(["info", str(finished), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["blocks_done"], facts["rows"]) == (8, 64)
    key = store.read_keys(store.open_cache(finished))[3]
    assert main(["search", str(finished), "--key", key, "--top", "2", "--json"]) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    assert len(results) == 2


def test_verify_names_a_damaged_block_and_build_mends_it(url, teacher_folder, tmp_path, capsys):
    data = make_folder(tmp_path / "data", 12)
    words = ("build", "--teacher", teacher_folder, "--data", data, "--out", url, *HERE)
    assert main([str(word) for word in words]) == 0
    whole = objects(url)
    for name in (
        "image_emb/c/0/0",
        "done/00000000.json",
        "manifest.parquet",
        "quarantine.jsonl",
        "key/zarr.json",
    ):
        (url / name).write_bytes(whole[name][:-3] + b"abc")
        line = error_of(capsys, "verify", url)
        assert "1 damaged blocks" in line or f"{name}: damaged" in line
        repair = ["--repair"] * ("1 damaged blocks" in line)
        assert (" --repair`" in line) == bool(repair)
        assert main([str(word) for word in (*words, *repair)]) == 0
        assert objects(url) == whole


# ----------------------------------------------------------------------------------------------------
# Refused, and one builder at a time


def test_prune_is_for_local_caches(url, teacher, tmp_path):
    data = make_folder(tmp_path / "data", 12)
    run_build(teacher, data, url)
    sorted(data.rglob("*.png"))[0].unlink()
    before = objects(url)
    with pytest.raises(
        UserError, match=r"--prune works on local caches: build s3://.*/c\.zarr again into another --out"
    ):
        run_build(teacher, data, url, prune=True)
    assert objects(url) == before


def test_what_cannot_be_written_is_one_line(s3, teacher_folder, tmp_path, capsys, monkeypatch):
    data = make_folder(tmp_path / "data", 3)
    words = ("build", "--teacher", teacher_folder, "--data", data, *HERE, "--out")
    assert "cannot write s3://no-such-bucket-here/c.zarr" in error_of(
        capsys, *words, "s3://no-such-bucket-here/c.zarr"
    )
    other = as_path(s3())
    (other / "c.zarr" / "notes.txt").write_bytes(b"mine")
    assert "exists and is not a cache: pass another --out" in error_of(capsys, *words, other / "c.zarr")
    assert objects(other / "c.zarr") == {"notes.txt": b"mine"}


def leases(url: Any) -> list[Any]:
    return [entry for entry in url.iterdir() if is_lease(entry)]


def write_lease(url: Any, *, age: float, host: str, pid: int, name: str = "x") -> Any:
    facts = {
        "job": f"job {name}",
        "host": host,
        "pid": pid,
        "start": time.time() - age,
        "time": time.time() - age,
    }
    path = url / f".builder-{name}-0.json"
    path.write_text(json.dumps(facts))
    return path


def test_a_living_builder_elsewhere_is_waited_for_and_a_silent_one_is_not(url, teacher, tmp_path):
    data = make_folder(tmp_path / "data", 12)
    write_lease(url, age=20, host="another-machine", pid=1)
    with pytest.raises(
        UserError,
        match=r"is being built by process 1 on another-machine: wait for it; if it is dead, "
        r"wait (99|100) seconds or remove s3://.*\.builder-x-0\.json$",
    ):
        run_build(teacher, data, url)
    assert [entry.name for entry in url.iterdir()] == [".builder-x-0.json"]
    write_lease(url, age=121, host="another-machine", pid=1)
    run_build(teacher, data, url)
    run_build(teacher, data, tmp_path / "local.zarr")
    assert_same(url, tmp_path / "local.zarr")


def test_a_dead_process_of_this_machine_is_not_waited_for(url, teacher, tmp_path):
    data = make_folder(tmp_path / "data", 12)
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    write_lease(url, age=1, host=socket.gethostname(), pid=process.pid)
    assert run_build(teacher, data, url).rows_written == 12
    assert leases(url) == []
    write_lease(url, age=1, host=socket.gethostname(), pid=os.getppid())
    with pytest.raises(UserError, match=f"built by process {os.getppid()}"):
        run_build(teacher, data, url)


def test_a_lease_is_renewed_and_shared_by_the_ranks_of_one_job(url, monkeypatch):
    monkeypatch.setattr("teachercache.cache.lease.RENEWED", 0.05)

    with lease(url):
        (mine,) = leases(url)
        first = json.loads(read_range(mine))
        time.sleep(0.5)
        again = json.loads(read_range(mine))
        assert again["time"] > first["time"]
        assert {**again, "time": 0} == {**first, "time": 0}
    assert not url.exists()
    for name, value in {"WORLD_SIZE": "2", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    with lease(url):
        monkeypatch.setenv("RANK", "1")
        with lease(url):
            assert len(leases(url)) == 2
        monkeypatch.setenv("MASTER_PORT", "29501")
        with pytest.raises(UserError, match="is being built by process"), lease(url):
            pass
        assert len(leases(url)) == 1


def test_of_two_builders_at_once_one_builds(url, teacher, tmp_path, monkeypatch):
    """Threads stand for machines: each has its own job. Whatever they meet, one cache comes out, by one of them."""
    data, names = make_folder(tmp_path / "data", 12), iter(["a", "b"])
    monkeypatch.setattr("teachercache.cache.lease._job", lambda: next(names))
    said: list[str] = []

    def work() -> None:
        try:
            run_build(teacher, data, url)
            said.append("built")
        except UserError as error:
            said.append(str(error).split(" by ")[0].removeprefix(f"{url} "))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(said) in (
        ["built", "is being built"],
        ["built", "built"],
    )  # at once, or one after the other
    run_build(teacher, data, tmp_path / "local.zarr")
    assert_same(url, tmp_path / "local.zarr")
