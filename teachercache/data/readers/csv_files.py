"""Read CSV and TSV files with a header.

The header decides the delimiter: a tab, a comma, a semicolon or a bar. Its names count in any case and without spaces
around them. A CSV file has quoted fields. In a TSV file a quotation mark is a character like any other, unless the
whole file is one that a csv writer (Python's, pandas') made: its header is quoted, or exactly those fields are quoted
that need it. A TSV field that is quoted and has doubled quotation marks inside is unquoted in any case, and so is a
column whose cells are all quoted.
"""

import csv
import dataclasses
import io
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from teachercache.core.errors import UserError
from teachercache.core.urls import sizes_below
from teachercache.data.columns import PATH_COLUMNS
from teachercache.data.foreign import Foreign, clean, decode_whole, split_in_name
from teachercache.data.readers.files import IMAGE_SUFFIXES
from teachercache.data.readers.rows import caption_columns, one_split, split_named, whole_labels
from teachercache.data.sample import Sample
from teachercache.data.unused import Unused

DELIMITERS = ("\t", ",", ";", "|")
QUOTED = re.compile(r'"(?:[^"]|"")*"', re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Line:
    """One row of a table: the number of its first line in the file, its cells, and why it is unusable or ""."""

    number: int
    cells: list[str]
    problem: str = ""


@dataclasses.dataclass(frozen=True)
class Table:
    """A table: column names without spaces around them in lower case, and its rows, each as long as the header."""

    names: list[str]
    lines: list[Line]

    def column(self, choices: Sequence[str]) -> int:
        """Return the place of the first of some columns that the table has, -1 if there is none.

        Raises:
            Foreign: The column is repeated.
        """
        name = next((name for name in choices if name in self.names), None)
        if name is not None and self.names.count(name) > 1:
            raise Foreign(f"column {name!r} comes {self.names.count(name)} times: rename all but one")
        return -1 if name is None else self.names.index(name)


# ----------------------------------------------------------------------------------------------------
# Rows


def read_table(path: Path, unused: Unused) -> Iterator[Sample]:
    """Yield the rows of a file; see `_rows`. A row whose image is in another split before has a problem."""
    return one_split(_rows(path))


def _rows(path: Path) -> Iterator[Sample]:
    """Yield one row per image; lines that name the same image are its captions.

    A line with more or fewer fields than the header is a problem of its row, and so are lines that put one image into
    two splits.
    """
    try:
        table = parse_table(path.read_bytes(), known=PATH_COLUMNS)
        image_column, key_column = table.column(PATH_COLUMNS), table.column(("key",))
        label_column, split_column = table.column(("label",)), table.column(("split",))
    except Foreign as error:
        raise UserError(f"{path} is not a CSV or TSV file that can be read: {error}") from error
    if image_column < 0:
        raise UserError(
            f"{path} has no column for the picture: name one of {', '.join(PATH_COLUMNS)} in its header, which has "
            f"{', '.join(filter(None, table.names)) or 'no name'}"
        )
    text_columns = caption_columns(table.names)
    labels = whole_labels([_cell(line, label_column) for line in table.lines])
    size, of_file = sizes_below(path.parent), split_in_name(path.stem)
    rows: dict[str, _Row] = {}
    for line, label in zip(table.lines, labels, strict=True):
        image, own_key = line.cells[image_column], _cell(line, key_column)
        key = own_key or os.path.splitext(image)[0]
        if not key:
            raise UserError(
                f"line {line.number} of {path} has neither a picture nor a key: add a column `key`"
            )
        if key in rows and rows[key].image != image:
            if own_key:
                other = rows[key].image
                raise UserError(f"key '{key}' refers to two pictures in {path}: {other} and {image}")
            key = image  # a.jpg and a.png
        split = split_named(_cell(line, split_column)) or of_file
        row = rows.setdefault(key, _Row(image, label, split, line.number))
        row.add(line, [line.cells[place] for place in text_columns], split)
    for key, row in rows.items():
        yield Sample(
            key=key,
            image=row.image,
            texts=tuple(row.texts),
            label=row.label,
            split=row.split,
            size=(size(row.image) or 0) if row.image else 0,
            problem=row.problem,
        )


def _cell(line: Line, place: int) -> str:
    return line.cells[place].strip() if place >= 0 else ""


@dataclasses.dataclass
class _Row:
    """The lines of one image so far."""

    image: str
    label: str
    split: str
    number: int
    texts: list[str] = dataclasses.field(default_factory=list)
    problem: str = ""

    def add(self, line: Line, texts: list[str], split: str) -> None:
        self.texts += [text for i, text in enumerate(texts) if text.strip() or i == 0]
        self.split = self.split or split
        if split not in ("", self.split) and not self.problem:
            self.problem = (
                f"line {self.number} puts the picture into the split {self.split}, line {line.number} into {split}: "
                "give it one split"
            )
        self.problem = self.problem or line.problem


# ----------------------------------------------------------------------------------------------------
# Lines and fields


def parse_table(content: bytes, *, known: Sequence[str] = (), delimiter: str = "") -> Table:
    """Split the bytes of a CSV or TSV file into header and rows; blank lines are none.

    Args:
        content: UTF-8, or UTF-16 with a byte order mark.
        known: Names of columns of which one is expected; they help to find the delimiter.
        delimiter: The delimiter, if it is known.

    Raises:
        Foreign: It is another encoding, or a quotation mark is not closed.
    """
    text = decode_whole(content, what="it")
    skipped = 0
    if marked := re.match(r"sep=([\t,;|])\r?\n", text):  # Excel's own line
        delimiter, text, skipped = delimiter or marked[1], text[marked.end() :], 1
    raw = re.split(r"\r\n|\r|\n", text)
    header = next((line for line in raw if line.strip()), "")
    if not header:
        return Table([], [])
    delimiter = delimiter or delimiter_of(header, known)
    tabs = delimiter == "\t"
    lines = (_written_by_csv(raw, header) or _plain(raw)) if tabs else _quoted(text, delimiter, header)
    filled = [(number + skipped, cells) for number, cells in lines if any(map(str.strip, cells))]
    (_, names), *others = filled or [(0, [])]
    fitted = [_fitted(number, cells, len(names)) for number, cells in others]
    fitted = [_swallowing(line, raw, skipped, delimiter) for line in fitted]
    return Table([clean(name).strip().lower() for name in names], fitted)


def delimiter_of(header: str, known: Sequence[str] = ()) -> str:
    """Return the delimiter of a header: a tab if there is one, otherwise the one that splits off known names, and
    then the most frequent one.
    """
    if "\t" in header:
        return "\t"

    def fits(delimiter: str) -> tuple[bool, int]:
        names = [name.strip().strip('"').lower() for name in header.split(delimiter)]
        return any(name in names for name in known), len(names)

    return max(DELIMITERS[1:], key=fits)


def _fitted(number: int, cells: list[str], length: int) -> Line:
    """Return a row as long as the header; further empty cells, as Excel writes, are dropped."""
    while len(cells) > length and not cells[-1].strip():
        cells = cells[:-1]
    problem = ""
    if len(cells) != length:
        advice = (
            ": put a text that holds the delimiter between quotation marks" if len(cells) > length else ""
        )
        fields = "1 field" if len(cells) == 1 else f"{len(cells)} fields"
        problem = f"line {number} has {fields}, the header {length}{advice}"
    return Line(number, (cells + [""] * length)[:length], problem)


def _swallowing(line: Line, raw: list[str], skipped: int, delimiter: str) -> Line:
    """Return a row with a problem if a quoted field goes on over a line that looks like a row with a picture."""
    breaks = [cell for cell in line.cells if "\n" in cell]
    if not breaks or line.problem:
        return line
    start = line.number - skipped
    inside = raw[start : start + sum(cell.count("\n") for cell in breaks)]
    for number, text in enumerate(inside, start=line.number + 1):
        cells = [cell.strip().strip('"').lower() for cell in text.split(delimiter)]
        if len(cells) >= len(line.cells) > 1 and any(cell.endswith(IMAGE_SUFFIXES) for cell in cells):
            problem = f"a quotation mark of line {line.number} is closed behind line {number}, which looks like a row"
            return dataclasses.replace(line, problem=problem)
    return line


def _quoted(text: str, delimiter: str, header: str) -> list[tuple[int, list[str]]]:
    """Return the number of the first line and the cells of each row, with fields in quotation marks."""
    limit = csv.field_size_limit(sys.maxsize)  # csv's own is 131,072 characters
    rows: list[tuple[int, list[str]]] = []
    number = 1
    try:
        reader = csv.reader(
            io.StringIO(text, newline=""),
            delimiter=delimiter,
            strict=True,
            skipinitialspace=f"{delimiter} " in header,
        )
        for cells in reader:
            rows.append((number, cells))
            number = reader.line_num + 1
    except csv.Error as error:
        raise Foreign(
            f"a quotation mark of line {number} is not closed, or goes on behind its end ({error}): write a "
            "quotation mark inside a field twice"
        ) from error
    finally:
        csv.field_size_limit(limit)
    return rows


def _plain(raw: list[str]) -> list[tuple[int, list[str]]]:
    """Return number and cells of each line of a TSV file in which a quotation mark is a character."""
    rows = [(number, line.split("\t")) for number, line in enumerate(raw, start=1)]
    width = max(len(cells) for _, cells in rows)
    columns = [[cells[k] for _, cells in rows[1:] if len(cells) > k and cells[k]] for k in range(width)]
    whole = [bool(cells) and all(map(QUOTED.fullmatch, cells)) for cells in columns]
    return [(number, [_unquoted(cell, whole[k]) for k, cell in enumerate(cells)]) for number, cells in rows]


def _unquoted(cell: str, whole: bool) -> str:
    """Return a quoted cell without its marks if its column is quoted, or if it has doubled marks inside."""
    if len(cell) > 1 and cell[0] == '"' and QUOTED.fullmatch(cell) and (whole or '""' in cell[1:-1]):
        return cell[1:-1].replace('""', '"')
    return cell


def _written_by_csv(raw: list[str], header: str) -> list[tuple[int, list[str]]]:
    """Return the rows of a TSV file as `_quoted` does if a csv writer made it, otherwise nothing.

    A writer quotes every field, the header too, or exactly those that hold a tab, a line break or a quotation mark.
    """
    text = "\n".join(raw)
    if '"' not in text:
        return []
    try:
        rows = _quoted(text, "\t", header)
    except Foreign:
        return []
    if all(map(QUOTED.fullmatch, header.split("\t"))):
        return rows
    if any("\n" in cell and "\t" in cell for _, cells in rows for cell in cells):
        return []  # rather a mark that is closed lines behind
    file = io.StringIO()
    csv.writer(file, delimiter="\t", lineterminator="\n").writerows(cells for _, cells in rows)
    return rows if file.getvalue().rstrip("\n") == text.rstrip("\n") else []
