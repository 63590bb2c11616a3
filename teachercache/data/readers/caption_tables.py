"""Read the captions of a folder's pictures from a table beside them: Hugging Face's metadata.csv and metadata.jsonl, and
Flickr8k's captions.txt.
"""

import csv
import dataclasses
import io
import os
import posixpath
import re
from collections.abc import Iterable, Iterator
from pathlib import PurePath
from typing import Any

from teachercache.data.foreign import (
    Foreign,
    captions_of,
    clean,
    decode_whole,
    header_of,
    label_of,
    lines_of,
    parse_json,
)
from teachercache.data.readers.files import TEXT_COLUMNS
from teachercache.data.unused import Unused

TABLES = ("metadata.csv", "metadata.tsv", "metadata.jsonl", "captions.csv", "captions.tsv", "captions.txt")
NAME_COLUMNS = ("file_name", "image", "image_name", "filename")
LABEL_COLUMN = "label"
# Folders of all pictures: above the folders of splits (images/train/cat), or beside a table (Images/, Flicker8k_Dataset/)
PICTURE_FOLDERS = {"images", "image", "imgs", "img", "pictures", "photos", "data", "dataset"}


def holds_pictures(folder: str) -> bool:
    """Return whether the name of a folder says that it holds all pictures, whatever their split or class."""
    return bool(PICTURE_FOLDERS & set(re.split("[^a-z]+", folder.lower())))


def is_caption_table(name: str, present: Iterable[str], image_suffixes: tuple[str, ...]) -> bool:
    """Return whether a file of a folder is a table of captions, and not the caption of a picture of its name."""
    stem = os.path.splitext(name)[0]
    return name.lower() in TABLES and not any(f"{stem}{suffix}" in present for suffix in image_suffixes)


@dataclasses.dataclass
class Listed:
    """What tables say of one picture; `line` is the table that named it first."""

    table: str
    texts: tuple[str, ...] = ()
    label: str = ""
    problem: str = ""


class CaptionTables:
    """The tables of a folder and the folders below it. Their paths are relative to the folder of the table."""

    def __init__(self, unused: Unused) -> None:
        self.unused = unused
        self.waiting: dict[str, Listed] = {}  # by the path of the picture below the root
        self.folders: set[str] = set()  # that hold a table

    def add(self, folder: str, name: str, content: bytes, problem: str) -> None:
        """Read a table. One that is not understood is counted as unused, with its reason."""
        table = os.path.join(folder, name)
        try:
            if problem:
                raise Foreign(problem)
            for line, image, values in _lines(name.lower(), content):
                self._add_line(folder, table, line, image, values)
        except Foreign as error:
            self.unused.add(f"tables of captions are not understood ({error})", table)
        self.folders.add(folder)

    def _add_line(self, folder: str, table: str, line: int, image: str, values: Any) -> None:
        if not image:
            self.unused.add("lines of tables of captions name no picture", f"{table}, line {line:,}")
            return
        path = posixpath.normpath(posixpath.join(folder, image.replace("\\", "/")))
        listed = self.waiting.setdefault(path, Listed(table))
        try:
            if isinstance(values, str):
                raise Foreign(values)
            listed.texts += captions_of(values[0], what="a caption")
            listed.label = listed.label or label_of(values[1])
        except Foreign as error:
            listed.problem = f"the captions in line {line:,} of {table}: {error}"

    def of(self, path: PurePath) -> Listed | None:
        """Return and forget what the tables say of a picture; a folder of pictures beside a table may be left away
        (Images/1.jpg is 1.jpg in Flickr8k's captions.txt).
        """
        if not self.waiting:
            return None
        found = self.waiting.pop(path.as_posix(), None)
        if found is None and len(path.parts) > 1 and holds_pictures(path.parts[-2]):
            above = PurePath(*path.parts[:-2])
            if (above.as_posix() if above.parts else "") in self.folders:
                found = self.waiting.pop((above / path.name).as_posix(), None)
        return found

    def name_the_rest(self) -> None:
        """Count the pictures that the tables name and that are not there."""
        for path, listed in self.waiting.items():
            self.unused.add(f"pictures named by {listed.table} are not there", path)


def _lines(name: str, content: bytes) -> Iterator[tuple[int, str, Any]]:
    """Yield the number of each line, the name of its picture, and its caption and label, or a reason."""
    if name.endswith(".jsonl"):
        yield from _json_lines(content)
        return
    text = decode_whole(content)
    delimiter = "\t" if "\t" in text.partition("\n")[0] else ","
    lines = _table_lines(text, delimiter)
    header = header_of(next(lines, (0, []))[1])
    image, caption = _place(header, NAME_COLUMNS), _place(header, TEXT_COLUMNS)
    label = _place(header, (LABEL_COLUMN,))
    if image is None or (caption is None and label is None):
        raise Foreign(f"a header with `file_name` and `text` is expected, it has {', '.join(header)[:80]}")
    for number, cells in lines:
        if len(cells) != len(header):
            reason = f"it has {len(cells)} fields, the header has {len(header)}"
            yield number, cells[image].strip() if len(cells) > image else "", reason
            continue
        label_cell = None if label is None else cells[label]
        yield number, cells[image].strip(), (None if caption is None else cells[caption].strip(), label_cell)


def _place(header: list[str], names: tuple[str, ...]) -> int | None:
    return next((header.index(name) for name in names if name in header), None)


def _table_lines(text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the number and the fields of each line that is not empty. A TSV file has no quotes."""
    if delimiter == "\t":
        yield from ((i, line.split("\t")) for i, line in enumerate(lines_of(text), start=1) if line)
        return
    limit = csv.field_size_limit(1 << 30)
    try:
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        for cells in reader:
            if cells:
                yield reader.line_num, cells
    except csv.Error as error:
        raise Foreign(f"it is no CSV: {error}") from error
    finally:
        csv.field_size_limit(limit)


def _json_lines(content: bytes) -> Iterator[tuple[int, str, Any]]:
    for number, line in enumerate(lines_of(decode_whole(content)), start=1):
        if not line.strip():
            continue
        values = parse_json(line.encode(), what=f"line {number:,}")
        if not isinstance(values, dict):
            raise Foreign(f"line {number:,} is no JSON object")
        lower = {str(key).strip().lower(): value for key, value in values.items()}
        image = next((lower[name] for name in NAME_COLUMNS if isinstance(lower.get(name), str)), "")
        caption = next((lower[name] for name in TEXT_COLUMNS if lower.get(name)), None)
        yield number, clean(image), (caption, lower.get(LABEL_COLUMN))
