"""Read the headers of a tar file: the place of each member's bytes, and what is wrong with the file.

Python's tarfile ends in silence at a damaged header and at the end of the first of several archives in one file, and it
reads what a header claims. This reader goes on behind both, tells what it passed over, and reads headers alone.
"""

import dataclasses
import posixpath
from collections.abc import Callable, Iterator
from typing import IO

BLOCK = 512
MAX_EXTENSION = 1 << 20  # bytes of a long name or of a pax header
HARD_LINK, LINK, FOLDER, LONG_NAME, LONG_LINK, PAX, PAX_GLOBAL, SPARSE = (
    "1",
    "2",
    "5",
    "L",
    "K",
    "x",
    "g",
    "S",
)
FILES = ("0", "\0", "7", SPARSE)
EMPTY = (HARD_LINK, LINK, "3", "4", FOLDER, "6")  # kinds without bytes, whatever their header claims
DAMAGED, NO_END, BEHIND = "a damaged header", "no end", "bytes behind the end"


class NoTar(ValueError):
    """The file is no plain tar, or ends inside of a header. The message says where."""


@dataclasses.dataclass(frozen=True)
class Member:
    """One member.

    Attributes:
        name: Its path in the archive, as it is stored.
        kind: "file", "folder", "link" (of either kind), "sparse file", "device", or "cut file": the tar ends inside of
            it.
        at: The offset of its header.
        offset: The offset of its bytes.
        size: The number of its bytes.
        target: The name of the member that a link leads to.
    """

    name: str
    kind: str
    at: int
    offset: int
    size: int
    target: str = ""


@dataclasses.dataclass(frozen=True)
class _Header:
    """The fields of a header; `more`: blocks of a sparse member's map follow."""

    name: str
    target: str
    kind: str
    size: int
    more: bool


def read_headers(
    file: IO[bytes], tell: Callable[[str, int], None], end: int | None = None
) -> Iterator[Member]:
    """Yield the members in order.

    Args:
        file: The file, seekable.
        tell: Is called with DAMAGED, NO_END or BEHIND and an offset, where bytes are passed over.
        end: Stop at this offset.

    Raises:
        NoTar: The file begins with no header, or ends inside of one or of the last block of a member.
    """
    length = file.seek(0, 2)
    at, closed, lost = 0, False, False
    shared: dict[str, str] = {}  # pax records of all members
    extended: dict[str, str] = {}  # long names and pax records of the next member
    if not length:
        raise NoTar("it is empty")
    while at < (length if end is None else end):
        file.seek(at)
        block = file.read(BLOCK)
        if not block.strip(b"\0"):
            closed, lost, at = True, False, at + BLOCK
            continue
        header = _header(block) if len(block) == BLOCK else None
        if header is None or (
            header.kind in (LONG_NAME, LONG_LINK, PAX, PAX_GLOBAL) and header.size > MAX_EXTENSION
        ):
            if at == 0 or (len(block) < BLOCK and not closed and not lost):
                raise NoTar(
                    "it begins with no header of a tar" if at == 0 else f"it ends in a header at byte {at:,}"
                )
            if not lost:
                tell(BEHIND if closed else DAMAGED, at)
            lost, extended, at = True, {}, at + BLOCK
            continue
        closed = lost = False
        at += BLOCK
        if header.kind in (LONG_NAME, LONG_LINK, PAX, PAX_GLOBAL):
            _extend(header.kind, file.read(header.size), shared if header.kind == PAX_GLOBAL else extended)
            at += _padded(header.size)
            continue
        while header.more and at < length:  # GNU's map of a sparse member
            at += BLOCK
            if not file.read(BLOCK)[504:505].strip(b"\0"):
                break
        member = _member(header, {**shared, **extended}, at, length)
        extended = {}
        yield member
        whole = at + member.size <= length
        at += _padded(member.size)
        if whole and at > length:
            raise NoTar(f"it ends inside of the block of {member.name}")
    if end is None and not closed and not lost:
        tell(NO_END, length)


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _header(block: bytes) -> _Header | None:
    """Return the fields of a header, or None if its checksum or its size is wrong."""
    checksum, size = _number(block[148:156]), _number(block[124:136])
    kept = block[:148] + b" " * 8 + block[156:]
    if checksum != sum(kept) and checksum != sum(
        byte - 256 * (byte > 127) for byte in kept
    ):  # signed, of old Suns
        return None
    if size is None or size < 0:
        return None
    name, kind = _text(block[:100]), block[156:157].decode("latin-1")
    if block[257:263] == b"ustar\0" and (prefix := _text(block[345:500])):
        name = f"{prefix}/{name}"
    return _Header(name, _text(block[157:257]), kind, size, kind == SPARSE and block[482] > 0)


def _number(field: bytes) -> int | None:
    """Return an octal number, or a binary one, which GNU tar writes for more than 8 GB."""
    if field[:1] in (b"\x80", b"\xff"):
        value = int.from_bytes(field[1:], "big")
        return value if field[:1] == b"\x80" else value - 256 ** (len(field) - 1)
    digits = field.partition(b"\0")[0].strip()
    if not digits.isdigit():
        return None if digits else 0
    try:
        return int(digits, 8)
    except ValueError:
        return None


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _extend(kind: str, content: bytes, values: dict[str, str]) -> None:
    """Add the long name, long link or pax records of a member to `values`."""
    if kind in (LONG_NAME, LONG_LINK):
        values["path" if kind == LONG_NAME else "linkpath"] = _text(content)
        return
    while content:  # records: "30 path=a.png\n", the length of the record first
        digits = content[:8].partition(b" ")[0]
        if not digits.isdigit() or int(digits) <= len(digits):
            return
        record, content = content[: int(digits)], content[int(digits) :]
        name, _, value = record[len(digits) + 1 :].removesuffix(b"\n").partition(b"=")
        values[name.decode("utf-8", "surrogateescape")] = value.decode("utf-8", "surrogateescape")


def _member(header: _Header, extended: dict[str, str], offset: int, length: int) -> Member:
    """Return a member from its header and the extended headers before it."""
    name = extended.get("GNU.sparse.name") or extended.get("path") or header.name
    target = extended.get("linkpath") or header.target
    claimed = extended.get("size", "")
    size = int(claimed) if claimed.isdigit() and len(claimed) < 19 else header.size
    if header.kind == FOLDER or (header.kind in FILES and name.endswith("/")):
        kind = "folder"
    elif header.kind in (HARD_LINK, LINK):
        kind = "link"
        target = posixpath.join(posixpath.dirname(name), target) if header.kind == LINK else target
    elif header.kind not in FILES:
        kind = "device"
    elif header.kind == SPARSE or any(key.startswith("GNU.sparse.") for key in extended):
        kind = "sparse file"
    else:
        kind = "file" if header.kind in EMPTY or offset + size <= length else "cut file"
    return Member(name, kind, offset - BLOCK, offset, 0 if header.kind in EMPTY else size, target)
