"""COCO detection and instance segmentation with a frozen ResNet tower (CLIP-KD, tables 6 and 7; F-VLM's protocol).

How the detector is made and trained is in `evaluation/detector.py`. The task keeps no detector: it measures a tower.
"""

from typing import Any

import torch

from evaluation.data.coco_instances import (
    Pictures,
    average_precisions,
    images_with_objects,
    read_instances,
    results_of,
)
from evaluation.models.encoder import Encoder
from evaluation.probes.mask_rcnn import ONE_X, Options, build_detector, detect, train
from teachercache.core.errors import UserError
from teachercache.core.progress import say
from teachercache.data.manifest import Manifest


def evaluate(encoder: Encoder, manifest: Manifest, options: Options | None = None) -> dict[str, Any]:
    """bbox_AP, segm_AP and their parts on val, after training on train; the data's size sets how many steps."""
    options = options or ONE_X
    learn, truth = read_instances(manifest.root, "train"), read_instances(manifest.root, "val")
    if learn.categories != truth.categories:
        raise UserError(
            f"the categories of {learn.folder} and {truth.folder} differ: give both files the same list"
        )
    images = images_with_objects(learn)
    if not images:
        raise UserError(
            f"{learn.folder} of {manifest.data} has no picture with objects: pass a folder that has some"
        )
    pictures = Pictures(manifest, learn, images, targets=True)
    say(
        f"training a Mask R-CNN on {len(images):,} pictures, {options.epochs} epochs; {encoder.name} stays as it is"
    )
    with torch.random.fork_rng(devices=[encoder.device] if encoder.device.startswith("cuda") else []):
        torch.manual_seed(options.seed)
        detector = build_detector(encoder, len(learn.categories), options)
        steps = train(detector, pictures, options, encoder.device)
    results, seen = [], []
    for image, found in detect(
        detector, Pictures(manifest, truth, truth.images, targets=False), encoder.device
    ):
        seen.append(image)
        results += results_of(image, found, truth.categories)
    if not seen:
        raise UserError(
            f"no picture of {manifest.data}/{truth.folder} can be read: check that they are COCO's own"
        )
    return average_precisions(truth, results, seen) | {
        "num_images": len(seen),
        "num_train": len(images),
        "num_steps": steps,
        "num_detections": len(results),
        "num_skipped": len(truth.images) - len(seen),
    }
