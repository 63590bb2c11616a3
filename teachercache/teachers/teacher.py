"""The contract of a teacher: what `tc build`, `tc verify` and live distillation ask of it."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from teachercache.cache.spec import TeacherSpec

if TYPE_CHECKING:
    from torch import Tensor, nn

    from teachercache.teachers.clip.word_selection import Tokens


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A loaded teacher. `encode` never decides about gradients: the caller does."""

    spec: TeacherSpec
    module: "nn.Module"
    encode: "Callable[[nn.Module, Mapping[str, Tensor]], dict[str, Tensor]]"
    view: "Callable[[Any], Tensor]"  # RGB picture -> [3, height, width]
    tokenize: "Callable[[list[str]], Tensor] | None"  # texts -> ids [texts, length]; None: of pictures alone
    tokens: "Tokens | None" = None  # the words of texts beside their pictures, where that was asked for
    # What is said of each text beside its row's picture [n * texts, ...]: of distinct pictures and texts, as they came
    # and as `encode` made them, and of the places of the n rows' pictures and texts among them (`image`, `text`)
    pair: "Callable[[nn.Module, Mapping[str, Tensor], Mapping[str, Tensor]], dict[str, Tensor]] | None" = None

    @property
    def denoises(self) -> bool:
        """Whether the module is a diffusion model, whose UNet predicts noise."""
        return hasattr(self.module, "unet")


@dataclasses.dataclass(frozen=True)
class Entry:
    r"""A teacher in the registry, before it is loaded. Importing the module of an entry imports nothing heavy.

    Attributes:
        doc: One line for `tc teachers`.
        load: Load the teacher: `load(name, weights=..., outputs=...)`.
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
