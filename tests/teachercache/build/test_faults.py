"""What may go wrong while a cache is built or lies about: kills, dead workers, full and locked disks, flipped bits."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from disturbed import BLOCK, Disturbed, mount_disk, run_build, wait_for
from PIL import Image
from processes import CONTEXT, Command, run_command
from small import counting, error_of, make_folder, run, tree

from teachercache.build.decode import Rows
from teachercache.build.probe import ROWS as PROBED
from teachercache.cache import store
from teachercache.cache.repair import damaged_blocks, damaged_files
from teachercache.core.errors import MachineError, UserError
from teachercache.data.manifest import digest_rows, is_as_written, load_manifest, write_manifest
from teachercache.data.read import read_manifest
from teachercache.data.workers import is_death
from teachercache.teachers.registry import load
from teachercache.teachers.teacher import Teacher

STEP = 19  # of all bits of a file one in so many is flipped; odd, so that all places of a byte come
HERE = ("--device", "cpu", "--workers", "0")


@pytest.fixture(scope="module")
def teacher(teacher_folder: Path) -> Teacher:
    return load(str(teacher_folder))


# ----------------------------------------------------------------------------------------------------
# SIGKILL while a cache grows or is pruned; of a plain build: test_build.py


def spoil(data: Path, number: int) -> None:
    """A picture that cannot be read."""
    sorted(data.rglob("*.png"))[number].write_bytes(b"no picture")


def rows_grow(folder: Path) -> dict:
    """20 rows, the last block in part, become 30."""
    data = make_folder(folder / "data", 20, texts=2)
    spoil(data, 17)
    yield data, {}
    shutil.copytree(make_folder(folder / "more", 10, texts=2), data / "z")
    yield data, {}


def views_and_texts_grow(folder: Path) -> dict:
    """One text and one view a row become three and two."""
    data = make_folder(folder / "data", 20)
    spoil(data, 5)
    sorted(data.rglob("*.txt"))[3].write_text(" \n")
    yield data, {"views": 1}
    for path in data.rglob("*.txt"):
        path.write_text(path.read_text() + "another\nand one more\n")
    yield data, {"views": 2}


def all_grow(folder: Path) -> dict:
    """Rows, texts and views at once."""
    data = make_folder(folder / "data", 20)
    yield data, {"views": 1}
    for path in data.rglob("*.txt"):
        path.write_text(path.read_text() + "another\n")
    shutil.copytree(make_folder(folder / "more", 5, texts=2), data / "z")
    yield data, {"views": 2}


def rows_are_pruned(folder: Path) -> dict:
    """Two rows go, two change, one comes."""
    data = make_folder(folder / "data", 21, texts=2)
    spoil(data, 17)
    yield data, {}
    pictures = sorted(data.rglob("*.png"))
    for path in (pictures[0], pictures[9]):
        path.unlink()
        path.with_suffix(".txt").unlink()
    Image.new("RGB", (30, 31)).save(pictures[5])
    pictures[12].with_suffix(".txt").write_text("something else\n")
    Image.new("RGB", (8, 8), "red").save(data / "new.png")
    yield data, {"prune": True}


@pytest.mark.parametrize("story", [rows_grow, views_and_texts_grow, all_grow, rows_are_pruned])
def test_sigkill_while_a_cache_changes(story, teacher, teacher_folder, tmp_path):
    """To the last byte: what an interrupted growth had taken over is taken over again, in the same batches."""
    stages = story(tmp_path)
    data, options = next(stages)
    run_build(teacher, data, tmp_path / "before.zarr", **options)
    data, options = next(stages)
    disturbed = Disturbed(
        tmp_path / "d", teacher_folder, data, before=tmp_path / "before.zarr", options=options
    )
    left = disturbed.assert_survives_kills(tmp_path / "events", 7, seed=len(story.__name__))
    assert left[0] > left[-1] == 0


def test_growth_that_is_killed_twice_takes_over_what_was_known(teacher, teacher_folder, tmp_path):
    """A row whose answer was NaN once stays unusable, however often the block that holds it is interrupted."""
    stages = rows_grow(tmp_path)
    data, _ = next(stages)
    shown = [-PROBED]

    def encode(module, inputs):
        outputs = teacher.encode(module, inputs)
        if shown[0] == 16:  # the last block's batch: rows 16 to 19
            outputs["image_emb"][3, 2] = float("nan")
        shown[0] += len(inputs["image"])
        return outputs

    run_build(dataclasses.replace(teacher, encode=encode), data, tmp_path / "before.zarr")
    next(stages)
    disturbed = Disturbed(tmp_path / "d", teacher_folder, data, before=tmp_path / "before.zarr")
    cache = store.open_cache(tmp_path / "d/out1/c.zarr")
    assert np.flatnonzero(~store.read_field(cache, "valid")).tolist() == [17, 19]
    total, out = disturbed.num_events(tmp_path / "events"), disturbed.new_out()
    for event in (total // 3, total // 4, total // 5):
        disturbed.kill_at_event(out, event)
    disturbed.finish(out)


# ----------------------------------------------------------------------------------------------------
# Workers and signals


def slow_data(folder: Path) -> Path:
    return make_folder(folder / "data", 120)


class Building(NamedTuple):
    """`tc build` as a process, and the words that start it."""

    process: Command
    words: list[str]
    out: Path

    def children(self) -> list[int]:
        """Processes of its group, the command itself left out."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal() and int(entry.name) != self.process.pid:
                try:
                    state, _, group = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
                except OSError:
                    continue
                if int(group) == self.process.pid and state != "Z":
                    found.append(int(entry.name))
        return found


@pytest.fixture
def slow_command(teacher_folder: Path, tmp_path: Path):
    """The real command with two workers over pictures that take time, in a group of its own; block 0 is done."""
    data = make_folder(tmp_path / "data", 1000)
    options = {"--teacher": teacher_folder, "--data": data, "--out": tmp_path / "c.zarr", "--device": "cpu"}
    options |= {"--workers": 2, "--batch-size": 2}
    words = ["build", *map(str, (w for pair in options.items() for w in pair))]
    command = Building(Command("tc", words, os.environ), words, tmp_path / "c.zarr")
    wait_for(lambda: list(command.out.glob("done/*.json")) or command.process.poll() is not None)
    yield command
    if command.process.poll() is None:
        os.killpg(command.process.pid, signal.SIGKILL)
    command.process.communicate(60)


def test_decoding_process_that_is_killed_is_one_line_and_the_build_goes_on(slow_command, teacher):
    victim = slow_command.children()[0]
    os.kill(victim, signal.SIGKILL)
    _, err = slow_command.process.communicate(timeout=60)
    assert slow_command.process.poll() in (2, 75)
    line = err.splitlines()[-1]
    assert line.startswith(
        "error: a decoding process died (killed, or out of memory): run the same command again"
    )
    assert "Traceback" not in err
    wait_for(lambda: not slow_command.children(), 10)
    assert run_command("tc", *slow_command.words).returncode == 0
    undisturbed = slow_command.out.with_name("undisturbed.zarr")
    run_build(teacher, slow_command.out.with_name("data"), undisturbed, block_rows=None, batch_size=2)
    assert tree(slow_command.out) == tree(undisturbed)


@pytest.mark.parametrize(
    ("error", "death"),
    [
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), True),
        (RuntimeError("DataLoader worker (pid(s) 7, 8) exited unexpectedly"), True),
        (ConnectionResetError("Connection reset by peer"), True),
        (EOFError(), True),
        (RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nTraceback ..."), False),
        (ConnectionError("Caught ConnectionError in DataLoader worker process 0.\nTraceback ..."), False),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
    ],
)
def test_a_dead_worker_is_told_from_an_error_in_one(error: Exception, death: bool):
    assert is_death(error) == death


@pytest.mark.parametrize(
    ("number", "to_all", "code"), [(signal.SIGINT, True, 130), (signal.SIGTERM, False, 143)]
)
def test_ctrl_c_and_sigterm_are_one_line_and_leave_no_process(
    slow_command, number: int, to_all: bool, code: int
):
    (os.killpg if to_all else os.kill)(slow_command.process.pid, number)
    _, err = slow_command.process.communicate(timeout=60)
    assert slow_command.process.poll() == code, err
    assert err.splitlines()[-1] == "stopped; run the same command to resume"
    assert "Traceback" not in err
    wait_for(lambda: not slow_command.children(), 10)
    assert not (slow_command.out / "quarantine.jsonl").exists()


def test_workers_of_a_killed_builder_end_by_themselves(slow_command):
    workers = slow_command.children()
    assert len(workers) == 2
    slow_command.process.kill()
    slow_command.process.wait(60)
    wait_for(lambda: not slow_command.children(), 30)


def die_once(mark: Path, parent: int) -> None:
    """In a decoding process: end without a word, the first time."""
    if os.getpid() != parent and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("row", [0, 11, 29])
def test_decoding_process_that_dies_over_a_row(row: int, teacher, tmp_path, monkeypatch):
    data = make_folder(tmp_path / "data", 30)
    read, key, parent = Rows.__getitems__, sorted(data.rglob("*.png"))[row].stem, os.getpid()

    def hostile(self, item):
        if any(self.manifest.row(number).key.endswith(key) for number in item.rows):
            die_once(tmp_path / "died", parent)
        return read(self, item)

    monkeypatch.setattr(Rows, "__getitems__", hostile)
    with pytest.raises(MachineError, match="a decoding process died"):
        run_build(teacher, data, tmp_path / "c.zarr", workers=2)
    run_build(teacher, data, tmp_path / "c.zarr", workers=2)
    run_build(teacher, data, tmp_path / "undisturbed.zarr")
    assert tree(tmp_path / "c.zarr") == tree(tmp_path / "undisturbed.zarr")


# ----------------------------------------------------------------------------------------------------
# Disks


def build_in_read_only_folder(teacher_folder: Path, data: Path, disk: Path, result: Path) -> None:
    """`tc build` where nothing can be written, and over a cache that can only be read; the lines that it says."""
    from contextlib import redirect_stderr
    from io import StringIO

    try:
        mount_disk(disk, 1 << 20)
    except PermissionError as error:
        result.write_text(f"skip {error}")
        return
    words = ("build", "--teacher", teacher_folder, "--data", data, *HERE)
    with redirect_stderr(StringIO()) as said:
        codes = [run(*words, "--out", disk / name) for name in ("c.zarr", "damaged.zarr")]
        flip(disk / "damaged.zarr/image_emb/c/0/0", 100)
        mount_disk(disk, 1 << 20, read_only=True)
        codes += [run(*words, "--out", disk / name) for name in ("new.zarr", "c.zarr")]
        codes += [run(name, disk / "c.zarr") for name in ("verify", "info")]
        codes += [run("search", disk / "c.zarr", "a square"), run("verify", disk / "damaged.zarr")]
        codes += [run("analyze", disk / "c.zarr", "--out", result.with_name("report"))]
    lines = [line for line in said.getvalue().splitlines() if line.startswith(("error", "Traceback"))]
    result.write_text(json.dumps([codes, lines]))


def test_read_only_folder(teacher_folder, data, tmp_path):
    (tmp_path / "disk").mkdir()
    arguments = (teacher_folder, data, tmp_path / "disk", tmp_path / "result")
    process = CONTEXT.Process(target=build_in_read_only_folder, args=arguments)
    process.start()
    process.join(60)
    said = (tmp_path / "result").read_text()
    if said.startswith("skip"):
        pytest.skip(said)
    codes, lines = json.loads(said)
    assert codes[:2] == [0, 0]
    assert all(codes[2:4])
    assert codes[4:] == [0, 0, 0, 2, 0]
    assert lines[0].startswith(
        f"error: cannot create {tmp_path}/disk/new.zarr: Read-only file system; pass another --out"
    )
    assert "Read-only file system" in lines[1]
    assert "1 damaged blocks: run `tc build" in lines[2]
    assert len(lines) == 3


def test_out_below_a_file_and_over_a_file(teacher_folder, data, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    words = ("build", "--teacher", teacher_folder, "--data", data, *HERE, "--out")
    assert "Not a directory; pass another --out" in error_of(capsys, *words, tmp_path / "file/c.zarr")
    assert "exists and is not a cache: pass another --out" in error_of(capsys, *words, tmp_path / "file")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").touch()
    assert "exists and is not a cache: pass another --out" in error_of(capsys, *words, tmp_path / "full")


def room(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    usage = shutil.disk_usage("/")._replace(free=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)


def test_no_space_is_said_before_anything_is_written(teacher, data, tmp_path, monkeypatch):
    room(monkeypatch, 1000)
    line = r"c\.zarr needs 2\.64 kB more and its disk has 1 kB left: pass --out on another disk, or fewer --outputs, .*--limit"
    with pytest.raises(UserError, match=line):
        run_build(teacher, data, tmp_path / "c.zarr")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["squares"]
    room(monkeypatch, 2640)
    run_build(teacher, data, tmp_path / "c.zarr")
    room(monkeypatch, 0)
    run_build(teacher, data, tmp_path / "c.zarr")  # all of it is there


def test_no_space_to_grow_leaves_a_cache_whole_and_asks_for_what_is_new_alone(
    teacher, data, tmp_path, monkeypatch
):
    run_build(teacher, data, tmp_path / "c.zarr", views=4)
    before = tree(tmp_path / "c.zarr")
    one_view = 40 * (16 * 2 + store.open_cache(tmp_path / "c.zarr").fields["view_params"].shape[0] * 4)
    room(monkeypatch, one_view - 300)
    with pytest.raises(UserError, match="more and its disk has"):
        run_build(teacher, data, tmp_path / "c.zarr", views=5)
    assert tree(tmp_path / "c.zarr") == before
    room(monkeypatch, one_view)
    assert run_build(teacher, data, tmp_path / "c.zarr", views=5).blocks_left == 0


def test_a_copy_without_its_hidden_file_grows(teacher, data, tmp_path):
    run_build(teacher, data, tmp_path / "c.zarr")
    shutil.copytree(tmp_path / "c.zarr", tmp_path / "copy.zarr", ignore=shutil.ignore_patterns(store.LOCK))
    shutil.copytree(make_folder(tmp_path / "more", 3), data / "z")
    assert run_build(teacher, data, tmp_path / "copy.zarr").rows_written == 3


# ----------------------------------------------------------------------------------------------------
# Several builders of different data


def test_a_builder_of_fewer_rows_undoes_nothing(teacher, data, tmp_path):
    """One that began before the data grew meets blocks that the later one finished."""
    run_build(teacher, data, tmp_path / "c.zarr")
    early = store.open_cache(tmp_path / "c.zarr")
    for path in data.rglob("*.txt"):
        path.write_text(path.read_text() + "another\n")
    shutil.copytree(make_folder(tmp_path / "more", 13, texts=2), data / "z")
    run_build(teacher, data, tmp_path / "c.zarr")
    later = store.open_cache(tmp_path / "c.zarr")
    assert (early.meta.rows, later.meta.rows) == (40, 53)
    assert store.done_blocks(early) == set(range(5))
    assert store.done_blocks(later) == set(range(7))


def test_another_builder_that_died_over_a_block_leaves_it_to_be_computed_whole(teacher, data, tmp_path):
    """Texts are added; between the look at the records and the turn of block 1, its record goes."""
    run_build(teacher, data, tmp_path / "c.zarr")
    for path in data.rglob("*.txt"):
        path.write_text(path.read_text() + "another\n")
    counted, seen = counting(teacher)

    def encode(module, inputs):
        if seen["text"] == 0:
            store.forget_block(store.open_cache(tmp_path / "c.zarr"), 4)
        return counted.encode(module, inputs)

    run_build(dataclasses.replace(teacher, encode=encode), data, tmp_path / "c.zarr")
    assert seen == {"image": BLOCK, "text": 2 * 5 + BLOCK}  # the same text in all rows of two pieces a block
    run_build(teacher, data, tmp_path / "whole.zarr")
    assert tree(tmp_path / "c.zarr") == tree(tmp_path / "whole.zarr")


# ----------------------------------------------------------------------------------------------------
# Flipped bits


@pytest.fixture(scope="module")
def small(teacher, tmp_path_factory) -> Path:
    """A cache of three blocks, two texts and one view a row, with a bad picture and an empty text; its data."""
    folder = tmp_path_factory.mktemp("small")
    data = make_folder(folder / "data", 20, texts=2)
    spoil(data, 5)
    sorted(data.rglob("*.txt"))[3].write_text("one\n\n")
    run_build(teacher, data, folder / "c.zarr", views=1)
    return folder


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def test_a_flipped_bit_in_any_file_is_named_and_mended_by_building_its_block_alone(small, teacher, tmp_path):
    cache = shutil.copytree(small / "c.zarr", tmp_path / "c.zarr")
    whole, random = tree(cache), np.random.default_rng(0)
    names = [name for name in whole if name not in (store.LOCK, "zarr.json")]
    assert {name.split("/")[0] for name in names} > {"done", "key", "image_emb", "manifest.parquet"}
    for name in names:
        flip(cache / name, int(random.integers(8 * len(whole[name]))))
        opened = store.open_cache(cache)
        damaged, files = damaged_blocks(opened), damaged_files(opened)
        if not damaged and not files:
            assert is_harmless(name, whole[name], (cache / name).read_bytes()), name
            (cache / name).write_bytes(whole[name])
            continue
        for block, reason in damaged.items():
            assert name in reason or name == f"done/{block:08d}.json"
            store.forget_block(opened, block)
        assert list(files) == ([] if damaged else [name])
        counted, seen = counting(teacher)
        run_build(counted, small / "data", cache, views=1)
        rows = sum(len(opened.meta.block(block)) for block in damaged)
        assert seen == {"image": rows, "text": 2 * rows}
        assert len(damaged) + len(files) == 1
        assert tree(cache) == whole, name


def is_harmless(name: str, before: bytes, after: bytes) -> bool:
    """Whether a file still says the same: an escape in capitals in JSON."""
    return name.endswith(".json") and json.loads(before) == json.loads(after)


def test_every_bit_of_a_manifest(tmp_path):
    """Either the file is refused, or its rows, its root and its digest are what they were."""
    path = tmp_path / "m.parquet"
    manifest = read_manifest(str(make_folder(tmp_path / "data", 3, splits=True)))
    write_manifest(manifest, path)
    content, refused = path.read_bytes(), 0
    version = content.rindex(pa.cpp_version.encode())  # of pyarrow: a file of another version is not compared
    for bit in range(0, 8 * len(content), STEP):
        flip(path, bit)
        try:
            again = load_manifest(path)
            same = (
                again.table.equals(manifest.table)
                and again.root == manifest.root
                and again.data == manifest.data
            )
            assert (same and again.digest == manifest.digest) or digest_rows(
                again.table
            ) != manifest.digest, bit
        except UserError:
            refused += 1
        if bit % 7 == 0 and not version <= bit // 8 < version + len(pa.cpp_version):
            with contextlib.suppress(UserError):
                assert not is_as_written(path), bit
        path.write_bytes(content)
    assert is_as_written(path)
    assert refused > 8 * len(content) / STEP / 2


def test_a_manifest_is_as_written_whatever_its_chunks_and_its_writer(tmp_path):
    path = tmp_path / "m.parquet"
    manifest = read_manifest(str(make_folder(tmp_path / "data", 3)))
    many = dataclasses.replace(manifest, table=pa.concat_tables([manifest.table] * 30_000))
    write_manifest(many, path)
    assert is_as_written(path)
    first = path.read_bytes()
    write_manifest(load_manifest(path), path)
    assert path.read_bytes() == first
    stored = pq.read_table(path)
    old = {key: value for key, value in stored.schema.metadata.items() if key != b"checksum_of_all"}
    pq.write_table(stored.slice(0, 5).replace_schema_metadata(old), path)  # as an earlier version wrote it
    assert is_as_written(path)


def test_every_bit_of_the_groups_own_metadata_is_seen(small, tmp_path):
    path = tmp_path / "c.zarr"
    path.mkdir()
    content = (small / "c.zarr/zarr.json").read_bytes()
    for bit in range(0, 8 * len(content), STEP):
        (path / "zarr.json").write_bytes(content)
        flip(path / "zarr.json", bit)
        try:
            opened = store.open_cache(path)
        except UserError:
            continue
        same = json.loads((path / "zarr.json").read_bytes()) == json.loads(content)
        assert same or "zarr.json" in damaged_files(opened), bit


def test_verify_names_what_is_damaged_and_what_mends_it(
    small, teacher, teacher_folder, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    data = shutil.copytree(small / "data", tmp_path / "data")
    words = ("build", "--teacher", teacher_folder, "--data", data, "--out", "c.zarr", *HERE)
    assert run(*words) == 0
    assert run("verify", "c.zarr", "--samples", 8) == 0
    whole = tree(Path("c.zarr"))
    for name, says in (
        ("image_emb/zarr.json", "not the metadata"),
        ("quarantine.jsonl", "done records"),
        ("manifest.parquet", "manifest.parquet"),
    ):
        Path("c.zarr", name).write_bytes(whole[name][:-30])
        line = error_of(capsys, "verify", "c.zarr")
        assert f"{name}: damaged, run `tc build --teacher" in line
        assert run("verify", "c.zarr", "--json") == 2
        assert says in json.loads(capsys.readouterr().out)["files"][name]
        assert run(*words) == 0
        assert tree(Path("c.zarr")) == whole
    for name in ("manifest.parquet", "quarantine.jsonl", "text_emb/zarr.json"):
        Path("c.zarr", name).unlink()
        assert name in error_of(capsys, "verify", "c.zarr")
        assert run(*words) == 0
        assert tree(Path("c.zarr")) == whole
    flip(Path("c.zarr/zarr.json"), 8 * whole["zarr.json"].index(b"logit_scale") + 8 * 15)
    assert "zarr.json is damaged" in error_of(capsys, "verify", "c.zarr")
    assert "zarr.json is damaged" in error_of(capsys, *words)


def test_verify_of_an_unfinished_cache_is_not_whole_even_without_samples(small, tmp_path, capsys):
    shutil.copytree(small / "c.zarr", tmp_path / "c.zarr")
    store.forget_block(store.open_cache(tmp_path / "c.zarr"), 1)
    assert "not finished, 1 of 3 blocks" in error_of(capsys, "verify", tmp_path / "c.zarr", "--samples", 0)


def test_a_manifest_is_mended_in_the_order_of_the_cache_and_only_from_its_own_rows(teacher, tmp_path):
    data = make_folder(tmp_path / "data", 20)
    run_build(teacher, data, tmp_path / "c.zarr")
    shutil.copytree(make_folder(tmp_path / "more", 5), data / "a")  # sorts before what is there
    run_build(teacher, data, tmp_path / "c.zarr")
    whole, path = tree(tmp_path / "c.zarr"), tmp_path / "c.zarr/manifest.parquet"
    keys = pq.read_table(path)["key"].to_pylist()
    assert keys != sorted(keys)
    path.write_bytes(b"gone")
    store.forget_block(store.open_cache(tmp_path / "c.zarr"), 1)
    run_build(teacher, data, tmp_path / "c.zarr")
    assert tree(tmp_path / "c.zarr") == whole
    path.write_bytes(b"gone")
    next(data.rglob("*.txt")).write_text("another caption\n")
    with pytest.raises(UserError, match="has different rows: pass another --out"):
        run_build(teacher, data, tmp_path / "c.zarr")


@pytest.mark.parametrize("change", ["rows", "prune"])
def test_damage_is_never_taken_over_into_new_files(change: str, teacher, tmp_path):
    data = make_folder(tmp_path / "data", 20)
    run_build(teacher, data, tmp_path / "c.zarr")
    path = tmp_path / "c.zarr/image_emb/c/2/0"
    before = path.stat()
    flip(path, 100)
    os.utime(
        path, ns=(before.st_atime_ns, before.st_mtime_ns - 1_000_000_000)
    )  # as a bit that turns on the disk
    if change == "rows":
        shutil.copytree(make_folder(tmp_path / "more", 3), data / "z")
    else:
        sorted(data.rglob("*.png"))[0].unlink()
    with pytest.raises(UserError, match="a chunk file is damaged; run `tc verify`"):
        run_build(teacher, data, tmp_path / "c.zarr", prune=change == "prune")
    cache = store.open_cache(tmp_path / "c.zarr")
    assert list(damaged_blocks(cache)) == [2]
    run_build(teacher, data, tmp_path / "c.zarr", prune=change == "prune", repair=True)
    assert damaged_blocks(store.open_complete(tmp_path / "c.zarr")) == {}


# ----------------------------------------------------------------------------------------------------
# torchrun


def test_torchrun_with_a_killed_rank_ends_in_the_bytes_of_one_process(teacher, teacher_folder, tmp_path):
    data = make_folder(tmp_path / "data", 1200)
    launcher = Path(sys.executable).with_name("torchrun")
    options = {
        "--teacher": teacher_folder,
        "--data": data,
        "--out": tmp_path / "c.zarr",
        "--device": "cpu",
        "--workers": 1,
        "--batch-size": 5,
    }
    words = [launcher, "--standalone", "--nproc-per-node", 2, "-m", "teachercache", "build"]
    words = [str(word) for word in (*words, *(w for pair in options.items() for w in pair))]
    process = subprocess.Popen(
        words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    wait_for(lambda: list(tmp_path.glob("c.zarr/done/*.json")) or process.poll() is not None)
    os.kill(children_of(process.pid)[1], signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "SIGKILL" in err
    assert len(list(tmp_path.glob("c.zarr/done/*.json"))) < 5
    run_build(teacher, data, tmp_path / "c.zarr", block_rows=None)
    run_build(teacher, data, tmp_path / "undisturbed.zarr", block_rows=None)
    assert tree(tmp_path / "c.zarr") == tree(tmp_path / "undisturbed.zarr")


def children_of(parent: int) -> list[int]:
    found = []
    for entry in filter(lambda entry: entry.name.isdecimal(), Path("/proc").iterdir()):
        with contextlib.suppress(OSError):
            if int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == parent:
                found.append(int(entry.name))
    return sorted(found)
