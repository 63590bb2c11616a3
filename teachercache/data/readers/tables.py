"""Read Parquet with images (bytes or paths) and Hugging Face `datasets` on disk, with pyarrow alone.

`datasets` saves a folder per split: Arrow stream files, listed in order in `state.json`, beside
`dataset_info.json`; a `dataset_dict.json` above lists the splits. The Arrow schema carries the names of the
classes.
"""

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from teachercache.core.errors import UserError, is_machine
from teachercache.core.paths import is_url
from teachercache.core.urls import sizes_below
from teachercache.data.columns import (
    PATH_COLUMNS,
    PICTURE_COLUMNS,
    columns_named,
    group_bytes,
    of_bytes,
    of_strings,
    open_arrow,
    open_parquet,
    picture_column,
)
from teachercache.data.foreign import Foreign, clean, kind_of, label_of, parse_json, split_in_name
from teachercache.data.readers.files import TEXT_COLUMNS
from teachercache.data.readers.rows import (
    TEXT_FIELDS,
    caption_columns,
    cell_captions,
    file_named,
    one_split,
    split_named,
    vqa_columns,
)
from teachercache.data.sample import Sample
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
    """Yield the rows of Parquet files in order, without reading the bytes of the images.

    A row whose image file is in another split before has a problem.
    """
    return one_split(_parquet_rows(root, files, unused))


def _parquet_rows(root: Path, files: list[Path], unused: Unused) -> Iterator[Sample]:
    for path in files:
        file = _parquet(path)
        columns = Columns(root, path, file.schema_arrow, unused)
        first = 0
        for group in range(file.metadata.num_row_groups):
            size = group_bytes(file.metadata, group, columns.picture, stored=True) if columns.picture else 0
            batches = file.iter_batches(4096, row_groups=[group], columns=columns.others, use_threads=False)
            for lines in _lines(path, batches):
                sizes = [size] * len(lines)
                yield from columns.samples(root, first, lines, sizes, split="", name=path.stem)
                first += len(lines)


def read_saved(root: Path, unused: Unused) -> Iterator[Sample]:
    """Yield the rows that `save_to_disk` of a Dataset or DatasetDict wrote; the key is split/row."""
    found = _saved_files(root)
    yield from one_split(
        row
        for split, files in found
        for row in read_arrow(root, files, unused, split=split, name=split or "row")
    )


def _saved_files(root: Path) -> list[tuple[str, list[Path]]]:
    """Return each split of a saved data set with its Arrow files."""
    found, splits = [], [""]
    try:
        if (root / "dataset_dict.json").exists():
            splits = [
                file_named(name, what="a split") for name in _json(root / "dataset_dict.json")["splits"]
            ]
        for split in splits:
            state = _json(root / split / "state.json")
            if state.get("_indices_data_files"):
                raise UserError(
                    f"{root / split} was saved with an index: call flatten_indices() before save_to_disk()"
                )
            names = [file_named(entry["filename"], what="a file") for entry in state["_data_files"]]
            found.append((split, [root / split / name for name in names]))
    except (Foreign, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{root} is damaged ({error!r}): save the dataset again with save_to_disk()"
        ) from error
    return found


def read_arrow(
    root: Path, files: list[Path], unused: Unused, *, split: str = "", name: str = ""
) -> Iterator[Sample]:
    """Yield the rows of Arrow files; without `name`, keys are the name of the file and the row in it."""
    import pyarrow as pa

    first = 0
    for path in files:
        try:
            table = open_arrow(path)
        except (pa.ArrowException, OSError) as error:
            if is_machine(error):
                raise
            raise UserError(f"{path} is not a readable Arrow file: {error}") from error
        columns = Columns(root, path, table.schema, unused)
        sizes = _picture_sizes(table.column(columns.picture)) if columns.picture else []
        start = 0
        for lines in _lines(path, table.select(columns.others).to_batches(max_chunksize=4096)):
            part = sizes[start : start + len(lines)] or [0] * len(lines)
            before = first if name else 0
            yield from columns.samples(
                root, start, lines, part, split=split, name=name or path.stem, before=before
            )
            start += len(lines)
        first += start


def _picture_sizes(cells: "pa.ChunkedArray") -> list[int]:
    import pyarrow as pa
    import pyarrow.compute as pc

    inside = pc.struct_field(cells, "bytes") if pa.types.is_struct(cells.type) else cells
    kind = inside.type
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        inside = inside.cast(pa.large_binary())
    return [size or 0 for size in pc.binary_length(inside).to_pylist()]


def _lines(path: Path, batches: Iterable["pa.RecordBatch"]) -> Iterator[list[dict[str, Any]]]:
    """Yield the rows of each batch; strings that are not UTF-8 stay bytes, so that their rows are named."""
    import pyarrow as pa

    try:
        for batch in batches:
            try:
                lines = batch.to_pylist()
            except UnicodeDecodeError:
                columns = [
                    column.cast(pa.binary()) if of_strings(column.type) else column for column in batch
                ]
                lines = pa.RecordBatch.from_arrays(columns, batch.schema.names).to_pylist()
            yield lines
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        if (is_url(path) and isinstance(error, OSError)) or is_machine(error):
            raise
        raise UserError(f"{path} is damaged: {error}") from error


# ----------------------------------------------------------------------------------------------------
# Columns and rows


class Columns:
    """The roles of the columns of a schema; converts rows to Samples."""

    def __init__(self, root: Path, path: Path, schema: "pa.Schema", unused: Unused) -> None:
        self.path, self.unused, names = path, unused, schema.names
        self.picture = picture_column(schema)
        paths = [name for name in columns_named(schema, PATH_COLUMNS) if of_strings(schema.field(name).type)]
        self.where = "" if self.picture or not paths else paths[0]
        self.texts = _caption_columns(path, schema, self.picture)
        self.key = next(iter(columns_named(schema, KEY_COLUMNS)), "")
        self.label = next(iter(columns_named(schema, ("label",))), "")
        self.split = next(iter(columns_named(schema, ("split",))), "")
        task = {name.strip().lower(): name for name in columns_named(schema, TASK_COLUMNS)}
        self.task = task if "question" in task else {}
        if not (self.picture or self.where or self.texts):
            raise UserError(
                f"{path} has neither pictures nor texts among its columns ({', '.join(names)}): name a column of "
                f"bytes one of {', '.join(PICTURE_COLUMNS)}, of paths one of {', '.join(PATH_COLUMNS)}, of texts one "
                f"of {', '.join(TEXT_COLUMNS)}"
            )
        used = [self.where, *self.texts, self.key, self.label, self.split, *self.task.values()]
        self.others = list(dict.fromkeys(filter(None, used)))
        if not self.others:  # images alone: a column has to be read to count the rows
            single = [name for name in names if name != self.picture and names.count(name) == 1]
            self.others = single[:1] or [self.picture]
        self.classes = class_names(schema)
        self.size = sizes_below(root)

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
        above = split_in_name(self.path.stem)
        for row, (line, size) in enumerate(zip(lines, sizes, strict=True), start=start):
            key = self._key(line, f"{name}/{before + row}")
            image, offset, task, problem = str(own_path), row, "", ""
            texts: tuple[str, ...] = ()
            try:
                texts = tuple(text for column in self.texts for text in cell_captions(line[column], column))
                task = (
                    vqa_columns({name: line[column] for name, column in self.task.items()})
                    if self.task
                    else ""
                )
            except Foreign as error:
                problem = (
                    f"the captions or the question cannot be used: {error}"
                    if self.task
                    else f"the captions cannot be used: {error}"
                )
            if not self.picture:
                try:
                    image, offset = file_named(line.get(self.where), what="the picture's name"), -1
                except Foreign as error:
                    image, offset, problem = "", -1, str(error)
                image = str(own_path.parent / image) if image and not is_url(image) else image
                size = (self.size(image) or 0) if image else 0
            yield Sample(
                key=key,
                image=image,
                texts=texts,
                label=self._label(line.get(self.label), key),
                split=self._split(line.get(self.split) or split, key) or above,
                offset=offset,
                size=size,
                problem=problem,
                task=task,
            )

    def _key(self, line: dict[str, Any], number: str) -> str:
        """Return the key of a row; its number where the column of keys has none."""
        if not self.key:
            return number
        try:
            key = label_of(line[self.key], what="the key")
        except Foreign:
            key = ""
        if not key:
            self.unused.add(f"rows have no key in column {self.key!r} and get their number", number)
        return key or number

    def _label(self, value: Any, key: str) -> str:
        if isinstance(value, bool):
            return str(value)
        if (
            self.classes
            and isinstance(value, int | float)
            and abs(value) <= sys.float_info.max
            and value == int(value)
        ):
            # -1: the test split has no label
            return self.classes[int(value)] if 0 <= value < len(self.classes) else ""
        try:
            return label_of(value)
        except Foreign as error:
            self.unused.add(f"labels are no class names ({error})", key)
            return ""

    def _split(self, value: Any, key: str) -> str:
        try:
            return split_named(value)
        except Foreign as error:
            self.unused.add(f"splits are no words ({error})", key)
            return ""


def class_names(schema: "pa.Schema") -> list[str]:
    """Return the class names of the column `label` from the metadata that Hugging Face writes into the
    schema.
    """
    try:
        features = parse_json((schema.metadata or {})[b"huggingface"])["info"]["features"]
        column = next(iter(columns_named(schema, ("label",))), "label")
        names = features[column].get("names") or []
        return [label_of(name) for name in names] if isinstance(names, list) else []
    except (KeyError, ValueError, TypeError, AttributeError):
        return []


def _caption_columns(path: Path, schema: "pa.Schema", picture: str) -> list[str]:
    """Return the columns of captions: of the first name whose columns hold texts; of `question` without another.

    Raises:
        UserError: A column of captions is repeated, or none of them holds texts.
    """
    names = [name for name in schema.names if name != picture]
    lowered = [clean(name).strip().lower() for name in names]
    unfit = ""
    for wanted in (*TEXT_COLUMNS, "question"):
        columns = [names[place] for place in caption_columns(lowered, (wanted,))]
        repeated = [name for name in columns if schema.names.count(name) > 1]
        if repeated:
            times = schema.names.count(repeated[0])
            raise UserError(f"{path}: column {repeated[0]!r} comes {times} times: rename all but one")
        others = [name for name in columns if not _of_texts(schema.field(name).type)]
        if columns and not others:
            return columns
        unfit = unfit or next(iter(others), "")
    if unfit:
        raise UserError(
            f"{path}: column {unfit!r} holds {schema.field(unfit).type} instead of texts: write its texts as a column "
            "of strings, or rename it"
        )
    return []


def _of_texts(kind: "pa.DataType") -> bool:
    """Return whether a column holds texts: strings, bytes, numbers, lists of them, or records with a text."""
    import pyarrow.types as types

    if types.is_dictionary(kind):
        kind = kind.value_type
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        kind = kind.value_type
    if types.is_struct(kind):
        inner = next((kind.field(name).type for name in TEXT_FIELDS if kind.get_field_index(name) >= 0), None)
        return inner is not None and not types.is_struct(inner) and _of_texts(inner)
    plain = of_strings(kind) or of_bytes(kind) or types.is_null(kind)
    return plain or types.is_integer(kind) or types.is_floating(kind)


def _json(path: Path) -> dict[str, Any]:
    try:
        value = parse_json(path.read_bytes())
        if not isinstance(value, dict):
            raise Foreign(f"it is {kind_of(value)}")
        return value
    except (OSError, Foreign) as error:
        if is_machine(error):
            raise
        raise UserError(
            f"{path} is missing or damaged ({error}): save the dataset again with save_to_disk()"
        ) from error


def _parquet(path: Path) -> Any:
    import pyarrow as pa

    try:
        return open_parquet(path)
    except (pa.ArrowException, OSError) as error:
        if (is_url(path) and not isinstance(error, pa.ArrowException)) or is_machine(error):
            raise  # an error of the connection or of the disk
        raise UserError(f"{path} is not a readable Parquet file: {error}") from error
