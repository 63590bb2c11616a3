"""A cache and its teacher together: check rows against it, search by a new text or picture. Not for building."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from teachercache import index, store
from teachercache.build import rows_for
from teachercache.names import UserError
from teachercache.readers import read_manifest
from teachercache.samples import BadSample, decode_image, digest_rows, load_manifest
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


def search_cache(path: Path, *, text: str | None, image: Path | None, top: int) -> list[dict[str, Any]]:
    """The rows whose pictures (texts, where it has no pictures) are nearest to a text or to a picture, best first."""
    cache = store.open_complete(path)
    field = "image_emb" if "image_emb" in cache.fields else "text_emb"
    index.check_index(cache, field)
    teacher = load_teacher(cache)
    with torch.inference_mode():
        if image is not None:
            try:
                picture = decode_image(image.read_bytes())
            except BadSample as error:
                raise UserError(f"--image {image}: {error}") from error
            inputs = {"image": teacher.view(picture)[None]}
        else:
            inputs = {"text": teacher.tokenize([text or ""])}
        query = teacher.encode(teacher.module, inputs)["text_emb" if image is None else "image_emb"]
    if query.shape[1] != cache.fields[field].shape[0]:
        raise UserError(f"{cache.meta.spec.name} has texts and pictures in different spaces: search with --image FILE")
    manifest = load_manifest(cache.path / "manifest.parquet")
    results = []
    for number, score in index.search(cache, query[0].float().numpy(), field=field, top=top):
        row, text_number = (number, None) if field == "image_emb" else divmod(number, cache.meta.texts)
        sample = manifest.row(row)
        where = str(manifest.root / sample.image) if sample.image else ""
        texts = list(sample.texts) if text_number is None else [sample.texts[text_number]]
        results.append({"key": sample.key, "score": round(score, 6), "image": where, "texts": texts})
    return results
