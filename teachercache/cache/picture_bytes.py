"""Remember of which bytes each row of a cache was computed: a picture that was replaced by one of the same size is seen.

<cache>/pictures/<block>.digests   blake2b of the bytes of each row's picture, 16 bytes, made when it was decoded;
                                   listed in the block's done record; zeros for a row whose picture was not read
<cache>/pictures/<block>.times     when the picture's file (or its tar, or its Parquet file) was last written, int64
                                   nanoseconds, then a crc32

A file with its old time is not read again. Files with another time (touched, copied, checked out, or replaced) are read
and compared by digest; a build then remembers the new times. A cache without these files, and data at URLs, are compared
by size alone.
"""

import hashlib
import os
import zlib
from pathlib import Path

import numpy as np

from teachercache.cache import store
from teachercache.core.paths import is_url, write_whole
from teachercache.core.progress import say, ticker
from teachercache.core.urls import below
from teachercache.data.manifest import Manifest
from teachercache.data.pictures import read_bytes
from teachercache.data.sample import BadSample

DIGEST = 16  # bytes


def digest_of(content: bytes) -> np.ndarray:
    """Return the digest of a picture's bytes, uint8 [DIGEST]."""
    return np.frombuffer(hashlib.blake2b(content, digest_size=DIGEST).digest(), np.uint8)


def file_time(root: Path, image: str) -> int:
    """Return when a picture's file was last written, in nanoseconds; 0 for a URL or a file that is not there."""
    if is_url(root) or is_url(image):
        return 0
    try:
        return os.stat(below(root, image)).st_mtime_ns
    except OSError:
        return 0


# ----------------------------------------------------------------------------------------------------
# Files


def digests_file(block: int, digests: np.ndarray) -> dict[str, bytes]:
    """Return name and content of the digests of a block [rows, DIGEST]; {} if no picture was read."""
    return {_name(block, "digests"): digests.tobytes()} if digests.any() else {}


def write_times(cache: store.Cache, block: int, times: np.ndarray) -> None:
    """Write the times of a block [rows]; nothing if none is known."""
    if times.any():
        content = times.astype("<i8").tobytes()
        write_whole(cache.path / _name(block, "times"), content + zlib.crc32(content).to_bytes(4, "little"))


def stored(cache: store.Cache, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the digests uint8 [n, DIGEST] and times int64 [n] of some rows; zeros where there are none."""
    digests, times = np.zeros((len(rows), DIGEST), np.uint8), np.zeros(len(rows), np.int64)
    blocks = rows // cache.meta.block_rows
    for block in np.unique(blocks).tolist():
        inside, start = np.flatnonzero(blocks == block), cache.meta.block(block).start
        for values, content in ((digests, _digests(cache, block)), (times, _times(cache, block))):
            known = rows[inside] - start < len(content)  # a block that grew has fewer until it is written
            values[inside[known]] = content[rows[inside[known]] - start]
    return digests, times


def damaged_times(cache: store.Cache) -> list[str]:
    """Return the files of times that are damaged. A build makes them again."""
    names = [_name(block, "times") for block in range(cache.meta.num_blocks)]
    return [name for name in names if (cache.path / name).exists() and _checked(cache.path / name) is None]


def _name(block: int, kind: str) -> str:
    return f"pictures/{block:08d}.{kind}"


def _digests(cache: store.Cache, block: int) -> np.ndarray:
    """Return the digests of a block, none if they are missing or damaged, which `tc verify` finds."""
    record, name = store.done_record(cache, block), _name(block, "digests")
    if record is None or name not in record["files"]:
        return np.zeros((0, DIGEST), np.uint8)
    try:
        content = (cache.path / name).read_bytes()
    except FileNotFoundError:
        content = b""
    whole = [len(content), zlib.crc32(content)] == record["files"][name]
    return np.frombuffer(content if whole else b"", np.uint8).reshape(-1, DIGEST)


def _times(cache: store.Cache, block: int) -> np.ndarray:
    return np.frombuffer(_checked(cache.path / _name(block, "times")) or b"", "<i8")


def _checked(path: Path) -> bytes | None:
    """Return the content of a file without its checksum, None if it is missing or damaged."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    content, checksum = content[:-4], content[-4:]
    return (
        content if zlib.crc32(content).to_bytes(4, "little") == checksum and len(content) % 8 == 0 else None
    )


# ----------------------------------------------------------------------------------------------------
# Comparison


def replaced_pictures(
    cache: store.Cache,
    cache_rows: np.ndarray,
    manifest: Manifest,
    rows: np.ndarray,
    *,
    remember: bool = False,
) -> np.ndarray:
    """Return which rows have a picture of other bytes than those that the cache was computed of, bool [n].

    Args:
        cache: The cache.
        cache_rows: Rows of the cache [n].
        manifest: The present data.
        rows: The same rows in the manifest [n].
        remember: Write the present times of files with the same bytes, so that they are not read again.

    Raises:
        MachineError: A file cannot be read now.
    """
    digests, times = stored(cache, cache_rows)
    replaced = np.zeros(len(rows), bool)
    known = np.flatnonzero(digests.any(1))
    now = _times_now(manifest, rows[known])
    touched = known[(now != 0) & (now != times[known])]
    if not len(touched):
        return replaced
    times[known] = now
    say(
        f"{len(touched):,} pictures of {manifest.data} were written since {cache.path} was built: reading them"
    )
    with ticker(len(touched), "pictures", "comparing pictures") as tick:
        for i in touched.tolist():
            try:
                content = read_bytes(manifest, manifest.row(int(rows[i])))
            except BadSample:
                pass  # nobody can tell
            else:
                replaced[i] = not np.array_equal(digest_of(content), digests[i])
            tick.step(1)
    if remember:
        _remember(cache, cache_rows[touched], times[touched], replaced[touched])
    return replaced


def _times_now(manifest: Manifest, rows: np.ndarray) -> np.ndarray:
    """Return the times of the picture files of some rows; each file is looked at once."""
    images = manifest.table["image"].take(rows).combine_chunks().dictionary_encode()
    times = [file_time(manifest.root, name) if name else 0 for name in images.dictionary.to_pylist()]
    return np.array(times, np.int64)[images.indices.to_numpy()] if times else np.zeros(len(rows), np.int64)


def _remember(cache: store.Cache, rows: np.ndarray, times: np.ndarray, replaced: np.ndarray) -> None:
    """Write the new times of rows whose pictures have the same bytes."""
    blocks = rows // cache.meta.block_rows
    with store.growing(cache):
        for block in np.unique(blocks[~replaced]).tolist():
            of_block = np.arange(cache.meta.block(block).start, cache.meta.block(block).stop)
            values = stored(cache, of_block)[1]
            same = (blocks == block) & ~replaced
            values[rows[same] - of_block[0]] = times[same]
            write_times(cache, block, values)
