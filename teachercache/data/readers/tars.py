"""Read webdataset tars: members <key>.jpg, <key>.txt, <key>.json, <key>.cls; offsets are recorded, nothing is unpacked.

Every member is a part of a row, or counted with the reason why it is not.
"""

import dataclasses
import itertools
import posixpath
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from teachercache.core.errors import UserError
from teachercache.core.paths import is_url
from teachercache.core.urls import TAR_BLOCK, in_order, open_file
from teachercache.data.foreign import (
    MAX_TEXT,
    Foreign,
    all_data,
    decode_text,
    label_of,
    split_in_name,
    too_long,
)
from teachercache.data.readers.files import (
    IMAGE_SUFFIXES,
    captions_of_json,
    captions_of_text,
    first_captions,
    no_picture,
)
from teachercache.data.readers.tar_headers import BEHIND, DAMAGED, NO_END, Member, NoTar, read_headers
from teachercache.data.sample import Sample
from teachercache.data.unused import Unused

TEXT_SUFFIXES = (".txt", ".json", ".cls")
PACKED = (
    ".tar.gz",
    ".tgz",
    ".tar.bz2",
    ".tbz2",
    ".tbz",
    ".tar.xz",
    ".txz",
    ".tar.zst",
    ".tzst",
    ".tar.lz4",
    ".tar.z",
)
PASSED_OVER = {
    DAMAGED: "headers of tar members are damaged: what they described is lost",
    BEHIND: "tars have bytes behind their end that are no members",
    NO_END: "tars have no end: they are cut off, or their writer was not closed",
}


@dataclasses.dataclass(frozen=True)
class Entry:
    """A member that may be a part of a row.

    Attributes:
        stem: The key of its row: its path up to the first dot of its name.
        suffix: The rest of its name in lower case, with the dot.
        offset: The offset of its bytes.
        size: Their number.
        content: The bytes of a text.
        problem: Why it cannot be used.
        after_damage: A damaged header lies between it and the entry before it.
    """

    stem: str
    suffix: str
    offset: int
    size: int
    content: bytes = b""
    problem: str = ""
    after_damage: int = 0


def is_packed(name: str) -> bool:
    """Return whether a name is one of a compressed tar, which has no offsets to read at."""
    return name.lower().endswith(PACKED)


def read_tars(root: Path, tars: list[Path], unused: Unused) -> Iterator[Sample]:
    """Yield rows in the order of the tar members; the name of a member is a key and never a path to write
    to. Where the names of the tars name several splits, they are those of the rows.
    """
    splits = {str(tar): split_in_name(str(tar.relative_to(root))) for tar in tars}
    several = len(set(splits.values()) - {""}) > 1  # one alone may be a name: test.tar

    def listed(tar: Path) -> tuple[list[Entry], Unused]:  # in a thread: counts of its own
        seen = Unused()
        return list(_entries(tar, str(tar.relative_to(root)), seen)), seen

    if is_url(root):
        for tar, (entries, seen) in zip(tars, in_order(listed, tars), strict=True):
            unused.include(seen)
            yield from _rows(str(tar.relative_to(root)), entries, unused, splits[str(tar)] * several)
        return
    for tar in tars:
        shard = str(tar.relative_to(root))
        yield from _rows(shard, _entries(tar, shard, unused), unused, splits[str(tar)] * several)


def read_folder_of_tars(
    path: Path, found: list[Path], entries: list[tuple[Path, bool]], unused: Unused
) -> Iterator[Sample]:
    """Yield the rows of a folder's tars, and count what lies beside them."""
    for entry, is_folder in entries:
        if is_folder:
            unused.add("folders beside tars are not entered", entry.name)
        elif entry not in found:
            packed = "compressed tars are not read: uncompress them"
            unused.add(packed if is_packed(entry.name) else no_picture(entry.name), entry.name)
    yield from read_tars(path, found, unused)


def _entries(tar: Path, shard: str, unused: Unused) -> Iterator[Entry]:
    damage = 0

    def tell(reason: str, at: int) -> None:
        nonlocal damage
        damage = at if reason == DAMAGED else damage
        unused.add(PASSED_OVER[reason], f"{shard} at byte {at:,}")

    try:
        with open_file(tar, TAR_BLOCK) as file:
            places: dict[str, Member] | None = (
                None  # of members that links may lead to, from the first link on
            )
            for member in read_headers(file, tell):
                if member.kind == "link" and places is None:
                    places = {
                        posixpath.normpath(other.name): other
                        for other in read_headers(file, lambda *_: None, end=member.at)
                    }
                if places is not None and member.kind == "file":
                    places[posixpath.normpath(member.name)] = member
                entry = _entry(file, shard, member, places or {}, unused)
                if entry is not None:
                    yield dataclasses.replace(entry, after_damage=damage)
                    damage = 0
    except NoTar as error:
        raise UserError(f"{tar} is not a plain (uncompressed) tar file: {error}") from error


def _entry(
    file: IO[bytes], shard: str, member: Member, places: dict[str, Member], unused: Unused
) -> Entry | None:
    """Return a member as an entry, or count it as unused."""
    where = f"{member.name} in {shard}"
    folder, _, name = member.name.rpartition("/")
    stem, _, suffix = name.partition(".")
    if member.kind == "folder":
        return None
    if not all_data(member.name):
        unused.add("members are hidden or of an operating system", where)
        return None
    if member.kind == "device" or not suffix:
        unused.add(
            "members are no files (a pipe or a device)"
            if member.kind == "device"
            else "members have no ending",
            where,
        )
        return None
    stem, suffix = f"{folder}/{stem}".lstrip("/"), f".{suffix}".lower()
    if member.kind == "link":
        found = places.get(posixpath.normpath(member.target))
        if found is None or found.kind != "file":
            unused.add("members are links to what is not in the tar before them", where)
            return None
        member = found
    text = suffix.endswith(TEXT_SUFFIXES)
    if text and member.size > MAX_TEXT:
        return Entry(stem, suffix, -1, 0, problem=too_long(member.size, what=_what(suffix)))
    if member.kind == "cut file":
        raise NoTar(
            f"it ends inside of {member.name}, which has {member.size:,} bytes from byte {member.offset:,}"
        )
    if member.kind == "sparse file":
        problem = f"{_what(suffix)} is stored with holes: write the tar without --sparse"
        return Entry(stem, suffix, -1, 0, problem=problem)
    content = b""
    if text:
        file.seek(member.offset)
        content = file.read(member.size)
    return Entry(stem, suffix, member.offset, member.size, content)


def _what(suffix: str) -> str:
    if suffix.endswith(".cls"):
        return "the label"
    return "the caption file" if suffix.endswith(TEXT_SUFFIXES) else "the picture"


def _rows(shard: str, entries: Iterable[Entry], unused: Unused, split: str) -> Iterator[Sample]:
    """Yield the rows of entries that lie side by side. A header that is lost between two rows may have belonged to
    either: the one that lacks a picture or texts has a problem.
    """
    before: Sample | None = None
    for stem, together in itertools.groupby(entries, key=lambda entry: entry.stem):
        group = list(together)
        for key, members in _by_key(stem, group):
            row = dataclasses.replace(_row(shard, key, members, unused), split=split)
            if before is not None:
                yield _damaged(before, members[0].after_damage)
            within = next((entry.after_damage for entry in members if entry.after_damage), 0)
            row = _damaged(row, within)
            before = row
    if before is not None:
        yield before


def _damaged(row: Sample, at: int) -> Sample:
    """Return a row beside damage (at a byte; 0 for none) with its problem, if it lacks its picture or its texts."""
    if not at or row.problem or (row.image and (row.texts or row.label)):
        return row
    what = "the captions may be lost" if row.image else "the picture may be lost"
    return dataclasses.replace(row, problem=f"{what}: the tar is damaged at byte {at:,}")


def _by_key(stem: str, group: list[Entry]) -> list[tuple[str, list[Entry]]]:
    """Return a group of one key, or, where dots belong to keys (22.05.png, 22.05.txt, 22.06.png), one group a key."""
    known = (*IMAGE_SUFFIXES, *TEXT_SUFFIXES)
    if any(entry.suffix in known for entry in group):  # a.jpg: then a.seg.png is a member beside it
        return [(stem, group)]
    keys: dict[str, list[Entry]] = {}
    for entry in group:
        inner, _, suffix = entry.suffix.rpartition(".")
        keys.setdefault(stem + inner, []).append(dataclasses.replace(entry, suffix=f".{suffix}"))
    return list(keys.items())


def _row(shard: str, stem: str, members: list[Entry], unused: Unused) -> Sample:
    """Return the row of the members of one key; members of other kinds are counted as unused."""
    group: dict[str, Entry] = {}
    for entry in members:
        name = f"{stem}{entry.suffix} in {shard}"
        if entry.suffix not in (*IMAGE_SUFFIXES, *TEXT_SUFFIXES):
            unused.add(no_picture(entry.suffix, what="members"), name)
        elif entry.suffix in group:
            unused.add("members are followed by another one of their name, which counts", name)
        group[entry.suffix] = entry
    pictures = [suffix for suffix in IMAGE_SUFFIXES if suffix in group]
    for suffix in pictures[1:]:
        unused.add("pictures are second ones of their row", f"{stem}{suffix} in {shard}")
    image = group[pictures[0]] if pictures else None
    found = [_captions(group[suffix]) for suffix in (".txt", ".json") if suffix in group]
    if len(found) == 2 and len(found[1][0]) == 1 and found[1][0][0].encode() == group[".txt"].content:
        found.reverse()  # img2dataset writes the same caption into both; a .txt cannot hold its line ends
    texts, problem = first_captions(*found)
    label, wrong = _label(group[".cls"]) if ".cls" in group else ("", "")
    problem = (image.problem if image else "") or problem or wrong
    if image and not image.problem and problem:
        unused.add("pictures are used without captions or label, which cannot be read", f"{stem} in {shard}")
    where, offset, size = (shard, image.offset, image.size) if image and not image.problem else ("", -1, 0)
    key = f"{shard[:-4] if shard.lower().endswith('.tar') else shard}/{stem}"
    return Sample(key, where, texts=texts, label=label, offset=offset, size=size, problem=problem)


def _captions(entry: Entry) -> tuple[tuple[str, ...], str]:
    if entry.problem:
        return (), entry.problem
    return (captions_of_text if entry.suffix == ".txt" else captions_of_json)(entry.content)


def _label(entry: Entry) -> tuple[str, str]:
    try:
        return (
            ("", entry.problem)
            if entry.problem
            else (label_of(decode_text(entry.content, what="the label")), "")
        )
    except Foreign as error:
        return "", str(error)
