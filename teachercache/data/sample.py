"""One row of a manifest: its key, picture and texts."""

import dataclasses
import json
from collections.abc import Iterator
from typing import Any


class BadSample(Exception):
    """One row cannot be used; the message is the reason, for quarantine.jsonl."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """One row. `offset` is -1 where `image` is a whole file, else the picture lies inside it.

    In a tar `offset` is its first byte and `size` its bytes; in a Parquet or Arrow file `offset` is its row.
    """

    key: str
    image: str  # path below the manifest's root, "" where the row has no picture
    texts: tuple[str, ...] = ()
    label: str = ""
    split: str = ""
    offset: int = -1
    size: int = (
        0  # bytes of the picture; in Parquet of its row group, where its own would mean reading everything
    )
    problem: str = ""  # why the row cannot be used, where its reader found out
    task: str = ""  # canonical JSON of `task_columns`: question, choices, answers, label, boxes; "" where there is none


def task_columns(**columns: Any) -> str:
    """What `Sample.task` holds: one JSON object, keys sorted, columns that are None left out."""
    kept = {name: value for name, value in columns.items() if value is not None}
    return json.dumps(kept, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)


def clean_texts(sample: Sample) -> Iterator[tuple[str, bool]]:
    """Each text of a row with whether it can be used."""
    for text in sample.texts:
        yield text, bool(text.strip())
