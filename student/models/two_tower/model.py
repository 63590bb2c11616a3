"""Two-tower students: any open_clip configuration, from scratch or from a folder; tiny ones for laptops.

The output embeddings are raw (not normalised). Not for losses: see `recipes/`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from teachercache.core.errors import UserError
from teachercache.data.views import describe_view, image_view, replay_view
from teachercache.teachers.clip.layers import EMBEDDINGS, picture_fields, text_fields
from teachercache.teachers.clip.towers import image_blocks, text_blocks, text_tower


class TwoTower(nn.Module):
    """An open_clip model behind one `forward`, so that every ZeRO stage sees all its parameters used there."""

    inputs = ("image", "text")

    def __init__(
        self, model: nn.Module, model_cfg: Mapping[str, Any], preprocess: Mapping[str, Any], tokenizer: Any
    ):
        super().__init__()
        model.logit_scale = nn.Parameter(
            model.logit_scale.detach().reshape(1)
        )  # DeepSpeed refuses 0 dimensions
        self.model = model
        self.model_cfg, self.preprocess, self.tokenizer = model_cfg, preprocess, tokenizer
        described = describe_view(preprocess)
        self.view, self.replay, self.at_least = (
            image_view(described),
            replay_view(described),
            described["at_least"],
        )

        self.taps = EMBEDDINGS  # and the blocks that `show_blocks` names
        self.mask_ratio: float | None = None  # set by `show_masked`
        self.block_widths: dict[str, int] = {}
        self.num_chances = 0  # random numbers a picture that forward wants in batch["chance"]

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Float[Tensor, "..."]]:
        """Pictures [n, 3, H, W] and token ids [n, length] to raw `image`, `text` [n, d] and `scale` [1].

        Where they were asked for: `image_masked` [n, d], `image_block_<k>` and `text_block_<k>` [n, width].
        """
        found = picture_fields(self.model, batch["image"], self.taps) | text_fields(
            self.model, batch["text"], self.taps
        )
        outputs = {
            "image": found.pop("image_emb"),
            "text": found.pop("text_emb"),
            "scale": self.model.logit_scale.exp(),
        }
        if self.mask_ratio is not None:
            outputs["image_masked"] = self._masked(batch["image"], batch["chance"])
        return outputs | {name.replace("_hidden_", "_block_"): value for name, value in found.items()}

    def _masked(
        self, images: Float[Tensor, "n 3 height width"], chance: Float[Tensor, "n patches"]
    ) -> Float[Tensor, "n d"]:
        """The image embedding of the patches with the highest chance, in place of open_clip's own patch dropout."""
        assert self.mask_ratio is not None
        kept = chance.topk(max(1, round((1 - self.mask_ratio) * chance.shape[1])), dim=1).indices
        hook = self.model.visual.patch_dropout.register_forward_hook(
            lambda module, inputs, output: keep_patches(inputs[0], kept)
        )
        try:
            return self.model.encode_image(images)
        finally:
            hook.remove()

    @property
    def widths(self) -> tuple[int, int]:
        """Widths of the image and the text embedding."""
        return self.model_cfg["embed_dim"], self.model_cfg["embed_dim"]


def keep_patches(
    tokens: Float[Tensor, "n positions width"], kept: Int[Tensor, "n some"]
) -> Float[Tensor, "n fewer width"]:
    """The class token, which is first, and some patches; their positions are in them already."""
    places = kept[:, :, None].expand(-1, -1, tokens.shape[2])
    return torch.cat([tokens[:, :1], tokens[:, 1:].gather(1, places)], 1)


def show_masked(student: Any, ratio: float) -> None:
    """Let a student's forward also see each picture with that share of its patches left out."""
    if not 0 <= ratio < 1:
        raise UserError(f"--set mask_ratio={ratio:g}: a share of the patches is expected, from 0 to below 1")
    visual = student.model.visual if isinstance(student, TwoTower) else None
    if not hasattr(visual, "patch_dropout"):
        raise UserError(
            f"masking needs patches, which {type(visual or student).__name__} does not have: choose a "
            "model with open_clip's ViT, or --set mfd=0"
        )
    student.mask_ratio, student.num_chances = ratio, visual.grid_size[0] * visual.grid_size[1]


def show_blocks(student: Any, names: Sequence[str]) -> None:
    """Let a student's forward also show blocks, `image_block_3`, each as one vector, as a teacher's `hidden` is."""
    if not isinstance(student, TwoTower):
        raise UserError(
            f"{type(student).__name__} has no blocks to show: choose another model, or --set hidden=0"
        )
    towers = {"image": image_blocks(student.model.visual), "text": text_blocks(text_tower(student.model))}
    asked: dict[str, list[int]] = {"image": [], "text": []}
    for name in names:
        tower, _, number = name.split("_")
        asked[tower].append(int(number))
        if int(number) >= len(towers[tower]):
            raise UserError(
                f"--set hidden_{tower}: the student has no block {number}, only {len(towers[tower])} from 0"
            )
    student.taps = dataclasses.replace(
        EMBEDDINGS, image_layers=tuple(asked["image"]), text_layers=tuple(asked["text"])
    )
    height, width = describe_view(student.preprocess)["size"]
    batch = {"image": torch.zeros(1, 3, height, width), "text": student.tokenizer(["a"])}
    training = student.training
    with torch.no_grad():
        outputs = student.eval()({**batch, "chance": torch.zeros(1, student.num_chances)})
    student.train(training)
    student.block_widths = {name: outputs[name].shape[1] for name in names}


def open_clip_state(student: TwoTower) -> dict[str, Tensor]:
    """The state dict that open_clip itself would save: logit_scale a scalar."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in student.model.state_dict().items()}
    state["logit_scale"] = state["logit_scale"].reshape(())
    return {
        name: tensor.to(torch.float32) if tensor.is_floating_point() else tensor
        for name, tensor in state.items()
    }
