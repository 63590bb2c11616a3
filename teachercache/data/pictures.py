"""Decode the image of a row: EXIF orientation, alpha channel, 16-bit depth, limits of size."""

import errno
import functools
import io
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from teachercache.core.errors import MachineError, is_machine
from teachercache.core.paths import is_url
from teachercache.core.urls import below, here, persistently, read_range
from teachercache.data.columns import COLUMN_FILES, picture_in_row
from teachercache.data.manifest import Manifest
from teachercache.data.sample import BadSample, Sample

if TYPE_CHECKING:
    from PIL import Image

AWAY = (errno.ENOENT, errno.ENOTDIR)  # what a file on a mount that is away answers
MAX_PIXELS = 89_478_485  # the warning level of PIL: about 256 MB of RGB
STRIP = 1 << 20  # pixels that are converted at once
Value = TypeVar("Value")


def read_image(manifest: Manifest, sample: Sample, at_least: int = 0) -> "Image.Image":
    """Return the upright RGB image of a row.

    Raises:
        BadSample: The image cannot be read; the message is the reason.
        MachineError: The machine failed, see `read_bytes`.
        UserError: A connection broke.
    """
    return decode_image(read_bytes(manifest, sample), at_least)


def read_bytes(manifest: Manifest, sample: Sample) -> bytes:
    """Return the stored bytes of the image of a row.

    Raises:
        BadSample: There are none: the row is unusable.
        MachineError: The disk, the network mount or the memory failed, or a file is away that had bytes when it was
            listed. The row may be whole; the same command can read it later. A file that is memory-mapped (.arrow) and
            whose disk fails under it ends the process with SIGBUS instead.
        UserError: A connection broke.
    """
    path = below(here(manifest.root), sample.image)
    try:
        return _content(path, sample)
    except FileNotFoundError as error:
        if is_url(path):
            raise BadSample(f"cannot open the picture: there is no {path}") from error
        raise unreadable(error, path, size=sample.size) from error
    except OSError as error:
        raise unreadable(error, path, size=sample.size) from error
    except LookupError as error:
        raise BadSample(str(error.args[0])) from error


def unreadable(error: OSError, path: Path, *, size: int = 0) -> MachineError | BadSample:
    """Return what an error means that a picture's file was read with: a fault of the machine, or a bad row.

    Args:
        error: The error.
        path: The file.
        size: Its bytes when it was listed; 0 if there were none.
    """
    reason = error.strerror or str(error)
    if is_machine(error):
        return MachineError(f"cannot read {path}: {reason}; run the same command again when it can be read")
    if size > 0 and error.errno in AWAY:
        return MachineError(
            f"cannot read {path}: {reason}, and it had bytes when it was listed: is a disk or a network mount away? run "
            "the same command again when it is back (a saved manifest of files that are gone: make it again)"
        )
    return BadSample(f"cannot open the picture: {reason}")


def _content(path: Path, sample: Sample) -> bytes:
    """Read the bytes of an image: a file, a part of a file, or a cell of a column."""
    if sample.offset >= 0 and path.suffix.lower() in COLUMN_FILES:
        read = functools.partial(picture_in_row, path, sample.offset)
        return persistently(read, path) if is_url(path) else read()
    if is_url(path):
        return read_range(path, sample.offset, sample.size) if sample.offset >= 0 else read_range(path)
    if sample.offset >= 0:
        return read_regular(path, sample.offset, sample.size)
    content = read_regular(path)
    if not content and sample.size > 0:
        raise OSError(errno.EIO, "it has no bytes now, and had some when it was listed", str(path))
    return content


def read_regular(path: Path, offset: int = 0, size: int = -1) -> bytes:
    """Return the bytes of a local file, or `size` of them from `offset` on.

    Raises:
        BadSample: It is a pipe, a socket or a device, whose reading may never end.
        OSError: It cannot be read.
    """
    kind = os.stat(path).st_mode
    if not stat.S_ISREG(kind) and not stat.S_ISDIR(kind):  # open() has words for a folder
        raise BadSample("cannot open the picture: it is no file, but a pipe, a socket or a device")
    with open(path, "rb") as file:
        file.seek(offset)
        return file.read(size)


def decode_image(content: bytes, at_least: int = 0) -> "Image.Image":
    """Decode an image to RGB: EXIF rotation applied, alpha on white, 16 bit scaled, first frame.

    Args:
        content: The bytes of the file.
        at_least: A larger JPEG may be decoded at 1/2, 1/4 or 1/8 of its size, as long as its shorter side
            keeps this many pixels. The decoder then skips the finest frequencies, which a resize would
            average away.

    Raises:
        BadSample: The bytes are not an image.
    """
    import warnings

    from PIL import Image, UnidentifiedImageError

    if not content:
        raise BadSample("the picture has no bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # PIL warns about every odd tag; unreadable images get their reason below
            return _despite_texts(functools.partial(_decode, at_least=at_least), content)
    except BadSample:
        raise
    except UnidentifiedImageError as error:
        raise BadSample("not a picture in a known format") from error
    except Image.DecompressionBombError as error:
        raise BadSample("far more pixels than a picture has (decompression bomb)") from error
    except MemoryError as error:
        raise BadSample("too little memory to decode the picture") from error
    except Exception as error:  # fuzzed files make PIL raise RuntimeError, struct.error and more
        raise BadSample(f"the picture is damaged: {error}") from error


def _decode(content: bytes, at_least: int) -> "Image.Image":
    from PIL import ImageOps

    image = _open(content)
    if image.format == "EPS":  # PIL runs Ghostscript for it: a program, not an image
        raise BadSample("EPS is not read")
    if image.width * image.height > MAX_PIXELS:
        raise BadSample(f"{image.width} x {image.height} pixels are more than the limit of {MAX_PIXELS:,}")
    # MPO: a phone's JPEG followed by a second one
    if at_least > 0 and image.format in ("JPEG", "MPO"):
        # PIL chooses the largest reduction that keeps both sides above the requested size
        image.draft(None, (at_least, at_least))
    image.load()
    return _flatten(ImageOps.exif_transpose(image))


def _open(content: bytes) -> "Image.Image":
    from PIL import Image

    if content[4:8] == b"ftyp" and content[8:11] != b"avi":  # AVIF is read by PIL itself
        _add_heif()
    return Image.open(io.BytesIO(content))


@functools.cache
def _add_heif() -> None:
    """Let PIL read HEIC, where pillow-heif is installed."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return
    register_heif_opener()


def _despite_texts(read: Callable[[bytes], Value], content: bytes) -> Value:
    """Read a picture; if PIL refuses a PNG for the size of its notes, read it without them."""
    try:
        return read(content)
    except ValueError as error:
        if "MAX_TEXT" not in str(error):
            raise
        return read(_without_texts(content))


def _without_texts(content: bytes) -> bytes:
    """Return a PNG without its texts and color profile, which change no pixel; EXIF in a text remains."""
    kept, at = [content[:8]], 8
    while at + 12 <= len(content):
        end = at + 12 + int.from_bytes(content[at : at + 4], "big")
        kind, start = content[at + 4 : at + 8], content[at + 8 : at + 29]
        if kind not in (b"tEXt", b"zTXt", b"iTXt", b"iCCP") or start == b"Raw profile type exif":
            kept.append(content[at:end])
        at = end
    return b"".join(kept)


def seen_size(content: bytes) -> tuple[int, int]:
    """Return width and height of an image at full size, with its EXIF rotation applied."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _despite_texts(_seen_size, content)


def _seen_size(content: bytes) -> tuple[int, int]:
    from PIL import ExifTags

    image = _open(content)
    turned = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    return image.size[::-1] if turned else image.size


def _flatten(image: "Image.Image") -> "Image.Image":
    """Convert any mode to RGB, on a white background."""
    if image.mode.startswith(("I", "F")):
        return _in_strips(image, functools.partial(_gray, scale=_gray_scale(image)))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        return _in_strips(image, _on_white)
    return image if image.mode == "RGB" else image.convert("RGB")


def _in_strips(image: "Image.Image", convert: "Callable[[Image.Image], Image.Image]") -> "Image.Image":
    """Convert an image that is large strip by strip: what a conversion holds besides is then small."""
    from PIL import Image

    rows = max(1, STRIP // image.width)
    if image.height <= rows:
        return convert(image)
    whole = Image.new("RGB", image.size)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        whole.paste(convert(strip), (0, top))
    return whole


def _on_white(image: "Image.Image") -> "Image.Image":
    from PIL import Image

    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image).convert("RGB")


def _gray_scale(image: "Image.Image") -> float:
    """Return what the values of a 16 or 32 bit gray image are divided by; PIL's convert() clips at 255.

    Raises:
        BadSample: The values are negative or above 65,535: no gray can be told from them.
    """
    import numpy as np

    if image.mode.startswith("I;16"):
        return 257.0
    low, high = 0.0, 0.0
    rows = max(1, STRIP // image.width)
    for top in range(0, image.height, rows):
        values = np.asarray(image.crop((0, top, image.width, min(top + rows, image.height))))
        values = values[~np.isnan(values)]
        low, high = min(low, float(values.min(initial=0))), max(high, float(values.max(initial=0)))
    if low < 0 or high > 65535:
        raise BadSample(f"its 32-bit values lie between {low:g} and {high:g}: write it with 8 or 16 bits")
    if image.mode.startswith("F") and high <= 1:
        return 1 / 255
    return 257.0 if high > 255 else 1.0


def _gray(image: "Image.Image", scale: float) -> "Image.Image":
    import numpy as np
    from PIL import Image

    values = np.nan_to_num(np.asarray(image, dtype=np.float64))
    return Image.fromarray(np.clip(values / scale, 0, 255).astype(np.uint8)).convert("RGB")
