"""What the readers of tables and of JSON share: columns of captions, ids, file names and splits of rows."""

import re
from collections.abc import Sequence
from typing import Any

from teachercache.data.foreign import SPLITS, Foreign, label_of, split_in_name, split_of
from teachercache.data.readers.files import TEXT_COLUMNS
from teachercache.data.unused import Unused

NUMBERED = re.compile(r"[ _.-]?\d+")  # caption_1, caption 2, and caption.1 as pandas renames a second `caption`
WHOLE = re.compile(r"-?\d+\.0+|nan", re.IGNORECASE)  # integers beside a gap, as pandas writes them


def caption_columns(names: Sequence[str], more: Sequence[str] = ()) -> list[int]:
    """Return the places of the columns of captions: the first of `TEXT_COLUMNS` that is there, as often as it is
    there, and its numbered forms (caption_1).

    Args:
        names: Names of columns without spaces around them, in lower case.
        more: Further names, taken if no column of `TEXT_COLUMNS` is there.
    """
    for wanted in (*TEXT_COLUMNS, *more):
        rest = [name.removeprefix(wanted) if name.startswith(wanted) else None for name in names]
        places = [i for i, end in enumerate(rest) if end == "" or (end and NUMBERED.fullmatch(end))]
        if places:
            return places
    return []


def split_named(value: Any, unused: Unused, key: str, *, what: str = "the split") -> str:
    """Return train, val or test for a word or compound that names it, otherwise the word itself, which is counted.

    Raises:
        Foreign: The value is a record or a list.
    """
    word = label_of(value, what=what)
    split = split_of(word) or split_in_name(word) or word
    if split and split not in SPLITS:
        unused.add(f"rows are in the split {split!r}, which is none of {', '.join(SPLITS)}", key)
    return split


def file_named(value: Any, *, what: str) -> str:
    """Return a file name, "" for null.

    Raises:
        Foreign: The value is a record or a list, or holds a character that no file name has.
    """
    name = label_of(value, what=what)
    if "\0" in name or "\n" in name:
        raise Foreign(f"{what} is no file name: it has a line break or a NUL")
    return name


def whole_labels(labels: Sequence[str]) -> list[str]:
    """Return labels as they are, except that a column of numbers written with `.0` and `nan` gets 0, 1 and ""."""
    filled = [label for label in labels if label]
    numbers = [label for label in filled if label.lower() != "nan"]
    if not numbers or not all(WHOLE.fullmatch(label) for label in filled):
        return list(labels)
    return ["" if label.lower() == "nan" else label.partition(".")[0] for label in labels]
