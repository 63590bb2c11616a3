"""Two-tower students: an open_clip model of any configuration that implements the contract of a student."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import open_clip
import torch
from jaxtyping import Float, Int
from open_clip.tokenizer import HFTokenizer
from torch import Tensor, nn

from evaluation.models.encoder import Encoder
from student.contract import Capability, PictureView, RowInputs, StudentSpec
from teachercache.core.errors import UserError
from teachercache.data.views import describe_view, image_view, replay_view
from teachercache.teachers.clip.layers import EMBEDDINGS, picture_fields, text_fields
from teachercache.teachers.clip.towers import image_blocks, text_blocks, text_tower

FAMILY = "two_tower"
ClipModel: TypeAlias = open_clip.CLIP | open_clip.CustomTextCLIP
Tokenizer: TypeAlias = open_clip.SimpleTokenizer | HFTokenizer


class TwoTower(nn.Module):
    """An open_clip model that outputs raw (not normalized) embeddings.

    One `forward` computes everything, because ZeRO 3 gathers parameters only inside of forward.

    Args:
        model: The open_clip model.
        model_cfg: Its configuration.
        preprocess: open_clip's complete preprocess_cfg.
        tokenizer: open_clip's tokenizer of the model.
    """

    def __init__(
        self,
        model: ClipModel,
        model_cfg: Mapping[str, Any],
        preprocess: Mapping[str, Any],
        tokenizer: Tokenizer,
    ):
        super().__init__()
        # DeepSpeed does not accept parameters without dimensions
        model.logit_scale = nn.Parameter(model.logit_scale.detach().reshape(1))
        self.model = model
        self.model_cfg, self.preprocess, self.tokenizer = model_cfg, preprocess, tokenizer
        view = describe_view(preprocess)
        self.picture = PictureView(image_view(view), replay_view(view), view["at_least"])

        self.taps = EMBEDDINGS  # `add_block_outputs` adds blocks
        self.mask_ratio: float | None = None  # set by `add_masked_output`
        self.block_widths: dict[str, int] = {}
        self.mask_noise = 0

    @property
    def spec(self) -> StudentSpec:
        """The configuration and preprocessing of the model."""
        return StudentSpec(FAMILY, {"model_cfg": self.model_cfg, "preprocess": self.preprocess})

    @property
    def row_inputs(self) -> RowInputs:
        """A picture and a text."""
        return RowInputs(self.picture, self.tokenizer, mask_noise=self.mask_noise)

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Float[Tensor, "..."]]:
        """Encode pictures [n, 3, H, W] and token ids [n, length].

        Returns:
            Raw `image`, `text` [n, d] and the scalar `scale`. Where they were added: `masked_image` [n, d],
            `image_block_<k>` and `text_block_<k>` [n, width].
        """
        fields = picture_fields(self.model, batch["image"], self.taps)
        fields |= text_fields(self.model, batch["text"], self.taps)
        outputs = {
            "image": fields.pop("image_emb"),
            "text": fields.pop("text_emb"),
            "scale": self.model.logit_scale.exp().reshape(()),
        }
        if self.mask_ratio is not None:
            outputs["masked_image"] = self._masked(batch["image"], batch["mask_noise"])
        return outputs | {name.replace("_hidden_", "_block_"): value for name, value in fields.items()}

    def _masked(
        self, images: Float[Tensor, "n 3 height width"], noise: Float[Tensor, "n patches"]
    ) -> Float[Tensor, "n d"]:
        """Encode pictures from the patches with the highest noise, replacing open_clip's patch dropout."""
        assert self.mask_ratio is not None
        kept = noise.topk(max(1, round((1 - self.mask_ratio) * noise.shape[1])), dim=1).indices
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

    def capabilities(self) -> frozenset[Capability]:
        """Return every capability except answering and generating, minus those that hooks rule out."""
        offered = {
            Capability.ENCODES,
            Capability.EXPORTS_OPEN_CLIP,
            Capability.EXPORTS_HF,
            Capability.CHECKPOINTS_ACTIVATIONS,
            Capability.COMPILES,
            Capability.SHARDS_PARAMETERS,
        }
        return frozenset(offered - self.limits().keys())

    def limits(self) -> dict[Capability, str]:
        """Return which capabilities hooks on blocks and patches rule out."""
        limits = {}
        if self.block_widths:
            limits[Capability.CHECKPOINTS_ACTIVATIONS] = "hidden uses hooks on the blocks"
        if self.mask_ratio is not None or self.block_widths:
            limits[Capability.COMPILES] = "mfd and hidden use hooks on the towers"
        return limits

    def checkpoint_activations(self) -> None:
        """Recompute the activations of every block in the backward pass."""
        self.model.set_grad_checkpointing(True)

    def saved_state(self) -> dict[str, Tensor]:
        """Return the state dict in open_clip's form: a scalar logit_scale, everything float32."""
        return open_clip_state(self)

    def load_saved_state(self, state: Mapping[str, Tensor]) -> None:
        """Load a state dict in open_clip's form."""
        self.model.load_state_dict({**state, "logit_scale": state["logit_scale"].reshape(1)})

    def encoder(self, name: str, pretrained: str, device: str) -> Encoder:
        """Return the two towers as an Encoder."""
        model = self.to(device).eval().model
        return Encoder(
            name=name,
            pretrained=pretrained,
            size=tuple(describe_view(self.preprocess)["size"]),
            view=self.picture.view,
            tokenize=self.tokenizer,
            encode_image=model.encode_image,
            encode_text=model.encode_text,
            device=device,
            tower=model.visual,
            mean=tuple(self.preprocess["mean"]),
            std=tuple(self.preprocess["std"]),
            scale=float(model.logit_scale.detach().exp()),
        )


def keep_patches(
    tokens: Float[Tensor, "n positions width"], kept: Int[Tensor, "n some"]
) -> Float[Tensor, "n fewer width"]:
    """Return the class token and the kept patches.

    Args:
        tokens: The class token and all patches, with position embeddings added.
        kept: The indices of the kept patches.
    """
    indices = kept[:, :, None].expand(-1, -1, tokens.shape[2])
    return torch.cat([tokens[:, :1], tokens[:, 1:].gather(1, indices)], 1)


def add_masked_output(student: Any, ratio: float) -> None:
    """Add the output `masked_image` to a student: the embedding of each picture with some patches left out.

    Args:
        student: The student.
        ratio: The share of patches that is left out.

    Raises:
        UserError: The share is not in [0, 1), or the student has no patches.
    """
    if not 0 <= ratio < 1:
        raise UserError(f"--set mask_ratio={ratio:g}: a share of the patches is expected, from 0 to below 1")
    visual = student.model.visual if isinstance(student, TwoTower) else None
    if visual is None or not hasattr(visual, "patch_dropout"):
        raise UserError(
            f"masking needs patches, which {type(visual or student).__name__} does not have: choose a "
            "model with open_clip's ViT, or --set mfd=0"
        )
    student.mask_ratio, student.mask_noise = ratio, visual.grid_size[0] * visual.grid_size[1]


def add_block_outputs(student: Any, names: Sequence[str]) -> None:
    """Add the outputs of blocks to a student, each as one vector per row like a teacher's `hidden`.

    Args:
        student: The student.
        names: Names such as `image_block_3`.

    Raises:
        UserError: The student has no blocks, or no block of that number.
    """
    if not isinstance(student, TwoTower):
        raise UserError(
            f"{type(student).__name__} has no blocks to compare: choose another model, or --set hidden=0"
        )
    towers = {"image": image_blocks(student.model.visual), "text": text_blocks(text_tower(student.model))}
    layers: dict[str, list[int]] = {"image": [], "text": []}
    for name in names:
        tower, _, number = name.split("_")
        layers[tower].append(int(number))
        if int(number) >= len(towers[tower]):
            raise UserError(
                f"--set hidden_{tower}: the student has no block {number}, only {len(towers[tower])} from 0"
            )
    student.taps = dataclasses.replace(
        EMBEDDINGS, image_layers=tuple(layers["image"]), text_layers=tuple(layers["text"])
    )
    height, width = describe_view(student.preprocess)["size"]
    batch = {"image": torch.zeros(1, 3, height, width), "text": student.tokenizer(["a"])}
    training = student.training
    with torch.no_grad():
        outputs = student.eval()({**batch, "mask_noise": torch.zeros(1, student.mask_noise)})
    student.train(training)
    student.block_widths = {name: outputs[name].shape[1] for name in names}


def open_clip_state(student: TwoTower) -> dict[str, Tensor]:
    """Return the state dict in open_clip's form: a scalar logit_scale, everything float32."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in student.model.state_dict().items()}
    state["logit_scale"] = state["logit_scale"].reshape(())
    return {
        name: tensor.to(torch.float32) if tensor.is_floating_point() else tensor
        for name, tensor in state.items()
    }
