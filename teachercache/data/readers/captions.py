"""Read captions in JSON: COCO's format, Karpathy's splits, and the lists of BLIP and ARO."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from teachercache.core.errors import UserError
from teachercache.core.urls import sizes_below
from teachercache.data.foreign import Foreign, caption_of, captions_of, kind_of, label_of, split_in_name
from teachercache.data.readers.files import picture_folder
from teachercache.data.readers.rows import file_named, one_split, split_named
from teachercache.data.sample import Sample, task_columns
from teachercache.data.unused import Unused

NO_IMAGE = "annotations belong to no picture in `images`"


def read_coco(path: Path, values: Any, unused: Unused) -> Iterator[Sample]:
    """Read COCO captions: rows in the order of `images`, captions in the order of their ids, images near the
    JSON file.

    An id may be a number in one list and a text in the other. NoCaps has the same format; its `domain` of an image
    becomes a task column.
    """
    images, captions = _coco_images(path, values), _coco_captions(path, values, unused)
    for key in images.keys() & captions.keys():
        captions[key].sort()
    strays = [key for key in captions if key not in images]
    if strays:
        count = sum(len(captions[key]) for key in strays)
        total = sum(map(len, captions.values()))
        if images and count == total:
            raise UserError(
                f"0 of {total:,} annotations of {path} belong to a picture: image_id {strays[0]!r} is no id in "
                f"`images`, which has {next(iter(images))!r} for example"
            )
        unused.add(NO_IMAGE, f"image_id {strays[0]}", count)
    split = path.stem.split("_")[-1]  # captions_val2014.json
    folders = ["", split, "images", f"../{split}", "../images", f"../images/{split}"]
    names = [name for name, _, _ in images.values() if name][:100]
    size = sizes_below(path.parent)
    advice = path.parent.parent / split
    folder = picture_folder(path.parent, names, folders, advice=advice, size=size) if names else ""
    for key, (file_name, domain, problem) in images.items():
        name = os.path.join(folder, file_name) if file_name else ""
        texts = tuple(caption for _, caption in captions.get(key, []))
        task = task_columns(task="captions", domain=domain) if domain else ""
        bytes_of = (size(name) or 0) if name else 0
        yield Sample(
            key=key,
            image=name,
            texts=texts,
            split=split_in_name(path.stem),
            size=bytes_of,
            problem=problem,
            task=task,
        )


def _coco_images(path: Path, values: Any) -> dict[str, tuple[str, str, str]]:
    """Return file name, domain and problem of each image by its id."""
    images: dict[str, tuple[str, str, str]] = {}
    for i, image in enumerate(_entries(path, values, "images", "a COCO captions file")):
        try:
            key = label_of(image["id"], what="the id")
            if not key:
                raise Foreign("the id is null")
        except (KeyError, TypeError, Foreign) as error:
            raise UserError(
                f"{path} is not a COCO captions file: entry {i} of `images`: {error!r}"
            ) from error
        if key in images:
            raise UserError(f"{path}: two entries of `images` have the id {key}: give every picture its own")
        try:
            name = file_named(image["file_name"], what="file_name")
            domain = label_of(image.get("domain"), what="the domain")
            images[key] = (name, domain, "" if name else "the entry of the picture has no file_name")
        except KeyError as error:
            raise UserError(
                f"{path} is not a COCO captions file (`images` and `annotations`): {error!r}"
            ) from error
        except Foreign as error:
            images[key] = ("", "", str(error))
    return images


def _coco_captions(
    path: Path, values: Any, unused: Unused
) -> dict[str, list[tuple[tuple[int, float, str], str]]]:
    """Return captions by the id of their image, each with the order of its own id; what is no text is counted."""
    captions: dict[str, list[tuple[tuple[int, float, str], str]]] = {}
    for i, annotation in enumerate(_entries(path, values, "annotations", "a COCO captions file")):
        try:
            number, value = annotation["image_id"], annotation["caption"]
        except (KeyError, TypeError) as error:
            raise UserError(
                f"{path} is not a COCO captions file (`images` and `annotations`): {error!r}"
            ) from error
        name = f"entry {i} of `annotations`"
        try:
            caption, key = caption_of(value), label_of(number, what="image_id")
        except Foreign as error:
            unused.add(f"annotations are no captions ({error})", name)
            continue
        if caption is None:
            unused.add("annotations have no caption (null)", name)
        else:
            captions.setdefault(key, []).append((_order(annotation.get("id", i), i), caption.strip()))
    return captions


def _order(number: Any, place: int) -> tuple[int, float, str]:
    """Return what a list is sorted by: numbers first, then texts; entries without an id by their place."""
    if isinstance(number, str):
        return (0, float(number), "") if number.isdecimal() and len(number) < 300 else (1, 0.0, number)
    plain = isinstance(number, int | float) and number == number and abs(number) < 1e300
    return (0, float(number) if plain else float(place), "")


def read_karpathy(path: Path, values: Any, unused: Unused) -> Iterator[Sample]:
    """Read `dataset_coco.json` or `dataset_flickr30k.json`. The key is the COCO id or the file name.

    restval counts as train: training on Karpathy's COCO means both together (113,287 images).
    """
    rows = []
    for i, image in enumerate(_entries(path, values, "images", "a Karpathy split")):
        try:
            rows.append(_karpathy_row(image, i, unused))
        except (KeyError, TypeError) as error:
            raise UserError(f"{path} is not a Karpathy split: entry {i} of `images` lacks {error}") from error
        except Foreign as error:
            raise UserError(f"{path} is not a Karpathy split: entry {i} of `images`: {error}") from error
    name = path.stem.removeprefix("dataset_")
    folders = ["", "images", f"{name}-images", "..", "../images", f"../{name}-images", name, f"../{name}"]
    names, size = [row.image for row in rows if row.image], sizes_below(path.parent)
    if not names:
        raise UserError(f"{path} names no picture: `filename` is expected in each entry of `images`")
    folder = picture_folder(path.parent, names, folders, advice=path.parent / "images", size=size)
    for row in one_split(rows):
        where = os.path.normpath(os.path.join(folder, row.image)) if row.image else ""
        bytes_of = (size(where) or 0) if where else 0
        yield Sample(row.key, where, row.texts, split=row.split, size=bytes_of, problem=row.problem)


def _karpathy_row(image: Any, place: int, unused: Unused) -> Sample:
    """Return the row of an image with its file below no folder yet."""
    name = file_named(image["filename"], what="filename")
    key = label_of(image.get("cocoid"), what="cocoid") or os.path.splitext(name)[0] or f"image {place}"
    texts = []
    for sentence in image["sentences"]:
        raw = caption_of(sentence["raw"], what="a sentence")
        if raw is None:
            unused.add("sentences have no text (null)", key)
        else:
            texts.append(raw.strip())
    word = label_of(image["split"], what="the split")
    split = "train" if word.lower() == "restval" else split_named(word)
    folder = file_named(image.get("filepath"), what="filepath")
    where = os.path.join(folder, name) if name else ""
    return Sample(key, where, tuple(texts), split=split, problem="" if name else "the entry has no filename")


def read_caption_list(path: Path, values: list[Any], unused: Unused) -> Iterator[Sample]:
    """Read a list of {"image", "caption"}, such as `coco_karpathy_test.json`; entries of one image are its
    captions.
    """
    texts: dict[str, list[str]] = {}
    problems: dict[str, str] = {}
    for i, entry in enumerate(values):
        try:
            image, value = file_named(entry["image"], what="image"), entry["caption"]
            if not image:
                raise Foreign("image is null")
        except (KeyError, TypeError, AttributeError, Foreign) as error:
            raise UserError(
                f'entry {i} of {path} is not {{"image": PATH, "caption": TEXT}}: {error!r}'
            ) from error
        found = texts.setdefault(image, [])
        try:
            captions = captions_of(value)
        except Foreign as error:
            problems.setdefault(image, f"the captions of entry {i}: {error}")
            continue
        found.extend(caption.strip() for caption in captions)
        nulls = len(value) - len(captions) if isinstance(value, list) else 1 - len(captions)
        if nulls:
            unused.add("captions are null", f"entry {i}", nulls)
    folders = ["", "images", "..", "../images"]
    size, split = sizes_below(path.parent), split_in_name(path.stem)
    folder = picture_folder(path.parent, list(texts), folders, advice=path.parent / "images", size=size)
    for image, captions_of_image in texts.items():
        where = os.path.normpath(os.path.join(folder, image))
        yield Sample(
            os.path.splitext(image)[0],
            where,
            tuple(captions_of_image),
            split=split,
            size=size(where) or 0,
            problem=problems.get(image, ""),
        )


def _entries(path: Path, values: Any, name: str, what: str) -> list[Any]:
    """Return a list of a JSON object."""
    entries = values.get(name) if isinstance(values, dict) else None
    if not isinstance(entries, list):
        found = kind_of(entries) if isinstance(values, dict) and name in values else f"no `{name}`"
        raise UserError(f"{path} is not {what}: a list `{name}` is expected, it has {found}")
    return entries
