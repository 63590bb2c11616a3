"""Compute the fields of a CLIP: embeddings, patch tokens and hidden layers, recorded in one forward pass.

Supports open_clip's ViT, ModifiedResNet and timm image towers, its text tower and those of Hugging Face.
Hooks exist during one call only.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from teachercache.core.errors import UserError
from teachercache.teachers.clip.towers import (
    image_blocks,
    patches,
    picture_vector,
    text_blocks,
    text_tower,
    text_vector,
    tower_kind,
    without_padding,
)
from teachercache.teachers.clip.word_selection import DEFAULT, MAX_WORDS, WordSelection
from teachercache.teachers.hooks import Place, output_tensor, watch
from teachercache.teachers.teacher import CLIP_OUTPUTS, WORD_OUTPUTS


@dataclasses.dataclass(frozen=True)
class Taps:
    """What one pass records: embeddings, patch tokens, and blocks of either tower, counted from 0."""

    embeddings: bool = True
    patches: bool = False
    image_layers: tuple[int, ...] = ()
    text_layers: tuple[int, ...] = ()


EMBEDDINGS = Taps()


# ----------------------------------------------------------------------------------------------------
# Outputs


def parse_outputs(outputs: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Parse `("hidden:7+3", "embeddings")` to `{"embeddings": (), "hidden": (3, 7)}`; () for hidden is the
    last block.

    The number of `tokens` and `random_tokens` is how many words are kept.
    """
    requested = {}
    for output in outputs:
        kind, colon, numbers = output.partition(":")
        fields = numbers.split("+") if colon else []
        valid = kind in CLIP_OUTPUTS and (not colon or kind in ("hidden", *WORD_OUTPUTS))
        if not valid or not all(number.isdecimal() for number in fields):
            raise UserError(
                f"--outputs {output}: choose from {', '.join(CLIP_OUTPUTS)}; hidden takes layers, hidden:3+7, "
                "tokens a number, tokens:2"
            )
        if kind in requested:
            raise UserError(
                f"--outputs names {kind} twice: write it once, layers with + between them (hidden:3+7)"
            )
        requested[kind] = tuple(sorted({int(number) for number in fields}))
        if colon and kind in WORD_OUTPUTS:
            if len(fields) != 1 or not 1 <= int(fields[0]) <= MAX_WORDS:
                raise UserError(
                    f"--outputs {output}: write how many words are kept, 1 to {MAX_WORDS}, {kind}:2"
                )
            requested[kind] = () if requested[kind] == (DEFAULT,) else requested[kind]
    words = [kind for kind in WORD_OUTPUTS if kind in requested]
    if words and "embeddings" not in requested:
        raise UserError(
            f"--outputs {words[0]} goes with embeddings: write --outputs embeddings,{','.join(outputs)}"
        )
    return {kind: requested[kind] for kind in CLIP_OUTPUTS if kind in requested}


def join_outputs(requested: Mapping[str, tuple[int, ...]]) -> tuple[str, ...]:
    """Write parsed outputs in one canonical form, so that equal requests have equal metadata."""
    return tuple(
        f"{kind}:{'+'.join(map(str, layers))}" if layers else kind for kind, layers in requested.items()
    )


def plan_words(
    requested: Mapping[str, tuple[int, ...]], tokenize: Callable[[list[str]], Tensor]
) -> WordSelection | None:
    """Return the word selection of `tokens` and `random_tokens`, or None without them."""
    best, drawn = ((requested[kind] or (DEFAULT,))[0] if kind in requested else 0 for kind in WORD_OUTPUTS)
    return WordSelection(tokenize, num_best=best, num_drawn=drawn) if best or drawn else None


def plan_taps(name: str, module: Any, requested: Mapping[str, tuple[int, ...]]) -> Taps:
    """Return the taps for a module. A layer has to exist in one tower at least; the other tower then lacks
    the field.
    """
    image_layers: tuple[int, ...] = ()
    text_layers: tuple[int, ...] = ()
    if "patches" in requested and not tower_kind(module.visual):
        raise UserError(f"teacher {name} has no patches of a supported kind: leave them out of --outputs")
    if "hidden" in requested:
        depths = len(image_blocks(module.visual)), len(text_blocks(text_tower(module)))
        if not all(depths):
            raise UserError(
                f"teacher {name} has no layers of a supported kind: leave hidden out of --outputs"
            )
        missing = [layer for layer in requested["hidden"] if layer >= max(depths)]
        if missing:
            raise UserError(
                f"teacher {name} has no layer {missing[0]}: --outputs hidden:LAYER+LAYER takes 0 to "
                f"{depths[0] - 1} (picture tower) and 0 to {depths[1] - 1} (text tower)"
            )
        image_layers, text_layers = (
            tuple(layer for layer in requested["hidden"] or (depth - 1,) if layer < depth) for depth in depths
        )
    return Taps("embeddings" in requested, "patches" in requested, image_layers, text_layers)


# ----------------------------------------------------------------------------------------------------
# One pass


def picture_fields(
    module: Any, images: Float[Tensor, "rows 3 height width"], taps: Taps
) -> dict[str, Float[Tensor, "rows ..."]]:
    """Return `image_emb`, `patch_token`, `patch_emb` and `image_hidden_<layer>` of a batch, as `taps`
    requests.
    """
    if not (taps.embeddings or taps.patches or taps.image_layers):
        return {}
    if not (taps.patches or taps.image_layers):
        return {"image_emb": module.encode_image(images, normalize=False)}  # CoCa normalizes by default
    tower = module.visual
    kind = tower_kind(tower)
    places: dict[str, Place] = {
        f"image_hidden_{layer}": (image_blocks(tower)[layer], partial(picture_vector, tower))
        for layer in taps.image_layers
    }
    if taps.patches and kind != "timm":
        places["last"] = (tower.transformer if kind == "vit" else tower.layer4), output_tensor
    with watch(places) as recorded:
        if (
            taps.patches and kind == "timm"
        ):  # TimmModel.forward in two halves: no module outputs what lies between them
            recorded["last"] = tower.trunk.forward_features(images)
            embedding = tower.head(tower.trunk.forward_head(recorded["last"]))
        else:
            embedding = module.encode_image(images, normalize=False)
    fields = {"image_emb": embedding} if taps.embeddings else {}
    if taps.patches:
        fields |= patches(tower, recorded.pop("last"))
    return fields | recorded


def text_fields(
    module: Any, ids: Int[Tensor, "texts length"], taps: Taps
) -> dict[str, Float[Tensor, "texts dim"]]:
    """Return `text_emb` and `text_hidden_<layer>` of a batch, as `taps` requests."""
    if not (taps.embeddings or taps.text_layers):
        return {}
    tower = text_tower(module)
    ids = without_padding(tower, ids)
    places = {
        f"text_hidden_{layer}": (text_blocks(tower)[layer], partial(text_vector, tower, ids))
        for layer in taps.text_layers
    }
    with watch(places) as recorded:
        embedding = module.encode_text(ids, normalize=False)
    return {"text_emb": embedding, **recorded} if taps.embeddings else recorded
