"""COCO detection and instance segmentation with a frozen ResNet (CLIP-KD, tables 6 and 7; F-VLM's protocol).

The task measures the image tower; `probes/mask_rcnn.py` builds and trains the detector, which is not kept.
"""

import torch

from evaluation.data.coco_instances import (
    ObjectImages,
    average_precisions,
    images_with_objects,
    read_instances,
    results_of,
)
from evaluation.models.encoder import Encoder
from evaluation.probes.mask_rcnn import ONE_X, Options, build_detector, detect, train
from evaluation.tasks.task import Metrics
from teachercache.core.errors import UserError
from teachercache.core.progress import say
from teachercache.data.manifest import Manifest


def evaluate(encoder: Encoder, manifest: Manifest, options: Options | None = None) -> Metrics:
    """Train a detector on train, and compute bbox_AP, segm_AP and their variants on val.

    Args:
        encoder: A model with a ResNet image tower.
        manifest: COCO's folder.
        options: The training schedule; None for MMDetection's 1x.

    Raises:
        UserError: If the tower is no ResNet, or the data are incomplete.
    """
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
    training_set = ObjectImages(manifest, learn, images, targets=True)
    say(
        f"training a Mask R-CNN on {len(images):,} images, {options.epochs} epochs; {encoder.name} stays frozen"
    )
    with torch.random.fork_rng(devices=[encoder.device] if encoder.device.startswith("cuda") else []):
        torch.manual_seed(options.seed)
        detector = build_detector(encoder, len(learn.categories), options)
        num_steps = train(detector, training_set, options, encoder.device)
    results, measured = [], []
    test_set = ObjectImages(manifest, truth, truth.images, targets=False)
    for image, detections in detect(detector, test_set, encoder.device):
        measured.append(image)
        results += results_of(image, detections, truth.categories)
    if not measured:
        raise UserError(
            f"no picture of {manifest.data}/{truth.folder} can be read: check that they are COCO's own"
        )
    return {
        **average_precisions(truth, results, measured),
        "num_images": len(measured),
        "num_train": len(images),
        "num_steps": num_steps,
        "num_detections": len(results),
        "num_skipped": len(truth.images) - len(measured),
    }
