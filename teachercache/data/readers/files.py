"""Read folders, webdataset tars, CSV and TSV, CC3M's TSV and plain texts: one function per format yields
Samples.

Nothing is unpacked or copied. `captions.py` and `questions.py` read JSON formats, `tables.py` Parquet and
Arrow.
"""

import collections
import itertools
import json
import os
import tarfile
from collections.abc import Callable, Container, Iterator
from pathlib import Path, PurePath
from typing import Any

from teachercache.core.errors import UserError
from teachercache.core.paths import is_url
from teachercache.core.urls import (
    TAR_BLOCK,
    file_size,
    in_order,
    is_http,
    open_file,
    read_small,
    walk,
)
from teachercache.data.foreign import split_in_name, split_of
from teachercache.data.sample import Sample
from teachercache.data.unused import Unused

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
Sizes = Callable[[str], int | None]
Entry = tuple[
    int, int, bytes
]  # a tar member: the offset and number of its bytes, and the bytes themselves of a text
TEXT_COLUMNS = ("text", "caption", "title", "texts", "captions")


def picture_folder(root: Path, names: list[str], folders: list[str], *, advice: Any, size: Sizes) -> str:
    """Return the first of `folders` (relative to `root`) that holds one of the images; raise UserError if
    none does.
    """
    asked = names[:3] if is_http(root) else names  # each one costs a request
    for folder in folders:
        exists = is_url(root) or (root / folder).is_dir()
        if exists and any(size(os.path.join(folder, name)) is not None for name in asked):
            return folder
    raise UserError(f"no picture {names[0]} near {root}: put the pictures into {advice}")


# ----------------------------------------------------------------------------------------------------
# A folder of pictures, captions in a .txt or .json of the same name


def read_folder(root: Path, unused: Unused) -> Iterator[Sample]:
    """Yield the images below `root` in sorted order; the folders above an image are its split and its
    label.
    """
    for folder, files in walk(root):
        pictures = [PurePath(folder, name) for name in sorted(files) if name.lower().endswith(IMAGE_SUFFIXES)]
        beside = [_caption_file(path, files) for path in pictures]
        contents = read_small(root, [(str(path), files[path.name]) for path in beside if path])
        parts, stems = PurePath(folder).parts, set()
        split = split_of(parts[0]) if parts else ""
        for path, caption in zip(pictures, beside, strict=True):
            texts, problem = _captions(caption, next(contents)) if caption else ((), "")
            size = files[path.name]
            yield Sample(
                key=str(path if path.stem in stems else path.with_suffix("")),
                image=str(path),
                texts=texts,
                problem=problem,
                label="/".join(parts[1:] if split else parts),
                split=split,
                size=file_size(root / path) if size is None else size,
            )
            stems.add(path.stem)


def _caption_file(picture: PurePath, present: Container[str]) -> PurePath | None:
    """Return the .txt or .json file beside an image."""
    names = (f"{picture.stem}{suffix}" for suffix in (".txt", ".json"))
    return next((picture.with_name(name) for name in names if name in present), None)


def _captions(path: PurePath, content: bytes) -> tuple[tuple[str, ...], str]:
    """Return the lines of a .txt, or `caption` / `captions` of a .json, and a problem if there is one."""
    return (lines_of(content), "") if path.suffix == ".txt" else captions_of_json(content)


def lines_of(content: bytes) -> tuple[str, ...]:
    """Split a caption file into lines; str.splitlines would also split at U+2028 and form feeds inside
    captions.
    """
    text = content.decode("utf-8", "replace").replace("\r\n", "\n").removesuffix("\n")
    return tuple(text.split("\n")) if text else ()


def captions_of_json(content: bytes) -> tuple[tuple[str, ...], str]:
    """Return `captions` (a list) or `caption` / `text` (a string) of a JSON object, and a problem if there
    is one.
    """
    try:
        values = json.loads(content)
    except ValueError as error:
        return (), f"the caption file is not JSON: {error}"
    captions = (
        (values.get("captions") or values.get("caption") or values.get("text") or ())
        if isinstance(values, dict)
        else 0
    )
    if isinstance(captions, str):
        return (captions,), ""
    if not isinstance(captions, (list, tuple)):
        return (), "the caption file is not a JSON object with `caption` (a string) or `captions` (a list)"
    return tuple(str(text) for text in captions), ""


# ----------------------------------------------------------------------------------------------------
# webdataset tars: members <key>.jpg, <key>.txt, <key>.json, <key>.cls; offsets are recorded


def read_tars(root: Path, tars: list[Path], unused: Unused) -> Iterator[Sample]:
    """Yield rows in the order of the tar members; the name of a member is a key and never a path to write
    to.
    """
    members = in_order(lambda tar: list(_members(tar)), tars) if is_url(root) else map(_members, tars)
    for tar, entries in zip(tars, members, strict=True):
        shard = str(tar.relative_to(root))
        for stem, group in itertools.groupby(entries, key=lambda member: member[0]):
            yield _tar_sample(shard, stem, {suffix: entry for _, suffix, entry in group})


def _members(tar: Path) -> Iterator[tuple[str, str, Entry]]:
    try:
        with open_file(tar, TAR_BLOCK) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                if not member.isfile():
                    continue
                folder, _, name = member.name.rpartition("/")
                stem, _, suffix = name.partition(".")
                if not stem or not suffix:  # "._a.jpg" of macOS, README: not samples, as webdataset has it
                    continue
                small = f".{suffix}".lower() in (".txt", ".json", ".cls")
                inside = archive.extractfile(member) if small else None
                content = inside.read() if inside else b""
                yield (
                    f"{folder}/{stem}".lstrip("/"),
                    f".{suffix}".lower(),
                    (member.offset_data, member.size, content),
                )
    except tarfile.TarError as error:
        raise UserError(f"{tar} is not a plain (uncompressed) tar file: {error}") from error


def _tar_sample(shard: str, stem: str, group: dict[str, Entry]) -> Sample:
    image = next((suffix for suffix in IMAGE_SUFFIXES if suffix in group), None)
    texts: tuple[str, ...] = ()
    problem = ""
    if ".json" in group:
        texts, problem = captions_of_json(group[".json"][2])
    if ".txt" in group and texts != (
        group[".txt"][2].decode("utf-8", "replace"),
    ):  # img2dataset writes both with the same caption
        texts, problem = lines_of(group[".txt"][2]), ""
    label = group[".cls"][2].decode("utf-8", "replace").strip() if ".cls" in group else ""
    offset, size, _ = group[image] if image else (-1, 0, b"")
    key = f"{shard.removesuffix('.tar')}/{stem}"
    where = shard if image else ""
    return Sample(key, where, texts=texts, label=label, offset=offset, size=size, problem=problem)


# ----------------------------------------------------------------------------------------------------
# CC3M: Train_GCC-training.tsv, `caption<TAB>url` without a header, and the downloaded images


def is_cc3m(path: Path) -> bool:
    """Return whether the first line, after an optional header `caption url`, is a caption and a URL."""
    with path.open(encoding="utf-8", errors="replace") as file:
        lines = [line.rstrip("\r\n").split("\t") for line in itertools.islice(file, 2)]
    if lines and lines[0] == ["caption", "url"]:
        return True
    return bool(lines) and len(lines[0]) == 2 and lines[0][1].startswith(("http://", "https://"))


def read_cc3m(path: Path, unused: Unused) -> Iterator[Sample]:
    """Yield rows in file order with the row number as the key.

    Images are found by row number, as img2dataset names them, or by the name in the url: in a folder named
    after the .tsv, in `images`, or beside it, at any depth (00000/000000012.jpg or 12_ab.jpg). A row without
    a downloaded image is kept with a problem.
    """
    with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
        lines = [line.rstrip("\r\n").split("\t") for line in file]
    lines = lines[1:] if lines and lines[0] == ["caption", "url"] else lines
    urls = [line[1].split("?")[0].rsplit("/", 1)[-1] if len(line) == 2 else "" for line in lines]
    times = collections.Counter(urls)
    for folder in (path.stem, "images", ""):
        by_number, by_name, sizes = _downloaded(path.parent, folder)
        if any(f"{i:09d}" in by_number for i in range(len(lines))) or any(name in times for name in by_name):
            break
    else:
        raise UserError(
            f"no picture of {path.name} in {path.parent / path.stem}: put them there, named 000000000.jpg by row "
            "number (as img2dataset does) or by the last part of their url"
        )
    for i, (line, name) in enumerate(zip(lines, urls, strict=True)):
        number = f"{i:09d}"
        image = by_number.get(number) or (by_name.get(name, "") if times[name] == 1 else "")
        problem = (
            "" if image else f"no picture {number}.jpg or {name or 'with a url'} in {path.parent / folder}"
        )
        if not image and times[name] > 1 and name in by_name:
            problem = f"{times[name]} urls end in {name}: name the pictures by row number"
        problem = "the line is not `caption<TAB>url`" if len(line) != 2 else problem
        size = sizes.get(image)
        size = file_size(path.parent / image) if image and size is None else size or 0
        yield Sample(number, image, (line[0],), split=split_in_name(path.stem), size=size, problem=problem)


def _downloaded(root: Path, folder: str) -> tuple[dict[str, str], dict[str, str], dict[str, int | None]]:
    """Return the images below a folder of `root`, by nine digits and by name, and their bytes."""
    by_number, by_name, sizes = {}, {}, {}
    for above, files in walk(root / folder if folder else root):
        for name in files:
            stem, suffix = os.path.splitext(name)
            if suffix.lower() in IMAGE_SUFFIXES:
                where = os.path.normpath(os.path.join(folder, above, name))
                sizes[where] = files[name]
                if len(stem) == 9 and stem.isdigit():
                    by_number[stem] = where
                by_name[name] = where
    return by_number, by_name, sizes


# ----------------------------------------------------------------------------------------------------
# Texts only: class names, answer lists


def read_texts(path: Path, unused: Unused) -> Iterator[Sample]:
    """Yield a row without an image per line. The key is the text, so that a sorted list still joins with its
    caches.

    A repeated text gets the suffix #2, #3, ...; the key of a blank line is its number.
    """
    seen: set[str] = set()
    for number, text in enumerate(lines_of(path.read_bytes().removeprefix(b"\xef\xbb\xbf")), start=1):
        name = text if text.strip() else f"line {number}"
        copies = (name if i == 1 else f"{name}#{i}" for i in itertools.count(1))
        key = next(key for key in copies if key not in seen)
        seen.add(key)
        yield Sample(key, "", (text,))
