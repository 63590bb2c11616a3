"""Read classification data sets in their published layouts: labeled images and names of classes.

Images are read in place, except that CIFAR's arrays become PNGs in a Parquet file in a scratch folder. A reader raises a
UserError if a data set is incomplete or malformed. Prompts and metrics are in `results/suite.py`.
"""

import dataclasses
import io
import os
import pickle
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.data.files import UNPACK, file_json, file_lines
from evaluation.data.imagenet_classes import class_places, class_words
from teachercache.core.errors import UserError
from teachercache.data.foreign import clean, is_data
from teachercache.data.manifest import Manifest, make_manifest
from teachercache.data.read import read_manifest
from teachercache.data.sample import Sample

CALTECH_TRAIN, CALTECH_SEED = 30, 0  # training images per class, as in CLIP
PICTURES = (".jpg", ".jpeg", ".png")


@dataclasses.dataclass(frozen=True)
class LabeledSet:
    """A classification set.

    Attributes:
        manifest: Labeled rows of the splits train and test.
        names: label -> name of the competing classes.
        whole: Whether zero-shot classification measures all rows instead of the test rows.
    """

    manifest: Manifest
    names: dict[str, str]
    whole: bool = False


def labeled_set(
    data: Path,
    samples: Iterable[Sample],
    names: dict[str, str],
    *,
    root: Path | None = None,
    whole: bool = False,
) -> LabeledSet:
    """Make a data set of samples.

    Args:
        data: The data's name.
        samples: Its rows.
        names: label -> name.
        root: The folder that paths of images are relative to; None for `data`.
        whole: See `LabeledSet`.
    """
    return LabeledSet(make_manifest(str(data), root or data, samples), names, whole)


# ----------------------------------------------------------------------------------------------------
# CIFAR


def read_cifar10(root: Path, scratch: Path) -> LabeledSet:
    """Read CIFAR-10, `cifar-10-batches-py/`: data_batch_1 to 5, test_batch, batches.meta."""
    folder = root / "cifar-10-batches-py"
    files = [("train", folder / f"data_batch_{i}") for i in range(1, 6)] + [("test", folder / "test_batch")]
    (names,) = unpickle(folder / "batches.meta", "label_names")
    return _cifar(folder, files, names, "labels", scratch / "cifar10.parquet")


def read_cifar100(root: Path, scratch: Path) -> LabeledSet:
    """Read CIFAR-100 with its 100 fine classes, `cifar-100-python/`: train, test, meta."""
    folder = root / "cifar-100-python"
    (names,) = unpickle(folder / "meta", "fine_label_names")
    files = [(split, folder / split) for split in ("train", "test")]
    return _cifar(folder, files, names, "fine_labels", scratch / "cifar100.parquet")


def _cifar(folder: Path, files: list[tuple[str, Path]], names: list[str], key: str, out: Path) -> LabeledSet:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    samples: list[Sample] = []
    with pq.ParquetWriter(out, pa.schema([("image", pa.binary())])) as writer:
        for split, path in files:
            data, labels = unpickle(path, "data", key)
            pictures = np.asarray(data, np.uint8).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
            cells = []
            for pixels, label in zip(pictures, labels, strict=True):
                buffer = io.BytesIO()
                Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "PNG", compress_level=1)
                cells.append(buffer.getvalue())
                row = len(samples)
                samples.append(
                    Sample(str(row), out.name, label=names[label], split=split, offset=row, size=1)
                )
            writer.write_table(pa.table({"image": pa.array(cells, pa.binary())}), row_group_size=1000)
    return labeled_set(folder, samples, {name: name.replace("_", " ") for name in names}, root=out.parent)


class _Arrays(pickle.Unpickler):
    """An unpickler that loads arrays, lists and strings only, because an untrusted pickle may call any function."""

    allowed = frozenset(
        {
            "numpy.core.multiarray._reconstruct",
            "numpy._core.multiarray._reconstruct",
            "numpy.ndarray",
            "numpy.dtype",
            "_codecs.encode",
        }
    )

    def find_class(self, module: str, name: str) -> object:
        if f"{module}.{name}" not in self.allowed:
            raise UserError(f"a CIFAR file contains {module}.{name}, which is no array: download it anew")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def unpickle(path: Path, *keys: str) -> list[Any]:
    """Load the values of some keys of CIFAR's dictionaries, which Python 2 wrote.

    Raises:
        UserError: If the file is missing or is no such dictionary.
    """
    try:
        with open(path, "rb") as file:
            values = _Arrays(file, encoding="latin1").load()
        found = [values[key] for key in keys]
        if not all(isinstance(value, list | np.ndarray) for value in found):
            raise ValueError(f"{', '.join(keys)} are not all lists or arrays")
        return found
    except FileNotFoundError as error:
        raise UserError(f"there is no {path}: unpack the archive of CIFAR's Python version again") from error
    except (pickle.UnpicklingError, EOFError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path} is not one of CIFAR's Python files: {error!r}") from error


# ----------------------------------------------------------------------------------------------------
# Lists of files beside images


def read_food101(root: Path, scratch: Path) -> LabeledSet:
    """Read Food-101, `food-101/`: meta/train.txt and test.txt (apple_pie/1005649), labels.txt and classes.txt."""
    folder = root / "food-101"
    classes = lines(folder / "meta/classes.txt")
    words = lines(folder / "meta/labels.txt") if (folder / "meta/labels.txt").exists() else classes
    if len(words) != len(classes):
        raise UserError(f"{folder}/meta has {len(classes)} classes and {len(words)} labels: {UNPACK}")
    names = {label: word.replace("_", " ") for label, word in zip(classes, words, strict=True)}
    samples = (
        Sample(name, f"images/{name}.jpg", label=name.partition("/")[0], split=split)
        for split in ("train", "test")
        for name in lines(folder / f"meta/{split}.txt")
    )
    return labeled_set(folder, samples, names)


def read_pets(root: Path, scratch: Path) -> LabeledSet:
    """Read Oxford-IIIT Pets: annotations/trainval.txt and test.txt (Abyssinian_100 1 1 1), images/."""

    def label(name: str) -> str:
        return re.sub(r"_\d+$", "", name)

    listed = [
        (split, line.split()[0])
        for split, file in (("train", "trainval"), ("test", "test"))
        for line in lines(root / f"annotations/{file}.txt")
    ]
    samples = [Sample(name, f"images/{name}.jpg", label=label(name), split=split) for split, name in listed]
    return labeled_set(
        root, samples, {name: name.replace("_", " ") for name in sorted({row.label for row in samples})}
    )


def read_birdsnap(root: Path, scratch: Path) -> LabeledSet:
    """Read Birdsnap 1.1: species.txt, images.txt and test_images.txt with a header and tabs; images in images/."""
    names = {row["id"]: row["common"] for row in tab_rows(root / "species.txt", ("id", "common"))}
    test = {row["path"] for row in tab_rows(root / "test_images.txt", ("path",))}
    folder = next((name for name in ("images", "download/images") if (root / name).is_dir()), "")
    samples = (
        Sample(
            row["path"],
            os.path.join(folder, row["path"]),
            label=row["species_id"],
            split="test" if row["path"] in test else "train",
        )
        for row in tab_rows(root / "images.txt", ("path", "species_id"))
    )
    return labeled_set(root, samples, names)


def tab_rows(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """Return the rows of a file with a header and tabs, in which a quotation mark is a character.

    Raises:
        UserError: If the file cannot be read, or lacks a column or a line a field of it.
    """
    header, *others = [line.split("\t") for line in file_lines(path) if line.strip()] or [[]]
    names = [name.strip().lower() for name in header]
    missing = [name for name in columns if name not in names]
    if missing:
        raise UserError(f"{path} has no column {', '.join(missing)}: {UNPACK}")
    short = next((cells for cells in others if len(cells) != len(names)), None)
    if short is not None:
        raise UserError(
            f"{path}: the line {' '.join(short)[:60]!r} has {len(short)} fields, the header {len(names)}"
        )
    return [dict(zip(names, cells, strict=True)) for cells in others]


def read_places365(root: Path, scratch: Path) -> LabeledSet:
    """Read Places365's validation: places365_val.txt, categories_places365.txt (/a/airfield 0), val_256/, val_large/."""
    folder = next((name for name in ("val_256", "val_large") if (root / name).is_dir()), "")
    if not folder:
        raise UserError(
            f"{root} has places365_val.txt and no val_256 or val_large with its pictures: put one there"
        )
    numbered = words_in_lines(root / "categories_places365.txt", 2)
    names = {number: re.sub("[_/]", " ", name[3:]) for name, number in numbered}  # without /a/
    listed = words_in_lines(root / "places365_val.txt", 2)
    return labeled_set(
        root, (Sample(name, f"{folder}/{name}", label=label, split="test") for name, label in listed), names
    )


def lines(path: Path) -> list[str]:
    """Return the lines of a text file that are neither empty nor comments (#).

    Raises:
        UserError: If the file cannot be read.
    """
    return [line.strip() for line in file_lines(path) if line.strip() and not line.startswith("#")]


def words_in_lines(path: Path, number: int) -> list[list[str]]:
    """Return the words of each line, `number` of them; raise a UserError as `lines` does, or if a line has another."""
    words = [line.split() for line in lines(path)]
    odd = next((line for line in words if len(line) != number), None)
    if odd is not None:
        raise UserError(
            f"{path}: the line {' '.join(odd)[:60]!r} has {len(odd)} words instead of {number}: {UNPACK}"
        )
    return words


# ----------------------------------------------------------------------------------------------------
# A folder per class


def read_caltech101(root: Path, scratch: Path) -> LabeledSet:
    """Read Caltech-101, `101_ObjectCategories/<class>/` without BACKGROUND_Google: 8,677 images.

    Zero-shot classification measures all of them, the number in PSD's supplement (table 2). The probe is trained on 30
    per class, drawn with a seed, and measured on the others, as in CLIP.
    """
    folder = root / "101_ObjectCategories"
    draw, samples = np.random.default_rng(CALTECH_SEED), []
    for label in sorted(
        path.name
        for path in folder.iterdir()
        if path.is_dir() and path.name != "BACKGROUND_Google" and is_data(path.name)
    ):
        names = pictures_in(folder / label)
        train = set(draw.permutation(len(names))[:CALTECH_TRAIN].tolist())
        samples += [
            Sample(f"{label}/{name}", f"{label}/{name}", label=label, split="train" if i in train else "test")
            for i, name in enumerate(names)
        ]
    return labeled_set(
        folder,
        samples,
        {label: label.replace("_", " ") for label in {row.label for row in samples}},
        whole=True,
    )


def read_objectnet(root: Path, scratch: Path) -> LabeledSet:
    """Read ObjectNet, `objectnet-1.0/`: images/<folder>/, mappings/folder_to_objectnet_label.json."""
    folder = root / "objectnet-1.0"
    names = json_of(folder / "mappings/folder_to_objectnet_label.json")
    samples = [
        Sample(f"{label}/{name}", f"images/{label}/{name}", label=label, split="test")
        for label in sorted(names)
        if (folder / "images" / label).is_dir()
        for name in pictures_in(folder / "images" / label)
    ]
    present = {row.label for row in samples}
    return labeled_set(
        folder, samples, {label: words.lower() for label, words in names.items() if label in present}
    )


def in_imagenet(folder: Path) -> set[str]:
    """Return the folders of the 113 ObjectNet classes in mappings/objectnet_to_imagenet_1k.json."""
    mapped = json_of(folder / "mappings/objectnet_to_imagenet_1k.json")
    names = json_of(folder / "mappings/folder_to_objectnet_label.json")
    return {label for label, words in names.items() if words in mapped}


def read_wnids(folder: Path) -> LabeledSet:
    """Read ImageNet's validation or a variant: folders are wnids or 0 to 999; only classes with a folder compete."""
    manifest = read_manifest(str(folder))
    places, words = class_places(set(manifest.column("label")), str(folder)), class_words()
    return LabeledSet(
        manifest,
        {label: words[places[label]] for label in sorted(places, key=places.__getitem__)},
        whole=True,
    )


def pictures_in(folder: Path) -> list[str]:
    """Return the sorted names of the images in a folder."""
    return sorted(name for name in os.listdir(folder) if name.lower().endswith(PICTURES) and is_data(name))


def json_of(path: Path) -> dict[str, str]:
    """Read a JSON object of texts.

    Raises:
        UserError: If the file cannot be read, or has another form.
    """
    value = file_json(path)
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise UserError(f"{path} is not a JSON object of texts: {UNPACK}")
    return {clean(name): clean(text) for name, text in value.items()}
