"""Read Parquet with images (bytes or paths) and Hugging Face `datasets` on disk, with pyarrow alone.

`datasets` saves a folder per split: Arrow stream files, listed in order in `state.json`, beside
`dataset_info.json`; a `dataset_dict.json` above lists the splits. The Arrow schema carries the names of the
classes.
"""

import json
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from teachercache.core.errors import UserError
from teachercache.core.paths import is_url
from teachercache.core.urls import sizes_below
from teachercache.data.columns import (
    PATH_COLUMNS,
    PICTURE_COLUMNS,
    group_bytes,
    open_arrow,
    open_parquet,
    picture_column,
)
from teachercache.data.foreign import split_in_name
from teachercache.data.readers.files import TEXT_COLUMNS
from teachercache.data.sample import Sample, task_columns
from teachercache.data.unused import Unused

if TYPE_CHECKING:
    import pyarrow as pa

KEY_COLUMNS = ("key", "__key__")
TASK_COLUMNS = (
    "question",
    "choices",
    "answers",
    "answer",
    "boxes",
    "question_id",
    "image_id",
)  # VQA sets on the hub


def is_manifest(path: Path) -> bool:
    """Return whether `tc manifest --out` wrote a Parquet file."""
    return b"root" in (_parquet(path).schema_arrow.metadata or {})


def read_parquet(root: Path, files: list[Path], unused: Unused) -> Iterator[Sample]:
    """Yield the rows of Parquet files in order, without reading the bytes of the images."""
    for path in files:
        file = _parquet(path)
        columns = Columns(root, path, file.schema_arrow)
        first = 0
        for group in range(file.metadata.num_row_groups):
            size = group_bytes(file.metadata, group, columns.picture, stored=True) if columns.picture else 0
            for batch in file.iter_batches(
                4096, row_groups=[group], columns=columns.others, use_threads=False
            ):
                yield from columns.samples(
                    root, first, batch.to_pylist(), [size] * len(batch), split="", name=path.stem
                )
                first += len(batch)


def read_saved(root: Path, unused: Unused) -> Iterator[Sample]:
    """Yield the rows that `save_to_disk` of a Dataset or DatasetDict wrote; the key is split/row."""
    splits = _json(root / "dataset_dict.json")["splits"] if (root / "dataset_dict.json").exists() else [""]
    for split in splits:
        state = _json(root / split / "state.json")
        if state.get("_indices_data_files"):
            raise UserError(
                f"{root / split} was saved with an index: call flatten_indices() before save_to_disk()"
            )
        files = [root / split / entry["filename"] for entry in state["_data_files"]]
        yield from read_arrow(root, files, unused, split=split, name=split or "row")


def read_arrow(
    root: Path, files: list[Path], unused: Unused, *, split: str = "", name: str = ""
) -> Iterator[Sample]:
    """Yield the rows of Arrow files; without `name`, keys are the name of the file and the row in it."""
    import pyarrow as pa
    import pyarrow.compute as pc

    first = 0
    for path in files:
        try:
            table = open_arrow(path)
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{path} is not a readable Arrow file: {error}") from error
        columns = Columns(root, path, table.schema)
        sizes = []
        if columns.picture:
            cells = table.column(columns.picture)
            inside = pc.struct_field(cells, "bytes") if "bytes" in _names(cells.type) else cells
            sizes = [size or 0 for size in pc.binary_length(inside).to_pylist()]
        start = 0
        for batch in table.select(columns.others).to_batches(max_chunksize=4096):
            lines = batch.to_pylist()
            part = sizes[start : start + len(lines)] or [0] * len(lines)
            before = first if name else 0
            yield from columns.samples(
                root, start, lines, part, split=split, name=name or path.stem, before=before
            )
            start += len(lines)
        first += start


class Columns:
    """The roles of the columns of a schema; converts rows to Samples."""

    def __init__(self, root: Path, path: Path, schema: "pa.Schema") -> None:
        self.path, names = path, schema.names
        self.picture = picture_column(schema)
        self.where = "" if self.picture else self._first(schema, PATH_COLUMNS, strings=True)
        self.text = self._first(schema, (*TEXT_COLUMNS, "question"))
        self.key = self._first(schema, KEY_COLUMNS)
        self.task = [name for name in TASK_COLUMNS if name in names] if "question" in names else []
        if not (self.picture or self.where or self.text):
            raise UserError(
                f"{path} has neither pictures nor texts among its columns ({', '.join(names)}): name a column of "
                f"bytes one of {', '.join(PICTURE_COLUMNS)}, of paths one of {', '.join(PATH_COLUMNS)}, of texts one "
                f"of {', '.join(TEXT_COLUMNS)}"
            )
        used = [self.where, self.text, self.key, "label", "split", *self.task]
        self.others = [name for name in dict.fromkeys(used) if name and name in names]
        if not self.others:  # images alone: a column has to be read to count the rows
            self.others = [name for name in names if name != self.picture][:1] or [self.picture]
        self.classes = class_names(schema)
        self.size = sizes_below(root)

    @staticmethod
    def _first(schema: "pa.Schema", names: tuple[str, ...], *, strings: bool = False) -> str:
        import pyarrow.types as types

        fits = lambda kind: not strings or types.is_string(kind) or types.is_large_string(kind)  # noqa: E731
        return next((name for name in names if name in schema.names and fits(schema.field(name).type)), "")

    def samples(
        self,
        root: Path,
        start: int,
        lines: list[dict[str, Any]],
        sizes: list[int],
        *,
        split: str,
        name: str,
        before: int = 0,
    ) -> Iterator[Sample]:
        """Yield the Samples of lines that begin at row `start` of the file and at row `before` + `start`
        of the set.
        """
        own_path = PurePath(str(self.path.relative_to(root)))
        for row, (line, size) in enumerate(zip(lines, sizes, strict=True), start=start):
            image, offset = str(own_path), row
            if not self.picture:
                image, offset = str(line.get(self.where) or ""), -1
                image = str(own_path.parent / image) if image and not is_url(image) else image
                size = (self.size(image) or 0) if image else 0
            texts = _texts(line.get(self.text)) if self.text else ()
            kept = {column: line[column] for column in self.task}
            yield Sample(
                key=str(line[self.key]) if self.key else f"{name}/{before + row}",
                image=image,
                texts=texts,
                label=self._label(line.get("label")),
                split=str(line.get("split") or split or split_in_name(self.path.stem)),
                offset=offset,
                size=size,
                task=_task(kept) if kept else "",
            )

    def _label(self, value: Any) -> str:
        if self.classes and isinstance(value, int):
            return (
                self.classes[value] if 0 <= value < len(self.classes) else ""
            )  # -1: the test split has no label
        return "" if value is None else str(value)


def class_names(schema: "pa.Schema") -> list[str]:
    """Return the class names of the column `label` from the metadata that Hugging Face writes into the
    schema.
    """
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return features["label"].get("names") or []
    except (KeyError, ValueError, TypeError, AttributeError):
        return []


def _texts(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    return (
        tuple("" if text is None else str(text) for text in value)
        if isinstance(value, list)
        else (str(value),)
    )


def _task(line: dict[str, Any]) -> str:
    answers = line.get("answers")
    if answers and isinstance(answers[0], dict):  # [{"answer": ..., "answer_confidence": ...}]
        line["answers"] = [entry.get("answer") for entry in answers]
    return task_columns(task="vqa", **line)


def _names(kind: "pa.DataType") -> list[str]:
    return [field.name for field in kind] if hasattr(kind, "get_field_index") else []


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} is missing or damaged ({error}): save the dataset again with save_to_disk()"
        ) from error


def _parquet(path: Path) -> Any:
    import pyarrow as pa

    try:
        return open_parquet(path)
    except (pa.ArrowInvalid, OSError) as error:
        if is_url(path) and not isinstance(error, pa.ArrowInvalid):
            raise  # an error of the connection
        raise UserError(f"{path} is not a readable Parquet file: {error}") from error
