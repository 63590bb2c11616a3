"""Map many uncompressed chunk files as one numpy array, read through the page cache.

The address space of the whole array is reserved once, and every chunk file is mapped into its place
(MAP_FIXED), so that scattered rows cost what they cost in one np.memmap (LOG.md, "mapped chunks"). A chunk
whose bytes are not a multiple of the page size cannot be mapped: `can_map` returns False, and the caller
reads through zarr.
"""

import ctypes
import functools
import mmap
import os
import sys
import weakref
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from teachercache.core.errors import UserError

MAP_FIXED = 0x10
MAP_FAILED = ctypes.c_void_p(-1).value


def can_map(chunk_bytes: int) -> bool:
    """Return whether chunk files of that size can be mapped next to each other on this platform."""
    return sys.platform == "linux" and sys.byteorder == "little" and chunk_bytes % mmap.PAGESIZE == 0


@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_long,
    )
    libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    return libc


def _mmap(address: int | None, size: int, flags: int, descriptor: int) -> int:
    protection = mmap.PROT_READ if descriptor >= 0 else 0
    start = _libc().mmap(address, size, protection, flags, descriptor, 0)
    if start == MAP_FAILED:
        number = ctypes.get_errno()
        raise OSError(number, f"mmap of a cache: {os.strerror(number)}")
    return start


def map_chunks(files: Sequence[Path], *, chunk_shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Return a read-only array [rows, ...] over chunk files in their order. A file may have more bytes than
    its values.
    """
    chunk_bytes = int(np.prod(chunk_shape)) * np.dtype(dtype).itemsize
    total = chunk_bytes * len(files)
    base = _mmap(None, total, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1)
    try:
        for i, file in enumerate(files):
            descriptor = os.open(file, os.O_RDONLY)
            try:
                if os.fstat(descriptor).st_size < chunk_bytes:
                    raise UserError(f"{file}: a chunk file is too short; run `tc verify`")
                _mmap(base + i * chunk_bytes, chunk_bytes, mmap.MAP_SHARED | MAP_FIXED, descriptor)
            finally:
                os.close(descriptor)
    except (OSError, UserError):
        _libc().munmap(base, total)
        raise
    buffer = (ctypes.c_char * total).from_address(base)
    weakref.finalize(buffer, _libc().munmap, base, total)  # numpy keeps the buffer alive as long as any view
    flat = np.frombuffer(memoryview(buffer).toreadonly(), dtype=dtype)
    return flat.reshape(len(files) * chunk_shape[0], *chunk_shape[1:])
