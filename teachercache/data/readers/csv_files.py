"""Read CSV and TSV files with a header."""

import csv
import io
import os
from collections.abc import Iterator
from pathlib import Path

from teachercache.core.errors import UserError
from teachercache.core.urls import sizes_below
from teachercache.data.columns import PATH_COLUMNS
from teachercache.data.readers.files import TEXT_COLUMNS
from teachercache.data.sample import Sample
from teachercache.data.unused import Unused


def read_table(path: Path, unused: Unused) -> Iterator[Sample]:
    """Yield one row per image; lines that name the same image are its captions."""
    columns, lines = _table_lines(path)
    image_column = next((name for name in PATH_COLUMNS if name in columns), None)
    text_column = next((name for name in TEXT_COLUMNS if name in columns), None)
    if image_column is None:
        raise UserError(
            f"{path} has no column for the picture: name one of {', '.join(PATH_COLUMNS)} in its header"
        )
    size = sizes_below(path.parent)
    first: dict[str, dict[str, str | None]] = {}
    texts: dict[str, list[str]] = {}
    for number, line in enumerate(lines, start=1):
        name = line[image_column] or ""
        key = line.get("key") or os.path.splitext(name)[0]
        if not key:
            raise UserError(f"row {number} of {path} has neither a picture nor a key: add a column `key`")
        other = first.setdefault(key, line)[image_column] or ""
        if other != name and line.get("key"):
            raise UserError(f"key '{key}' refers to two pictures in {path}: {other} and {name}")
        if other != name:  # a.jpg and a.png
            key = name
            first.setdefault(key, line)
        texts.setdefault(key, []).extend([] if text_column is None else [line[text_column] or ""])
    for key, line in first.items():
        image = line[image_column] or ""
        yield Sample(
            key=key,
            image=image,
            texts=tuple(texts[key]),
            label=line.get("label") or "",
            split=line.get("split") or "",
            size=(size(image) or 0) if image else 0,
        )


def _table_lines(path: Path) -> tuple[list[str], list[dict[str, str | None]]]:
    """Return header and lines; a byte order mark (Excel) is skipped, a tab in the header means TSV."""
    try:
        with io.TextIOWrapper(io.BytesIO(path.read_bytes()), newline="", encoding="utf-8-sig") as file:
            delimiter = "\t" if "\t" in file.readline() else ","
            file.seek(0)
            lines = csv.DictReader(file, delimiter=delimiter)
            return list(lines.fieldnames or []), list(lines)
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is not a CSV or TSV file in UTF-8: {error}") from error
