"""Batches: what step s shows is a function of (seed, s) and of keys, never of order, ranks or workers.

The caches here are written by hand: a row's embedding spells its picture's number, so every value tells where it
came from.
"""

import dataclasses
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small import build_cache, chunks_of, make_folder, save_teacher

from student.contract import PictureView, RowInputs
from student.inputs import pairs
from student.inputs.caches import find_cache, readable_rows, same_data_cache, training_rows
from student.inputs.loader import loader
from student.inputs.order import StepPlan, epoch_order
from student.inputs.pairs import PairBatches, TeacherFields
from teachercache.cache import store
from teachercache.cache.spec import CacheMeta, Field, TeacherSpec
from teachercache.core.errors import MachineError, UserError
from teachercache.data.manifest import Manifest, digest_rows, make_manifest
from teachercache.data.read import read_manifest
from teachercache.data.sample import Sample

ROWS, TEXTS, READS = 40, 3, ("image_emb", "text_emb")


def number(key: str) -> int:
    return int(key.rsplit("/", 1)[-1])


def numbers_of(text: str) -> list[int]:
    """`square 12 said 1` -> [12, 1]."""
    words = text.split()
    return [int(words[1]), int(words[3])]


STUDENT = RowInputs(
    picture=PictureView(
        lambda picture: torch.from_numpy(np.asarray(picture).astype(np.float32).mean((0, 1)))
    ),
    tokenize=lambda texts: torch.tensor([numbers_of(text) for text in texts]),
)


def spelled_cache(
    manifest: Manifest,
    path: Path,
    *,
    weights: str = "pretrained",
    bad: tuple[int, ...] = (),
    block_rows: int = 8,
    digest: str = "0" * 64,
    scale: float = 3.0,
) -> store.Cache:
    """A cache whose image_emb is [number, 1] and whose text_emb is [number, text] of each row."""
    fields = (
        Field("image_emb", (2,), "image", "float16", ""),
        Field("text_emb", (2,), "text", "float16", ""),
    )
    spec = TeacherSpec("speller", weights, digest, ("embeddings",), fields, {}, {}, {"logit_scale": scale})
    meta = CacheMeta(
        spec, manifest.data, manifest.digest, len(manifest), manifest.texts, block_rows, "float32", {}
    )
    cache = store.create(path, meta, manifest)
    keys, texts = manifest.column("key"), manifest.column("texts")
    for block in range(meta.num_blocks):
        rows = list(meta.block(block))
        image = np.array([[number(keys[row]), 1] for row in rows], np.float16)
        text = np.zeros((len(rows), manifest.texts, 2), np.float16)
        usable = np.zeros((len(rows), manifest.texts), bool)
        for i, row in enumerate(rows):
            for k, words in enumerate(texts[row]):
                usable[i, k] = bool(words.strip())
                text[i, k] = numbers_of(words) if words.strip() else (-1, -1)
        valid = np.array([number(keys[row]) not in bad for row in rows])
        arrays = {"image_emb": image, "text_emb": text, "valid": valid, "text_valid": usable}
        arrays["key"] = np.array([keys[row] for row in rows], dtype=np.dtypes.StringDType())
        store.write_block(cache, block, chunks_of(cache, arrays, range(len(rows))), [])
    return cache


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("data") / "squares", ROWS, texts=TEXTS, splits=True)


@pytest.fixture(scope="module")
def manifest(folder):
    return read_manifest(str(folder))


@pytest.fixture(scope="module")
def spelled(manifest, tmp_path_factory):
    return spelled_cache(manifest, tmp_path_factory.mktemp("caches") / "speller.zarr")


def batches_of(manifest, cache, **options) -> PairBatches:
    plan = StepPlan(**{"batch": 4, "steps": 100, "seed": 0} | options)
    teachers = TeacherFields((cache,), READS)
    return PairBatches(manifest, training_rows(manifest, cache), STUDENT, plan, teachers=teachers)


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ----------------------------------------------------------------------------------------------------
# A pure function of seed and step


def test_a_step_is_a_function_of_seed_and_step(manifest, spelled):
    batches, again = batches_of(manifest, spelled), batches_of(manifest, spelled)
    wanted = [17, 0, 9, 5]
    first = {step: batches[step] for step in wanted}
    torch.manual_seed(99)  # neither global random state nor what was drawn before counts
    np.random.seed(3)
    assert all(same(again[step], first[step]) for step in reversed(wanted))
    other = batches_of(manifest, spelled, seed=1)
    assert any(not same(other[step], first[step]) for step in wanted)


def test_a_loader_that_starts_later_or_has_workers_gives_the_same(manifest, spelled):
    batches = batches_of(manifest, spelled, steps=10)
    for start, workers in ((0, 0), (6, 0), (6, 2)):
        found = list(loader(batches, start=start, workers=workers))
        assert len(found) == 10 - start
        assert all(same(batch, batches[start + i]) for i, batch in enumerate(found))


def test_an_epoch_shows_each_row_once(manifest, spelled):
    batches = batches_of(manifest, spelled, batch=4)
    rows = set(manifest.rows_of_split("train").tolist())
    assert len(rows) == 30
    assert batches.order.per_epoch == 7
    shown = [batches.order.rows_of(step).tolist() for step in range(21)]
    orders = [[row for part in shown[epoch * 7 : epoch * 7 + 7] for row in part] for epoch in range(3)]
    for order in orders:
        assert len(order) == len(set(order)) == 28  # two rows are dropped
        assert set(order) <= rows
    assert orders[0] != orders[1] != orders[2]
    assert {frozenset(order) for order in orders} != {frozenset(orders[0])}  # not the same two every time


def test_two_ranks_share_one_batch(manifest, spelled):
    whole = batches_of(manifest, spelled, batch=6)
    parts = [batches_of(manifest, spelled, batch=6, rank=rank, world=2) for rank in (0, 1)]
    for step in (0, 3, 11):
        left, right = parts[0][step], parts[1][step]
        for name, value in whole[step].items():
            joined = left[name] if name == "logit_scale" else torch.cat([left[name], right[name]])
            assert torch.equal(joined, value), name


def test_too_few_rows_for_a_batch(manifest, spelled):
    with pytest.raises(UserError, match="30 usable training rows are fewer than --batch-size 31"):
        batches_of(manifest, spelled, batch=31)


# ----------------------------------------------------------------------------------------------------
# What belongs together


def check_rows(manifest: Manifest, batches: PairBatches, steps: int) -> set[int]:
    """Picture, caption and both embeddings of every row shown are the same row's; the numbers that were shown."""
    images = {
        number(key): image
        for key, image in zip(manifest.column("key"), manifest.column("image"), strict=True)
    }
    shown, captions = set(), set()
    for step in range(steps):
        batch = batches[step]
        assert batch["image_emb"].dtype == batch["text_emb"].dtype == torch.float32
        for i, (own, caption) in enumerate(batch["text"].tolist()):
            assert batch["image_emb"][i].tolist() == [own, 1]
            assert batch["text_emb"][i].tolist() == [own, caption]
            with Image.open(manifest.root / images[own]) as picture:
                pixels = np.asarray(picture.convert("RGB"), np.float32).mean((0, 1))
            torch.testing.assert_close(batch["image"][i], torch.from_numpy(pixels))
            shown.add(own)
            captions.add(caption)
    assert len(captions) > 1  # several captions of a row are in use
    return shown


def test_picture_text_and_embeddings_are_of_one_row(manifest, spelled):
    assert len(check_rows(manifest, batches_of(manifest, spelled), 14)) == 30
    assert batches_of(manifest, spelled)[0]["logit_scale"] == 3


def test_the_captions_of_a_row_take_turns(manifest, spelled):
    batches = batches_of(manifest, spelled, batch=30, steps=60)
    seen = {}
    for epoch in range(60):
        for own, caption in batches[epoch]["text"].tolist():
            seen.setdefault(own, []).append(caption)
    counts = np.array([[captions.count(k) for k in range(TEXTS)] for captions in seen.values()])
    assert counts.shape == (30, TEXTS)
    assert counts.min() >= 5  # 20 expected of each; fewer than 5 has probability 1e-6 a cell
    assert len({tuple(captions) for captions in seen.values()}) == 30  # rows do not march in step


def reordered(manifest: Manifest, rows: list[int], data: str = "other") -> Manifest:
    table = manifest.table.take(rows)
    return Manifest(data, manifest.root, table, digest_rows(table))


def test_join_is_by_key_in_another_order(manifest, spelled):
    order = np.random.default_rng(0).permutation(ROWS).tolist()
    other = reordered(manifest, order)
    assert len(check_rows(other, batches_of(other, spelled), 14)) == 30


def test_join_with_a_part_of_the_cache(manifest, spelled):
    train = manifest.rows_of_split("train").tolist()
    part = reordered(manifest, train[::-2])
    keys = part.column("key")
    assert check_rows(part, batches_of(part, spelled), 7) <= {number(key) for key in keys}
    assert len(training_rows(part, spelled)) == 15


def test_a_row_that_the_cache_lacks(manifest, tmp_path):
    rows = manifest.rows_of_split("train").tolist()
    cache = spelled_cache(
        reordered(manifest, [row for row in range(ROWS) if row != rows[5]]), tmp_path / "c.zarr"
    )
    missing = manifest.column("key")[rows[5]]
    with pytest.raises(
        UserError,
        match=f"1 of 30 training rows .* first is '{missing}'.*extend it with `tc build --teacher speller",
    ):
        training_rows(manifest, cache)


def test_a_test_row_that_the_cache_lacks_does_not_matter(manifest, tmp_path):
    train = manifest.rows_of_split("train").tolist()
    cache = spelled_cache(reordered(manifest, train), tmp_path / "c.zarr")
    assert training_rows(manifest, cache).tolist() == train


def replaced(manifest: Manifest, row: int, **values) -> Manifest:
    rows = manifest.table.to_pylist()
    rows[row] |= values
    table = type(manifest.table).from_pylist(rows, schema=manifest.table.schema)
    return Manifest(manifest.data, manifest.root, table, digest_rows(table))


@pytest.mark.parametrize("change", [{"texts": ["square 0 said 0", "square 0 said 2"]}, {"size": 1}])
def test_a_row_that_changed_under_its_key(manifest, spelled, change):
    row = manifest.rows_of_split("train").tolist()[3]
    changed = replaced(manifest, row, **change)
    with pytest.raises(UserError) as error:
        training_rows(changed, spelled)
    assert f"1 rows of {manifest.data} changed" in str(error.value)
    assert f"'{manifest.column('key')[row]}'" in str(error.value)
    assert f"`{spelled.command(data=manifest.data)} --prune`" in str(error.value)


def test_rows_that_cannot_be_used_are_skipped(manifest, tmp_path):
    train = [number(manifest.column("key")[row]) for row in manifest.rows_of_split("train").tolist()]
    cache = spelled_cache(manifest, tmp_path / "c.zarr", bad=(train[0], train[7]))
    batches = batches_of(manifest, cache)
    assert check_rows(manifest, batches, 3 * batches.order.per_epoch) == set(train) - {train[0], train[7]}


def test_empty_texts_are_never_shown(manifest, tmp_path):
    rows = manifest.rows_of_split("train").tolist()
    own = number(manifest.column("key")[rows[0]])
    holes = replaced(manifest, rows[0], texts=["", f"square {own} said 1", "  "])
    none = replaced(holes, rows[1], texts=["", " ", ""])
    cache = spelled_cache(none, tmp_path / "c.zarr")
    batches = batches_of(none, cache, batch=29)
    shown = [batches[epoch]["text"].tolist() for epoch in range(10)]
    assert all([caption for number_, caption in part if number_ == own] == [1] for part in shown)
    assert number(manifest.column("key")[rows[1]]) not in {number_ for part in shown for number_, _ in part}


def test_small_data_is_decoded_once_and_shown_the_same(manifest, spelled, monkeypatch):
    decoded: list[str] = []
    read = pairs.read_image

    def counted(manifest, sample, **options):
        decoded.append(sample.key)
        return read(manifest, sample, **options)

    monkeypatch.setattr(pairs, "read_image", counted)
    kept = batches_of(manifest, spelled)
    first = [kept[step] for step in range(10)]
    shown = sum(len(batch["image"]) for batch in first)
    assert len(decoded) == len(set(decoded)) < shown  # more than one epoch
    monkeypatch.setattr(pairs, "KEPT_BYTES", 12 * len(kept.rows) - 1)  # three floats per picture
    again = batches_of(manifest, spelled)
    decoded.clear()
    assert all(same(batch, again[step]) for step, batch in enumerate(first))
    assert len(decoded) == shown
    assert not again.kept


def test_a_picture_that_vanished_is_named(tmp_path):
    """From a manifest file the row is still there; training must say which picture is gone, in one line."""
    data = make_folder(tmp_path / "squares", 8, texts=1)
    manifest = read_manifest(str(data))
    cache = spelled_cache(manifest, tmp_path / "c.zarr")
    (data / manifest.column("image")[2]).unlink()
    batches = batches_of(manifest, cache, batch=8)
    with pytest.raises(MachineError, match=manifest.column("key")[2]):
        batches[0]


def test_without_a_cache_unreadable_pictures_are_left_out(tmp_path, capsys):
    data = make_folder(tmp_path / "squares", 8)
    manifest = read_manifest(str(data))
    (data / manifest.column("image")[2]).write_bytes(b"no picture")
    rows = readable_rows(manifest, training_rows(manifest, None))
    assert rows.tolist() == [0, 1, 3, 4, 5, 6, 7]
    assert f"left out {manifest.column('key')[2]}: not a picture" in capsys.readouterr().err
    batches = PairBatches(manifest, rows, STUDENT, StepPlan(batch=7, steps=2, seed=0))
    assert set(batches[0]) == {"image", "text"}
    assert "logit_scale" not in batches[0]


def test_data_without_texts_cannot_train(tmp_path):
    data = make_folder(tmp_path / "squares", 4)
    for path in data.rglob("*.txt"):
        path.unlink()
    with pytest.raises(UserError, match="no training rows with a text"):
        training_rows(read_manifest(str(data)), None)


def num_calls(function: Callable[[], object]) -> int:
    """Count the calls of Python and C functions that a function makes."""
    calls = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(None)
    return calls


def test_the_rows_of_data_without_splits_are_selected_without_a_loop(tmp_path):
    """A loop over 3 million rows, each of which looks at all others, takes half a day."""
    calls = []
    for rows in (10, 2000):
        samples = (Sample(key=str(i), image="a.png", texts=("a",)) for i in range(rows))
        manifest = make_manifest("many", tmp_path, samples)
        assert manifest.rows_of_split("train").tolist() == list(range(rows))
        calls.append(num_calls(lambda manifest=manifest: manifest.rows_of_split("train")))
    assert calls[0] == calls[1] > 0


# ----------------------------------------------------------------------------------------------------
# The order of an epoch


def open_blocks(order: np.ndarray, block_rows: int) -> list[int]:
    """At each place of the order, how many blocks have been begun and are not yet used up."""
    blocks = (order // block_rows).tolist()
    first, last = {}, {}
    for place, block in enumerate(blocks):
        first.setdefault(block, place)
        last[block] = place
    return [sum(first[b] <= place <= last[b] for b in first) for place in range(len(blocks))]


@pytest.mark.parametrize(("window", "block_rows"), [(1, 4), (3, 4), (3, 7), (64, 4)])
def test_epoch_order_reads_within_a_window_of_blocks(window, block_rows):
    rows = np.array([row for row in range(200) if row % 5])  # some rows are not for training
    orders = [
        epoch_order(rows, seed=0, epoch=epoch, block_rows=block_rows, window=window) for epoch in range(4)
    ]
    num_blocks = len(set((rows // block_rows).tolist()))
    for order in orders:
        assert sorted(order.tolist()) == rows.tolist()
        assert max(open_blocks(order, block_rows)) <= window
        if 1 < window < num_blocks:
            assert max(open_blocks(order, block_rows)) > 1  # it does mix
    assert len({tuple(order.tolist()) for order in orders}) == 4
    if 1 < window < num_blocks:  # which blocks share a window differs between epochs
        starts = [
            frozenset((order[: (window - 1) * block_rows // 2] // block_rows).tolist()) for order in orders
        ]
        assert len(set(starts)) > 1


def test_epoch_order_of_a_small_cache_is_a_uniform_shuffle():
    rows = np.arange(6)
    firsts = [int(epoch_order(rows, seed=0, epoch=epoch, block_rows=2)[0]) for epoch in range(600)]
    counts = np.bincount(firsts, minlength=6)
    assert counts.min() > 60  # 100 expected of each
    assert counts.max() < 150


# ----------------------------------------------------------------------------------------------------
# Which cache


def test_the_cache_of_a_folder(manifest, tmp_path):
    spelled_cache(manifest, tmp_path / "a.zarr")
    hint = "tc build --teacher x"
    assert find_cache(str(tmp_path), READS, hint).path == tmp_path / "a.zarr"
    assert find_cache(str(tmp_path / "a.zarr"), READS, hint).path == tmp_path / "a.zarr"
    with pytest.raises(
        UserError, match=r"no field patch_emb: run `tc build --teacher x` and pass that as --cache$"
    ):
        find_cache(str(tmp_path / "a.zarr"), ("patch_emb",), hint)
    with pytest.raises(UserError, match=r"no cache with patch_emb in .*: run `tc build --teacher x`$"):
        find_cache(str(tmp_path), ("patch_emb",), hint)
    with pytest.raises(UserError, match=r"no cache with .*: run `tc build --teacher x`$"):
        find_cache(str(tmp_path / "nothing"), READS, hint)


def test_several_caches_are_ambiguous_unless_all_but_one_are_random(manifest, tmp_path):
    spelled_cache(manifest, tmp_path / "a.zarr", weights="random:0")
    spelled_cache(manifest, tmp_path / "b.zarr")
    assert find_cache(str(tmp_path), READS, "").path == tmp_path / "b.zarr"
    shutil.move(tmp_path / "b.zarr", tmp_path / "elsewhere")
    assert find_cache(str(tmp_path), READS, "").path == tmp_path / "a.zarr"  # better than none
    spelled_cache(manifest, tmp_path / "c.zarr")
    spelled_cache(manifest, tmp_path / "d.zarr")
    with pytest.raises(UserError, match=r"pass one as --cache: .*/c.zarr, .*/d.zarr"):
        find_cache(str(tmp_path), READS, "")


def test_an_unfinished_cache_names_the_command(manifest, tmp_path):
    cache = spelled_cache(manifest, tmp_path / "a.zarr")
    store.forget_block(cache, 1)
    for path in (tmp_path, tmp_path / "a.zarr"):
        with pytest.raises(UserError) as error:
            find_cache(str(path), READS, "")
        assert str(error.value).endswith(f"1 of 5 blocks are missing: run `{cache.command()}`")


def test_any_finished_cache_of_the_same_data_knows_the_usable_rows(manifest, tmp_path):
    assert same_data_cache(str(tmp_path / "nothing"), manifest) is None
    other = reordered(manifest, list(range(ROWS - 1)))
    spelled_cache(other, tmp_path / "a.zarr")
    assert same_data_cache(str(tmp_path), manifest) is None
    cache = spelled_cache(manifest, tmp_path / "b.zarr")
    assert same_data_cache(str(tmp_path), manifest) == dataclasses.replace(cache)
    store.forget_block(cache, 0)
    assert same_data_cache(str(tmp_path), manifest) is None


def test_a_cache_given_by_its_own_path_counts_for_the_usable_rows(manifest, tmp_path):
    """`--recipe clip --cache caches/x/tiny.zarr` must not read every picture first, as if there were none."""
    cache = spelled_cache(manifest, tmp_path / "a.zarr")
    assert same_data_cache(str(tmp_path / "a.zarr"), manifest) == cache


def test_built_caches_give_what_the_teacher_says(tmp_path):
    """Once through the real phase 1: the rows of a batch against the teacher itself."""
    from teachercache.data.pictures import read_image
    from teachercache.teachers.registry import load

    data, teacher = make_folder(tmp_path / "squares", 12, texts=2), save_teacher(tmp_path / "tiny")
    cache = store.open_complete(build_cache(data, teacher, tmp_path / "tiny.zarr", block_rows=4))
    manifest = read_manifest(str(data))
    batch = batches_of(manifest, cache, batch=12)[0]
    loaded = load(str(teacher), weights="pretrained", outputs=("embeddings",))
    rows = {number(key): manifest.row(i) for i, key in enumerate(manifest.column("key"))}
    for i, (own, caption) in enumerate(batch["text"].tolist()):
        sample = rows[own]
        inputs = {
            "image": loaded.view(read_image(manifest, sample))[None],
            "text": loaded.tokenize([sample.texts[caption]]),
        }
        with torch.inference_mode():
            said = loaded.encode(loaded.module, inputs)
        for name in READS:
            torch.testing.assert_close(batch[name][i], said[name][0], rtol=1e-3, atol=1e-4)  # float16
    torch.testing.assert_close(batch["logit_scale"], loaded.module.logit_scale.detach(), rtol=1e-6, atol=0)
