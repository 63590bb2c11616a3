"""COCO's instance annotations: images with boxes and masks to train on, and results scored by pycocotools.

<data>/annotations/instances_train2017.json   or another year: the newest one counts
<data>/annotations/instances_val2017.json
<data>/train2017/*.jpg, <data>/val2017/*.jpg
"""

import contextlib
import dataclasses
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from teachercache.core.errors import UserError
from teachercache.core.progress import say
from teachercache.data.foreign import Foreign, parse_json
from teachercache.data.manifest import Manifest
from teachercache.data.pictures import read_image
from teachercache.data.sample import BadSample

if TYPE_CHECKING:
    from pycocotools.coco import COCO

AVERAGES = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")  # the first six of COCOeval.stats
LARGEST = 1 << 20  # pixels; NaN and infinity are not below it
MISSING = "COCO detection needs pycocotools: pip install 'teachercache[eval]'"
Note = dict[str, Any]  # COCO's JSON object of an image, an annotation or a result
Example = tuple[int, Tensor, dict[str, Tensor]]  # image id, pixels [3, height, width] in [0, 1], targets


@dataclasses.dataclass(frozen=True)
class Instances:
    """One annotation file: pycocotools' COCO, and the folder of its images below the data's root."""

    coco: "COCO"
    folder: str

    @property
    def categories(self) -> list[int]:
        """Ids of the categories; class i of the detector (0 is background) is number i - 1 of them."""
        return sorted(self.coco.getCatIds())

    @property
    def images(self) -> list[int]:
        """Ids of the images."""
        return sorted(self.coco.getImgIds())


def read_instances(root: Path, split: str) -> Instances:
    """Read the instances of a split from annotations/.

    Args:
        root: COCO's folder.
        split: "train" or "val".

    Raises:
        UserError: If pycocotools, the file or the folder of images is missing, or the file has another format.
    """
    try:
        from pycocotools.coco import COCO
    except ImportError as error:
        raise UserError(MISSING) from error
    files = sorted(Path(root).glob(f"annotations/instances_{split}*.json"))
    if not files:
        raise UserError(
            f"no {root}/annotations/instances_{split}2017.json: pass COCO's folder (train2017/, val2017/)"
        )
    path = files[-1]
    name = path.stem.removeprefix("instances_")
    if not (Path(root) / name).is_dir():
        raise UserError(f"no folder {Path(root) / name}: put the pictures of {path.name} there")
    coco = COCO()
    with quiet():
        try:
            coco.dataset = checked(parse_json(path.read_bytes(), what="it"), path)
        except Foreign as error:
            raise UserError(f"{path} is not in COCO's format of instances: {error}") from error
        coco.createIndex()
    return Instances(coco, name)


def checked(values: Any, path: Path) -> dict[str, Any]:
    """Check the content of an annotation file; ids may be numbers in one list and texts in another.

    Returns:
        The content, with ids of one kind. Annotations of no image are left out and counted in a line.

    Raises:
        UserError: It is not in COCO's format of instances; the message names the entry.
    """
    lists = {
        "images": ("id", "file_name", "width", "height"),
        "categories": ("id",),
        "annotations": ("id", "image_id", "category_id", "bbox"),
    }
    place = "the file"
    try:
        for name, keys in lists.items():
            for i, entry in enumerate(values[name]):
                place = f"entry {i} of `{name}`"
                for key in keys:
                    _check_value(entry, key)
        places = {name: {entry["id"] for entry in values[name]} for name in ("images", "categories")}
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not in COCO's format of instances: {place}: {error!r}") from error
    kept = [
        note
        for note in values["annotations"]
        if note["image_id"] in places["images"] and note["category_id"] in places["categories"]
    ]
    strays = len(values["annotations"]) - len(kept)
    if strays and not kept:
        raise UserError(f"0 of {strays:,} annotations of {path} belong to a picture and a category")
    if strays:
        say(f"{path}: {strays:,} annotations belong to no picture or no category: left out")
    return {**values, "annotations": kept}


def _check_value(entry: Note, key: str) -> None:
    """Check a value, and make a number of an id that is written as a text."""
    value = entry[key]
    if key == "file_name":
        fits = isinstance(value, str)
    elif key == "bbox":
        fits = isinstance(value, list) and len(value) == 4 and all(type(x) in (int, float) for x in value)
        fits = fits and all(abs(x) < LARGEST for x in value)
    elif key in ("width", "height"):
        fits = type(value) is int and value > 0
    else:
        entry[key] = int(value) if isinstance(value, str) and value.isdecimal() else value
        fits = type(entry[key]) is int
    if not fits:
        raise ValueError(f"{key} is {value!r:.40}")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Discard what pycocotools prints to stdout, which is reserved for `--json`."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


# ----------------------------------------------------------------------------------------------------
# Images and their objects


class ObjectImages(Dataset):
    """A map-style data set of images and their objects.

    An item is an `Example`, or None if the image cannot be read or its size differs from the annotation.

    Args:
        manifest: COCO's folder.
        instances: The annotations.
        images: Ids of the images, in order.
        targets: Whether examples contain the objects; otherwise their targets are empty.
    """

    def __init__(self, manifest: Manifest, instances: Instances, images: list[int], *, targets: bool):
        self.manifest, self.instances, self.ids, self.targets = manifest, instances, images, targets
        self.rows = {image: row for row, image in enumerate(manifest.column("image"))}

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Example | None:
        """Return an image and its objects, or None."""
        info = self.instances.coco.loadImgs([self.ids[index]])[0]
        row = self.rows.get(f"{self.instances.folder}/{info['file_name']}")
        try:
            image = None if row is None else read_image(self.manifest, self.manifest.row(row))
        except BadSample:
            image = None
        if image is None or image.size != (info["width"], info["height"]):
            return None
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
        return info["id"], pixels, objects_of(self.instances, info) if self.targets else {}


def objects_of(instances: Instances, info: Note) -> dict[str, Tensor]:
    """Return the objects of an image as torchvision's detection targets.

    Args:
        instances: The annotations.
        info: COCO's object of the image.

    Returns:
        `boxes` [n, 4] (x1, y1, x2, y2 in pixels), `labels` [n] from 1, `masks` [n, height, width].
    """
    boxes, labels, masks = [], [], []
    categories = instances.categories
    for note in usable_notes(instances, info):
        x, y, width, height = note["bbox"]
        right, bottom = min(x + width, info["width"]), min(y + height, info["height"])
        boxes.append([max(x, 0), max(y, 0), right, bottom])
        labels.append(categories.index(note["category_id"]) + 1)
        masks.append(torch.from_numpy(instances.coco.annToMask(note)))
    empty = torch.zeros(0, info["height"], info["width"], dtype=torch.uint8)
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor(labels, dtype=torch.int64),
        "masks": torch.stack(masks) if masks else empty,
    }


def usable_notes(instances: Instances, info: Note) -> list[Note]:
    """Return the annotations to learn from: single objects with at least one pixel in each direction in the image."""
    usable = []
    for note in instances.coco.imgToAnns.get(info["id"], []):
        x, y, width, height = note["bbox"]
        inside = min(x + width, info["width"]) - max(x, 0), min(y + height, info["height"]) - max(y, 0)
        if not note.get("iscrowd") and min(inside) >= 1 and note.get("area", 1) > 0:
            usable.append(note)
    return usable


def images_with_objects(instances: Instances) -> list[int]:
    """Return the ids of the images with usable annotations."""
    infos = instances.coco.loadImgs(instances.images)
    return [info["id"] for info in infos if usable_notes(instances, info)]


# ----------------------------------------------------------------------------------------------------
# Results


def results_of(image: int, detections: dict[str, Tensor], categories: Sequence[int]) -> list[Note]:
    """Convert an image's detections to COCO's results.

    Args:
        image: The image's id.
        detections: `boxes` [n, 4], `labels` [n], `scores` [n], `masks` [n, 1, height, width], as torchvision's
            detectors return them.
        categories: Ids of the categories, for labels from 1.
    """
    from pycocotools import mask

    results = []
    for box, label, score, pixels in zip(
        detections["boxes"].tolist(),
        detections["labels"].tolist(),
        detections["scores"].tolist(),
        detections["masks"][:, 0].cpu().numpy() > 0.5,
        strict=True,
    ):
        runs = mask.encode(np.asfortranarray(pixels, dtype=np.uint8))
        results.append(
            {
                "image_id": image,
                "category_id": categories[label - 1],
                "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]],
                "score": score,
                "segmentation": {"size": runs["size"], "counts": runs["counts"].decode("ascii")},
            }
        )
    return results


def average_precisions(
    instances: Instances, results: Sequence[Note], images: Sequence[int]
) -> dict[str, float | None]:
    """Compute bbox_AP, segm_AP and their variants with pycocotools.

    Args:
        instances: The ground truth.
        results: Detections, from `results_of`.
        images: Ids of the images that were measured.

    Returns:
        The metrics; None if the ground truth has no object of that size. Masks are scored without their boxes, because
        pycocotools would otherwise sort them into sizes by the area of the boxes.
    """
    from pycocotools.cocoeval import COCOeval

    metrics: dict[str, float | None] = {}
    for kind, other in (("bbox", "segmentation"), ("segm", "bbox")):
        plain = [{key: value for key, value in result.items() if key != other} for result in results]
        with quiet():
            scorer = COCOeval(instances.coco, _loaded(instances.coco, plain), kind)
            scorer.params.imgIds = list(images)
            scorer.evaluate()
            scorer.accumulate()
            scorer.summarize()
        numbers = scorer.stats[: len(AVERAGES)].tolist()
        for name, value in zip(AVERAGES, numbers, strict=True):
            metrics[f"{kind}_{name}"] = value if value >= 0 else None
    return metrics


def _loaded(truth: "COCO", results: list[Note]) -> "COCO":
    """`COCO.loadRes`, which fails on an empty list of results."""
    if results:
        return truth.loadRes(results)
    empty = type(truth)()
    empty.dataset = {
        "images": truth.dataset["images"],
        "categories": truth.dataset["categories"],
        "annotations": [],
    }
    empty.createIndex()
    return empty
