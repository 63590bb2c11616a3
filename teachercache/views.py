"""From a picture to a tensor and from texts to token ids, by a recorded description. Not for reading files."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

VIEW_KEYS = ("size", "mean", "std", "interpolation", "resize_mode", "fill_color")


def describe_view(preprocess_cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The part of an open_clip preprocess_cfg that decides the pixels, in JSON types."""
    size = preprocess_cfg["size"]
    size = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
    view: dict[str, Any] = {name: preprocess_cfg.get(name) for name in VIEW_KEYS}
    return {**view, "size": list(size), "mean": list(view["mean"]), "std": list(view["std"])}


def image_view(view: Mapping[str, Any]) -> "Callable[[Image.Image], Tensor]":
    """RGB picture to float32 [3, height, width]; open_clip's own evaluation transform."""
    from open_clip.transform import PreprocessCfg, image_transform_v2

    values = {name: view[name] for name in VIEW_KEYS if view.get(name) is not None}
    values["size"] = tuple(values["size"])
    return image_transform_v2(PreprocessCfg(**values), is_train=False)
