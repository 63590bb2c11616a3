"""Read captions in JSON: COCO's format, Karpathy's splits, and the lists of BLIP and ARO."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from teachercache.core.errors import UserError
from teachercache.core.urls import sizes_below
from teachercache.data.foreign import split_in_name
from teachercache.data.readers.files import picture_folder
from teachercache.data.sample import Sample, task_columns
from teachercache.data.unused import Unused


def read_coco(path: Path, values: Any, unused: Unused) -> Iterator[Sample]:
    """Read COCO captions: rows in the order of `images`, captions in the order of their ids, images near the
    JSON file.

    NoCaps has the same format; its `domain` of an image becomes a task column.
    """
    try:
        images = [(image["id"], image["file_name"], image.get("domain")) for image in values["images"]]
        captions: dict[int, list[tuple[int, str]]] = {}
        for i, annotation in enumerate(values["annotations"]):
            captions.setdefault(annotation["image_id"], []).append(
                (annotation.get("id", i), annotation["caption"])
            )
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not a COCO captions file (`images` and `annotations`): {error!r}"
        ) from error
    split = path.stem.split("_")[-1]  # captions_val2014.json
    folders = ["", split, "images", f"../{split}", "../images", f"../images/{split}"]
    names = [name for _, name, _ in images[:100]]
    size = sizes_below(path.parent)
    advice = path.parent.parent / split
    folder = picture_folder(path.parent, names, folders, advice=advice, size=size) if names else ""
    for number, file_name, domain in images:
        name = os.path.join(folder, file_name)
        texts = tuple(caption.strip() for _, caption in sorted(captions.get(number, [])))
        task = task_columns(task="captions", domain=domain) if domain else ""
        yield Sample(key=str(number), image=name, texts=texts, size=size(name) or 0, task=task)


def read_karpathy(path: Path, values: Any, unused: Unused) -> Iterator[Sample]:
    """Read `dataset_coco.json` or `dataset_flickr30k.json`. The key is the COCO id or the file name.

    restval counts as train: training on Karpathy's COCO means both together (113,287 images).
    """
    try:
        rows = [
            (
                str(image.get("cocoid", os.path.splitext(image["filename"])[0])),
                os.path.join(image.get("filepath", ""), image["filename"]),
                tuple(sentence["raw"].strip() for sentence in image["sentences"]),
                "train" if image["split"] == "restval" else image["split"],
            )
            for image in values["images"]
        ]
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is not a Karpathy split: an entry of `images` lacks {error}") from error
    name = path.stem.removeprefix("dataset_")
    folders = ["", "images", f"{name}-images", "..", "../images", f"../{name}-images", name, f"../{name}"]
    names, size = [row[1] for row in rows], sizes_below(path.parent)
    folder = picture_folder(path.parent, names, folders, advice=path.parent / "images", size=size)
    for key, image, texts, split in rows:
        where = os.path.normpath(os.path.join(folder, image))
        yield Sample(key, where, texts, split=split, size=size(where) or 0)


def read_caption_list(path: Path, values: list[Any], unused: Unused) -> Iterator[Sample]:
    """Read a list of {"image", "caption"}, such as `coco_karpathy_test.json`; entries of one image are its
    captions.
    """
    texts: dict[str, list[str]] = {}
    for i, entry in enumerate(values):
        try:
            caption = entry["caption"]
            texts.setdefault(entry["image"], []).extend([caption] if isinstance(caption, str) else caption)
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f'entry {i} of {path} is not {{"image": PATH, "caption": TEXT}}: {error!r}'
            ) from error
    folders = ["", "images", "..", "../images"]
    size = sizes_below(path.parent)
    folder = picture_folder(path.parent, list(texts), folders, advice=path.parent / "images", size=size)
    for image, captions in texts.items():
        where = os.path.normpath(os.path.join(folder, image))
        cleaned = tuple(str(caption).strip() for caption in captions)
        split = split_in_name(path.stem)
        yield Sample(os.path.splitext(image)[0], where, cleaned, split=split, size=size(where) or 0)
