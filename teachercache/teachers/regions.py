"""Features of regions of a picture, for single-stream students: torchvision's Faster R-CNN, and a small stand-in.

A row's boxes (task column `boxes`) are taken as given, those above the number of regions left out; without them Faster
R-CNN detects its own, `regions-lite` takes the quarters of the picture. Region 0 is the whole picture. Not for training
a detector, nor for its masks.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from torchvision.ops import roi_align

from teachercache.cache.spec import Field, TeacherSpec
from teachercache.core.errors import UserError
from teachercache.data.views import describe_view, image_view
from teachercache.teachers.clip.lite import vision_trunk
from teachercache.teachers.teacher import Inputs, Teacher
from teachercache.teachers.weights import digest_weights, random_seed

NUM_REGIONS = {"regions": 37, "regions-lite": 10}  # the whole picture and so many boxes more, less one
# Squashed to a square of fixed size: boxes are shares of the picture, so they need not know. 608 is the multiple of 32
# nearest to the 600 pixels of Faster R-CNN's paper.
VIEWS = {
    "regions": {
        "size": 608,
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "interpolation": "bilinear",
    },
    "regions-lite": {"size": 160, "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"},
}
QUARTERS = ((0.0, 0.0, 0.5, 0.5), (0.5, 0.0, 1.0, 0.5), (0.0, 0.5, 0.5, 1.0), (0.5, 0.5, 1.0, 1.0))
SAMPLES = 4  # of roi_align, across and down a region
CLASSES = 91  # COCO's, as torchvision numbers them: 0 is none
Fields = dict[str, Shaped[Tensor, "pictures regions ..."]]


def load_regions(name: str, *, weights: str, outputs: tuple[str, ...]) -> Teacher:
    """The teacher `regions` or `regions-lite`; `outputs` is `regions`, or `regions:N` for N of them."""
    num_regions = _num_regions(name, outputs)
    lite = name == "regions-lite"
    if lite and weights != "pretrained":
        raise UserError("regions-lite has only its package's weights: leave --weights away")
    module = (vision_trunk() if lite else _detector(weights)).eval().requires_grad_(False)
    view = describe_view({"resize_mode": "squash", "fill_color": 0, **VIEWS[name]}) | {
        "boxes": num_regions - 1
    }
    encode: Callable[..., Fields] = partial(lite_fields if lite else detector_fields, num_regions=num_regions)
    with torch.inference_mode():
        said = encode(module, _inputs(torch.zeros(1, 3, *view["size"]), num_regions - 1))
    spec = TeacherSpec(
        name=name,
        weights=weights,
        digest=digest_weights(module),
        outputs=("regions" if num_regions == NUM_REGIONS[name] else f"regions:{num_regions}",),
        fields=tuple(_field(field, tuple(tensor.shape[1:])) for field, tensor in said.items()),
        view=view,
        tokenizer={},
        constants={},
        inputs=("image", "boxes"),
    )
    return Teacher(spec, module, encode, image_view(view))


def _num_regions(name: str, outputs: tuple[str, ...]) -> int:
    number = outputs[0].partition(":")[2] if len(outputs) == 1 else "0"
    if not number and ":" not in outputs[0]:
        return NUM_REGIONS[name]
    if not number.isdecimal() or int(number) < 2:
        raise UserError(
            f"--outputs {','.join(outputs)}: write regions, or regions:N for the whole picture and N - 1 boxes"
        )
    return int(number)


def _field(name: str, shape: tuple[int, ...]) -> Field:
    docs = {
        "region_feature": (
            "float16",
            "features of each region, the whole image first; zeros where there is none",
        ),
        "region_box": (
            "float32",
            "x1, y1, x2, y2 as fractions of the upright image; zeros where there is none",
        ),
        "region_score": ("float16", "probability of region_label, 0 for the whole image"),
        "region_label": ("int16", "COCO's category id, 0 for the whole image"),
    }
    dims = ("region", *{"region_feature": ("dim",), "region_box": ("corner",)}.get(name, ()))
    return Field(name, shape, "image", *docs[name], dims=dims)


def _inputs(images: Tensor, num_boxes: int) -> Inputs:
    """Pictures without boxes of their own."""
    return {
        "image": images,
        "boxes": torch.zeros(len(images), num_boxes, 4),
        "num_boxes": torch.zeros(len(images), dtype=torch.int64),
    }


# ----------------------------------------------------------------------------------------------------
# Which regions


def with_whole(
    boxes: Float[Tensor, "pictures boxes 4"], num_boxes: Int[Tensor, " pictures"]
) -> tuple[Float[Tensor, "pictures regions 4"], Int[Tensor, "pictures regions"]]:
    """The whole picture before the boxes, and which of the regions there are (1) or not (0)."""
    whole = boxes.new_tensor([0.0, 0.0, 1.0, 1.0]).expand(len(boxes), 1, 4)
    known = torch.arange(boxes.shape[1] + 1, device=boxes.device) <= num_boxes[:, None]
    return torch.cat([whole, boxes], 1) * known[..., None], known.long()


def pool(
    features: Float[Tensor, "pictures width down across"], boxes: Float[Tensor, "pictures regions 4"]
) -> Float[Tensor, "pictures regions width"]:
    """The mean of a feature map over each region: RoIAlign with one cell, in float32 (it knows no bfloat16)."""
    down, across = features.shape[2:]
    cells = boxes * boxes.new_tensor([across, down, across, down])
    pooled = roi_align(features.float(), [*cells], output_size=1, sampling_ratio=SAMPLES, aligned=True)
    return pooled.flatten(1).unflatten(0, boxes.shape[:2])


# ----------------------------------------------------------------------------------------------------
# regions-lite


def lite_fields(module: Any, inputs: Inputs, *, num_regions: int) -> Fields:
    """EfficientNet-Lite0's maps at strides 8, 16 and 32, pooled over each region and joined: 40 + 112 + 320 values."""
    boxes, num_boxes = inputs["boxes"].clone(), inputs["num_boxes"].clone()
    quarters = boxes.new_tensor(QUARTERS)[: num_regions - 1]
    boxes[num_boxes == 0, : len(quarters)] = quarters
    num_boxes[num_boxes == 0] = len(quarters)
    regions, known = with_whole(boxes, num_boxes)
    maps = module.forward_intermediates(inputs["image"], indices=[2, 3, 4], intermediates_only=True)
    features = torch.cat([pool(level, regions) for level in maps], 2)
    return {"region_feature": features * known[..., None], "region_box": regions}


# ----------------------------------------------------------------------------------------------------
# Faster R-CNN


def _detector(weights: str) -> nn.Module:
    """Faster R-CNN as torchvision has it: ResNet-50 with a feature pyramid, COCO's classes."""
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    seed = random_seed(weights)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed or 0)
        module = FasterRCNN(resnet_fpn_backbone(backbone_name="resnet50", weights=None), num_classes=CLASSES)
    if seed is not None:
        return module
    state = _state(weights)
    if not any(name.endswith("num_batches_tracked") for name in state):
        for part in module.modules():
            if hasattr(part, "running_var"):
                part.eps = 0.0  # what torchvision's own checkpoint was trained with
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(
            f"--weights {weights} is not of torchvision's fasterrcnn_resnet50_fpn: {reason}"
        ) from error
    return module


def _state(weights: str) -> dict[str, Tensor]:
    """A state dict from a file, or torchvision's by download (the first time)."""
    from safetensors.torch import load_file
    from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

    if weights == "pretrained":
        try:
            download = FasterRCNN_ResNet50_FPN_Weights.DEFAULT.get_state_dict
            return dict(download(progress=False, check_hash=True, weights_only=True))
        except Exception as error:
            raise UserError(
                f"cannot get the weights of regions ({type(error).__name__}: {str(error).splitlines()[0][:120]}). Pass "
                "--weights FILE (fasterrcnn_resnet50_fpn as .pth or .safetensors), --weights random:0 (knows nothing), "
                "or --teacher regions-lite"
            ) from error
    if not Path(weights).is_file():
        raise UserError(f"--weights {weights}: no such file (or write pretrained, or random:SEED)")
    try:
        return (
            load_file(weights) if weights.endswith(".safetensors") else torch.load(weights, weights_only=True)
        )
    except Exception as error:
        raise UserError(
            f"--weights {weights} is not readable as weights: {str(error).splitlines()[0][:120]}"
        ) from error


def detector_fields(module: Any, inputs: Inputs, *, num_regions: int) -> Fields:
    """What the box head says at given or at detected boxes (best first): 1024 values, a category and its probability.

    Boxes are computed in float32 whatever the module's dtype is: bfloat16 knows pixels above 256 by twos.
    """
    images, boxes, num_boxes = inputs["image"], inputs["boxes"].clone(), inputs["num_boxes"].clone()
    levels = module.backbone(images)
    exact = {name: level.float() for name, level in levels.items()}
    alone = (num_boxes == 0).nonzero().flatten()
    found = (
        _detect(module, images[alone], {name: level[alone] for name, level in exact.items()})
        if len(alone)
        else []
    )
    for i, detected in zip(alone.tolist(), found, strict=True):
        best = detected["boxes"][: num_regions - 1]
        boxes[i, : len(best)], num_boxes[i] = best, len(best)
    regions, known = with_whole(boxes, num_boxes)
    pixels = [*(regions * _pixels(images))]
    features, classes, _ = _box_head(module, exact, pixels, images)
    features, classes = (
        values.unflatten(0, known.shape) * known[..., None] for values in (features, classes)
    )
    score, label = classes.float().softmax(2)[..., 1:].max(2)  # class 0 is none of them
    score, label = score * known, (label + 1) * known
    for i, detected in zip(alone.tolist(), found, strict=True):
        score[i, 1 : num_boxes[i] + 1] = detected["scores"][: num_regions - 1]
        label[i, 1 : num_boxes[i] + 1] = detected["labels"][: num_regions - 1]
    score[:, 0], label[:, 0] = 0, 0
    return {
        "region_feature": features,
        "region_box": regions,
        "region_score": score,
        "region_label": label.to(torch.int16),
    }


def _pixels(images: Tensor) -> Float[Tensor, "4"]:
    down, across = images.shape[2:]
    return torch.tensor([across, down, across, down], dtype=torch.float32, device=images.device)


def _box_head(
    module: Any, levels: dict[str, Tensor], boxes: list[Tensor], images: Tensor
) -> tuple[Tensor, ...]:
    """Features [boxes, 1024], class logits and shifts of boxes in pixels, those of all pictures one after another."""
    heads = module.roi_heads
    pooled = heads.box_roi_pool(levels, boxes, _sizes(images))
    features = heads.box_head(pooled.to(heads.box_head.fc6.weight.dtype))
    return features, *heads.box_predictor(features)


def _sizes(images: Tensor) -> list[tuple[int, int]]:
    return [(int(images.shape[2]), int(images.shape[3]))] * len(images)


def _detect(module: Any, images: Tensor, levels: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Boxes as shares with scores and labels, best first, after torchvision's thresholds and suppression."""
    from torchvision.models.detection.image_list import ImageList
    from torchvision.models.detection.rpn import concat_box_prediction_layers

    rpn, heads, maps, sizes = module.rpn, module.roi_heads, [*levels.values()], _sizes(images)
    dtype = heads.box_head.fc6.weight.dtype
    objectness, deltas = (
        [x.float() for x in values] for values in rpn.head([level.to(dtype) for level in maps])
    )
    counts = [scores[0].numel() for scores in objectness]
    anchors = rpn.anchor_generator(ImageList(images.float(), sizes), maps)
    logits, moves = concat_box_prediction_layers(objectness, deltas)
    candidates = rpn.box_coder.decode(moves, anchors).view(len(images), -1, 4)
    proposals, _ = rpn.filter_proposals(candidates, logits, sizes, counts)
    _, classes, shifts = _box_head(module, levels, proposals, images)
    found = heads.postprocess_detections(classes.float(), shifts.float(), proposals, sizes)
    return [
        {"boxes": boxes / _pixels(images), "scores": scores, "labels": labels}
        for boxes, scores, labels in zip(*found, strict=True)
    ]
