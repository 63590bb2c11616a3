"""Build a manifest from files on disk or at URLs: choose a reader by the form of each path.

`--data` may name several sources, separated by commas, each a path or a glob.
"""

import dataclasses
import glob
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from teachercache.core import urls as remote
from teachercache.core.errors import UserError
from teachercache.core.leftovers import sweep_beside
from teachercache.core.paths import as_path, closest_path, is_url
from teachercache.core.progress import say, status
from teachercache.data.columns import COLUMN_FILES
from teachercache.data.foreign import Foreign, is_data, parse_json, split_of
from teachercache.data.manifest import (
    Manifest,
    is_as_written,
    load_manifest,
    make_manifest,
    rows_without_split,
    write_manifest,
)
from teachercache.data.readers import captions, csv_files, folders, tables, tars, texts, vqa
from teachercache.data.readers import questions as tasks
from teachercache.data.readers.caption_tables import TABLES
from teachercache.data.readers.files import IMAGE_SUFFIXES
from teachercache.data.sample import Sample
from teachercache.data.unused import Unused

MAPPED = "Arrow files are mapped into memory: download them, or write them as Parquet (Dataset.to_parquet)"
GROUPED = (".tar", *COLUMN_FILES)  # shards of one folder are one source
FORMATS = "a folder of pictures, .tar, .parquet, .csv, .tsv, .txt, .arrow, .jsonl or a COCO captions .json"


@dataclasses.dataclass(frozen=True)
class Source:
    """One source of `--data`: its recognized format, the root of its paths, and the reader of its rows."""

    path: Path  # a Path or UPath
    kind: str
    root: Path
    rows: Callable[[Unused], Iterator[Sample]]  # adds what it sees and does not use


def read_manifest(data: str, *, limit: int | None = None, quiet: bool = False) -> Manifest:
    """Read the manifest of one or several folders and files; raise UserError with the supported formats.

    Args:
        data: The value of `--data`.
        limit: The largest number of rows; None for all.
        quiet: Print nothing of what is not used, because the command has read the same data before.
    """
    if quiet:
        name = ",".join(remote.tidy(part) for part in _parts(data))
        with status(f"reading {name}"):
            return _join(name, find_sources(data), Unused(), limit=limit)
    return join_sources(data, find_sources(data), limit=limit)


def join_sources(data: str, sources: list[Source], *, limit: int | None = None) -> Manifest:
    """Join the sources that `find_sources` returned into one manifest."""
    name, unused = ",".join(remote.tidy(part) for part in _parts(data)), Unused()
    with status(f"reading {name}"):
        manifest = _join(name, sources, unused, limit=limit)
    for line in manifest.unused.lines():
        say(f"{name}: {line}")
    for line in rows_without_split(manifest):
        say(f"{name}: {line}")
    return manifest


def _join(name: str, sources: list[Source], unused: Unused, *, limit: int | None) -> Manifest:
    if len(sources) == 1:
        source = sources[0]
        if source.kind == "manifest":
            with remote.explain_errors(source.path):
                manifest = load_manifest(source.path)
            whole = limit is None or limit >= len(manifest)
            return manifest if whole else make_manifest(name, manifest.root, source.rows(unused), limit=limit)
        return make_manifest(name, source.root, _rows(source, unused), unused=unused, limit=limit)
    root = remote.common_root([source.root for source in sources])
    return make_manifest(name, root, _joined(sources, root, unused), unused=unused, limit=limit)


def _rows(source: Source, unused: Unused) -> Iterator[Sample]:
    with remote.explain_errors(source.path):
        yield from source.rows(unused)


def _joined(sources: list[Source], root: Path, unused: Unused) -> Iterator[Sample]:
    """Yield the rows of all sources, keys prefixed by the name of the source, images relative to the
    common root. Where the sources are the splits of one set (train/, test/), rows without a split have theirs.
    """
    short = [remote.last_part(str(source.path)).split(".")[0] for source in sources]
    names = short if len(set(short)) == len(short) else [str(source.path) for source in sources]
    splits = [split_of(name) for name in short]
    splits = splits if len(set(splits) - {""}) > 1 else [""] * len(splits)
    for source, name, split in zip(sources, names, splits, strict=True):
        folder = remote.seen_from(root, source.root)
        for sample in _rows(source, unused):
            image = remote.join_relative(folder, sample.image) if sample.image else ""
            own = sample.split or split
            yield dataclasses.replace(sample, key=f"{name}/{sample.key}", image=image, split=own)


def _parts(data: str) -> list[str]:
    """Split `--data` at commas; an existing path or URL that contains a comma is one source."""
    parts = [part.strip() for part in data.split(",") if part.strip()]
    one_url = len(parts) > 1 and is_url(parts[0]) and not any(map(is_url, parts[1:]))
    if os.path.exists(data) or (one_url and _at_url(data)):
        return [data]
    return parts or [data]


def _at_url(url: str) -> str:
    """Return `file` or `directory`, or an empty string if nothing exists at a URL."""
    with remote.explain_errors(url):
        return remote.kind(as_path(url))


def _found(part: str) -> list[tuple[Path, bool]]:
    """Return the paths that one part of `--data` names, and whether each is a folder."""
    if not is_url(part):
        paths = [part] if os.path.exists(part) else sorted(glob.glob(part, recursive=True))
        return [(Path(path), os.path.isdir(path)) for path in paths]
    if kind := _at_url(part):
        folder = kind == "directory" or (remote.is_http(part) and part.endswith("/"))
        return [(as_path(part), folder)]
    with remote.explain_errors(part):
        return remote.glob_url(part) if glob.has_magic(part) else []


def find_sources(data: str) -> list[Source]:
    """Return the sources that `--data` names, in order."""
    groups: dict[Any, list[Any]] = {}
    folders, seen = set(), set()
    for part in _parts(data):
        paths = _found(part)
        if not paths and is_url(part):
            raise UserError(
                f"no data at {part}: check its spelling with `tc manifest {part}`, and AWS_ENDPOINT_URL"
            )
        if not paths:
            raise UserError(
                f"no data at {part}: {closest_path(part)}pass --data FOLDER, or make the demo data with `bash scripts/demo`"
            )
        for path, is_folder in (path for entry in paths for path in _annotations(*entry)):
            if not is_url(path) and not is_folder and path.exists() and not path.is_file():
                raise UserError(
                    f"{path} is no regular file (a pipe, a socket or a device): {FORMATS} is expected"
                )
            place = str(path) if is_url(path) else os.path.realpath(path)
            if place in seen:
                raise UserError(
                    f"--data {data} names {path} twice: its rows would count twice; write it once"
                )
            seen.add(place)
            with remote.explain_errors(path):
                grouped = path.suffix.lower() in GROUPED and not is_folder
                alone = not grouped or (path.suffix.lower() == ".parquet" and tables.is_manifest(path))
            groups.setdefault(path if alone else (path.parent, path.suffix.lower()), []).append(path)
            folders |= {path} if is_folder else set()
    return [_source(paths, is_folder=paths[0] in folders) for paths in groups.values()]


def _annotations(path: Path, is_folder: bool) -> list[tuple[Path, bool]]:
    """Replace a folder of VCR, SNLI-VE or VQA by its annotation files; return any other path unchanged.

    A file whose name extends that of another (val_rule_singular beside val) is a variant with changed
    questions. It is read only if the user names it.
    """
    if not is_folder:
        return [(path, is_folder)]
    with remote.explain_errors(path):
        names = [entry for entry, inner in remote.children(path) if not inner]
        entries = [entry for entry in names if entry.name.endswith((".jsonl", "_questions.json"))]
        entries = [entry for entry in entries if is_data(entry.name) and entry.name.lower() not in TABLES]
    stems = [entry.name.removesuffix(".jsonl") for entry in entries]
    variants = [entry for entry in entries if any(entry.name.startswith(f"{stem}_") for stem in stems)]
    if variants:
        left_out = ", ".join(sorted(entry.name for entry in variants))
        say(f"{path}: left out {left_out}, named after files beside them; to read one, pass it as --data")
    return [(entry, False) for entry in sorted(set(entries) - set(variants), key=str)] or [(path, is_folder)]


def cache_folder(data: str) -> Path:
    """Return caches/<name of the data>, plus the number of further sources; for a glob the name of its
    folder.
    """
    parts = _parts(data)
    more = f"+{len(parts) - 1}" if len(parts) > 1 else ""
    if is_url(parts[0]):
        url = remote.tidy(parts[0].split("?")[0] if remote.is_http(parts[0]) else parts[0])
        while glob.has_magic(remote.last_part(url)) and "/" in url.split("://")[-1]:
            url = url.rpartition("/")[0]
        return Path("caches", (remote.last_part(url).split(".")[0] or "data") + more)
    path = Path(os.path.normpath(parts[0]))
    while not path.exists() and glob.has_magic(path.name):
        path = path.parent
    return Path("caches", (path.name.split(".")[0] or "data") + more)


# ----------------------------------------------------------------------------------------------------
# Formats


def _source(paths: list[Path], *, is_folder: bool) -> Source:
    """Return the source of one path, or of the shards of one folder."""
    with remote.explain_errors(paths[0]):
        return _folder(paths[0]) if is_folder else _file(paths)


def _file(paths: list[Path]) -> Source:
    path, suffix = paths[0], paths[0].suffix.split("?")[0].lower()
    whole = path if len(paths) == 1 else path.parent
    if suffix == ".tar":
        return Source(
            whole, "webdataset tars", path.parent, lambda unused: tars.read_tars(path.parent, paths, unused)
        )
    if suffix == ".parquet" and tables.is_manifest(path):
        manifest = load_manifest(path)
        if not is_url(path) and not is_as_written(path):
            raise UserError(
                f"{path} is damaged, its bytes changed after it was written: make it again with `tc manifest DATA "
                f"--out {path}`"
            )
        return Source(
            path, "manifest", manifest.root, lambda unused: (manifest.row(i) for i in range(len(manifest)))
        )
    if suffix == ".parquet":
        return Source(
            whole, "Parquet", path.parent, lambda unused: tables.read_parquet(path.parent, paths, unused)
        )
    if suffix == ".arrow" and is_url(path):
        raise UserError(f"{path}: {MAPPED}")
    if suffix == ".arrow":
        return Source(
            whole, "Arrow", path.parent, lambda unused: tables.read_arrow(path.parent, paths, unused)
        )
    if suffix == ".txt":
        return Source(path, "texts, one a line", path.parent, lambda unused: texts.read_texts(path, unused))
    if suffix == ".tsv" and texts.is_cc3m(path):
        return Source(
            path, "CC3M captions and urls", path.parent, lambda unused: texts.read_cc3m(path, unused)
        )
    if suffix in (".csv", ".tsv"):
        return Source(
            path, "table with a header", path.parent, lambda unused: csv_files.read_table(path, unused)
        )
    if suffix == ".json":
        return _json(path)
    if suffix == ".jsonl":
        return _json_lines(path)
    advice = ": uncompress it first" if tars.is_packed(path.name) else ""
    raise UserError(f"cannot read {path}: {FORMATS} is expected{advice}")


def _folder(path: Path) -> Source:
    entries = [entry for entry in remote.children(path) if is_data(entry[0].name)]
    names = {entry.name for entry, _ in entries}
    if names & {"dataset_dict.json", "state.json"}:
        if is_url(path):
            raise UserError(f"{path}: {MAPPED}")
        return Source(
            path, "Hugging Face dataset saved on disk", path, lambda unused: tables.read_saved(path, unused)
        )
    for entry, is_folder in entries:
        if entry.suffix.lower() in GROUPED and not is_folder and not is_url(path) and not entry.is_file():
            raise UserError(f"{entry} is no regular file: move it out of {path}")
    found = [entry for entry, is_folder in entries if entry.name.lower().endswith(".tar") and not is_folder]
    pictures = any(entry.suffix.lower() in IMAGE_SUFFIXES for entry, _ in entries)
    if found and pictures:
        raise UserError(
            f"{path} holds both .tar files and loose pictures: move one kind into a folder of its own"
        )
    packed = [entry.name for entry, _ in entries if tars.is_packed(entry.name)]
    if packed and not found and len(packed) == len(entries):
        raise UserError(
            f"{path} holds compressed tars only ({packed[0]}): uncompress them, offsets lie in plain ones"
        )
    if found:
        return Source(
            path,
            "webdataset tars",
            path,
            lambda unused: tars.read_folder_of_tars(path, found, entries, unused),
        )
    # Parquet files beside images describe them (img2dataset's 00000.parquet, a manifest); alone they are the data
    inside = [(entry, is_folder) for entry, is_folder in entries if entry.name != "data"]
    pictures = any(is_folder or entry.suffix.lower() in IMAGE_SUFFIXES for entry, is_folder in inside)
    parquet = [] if pictures else _parquet_in(entries)
    if not parquet and not pictures and (path / "data", True) in entries:
        parquet = _parquet_in(remote.children(path / "data"))
    if parquet:
        return Source(path, "Parquet", path, lambda unused: tables.read_parquet(path, parquet, unused))
    return Source(path, "folder of pictures", path, lambda unused: folders.read_folder(path, unused))


def _parquet_in(entries: list[tuple[Path, bool]]) -> list[Any]:
    return [entry for entry, _ in entries if entry.name.endswith(".parquet") and is_data(entry.name)]


def _json(path: Path) -> Source:
    """Detect COCO captions, Karpathy's splits, a list of captions, or VQA questions by their content."""
    try:
        values = parse_json(path.read_bytes(), what="it")
    except Foreign as error:
        raise UserError(
            f"{path} is not a COCO captions file (`images` and `annotations`): {error}"
        ) from error
    if isinstance(values, list) and any(
        isinstance(entry, dict) and "caption" in entry for entry in values[:9]
    ):
        return Source(
            path,
            "list of captions",
            path.parent,
            lambda unused: captions.read_caption_list(path, values, unused),
        )
    content = values if isinstance(values, dict) else {}
    if "questions" in content:
        return Source(path, "VQA questions", path.parent, lambda unused: vqa.read_vqa(path, values, unused))
    first = _first_of(content, "images")
    if "sentences" in first:
        return Source(
            path, "Karpathy split", path.parent, lambda unused: captions.read_karpathy(path, values, unused)
        )
    if "images" not in content and "question_id" in _first_of(content, "annotations"):
        raise UserError(
            f"{path} holds VQA's answers: pass the file of questions, answers are found beside it"
        )
    return Source(path, "COCO captions", path.parent, lambda unused: captions.read_coco(path, values, unused))


def _first_of(content: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the first object of a list of objects, {} if there is none."""
    entries = content.get(name)
    return (
        next((entry for entry in entries if isinstance(entry, dict)), {}) if isinstance(entries, list) else {}
    )


def _json_lines(path: Path) -> Source:
    """Detect VCR or SNLI-VE by the fields of the first line."""
    lines = tasks.json_lines(path)
    first = lines[0] if lines else {}
    if "answer_choices" in first:
        return Source(path, "VCR", path.parent, lambda unused: tasks.read_vcr(path, lines, unused))
    if "sentence2" in first:
        return Source(path, "SNLI-VE", path.parent, lambda unused: tasks.read_snli_ve(path, lines, unused))
    raise UserError(
        f"{path} is neither VCR (`answer_choices`) nor SNLI-VE (`sentence2`): write it as .csv or .json"
    )


def save(manifest: Manifest, out: Path) -> None:
    """Write a manifest for `--data`, with an absolute root, so that it can be used from any folder."""
    if out.suffix != ".parquet":
        name = f"{out.stem or 'manifest'}.parquet"
        raise UserError(f"--out {out}: name it {name}, so that --data takes it")
    if not is_url(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    sweep_beside(out)
    write_manifest(dataclasses.replace(manifest, root=manifest.root.absolute()), out)
