"""The cache on disk: what was written is what every reader reads, and damage is found."""

import dataclasses
import errno
import functools
import gc
import json
import os
import shlex
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from small import chunks_of, tree

from teachercache.build.target import open_target
from teachercache.cache import store
from teachercache.cache.layout import block_rows_for
from teachercache.cache.memory_map import can_map
from teachercache.cache.repair import damaged_blocks, damaged_files
from teachercache.cache.spec import CacheMeta, Field, TeacherSpec
from teachercache.core.errors import UserError
from teachercache.core.paths import machine
from teachercache.data import manifest as samples
from teachercache.data.manifest import Manifest, load_manifest, make_manifest
from teachercache.data.sample import Sample

TEACHER = "open_clip:ViT-B-32/laion2b_s34b_b79k"
ROWS, TEXTS, BLOCK = 1280 + 100, 2, 256  # five whole blocks and a part of one
FIELDS = (
    Field("image_emb", (16,), "image", "float16", "8 KiB a block: can be mapped"),
    Field("text_emb", (16,), "text", "float16", "two a row"),
    Field("odd", (7,), "image", "float16", "3,584 bytes a block: cannot"),
    Field("map", (4, 8), "image", "float32", "a map"),
    Field("ids", (16,), "image", "int32", "numbers"),
)


@functools.cache
def make_rows() -> Manifest:
    return make_manifest(
        "some/data", Path("some/data"), [Sample(f"row/{i:04d}\u00e9", "a.png") for i in range(ROWS)]
    )


def make_meta(**changes) -> CacheMeta:
    spec = TeacherSpec(TEACHER, "pretrained", "0" * 64, ("embeddings",), FIELDS, {}, {}, {"logit_scale": 4.6})
    values = {
        "data": "some/data",
        "manifest": make_rows().digest,
        "rows": ROWS,
        "texts": TEXTS,
        "block_rows": BLOCK,
    }
    return CacheMeta(**({"spec": spec, "precision": "float32", "versions": {}} | values | changes))


def make_arrays(seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    arrays = {
        field.name: (random.standard_normal(field.array_shape(ROWS, TEXTS)) * 100).astype(field.dtype)
        for field in FIELDS
    }
    arrays["valid"] = random.random(ROWS) > 0.3
    arrays["text_valid"] = random.random((ROWS, TEXTS)) > 0.3
    arrays["key"] = np.array([f"row/{i:04d}\u00e9" for i in range(ROWS)], dtype=np.dtypes.StringDType())
    return arrays


def make_empty(path: Path, **changes) -> store.Cache:
    return open_target(path, make_meta(**changes), make_rows()).cache


def write(cache: store.Cache, block: int, arrays: dict[str, np.ndarray]) -> None:
    rows = cache.meta.block(block)
    reason = [{"row": rows.start, "key": "k", "reason": "b\u00e4d"}]
    store.write_block(cache, block, chunks_of(cache, arrays, rows), reason)


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    return make_arrays()


@pytest.fixture(scope="module")
def whole(tmp_path_factory, arrays) -> store.Cache:
    cache = make_empty(tmp_path_factory.mktemp("store") / "c.zarr")
    for block in range(cache.meta.num_blocks):
        write(cache, block, arrays)
    store.finish(cache)
    return cache


@pytest.fixture
def copy(whole, tmp_path) -> store.Cache:
    shutil.copytree(whole.path, tmp_path / "c.zarr")
    return store.open_cache(tmp_path / "c.zarr")


# ----------------------------------------------------------------------------------------------------
# Reading what was written


def test_fields_read_back_by_us_and_by_plain_zarr(whole, arrays):
    group = zarr.open(whole.path, mode="r")
    assert set(whole.fields) == {*(field.name for field in FIELDS), "valid", "text_valid"}
    for name in whole.fields:
        ours, theirs = store.read_field(whole, name), group[name]
        assert np.array_equal(ours, arrays[name])
        assert np.array_equal(theirs[:], arrays[name])
        assert np.array_equal(theirs[:8], ours[:8])
        assert ours.dtype == theirs.dtype == arrays[name].dtype
        assert theirs.metadata.dimension_names == whole.fields[name].array_dims()
    assert np.array_equal(store.read_keys(whole), arrays["key"])
    assert group["key"][3] == "row/0003\u00e9"


def test_both_ways_of_reading_were_met(whole):
    def is_mapped(name: str) -> bool:
        size = (
            np.prod(whole.fields[name].array_shape(BLOCK, TEXTS))
            * np.dtype(whole.fields[name].dtype).itemsize
        )
        return can_map(int(size))

    assert [is_mapped(name) for name in ("image_emb", "text_emb", "map", "ids")] == [True] * 4
    assert [is_mapped(name) for name in ("odd", "valid")] == [False] * 2


def test_mapped_rows_in_any_order_are_read_only(whole, arrays):
    mapped = store.read_field(whole, "image_emb")
    scattered = np.random.default_rng(1).permutation(ROWS)
    assert np.array_equal(mapped[scattered], arrays["image_emb"][scattered])
    assert np.array_equal(mapped[-1], arrays["image_emb"][-1])
    assert len(mapped) == ROWS
    with pytest.raises(ValueError, match="read-only"):
        mapped[0] = 0
    with pytest.raises(ValueError, match="WRITEABLE"):
        mapped.flags.writeable = True


def maps_of(path: Path) -> int:
    return Path("/proc/self/maps").read_text().count(str(path.resolve()))


def test_maps_are_released_with_the_last_view(copy):
    assert maps_of(copy.path) == 0
    for _ in range(3):
        field = store.read_field(copy, "image_emb")
        view = field[1000:, 2].T
        assert maps_of(copy.path) > 0
        del field
        gc.collect()
        assert view.sum() != 0  # still mapped
        assert maps_of(copy.path) > 0
        del view
        gc.collect()
        assert maps_of(copy.path) == 0


def test_a_failed_map_leaves_nothing_mapped(copy):
    store.chunk_path(copy, "image_emb", 3).unlink()
    with pytest.raises(FileNotFoundError):
        store.read_field(copy, "image_emb")
    assert maps_of(copy.path) == 0


def test_chunk_file_that_is_too_short_is_an_error_and_no_crash(copy):
    path = store.chunk_path(copy, "image_emb", 2)
    path.write_bytes(path.read_bytes()[:4096])
    with pytest.raises(UserError, match="too short; run `tc verify`"):
        store.read_field(copy, "image_emb")


def test_unknown_field_names_those_there_are(whole):
    with pytest.raises(UserError, match="no field 'depth': choose from valid, text_valid, image_emb"):
        store.read_field(whole, "depth")
    with pytest.raises(UserError, match="no field 'depth': choose from image_emb"):
        whole.meta.spec.field("depth")


def test_join_by_key(whole):
    keys = ["row/1379\u00e9", "nobody", "row/0000\u00e9", "row/0300\u00e9", "row/0000\u00e9", ""]
    assert store.join(whole, keys).tolist() == [1379, -1, 0, 300, 0, -1]
    assert store.join(whole, []).tolist() == []


def test_keys_in_the_order_of_the_cache_are_joined_without_a_table(whole, monkeypatch):
    """All of them, a part, and one that is there twice: by the keys column alone, some at a time."""
    keys = store.cached_manifest(whole).table["key"]
    monkeypatch.setattr(samples, "ROWS_AT_ONCE", 100)
    monkeypatch.setattr(store, "cached_manifest", lambda cache: 1 / 0)
    assert store.join(whole, keys).tolist() == list(range(len(keys)))
    some = [0, 1, 5, 99, 100, 101, 350, 351, 899, 1379]
    assert store.join(whole, keys.take(some)).tolist() == some
    assert store.join(whole, ["row/0300\u00e9", "row/0300\u00e9", "row/0301\u00e9"]).tolist() == [
        300,
        300,
        301,
    ]
    with pytest.raises(ZeroDivisionError):
        store.join(whole, keys.take([100, 0]))


def test_a_cache_without_texts_has_no_text_mask(tmp_path):
    spec = dataclasses.replace(make_meta().spec, fields=FIELDS[:1])
    cache = make_empty(tmp_path / "c.zarr", texts=0, spec=spec)
    assert list(cache.fields) == ["valid", "image_emb"]


# ----------------------------------------------------------------------------------------------------
# Unfinished, foreign, changed


def test_unfinished_cache_ends_in_the_command_that_finishes_it(copy):
    store.forget_block(copy, 2)
    store.forget_block(copy, 4)
    with pytest.raises(UserError, match=r"not finished, 2 of 6 blocks are missing: run `(.*)`$") as error:
        store.open_complete(copy.path)
    assert f"tc build --teacher {TEACHER} --data some/data --out {copy.path}" in str(error.value)
    assert store.done_blocks(copy) == {0, 1, 3, 5}


def test_command_survives_a_shell(tmp_path):
    cache = make_empty(tmp_path / "my cache.zarr", data="my photos; rm")
    words = shlex.split(cache.command())
    assert words[words.index("--data") + 1] == "my photos; rm"
    assert words[words.index("--out") + 1] == str(cache.path)


def test_create_twice_is_the_same_cache(copy):
    before = tree(copy.path)
    again = make_empty(copy.path)
    assert again.meta == copy.meta
    assert tree(copy.path) == before


def test_create_keeps_the_block_rows_that_are_there(copy):
    assert make_empty(copy.path, block_rows=512).meta.block_rows == BLOCK


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"precision": "bfloat16"}, 'precision: "float32" stored, "bfloat16" requested'),
        ({"spec": dataclasses.replace(make_meta().spec, digest="9" * 64)}, "digest"),
        ({"spec": dataclasses.replace(make_meta().spec, name="other")}, "other"),
        ({"spec": dataclasses.replace(make_meta().spec, fields=FIELDS[:2])}, "odd"),
        ({"views": 2}, "views: 0 stored, 2 requested"),
    ],
    ids=["precision", "weights", "teacher", "fields", "views"],
)
def test_create_over_another_build_names_what_changed(copy, changes, named):
    before = tree(copy.path)
    with pytest.raises(UserError, match=r"holds another build .*pass another --out") as error:
        make_empty(copy.path, **changes)
    assert named in str(error.value)
    assert tree(copy.path) == before


def test_create_in_an_empty_folder(tmp_path):
    (tmp_path / "c.zarr").mkdir()
    assert make_empty(tmp_path / "c.zarr").meta == make_meta()


def test_create_leaves_nothing_beside_the_cache_and_removes_what_the_dead_left(tmp_path):
    dead, alive = (tmp_path / f"c.zarr.{n}-{machine()}.partial" for n in (999999999, os.getppid()))
    dead.mkdir()
    alive.mkdir()
    make_empty(tmp_path / "c.zarr")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.zarr", alive.name]


def test_foreign_folders_and_formats_are_refused(copy, tmp_path):
    with pytest.raises(UserError, match=r"no cache at .*: make one with `tc build"):
        store.open_cache(tmp_path / "none")
    attributes = json.loads((copy.path / "zarr.json").read_text())
    for form in (1, 0, None, "2"):
        changed = {**attributes, "attributes": {**attributes["attributes"], "format": form}}
        (copy.path / "zarr.json").write_text(json.dumps(changed))
        with pytest.raises(
            UserError, match=r"cache format .* reads format 2: remove the cache and run `tc build --teacher"
        ):
            store.open_cache(copy.path)
    without = {key: value for key, value in attributes["attributes"].items() if key != "spec"}
    for content in ("", "{", "[]", "{}", json.dumps({**attributes, "attributes": without})):
        (copy.path / "zarr.json").write_text(content)
        with pytest.raises(UserError, match="not a cache of this program"):
            store.open_cache(copy.path)
    zarr.create_array(tmp_path / "plain.zarr", shape=(3,), dtype="f4")
    with pytest.raises(UserError, match="cache"):
        store.open_cache(tmp_path / "plain.zarr")


@pytest.mark.parametrize(
    "change",
    [
        {"rows": 10**40},
        {"rows": -1},
        {"rows": "7"},
        {"rows": None},
        {"rows": 2.0},
        {"rows": True},
        {"block_rows": 0},
        {"texts": []},
        {"versions": 3},
        {"data": ["a"]},
        {"spec": []},
        {"spec": "x"},
        {"augment": []},
    ],
    ids=str,
)
def test_odd_metadata_is_one_line(copy, change):
    content = json.loads((copy.path / "zarr.json").read_text())
    content["attributes"] |= change
    content["attributes"].pop("checksum")  # by someone who can compute it
    (copy.path / "zarr.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"is not a cache of this program, or its zarr\.json is damaged"):
        store.open_cache(copy.path)


@pytest.mark.parametrize("content", ["[" * 100_000, '{"a":' * 100_000, "[]", "7", "null", "9" * 10_000])
def test_odd_json_is_damage(copy, content):
    whole = (copy.path / "zarr.json").read_bytes()
    (copy.path / "zarr.json").write_text(content)
    with pytest.raises(UserError, match=r"is not a cache of this program, or its zarr\.json is damaged"):
        store.open_cache(copy.path)
    (copy.path / "zarr.json").write_bytes(whole)
    (copy.path / "valid/zarr.json").write_text(content)
    assert list(damaged_files(copy)) == ["valid/zarr.json"]
    store.record_path(copy, 1).write_text(content)
    assert damaged_blocks(copy) == {1: "its done record is damaged"}


@pytest.mark.parametrize(
    "change",
    [
        {"rows": [0]},
        {"rows": 4},
        {"block": 2},
        {"texts": "1"},
        {"files": []},
        {"files": {"/etc/hostname": [1, 2]}},
        {"files": {"valid/c/1": 3}},
        {"invalid": 7},
        {"invalid": [{"row": "a"}]},
    ],
    ids=str,
)
def test_odd_done_records_are_damaged_ones(copy, change):
    record = store.done_record(copy, 1) | change
    record["checksum"] = store._record_checksum(record)
    store.record_path(copy, 1).write_text(json.dumps(record))
    assert store.done_record(copy, 1) is None
    assert damaged_blocks(copy) == {1: "its done record is damaged"}


def test_other_files_among_the_done_records_are_no_blocks(copy):
    for name in ("notes.json", "1.json", "00000000 (copy).json"):
        (copy.path / "done" / name).write_text("{}")
    assert store.done_blocks(copy) == set(range(copy.meta.num_blocks))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("event", range(4))
def test_a_cache_that_cannot_be_created_leaves_nothing_and_is_created_later(
    tmp_path, monkeypatch, code, event
):
    seen = []

    def fail(name):
        call = getattr(os, name)

        def failing(*arguments, **options):
            seen.append(name)
            if len(seen) == 1 + 4 * event:
                raise OSError(code, os.strerror(code))
            return call(*arguments, **options)

        return failing

    with monkeypatch.context() as patch:
        for name in ("mkdir", "rename", "replace", "fsync"):
            patch.setattr(os, name, fail(name))
        with pytest.raises(OSError, match=os.strerror(code)):
            make_empty(tmp_path / "c.zarr")
    assert list(tmp_path.iterdir()) == []
    assert make_empty(tmp_path / "c.zarr").meta == make_meta()


def test_manifest_in_the_cache_keeps_its_rows_and_its_root(tmp_path):
    manifest = make_manifest("d/list.csv", Path("d"), [Sample("a", "x/a.png", ("t",), "cat")])
    cache = store.create(tmp_path / "c.zarr", make_meta(data="d/list.csv"), manifest)
    again = load_manifest(cache.path / "manifest.parquet")
    assert again.row(0) == manifest.row(0)
    assert again.root / again.row(0).image == Path("d/x/a.png")


# ----------------------------------------------------------------------------------------------------
# Blocks


def test_write_block_wants_exactly_the_fields(tmp_path, arrays):
    cache = make_empty(tmp_path / "c.zarr")
    chunks = chunks_of(cache, arrays, cache.meta.block(0))
    few = {at: values for at, values in chunks.items() if at != ("odd", 0)}
    with pytest.raises(ValueError, match=r"block 0 lacks \['odd/c/0/0'\]"):
        store.write_block(cache, 0, few, [])
    with pytest.raises(KeyError, match="extra"):
        store.write_block(cache, 0, {**chunks, ("extra", 0): chunks["odd", 0]}, [])
    with pytest.raises(ValueError, match=r"has extra \['text_emb/c/0/2/0'\]"):
        store.write_block(cache, 0, {**chunks, ("text_emb", 2): chunks["text_emb", 0]}, [])
    with pytest.raises(ValueError, match="odd is float64"):
        store.write_block(cache, 0, {**chunks, ("odd", 0): chunks["odd", 0].astype(float)}, [])
    assert store.done_blocks(cache) == set()


def test_write_block_wants_all_its_rows(tmp_path, arrays):
    cache = make_empty(tmp_path / "c.zarr")
    for rows in (1, BLOCK - 1, BLOCK + 1):
        with pytest.raises(ValueError, match=f"has {rows} rows, its block {BLOCK}"):
            store.write_block(cache, 0, chunks_of(cache, arrays, range(rows)), [])
    assert store.done_blocks(cache) == set()


def test_blocks_are_the_same_in_any_order(whole, tmp_path, arrays):
    cache = make_empty(tmp_path / "c.zarr")
    for block in (5, 0, 3, 1, 4, 2, 3):
        write(cache, block, arrays)
    store.finish(cache)
    assert tree(cache.path) == tree(whole.path)


def test_two_builders_may_finish_at_once(copy, monkeypatch):
    both = threading.Barrier(2, timeout=10)
    monkeypatch.setattr(os, "fsync", lambda descriptor: both.wait())  # written, not renamed
    errors = []

    def finish() -> None:
        try:
            store.finish(copy)
        except OSError as error:
            errors.append(error)

    threads = [threading.Thread(target=finish) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len((copy.path / "quarantine.jsonl").read_text().splitlines()) == 6


def test_record_names_every_file_of_the_block(whole):
    named = {name for block in range(6) for name in store.done_record(whole, block)["files"]}
    on_disk = {name for name in tree(whole.path) if "/c/" in name}
    assert named == on_disk
    assert len(on_disk) == 6 * (len(FIELDS) + 3 + 2)  # a file for each of two texts and their masks
    entries = [json.loads(line) for line in (whole.path / "quarantine.jsonl").read_text().splitlines()]
    assert [entry["row"] for entry in entries] == [0, 256, 512, 768, 1024, 1280]


def test_no_damage_where_there_is_none(whole):
    assert damaged_blocks(whole) == {}


@pytest.mark.parametrize("block", [1, 5])  # a whole block, and the one that is filled in part
@pytest.mark.parametrize("name", [*(field.name for field in FIELDS), "valid", "text_valid", "key"])
def test_flipped_bit_is_found_and_mended(copy, whole, arrays, name: str, block: int):
    path = store.chunk_path(copy, name, block)
    random = np.random.default_rng(0)
    for place in [0, path.stat().st_size - 1, int(random.integers(path.stat().st_size))]:
        content = bytearray(path.read_bytes())
        content[place] ^= 1 << int(random.integers(8))
        path.write_bytes(content)
        assert damaged_blocks(copy) == {block: f"{path.relative_to(copy.path)}: checksum differs"}
        store.forget_block(copy, block)
        write(copy, block, arrays)
        assert tree(copy.path) == tree(whole.path)


def test_missing_and_short_files_are_found(copy, whole, arrays):
    store.chunk_path(copy, "image_emb", 0).unlink()
    short = store.chunk_path(copy, "key", 4)
    short.write_bytes(short.read_bytes()[:-1])
    damaged = damaged_blocks(copy)
    assert damaged == {0: "image_emb/c/0/0: No such file or directory", 4: "key/c/4: checksum differs"}
    for block in damaged:
        store.forget_block(copy, block)
        write(copy, block, arrays)
    assert tree(copy.path) == tree(whole.path)


def test_damaged_done_record_is_found(copy):
    path = copy.path / "done" / "00000002.json"
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x80]) + whole[place + 1 :])
        assert list(damaged_blocks(copy)) == [2]
    for content in (b"", whole[:50], b"{}", b"[]"):
        path.write_bytes(content)
        assert list(damaged_blocks(copy)) == [2]


# ----------------------------------------------------------------------------------------------------
# Block sizes


@settings(max_examples=200, deadline=None, database=None)
@given(
    width=st.integers(1, 4_000_000),
    dtype=st.sampled_from(["float16", "float32", "int64"]),
    per=st.sampled_from(["image", "text"]),
    rows=st.integers(1, 10**9),
)
def test_block_rows(width, dtype, per, rows):
    fields = (Field("wide", (width,), per, dtype, ""), Field("narrow", (1,), "image", "bool", ""))
    size = block_rows_for(fields, rows)
    row_bytes = width * np.dtype(dtype).itemsize
    assert size & (size - 1) == 0
    assert size == 1 or size * row_bytes <= 64 << 20
    if 2 * size * row_bytes <= 64 << 20:
        assert rows / size <= 64 or size == 1


@pytest.mark.parametrize(("rows", "block_rows"), [(1, 4), (4, 4), (5, 4), (8, 4), (1023, 256)])
def test_blocks_cover_all_rows_once(rows: int, block_rows: int):
    meta = make_meta(rows=rows, block_rows=block_rows)
    covered = [row for block in range(meta.num_blocks) for row in meta.block(block)]
    assert covered == list(range(rows))
