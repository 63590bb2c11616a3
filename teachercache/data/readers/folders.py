"""Read a folder of pictures: captions in a .txt or .json of the same name, in metadata.csv or in captions.txt."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePath

from teachercache.core.errors import MachineError, is_machine
from teachercache.core.local import Sizes, read_regular
from teachercache.core.paths import is_url
from teachercache.core.urls import children, read_small, walk
from teachercache.data.foreign import MAX_TEXT, is_data, split_of
from teachercache.data.readers.caption_tables import CaptionTables, holds_pictures, is_caption_table
from teachercache.data.readers.files import IMAGE_SUFFIXES, captions_in, first_captions, no_picture
from teachercache.data.sample import Sample
from teachercache.data.unused import Unused

CAPTION_SUFFIXES = (".txt", ".json")
DEEPEST = 3  # levels of folders with nothing but one folder in them
Captions = tuple[tuple[str, ...], str]


def read_folder(root: Path, unused: Unused) -> Iterator[Sample]:
    """Yield the images below `root` in sorted order; the folders above an image are its split and its
    label.
    """
    alone, tables = len(_only_folders(root)), CaptionTables(unused)
    for folder, files in walk(root, is_data, unused.add):
        for name in [name for name in files if not is_data(name)]:
            unused.add("files are hidden or of an operating system", os.path.join(folder, name))
            del files[name]
        own = sorted(name for name in files if is_caption_table(name, files, IMAGE_SUFFIXES))
        for name, content in zip(own, _contents(root, folder, files, own, limit=None), strict=True):
            tables.add(folder, name, *content)
        pictures = [name for name in sorted(files) if name.lower().endswith(IMAGE_SUFFIXES)]
        beside = _caption_files(pictures, files)
        wanted = [name for picture in pictures for name in beside[picture]]
        contents = _contents(root, folder, files, wanted, limit=MAX_TEXT)
        split, label = _split_and_label(root, PurePath(folder).parts, alone)
        stems = set()
        for name in pictures:
            path, size = PurePath(folder, name), files[name]
            found = [_captions(caption, *next(contents), files[caption]) for caption in beside[name]]
            texts, problem = first_captions(*found)
            listed = tables.of(path)
            if texts and found[0][1]:
                unused.add("caption files cannot be read, another one beside them is", str(path))
            if listed and not texts:
                texts, problem = listed.texts, listed.problem or problem
            if problem:
                unused.add("pictures are used without their captions, which cannot be read", str(path))
            yield Sample(
                key=str(path if path.stem in stems else path.with_suffix("")),
                image=str(path),
                texts=texts,
                problem="the picture is no regular file" if size is None else problem,
                label=listed.label if listed and listed.label else label,
                split=split,
                size=size or 0,
            )
            stems.add(path.stem)
        _name_the_rest(folder, sorted(files.keys() - {*pictures, *wanted, *own}), unused)
    tables.name_the_rest()


def _only_folders(root: Path) -> tuple[str, ...]:
    """Return the names of the folders that alone lie in the one above them: flickr/flickr/train/."""
    names: list[str] = []
    while len(names) < DEEPEST:
        found = [(path.name, inner) for path, inner in children(root.joinpath(*names)) if is_data(path.name)]
        folders = [name for name, inner in found if inner]
        pictures = any(name.lower().endswith(IMAGE_SUFFIXES) for name, inner in found if not inner)
        if len(folders) != 1 or pictures or split_of(folders[0]):
            break
        names.append(folders[0])
    return tuple(names)


def _split_and_label(root: Path, parts: tuple[str, ...], alone: int) -> tuple[str, str]:
    """Return the split that a folder names, and the folders below it; without a split, all folders.

    The split is the first folder (train/cat), the first below folders that lie alone or hold all pictures
    (images/train/cat), or, where folders inside of it are those of several splits, the second one (cat/train, cat/test).

    Args:
        root: The folder that is read.
        parts: The folders below it.
        alone: The number of folders at the top that lie alone.
    """
    usual = int(bool(parts) and holds_pictures(parts[0]))
    tops = sorted({0, min(alone, len(parts)), usual})
    for at in tops:
        if len(parts) > at and (split := split_of(parts[at])):
            return split, "/".join(parts[at + 1 :])
    for at in tops:
        split = split_of(parts[at + 1]) if len(parts) > at + 1 else ""
        if split and len(_splits_inside(root.joinpath(*parts[: at + 1]))) > 1:
            return split, "/".join((*parts[at : at + 1], *parts[at + 2 :]))
    return "", "/".join(parts)


def _splits_inside(folder: Path) -> set[str]:
    """Return the splits that the folders inside of a folder name."""
    return {split for path, inner in children(folder) if inner and (split := split_of(path.name))}


def _caption_files(pictures: list[str], files: Sizes) -> dict[str, list[str]]:
    """Return the .txt and .json files beside each image, in any case: the first that holds a caption counts."""
    if not pictures:
        return {}
    present: dict[str, str] = {}
    for name in sorted(files):  # IMG_1.TXT before IMG_1.txt, which is the one that counts
        stem, suffix = os.path.splitext(name)
        present[stem + suffix.lower()] = name
    stems = {picture: PurePath(picture).stem for picture in pictures}
    return {
        picture: [present[stem + suffix] for suffix in CAPTION_SUFFIXES if stem + suffix in present]
        for picture, stem in stems.items()
    }


def _contents(
    root: Path, folder: str, files: Sizes, names: list[str], *, limit: int | None
) -> Iterator[tuple[bytes, str]]:
    """Yield the bytes of each file, and why they were not read; files above a limit of bytes are not read."""
    small = [name for name in names if limit is None or (files[name] or 0) <= limit]
    held = set(small)
    if is_url(root):
        read = read_small(root, [(str(PurePath(folder, name)), files[name]) for name in small])
        yield from ((next(read) if name in held else b"", "") for name in names)
        return
    for name in names:
        odd = files[name] is None
        yield (
            _read(root / folder / name, files[name] or 0)
            if name in held and not odd
            else (b"", odd * "it is no regular file")
        )


def _read(path: Path, size: int) -> tuple[bytes, str]:
    """Return the bytes of a local file that had `size` bytes when it was listed, and why it was not read."""
    try:
        return read_regular(path), ""
    except OSError as error:
        if is_machine(error):
            raise
        if size and isinstance(error, FileNotFoundError):
            away = "is a disk or a network mount away? run the same command again when it is back"
            raise MachineError(f"cannot read {path}: it was listed a moment ago: {away}") from error
        return b"", f"it cannot be opened: {error.strerror}"


def _captions(name: str, content: bytes, problem: str, size: int | None) -> Captions:
    return (
        ((), f"the caption file is not read: {problem}")
        if problem
        else captions_in(os.path.splitext(name)[1].lower(), content, size)
    )


def _name_the_rest(folder: str, names: Iterable[str], unused: Unused) -> None:
    """Count the files of a folder that are neither pictures nor the captions of one."""
    for name in names:
        suffix = os.path.splitext(name)[1].lower()
        beside = f"caption files have no picture beside them ({suffix})"
        unused.add(beside if suffix in CAPTION_SUFFIXES else no_picture(name), os.path.join(folder, name))
