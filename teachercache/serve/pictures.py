"""Small copies of the pictures of a cache, made on demand and kept in memory, never written to a file.

A picture is named by the number of its row. Its path comes from the manifest, and no part of it from a request.
"""

import threading
from collections import OrderedDict

from teachercache.analysis.report.thumbnails import jpeg
from teachercache.core.errors import UserError
from teachercache.data.manifest import Manifest
from teachercache.data.pictures import read_image
from teachercache.data.sample import BadSample

EDGES = {"small": 320, "large": 1280}  # the longest edge in pixels
MOST_BYTES = 96 << 20
AT_ONCE = 2  # pictures that are decoded side by side: one may take 256 MB


class Pictures:
    """JPEG files of the pictures of one cache, the least recently used dropped first."""

    def __init__(self, manifest: Manifest, most_bytes: int = MOST_BYTES) -> None:
        self.manifest, self.most_bytes = manifest, most_bytes
        self.kept: OrderedDict[tuple[int, str], bytes] = OrderedDict()
        self.bytes = 0
        self.lock, self.decoders = threading.Lock(), threading.BoundedSemaphore(AT_ONCE)

    def get(self, row: int, size: str) -> bytes:
        """Return the picture of a row as JPEG.

        Raises:
            BadSample: The row has no picture, or one that cannot be read.
            UserError: A connection broke.
        """
        with self.lock:
            if (row, size) in self.kept:
                self.kept.move_to_end((row, size))
                return self.kept[row, size]
        with self.decoders:
            content = _encoded(self.manifest, row, EDGES[size])
        with self.lock:
            if (row, size) not in self.kept and len(content) <= self.most_bytes:
                self.kept[row, size] = content
                self.bytes += len(content)
            while self.bytes > self.most_bytes:
                self.bytes -= len(self.kept.popitem(last=False)[1])
        return content


def _encoded(manifest: Manifest, row: int, edge: int) -> bytes:
    """Decode a picture, shrink it to an edge and encode it from its pixels."""
    from PIL import Image

    sample = manifest.row(row)
    if not sample.image:
        raise BadSample("the row has no picture")
    try:
        picture = read_image(manifest, sample, edge)
    except OSError as error:  # of the machine
        raise UserError(str(error)) from error
    picture.thumbnail((edge, edge), Image.Resampling.BICUBIC)
    return jpeg(picture)
