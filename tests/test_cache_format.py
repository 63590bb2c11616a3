"""A reader of caches that is written from docs/reference/cache_format.md alone, compared with ours.

It uses json, numpy, a Zstandard decoder and checksums, and nothing of this project or of zarr.
"""

import hashlib
import json
import shutil
import zlib
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
from numcodecs.zstd import Zstd
from small import make_folder, run

from teachercache.cache import store

# ----------------------------------------------------------------------------------------------------
# The stranger's reader


class Reader:
    """An opened cache."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        group = json.loads((folder / "zarr.json").read_text())
        assert (group["zarr_format"], group["node_type"]) == (3, "group")
        self.meta = group["attributes"]
        if self.meta["format"] != 2:
            raise ValueError(f"format {self.meta['format']}")
        rest = {name: value for name, value in self.meta.items() if name != "checksum"}
        if zlib.crc32(json.dumps(rest, sort_keys=True).encode()) != self.meta["checksum"]:
            raise ValueError("zarr.json is damaged")
        self.rows, self.texts, self.views, self.block_rows = (
            self.meta[name] for name in ("rows", "texts", "views", "block_rows")
        )
        self.blocks = -(-self.rows // self.block_rows)
        self.fields = {field["name"]: field for field in self.meta["spec"]["fields"]}
        self.fields["valid"] = {"shape": [], "per": "row", "dtype": "bool"}
        if self.texts:
            self.fields["text_valid"] = {"shape": [], "per": "text", "dtype": "bool"}
        if self.views:
            self.fields["view_params"] = {"shape": [10], "per": "image", "dtype": "float32"}

    def is_finished(self, block: int) -> bool:
        """Whether the done record of a block is valid and covers the block, and its files are whole."""
        path = self.folder / "done" / f"{block:08d}.json"
        if not path.exists():
            return False
        record = json.loads(path.read_text())
        rest = {name: value for name, value in record.items() if name != "checksum"}
        if zlib.crc32(json.dumps(rest).encode()) != record["checksum"]:
            return False
        end = min((block + 1) * self.block_rows, self.rows)
        covered = record["rows"][1] >= end and record["texts"] >= self.texts and record["views"] >= self.views
        return covered and not record.get("retry")

    def is_whole(self, block: int) -> bool:
        """Whether each file of a block has the recorded size and checksum."""
        record = json.loads((self.folder / "done" / f"{block:08d}.json").read_text())
        contents = ((self.folder / name).read_bytes() for name in record["files"])
        return [[len(content), zlib.crc32(content)] for content in contents] == list(record["files"].values())

    def read(self, name: str) -> np.ndarray:
        """A whole field."""
        field = self.fields[name]
        copies = {"text": self.texts, "pair": self.texts, "image": self.views}.get(field["per"], 0)
        has_axis = field["per"] in ("text", "pair") or copies > 0
        chunks = [
            np.concatenate(
                [self._chunk(name, block, copy if has_axis else None) for block in range(self.blocks)]
            )
            for copy in range(copies if has_axis else 1)
        ]
        return np.stack(chunks, 1) if has_axis else chunks[0]

    def _chunk(self, name: str, block: int, copy: int | None) -> np.ndarray:
        field = self.fields[name]
        places = [str(block), *([] if copy is None else [str(copy)]), *["0"] * len(field["shape"])]
        content = self.folder.joinpath(name, "c", *places).read_bytes()
        values, checksum = content[:-4], int.from_bytes(content[-4:], "little")
        if google_crc32c.value(values) != checksum:
            raise ValueError(f"{name} block {block} is damaged")
        kind = np.dtype(field["dtype"]).newbyteorder("<")
        array = np.frombuffer(values, kind).reshape(self.block_rows, *field["shape"])
        return array[: self.rows - block * self.block_rows]

    def keys(self) -> list[str]:
        """The key of each row."""
        keys: list[str] = []
        for block in range(self.blocks):
            content = Zstd().decode((self.folder / "key" / "c" / str(block)).read_bytes())
            place = 4
            for _ in range(int.from_bytes(content[:4], "little")):
                size = int.from_bytes(content[place : place + 4], "little")
                keys.append(content[place + 4 : place + 4 + size].decode())
                place += 4 + size
        return keys[: self.rows]


# ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[0, 2], ids=["plain", "views"])
def cache(request, teacher_folder, tmp_path_factory) -> Path:
    """A cache of two blocks with two texts per row, one row without a picture that can be read."""
    data = make_folder(tmp_path_factory.mktemp("data") / "squares", 300, texts=2)
    (data / "class0" / "003.png").write_bytes(b"no picture")
    (data / "class1" / "004.txt").write_text("one text: ü\n")
    out = tmp_path_factory.mktemp("caches") / "tiny.zarr"
    words = ["--outputs", "embeddings,patches", "--views", request.param, "--workers", 0, "--batch-size", 64]
    assert run("build", "--teacher", teacher_folder, "--data", data, "--out", out, *words) == 0
    return out


def test_the_reader_of_the_page_reads_what_ours_reads(cache):
    ours, theirs = store.open_complete(cache), Reader(cache)
    assert theirs.blocks == 2
    assert set(theirs.fields) == set(ours.fields)
    for name in ours.fields:
        expected = store.read_field(ours, name)
        assert theirs.read(name).dtype == expected.dtype
        np.testing.assert_array_equal(theirs.read(name), expected)
    assert theirs.keys() == store.read_keys(ours).tolist()
    assert not theirs.read("valid").all()
    assert theirs.read("text_valid").sum() == 599


def test_blocks_are_finished_and_whole(cache, tmp_path):
    copy = shutil.copytree(cache, tmp_path / "copy.zarr")
    reader = Reader(copy)
    assert all(reader.is_finished(block) and reader.is_whole(block) for block in range(2))
    chunk = next((copy / "valid" / "c").iterdir())
    chunk.write_bytes(b"\xff" + chunk.read_bytes()[1:])
    assert not reader.is_whole(int(chunk.name))
    with pytest.raises(ValueError, match="damaged"):
        reader.read("valid")
    record = copy / "done" / "00000001.json"
    record.write_text(record.read_text().replace('"texts": 2', '"texts": 3'))
    assert not reader.is_finished(1)


def test_the_metadata_is_that_of_zarr(cache):
    for name, field in Reader(cache).fields.items():
        array = json.loads((cache / name / "zarr.json").read_text())
        codecs = [codec["name"] for codec in array["codecs"]]
        assert codecs == ["bytes", "crc32c"]
        assert array["chunk_key_encoding"] == {"name": "default", "configuration": {"separator": "/"}}
        assert array["shape"][-len(field["shape"]) :] == field["shape"] or not field["shape"]
    keys = json.loads((cache / "key" / "zarr.json").read_text())
    assert [codec["name"] for codec in keys["codecs"]] == ["vlen-utf8", "zstd"]


def test_the_digest_of_the_manifest_is_that_of_the_page(cache):
    import pyarrow.parquet as pq

    names = ["key", "image", "offset", "size", "texts", "task"]
    rows = pq.read_table(cache / "manifest.parquet", columns=names).to_pylist()
    digests = [
        hashlib.blake2b(repr(tuple(row[name] for name in names)).encode(), digest_size=16).digest()
        for row in rows
    ]
    assert hashlib.sha256(b"".join(sorted(digests))).hexdigest() == Reader(cache).meta["manifest"]


def test_the_quarantine_is_that_of_the_arrays(cache):
    entries = [json.loads(line) for line in (cache / "quarantine.jsonl").read_text().splitlines()]
    reader = Reader(cache)
    assert {entry["row"] for entry in entries if "text" not in entry and "view" not in entry} == set(
        np.flatnonzero(~reader.read("valid")).tolist()
    )
    assert all(entry["key"] == reader.keys()[entry["row"]] for entry in entries)
    first = sorted((cache / "pictures").glob("*.digests"))[0].read_bytes()
    assert len(first) == 16 * reader.block_rows
