"""What a CLIP says on its way to the embedding: patch tokens and hidden layers, tapped in the one forward pass.

For open_clip's ViT, ModifiedResNet and timm picture towers, for its own and Hugging Face's text towers. Hooks live as
long as one call. Not for deciding how a field is stored or whether gradients flow.
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
)
from teachercache.teachers.clip.word_selection import DEFAULT, MAX_WORDS, WordSelection
from teachercache.teachers.hooks import Place, output_tensor, watch
from teachercache.teachers.teacher import CLIP_OUTPUTS, WORD_OUTPUTS


@dataclasses.dataclass(frozen=True)
class Taps:
    """What one pass keeps: embeddings, patch tokens, and which blocks of either tower, counted from 0."""

    embeddings: bool = True
    patches: bool = False
    image_layers: tuple[int, ...] = ()
    text_layers: tuple[int, ...] = ()


EMBEDDINGS = Taps()


# ----------------------------------------------------------------------------------------------------
# What was asked for


def parse_outputs(outputs: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """`("hidden:7+3", "embeddings")` as `{"embeddings": (), "hidden": (3, 7)}`; hidden's () is the last block.

    Of `tokens` and `random_tokens` the number is how many words are kept.
    """
    asked = {}
    for output in outputs:
        kind, colon, numbers = output.partition(":")
        parts = numbers.split("+") if colon else []
        known = kind in CLIP_OUTPUTS and (not colon or kind in ("hidden", *WORD_OUTPUTS))
        if not known or not all(part.isdecimal() for part in parts):
            raise UserError(
                f"--outputs {output}: choose from {', '.join(CLIP_OUTPUTS)}; hidden takes layers, hidden:3+7, "
                "tokens a number, tokens:2"
            )
        if kind in asked:
            raise UserError(
                f"--outputs names {kind} twice: write it once, layers with + between them (hidden:3+7)"
            )
        asked[kind] = tuple(sorted({int(part) for part in parts}))
        if colon and kind in WORD_OUTPUTS:
            if len(parts) != 1 or not 1 <= int(parts[0]) <= MAX_WORDS:
                raise UserError(
                    f"--outputs {output}: write how many words are kept, 1 to {MAX_WORDS}, {kind}:2"
                )
            asked[kind] = () if asked[kind] == (DEFAULT,) else asked[kind]
    words = [kind for kind in WORD_OUTPUTS if kind in asked]
    if words and "embeddings" not in asked:
        raise UserError(
            f"--outputs {words[0]} goes with embeddings: write --outputs embeddings,{','.join(outputs)}"
        )
    return {kind: asked[kind] for kind in CLIP_OUTPUTS if kind in asked}


def join_outputs(asked: Mapping[str, tuple[int, ...]]) -> tuple[str, ...]:
    """What `parse_outputs` read, written in the one way: equal requests are equal in a cache's metadata."""
    return tuple(f"{kind}:{'+'.join(map(str, layers))}" if layers else kind for kind, layers in asked.items())


def plan_words(
    asked: Mapping[str, tuple[int, ...]], tokenize: Callable[[list[str]], Tensor]
) -> WordSelection | None:
    """Return the word selection of `tokens` and `random_tokens`, or None without them."""
    best, drawn = ((asked[kind] or (DEFAULT,))[0] if kind in asked else 0 for kind in WORD_OUTPUTS)
    return WordSelection(tokenize, num_best=best, num_drawn=drawn) if best or drawn else None


def plan_taps(name: str, module: Any, asked: Mapping[str, tuple[int, ...]]) -> Taps:
    """The taps of this module. A layer has to exist in one tower at least; the other's fields then lack it."""
    image_layers: tuple[int, ...] = ()
    text_layers: tuple[int, ...] = ()
    if "patches" in asked and not tower_kind(module.visual):
        raise UserError(f"teacher {name} has no patches that are known here: leave them out of --outputs")
    if "hidden" in asked:
        depths = len(image_blocks(module.visual)), len(text_blocks(text_tower(module)))
        if not all(depths):
            raise UserError(
                f"teacher {name} has no layers that are known here: leave hidden out of --outputs"
            )
        missing = [layer for layer in asked["hidden"] if layer >= max(depths)]
        if missing:
            raise UserError(
                f"teacher {name} has no layer {missing[0]}: --outputs hidden:LAYER+LAYER takes 0 to "
                f"{depths[0] - 1} (picture tower) and 0 to {depths[1] - 1} (text tower)"
            )
        image_layers, text_layers = (
            tuple(layer for layer in asked["hidden"] or (depth - 1,) if layer < depth) for depth in depths
        )
    return Taps("embeddings" in asked, "patches" in asked, image_layers, text_layers)


# ----------------------------------------------------------------------------------------------------
# One pass


def picture_fields(
    module: Any, images: Float[Tensor, "rows 3 height width"], taps: Taps
) -> dict[str, Float[Tensor, "rows ..."]]:
    """`image_emb`, `patch_token`, `patch_emb` and `image_hidden_<layer>` of a batch, those that `taps` names."""
    if not (taps.embeddings or taps.patches or taps.image_layers):
        return {}
    if not (taps.patches or taps.image_layers):
        return {"image_emb": module.encode_image(images, normalize=False)}  # CoCa would normalise
    tower = module.visual
    kind = tower_kind(tower)
    places: dict[str, Place] = {
        f"image_hidden_{layer}": (image_blocks(tower)[layer], partial(picture_vector, tower))
        for layer in taps.image_layers
    }
    if taps.patches and kind != "timm":
        places["last"] = (tower.transformer if kind == "vit" else tower.layer4), output_tensor
    with watch(places) as found:
        if taps.patches and kind == "timm":  # TimmModel.forward in two halves: no module ends where they meet
            found["last"] = tower.trunk.forward_features(images)
            embedding = tower.head(tower.trunk.forward_head(found["last"]))
        else:
            embedding = module.encode_image(images, normalize=False)
    fields = {"image_emb": embedding} if taps.embeddings else {}
    if taps.patches:
        fields |= patches(tower, found.pop("last"))
    return fields | found


def text_fields(
    module: Any, ids: Int[Tensor, "texts length"], taps: Taps
) -> dict[str, Float[Tensor, "texts dim"]]:
    """`text_emb` and `text_hidden_<layer>` of a batch, those that `taps` names."""
    if not (taps.embeddings or taps.text_layers):
        return {}
    tower = text_tower(module)
    places = {
        f"text_hidden_{layer}": (text_blocks(tower)[layer], partial(text_vector, tower, ids))
        for layer in taps.text_layers
    }
    with watch(places) as found:
        embedding = module.encode_text(ids, normalize=False)
    return {"text_emb": embedding, **found} if taps.embeddings else found
