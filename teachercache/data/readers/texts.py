"""Read texts without a header: class names or answers, one a line, and CC3M's `caption<TAB>url`."""

import collections
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

from teachercache.core.errors import UserError
from teachercache.core.local import Sizes
from teachercache.core.paths import is_url
from teachercache.core.urls import file_size, walk
from teachercache.data.foreign import (
    MARKS,
    Foreign,
    decode_text,
    decode_whole,
    is_data,
    lines_of,
    split_in_name,
)
from teachercache.data.readers.files import IMAGE_SUFFIXES
from teachercache.data.sample import Sample
from teachercache.data.unused import Unused

HEAD = 1 << 16  # bytes that tell CC3M's file from a table

# ----------------------------------------------------------------------------------------------------
# CC3M: Train_GCC-training.tsv, `caption<TAB>url` without a header, and the downloaded images


def is_cc3m(path: Path) -> bool:
    """Return whether the first line, after an optional header `caption url`, is a caption and a URL."""
    with path.open("rb") as file:
        start = file.read(HEAD)
    encoding = next((name for mark, name in MARKS if start.startswith(mark)), "utf-8")
    text = start.decode(encoding, "ignore").replace("\r\n", "\n")
    lines = [line.split("\t") for line in text.split("\n")[:2] if line]
    if lines and _is_header(lines[0]):
        return True
    return bool(lines) and len(lines[0]) == 2 and lines[0][1].startswith(("http://", "https://"))


def _is_header(line: list[str]) -> bool:
    return [name.strip().lower() for name in line] == ["caption", "url"]


def _cc3m_lines(content: bytes) -> list[tuple[list[str], str]]:
    """Return the fields of each line, and why they cannot be read: one line in another encoding is one bad row."""
    if content.startswith(tuple(mark for mark, _ in MARKS)):
        try:
            content = decode_whole(content).encode("utf-8", "surrogatepass")
        except Foreign:
            content = content.removeprefix(b"\xef\xbb\xbf")
    lines = []
    for line in content.removesuffix(b"\n").split(b"\n") if content else []:
        try:
            lines.append((decode_text(line.rstrip(b"\r"), what="the line").split("\t"), ""))
        except Foreign as error:
            lines.append(([], str(error)))
    return lines


def read_cc3m(path: Path, unused: Unused) -> Iterator[Sample]:
    """Yield rows in file order with the row number as the key.

    Images are found by row number, as img2dataset names them, or by the name in the url: in a folder named
    after the .tsv, in `images`, or beside it, at any depth (00000/000000012.jpg or 12_ab.jpg). A row without
    a downloaded image is kept with a problem.
    """
    lines = _cc3m_lines(path.read_bytes())
    lines = lines[1:] if lines and _is_header(lines[0][0]) else lines
    urls = [line[1].split("?")[0].rsplit("/", 1)[-1] if len(line) == 2 else "" for line, _ in lines]
    times = collections.Counter(urls)
    for folder in (path.stem, "images", ""):
        looked = Unused()
        by_number, by_name, sizes = _downloaded(path.parent, folder, looked)
        if any(f"{i:09d}" in by_number for i in range(len(lines))) or any(name in times for name in by_name):
            break
    else:
        raise UserError(
            f"no picture of {path.name} in {path.parent / path.stem}: put them there, named 000000000.jpg by row "
            "number (as img2dataset does) or by the last part of their url"
        )
    if folder:  # beside the .tsv lie files of other data
        unused.include(looked)
    for i, ((line, wrong), name) in enumerate(zip(lines, urls, strict=True)):
        number = f"{i:09d}"
        image = by_number.get(number) or (by_name.get(name, "") if times[name] == 1 else "")
        problem = (
            "" if image else f"no picture {number}.jpg or {name or 'with a url'} in {path.parent / folder}"
        )
        if not image and times[name] > 1 and name in by_name:
            problem = f"{times[name]} urls end in {name}: name the pictures by row number"
        problem = wrong or ("the line is not `caption<TAB>url`" if len(line) != 2 else problem)
        size = sizes.pop(image, 0)
        size = file_size(path.parent / image) if image and not size else size or 0
        split = split_in_name(path.stem)
        yield Sample(number, image, tuple(line[:1]), split=split, size=size, problem=problem)
    for image in sizes if folder else ():
        unused.add(f"pictures belong to no line of {path.name}", image)


def _downloaded(root: Path, folder: str, unused: Unused) -> tuple[dict[str, str], dict[str, str], Sizes]:
    """Return the images below a folder of `root`, by nine digits and by name, and their bytes."""
    by_number, by_name, sizes = {}, {}, {}
    top = root / folder if folder else root
    for above, files in walk(top, is_data, unused.add) if _is_there(top) else ():
        for name in files:
            stem, suffix = os.path.splitext(name)
            if is_data(name) and suffix.lower() in IMAGE_SUFFIXES:
                where = os.path.normpath(os.path.join(folder, above, name))
                sizes[where] = files[name]
                if len(stem) == 9 and stem.isdigit():
                    by_number[stem] = where
                by_name[name] = where
    return by_number, by_name, sizes


def _is_there(folder: Path) -> bool:
    return is_url(folder) or folder.is_dir()


# ----------------------------------------------------------------------------------------------------
# Texts only: class names, answer lists


def read_texts(path: Path, unused: Unused) -> Iterator[Sample]:
    """Yield a row without an image per line. The key is the text, so that a sorted list still joins with its
    caches.

    A repeated text gets the suffix #2, #3, ...; the key of a blank line is its number.
    """
    try:
        lines = lines_of(decode_whole(path.read_bytes(), what=str(path)))
    except Foreign as error:
        raise UserError(str(error)) from error
    seen: set[str] = set()
    for number, text in enumerate(lines, start=1):
        name = text if text.strip() else f"line {number}"
        copies = (name if i == 1 else f"{name}#{i}" for i in itertools.count(1))
        key = next(key for key in copies if key not in seen)
        seen.add(key)
        yield Sample(key, "", (text,))
