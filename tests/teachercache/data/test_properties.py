"""Properties of manifests, stores and pictures over random ones: odd texts, odd shapes, odd bytes."""

import dataclasses
import io
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from small import chunks_of, make_folder

from teachercache.build.target import open_target, plan_blocks
from teachercache.cache import store
from teachercache.cache.repair import damaged_blocks, damaged_files
from teachercache.cache.spec import CacheMeta, Field, TeacherSpec
from teachercache.core.errors import UserError
from teachercache.data.manifest import digest_rows, load_manifest, make_manifest
from teachercache.data.pictures import decode_image
from teachercache.data.read import read_manifest
from teachercache.data.sample import BadSample, Sample

QUICK = settings(max_examples=25, deadline=None, database=None)
STORES = settings(QUICK, max_examples=8)
words = st.text(st.characters(codec="utf-8"), max_size=12)
ODD = st.sampled_from(
    ["", " ", "\u2028", "\x85", "\x1c", "\ufeff", "\u202e", "a\u0301", "\U0001f600", "\r", "\t", "\x00"]
)


# ----------------------------------------------------------------------------------------------------
# Manifests


@QUICK
@given(keys=st.lists(st.text(max_size=3), min_size=1, max_size=12))
def test_a_manifest_has_every_key_once_or_is_refused_by_the_key_that_comes_twice(keys):
    """Any Python string, lone surrogates too, which no UTF-8 file can hold."""
    samples = [Sample(key, "a.png") for key in keys]
    try:
        for key in keys:
            key.encode()
    except UnicodeEncodeError:
        with pytest.raises(UserError, match="not UTF-8"):
            make_manifest("d", Path("d"), samples)
        return
    if len(set(keys)) == len(keys):
        manifest = make_manifest("d", Path("d"), samples)
        assert manifest.column("key") == keys
        assert digest_rows(manifest.table) == digest_rows(manifest.table.take(np.arange(len(keys))[::-1]))
        return
    with pytest.raises(UserError, match="is repeated") as error:
        make_manifest("d", Path("d"), samples)
    named = str(error.value).removeprefix("key '").rpartition("' is repeated")[0]
    assert keys.count(named) > 1


@QUICK
@given(captions=st.lists(st.lists(words | ODD, min_size=1, max_size=3), min_size=1, max_size=4))
def test_caption_lists_in_json_keep_every_text(captions):
    with tempfile.TemporaryDirectory() as folder:
        for i in range(len(captions)):
            Image.new("RGB", (2, 2)).save(Path(folder, f"{i}.png"))
        entries = [{"image": f"{i}.png", "caption": texts} for i, texts in enumerate(captions)]
        Path(folder, "list.json").write_text(json.dumps(entries))
        manifest = read_manifest(f"{folder}/list.json")
    got = {manifest.row(i).image: list(manifest.row(i).texts) for i in range(len(manifest))}
    assert got == {f"{i}.png": [text.strip() for text in texts] for i, texts in enumerate(captions)}


@QUICK
@given(
    lines=st.lists((words | ODD).filter(lambda text: not {"\n", "\r"} & set(text)), min_size=1, max_size=6)
)
def test_lines_of_a_text_file_are_rows_or_the_file_is_refused(lines):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "names.txt")
        path.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="")
        try:
            manifest = read_manifest(str(path))
        except UserError:
            return
    texts = [manifest.row(i).texts[0].strip() for i in range(len(manifest))]
    wanted = [line.strip() for line in (lines[0].removeprefix("\ufeff"), *lines[1:])]
    assert [text for text in texts if text] == [line for line in wanted if line]


@QUICK
@given(place=st.floats(0, 1, exclude_max=True), junk=st.binary(max_size=6), cut=st.integers(0, 40))
def test_a_damaged_manifest_is_refused_or_says_the_same(manifest_bytes, place, junk, cut):
    content, manifest = manifest_bytes
    start = int(place * len(content))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "m.parquet")
        path.write_bytes(content[:start] + junk + content[start + cut :])
        try:
            again = load_manifest(path)
        except UserError as error:
            assert str(path) in str(error)  # noqa: PT017
            return
    assert again.table.equals(manifest.table) or digest_rows(again.table) != manifest.digest


@pytest.fixture(scope="module")
def manifest_bytes(tmp_path_factory):
    from teachercache.data.manifest import write_manifest

    folder = tmp_path_factory.mktemp("m")
    manifest = read_manifest(str(make_folder(folder / "data", 4, texts=2, splits=True)))
    write_manifest(manifest, folder / "m.parquet")
    return (folder / "m.parquet").read_bytes(), manifest


# ----------------------------------------------------------------------------------------------------
# Stores

fields = st.lists(
    st.builds(
        Field,
        name=st.sampled_from(["w", "x", "y", "z"]),
        shape=st.lists(st.integers(1, 5), max_size=3).map(tuple),
        per=st.sampled_from(["row", "image", "text"]),
        dtype=st.sampled_from(["float16", "float32", "int16", "int32", "int64", "bool"]),
        doc=words,
    ),
    min_size=1,
    max_size=4,
    unique_by=lambda field: field.name,
)
sizes = st.tuples(st.integers(1, 20), st.integers(1, 3), st.integers(0, 3))  # rows, texts, views


def meta_of(
    specs: list[Field], rows: int, texts: int, views: int, block_rows: int
) -> tuple[CacheMeta, object]:
    samples = [Sample(f"k\u00e9/{i}", "a.png", tuple(f"{i} {k}" for k in range(texts))) for i in range(rows)]
    manifest = make_manifest("d", Path("d"), samples)
    spec = TeacherSpec("t", "pretrained", "0", ("embeddings",), tuple(specs), {}, {}, {})
    return CacheMeta(spec, "d", manifest.digest, rows, texts, block_rows, "float32", {}, views), manifest


def values_of(cache: store.Cache) -> dict[str, np.ndarray]:
    """Random bits, NaN among them, that depend on a place alone: a larger cache begins with those of a smaller."""
    arrays = {"key": store.read_keys(cache)}
    for name, field in cache.fields.items():
        shape = field.array_shape(cache.meta.rows, cache.meta.texts, cache.meta.views)
        places = sum(np.indices(shape)[axis] * (31, 1009, 7, 3, 5)[axis] for axis in range(len(shape)))
        arrays[name] = (places * 2654435761 % 65521).astype(field.dtype)
        if field.dtype.startswith("float"):
            arrays[name][places % 11 == 0] = np.nan
    return arrays


def fill(cache: store.Cache) -> None:
    arrays = values_of(cache)
    for block in set(range(cache.meta.num_blocks)) - store.done_blocks(cache):
        store.write_block(cache, block, chunks_of(cache, arrays, cache.meta.block(block)), [])
    store.finish(cache)


def assert_holds(cache: store.Cache) -> None:
    """What was written is what we read, whole and by rows, and what plain zarr reads."""
    group, random = zarr.open_group(cache.path, mode="r"), np.random.default_rng(0)
    for name, wanted in values_of(cache).items():
        assert np.array_equal(group[name][:], wanted, equal_nan=name != "key" and wanted.dtype.kind == "f")
        if name == "key":
            continue
        ours = store.read_field(cache, name)
        assert ours.dtype == wanted.dtype
        assert ours.tobytes() == wanted.tobytes()
        rows = random.integers(0, cache.meta.rows, 7)
        outer = cache.fields[name].copies(cache.meta.texts, cache.meta.views)
        for copy in range(cache.copies(name)):
            some = wanted[rows, copy] if outer else wanted[rows]
            assert np.array_equal(
                store.read_rows(cache, name, copy, rows), some, equal_nan=some.dtype.kind == "f"
            )
    assert damaged_blocks(cache) == {}
    assert damaged_files(cache) == {}


@STORES
@given(specs=fields, first=sizes, more=sizes, block_rows=st.integers(1, 8))
def test_a_store_holds_what_was_written_and_keeps_it_when_it_grows(specs, first, more, block_rows):
    rows, texts, views = first
    with tempfile.TemporaryDirectory() as folder:
        meta, manifest = meta_of(specs, rows, texts, views, block_rows)
        cache = open_target(Path(folder, "c.zarr"), meta, manifest).cache
        fill(cache)
        assert_holds(cache)
        larger, manifest = meta_of(
            specs, rows + more[0] - 1, texts, views + (more[2] if views else 0), block_rows
        )
        target = open_target(cache.path, larger, manifest)
        before = {name: np.array(store.read_field(cache, name)) for name in cache.fields}
        for plan in plan_blocks(target).values():
            assert not set(plan.kept) & set(plan.rows)
        assert all(store.read_field(cache, name).tobytes() == old.tobytes() for name, old in before.items())
        fill(target.cache)
        assert_holds(store.open_complete(cache.path))


@STORES
@given(
    specs=fields,
    size=sizes,
    block_rows=st.integers(1, 8),
    changes=st.lists(st.integers(0, 2**20), max_size=3),
)
def test_a_changed_byte_of_a_block_is_found_and_is_of_that_block(specs, size, block_rows, changes):
    with tempfile.TemporaryDirectory() as folder:
        meta, manifest = meta_of(specs, *size, block_rows)
        cache = open_target(Path(folder, "c.zarr"), meta, manifest).cache
        fill(cache)
        files = sorted(cache.path.rglob("c/**/*"))
        files = [path for path in files if path.is_file()]
        hit = set()
        for change in changes:
            path = files[change % len(files)]
            content = bytearray(path.read_bytes())
            content[change // 7 % len(content)] ^= 1 << change % 8
            path.write_bytes(content)
        damaged = damaged_blocks(cache)
        hit = {
            int(path.relative_to(cache.path).parts[2])
            for path in {files[change % len(files)] for change in changes}
        }
        assert set(damaged) == hit or len(changes) != len({change % len(files) for change in changes})


def test_a_field_of_odd_dtype_is_as_frozen_as_any():
    with pytest.raises(ValueError, match="dtype 'complex64' is not one of"):
        Field("a", (1,), "row", "complex64", "")
    assert dataclasses.replace(Field("a", (1,), "row", "bool", ""), dtype="int16").dtype == "int16"


# ----------------------------------------------------------------------------------------------------
# Pictures


def encoded(form: str, mode: str) -> bytes:
    content = io.BytesIO()
    pixels = np.random.default_rng(1).integers(0, 255, (9, 11, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(content, form)
    return content.getvalue()


PICTURES = {
    f"{form} {mode}": encoded(form, mode)
    for form, modes in {
        "PNG": "RGB L P RGBA 1",
        "JPEG": "RGB L CMYK",
        "GIF": "P",
        "WEBP": "RGB RGBA",
        "TIFF": "RGB F CMYK",
        "BMP": "RGB",
        "ICO": "RGBA",
        "PPM": "RGB",
    }.items()
    for mode in modes.split()
}


@settings(max_examples=400, deadline=None, database=None)
@given(
    name=st.sampled_from(sorted(PICTURES)),
    edits=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 8), st.binary(max_size=8)), max_size=4),
    at_least=st.integers(0, 8),
)
def test_any_bytes_are_a_picture_or_a_bad_sample(name, edits, at_least):
    content = PICTURES[name]
    for place, cut, junk in edits:
        start = int(place * len(content))
        content = content[:start] + junk + content[start + cut :]
    try:
        picture = decode_image(content, at_least)
    except BadSample as error:
        assert str(error)  # noqa: PT017
        return
    assert picture.mode == "RGB"
    assert picture.width * picture.height > 0
    assert edits or at_least or picture.size == (11, 9)


@pytest.mark.parametrize(
    "content", [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", b"", b"\0" * 99]
)
def test_programs_and_nothing_are_bad_samples(content: bytes):
    with pytest.raises(BadSample, match=r"EPS is not read|no bytes|known format"):
        decode_image(content)
