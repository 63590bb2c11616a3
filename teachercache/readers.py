"""From what lies on disk to a manifest: image folders, COCO captions, webdataset tars, CSV and TSV, Parquet.

One function per format yields Samples; `read_manifest` picks by looking at the path. Nothing is unpacked.
"""

import csv
import itertools
import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

from teachercache.names import UserError
from teachercache.samples import Manifest, Sample, load_manifest, make_manifest

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
Entry = tuple[int, int, bytes]  # a tar member: where its bytes start, how many they are, and they themselves if text
SPLITS = ("train", "val", "validation", "test")
IMAGE_COLUMNS = ("image", "image_path", "filepath", "file_name", "filename", "path")
TEXT_COLUMNS = ("text", "caption", "title", "texts", "captions")


def read_manifest(data: str, *, limit: int | None = None) -> Manifest:
    """The manifest of a folder or file, by its form; UserError says which forms there are."""
    path = Path(data)
    if not path.exists():
        raise UserError(f"no data at {data}: pass --data FOLDER, or make the demo data with `bash scripts/demo`")
    if path.is_dir():
        tars = sorted(path.glob("*.tar"))
        if tars and any(entry.suffix.lower() in IMAGE_SUFFIXES for entry in path.iterdir()):
            raise UserError(f"{data} holds both .tar files and loose pictures: move one kind into a folder of its own")
        reader = read_tars(path, tars) if tars else read_folder(path)
        return make_manifest(data, path, reader, limit=limit)
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        manifest = load_manifest(path)
        if limit is None or limit >= len(manifest):
            return manifest
        samples = (manifest.row(i) for i in range(limit))
        return make_manifest(data, manifest.root, samples)
    readers = {".tar": lambda: read_tars(path.parent, [path]), ".json": lambda: read_coco(path)}
    readers[".csv"] = readers[".tsv"] = lambda: read_table(path)
    if suffix not in readers:
        raise UserError(
            f"cannot read {data}: a folder of pictures, .tar, .parquet, .csv, .tsv or a COCO captions .json is expected"
        )
    return make_manifest(data, path.parent, readers[suffix](), limit=limit)


# ----------------------------------------------------------------------------------------------------
# A folder of pictures, captions in a .txt or .json of the same name


def read_folder(root: Path) -> Iterator[Sample]:
    """Pictures below `root` in sorted order; the folders above a picture are its split and its label."""
    for folder, names, files in os.walk(root):
        names.sort()
        present, stems = set(files), set()
        for name in sorted(files):
            if not name.lower().endswith(IMAGE_SUFFIXES):
                continue
            path = Path(folder, name)
            relative = path.relative_to(root)
            parts = relative.parts[:-1]
            split = parts[0] if parts and parts[0] in SPLITS else ""
            texts, problem = _captions_beside(path, present)
            yield Sample(
                key=str(relative if path.stem in stems else relative.with_suffix("")),
                image=str(relative),
                texts=texts,
                problem=problem,
                label="/".join(parts[1:] if split else parts),
                split=split,
                size=_size(path),
            )
            stems.add(path.stem)


def _captions_beside(path: Path, present: set[str]) -> tuple[tuple[str, ...], str]:
    """Lines of the .txt, or `caption` / `captions` of the .json, beside a picture; and what is wrong with them."""
    if f"{path.stem}.txt" in present:
        return lines_of(path.with_suffix(".txt").read_bytes()), ""
    if f"{path.stem}.json" in present:
        return captions_of_json(path.with_suffix(".json").read_bytes())
    return (), ""


def lines_of(content: bytes) -> tuple[str, ...]:
    """Lines of a caption file; str.splitlines would cut at U+2028 and form feeds, which captions hold."""
    text = content.decode("utf-8", "replace").replace("\r\n", "\n").removesuffix("\n")
    return tuple(text.split("\n")) if text else ()


def captions_of_json(content: bytes) -> tuple[tuple[str, ...], str]:
    """`captions` (a list) or `caption` / `text` (a string) of a JSON object; and what is wrong with it."""
    try:
        values = json.loads(content)
    except ValueError as error:
        return (), f"the caption file is not JSON: {error}"
    found = (
        (values.get("captions") or values.get("caption") or values.get("text") or ()) if isinstance(values, dict) else 0
    )
    if isinstance(found, str):
        return (found,), ""
    if not isinstance(found, (list, tuple)):
        return (), "the caption file is not a JSON object with `caption` (a string) or `captions` (a list)"
    return tuple(str(text) for text in found), ""


# ----------------------------------------------------------------------------------------------------
# COCO captions: {"images": [...], "annotations": [{"image_id", "caption"}]}


def read_coco(path: Path) -> Iterator[Sample]:
    """Rows in the order of `images`, captions in the order of their ids; pictures near the JSON."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        images = [(image["id"], image["file_name"]) for image in values["images"]]
        captions: dict[int, list[tuple[int, str]]] = {}
        for i, annotation in enumerate(values["annotations"]):
            captions.setdefault(annotation["image_id"], []).append((annotation.get("id", i), annotation["caption"]))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a COCO captions file (`images` and `annotations`): {error}") from error
    folder = _image_folder(path, [name for _, name in images[:100]]) if images else ""
    for number, file_name in images:
        name = os.path.join(folder, file_name)
        texts = tuple(caption.strip() for _, caption in sorted(captions.get(number, [])))
        yield Sample(key=str(number), image=name, texts=texts, size=_size(path.parent / name))


def _image_folder(path: Path, names: list[str]) -> str:
    """Where COCO's pictures lie, seen from the JSON: beside it, in ../<split>, or in ../images."""
    split = path.stem.split("_")[-1]
    for folder in ("", split, "images", f"../{split}", "../images", f"../images/{split}"):
        if any((path.parent / folder / name).exists() for name in names):
            return folder
    raise UserError(f"no picture {names[0]} near {path}: put the pictures into {path.parent.parent / split}")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0  # the build quarantines the row with its reason


# ----------------------------------------------------------------------------------------------------
# webdataset tars: members <key>.jpg, <key>.txt, <key>.json, <key>.cls; offsets are recorded


def read_tars(root: Path, tars: list[Path]) -> Iterator[Sample]:
    """Rows in the order of the members; a member's name is a key and never a path to write to."""
    for tar in tars:
        shard = str(tar.relative_to(root))
        for stem, members in itertools.groupby(_members(tar), key=lambda member: member[0]):
            yield _tar_sample(shard, stem, {suffix: entry for _, suffix, entry in members})


def _members(tar: Path) -> Iterator[tuple[str, str, Entry]]:
    try:
        with tarfile.open(tar, "r:") as archive:
            for member in archive:
                if not member.isfile():
                    continue
                folder, _, name = member.name.rpartition("/")
                stem, _, suffix = name.partition(".")
                if not stem or not suffix:  # "._a.jpg" of macOS, README: not samples, as webdataset has it
                    continue
                small = f".{suffix}".lower() in (".txt", ".json", ".cls")
                file = archive.extractfile(member) if small else None
                content = file.read() if file else b""
                yield f"{folder}/{stem}".lstrip("/"), f".{suffix}".lower(), (
                    member.offset_data, member.size, content)  # fmt: skip
    except tarfile.TarError as error:
        raise UserError(f"{tar} is not a plain (uncompressed) tar file: {error}") from error


def _tar_sample(shard: str, stem: str, group: dict[str, Entry]) -> Sample:
    image = next((suffix for suffix in IMAGE_SUFFIXES if suffix in group), None)
    texts: tuple[str, ...] = ()
    problem = ""
    if ".txt" in group:
        texts = lines_of(group[".txt"][2])
    elif ".json" in group:
        texts, problem = captions_of_json(group[".json"][2])
    label = group[".cls"][2].decode("utf-8", "replace").strip() if ".cls" in group else ""
    offset, size, _ = group[image] if image else (-1, 0, b"")
    key = f"{shard.removesuffix('.tar')}/{stem}"
    where = shard if image else ""
    return Sample(key, where, texts=texts, label=label, offset=offset, size=size, problem=problem)


# ----------------------------------------------------------------------------------------------------
# CSV and TSV with a header


def read_table(path: Path) -> Iterator[Sample]:
    """One row per picture; lines that name the same picture are its several captions."""
    columns, lines = _table_lines(path)
    image_column = next((name for name in IMAGE_COLUMNS if name in columns), None)
    text_column = next((name for name in TEXT_COLUMNS if name in columns), None)
    if image_column is None:
        raise UserError(f"{path} has no column for the picture: name one of {', '.join(IMAGE_COLUMNS)} in its header")
    first: dict[str, dict[str, str | None]] = {}
    texts: dict[str, list[str]] = {}
    for number, line in enumerate(lines, start=1):
        name = line[image_column] or ""
        key = line.get("key") or os.path.splitext(name)[0]
        if not key:
            raise UserError(f"row {number} of {path} has neither a picture nor a key: add a column `key`")
        other = first.setdefault(key, line)[image_column] or ""
        if other != name and line.get("key"):
            raise UserError(f"key '{key}' stands for two pictures in {path}: {other} and {name}")
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
            size=_size(path.parent / image) if image else 0,
        )


def _table_lines(path: Path) -> tuple[list[str], list[dict[str, str | None]]]:
    """Header and lines; a byte order mark (Excel) is skipped, a tab in the header means TSV."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            delimiter = "\t" if "\t" in file.readline() else ","
            file.seek(0)
            lines = csv.DictReader(file, delimiter=delimiter)
            return list(lines.fieldnames or []), list(lines)
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is not a CSV or TSV file in UTF-8: {error}") from error
