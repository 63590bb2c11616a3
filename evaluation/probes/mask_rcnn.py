"""Mask R-CNN on a frozen ResNet image tower: only the feature pyramid, the RPN and the heads are trained.

CLIP-KD (appendix, tables 6 and 7): "linear evaluation" as in F-VLM, a frozen CLIP ResNet-50 under Mask R-CNN with
MMDetection's 1x schedule (`Options`). torchvision's Mask R-CNN has the same heads (a pyramid of width 256, two layers of
1,024 for boxes, four convolutions for masks). All classes are learned: F-VLM's text classifier and its score fusion are
for unseen classes, which these tables do not have.

Free choices: warm-up takes at most a tenth of all steps, so that small data sets reach their learning rate;
torchvision's box losses (smooth L1 in the RPN, sampling as in Mask R-CNN); the last, smaller batch of an epoch is used;
seed 0.
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

from evaluation.data.coco_instances import Example, ObjectImages
from evaluation.models.encoder import Encoder
from teachercache.core.errors import UserError
from teachercache.core.process import default_workers
from teachercache.core.progress import ticker
from teachercache.data.workers import hand_over, ignore_interrupt, received, start_method
from teachercache.teachers.clip.towers import image_blocks, tower_kind


@dataclasses.dataclass(frozen=True)
class Options:
    """The schedule and the sizes of a detector; the defaults are MMDetection's 1x and those of Mask R-CNN.

    1x: 12 epochs of batches of 16 images, SGD, a tenth of the learning rate after epochs 8 and 11.

    Attributes:
        epochs: Passes over the training images.
        batch: Images per step.
        lr: Peak learning rate.
        drops: Epochs after which the learning rate is divided by 10.
        warmup: Steps of linear warm-up from a thousandth of the learning rate.
        momentum: SGD's momentum.
        weight_decay: SGD's weight decay.
        flip: Probability of a horizontal flip.
        short_side: Images are resized to this length of the short side, in pixels,
        long_side: and at most this length of the long side.
        width: Channels of the feature pyramid and of the mask head.
        boxes: Boxes sampled per image.
        seed: Seed of the initial weights, the order and the flips.
    """

    epochs: int = 12
    batch: int = 16
    lr: float = 0.02
    drops: tuple[int, ...] = (8, 11)
    warmup: int = 500
    momentum: float = 0.9
    weight_decay: float = 1e-4
    flip: float = 0.5
    short_side: int = 800
    long_side: int = 1333
    width: int = 256
    boxes: int = 512
    seed: int = 0

    def rate(self, step: int, steps_per_epoch: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        warmup = min(self.warmup, steps_per_epoch * self.epochs // 10)
        rising = 0.001 + 0.999 * step / warmup if step < warmup else 1.0
        return self.lr * rising * 0.1 ** sum(step // steps_per_epoch >= drop for drop in self.drops)


ONE_X = Options()


# ----------------------------------------------------------------------------------------------------
# The detector


class FrozenPyramid(nn.Module):
    """A trainable feature pyramid over the feature maps of a frozen tower.

    Args:
        stages: Computes the tower's feature maps. It is a function, so that the tower is not part of this module, its
            state or its modes.
        widths: Channels of the feature maps.
        out_channels: Channels of the pyramid.
    """

    def __init__(self, stages: Callable[[Tensor], list[Tensor]], widths: list[int], out_channels: int):
        super().__init__()
        self.stages = stages
        self.pyramid = FeaturePyramidNetwork(widths, out_channels, extra_blocks=LastLevelMaxPool())
        self.out_channels = out_channels

    def forward(self, images: Float[Tensor, "n 3 height width"]) -> dict[str, Float[Tensor, "n c _ _"]]:
        """Return the maps `0` (1/4 of the image's size) to `3` (1/32) and `pool` (1/64)."""
        with torch.no_grad():
            maps = self.stages(images)
        return self.pyramid(OrderedDict((str(i), features) for i, features in enumerate(maps)))


def build_detector(encoder: Encoder, classes: int, options: Options) -> MaskRCNN:
    """Build a Mask R-CNN over the encoder's frozen tower.

    Args:
        encoder: The model; its tower must be a ResNet.
        classes: Number of classes without the background.
        options: The sizes.

    Raises:
        UserError: If the encoder has no ResNet.
    """
    tower: Any = encoder.tower
    if tower is None or tower_kind(tower) != "resnet":
        raise UserError(
            f"coco_detection needs a ResNet picture tower (RN50 to RN50x64), which {encoder.name} "
            "does not have: train one, `student train --recipe clip_kd --set model=RN50`"
        )
    tower.eval()  # BatchNorm's statistics stay frozen too
    blocks: list[Any] = list(image_blocks(tower))

    def stages(images: Tensor) -> list[Tensor]:
        maps = [tower.stem(images)]
        for block in blocks:
            maps.append(block(maps[-1]))
        return maps[1:]

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
# Training and inference


def train(detector: MaskRCNN, examples: ObjectImages, options: Options, device: str) -> int:
    """Train a detector in place and return the number of steps.

    Raises:
        UserError: If the loss is not finite.
    """
    draw = torch.Generator().manual_seed(options.seed)
    trained = [parameter for parameter in detector.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(
        trained, options.lr, momentum=options.momentum, weight_decay=options.weight_decay
    )
    per_epoch = -(-len(examples) // options.batch)
    detector.train()
    with ticker(per_epoch * options.epochs, "steps", "detector") as tick:
        for epoch in range(options.epochs):
            order = torch.randperm(len(examples), generator=draw).tolist()
            for step, batch in enumerate(batches(examples, order, options.batch), start=epoch * per_epoch):
                if not batch:  # none of its images can be read
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


def detect(
    detector: MaskRCNN, examples: ObjectImages, device: str
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Yield the id and the detections of every readable image, as torchvision returns them."""
    detector.eval()
    with torch.inference_mode(), ticker(len(examples), "pictures", "detections") as tick:
        for batch in batches(examples, list(range(len(examples))), 1):
            for image, pixels, _ in batch:
                yield image, detector([pixels.to(device)])[0]
            tick.step(1)


def batches(examples: ObjectImages, order: list[int], size: int) -> Iterator[list[Example]]:
    """Yield batches of examples, decoded by worker processes; unreadable images are missing in their batch."""
    workers = default_workers()
    data = DataLoader(
        examples,
        batch_sampler=[order[i : i + size] for i in range(0, len(order), size)],
        num_workers=workers,
        multiprocessing_context=start_method(workers),
        collate_fn=hand_over(workers, _readable),
        worker_init_fn=ignore_interrupt,
        # Otherwise it draws from the generator that samples boxes
        generator=torch.Generator(),
    )
    yield from received(data)


def _readable(batch: list[Example | None]) -> list[Example]:
    return [example for example in batch if example is not None]


def on_device(
    batch: list[Example], flips: list[bool], device: str
) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Return images and targets on the device, mirrored where `flips` is True."""
    pairs = [
        mirrored(pixels, target) if flip else (pixels, target)
        for (_, pixels, target), flip in zip(batch, flips, strict=True)
    ]
    images = [pixels.to(device) for pixels, _ in pairs]
    return images, [{name: value.to(device) for name, value in target.items()} for _, target in pairs]


def mirrored(
    pixels: Float[Tensor, "3 height width"], target: dict[str, Tensor]
) -> tuple[Float[Tensor, "3 height width"], dict[str, Tensor]]:
    """Flip an image and its objects horizontally."""
    left, top, right, bottom = target["boxes"].unbind(1)
    boxes = torch.stack([pixels.shape[2] - right, top, pixels.shape[2] - left, bottom], 1)
    return pixels.flip(2), {**target, "boxes": boxes, "masks": target["masks"].flip(2)}
