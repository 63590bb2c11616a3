"""Digest weights, parse `--weights`, and check whether the hub can be reached."""

import hashlib

import huggingface_hub
import torch
from torch import nn

from teachercache.core.errors import UserError


def digest_weights(module: nn.Module) -> str:
    """Return the sha256 over the names, shapes and bytes of the state dict."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def random_seed(weights: str) -> int | None:
    """Return the seed of `--weights random:SEED`, or None for other weights."""
    prefix, colon, seed = weights.partition(":")
    if prefix != "random" or not colon:
        return None
    if not seed.isdigit():
        raise UserError(f"--weights {weights}: write random:SEED, for example random:0")
    return int(seed)


def hub_answers() -> bool:
    """Return whether the hub can be reached, with one short request: its client would retry for a minute."""
    try:
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=5)
    except Exception:
        return False
    return True
