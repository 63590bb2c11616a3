"""Find rows that show the same picture, so that it counts once with all its captions.

A picture comes several times where a data set was stored with a row per caption, for example by img2dataset.
"""

import concurrent.futures
import hashlib
from collections.abc import Sequence

from teachercache.core.paths import is_url
from teachercache.core.progress import say
from teachercache.data.manifest import Manifest
from teachercache.data.pictures import read_bytes
from teachercache.data.sample import BadSample, Sample

READS_AT_ONCE = 16  # at a URL, where each is a request


def by_picture(manifest: Manifest, rows: Sequence[int]) -> list[list[int]]:
    """Group rows by their picture, in the order of the first row of each, and print a line if rows were joined.

    Pictures are the same if they are the same file or part of a file, or have the same bytes. Only pictures with the
    same number of bytes are read.

    Args:
        manifest: The data.
        rows: Rows of the manifest.
    """
    samples = {row: manifest.row(row) for row in rows}
    usable = {row: sample for row, sample in samples.items() if sample.image and not sample.problem}
    places: dict[tuple[str, int], int] = {}  # the first row of each file or part of a file
    for row, sample in usable.items():
        places.setdefault((sample.image, sample.offset), row)
    sizes: dict[int, list[int]] = {}
    for row in places.values():
        sizes.setdefault(usable[row].size, []).append(row)
    candidates = [row for size, of_size in sizes.items() if size and len(of_size) > 1 for row in of_size]
    digests = _digests(manifest, [usable[row] for row in candidates])
    same: dict[bytes, int] = {}
    first = {row: row for row in places.values()}
    for row, digest in sorted(zip(candidates, digests, strict=True)):
        if digest:
            first[row] = same.setdefault(digest, row)
    groups: dict[int, list[int]] = {}
    for row, sample in samples.items():
        place = first[places[sample.image, sample.offset]] if row in usable else row
        groups.setdefault(place, []).append(row)
    joined = [group for group in groups.values() if len(group) > 1]
    if joined:
        a, b = (samples[row].key for row in joined[0][:2])
        say(
            f"{manifest.data}: {len(joined):,} pictures come several times, in {sum(map(len, joined)):,} rows (the "
            f"rows '{a}' and '{b}' show one): each counts once, with all its captions"
        )
    return list(groups.values())


def _digests(manifest: Manifest, samples: list[Sample]) -> list[bytes]:
    """Return a digest of the bytes of each picture, b"" if it cannot be read."""

    def digest(sample: Sample) -> bytes:
        try:
            return hashlib.blake2b(read_bytes(manifest, sample), digest_size=16).digest()
        except BadSample:
            return b""

    if not is_url(manifest.root):
        return list(map(digest, samples))
    with concurrent.futures.ThreadPoolExecutor(READS_AT_ONCE) as pool:
        return list(pool.map(digest, samples))
