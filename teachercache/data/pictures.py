"""Decode the image of a row: EXIF orientation, alpha channel, 16-bit depth, limits of size."""

import errno
import functools
import io
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

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

    from PIL import Image, ImageOps, UnidentifiedImageError

    if not content:
        raise BadSample("the picture has no bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # PIL warns about every odd tag; unreadable images get their reason below
            image = Image.open(io.BytesIO(content))
            if image.format == "EPS":  # PIL runs Ghostscript for it: a program, not an image
                raise BadSample("EPS is not read")
            if image.width * image.height > MAX_PIXELS:
                raise BadSample(
                    f"{image.width} x {image.height} pixels are more than the limit of {MAX_PIXELS:,}"
                )
            if at_least > 0 and image.format in (
                "JPEG",
                "MPO",
            ):  # MPO: a phone's JPEG followed by a second one
                # PIL chooses the largest reduction that keeps both sides above the requested size
                image.draft(None, (at_least, at_least))
            image.load()
            return _flatten(ImageOps.exif_transpose(image))
    except BadSample:
        raise
    except UnidentifiedImageError as error:
        raise BadSample("not a picture in a known format") from error
    except Image.DecompressionBombError as error:
        raise BadSample("far more pixels than a picture has (decompression bomb)") from error
    except Exception as error:  # fuzzed files make PIL raise RuntimeError, struct.error and more
        raise BadSample(f"the picture is damaged: {error}") from error


def seen_size(content: bytes) -> tuple[int, int]:
    """Return width and height of an image at full size, with its EXIF rotation applied."""
    import warnings

    from PIL import ExifTags, Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = Image.open(io.BytesIO(content))
        turned = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    return image.size[::-1] if turned else image.size


def _flatten(image: "Image.Image") -> "Image.Image":
    """Convert any mode to RGB, on a white background."""
    from PIL import Image

    if image.mode.startswith(("I", "F")):  # 16 or 32 bit gray: PIL's convert() clips at 255
        import numpy as np

        values = np.asarray(image, dtype=np.float64)
        wide = image.mode.startswith("I;16") or (image.mode == "I" and values.max(initial=0) > 255)
        scale = 257.0 if wide else 1.0
        image = Image.fromarray(np.clip(values / scale, 0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image if image.mode == "RGB" else image.convert("RGB")
