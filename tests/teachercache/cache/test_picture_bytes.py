"""A picture that is replaced by one of the same size is seen, a touched or copied one is not computed again."""

import io
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from disturbed import run_build
from PIL import Image
from small import tree

from student.inputs.caches import training_rows
from teachercache.build.target import compare
from teachercache.cache import picture_bytes, store
from teachercache.cache.repair import damaged_files
from teachercache.core.errors import UserError
from teachercache.data.read import read_manifest
from teachercache.teachers.registry import load
from teachercache.teachers.teacher import Teacher

ROWS = 10


@pytest.fixture(scope="module")
def teacher(teacher_folder: Path) -> Teacher:
    return load(str(teacher_folder))


def picture(seed: int) -> bytes:
    """A bitmap: all have the same number of bytes."""
    pixels = np.random.default_rng(seed).integers(0, 255, (9, 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "bmp")
    return file.getvalue()


def folder_of(root: Path, changed: int | None = None) -> Path:
    root.mkdir(exist_ok=True)
    for i in range(ROWS):
        (root / f"{i}.txt").write_text(f"text {i}\n")
        if not (root / f"{i}.bmp").exists() or i == changed:
            (root / f"{i}.bmp").write_bytes(picture(i + 100 * (i == changed)))
    return root


def tar_of(root: Path, changed: int | None = None) -> Path:
    root.mkdir(exist_ok=True)
    with tarfile.open(root / "0.tar", "w") as archive:
        for i in range(ROWS):
            members = {"bmp": picture(i + 100 * (i == changed)), "txt": f"text {i}".encode()}
            for suffix, content in members.items():
                info = tarfile.TarInfo(f"{i}.{suffix}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return root / "0.tar"


def parquet_of(root: Path, changed: int | None = None) -> Path:
    root.mkdir(exist_ok=True)
    pictures = [picture(i + 100 * (i == changed)) for i in range(ROWS)]
    columns = {"image": pictures, "text": [f"text {i}" for i in range(ROWS)]}
    pq.write_table(pa.table(columns), root / "x.parquet", compression="none", use_dictionary=False)
    return root / "x.parquet"


def later(path: Path) -> None:
    """Give every file a later time."""
    for file in [path] if path.is_file() else path.iterdir():
        os.utime(file, ns=(1, file.stat().st_mtime_ns + 10**9))


@pytest.mark.parametrize("write", [folder_of, tar_of, parquet_of])
def test_another_picture_of_the_same_size_is_named(write, teacher, tmp_path):
    data = write(tmp_path / "data")
    run_build(teacher, data, tmp_path / "c.zarr")
    key = read_manifest(str(data)).column("key")[3]
    write(tmp_path / "data", changed=3)
    later(data)
    with pytest.raises(UserError, match=rf"^1 rows changed \({key}\)"):
        run_build(teacher, data, tmp_path / "c.zarr")
    manifest, cache = read_manifest(str(data)), store.open_cache(tmp_path / "c.zarr")
    assert compare(cache, manifest).changed == [key]
    with pytest.raises(UserError, match=f"1 rows of .* changed since .*, the first is '{key}'"):
        training_rows(manifest, cache)
    assert run_build(teacher, data, tmp_path / "c.zarr", prune=True).rows_written == 1
    run_build(teacher, data, tmp_path / "plain.zarr", block_rows=256)
    assert tree(tmp_path / "c.zarr") == tree(tmp_path / "plain.zarr")
    assert len(training_rows(manifest, store.open_cache(tmp_path / "c.zarr"))) == ROWS


@pytest.mark.parametrize("write", [folder_of, tar_of])
def test_touched_files_are_read_once_and_not_computed_again(write, teacher, tmp_path, monkeypatch):
    data, reads = write(tmp_path / "data"), []
    run_build(teacher, data, tmp_path / "c.zarr")
    own = picture_bytes.read_bytes
    monkeypatch.setattr(picture_bytes, "read_bytes", lambda *row: reads.append(row) or own(*row))
    assert run_build(teacher, data, tmp_path / "c.zarr").rows_written == 0
    assert len(reads) == 0
    later(data)
    assert run_build(teacher, data, tmp_path / "c.zarr").rows_written == 0
    assert len(reads) == ROWS
    assert run_build(teacher, data, tmp_path / "c.zarr").rows_written == 0
    assert len(reads) == ROWS
    run_build(teacher, data, tmp_path / "plain.zarr")
    assert tree(tmp_path / "c.zarr") == tree(tmp_path / "plain.zarr")


def test_a_cache_that_remembers_nothing_is_compared_by_size(teacher, tmp_path):
    """It is one of an earlier version: its done records name no such files."""
    data = folder_of(tmp_path / "data")
    run_build(teacher, data, tmp_path / "c.zarr")
    cache = store.open_cache(tmp_path / "c.zarr")
    for block in range(cache.meta.num_blocks):
        record = store.done_record(cache, block)
        files = {name: fact for name, fact in record["files"].items() if not name.startswith("pictures/")}
        store.write_record(cache, {**record, "files": files})
    shutil.rmtree(tmp_path / "c.zarr/pictures")
    folder_of(data, changed=3)
    later(data)
    assert run_build(teacher, data, tmp_path / "c.zarr").rows_written == 0
    assert not damaged_files(cache)


def test_damaged_times_are_found_and_made_again(teacher, tmp_path):
    data = folder_of(tmp_path / "data")
    run_build(teacher, data, tmp_path / "c.zarr")
    before, path = tree(tmp_path / "c.zarr"), tmp_path / "c.zarr/pictures/00000000.times"
    for place in (0, len(path.read_bytes()) - 1):
        content = bytearray(path.read_bytes())
        content[place] ^= 1
        path.write_bytes(content)
        assert list(damaged_files(store.open_cache(tmp_path / "c.zarr"))) == ["pictures/00000000.times"]
        assert run_build(teacher, data, tmp_path / "c.zarr").rows_written == 0
        assert tree(tmp_path / "c.zarr") == before


def test_grown_and_unreadable_rows_are_remembered(teacher, tmp_path):
    data = folder_of(tmp_path / "data")
    (data / "4.bmp").write_bytes(b"no picture")
    (data / "5.bmp").unlink()
    (data / "5.txt").unlink()
    run_build(teacher, data, tmp_path / "c.zarr")
    (data / "9a.bmp").write_bytes(picture(50))
    run_build(teacher, data, tmp_path / "c.zarr")
    cache = store.open_cache(tmp_path / "c.zarr")
    digests, times = picture_bytes.stored(cache, np.arange(ROWS))
    names = read_manifest(str(data)).column("image")
    assert np.array_equal(
        digests, np.stack([picture_bytes.digest_of((data / name).read_bytes()) for name in names])
    )
    assert times.tolist() == [(data / name).stat().st_mtime_ns for name in names]
