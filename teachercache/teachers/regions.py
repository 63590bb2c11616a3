"""Region features for single-stream students: torchvision's Faster R-CNN, and a small stand-in.

The boxes of a row (task column `boxes`) are used if there are any, up to the number of regions. Otherwise
Faster R-CNN detects boxes, and `regions-lite` uses the quarters of the image. Region 0 is the whole image.
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

NUM_REGIONS = {"regions": 37, "regions-lite": 10}  # regions, the whole image included
# Images are squashed to a square of fixed size; boxes are fractions of the image and do not change. 608 is the multiple
# of 32 nearest to the 600 pixels of Faster R-CNN's paper.
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
SAMPLES = 4  # sampling points of roi_align per direction
CLASSES = 91  # of COCO, as torchvision numbers them: 0 is the background
Fields = dict[str, Shaped[Tensor, "pictures regions ..."]]


def load_regions(name: str, *, weights: str, outputs: tuple[str, ...]) -> Teacher:
    """Load the teacher `regions` or `regions-lite`; `outputs` is `regions`, or `regions:N` for N regions."""
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
        example = encode(module, _inputs(torch.zeros(1, 3, *view["size"]), num_regions - 1))
    spec = TeacherSpec(
        name=name,
        weights=weights,
        digest=digest_weights(module),
        outputs=("regions" if num_regions == NUM_REGIONS[name] else f"regions:{num_regions}",),
        fields=tuple(_field(field, tuple(tensor.shape[1:])) for field, tensor in example.items()),
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
    """Return the inputs for images without boxes."""
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
    """Prepend the whole image to the boxes, and return which of the regions exist (1) or not (0)."""
    whole = boxes.new_tensor([0.0, 0.0, 1.0, 1.0]).expand(len(boxes), 1, 4)
    valid = torch.arange(boxes.shape[1] + 1, device=boxes.device) <= num_boxes[:, None]
    return torch.cat([whole, boxes], 1) * valid[..., None], valid.long()


def pool(
    features: Float[Tensor, "pictures width down across"], boxes: Float[Tensor, "pictures regions 4"]
) -> Float[Tensor, "pictures regions width"]:
    """Average a feature map over each region by RoIAlign with one cell, in float32 (roi_align has no
    bfloat16 kernel).
    """
    down, across = features.shape[2:]
    cells = boxes * boxes.new_tensor([across, down, across, down])
    pooled = roi_align(features.float(), [*cells], output_size=1, sampling_ratio=SAMPLES, aligned=True)
    return pooled.flatten(1).unflatten(0, boxes.shape[:2])


# ----------------------------------------------------------------------------------------------------
# regions-lite


def lite_fields(module: Any, inputs: Inputs, *, num_regions: int) -> Fields:
    """Pool the EfficientNet-Lite0 maps at strides 8, 16 and 32 over each region and concatenate them: 40 +
    112 + 320 values.
    """
    boxes, num_boxes = inputs["boxes"].clone(), inputs["num_boxes"].clone()
    quarters = boxes.new_tensor(QUARTERS)[: num_regions - 1]
    boxes[num_boxes == 0, : len(quarters)] = quarters
    num_boxes[num_boxes == 0] = len(quarters)
    regions, valid = with_whole(boxes, num_boxes)
    maps = module.forward_intermediates(inputs["image"], indices=[2, 3, 4], intermediates_only=True)
    features = torch.cat([pool(level, regions) for level in maps], 2)
    return {"region_feature": features * valid[..., None], "region_box": regions}


# ----------------------------------------------------------------------------------------------------
# Faster R-CNN


def _detector(weights: str) -> nn.Module:
    """Return torchvision's Faster R-CNN: ResNet-50 with a feature pyramid, the classes of COCO."""
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
        for layer in module.modules():
            if hasattr(layer, "running_var"):
                layer.eps = 0.0  # as in the training of torchvision's checkpoint
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(
            f"--weights {weights} is not of torchvision's fasterrcnn_resnet50_fpn: {reason}"
        ) from error
    return module


def _state(weights: str) -> dict[str, Tensor]:
    """Return a state dict from a file, or torchvision's, which is downloaded the first time."""
    from safetensors.torch import load_file
    from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

    if weights == "pretrained":
        try:
            download = FasterRCNN_ResNet50_FPN_Weights.DEFAULT.get_state_dict
            return dict(download(progress=False, check_hash=True, weights_only=True))
        except Exception as error:
            raise UserError(
                f"cannot get the weights of regions ({type(error).__name__}: {str(error).splitlines()[0][:120]}). Pass "
                "--weights FILE (fasterrcnn_resnet50_fpn as .pth or .safetensors), --weights random:0 (untrained), "
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
    """Run the box head at the boxes of the data, or at detected boxes (best first).

    The fields are 1024 values, a category and its probability per region. Boxes are computed in float32 for
    any dtype of the module: bfloat16 represents only every second pixel above 256.
    """
    images, boxes, num_boxes = inputs["image"], inputs["boxes"].clone(), inputs["num_boxes"].clone()
    levels = module.backbone(images)
    exact = {name: level.float() for name, level in levels.items()}
    without_boxes = (num_boxes == 0).nonzero().flatten()
    detections = (
        _detect(module, images[without_boxes], {name: level[without_boxes] for name, level in exact.items()})
        if len(without_boxes)
        else []
    )
    for i, detected in zip(without_boxes.tolist(), detections, strict=True):
        best = detected["boxes"][: num_regions - 1]
        boxes[i, : len(best)], num_boxes[i] = best, len(best)
    regions, valid = with_whole(boxes, num_boxes)
    pixels = [*(regions * _pixels(images))]
    features, classes, _ = _box_head(module, exact, pixels, images)
    features, classes = (
        values.unflatten(0, valid.shape) * valid[..., None] for values in (features, classes)
    )
    score, label = classes.float().softmax(2)[..., 1:].max(2)  # class 0 is the background
    score, label = score * valid, (label + 1) * valid
    for i, detected in zip(without_boxes.tolist(), detections, strict=True):
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
    """Return features [boxes, 1024], class logits and box deltas, concatenated over the images."""
    heads = module.roi_heads
    pooled = heads.box_roi_pool(levels, boxes, _sizes(images))
    features = heads.box_head(pooled.to(heads.box_head.fc6.weight.dtype))
    return features, *heads.box_predictor(features)


def _sizes(images: Tensor) -> list[tuple[int, int]]:
    return [(int(images.shape[2]), int(images.shape[3]))] * len(images)


def _detect(module: Any, images: Tensor, levels: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Return boxes as fractions of the image with scores and labels, best first, after torchvision's
    thresholds and NMS.
    """
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
    results = heads.postprocess_detections(classes.float(), shifts.float(), proposals, sizes)
    return [
        {"boxes": boxes / _pixels(images), "scores": scores, "labels": labels}
        for boxes, scores, labels in zip(*results, strict=True)
    ]
