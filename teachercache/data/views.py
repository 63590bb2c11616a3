"""Map images to tensors by a recorded description, and augmented views by recorded parameters. Reads no
files.

A view is replayed from its parameters, not from a seed. The cache stores crop box, flip and colors of each
view with the teacher's outputs, and a student that decodes the same image sees the same pixels, at its own
size.
"""

import dataclasses
import hashlib
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from annotated_types import Interval

from teachercache.core.errors import UserError, closest
from teachercache.core.ranges import Part, Seed, Share, check_record, from_text, kinds_of

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

VIEW_KEYS = ("size", "mean", "std", "interpolation", "resize_mode", "fill_color")
PARAMS = ("top", "left", "height", "width", "flip", "brightness", "contrast", "saturation", "hue", "gray")
MAX_RESIZED = 16_000_000  # pixels of an image between its resize and its center crop
MARGIN = 8  # pixels of the image around the center crop that a resize may look at
FACTORS = ("brightness", "contrast", "saturation")


@dataclasses.dataclass(frozen=True)
class Augment:
    """How augmented views are drawn: a random resized crop, a flip, color jitter, grayscale.

    Attributes:
        scale_min: The smallest fraction of the area that a crop keeps.
        scale_max: The largest fraction of the area that a crop keeps.
        ratio: The largest aspect ratio of a crop, in either direction.
        flip: Probability of a horizontal flip.
        jitter: Probability that brightness, contrast, saturation and hue change.
        brightness: Brightness changes by a factor between 1 - x and 1 + x.
        contrast: As `brightness`.
        saturation: As `brightness`.
        hue: Hue shifts by -x to x turns of the color circle.
        gray: Probability of grayscale.
        seed: The seed of all draws.
    """

    scale_min: Part = 0.4
    scale_max: Part = 1.0
    ratio: Annotated[float, Interval(ge=1, le=100)] = 4 / 3
    flip: Share = 0.5
    jitter: Share = 0.8
    brightness: Share = 0.4
    contrast: Share = 0.4
    saturation: Share = 0.4
    hue: Annotated[float, Interval(ge=0, le=0.5)] = 0.1
    gray: Share = 0.1
    seed: Seed = 0

    def __post_init__(self) -> None:
        check_record(self, "--augment ")
        if self.scale_min > self.scale_max:
            raise UserError(f"--augment scale_min={self.scale_min}: it is above scale_max={self.scale_max}")


def parse_augment(settings: tuple[str, ...]) -> Augment:
    """Apply `KEY=VALUE` settings to the defaults; raise UserError with the valid keys and ranges."""
    kinds = kinds_of(Augment)
    values: dict[str, Any] = {}
    for setting in settings:
        key, _, text = setting.partition("=")
        key = key.strip()
        if key not in kinds:
            raise UserError(
                f"--augment {setting}: {closest(key, kinds)}write KEY=VALUE, KEY one of {', '.join(kinds)}"
            )
        try:
            values[key] = from_text(text.strip(), kinds[key])
        except ValueError as error:
            raise UserError(f"--augment {setting}: {error}") from error
    return Augment(**values)


def draw_params(augment: Augment, key: str, view: int, *, width: int, height: int) -> np.ndarray:
    """Draw the parameters of one view, float32 [P]: a pure function of the key and the number of the view.

    Every view consumes the same number of random numbers, so that a setting changes only what it names.

    Args:
        augment: How views are drawn.
        key: The key of the row.
        view: The number of the view.
        width: Of the image, in pixels.
        height: Of the image, in pixels.
    """
    digest = hashlib.sha256(f"{augment.seed} {view} {key}".encode("utf-8", "surrogatepass")).digest()
    draw = np.random.default_rng(np.frombuffer(digest, np.uint32)).random(12)
    area = width * height * (augment.scale_min + draw[0] * (augment.scale_max - augment.scale_min))
    ratio = math.exp((2 * draw[1] - 1) * math.log(augment.ratio))
    crop_width = min(max(round(math.sqrt(area * ratio)), 1), width)
    crop_height = min(max(round(math.sqrt(area / ratio)), 1), height)
    top, left = int(draw[2] * (height - crop_height + 1)), int(draw[3] * (width - crop_width + 1))
    spread = (2 * draw[5:9] - 1) * (draw[9] < augment.jitter)
    colors = [
        1 + spread[i] * getattr(augment, name)
        for i, name in enumerate(("brightness", "contrast", "saturation"))
    ]
    flip, gray = draw[4] < augment.flip, draw[10] < augment.gray
    values = [top, left, crop_height, crop_width, flip, *colors, spread[3] * augment.hue, gray]
    return np.array(values, np.float32)


def describe_view(preprocess_cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of an open_clip preprocess_cfg that determine the pixels, as JSON types.

    `at_least` is added: a JPEG may be decoded at a reduced size as long as its shorter side keeps this many
    pixels, three times the size of the view (`pictures.decode_image`).
    """
    size = preprocess_cfg["size"]
    size = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
    view: dict[str, Any] = {name: preprocess_cfg.get(name) for name in VIEW_KEYS}
    return {
        **view,
        "size": list(size),
        "mean": list(view["mean"]),
        "std": list(view["std"]),
        "at_least": 3 * max(size),
    }


@dataclasses.dataclass(frozen=True)
class BoundedView:
    """A view that never makes more than MAX_RESIZED pixels on its way.

    Attributes:
        transform: open_clip's evaluation transform: a resize, a center crop, and further steps.
        size: Height and width of the view.
        crops: Whether the shorter side is resized to the view, and the longer one cropped.
    """

    transform: "Callable[[Image.Image], Tensor]"
    size: tuple[int, int]
    crops: bool

    def __call__(self, picture: "Image.Image") -> "Tensor":
        """Map an RGB image to float32 [3, height, width]; a line of pixels stays a line."""
        (width, height), (tall, wide) = picture.size, self.size
        ratio = (min if self.crops else max)(width / wide, height / tall)
        resized = width / ratio, height / ratio
        if self.crops and resized[0] * resized[1] > MAX_RESIZED:
            return self.transform(_centered(picture, wide=wide * ratio, tall=tall * ratio))
        if not self.crops and min(resized) <= 0.5:
            least = math.ceil(ratio)  # otherwise less than a pixel is left of the shorter side
            picture = picture.resize((max(width, least), max(height, least)))
        return self.transform(picture)


def _centered(picture: "Image.Image", *, wide: float, tall: float) -> "Image.Image":
    """Cut a very long image to what a center crop sees, and a margin that is cropped later."""
    width, height = picture.size
    across, down = min(width, math.ceil(wide) + 2 * MARGIN), min(height, math.ceil(tall) + 2 * MARGIN)
    # as many pixels are cut off on both sides, so that the center stays
    left, top = (width - across) // 2, (height - down) // 2
    return picture.crop((left, top, width - left, height - top))


def image_view(view: Mapping[str, Any]) -> "Callable[[Image.Image], Tensor]":
    """Return a function from an RGB image to float32 [3, height, width]: open_clip's evaluation transform.

    An image so long that its resized version would have more than MAX_RESIZED pixels is cropped before it is resized.
    """
    from open_clip.transform import PreprocessCfg, image_transform_v2

    values = {name: view[name] for name in VIEW_KEYS if view.get(name) is not None}
    values["size"] = tuple(values["size"])
    transform = image_transform_v2(PreprocessCfg(**values), is_train=False)
    if values.get("resize_mode") == "squash":
        return transform
    return BoundedView(transform, values["size"], crops=values.get("resize_mode", "shortest") == "shortest")


def check_description(view: Mapping[str, Any], what: str) -> None:
    """Raise UserError if the description of a view lacks what augmented views and an Encoder need."""
    missing = [key for key in ("size", "mean", "std") if view.get(key) is None]
    if missing:
        raise UserError(
            f"{what}: the teacher's spec lacks {', '.join(missing)} in `view`: make it with "
            "teachercache.data.views.describe_view({'size': 224, 'mean': [0.5] * 3, 'std': [0.5] * 3})"
        )


def check_view(pixels: object, size: tuple[int, int] | None, name: str) -> "Tensor":
    """Return what a view made of a picture; raise UserError if it is no float32 [3, height, width].

    Args:
        pixels: The result of the view.
        size: Its height and width; None if they are not known.
        name: What the message calls the view.
    """
    from torch import Tensor, float32

    expected = f"[3, {size[0]}, {size[1]}]" if size else "[3, height, width]"
    if not isinstance(pixels, Tensor):
        raise UserError(f"{name} returned a {type(pixels).__name__}: return float32 {expected}")
    shape = tuple(pixels.shape)
    good = shape[:1] == (3,) and (size is None or shape[1:] == tuple(size))
    if not good or pixels.dtype != float32:
        dtype = str(pixels.dtype).removeprefix("torch.")
        raise UserError(f"{name} returned {dtype} {[*shape]}: return float32 {expected}")
    return pixels


def replay_view(view: Mapping[str, Any]) -> "Callable[[Image.Image, np.ndarray], Tensor]":
    """Return a function from an RGB image and PARAMS [P] to float32 [3, height, width]: crop, resize,
    flip, colors.
    """
    import torchvision.transforms.functional as F
    from torchvision.transforms import InterpolationMode

    bilinear = view.get("interpolation") == "bilinear"
    interpolation = InterpolationMode.BILINEAR if bilinear else InterpolationMode.BICUBIC

    def replay(picture: "Image.Image", params: np.ndarray) -> "Tensor":
        check_description(view, "augmented views")
        values = dict(zip(PARAMS, params.tolist(), strict=True))
        box = [round(values[name]) for name in ("top", "left", "height", "width")]
        picture = F.resized_crop(picture, *box, size=list(view["size"]), interpolation=interpolation)
        picture = F.hflip(picture) if values["flip"] else picture
        for name in FACTORS:
            if values[name] != 1:
                picture = getattr(F, f"adjust_{name}")(picture, values[name])
        picture = F.adjust_hue(picture, values["hue"]) if values["hue"] else picture
        picture = F.rgb_to_grayscale(picture, num_output_channels=3) if values["gray"] else picture
        return F.normalize(F.to_tensor(picture), view["mean"], view["std"])

    return replay
