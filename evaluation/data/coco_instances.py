"""COCO's instances: pictures with boxes and masks to train on, and results scored by pycocotools. Trains nothing.

<data>/annotations/instances_train2017.json   or any other year: the newest one counts
<data>/annotations/instances_val2017.json
<data>/train2017/*.jpg, <data>/val2017/*.jpg
"""

import contextlib
import dataclasses
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from teachercache.core.errors import UserError
from teachercache.data.manifest import Manifest
from teachercache.data.pictures import read_image
from teachercache.data.sample import BadSample

AVERAGES = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")  # the first six of COCOeval.stats
MISSING = "COCO detection needs pycocotools: pip install 'teachercache[detection]'"


@dataclasses.dataclass(frozen=True)
class Instances:
    """One annotation file: pycocotools' COCO, and the folder of its pictures below the data's root."""

    coco: Any
    folder: str

    @property
    def categories(self) -> list[int]:
        """Ids of the categories; class i of the detector (0 is background) is number i - 1 of them."""
        return sorted(self.coco.getCatIds())

    @property
    def images(self) -> list[int]:
        """Ids of the pictures."""
        return sorted(self.coco.getImgIds())


def read_instances(root: Any, split: str) -> Instances:
    """The instances of `train` or `val`, by their file below annotations/."""
    try:
        from pycocotools.coco import COCO
    except ImportError as error:
        raise UserError(MISSING) from error
    found = sorted(Path(root).glob(f"annotations/instances_{split}*.json"))
    if not found:
        raise UserError(
            f"no {root}/annotations/instances_{split}2017.json: pass COCO's folder (train2017/, val2017/)"
        )
    name = found[-1].stem.removeprefix("instances_")
    if not (Path(root) / name).is_dir():
        raise UserError(f"no folder {Path(root) / name}: put the pictures of {found[-1].name} there")
    try:
        with quiet():
            coco = COCO(str(found[-1]))
            coco.getCatIds()
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise UserError(f"{found[-1]} is not in COCO's format of instances: {error!r}") from error
    return Instances(coco, name)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """What pycocotools prints is swallowed: it says on stdout, which belongs to `--json`."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


# ----------------------------------------------------------------------------------------------------
# Pictures and what is in them


class Pictures(Dataset):
    """Pictures by their ids; None in place of one that cannot be read or has another size than COCO says."""

    def __init__(self, manifest: Manifest, instances: Instances, images: list[int], *, targets: bool):
        self.manifest, self.instances, self.ids, self.targets = manifest, instances, images, targets
        self.rows = {image: row for row, image in enumerate(manifest.column("image"))}

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[int, Tensor, dict[str, Tensor]] | None:
        """The picture's id, its colours [3, height, width] between 0 and 1, and boxes, labels, masks of its objects."""
        facts = self.instances.coco.loadImgs([self.ids[index]])[0]
        row = self.rows.get(f"{self.instances.folder}/{facts['file_name']}")
        try:
            picture = None if row is None else read_image(self.manifest, self.manifest.row(row))
        except BadSample:
            picture = None
        if picture is None or picture.size != (facts["width"], facts["height"]):
            return None
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255
        return facts["id"], pixels, objects_of(self.instances, facts) if self.targets else {}


def objects_of(instances: Instances, facts: dict[str, Any]) -> dict[str, Tensor]:
    """The `boxes` [n, 4] (x1, y1, x2, y2 in pixels), `labels` [n] from 1, `masks` [n, height, width] of a picture."""
    boxes, labels, masks = [], [], []
    categories = instances.categories
    for note in usable_notes(instances, facts):
        x, y, width, height = note["bbox"]
        right, bottom = min(x + width, facts["width"]), min(y + height, facts["height"])
        boxes.append([max(x, 0), max(y, 0), right, bottom])
        labels.append(categories.index(note["category_id"]) + 1)
        masks.append(torch.from_numpy(instances.coco.annToMask(note)))
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor(labels, dtype=torch.int64),
        "masks": torch.stack(masks)
        if masks
        else torch.zeros(0, facts["height"], facts["width"], dtype=torch.uint8),
    }


def usable_notes(instances: Instances, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Annotations to learn from: single objects of which at least one pixel each way is inside the picture."""
    kept = []
    for note in instances.coco.imgToAnns.get(facts["id"], []):
        x, y, width, height = note["bbox"]
        inside = min(x + width, facts["width"]) - max(x, 0), min(y + height, facts["height"]) - max(y, 0)
        if not note.get("iscrowd") and min(inside) >= 1 and note.get("area", 1) > 0:
            kept.append(note)
    return kept


def images_with_objects(instances: Instances) -> list[int]:
    """Ids of the pictures that have something to learn from."""
    return [
        facts["id"] for facts in instances.coco.loadImgs(instances.images) if usable_notes(instances, facts)
    ]


# ----------------------------------------------------------------------------------------------------
# Results


def results_of(image: int, found: dict[str, Tensor], categories: list[int]) -> list[dict[str, Any]]:
    """A picture's detections as COCO's results: boxes [n, 4], labels [n], scores [n], masks [n, 1, height, width]."""
    from pycocotools import mask

    results = []
    for box, label, score, soft in zip(
        found["boxes"].tolist(),
        found["labels"].tolist(),
        found["scores"].tolist(),
        found["masks"][:, 0].cpu().numpy() > 0.5,
        strict=True,
    ):
        runs = mask.encode(np.asfortranarray(soft, dtype=np.uint8))
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
    instances: Instances, results: list[dict[str, Any]], images: list[int]
) -> dict[str, float | None]:
    """bbox_AP, segm_AP and their parts over these pictures; None where the truth has no object of that size.

    Masks are scored without their boxes, or pycocotools would sort them into sizes by the boxes' areas.
    """
    from pycocotools.cocoeval import COCOeval

    metrics: dict[str, float | None] = {}
    for kind in ("bbox", "segm"):
        other = {"bbox": "segmentation", "segm": "bbox"}[kind]
        plain = [{key: value for key, value in result.items() if key != other} for result in results]
        with quiet():
            scorer = COCOeval(instances.coco, _loaded(instances.coco, plain), kind)
            scorer.params.imgIds = images
            scorer.evaluate()
            scorer.accumulate()
            scorer.summarize()
        numbers = scorer.stats[: len(AVERAGES)].tolist()
        for name, value in zip(AVERAGES, numbers, strict=True):
            metrics[f"{kind}_{name}"] = value if value >= 0 else None
    return metrics


def _loaded(truth: Any, results: list[dict[str, Any]]) -> Any:
    """`COCO.loadRes`, which cannot take that nothing was found."""
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
