"""Caches that grow: more rows, texts and views without computing anything twice; and pruned ones."""

import dataclasses
import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from PIL import Image
from small import counting, make_folder, tree

from teachercache.build.loop import BuildOptions, Summary, build
from teachercache.build.target import open_target, replace_pruned
from teachercache.cache import store
from teachercache.cache.repair import damaged_blocks
from teachercache.core.device import Precision
from teachercache.core.errors import UserError
from teachercache.data.manifest import Manifest
from teachercache.data.pictures import read_image
from teachercache.data.read import read_manifest
from teachercache.data.views import PARAMS, Augment, draw_params, replay_view
from teachercache.teachers.registry import load
from teachercache.teachers.teacher import Teacher

BLOCK, BATCH = 8, 5


@pytest.fixture(scope="module")
def teacher(teacher_folder: Path) -> Teacher:
    return load(str(teacher_folder))


def run_build(teacher: Teacher, data: Path | Manifest, out: Path, **options) -> Summary:
    manifest = data if isinstance(data, Manifest) else read_manifest(str(data))
    sizes = {"batch_size": BATCH, "workers": 0, "device": "cpu", "block_rows": BLOCK}
    return build(
        teacher, manifest, out, BuildOptions(precision=Precision("float32", "a test"), **(sizes | options))
    )


def fields_of(path: Path) -> dict[str, np.ndarray]:
    cache = store.open_complete(path)
    return {name: np.array(store.read_field(cache, name)) for name in cache.fields}


# ----------------------------------------------------------------------------------------------------
# Views


def test_views_are_what_the_teacher_says_of_the_replayed_picture(teacher, tmp_path):
    data = make_folder(tmp_path / "data", 11)
    cache = run_build(teacher, data, tmp_path / "c.zarr", views=3).cache
    manifest = read_manifest(str(data))
    image, params = (store.read_field(cache, name) for name in ("image_emb", "view_params"))
    assert (image.shape, params.shape) == ((11, 3, 16), (11, 3, len(PARAMS)))
    replay = replay_view(teacher.spec.view)
    for row in range(11):
        picture = read_image(manifest, manifest.row(row))
        for v in range(3):
            expected = draw_params(
                Augment(), manifest.row(row).key, v, width=picture.width, height=picture.height
            )
            assert np.array_equal(params[row, v], expected)
            with torch.no_grad():
                live = teacher.module.encode_image(replay(picture, params[row, v])[None])[0].numpy()
            cosine = live @ image[row, v].astype(np.float32) / np.linalg.norm(live)
            assert cosine / np.linalg.norm(image[row, v].astype(np.float32)) > 0.9999
    assert len(np.unique(params.reshape(33, -1), axis=0)) == 33
    group = zarr.open(cache.path, mode="r")
    assert np.array_equal(group["image_emb"][:], image)
    assert group["image_emb"].metadata.dimension_names == ("row", "view", "dim")
    assert group["view_params"].attrs["doc"].split(", ") == list(PARAMS)


def test_more_views_later_are_the_same_bytes_and_only_they_are_computed(teacher, tmp_path):
    data = make_folder(tmp_path / "data", 21)
    bad = sorted(data.rglob("*.png"))[4]
    bad.write_bytes(b"no picture")
    run_build(teacher, data, tmp_path / "whole.zarr", views=6)
    run_build(teacher, data, tmp_path / "c.zarr", views=2)
    counted, seen = counting(teacher)
    run_build(counted, data, tmp_path / "c.zarr", views=6)
    assert seen == {"image": 4 * 21, "text": 0}
    assert tree(tmp_path / "c.zarr") == tree(tmp_path / "whole.zarr")
    before = tree(tmp_path / "c.zarr")
    run_build(counted, data, tmp_path / "c.zarr", views=3)  # it holds more than is asked
    assert seen["image"] == 4 * 21
    assert tree(tmp_path / "c.zarr") == before


def test_nan_in_a_view_that_is_added_marks_the_row(teacher, tmp_path):
    data = make_folder(tmp_path / "data", 10)
    run_build(teacher, data, tmp_path / "c.zarr", views=1)
    shown = [0]

    def encode(module, inputs):
        outputs = teacher.encode(module, inputs)
        if shown[0] == 5:  # the second batch: rows 5, 6 and 7 in view 1
            outputs["image_emb"][1, 3] = float("nan")
        shown[0] += len(inputs["image"])
        return outputs

    cache = run_build(dataclasses.replace(teacher, encode=encode), data, tmp_path / "c.zarr", views=2).cache
    valid = store.read_field(cache, "valid")
    assert np.flatnonzero(~valid).tolist() == [6]
    (line,) = (cache.path / "quarantine.jsonl").read_text().splitlines()
    key = store.read_keys(cache)[6]
    assert json.loads(line) == {"row": 6, "key": key, "reason": "image_emb is not finite", "view": 1}
    assert (store.read_field(cache, "image_emb")[6, 1] == 0).all()
    assert (store.read_field(cache, "image_emb")[6, 0] != 0).any()


def test_views_and_no_views_are_two_caches(teacher, tmp_path):
    data = make_folder(tmp_path / "data", 4)
    run_build(teacher, data, tmp_path / "c.zarr")
    with pytest.raises(UserError, match="views: 0 stored, 2 requested"):
        run_build(teacher, data, tmp_path / "c.zarr", views=2)
    run_build(teacher, data, tmp_path / "v.zarr", views=2)
    with pytest.raises(UserError, match=r"augment.flip: 0.5 stored, 0 requested"):
        run_build(teacher, data, tmp_path / "v.zarr", views=2, augment=Augment(flip=0))


def test_views_of_texts_alone(teacher, tmp_path):
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    with pytest.raises(UserError, match="has no pictures; leave --views away"):
        run_build(teacher, tmp_path / "names.txt", tmp_path / "c.zarr", views=2)


# ----------------------------------------------------------------------------------------------------
# Rows and texts


def test_rows_that_were_added_come_behind_and_nothing_is_computed_twice(teacher, tmp_path):
    data = make_folder(tmp_path / "data", 21)
    late = sorted(data.rglob("*"))[3:13]
    hidden = {path: path.read_bytes() for path in late if path.is_file()}
    for path in hidden:
        path.unlink()
    first = run_build(teacher, data, tmp_path / "c.zarr")
    keys, before = store.read_keys(first.cache).tolist(), fields_of(tmp_path / "c.zarr")
    for path, content in hidden.items():
        path.write_bytes(content)
    counted, seen = counting(teacher)
    added = sum(path.suffix == ".png" for path in hidden)
    assert run_build(counted, data, tmp_path / "c.zarr").rows_written == added == 5
    assert seen == {"image": added, "text": added}
    cache = store.open_complete(tmp_path / "c.zarr")
    assert store.read_keys(cache).tolist()[: len(keys)] == keys
    after = fields_of(tmp_path / "c.zarr")
    assert all(np.array_equal(after[name][: len(keys)], before[name]) for name in before)
    run_build(teacher, data, tmp_path / "whole.zarr")
    place = store.join(store.open_complete(tmp_path / "whole.zarr"), store.read_keys(cache).tolist())
    whole = fields_of(tmp_path / "whole.zarr")
    for name, values in after.items():
        np.testing.assert_allclose(values.astype(float), whole[name][place].astype(float), atol=2e-3)
    assert damaged_blocks(cache) == {}
    assert np.array_equal(zarr.open(cache.path, mode="r")["key"][:], store.read_keys(cache))


def test_data_in_another_order_is_the_same_cache(teacher, tmp_path):
    make_folder(tmp_path / "data", 9)
    names = [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*.png"))]
    for order in (names, names[::-1]):
        (tmp_path / "l.csv").write_text("image,text\n" + "".join(f"{name},{name}\n" for name in order))
        assert run_build(teacher, tmp_path / "l.csv", tmp_path / "c.zarr").rows_written == (
            9 if order is names else 0
        )
    assert [f"{key}.png" for key in store.read_keys(store.open_cache(tmp_path / "c.zarr"))] == names


def test_texts_that_were_added(teacher, tmp_path):
    data = make_folder(tmp_path / "data", 19)
    (sorted(data.rglob("*.txt"))[3]).write_text("  \n")  # a row that cannot be used until it gains a text
    run_build(teacher, data, tmp_path / "c.zarr")
    for path in data.rglob("*.txt"):
        path.write_text(path.read_text() + "another\nand one more\n")
    counted, seen = counting(teacher)
    run_build(counted, data, tmp_path / "c.zarr")
    assert seen == {
        "image": 0,
        "text": 2 * 5,
    }  # in each of five batches the two texts that all rows gained, once
    run_build(teacher, data, tmp_path / "whole.zarr")
    assert tree(tmp_path / "c.zarr") == tree(tmp_path / "whole.zarr")
    assert store.read_field(store.open_complete(tmp_path / "c.zarr"), "valid").all()


def test_rows_views_and_texts_at_once(teacher, tmp_path):
    data = make_folder(tmp_path / "data", 19)
    run_build(teacher, data, tmp_path / "c.zarr", views=1)
    for path in data.rglob("*.txt"):
        path.write_text(path.read_text() + "another\n")
    make_folder(tmp_path / "more", 7, texts=2)
    shutil.copytree(tmp_path / "more", data / "z")
    run_build(teacher, data, tmp_path / "c.zarr", views=2)
    run_build(teacher, data, tmp_path / "whole.zarr", views=2)
    grown, whole = fields_of(tmp_path / "c.zarr"), fields_of(tmp_path / "whole.zarr")
    assert grown["text_emb"].shape == (26, 2, 16)
    for name in grown:
        np.testing.assert_allclose(grown[name].astype(float), whole[name].astype(float), atol=2e-3)
    assert tree(tmp_path / "c.zarr")["zarr.json"] == tree(tmp_path / "whole.zarr")["zarr.json"]


def test_the_command_of_a_cache_builds_it(teacher, tmp_path):
    from click.testing import CliRunner

    from teachercache.cli import tc

    data = make_folder(tmp_path / "data", 6)
    drawn = Augment(flip=0.0, scale_min=0.75)
    cache = run_build(teacher, data, tmp_path / "c.zarr", views=2, augment=drawn, block_rows=None).cache
    words = shlex.split(cache.command().replace(str(cache.path), str(tmp_path / "again.zarr")))
    assert words[-4:] == ["--augment", "scale_min=0.75", "--augment", "flip=0"]
    sizes = ["--batch-size", str(BATCH), "--workers", "0", "--device", "cpu"]
    result = CliRunner().invoke(tc, [*words[1:], *sizes])
    assert result.exit_code == 0, result.output
    assert tree(tmp_path / "again.zarr") == tree(tmp_path / "c.zarr")


def test_data_that_moved_is_remembered(teacher, tmp_path):
    data = make_folder(tmp_path / "data", 6)
    run_build(teacher, data, tmp_path / "c.zarr")
    data.rename(tmp_path / "moved")
    assert run_build(teacher, tmp_path / "moved", tmp_path / "c.zarr").rows_written == 0
    cache = store.open_complete(tmp_path / "c.zarr")
    assert cache.meta.data == str(tmp_path / "moved")
    assert store.cached_manifest(cache).root == tmp_path / "moved"


def test_a_limit_that_is_raised(teacher, tmp_path):
    data = make_folder(tmp_path / "data", 30)
    for limit in (5, 17):
        run_build(teacher, read_manifest(str(data), limit=limit), tmp_path / "c.zarr", limit=limit)
    cache = store.open_complete(tmp_path / "c.zarr")
    assert (cache.meta.rows, cache.meta.limit) == (17, 17)
    assert "--limit 17" in cache.command()


def test_growth_that_was_killed_before_its_last_file_is_not_seen(teacher, tmp_path, monkeypatch):
    data = make_folder(tmp_path / "data", 20)
    run_build(teacher, read_manifest(str(data), limit=12), tmp_path / "c.zarr")
    before = fields_of(tmp_path / "c.zarr")

    class Killed(Exception):
        pass

    def write(path: Path, content: bytes) -> None:
        if path == tmp_path / "c.zarr" / "zarr.json":
            raise Killed
        path.write_bytes(content)

    monkeypatch.setattr("teachercache.build.target.write_whole", write)
    with pytest.raises(Killed):
        run_build(teacher, data, tmp_path / "c.zarr")
    monkeypatch.undo()
    cache = store.open_complete(tmp_path / "c.zarr")
    assert len(store.read_keys(cache)) == 12
    assert all(np.array_equal(values, before[name]) for name, values in fields_of(cache.path).items())
    assert run_build(teacher, data, tmp_path / "c.zarr").rows_written == 8


# ----------------------------------------------------------------------------------------------------
# Pruning


def damage(data: Path) -> tuple[int, int]:
    """Remove two rows, change the picture of one and the text of another, add one: rows now, rows to compute."""
    pictures = sorted(data.rglob("*.png"))
    for path in (pictures[0], pictures[9]):
        path.unlink()
        path.with_suffix(".txt").unlink()
    Image.new("RGB", (30, 31)).save(pictures[5])
    pictures[12].with_suffix(".txt").write_text("something else\n")
    Image.new("RGB", (8, 8), "red").save(data / "new.png")
    (data / "new.txt").write_text("red\n")
    return len(pictures) - 1, 3


@pytest.mark.parametrize("views", [0, 2])
def test_lost_and_changed_rows_are_named_and_prune_follows(teacher, tmp_path, views: int):
    data = make_folder(tmp_path / "data", 21)
    run_build(teacher, data, tmp_path / "c.zarr", views=views)
    rows, computed = damage(data)
    before = tree(tmp_path / "c.zarr")
    with pytest.raises(
        UserError, match=r"2 rows are gone \(class0/000, .*\) and 2 rows changed \(.*--prune"
    ) as error:
        run_build(teacher, data, tmp_path / "c.zarr", views=views)
    assert "\n" not in str(error.value)
    assert tree(tmp_path / "c.zarr") == before
    counted, seen = counting(teacher)
    summary = run_build(counted, data, tmp_path / "c.zarr", views=views, prune=True)
    assert (summary.cache.path, summary.rows_written) == (tmp_path / "c.zarr", computed)
    assert seen == {"image": computed * max(views, 1), "text": computed}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.zarr", "data"]
    cache = store.open_complete(tmp_path / "c.zarr")
    run_build(teacher, data, tmp_path / "whole.zarr", views=views)
    place = store.join(store.open_complete(tmp_path / "whole.zarr"), store.read_keys(cache).tolist())
    assert sorted(place) == list(range(rows))
    whole = fields_of(tmp_path / "whole.zarr")
    for name, values in fields_of(tmp_path / "c.zarr").items():
        np.testing.assert_allclose(values.astype(float), whole[name][place].astype(float), atol=2e-3)
    assert damaged_blocks(cache) == {}
    assert run_build(teacher, data, tmp_path / "c.zarr", views=views).rows_written == 0


def test_prune_keeps_what_is_known_of_bad_rows(teacher, tmp_path):
    data = make_folder(tmp_path / "data", 21)
    bad = sorted(data.rglob("*.png"))[17]
    bad.write_bytes(b"no picture")
    run_build(teacher, data, tmp_path / "c.zarr")
    damage(data)
    cache = run_build(teacher, data, tmp_path / "c.zarr", prune=True).cache
    (row,) = np.flatnonzero(~store.read_field(cache, "valid")).tolist()
    (line,) = (cache.path / "quarantine.jsonl").read_text().splitlines()
    key = str(bad.relative_to(data).with_suffix(""))
    assert json.loads(line) == {"row": row, "key": key, "reason": "not a picture in a known format"}
    assert store.read_keys(cache)[row] == key


@pytest.mark.parametrize("renames", [0, 1], ids=["before-the-swap", "within-the-swap"])
def test_prune_that_was_killed_goes_on(teacher, tmp_path, monkeypatch, renames: int):
    data = make_folder(tmp_path / "data", 21)
    run_build(teacher, data, tmp_path / "c.zarr")
    damage(data)
    rename, done = os_rename(), [0]

    def stop(source: Path, target: Path) -> None:
        if ".old" in f"{target}" or done[0]:
            if done[0] == renames:
                raise KeyboardInterrupt
            done[0] += 1
        rename(source, target)

    monkeypatch.setattr("os.rename", stop)
    with pytest.raises(KeyboardInterrupt):
        run_build(teacher, data, tmp_path / "c.zarr", prune=True)
    monkeypatch.undo()
    assert (tmp_path / "c.zarr").exists() == (renames == 0)
    assert run_build(teacher, data, tmp_path / "c.zarr", prune=True).rows_written == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.zarr", "data"]
    assert len(store.read_keys(store.open_complete(tmp_path / "c.zarr"))) == 20


def os_rename() -> Callable:
    import os

    return os.rename


def test_prune_of_an_unfinished_cache_computes_what_was_missing(teacher, tmp_path):
    data = make_folder(tmp_path / "data", 21)
    cache = run_build(teacher, data, tmp_path / "c.zarr").cache
    store.forget_block(cache, 1)
    damage(data)
    summary = run_build(teacher, data, tmp_path / "c.zarr", prune=True)
    assert summary.rows_written == 3 + 6  # row 9 is gone and row 12 changed in any case
    assert store.open_complete(tmp_path / "c.zarr").meta.rows == 20


def test_the_last_to_finish_swaps_once(teacher, tmp_path):
    data = make_folder(tmp_path / "data", 21)
    cache = run_build(teacher, data, tmp_path / "c.zarr").cache
    damage(data)
    manifest = read_manifest(str(data))
    meta = dataclasses.replace(cache.meta, rows=len(manifest), manifest=manifest.digest)
    targets = [open_target(tmp_path / "c.zarr", meta, manifest, prune=True) for _ in range(2)]
    assert targets[0].cache == targets[1].cache
    for _ in range(2):  # two ranks
        assert replace_pruned(targets[0]).path == tmp_path / "c.zarr"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.zarr", "data"]
