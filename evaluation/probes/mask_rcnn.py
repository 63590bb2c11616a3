"""Mask R-CNN on a frozen ResNet picture tower: only the feature pyramid, the RPN and the heads learn. Scores nothing.

CLIP-KD, appendix, tables 6 and 7: "linear evaluation" as in F-VLM, a frozen CLIP ResNet-50 under Mask R-CNN, with the
1x schedule of MMDetection (`Options`). torchvision's Mask R-CNN has the same heads (a pyramid of 256, two layers of
1,024 for boxes, four convolutions for masks). All classes are learned: F-VLM's text classifier and its fusion of
scores serve classes that were never seen, which these tables do not have.

Free choices: warm-up takes at most a tenth of all steps, so that small data come to their learning rate; torchvision's
box losses (smooth L1 of the RPN, sampling as in Mask R-CNN); the last, smaller batch of an epoch counts; seed 0.
"""

import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNN, MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

from evaluation.data.coco_instances import Pictures
from evaluation.models.encoder import Encoder
from teachercache.build.decode import ignore_interrupt
from teachercache.core.errors import UserError
from teachercache.core.process import default_workers
from teachercache.core.progress import ticker
from teachercache.teachers.clip.towers import image_blocks, tower_kind


@dataclasses.dataclass(frozen=True)
class Options:
    """MMDetection's 1x: 12 epochs of 16 pictures, SGD, a tenth of the learning rate after epochs 8 and 11.

    Behind them what Mask R-CNN itself is: pictures of 800 pixels, a pyramid and masks 256 wide, 512 boxes a picture.
    """

    epochs: int = 12
    batch: int = 16
    lr: float = 0.02
    drops: tuple[int, ...] = (8, 11)
    warmup: int = 500  # steps, linear from a thousandth
    momentum: float = 0.9
    weight_decay: float = 1e-4
    flip: float = 0.5
    short_side: int = 800
    long_side: int = 1333
    width: int = 256
    boxes: int = 512
    seed: int = 0

    def rate(self, step: int, steps_per_epoch: int) -> float:
        """Learning rate of a step, counted from 0."""
        warmup = min(self.warmup, steps_per_epoch * self.epochs // 10)
        rising = 0.001 + 0.999 * step / warmup if step < warmup else 1.0
        return self.lr * rising * 0.1 ** sum(step // steps_per_epoch >= drop for drop in self.drops)


ONE_X = Options()


# ----------------------------------------------------------------------------------------------------
# The detector


class FrozenPyramid(nn.Module):
    """Feature maps of a tower that never learns, and a feature pyramid over them that does."""

    def __init__(self, stages: Callable[[Tensor], list[Tensor]], widths: list[int], out_channels: int):
        super().__init__()
        self.stages = stages  # a function: the tower is no part of this module, nor of its state or its modes
        self.pyramid = FeaturePyramidNetwork(widths, out_channels, extra_blocks=LastLevelMaxPool())
        self.out_channels = out_channels

    def forward(self, images: Float[Tensor, "n 3 height width"]) -> dict[str, Float[Tensor, "n c _ _"]]:
        """Maps `0` (a quarter of the picture's size) to `3` (1/32) and `pool` (1/64)."""
        with torch.no_grad():
            maps = self.stages(images)
        return self.pyramid(OrderedDict((str(i), found) for i, found in enumerate(maps)))


def build_detector(encoder: Encoder, classes: int, options: Options) -> MaskRCNN:
    """Mask R-CNN over the encoder's frozen tower; UserError where that is no ResNet."""
    tower = encoder.tower
    if tower is None or tower_kind(tower) != "resnet":
        raise UserError(
            f"coco_detection needs a ResNet picture tower (RN50 to RN50x64), which {encoder.name} "
            "has not: train one, `student train --recipe clip_kd --set model=RN50`"
        )
    tower.eval()  # BatchNorm's statistics are frozen too
    blocks: list[Any] = list(image_blocks(tower))

    def stages(images: Tensor) -> list[Tensor]:
        found = [tower.stem(images)]
        for block in blocks:
            found.append(block(found[-1]))
        return found[1:]

    backbone = FrozenPyramid(stages, [block[-1].conv3.out_channels for block in blocks], options.width)
    detector = MaskRCNN(
        backbone,
        min_size=options.short_side,
        max_size=options.long_side,
        image_mean=list(encoder.mean),
        image_std=list(encoder.std),
        box_batch_size_per_image=options.boxes,
        box_predictor=FastRCNNPredictor(1024, classes + 1),
        mask_head=MaskRCNNHeads(options.width, (options.width,) * 4, 1),
        mask_predictor=MaskRCNNPredictor(options.width, options.width, classes + 1),
    )
    return detector.to(encoder.device)


# ----------------------------------------------------------------------------------------------------
# Training and using it


def train(detector: MaskRCNN, pictures: Pictures, options: Options, device: str) -> int:
    """Train by the schedule; how many steps that are."""
    draw = torch.Generator().manual_seed(options.seed)
    learning = [parameter for parameter in detector.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(
        learning, options.lr, momentum=options.momentum, weight_decay=options.weight_decay
    )
    per_epoch = -(-len(pictures) // options.batch)
    detector.train()
    with ticker(per_epoch * options.epochs, "steps", "detector") as tick:
        for epoch in range(options.epochs):
            order = torch.randperm(len(pictures), generator=draw).tolist()
            for step, batch in enumerate(batches(pictures, order, options.batch), start=epoch * per_epoch):
                if not batch:  # not one of its pictures can be read
                    continue
                flips = (torch.rand(len(batch), generator=draw) < options.flip).tolist()
                loss = torch.stack(list(detector(*on_device(batch, flips, device)).values())).sum()
                if not loss.isfinite():
                    raise UserError(
                        f"the detector's loss is {loss.item()} at step {step}: the tower's features are "
                        "not finite or too large, check the model with --task zeroshot"
                    )
                for group in optimizer.param_groups:
                    group["lr"] = options.rate(step, per_epoch)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                tick.step(1, f"loss {loss.item():.3f}")
    return per_epoch * options.epochs


def detect(detector: MaskRCNN, pictures: Pictures, device: str) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Id and detections of every picture that can be read."""
    detector.eval()
    with torch.inference_mode(), ticker(len(pictures), "pictures", "detections") as tick:
        for batch in batches(pictures, list(range(len(pictures))), 1):
            for image, pixels, _ in batch:
                yield image, detector([pixels.to(device)])[0]
            tick.step(1)


def batches(
    pictures: Pictures, order: list[int], size: int
) -> Iterator[list[tuple[int, Tensor, dict[str, Tensor]]]]:
    """Pictures in an order, decoded ahead; those that cannot be read are missing in their batch."""
    yield from DataLoader(
        pictures,
        batch_sampler=[order[i : i + size] for i in range(0, len(order), size)],
        num_workers=default_workers(),
        collate_fn=_readable,
        worker_init_fn=ignore_interrupt,
        generator=torch.Generator(),  # or it would draw from the one that samples boxes
    )


def _readable(batch: list[Any]) -> list[Any]:
    return [entry for entry in batch if entry is not None]


def on_device(
    batch: list[tuple[int, Tensor, dict[str, Tensor]]], flips: list[bool], device: str
) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Pictures and targets, turned left to right where `flips` says so."""
    pairs = [
        mirrored(pixels, target) if flip else (pixels, target)
        for (_, pixels, target), flip in zip(batch, flips, strict=True)
    ]
    images = [pixels.to(device) for pixels, _ in pairs]
    return images, [{name: value.to(device) for name, value in target.items()} for _, target in pairs]


def mirrored(
    pixels: Float[Tensor, "3 height width"], target: dict[str, Tensor]
) -> tuple[Float[Tensor, "3 height width"], dict[str, Tensor]]:
    """A picture and its objects as a mirror shows them."""
    left, top, right, bottom = target["boxes"].unbind(1)
    boxes = torch.stack([pixels.shape[2] - right, top, pixels.shape[2] - left, bottom], 1)
    return pixels.flip(2), {**target, "boxes": boxes, "masks": target["masks"].flip(2)}
