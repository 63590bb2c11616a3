"""What the readers of tables and of JSON share: columns of captions, ids, file names and splits of rows."""

import dataclasses
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from teachercache.core.paths import is_url
from teachercache.data.foreign import Foreign, caption_of, captions_of, label_of, split_of
from teachercache.data.readers.files import TEXT_COLUMNS
from teachercache.data.sample import Sample, task_columns

TEXT_FIELDS = ("text", "caption", "raw", "value", "string")  # where a record holds its text
LONGEST = 255  # bytes of a file name
NUMBERED = re.compile(
    r"[ _.-]?\d+"
)  # caption_1, caption 2, and caption.1 as pandas renames a second `caption`
WHOLE = re.compile(r"-?\d+\.0+|nan", re.IGNORECASE)  # integers beside a gap, as pandas writes them


def caption_columns(names: Sequence[str], choices: Sequence[str] = TEXT_COLUMNS) -> list[int]:
    """Return the places of the columns of captions: the first of some names that is there, as often as it is
    there, and its numbered forms (caption_1).

    Args:
        names: Names of columns without spaces around them, in lower case.
        choices: What such a column is called.
    """
    for wanted in choices:
        rest = [name.removeprefix(wanted) if name.startswith(wanted) else None for name in names]
        places = [i for i, end in enumerate(rest) if end == "" or (end and NUMBERED.fullmatch(end))]
        if places:
            return places
    return []


def split_named(value: Any, *, what: str = "the split") -> str:
    """Return train, val or test for a word that names it, also beside digits (val2014), otherwise the word itself.

    Raises:
        Foreign: The value is a record or a list.
    """
    word = label_of(value, what=what)
    return split_of(word) or split_of(word.strip("0123456789_-. ")) or word


def one_split(samples: Iterable[Sample]) -> Iterator[Sample]:
    """Yield rows; a row whose image file is in another split in an earlier row has a problem."""
    splits: dict[str, str] = {}
    for sample in samples:
        if sample.image and sample.offset < 0 and sample.split:
            first = splits.setdefault(sample.image, sample.split)
            if first != sample.split and not sample.problem:
                problem = f"the picture is in the split {first} in a row before, in {sample.split} here: give it one"
                sample = dataclasses.replace(sample, problem=problem)
        yield sample


def file_named(value: Any, *, what: str) -> str:
    """Return a file name, "" for null.

    Raises:
        Foreign: The value is a record or a list, or holds a character that no file name has.
    """
    name = label_of(value, what=what)
    if "\0" in name or "\n" in name:
        raise Foreign(f"{what} is no file name: it has a line break or a NUL")
    if not is_url(name) and any(len(part.encode()) > LONGEST for part in name.split("/")):
        raise Foreign(f"{what} is no file name: it has {len(name):,} characters")
    return name


def whole_labels(labels: Sequence[str]) -> list[str]:
    """Return labels as they are, except that a column of numbers written with `.0` and `nan` gets 0, 1 and ""."""
    filled = [label for label in labels if label]
    numbers = [label for label in filled if label.lower() != "nan"]
    if not numbers or not all(WHOLE.fullmatch(label) for label in filled):
        return list(labels)
    return ["" if label.lower() == "nan" else label.partition(".")[0] for label in labels]


# ----------------------------------------------------------------------------------------------------
# Cells of Parquet and Arrow


def cell_captions(value: Any, column: str) -> tuple[str, ...]:
    """Return the texts of a cell: of a text, of a list, or of records with a text ({"lang", "text"}).

    Raises:
        Foreign: A value is something else.
    """
    entries = value if isinstance(value, list) else [value]
    texts = [text for entry in entries for text in _texts_of_record(entry)]
    return captions_of(texts, what=f"a caption in column {column!r}")


def _texts_of_record(entry: Any) -> list[Any]:
    if not isinstance(entry, dict):
        return [entry]
    value = next((entry[name] for name in TEXT_FIELDS if name in entry), entry)
    return value if isinstance(value, list) else [value]


def vqa_columns(line: Mapping[str, Any]) -> str:
    """Return the task columns of a question of VQA, with texts as its values.

    Raises:
        Foreign: There is no question, or a value is no text.
    """
    question = caption_of(line["question"], what="the question")
    if question is None:
        raise Foreign("the row has no question")
    answers = line.get("answers")
    if isinstance(answers, dict):  # datasets makes a record of lists of a list of records
        answers = answers.get("answer")
    if isinstance(answers, list):
        answers = [entry.get("answer") if isinstance(entry, dict) else entry for entry in answers]
    lists = {
        name: list(captions_of(values, what=f"an entry of {name}"))
        for name, values in (("answers", answers), ("choices", line.get("choices")))
        if values is not None
    }
    ids = {name: line.get(name) for name in ("answer", "question_id", "image_id")}
    for name, value in ids.items():
        if not isinstance(value, int) or isinstance(value, bool):
            ids[name] = caption_of(value, what=f"the {name}")
    boxes = boxes_of(line.get("boxes"))
    return task_columns(task="vqa", question=question, boxes=boxes, **lists, **ids)


def boxes_of(value: Any) -> list[list[float]] | None:
    """Return boxes, each of four numbers, None for null.

    Raises:
        Foreign: It is anything else.
    """
    if value is None:
        return None
    numbers = isinstance(value, list) and all(
        isinstance(box, list) and len(box) == 4 and all(map(_is_finite, box)) for box in value
    )
    if not numbers:
        raise Foreign("the boxes are no list of four numbers each")
    return value


def _is_finite(value: Any) -> bool:
    """Return whether a value of JSON is a number that a float holds: integers may have any number of digits."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= sys.float_info.max
