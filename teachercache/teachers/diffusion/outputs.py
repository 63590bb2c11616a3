"""The outputs of a diffusion teacher: text states, latents, features inside the UNet, scores of Eq. 1.

Scores and UNet features belong to a text with its image, the others to a text or an image alone. Each (t,
eps) is drawn once for all rows and texts, from a seed that the cache records.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from teachercache.cache.spec import Field
from teachercache.core.errors import UserError
from teachercache.teachers.diffusion.model import (
    PAIRS_AT_ONCE,
    Diffusion,
    add_noise,
    draw_noise,
    encode_latent,
    encode_states,
    latent_shape,
    pair_errors,
    predict_noise,
)
from teachercache.teachers.hooks import output_tensor, watch
from teachercache.teachers.teacher import DIFFUSION_OUTPUTS, Inputs

SAMPLES = re.compile(r"(?P<samples>\d+)|seed=(?P<seed>\d+)|t=(?P<first>\d+)-(?P<last>\d+)")
PLACE = re.compile(r"(?P<t>\d+)|seed=(?P<seed>\d+)|(?P<block>mid_block|(down|up)_blocks\.\d+|out)")
OUT = "out"  # the prediction of the UNet instead of a block


@dataclasses.dataclass(frozen=True)
class Scores:
    """How Eq. 1 is estimated: the number of draws, their seed, the first and the last timestep (-1: the
    last one).
    """

    samples: int = 10
    seed: int = 0
    first: int = 0
    last: int = -1  # the last one


@dataclasses.dataclass(frozen=True)
class Features:
    """The block of the UNet, the timestep and the seed of the noise of `unet_features`."""

    t: int = 100
    block: str = "mid_block"
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Plan:
    """The outputs to compute."""

    text_states: bool = False
    latents: bool = False
    unet_features: Features | None = None
    scores: Scores | None = None

    @property
    def has_pairs(self) -> bool:
        """Whether a field belongs to a text with its image."""
        return self.unet_features is not None or self.scores is not None


# ----------------------------------------------------------------------------------------------------
# Outputs


def parse_outputs(outputs: Sequence[str], timesteps: int) -> Plan:
    """Parse `("latents", "scores:16+seed=1+t=200-800", "unet_features:100+up_blocks.1")`.

    Raises:
        UserError: An output is wrong; the message contains the right form.
    """
    requested: dict[str, Any] = {}
    for output in outputs:
        kind, colon, rest = output.partition(":")
        if kind not in DIFFUSION_OUTPUTS or (colon and kind in ("text_states", "latents")):
            raise UserError(
                f"--outputs {output}: choose from {', '.join(DIFFUSION_OUTPUTS)}; scores takes how often, "
                "scores:16+seed=1, unet_features where, unet_features:100+mid_block"
            )
        if kind in requested:
            raise UserError(f"--outputs names {kind} twice: write it once")
        parts = rest.split("+") if colon else []
        if kind == "scores":
            requested[kind] = _scores(
                output, _read(output, parts, SAMPLES, "scores:16+seed=1+t=200-800"), timesteps
            )
        elif kind == "unet_features":
            values = _read(
                output,
                parts,
                PLACE,
                "unet_features:100+mid_block+seed=1, the block mid_block, down_blocks.0, up_blocks.1 or out",
            )
            requested[kind] = Features(**values)
            _check_timesteps(output, requested[kind].t, requested[kind].t, timesteps)
        else:
            requested[kind] = True
    return Plan(**requested)


def _read(output: str, parts: Sequence[str], pattern: re.Pattern, example: str) -> dict[str, Any]:
    """Return the named groups of all parts, with numbers as int."""
    values: dict[str, Any] = {}
    for part in parts:
        match = pattern.fullmatch(part)
        groups = {
            name: text for name, text in (match.groupdict() if match else {}).items() if text is not None
        }
        if not groups or groups.keys() & values.keys():
            raise UserError(f"--outputs {output}: write {example}")
        values |= {name: int(text) if text.isdecimal() else text for name, text in groups.items()}
    return values


def _scores(output: str, values: dict[str, Any], timesteps: int) -> Scores:
    scores = Scores(**{"last": timesteps - 1, **values})
    _check_timesteps(output, scores.first, scores.last, timesteps)
    if scores.samples < 1:
        raise UserError(f"--outputs {output}: at least one sample, scores:1")
    return scores


def _check_timesteps(output: str, first: int, last: int, timesteps: int) -> None:
    if not first <= last < timesteps:
        raise UserError(f"--outputs {output}: timesteps are 0 to {timesteps - 1}, the first before the last")


def join_outputs(plan: Plan, timesteps: int) -> tuple[str, ...]:
    """Write parsed outputs in one canonical form, so that equal requests have equal metadata."""
    written = [name for name in ("text_states", "latents") if getattr(plan, name)]
    if plan.unet_features is not None:
        place = plan.unet_features
        written.append(f"unet_features:{place.t}+{place.block}{_seed(place.seed)}")
    if plan.scores is not None:
        scores = plan.scores
        whole = (scores.first, scores.last) == (0, timesteps - 1)
        written.append(
            f"scores:{scores.samples}{_seed(scores.seed)}"
            + ("" if whole else f"+t={scores.first}-{scores.last}")
        )
    return tuple(written)


def _seed(seed: int) -> str:
    return f"+seed={seed}" if seed else ""


def constants(plan: Plan, module: Diffusion) -> dict[str, float]:
    """Return the numbers about the teacher and its draws that recipes need, as a cache stores them."""
    values: dict[str, float] = {
        "timesteps": len(module.alphas_cumprod),
        "latent_scaling": module.scaling,
        "v_prediction": module.prediction == "v_prediction",
    }
    if plan.unet_features is not None:
        values |= {"feature_t": plan.unet_features.t, "feature_seed": plan.unet_features.seed}
    if plan.scores is not None:
        values |= {f"score_{name}": value for name, value in dataclasses.asdict(plan.scores).items()}
    return {name: float(value) for name, value in values.items()}


def fields_of(plan: Plan, module: Diffusion, *, length: int, empty: Tensor) -> tuple[Field, ...]:
    """Return the fields of a plan; the UNet runs once if its features are requested."""
    shape = latent_shape(module)
    fields = []
    if plan.text_states:
        dim = int(module.text_encoder.config.hidden_size)
        fields.append(
            Field(
                "text_states", (length, dim), "text", "float16", "last hidden states, the input of the UNet"
            )
        )
    if plan.latents:
        doc = (
            "pixels in [-1, 1]"
            if module.vae is None
            else "mean of the VAE's posterior times its scaling factor"
        )
        fields.append(Field("latent", shape, "image", "float16", doc))
    if (place := plan.unet_features) is not None:
        example = unet_features(
            module, torch.zeros(1, *shape), encode_states(module, empty)[None], place=place
        )
        where = "the prediction of the UNet" if place.block == OUT else f"{place.block} of the UNet"
        doc = f"{where} at t={place.t}, one noise for all rows (seed {place.seed})"
        fields.append(Field("unet_feature", tuple(example.shape[2:]), "pair", "float16", doc))
    if (scores := plan.scores) is not None:
        drawn = (
            f"{scores.samples} draws of t from {scores.first} to {scores.last}, shared (seed {scores.seed})"
        )
        fields += [
            _score_field("diffusion_score", f"-d(x, c) of Eq. 1, {drawn}"),
            _score_field("diffusion_score_normalised", "d(x, no text) - d(x, c), the same draws"),
        ]
    return tuple(fields)


def _score_field(name: str, doc: str) -> Field:
    """A score of Eq. 1; `tc verify` compares it relative to the error itself."""
    return Field(name, (), "pair", "float32", doc, compare="relative_error", beside="diffusion_score")


def check_block(name: str, module: Diffusion, plan: Plan) -> None:
    """Raise UserError if the UNet lacks the block."""
    blocks = [
        f"{side}_blocks.{i}"
        for side in ("down", "up")
        for i in range(len(module.unet.get_submodule(f"{side}_blocks")))
    ]
    blocks += ["mid_block"] * (module.unet.mid_block is not None) + [OUT]
    if plan.unet_features is not None and plan.unet_features.block not in blocks:
        raise UserError(
            f"teacher {name} has no block {plan.unet_features.block}: choose from {', '.join(blocks)}"
        )


# ----------------------------------------------------------------------------------------------------
# One pass


def encode(
    module: Diffusion, inputs: Inputs, *, plan: Plan, empty: Tensor
) -> dict[str, Float[Tensor, "rows ..."]]:
    """Compute the fields of a plan.

    Args:
        module: The diffusion model.
        inputs: Distinct images and token ids, and the pairs among them.
        plan: What to compute.
        empty: The token ids [1, length] of the empty text.
    """
    paired = plan.has_pairs and "pair_image" in inputs
    fields = {}
    if "image" in inputs and (plan.latents or paired):
        fields["latent"] = encode_latent(module, inputs["image"])
    if "text" in inputs and (plan.text_states or paired):
        fields["text_states"] = encode_states(module, inputs["text"])
    pairs: dict[str, Tensor] = {}
    if paired:
        latents = fields["latent"][inputs["pair_image"][:, 0]]
        states = fields["text_states"][inputs["pair_text"]]
        pairs = pair_fields(module, latents, states, plan=plan, empty=empty)
    kept = {"latent": plan.latents, "text_states": plan.text_states}
    return {name: values for name, values in fields.items() if kept[name]} | pairs


def pair_fields(
    module: Diffusion,
    latents: Float[Tensor, "rows channels down across"],
    states: Float[Tensor, "rows texts length dim"],
    *,
    plan: Plan,
    empty: Tensor,
) -> dict[str, Float[Tensor, "pairs ..."]]:
    """Compute `unet_feature` and the scores of every text of every row; see `encode`."""
    fields = {}
    if plan.unet_features is not None:
        features = unet_features(module, latents, states, place=plan.unet_features)
        fields["unet_feature"] = features.flatten(0, 1)
    if (scores := plan.scores) is not None:
        t, noise = draw_noise(
            module, scores.samples, seed=scores.seed, t_range=(scores.first, scores.last + 1)
        )
        nothing = encode_states(module, empty.to(states.device))[None].expand(len(states), -1, -1, -1)
        errors = pair_errors(module, latents, torch.cat([states, nothing], 1), t, noise)
        fields["diffusion_score"] = -errors[:, :-1].flatten()
        fields["diffusion_score_normalised"] = (errors[:, -1:] - errors[:, :-1]).flatten()
    return fields


def unet_features(
    module: Diffusion,
    latents: Float[Tensor, "rows channels down across"],
    states: Float[Tensor, "rows texts length dim"],
    *,
    place: Features,
) -> Float[Tensor, "rows texts ..."]:
    """Return a block's output, or the predicted noise, at z_t of one (t, eps), for every text of every
    row.
    """
    rows, texts = states.shape[:2]
    t, noise = draw_noise(module, 1, seed=place.seed, t_range=(place.t, place.t + 1))
    owners = torch.arange(rows, device=latents.device).repeat_interleave(texts)
    kept = []
    for places, text_states in zip(
        owners.split(PAIRS_AT_ONCE), states.flatten(0, 1).split(PAIRS_AT_ONCE), strict=True
    ):
        timesteps = t.expand(len(places))
        noised = add_noise(
            module, latents[places].float(), noise.expand(len(places), *noise.shape[1:]), timesteps
        )
        if place.block == OUT:
            kept.append(predict_noise(module, noised, timesteps, text_states))
            continue
        with watch({"block": (module.unet.get_submodule(place.block), output_tensor)}) as seen:
            predict_noise(module, noised, timesteps, text_states)
        kept.append(seen["block"])
    return torch.cat(kept).unflatten(0, (rows, texts))
