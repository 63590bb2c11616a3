"""Locate blocks, patches and poolings in the towers of open_clip.

Images: VisionTransformer, ModifiedResNet, timm. Texts: open_clip's transformer, encoders of Hugging Face.
`layers.py` runs the towers.
"""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from teachercache.teachers.hooks import output_tensor


def image_tower(module: nn.Module) -> nn.Module | None:
    """Return the image tower of an open_clip model, or None for another module."""
    return dict(module.named_children()).get("visual")


# ----------------------------------------------------------------------------------------------------
# Patches


def patches(tower: Any, last: Float[Tensor, "rows ..."]) -> dict[str, Tensor]:
    """Return `patch_token` and, if the tower projects patches, `patch_emb`, from its last tokens or
    feature map.
    """
    of_kind = {"vit": _vit_patches, "resnet": _resnet_patches, "timm": _timm_patches}
    return of_kind[tower_kind(tower)](tower, last)


def _vit_patches(tower: Any, last: Float[Tensor, "rows positions width"]) -> dict[str, Tensor]:
    """Treat every patch as the class token: final LayerNorm, projection."""
    tokens = last[:, 1:]
    if not _projects(tower):
        return {"patch_token": tokens}
    tokens = tower.ln_post(tokens)
    return {"patch_token": tokens, "patch_emb": tokens if tower.proj is None else tokens @ tower.proj}


def _resnet_patches(tower: Any, last: Float[Tensor, "rows width down across"]) -> dict[str, Tensor]:
    """Return the last feature map by position, before and after the attention pool."""
    tokens = last.flatten(2).transpose(1, 2)
    return {"patch_token": tokens, "patch_emb": pool_positions(tower.attnpool, tokens)[:, 1:]}


def pool_positions(
    pool: Any, tokens: Float[Tensor, "rows positions width"]
) -> Float[Tensor, "rows queries dim"]:
    """Apply ModifiedResNet's attention pool with every position as a query, their mean first: positions + 1
    outputs.

    CLIP keeps the first one, image_emb; VLKD's V = [v_cls, v_1 .. v_n] (section 3.2) is all of them.
    """
    tokens = torch.cat([tokens.mean(1, keepdim=True), tokens], 1) + pool.positional_embedding.to(tokens.dtype)
    query, key, value = (
        projection(tokens).unflatten(2, (pool.num_heads, -1)).transpose(1, 2)  # [rows, heads, queries, width]
        for projection in (pool.q_proj, pool.k_proj, pool.v_proj)
    )
    return pool.c_proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


def _timm_patches(tower: Any, last: Float[Tensor, "rows ..."]) -> dict[str, Tensor]:
    """Return the last features by position, and each one passed through pooling and head as if it were the
    whole image.
    """
    trunk = tower.trunk
    prefix = getattr(trunk, "num_prefix_tokens", 0) if last.ndim == 3 else 0
    tokens = _positions(trunk, last)[:, prefix:]
    if not _projects(tower):
        return {"patch_token": tokens}
    each = tokens.flatten(0, 1)  # [rows * patches, width]
    if last.ndim == 3:
        each = each[:, None].expand(-1, prefix + 1, -1)  # also in place of the class token
    else:
        each = each[:, None, None] if _channels_last(trunk) else each[..., None, None]
    projected = tower.head(trunk.forward_head(each))
    return {"patch_token": tokens, "patch_emb": projected.unflatten(0, tokens.shape[:2])}


def _projects(tower: Any) -> bool:
    """Return whether patches can be projected like the pooled token: not if a learned query pools by
    attention.
    """
    if tower_kind(tower) == "timm":
        return getattr(tower.trunk, "attn_pool", None) is None and not hasattr(tower.head, "pool")
    return tower_kind(tower) == "resnet" or tower.attn_pool is None


# ----------------------------------------------------------------------------------------------------
# Hidden layers: one vector of the output of a block, pooled as the tower pools the last one


def picture_vector(tower: Any, output: Any) -> Float[Tensor, "rows width"]:
    """Return the class token if the tower ends on it, otherwise the mean over patches or positions."""
    trunk = getattr(tower, "trunk", tower)
    last = output_tensor(output)
    tokens = _positions(trunk, last)
    if _ends_on_class_token(tower):
        return tokens[:, 0]
    prefix = (
        1 if tower_kind(tower) == "vit" else getattr(trunk, "num_prefix_tokens", 0) if last.ndim == 3 else 0
    )
    return tokens[:, prefix:].mean(1)


def text_vector(tower: Any, ids: Int[Tensor, "texts length"], output: Any) -> Float[Tensor, "texts width"]:
    """Return the token that the embedding is read from (open_clip's text_global_pool), or the output of a
    Hugging Face pooler.
    """
    tokens = output_tensor(output)  # [texts, positions, width]
    pooling = _text_pooling(tower)
    if pooling == "pooler":
        return tower.pooler(
            SimpleNamespace(last_hidden_state=tokens), (ids != tower.config.pad_token_id).long()
        )
    if pooling == "argmax":
        place = ids.argmax(1)  # EOT has the highest id
    elif pooling == "eos":
        place = ids.eq(getattr(tower, "text_eos_id", None) or tower.eos_id).int().argmax(1)
    else:
        place = torch.full_like(ids[:, 0], 0 if pooling == "first" else tokens.shape[1] - 1)
    return tokens[torch.arange(len(tokens), device=tokens.device), place]


# ----------------------------------------------------------------------------------------------------
# Kinds of towers


def tower_kind(tower: Any) -> str:
    """Return `timm`, `resnet`, `vit`, or an empty string for an unsupported tower."""
    if hasattr(tower, "trunk"):
        return "timm"
    if hasattr(tower, "attnpool") and hasattr(tower, "layer4"):
        return "resnet"
    return "vit" if hasattr(tower, "class_embedding") and hasattr(tower, "transformer") else ""


def image_blocks(tower: Any) -> Sequence[nn.Module]:
    """Return transformer blocks, or the stages of a convolutional tower, first to last; [] for an
    unsupported tower.
    """
    trunk = getattr(tower, "trunk", tower)
    found = [getattr(getattr(trunk, "transformer", None), "resblocks", None)]
    found += [getattr(trunk, name, None) for name in ("blocks", "stages", "layers")]
    found += [[getattr(trunk, f"layer{i}") for i in range(1, 5)] if hasattr(trunk, "layer4") else None]
    return next(
        (list(blocks) for blocks in found if isinstance(blocks, list | nn.ModuleList | nn.Sequential)), []
    )


def text_tower(module: Any) -> Any:
    """Return the text tower; open_clip's CLIP is its own."""
    return getattr(module, "text", module)


def without_padding(tower: Any, ids: Int[Tensor, "texts length"]) -> Int[Tensor, "texts shorter"]:
    """Cut the positions at the end that only have padding: a Hugging Face tower masks padding, so they change nothing.

    Captions of ten words in a context of 32 take less than half of the time.
    """
    if _text_pooling(tower) != "pooler":
        return ids  # a causal tower may read its last position
    used = (ids != tower.config.pad_token_id).any(0).nonzero()
    return ids[:, : int(used[-1]) + 1] if len(used) else ids


def text_blocks(tower: Any) -> Sequence[nn.Module]:
    """Return the transformer blocks of open_clip's or Hugging Face's text tower; [] for an unsupported
    tower.
    """
    transformer = getattr(tower, "transformer", None)
    encoder = getattr(transformer, "encoder", transformer)
    candidates = [getattr(encoder, name, None) for name in ("resblocks", "layer", "layers", "block")]
    return next((list(blocks) for blocks in candidates if isinstance(blocks, nn.ModuleList)), [])


def _ends_on_class_token(tower: Any) -> bool:
    if tower_kind(tower) == "timm":
        return getattr(tower.trunk, "global_pool", None) == "token"
    return tower_kind(tower) == "vit" and tower.attn_pool is None and tower.pool_type == "tok"


def _text_pooling(tower: Any) -> str:
    """Return `pooler` (Hugging Face), or open_clip's argmax, eos, first, last."""
    if hasattr(tower, "pooler"):
        return "pooler"
    if getattr(tower, "cls_emb", None) is not None:
        return "last"  # CoCa appends a class token for any pool_type
    return tower.text_pool_type if hasattr(tower, "text_pool_type") else tower.pool_type


def _channels_last(trunk: Any) -> bool:
    return getattr(trunk, "output_fmt", "NCHW") == "NHWC"


def _positions(trunk: Any, output: Float[Tensor, "rows ..."]) -> Float[Tensor, "rows positions width"]:
    """Return tokens unchanged, and a feature map row by row."""
    if output.ndim == 3:
        return output
    return output.flatten(1, 2) if _channels_last(trunk) else output.flatten(2).transpose(1, 2)


# ----------------------------------------------------------------------------------------------------
# Descriptions


def describe(module: Any, field: str) -> str:
    """Return the `doc` of a field of this module."""
    if field in ("image_emb", "text_emb"):
        return f"{field.removesuffix('_emb')} embedding, not normalized"
    if field.startswith("patch"):
        token, emb = _describe_patches(module.visual)
        return f"patches row by row, no class token: {token if field == 'patch_token' else emb}"
    if field.startswith("image_hidden"):
        pooled = "class token" if _ends_on_class_token(module.visual) else "mean over patches"
    else:
        tower = text_tower(module)
        words = {"argmax": "EOT token", "eos": "EOS token", "first": "first token", "last": "last token"}
        pooling = _text_pooling(tower)
        pooled = words.get(pooling) or f"{type(tower.pooler).__name__} over tokens"
    return f"{pooled} after block {field.rpartition('_')[2]}, counted from 0, before the final norm"


def _describe_patches(tower: Any) -> tuple[str, str]:
    """Return where `patch_token` is taken, and how `patch_emb` is computed from it."""
    if tower_kind(tower) == "resnet":
        return "last feature map", "attention pool with each position as the query, in the space of image_emb"
    if tower_kind(tower) == "timm":
        return (
            "last features of timm's forward_features",
            "pooling and head of each alone, in the space of image_emb",
        )
    if not _projects(tower):
        return "tokens of the last block, before the attentional pooler", ""
    return (
        "tokens after the final LayerNorm, before the projection",
        "patch_token after the projection of image_emb",
    )
