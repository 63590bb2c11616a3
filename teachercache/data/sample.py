"""One row of a manifest: its key, its image and its texts."""

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

# How problems begin that leave the picture of a row usable
ABOUT_TEXTS = ("the caption file ", "the captions ", "the label ")

# How problems begin that leave the picture of a row usable
ABOUT_TEXTS = ("the caption file ", "the captions ", "the label ")


class BadSample(Exception):
    """A row is unusable; the message is the reason in quarantine.jsonl."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """One row.

    Attributes:
        key: The stable key of the row.
        image: The path of the image file below the root of the manifest; empty without an image.
        texts: The texts.
        label: The label.
        split: The split.
        offset: -1 if `image` is an image file. Otherwise where the image lies in it: the first byte in a
            tar file, the row in a Parquet or Arrow file.
        size: The bytes of the image; in Parquet the bytes of its row group, as those of the cell are not
            known without reading.
        problem: Why the row is unusable, if the reader found a problem. One that begins as `ABOUT_TEXTS` leaves the
            picture usable.
        task: JSON of `task_columns` (question, choices, answers, label, boxes), or an empty string.
    """

    key: str
    image: str
    texts: tuple[str, ...] = ()
    label: str = ""
    split: str = ""
    offset: int = -1
    size: int = 0
    problem: str = ""
    task: str = ""

    @property
    def picture_problem(self) -> str:
        """Why the picture cannot be used; empty if the problem is one of the texts or the label alone."""
        return "" if self.problem.startswith(ABOUT_TEXTS) else self.problem


def task_columns(**columns: Any) -> str:
    """Return the value of `Sample.task`: one JSON object with sorted keys, without columns that are None."""
    kept = {name: value for name, value in columns.items() if value is not None}
    return json.dumps(kept, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)


def clean_texts(sample: Sample) -> Iterator[tuple[str, bool]]:
    """Yield each text of a row, and whether it is usable."""
    for text in sample.texts:
        yield text, bool(text.strip())
