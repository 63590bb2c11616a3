"""Make thumbnails of rows: sheets of them for a page, single ones for a table.

They are encoded from pixels, so that no other content of an image file is copied.
"""

import dataclasses
import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int

from teachercache.core.errors import UserError
from teachercache.core.paths import is_url
from teachercache.core.progress import ticker
from teachercache.data.manifest import Manifest
from teachercache.data.pictures import read_image
from teachercache.data.sample import BadSample

if TYPE_CHECKING:
    from PIL import Image

SHEET_BYTES = 8_000_000  # of all sheets together; base64 adds a third
EDGES = {
    4_000: 112,
    8_000: 72,
    12_000: 56,
}  # edge in pixels by the number of thumbnails; LEAST_EDGE for more
LEAST_EDGE = 48
ACROSS = 24  # thumbnails per row and per column of a sheet
QUALITIES = (70, 50, 35, 20)
GIVE_UP_AFTER = 20  # consecutive unreadable rows: the data is gone


@dataclasses.dataclass(frozen=True)
class Thumbnails:
    """Square images on white, by position; `number` is -1 without one."""

    edge: int
    number: Int[np.ndarray, " n"]  # the thumbnail of each row
    pictures: "list[Image.Image]"
    missing: str  # why some or all are missing, or an empty string

    def get(self, at: int) -> "Image.Image | None":
        """Return the thumbnail of the row at a position."""
        return self.pictures[self.number[at]] if self.number[at] >= 0 else None


def make_thumbnails(manifest: Manifest, rows: Int[np.ndarray, " n"]) -> Thumbnails:
    """Make the thumbnails of some rows; give up if none of the first ones can be read."""
    edge = next((size for most, size in EDGES.items() if len(rows) <= most), LEAST_EDGE)
    number, failed, reason = np.full(len(rows), -1), 0, ""
    pictures: list[Image.Image] = []
    for at, image in enumerate(_read_all(manifest, rows, edge)):
        if isinstance(image, str):
            failed, reason = failed + 1, reason or image
            if not pictures and failed >= GIVE_UP_AFTER:
                return Thumbnails(edge, number, [], f"no picture can be read ({reason})")
            continue
        number[at] = len(pictures)
        pictures.append(image)
    return Thumbnails(
        edge, number, pictures, f"{failed:,} pictures cannot be read ({reason})" if failed else ""
    )


def _read_all(manifest: Manifest, rows: np.ndarray, edge: int) -> "Iterator[Image.Image | str]":
    """Yield a thumbnail, or the reason why there is none, in the order of rows; PIL decodes outside
    Python's lock.
    """
    pool = ThreadPoolExecutor(16 if is_url(manifest.root) else 2)
    try:
        with ticker(len(rows), "pictures", "thumbnails") as tick:
            for part in np.split(rows, range(GIVE_UP_AFTER, len(rows), 256)):
                found = list(pool.map(lambda row: _thumbnail(manifest, row, edge), part.tolist()))
                tick.step(len(found))
                yield from found
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _thumbnail(manifest: Manifest, row: int, edge: int) -> "Image.Image | str":
    from PIL import Image, ImageOps

    sample = manifest.row(row)
    if not sample.image:
        return "the row has no picture"
    try:
        picture = read_image(manifest, sample, edge)
    except (BadSample, UserError, OSError) as error:  # UserError: a URL that does not respond
        return " ".join(str(error).split())[:160]
    return ImageOps.pad(picture, (edge, edge), Image.Resampling.BICUBIC, color="white")


# ----------------------------------------------------------------------------------------------------
# Encoded


def sheets(thumbnails: Thumbnails) -> list[bytes]:
    """Encode all thumbnails as WebP sheets of ACROSS x ACROSS, with the highest quality that fits into
    SHEET_BYTES.
    """
    from PIL import Image

    each, edge = ACROSS * ACROSS, thumbnails.edge
    canvases = []
    for first in range(0, len(thumbnails.pictures), each):
        part = thumbnails.pictures[first : first + each]
        sheet = Image.new("RGB", (ACROSS * edge, -(-len(part) // ACROSS) * edge), "white")
        for i, picture in enumerate(part):
            sheet.paste(picture, (i % ACROSS * edge, i // ACROSS * edge))
        canvases.append(sheet)
    for quality in QUALITIES:
        encoded = [_encode(sheet, "WEBP", quality=quality, method=2) for sheet in canvases[:1]]
        if sum(map(len, encoded)) * len(canvases) > SHEET_BYTES and quality != QUALITIES[-1]:
            continue
        encoded += [_encode(sheet, "WEBP", quality=quality, method=2) for sheet in canvases[1:]]
        if sum(map(len, encoded)) <= SHEET_BYTES:
            break
    return encoded if canvases else []


def jpeg(picture: "Image.Image") -> bytes:
    """Encode the pixels of an RGB picture as a JPEG file, without a comment that its own file may have."""
    from PIL import Image

    bare = Image.new("RGB", picture.size)
    bare.paste(picture)
    return _encode(bare, "JPEG", quality=85)


def _encode(picture: "Image.Image", form: str, **options: int) -> bytes:
    file = io.BytesIO()
    picture.save(file, form, **options)
    return file.getvalue()
