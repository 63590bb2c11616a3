"""The contract of a teacher: what `tc build`, `tc verify`, `tc search` and online distillation need of one."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol, TypedDict

from teachercache.cache.spec import TeacherSpec

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor, nn


class Inputs(TypedDict, total=False):
    """One batch for `Teacher.encode`, of n rows with t texts each.

    Images and texts are de-duplicated: every image and text of the batch comes once. An entry is present if the teacher
    lists it in `TeacherSpec.inputs` and the data has it.

    Attributes:
        image: "image": the distinct images, [images, 3, height, width], in the dtype of the module.
        text: "text": the token ids of the distinct texts, [texts, length].
        boxes: "boxes": regions of each image, x1, y1, x2, y2 as fractions of it, [images, boxes, 4].
        num_boxes: "boxes": how many of them the data has, [images].
        words: "words": what `Teacher.find_words` returned for all n * t texts.
        pair_image: "words" or "pairs": the index into `image` for each pair of a text and its row's image, [n, t].
        pair_text: "words" or "pairs": the index into `text` for each pair, [n, t].
        pair_valid: "words" or "pairs": False if the image of the pair could not be decoded (it is black), [n, t].
    """

    image: "Tensor"
    text: "Tensor"
    boxes: "Tensor"
    num_boxes: "Tensor"
    words: object
    pair_image: "Tensor"
    pair_text: "Tensor"
    pair_valid: "Tensor"


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A loaded teacher: a frozen module with the functions that prepare its inputs and compute its fields.

    A teacher that averages the colors of an image:

        field = Field("color", (3,), "image", "float16", "mean of each channel")
        view = describe_view({"size": 32, "mean": (0, 0, 0), "std": (1, 1, 1)})
        spec = TeacherSpec(
            "colors", "none", "1", ("embeddings",), (field,), view=view, tokenizer={}, constants={}, inputs=("image",)
        )
        encode = lambda module, inputs: {"color": inputs["image"].mean((2, 3))}
        teacher = Teacher(spec, torch.nn.Identity(), encode, image_view(view))

    Attributes:
        spec: The identity of the teacher, its fields and its inputs.
        module: The frozen module; `tc build` moves it to the device and to the precision of the build.
        encode: Compute the fields of a batch: `encode(module, inputs)` returns a tensor for each field that the inputs
            allow. A field per image is [images, *shape], a field per text [texts, *shape], both of the distinct
            inputs; a field per pair is [n * t, *shape]. A field per text whose value depends on the image, too, is
            [n * t, *shape] as well. The caller decides about gradients, expands the values to the rows, and replaces
            what belongs to undecodable images and empty texts by zeros.
        view: Map an RGB image to float32 [3, height, width]; None without "image" in `spec.inputs`.
        tokenize: Map texts to ids [texts, length]; None without "text" in `spec.inputs`.
        find_words: Map texts to the value of `Inputs.words`, in the decoding processes; None without "words".
    """

    spec: TeacherSpec
    module: "nn.Module"
    encode: "Callable[[nn.Module, Inputs], dict[str, Tensor]]"
    view: "Callable[[Image], Tensor] | None" = None
    tokenize: "Callable[[list[str]], Tensor] | None" = None
    find_words: Callable[[list[str]], object] | None = None

    def __post_init__(self) -> None:
        functions = {"image": self.view, "text": self.tokenize, "words": self.find_words}
        for name, function in functions.items():
            if (name in self.spec.inputs) != (function is not None):
                problem = "lacks the function for it" if function is None else "does not list it"
                raise ValueError(f"teacher {self.spec.name}: the input '{name}': the teacher {problem}")
        if any(field.per == "row" for field in self.spec.fields):
            raise ValueError(f"teacher {self.spec.name}: a teacher has fields per image, text or pair")


@dataclasses.dataclass(frozen=True)
class Entry:
    r"""A teacher in the registry, before it is loaded. Importing the module of an entry imports nothing heavy.

    Attributes:
        doc: One line for `tc teachers`.
        load: Load the teacher: `load(name, weights=..., outputs=...)`. Its spec lists the fields of these outputs
            alone, and its `encode` returns these fields alone.
        outputs: The values that `--outputs` takes.
        default: How many of them, from the first on, a build without `--outputs` keeps.
        writes: Regular expressions of the fields that each output writes. A group is the number of a layer that the
            output takes: `{"hidden": r"(?:image|text)_hidden_(\d+)"}` maps image_hidden_3 to hidden:3.
        needs: Outputs that an output cannot go without.
    """

    doc: str
    load: "Load"
    outputs: tuple[str, ...] = ("embeddings",)
    default: int = 1
    writes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    needs: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)


class Load(Protocol):
    """The function of an `Entry` that loads its teacher."""

    def __call__(self, name: str, *, weights: str, outputs: tuple[str, ...]) -> Teacher:
        """Load a teacher in float32 on the CPU, in evaluation mode, with frozen parameters."""


WORD_OUTPUTS = ("tokens", "random_tokens")  # `tokens:2` keeps two words of a text
# `hidden` is the last block, `hidden:3+7` are those two
CLIP_OUTPUTS = ("embeddings", "patches", "hidden", *WORD_OUTPUTS)
CLIP_WRITES = {
    "embeddings": "(?:image|text)_emb",
    "patches": "patch_(?:token|emb)",
    "hidden": r"(?:image|text)_hidden_(\d+)",
    "tokens": "word_(?:span|score|index|feature)",
    "random_tokens": "word_span|random_(?:index|feature)",
}
CLIP_NEEDS = {name: ("embeddings",) for name in WORD_OUTPUTS}
# `scores:16+seed=1+t=200-800` draws 16 samples with that seed of those timesteps; `unet_features:100+up_blocks.1`
DIFFUSION_OUTPUTS = ("text_states", "latents", "unet_features", "scores")
DIFFUSION_WRITES = {
    "text_states": "text_states",
    "latents": "latent",
    "unet_features": "unet_feature",
    "scores": "diffusion_score(?:_normalised)?",
}
REGION_WRITES = {"regions": "region_(?:feature|box|score|label)"}
