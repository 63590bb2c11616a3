"""The contract of a teacher: what `tc build`, `tc verify` and live distillation ask of it."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

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
    """A name in the table: what `tc teachers` says of it, and how it is loaded."""

    doc: str
    load: Callable[..., Teacher]  # load(name, weights=..., outputs=...)
    outputs: tuple[str, ...] = ("embeddings",)
    default: int = 1  # how many of them, from the first, a build keeps that names none


WORD_OUTPUTS = ("tokens", "random_tokens")  # three words of a text, `tokens:2` two


CLIP_OUTPUTS = (
    "embeddings",
    "patches",
    "hidden",
    *WORD_OUTPUTS,
)  # `hidden` is the last block, `hidden:3+7` those two


# `scores:16+seed=1+t=200-800` draws so often, from that seed and of those timesteps; `unet_features:100+up_blocks.1`
DIFFUSION_OUTPUTS = ("text_states", "latents", "unet_features", "scores")
