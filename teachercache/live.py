"""A cache and its teacher together: load it, check rows against it. Not for building."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from teachercache import store
from teachercache.build import rows_for
from teachercache.names import UserError
from teachercache.readers import read_manifest
from teachercache.samples import digest_rows, load_manifest
from teachercache.teachers import Teacher, load

BAR = 0.999  # cosine of a float16 row to the live teacher


def load_teacher(cache: store.Cache) -> Teacher:
    """The teacher that built a cache; UserError where its weights have changed since."""
    spec = cache.meta.spec
    teacher = load(spec.name, weights=spec.weights, outputs=spec.outputs)
    if teacher.spec.digest != spec.digest:
        raise UserError(
            f"{cache.path} was built by other weights of {spec.name} than there are now: "
            f"remove it and run `{cache.command()}`"
        )
    return teacher


def verify_cache(path: Path, *, samples: int) -> dict[str, Any]:
    """Damaged blocks (whose done records are removed) and the cosine of some rows to the live teacher."""
    cache = store.open_cache(path)
    damaged = store.damaged_blocks(cache)
    if digest_rows(load_manifest(cache.path / "manifest.parquet").table) != cache.meta.manifest:
        raise UserError(f"{path}/manifest.parquet is damaged: remove {path} and run `{cache.command()}`")
    for block in damaged:
        store.forget_block(cache, block)
    report: dict[str, Any] = {"damaged": damaged, "cosine": {}, "command": cache.command(), "ok": not damaged}
    if damaged or not samples:
        return report
    cosines = _live_cosines(store.open_complete(path), samples)
    report["cosine"] = {name: {"min": float(c.min()), "mean": float(c.mean())} for name, c in cosines.items()}
    report["ok"] = all(values["min"] >= BAR for values in report["cosine"].values())
    return report


def _live_cosines(cache: store.Cache, samples: int) -> dict[str, np.ndarray]:
    """Cosine of stored to recomputed rows, over evenly spread usable rows."""
    manifest = read_manifest(cache.meta.data, limit=cache.meta.rows)
    if manifest.digest != cache.meta.manifest:
        raise UserError(
            f"{manifest.data} is not the data of {cache.path} any more: remove it and run `{cache.command()}`"
        )
    teacher = load_teacher(cache)
    usable = np.flatnonzero(store.read_field(cache, "valid"))
    if not len(usable):
        raise UserError(f"no usable row in {cache.path}: see {cache.path / 'quarantine.jsonl'}")
    rows = usable[np.linspace(0, len(usable) - 1, min(samples, len(usable))).round().astype(int)]
    batch = rows_for(teacher, manifest).__getitems__(rows.tolist())
    inputs: dict[str, torch.Tensor] = {name: batch[name] for name in ("image", "text") if name in batch}
    with torch.inference_mode():
        outputs = {name: tensor.float().numpy() for name, tensor in teacher.encode(teacher.module, inputs).items()}
    cosines = {}
    for name, live in outputs.items():
        field = cache.fields[name]
        live = live.reshape(field.array_shape(len(rows), cache.meta.texts))
        stored = store.read_field(cache, name)[rows].astype(np.float32)
        if field.per == "text":
            live, stored = live[batch["text_valid"]], stored[batch["text_valid"]]
        product = (live * stored).sum(-1)
        cosines[name] = product / (np.linalg.norm(live, axis=-1) * np.linalg.norm(stored, axis=-1))
    return cosines
