"""Rows that share a picture or a text, as questions about one photo do: looked at once in a batch, told of each row."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from disturbed import BATCH, Disturbed, run_build
from PIL import Image
from small import counting

from evaluation.models.encoder import embed_images, of_teacher
from teachercache.build import loop
from teachercache.build.decode import WorkItem
from teachercache.build.forward import rows_for
from teachercache.cache import store
from teachercache.data.read import read_manifest
from teachercache.data.views import Augment
from teachercache.teachers.registry import load
from teachercache.teachers.teacher import Teacher

PER_PICTURE = 4


def questions(folder: Path, pictures: int = 6) -> Path:
    """VQA v2: four questions about each picture, the third picture is broken, answers are few."""
    (folder / "val2014").mkdir(parents=True)
    asked, given = [], []
    for image in range(pictures):
        path = folder / f"val2014/COCO_val2014_{image:012d}.jpg"
        pixels = np.random.default_rng(image).integers(0, 255, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path, quality=95)
        if image == 2:
            path.write_bytes(b"odd")
        for k in range(PER_PICTURE):
            number = 10 * image + k
            asked.append({"question_id": number, "image_id": image, "question": f"what is it, {number}?"})
            answer = {"multiple_choice_answer": "yes", "answers": [{"answer": "yes"}] * 10}
            given.append({"question_id": number, "image_id": image, **answer})
    path = folder / "v2_OpenEnded_mscoco_val2014_questions.json"
    path.write_text(json.dumps({"data_subtype": "val2014", "questions": asked}))
    (folder / "v2_mscoco_val2014_annotations.json").write_text(json.dumps({"annotations": given}))
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return questions(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def teacher(teacher_folder: Path) -> Teacher:
    return load(str(teacher_folder))


def distinct(rows: range, of: dict[int, object]) -> int:
    return len({of[row] for row in rows})


def test_a_batch_looks_once_at_what_its_rows_share(teacher, data, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "probe_teacher", lambda teacher, *rest: (teacher, rest[-1]))
    counted, seen = counting(teacher)
    manifest = read_manifest(str(data))
    run_build(counted, data, tmp_path / "c.zarr", block_rows=256)
    batches = [range(start, min(start + BATCH, 24)) for start in range(0, 24, BATCH)]
    picture = dict(enumerate(manifest.column("image")))
    assert seen["image"] == sum(distinct(rows, picture) for rows in batches) == 9
    assert seen["text"] == 24 + len(batches)  # all questions are different, all answers `yes`

    cache = store.open_complete(tmp_path / "c.zarr")
    run_build(teacher, data, tmp_path / "one.zarr", block_rows=256, batch_size=1)
    alone = store.open_complete(tmp_path / "one.zarr")
    for name in ("image_emb", "text_emb"):
        values = store.read_field(cache, name)
        np.testing.assert_allclose(values, store.read_field(alone, name), atol=2e-3)
    images, texts = store.read_field(cache, "image_emb"), store.read_field(cache, "text_emb")
    for row in range(24):
        np.testing.assert_allclose(images[row], images[row - row % PER_PICTURE], atol=2e-3)
        np.testing.assert_allclose(texts[row, 1], texts[0, 1], atol=2e-3)
    assert not np.allclose(images[0], images[PER_PICTURE], atol=1e-2)
    assert not np.allclose(texts[0, 0], texts[1, 0], atol=1e-2)


def test_every_row_of_a_broken_picture_is_quarantined(teacher, data, tmp_path):
    run_build(teacher, data, tmp_path / "c.zarr")
    cache = store.open_complete(tmp_path / "c.zarr")
    bad = range(2 * PER_PICTURE, 3 * PER_PICTURE)
    assert [entry["row"] for entry in store.quarantined(cache)] == [*bad]
    assert [entry["key"] for entry in store.quarantined(cache)] == [f"2{k}" for k in range(PER_PICTURE)]
    assert np.flatnonzero(~store.read_field(cache, "valid")).tolist() == [*bad]
    assert not store.read_field(cache, "image_emb")[bad].any()
    assert store.read_field(cache, "text_emb")[bad].any(2).all()


def test_augmented_views_are_each_rows_own(teacher, data):
    rows = rows_for(teacher, read_manifest(str(data)), Augment())
    batch = rows.__getitems__(WorkItem((0, 1, 4), range(2)))
    assert batch["image"].shape[:2] == (2, 3)
    assert not torch.equal(batch["image"][:, 0], batch["image"][:, 1])
    assert not np.array_equal(batch["view_params"][0], batch["view_params"][1])


def test_killed_and_resumed_is_the_same(teacher_folder, data, tmp_path):
    disturbed = Disturbed(tmp_path, teacher_folder, data)
    out = disturbed.new_out()
    assert disturbed.kill_at_event(out, disturbed.num_events(tmp_path / "events") * 3 // 4)
    assert 0 < disturbed.finish(out).rows_written < 24


def test_an_evaluation_has_a_row_for_each(teacher, data):
    manifest, encoder = read_manifest(str(data)), of_teacher(teacher)
    rows = [0, 4, 1, 9, 5]
    found, kept, skipped = embed_images(encoder, manifest, rows)
    assert kept == [0, 4, 1, 5]
    assert [entry["row"] for entry in skipped] == [9]
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[3])
    assert not torch.allclose(found[0], found[1], atol=1e-3)
