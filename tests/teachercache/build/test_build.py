"""The build: what it stores, what it quarantines, and that no interruption changes a byte of the result."""

import contextlib
import dataclasses
import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from disturbed import BATCH, BLOCK, CONTEXT, Disturbed, mount_disk, run_build, wait_for
from PIL import Image
from processes import run_command
from small import make_folder, tree

from teachercache.build.probe import ROWS as PROBED
from teachercache.cache import store
from teachercache.cache.repair import damaged_blocks
from teachercache.teachers.registry import load
from teachercache.teachers.teacher import Teacher
from tests.teachercache.data.test_readers import make_tar

ROWS = 44  # six blocks, the last one in part


@pytest.fixture(scope="module")
def teacher(teacher_folder: Path) -> Teacher:
    return load(str(teacher_folder))


def quarantine(cache: store.Cache) -> list[dict]:
    return [json.loads(line) for line in (cache.path / "quarantine.jsonl").read_text().splitlines()]


def oracle(folder: Path, pictures: Sequence[Path], texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """open_clip's own model, transform and tokenizer, one row at a time."""
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    model.eval()
    with torch.no_grad():
        images = [model.encode_image(transform(Image.open(path))[None])[0].numpy() for path in pictures]
        words = [model.encode_text(tokenizer([text]))[0].numpy() for text in texts]
    return np.array(images), np.array(words)


def assert_stored(stored: np.ndarray, exact: np.ndarray) -> None:
    assert stored.dtype == np.float16
    np.testing.assert_allclose(stored.astype(np.float64), exact.reshape(stored.shape), rtol=2**-10, atol=1e-5)


# ----------------------------------------------------------------------------------------------------
# What is stored


def test_embeddings_equal_a_slow_loop_through_open_clip(teacher, teacher_folder, tmp_path):
    data = make_folder(tmp_path / "data", 21, texts=2)
    summary = run_build(teacher, data, tmp_path / "c.zarr")
    assert (summary.rows_written, summary.blocks_left, summary.quarantined) == (21, 0, 0)
    pictures = sorted(data.rglob("*.png"))
    texts = [line for path in pictures for line in path.with_suffix(".txt").read_text().splitlines()]
    images, words = oracle(teacher_folder, pictures, texts)
    cache = store.open_complete(tmp_path / "c.zarr")
    keys = [str(path.relative_to(data).with_suffix("")) for path in pictures]
    assert store.read_keys(cache).tolist() == keys
    assert_stored(store.read_field(cache, "image_emb"), images)
    assert_stored(store.read_field(cache, "text_emb"), words)
    assert store.read_field(cache, "valid").all()
    assert store.read_field(cache, "text_valid").all()
    assert cache.meta.spec.constants["logit_scale"] == pytest.approx(np.log(1 / 0.07))
    assert cache.meta.precision == "float32"


def test_rows_with_fewer_texts_are_filled_up_and_masked(teacher, teacher_folder, tmp_path):
    data = make_folder(tmp_path / "data", 6)
    first, second = sorted(data.rglob("*.txt"))[:2]
    first.write_text("one\ntwo\nthree\n")
    second.write_text("four\n \nfive\n")
    cache = run_build(teacher, data, tmp_path / "c.zarr").cache
    mask = store.read_field(cache, "text_valid")
    assert mask.tolist() == [[True] * 3, [True, False, True], *[[True, False, False]] * 4]
    assert store.read_field(cache, "valid").all()
    stored = store.read_field(cache, "text_emb")
    assert (stored[~mask] == 0).all()
    _, words = oracle(teacher_folder, [], ["one", "two", "three", "four", "five"])
    assert_stored(stored[:2][mask[:2]], words)
    assert quarantine(cache) == [{"row": 1, "key": "class0/003", "text": 1, "reason": "empty text"}]


def test_pictures_alone_and_texts_alone(teacher, tmp_path):
    make_folder(tmp_path, 3)
    lines = [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*.png"))]
    (tmp_path / "l.csv").write_text("\n".join(["image", *lines]) + "\n")
    pictures = run_build(teacher, tmp_path / "l.csv", tmp_path / "pictures.zarr").cache
    assert list(pictures.fields) == ["valid", "image_emb"]
    assert store.read_field(pictures, "valid").all()
    tar = make_tar(tmp_path / "t.tar", [("a.txt", "one"), ("b.txt", ""), ("c.txt", "two")])
    texts = run_build(teacher, tar, tmp_path / "texts.zarr").cache
    assert list(texts.fields) == ["valid", "text_valid", "text_emb"]
    assert store.read_field(texts, "valid").tolist() == [True, False, True]
    assert (store.read_field(texts, "text_emb")[[0, 2]] != 0).any(axis=(1, 2)).all()


def test_bfloat16_is_near_and_recorded(teacher_folder, tmp_path):
    data = make_folder(tmp_path / "data", 8)
    exact = run_build(load(str(teacher_folder)), data, tmp_path / "a.zarr").cache
    rough = run_build(load(str(teacher_folder)), data, tmp_path / "b.zarr", dtype="bfloat16").cache
    assert rough.meta.precision == "bfloat16"
    a, b = (store.read_field(cache, "image_emb").astype(float) for cache in (exact, rough))
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert 0.99 < cosine.min() < 1 - 1e-9


# ----------------------------------------------------------------------------------------------------
# What is quarantined


def test_bad_rows_are_zero_named_and_alone(teacher, teacher_folder, tmp_path):
    make_folder(tmp_path, 9)
    good = sorted(tmp_path.rglob("*.png"))
    truncated = tmp_path / "truncated.png"
    truncated.write_bytes(good[0].read_bytes()[:200])
    (tmp_path / "html.jpg").write_text("<html>404</html>")
    buffer = io.BytesIO()
    Image.new("1", (30_000, 30_000)).save(buffer, "PNG")
    (tmp_path / "bomb.png").write_bytes(buffer.getvalue())
    lines = [(str(path.relative_to(tmp_path)), f"text {i}") for i, path in enumerate(good)]
    lines[2:2] = [("truncated.png", "t")]
    lines[5:5] = [("html.jpg", "t"), ("gone.png", "t")]
    lines[9:9] = [("bomb.png", "t")]
    lines[1] = (lines[1][0], "  ")
    (tmp_path / "l.csv").write_text("".join(f"{name},{text}\n" for name, text in [("image", "text"), *lines]))

    cache = run_build(teacher, tmp_path / "l.csv", tmp_path / "c.zarr").cache
    valid = store.read_field(cache, "valid")
    wrong = [1, 2, 5, 6, 9]
    assert np.flatnonzero(~valid).tolist() == wrong
    reasons: dict[int, str] = {}
    for entry in quarantine(cache):
        reasons[entry["row"]] = f"{reasons.get(entry['row'], '')} {entry['reason']}"
    assert list(reasons) == wrong
    expected = ("has no text", "damaged", "not a picture", "No such file", "bomb")
    assert all(words in reasons[row] for words, row in zip(expected, wrong, strict=True))
    keys = store.read_keys(cache)
    assert all(entry["key"] == keys[entry["row"]] for entry in quarantine(cache))
    pictures = store.read_field(cache, "image_emb")
    assert (pictures[wrong[1:]] == 0).all()
    assert (pictures[1] != 0).any()  # the row has no text; it may gain one, and its picture is good
    assert (store.read_field(cache, "text_emb")[1] == 0).all()
    rest = [i for i in range(len(valid)) if valid[i]]
    names, texts = zip(*(lines[i] for i in rest), strict=True)
    images, words = oracle(teacher_folder, [tmp_path / name for name in names], texts)
    assert_stored(pictures[rest], images)
    assert_stored(store.read_field(cache, "text_emb")[rest], words)


def spoiled(teacher: Teacher, field: str, row: int, value: float) -> Teacher:
    """The same teacher that answers `value` for one row of the whole data, when it is built behind the probe."""
    seen = {"image_emb": -PROBED, "text_emb": -PROBED}

    def encode(module, inputs):
        outputs = teacher.encode(module, inputs)
        for name, tensor in outputs.items():
            if name == field and seen[name] <= row < seen[name] + len(tensor):
                tensor[row - seen[name], 3] = value
            seen[name] += len(tensor)
        return outputs

    return dataclasses.replace(teacher, encode=encode)


@pytest.mark.parametrize("field", ["image_emb", "text_emb"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_row_for_which_the_teacher_is_not_finite(teacher, tmp_path, field: str, value: float):
    data = make_folder(tmp_path / "data", 12)
    plain = run_build(teacher, data, tmp_path / "plain.zarr").cache
    cache = run_build(spoiled(teacher, field, 7, value), data, tmp_path / "c.zarr").cache
    assert np.flatnonzero(~store.read_field(cache, "valid")).tolist() == [7]
    key = store.read_keys(cache)[7]
    place = {"text": 0} if field == "text_emb" else {}
    assert quarantine(cache) == [{"row": 7, "key": key, "reason": f"{field} is not finite"} | place]
    expected = np.array(store.read_field(plain, field))
    expected[7] = 0
    assert np.array_equal(store.read_field(cache, field), expected)


@pytest.mark.parametrize("value", [70_000.0, -1e30])
def test_overflow_of_float16_is_the_reason_of_its_row(teacher, tmp_path, value: float):
    data = make_folder(tmp_path / "data", 12)
    cache = run_build(spoiled(teacher, "image_emb", 8, value), data, tmp_path / "c.zarr").cache
    reason = "image_emb is too large for float16"
    assert quarantine(cache) == [{"row": 8, "key": "class2/002", "reason": reason}]
    run_build(teacher, data, tmp_path / "c.zarr", retry=True)
    run_build(teacher, data, tmp_path / "plain.zarr")
    assert tree(tmp_path / "c.zarr") == tree(tmp_path / "plain.zarr")


# ----------------------------------------------------------------------------------------------------
# Interruptions; those of builds that grow or prune a cache are in test_faults.py


@pytest.fixture(scope="module")
def disturbed(tmp_path_factory, teacher_folder, teacher) -> Disturbed:
    folder = tmp_path_factory.mktemp("disturbed")
    data = make_folder(folder / "data", ROWS, texts=2)
    truncated = sorted(data.rglob("*.png"))[20]
    truncated.write_bytes(truncated.read_bytes()[:100])
    return Disturbed(folder, teacher_folder, data)


def test_sigkill_at_instants_all_over_the_build(disturbed, tmp_path):
    left = disturbed.assert_survives_kills(tmp_path / "events", 10)
    assert (left[0], left[-1]) == (ROWS, 0)
    assert len(set(left)) >= 4  # kills fell into several blocks


def test_killed_again_and_again(disturbed, tmp_path):
    out, half = disturbed.new_out(), disturbed.num_events(tmp_path / "events") // 2
    tries = 0
    while disturbed.kill_at_event(out, half):
        tries += 1
        assert tries < 20
    assert tries >= 2
    assert disturbed.finish(out).rows_written == 0


@pytest.mark.parametrize("delay", [0.0, 0.05, 0.15, 0.25])
def test_sigkill_from_outside_at_any_time(disturbed, delay: float):
    out = disturbed.new_out()
    process = disturbed.start(out, pause=0.03)
    wait_for(lambda: out.parent.exists())
    time.sleep(delay)
    process.kill()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert disturbed.finish(out).rows_written > 0


@pytest.mark.parametrize("records", [1, 3])
def test_sigkill_right_after_a_done_record(disturbed, records: int):
    out = disturbed.new_out()
    process = disturbed.start(out, pause=0.03)
    wait_for(lambda: len(list(out.glob("done/*.json"))) >= records)
    process.kill()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    done = len(list(out.glob("done/*.json")))
    assert disturbed.finish(out).rows_written == ROWS - done * BLOCK


def test_sigkill_of_the_real_command(teacher, teacher_folder, tmp_path):
    data = make_folder(tmp_path / "data", 1100)
    options = {"--teacher": teacher_folder, "--data": data, "--out": tmp_path / "c.zarr", "--device": "cpu"}
    options |= {"--workers": 1, "--batch-size": BATCH}
    words = ["build", *(str(word) for option in options.items() for word in option)]
    with subprocess.Popen(
        [sys.executable, "-m", "teachercache", *words], stderr=subprocess.DEVNULL
    ) as process:
        wait_for(lambda: list(tmp_path.glob("c.zarr/done/*.json")))
        process.kill()
        process.wait(60)
    assert process.returncode == -signal.SIGKILL
    assert len(list(tmp_path.glob("c.zarr/done/*.json"))) < 5
    again = run_command("tc", *words)
    assert again.returncode == 0
    assert again.stdout == ""
    assert "c.zarr is complete: 1,100 rows" in again.stderr
    run_build(teacher, data, tmp_path / "undisturbed.zarr", block_rows=None)
    assert tree(tmp_path / "c.zarr") == tree(tmp_path / "undisturbed.zarr")


def test_building_a_finished_cache_again_changes_nothing(disturbed):
    out = disturbed.new_out()
    disturbed.finish(out)
    times = {path: path.stat().st_mtime_ns for path in out.rglob("c/*") if path.is_file()}
    assert disturbed.finish(out).rows_written == 0
    assert times == {path: path.stat().st_mtime_ns for path in times}


def test_workers_do_not_change_a_byte(disturbed):
    out = disturbed.new_out()
    process = disturbed.start(out, workers=2)
    process.join(60)
    assert process.exitcode == 0
    assert disturbed.finish(out).rows_written == 0


def test_forgotten_block_is_built_again_from_damaged_files(disturbed):
    out = disturbed.new_out()
    cache = disturbed.finish(out).cache
    for block in (1, cache.meta.num_blocks - 1):
        for name in ("image_emb", "key"):
            path = store.chunk_path(cache, name, block)
            path.write_bytes(path.read_bytes()[::-1])
    for block in damaged_blocks(cache):
        store.forget_block(cache, block)
    assert disturbed.finish(out).rows_written == BLOCK + ROWS % BLOCK


def test_a_cache_with_other_block_rows_is_finished_with_its_own(disturbed, teacher):
    out = disturbed.new_out()
    cache = disturbed.finish(out).cache
    for block in (0, 3):
        store.forget_block(cache, block)
    summary = run_build(teacher, disturbed.data, out, block_rows=None)  # other sizes
    assert (summary.rows_written, summary.blocks_left) == (2 * BLOCK, 0)
    assert tree(out) == disturbed.expected


# ----------------------------------------------------------------------------------------------------
# Several builders


@pytest.mark.parametrize("ranks", [False, True], ids=["two-terminals", "torchrun"])
def test_two_builders_share_the_blocks(disturbed, tmp_path, ranks: bool):
    out = disturbed.new_out()
    processes = []
    for i in range(2):
        env = {"RANK": str(i), "LOCAL_RANK": str(i), "WORLD_SIZE": "2"} if ranks else {}
        processes.append(disturbed.start(out, pause=0.05, env=env, rows=tmp_path / f"rows{i}"))
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    shares = [int((tmp_path / f"rows{i}").read_text()) for i in range(2)]
    assert min(shares) > 0
    assert sum(shares) == ROWS
    assert disturbed.finish(out).rows_written == 0


def test_the_other_builders_block_is_left_to_it_and_free_when_it_dies(disturbed, teacher):
    out = disturbed.new_out()
    process = disturbed.start(out, pause=0.2)
    wait_for(lambda: (out / store.LOCK).exists())
    wait_for(lambda: Path("/proc/locks").read_text().count(f":{(out / store.LOCK).stat().st_ino} "))
    os.kill(process.pid, signal.SIGSTOP)
    try:
        summary = run_build(teacher, disturbed.data, out)
        assert summary.blocks_left >= 1
        assert summary.rows_written < ROWS
        assert not (out / "quarantine.jsonl").exists()
    finally:
        process.kill()
        process.join(60)
    assert disturbed.finish(out).rows_written > 0


# ----------------------------------------------------------------------------------------------------
# Disks


@pytest.mark.parametrize("call", [0, 3, 6, 20])
def test_disk_that_fills_while_a_block_is_flushed(disturbed, teacher, monkeypatch, call: int):
    out, calls = disturbed.new_out(), [0]
    fsync = os.fsync

    def full(descriptor: int) -> None:
        calls[0] += 1
        if calls[0] > call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        run_build(teacher, disturbed.data, out)
    monkeypatch.undo()
    assert not (out / "quarantine.jsonl").exists()
    assert disturbed.finish(out).rows_written > 0


def build_on_a_tiny_disk(teacher_folder: Path, data: Path, disk: Path, sizes: list[int], result: Path):
    """Build on a disk that is too small, grow it, build again; done blocks after each try, and the cache."""
    done = []
    teacher = load(str(teacher_folder))
    for i, size in enumerate(sizes):
        try:
            mount_disk(disk, size, again=i > 0)
        except PermissionError as error:
            result.with_suffix(".skip").write_text(str(error))
            return
        with contextlib.suppress(OSError):
            run_build(teacher, data, disk / "c.zarr")
        done.append(len(list(disk.glob("c.zarr/done/*.json"))))
    shutil.copytree(disk / "c.zarr", result)
    result.with_suffix(".json").write_text(json.dumps(done))


def test_disk_that_is_really_full(disturbed, tmp_path):
    disk, result = tmp_path / "disk", tmp_path / "result"
    disk.mkdir()
    sizes = [16 << 10, 100 << 10, 160 << 10, 8 << 20]
    arguments = (disturbed.teacher_folder, disturbed.data, disk, sizes, result)
    process = CONTEXT.Process(target=build_on_a_tiny_disk, args=arguments)
    process.start()
    process.join(60)
    assert process.exitcode == 0
    if result.with_suffix(".skip").exists():
        pytest.skip(result.with_suffix(".skip").read_text())
    done = json.loads(result.with_suffix(".json").read_text())
    assert done[0] == 0
    assert done[1] < done[2] < done[3] == 6
    assert tree(result) == disturbed.expected
