"""THE phase-1 loop: decode | teacher | write, overlapped, resumable, shared by any number of processes.

Decoding runs in worker processes, the teacher here, writing in a thread. Batches never cross a block, so a resumed
build computes exactly what an undisturbed one does. Not for deciding what a teacher says: see `teachers/`.
"""

import contextlib
import dataclasses
import fcntl
import importlib.metadata
import itertools
import os
import signal
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from teachercache import store
from teachercache.names import UserError
from teachercache.runtime import Precision, keep_memory, rank, say, ticker, world_size
from teachercache.samples import BadSample, Manifest, clean_texts, read_image
from teachercache.spec import CacheMeta
from teachercache.teachers import Teacher


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a build did."""

    cache: store.Cache
    rows_written: int
    blocks_left: int  # in the hands of other builders
    quarantined: int


def build(teacher: Teacher, manifest: Manifest, out: Path, *, batch_size: int, workers: int, device: str,
          precision: Precision, block_rows: int | None = None) -> Summary:  # fmt: skip
    """Run the teacher over every block that is not done yet and that no other process writes."""
    meta = plan(teacher, manifest, precision, block_rows)
    cache = store.create(out, meta, manifest)
    meta = cache.meta  # block_rows are those that are there
    dtype = getattr(torch, precision.dtype)
    keep_memory()
    module = teacher.module.to(device, dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    rows = 0
    with claims(cache) as claim, ThreadPoolExecutor(1, "write") as writer:
        todo = [b for b in range(rank(), meta.num_blocks, world_size()) if b not in store.done_blocks(cache)]
        todo += [b for b in range(meta.num_blocks) if b % world_size() != rank() and world_size() > 1]
        loader = _loader(teacher, manifest, _batches(cache, todo, claim, batch_size), workers)
        left = sum(len(meta.block(b)) for b in todo if b % world_size() == rank())
        pending: Future | None = None
        with ticker(left, "rows", f"{meta.spec.name} on {meta.data}") as tick:
            for block, parts in itertools.groupby(loader, key=lambda batch: batch["rows"][0] // meta.block_rows):
                arrays, invalid = _forward_block(teacher, module, cache, block, parts, device, dtype, tick)
                if pending is not None:
                    pending.result()
                pending = writer.submit(store.write_block, cache, block, arrays, invalid)
                rows += len(meta.block(block))
        if pending is not None:
            pending.result()
    blocks_left = meta.num_blocks - len(store.done_blocks(cache))
    quarantined = 0 if blocks_left else len(store.finish(cache))
    return Summary(cache, rows, blocks_left, quarantined)


def plan(teacher: Teacher, manifest: Manifest, precision: Precision, block_rows: int | None = None) -> CacheMeta:
    """The CacheMeta of this teacher over this data."""
    has_images = any(manifest.column("image"))
    fields = tuple(
        field for field in teacher.spec.fields if (has_images if field.per == "image" else manifest.texts > 0)
    )
    if not fields:
        raise UserError(f"{manifest.data} has neither pictures nor texts for {teacher.spec.name}")
    versions = {name: importlib.metadata.version(name) for name in ("torch", "open_clip_torch", "zarr", "pillow")}
    return CacheMeta(
        spec=dataclasses.replace(teacher.spec, fields=fields),
        data=manifest.data,
        manifest=manifest.digest,
        rows=len(manifest),
        texts=manifest.texts,
        block_rows=block_rows or store.block_rows_for(fields, len(manifest), manifest.texts),
        precision=precision.dtype,
        versions=versions,
    )


# ----------------------------------------------------------------------------------------------------
# Which blocks are ours


@contextlib.contextmanager
def claims(cache: store.Cache) -> Iterator[Any]:
    """A function that takes a block for this process, or says no: the kernel frees it when we die."""
    descriptor = os.open(cache.path / store.LOCK, os.O_RDWR)

    def claim(block: int) -> bool:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, block)
        except OSError:
            return False
        return block not in store.done_blocks(cache)

    try:
        yield claim
    finally:
        os.close(descriptor)


def _batches(cache: store.Cache, todo: list[int], claim: Any, batch_size: int) -> Iterator[list[int]]:
    """Rows of one batch at a time, block by block, claiming each block when its turn comes."""
    for block in todo:
        if claim(block):
            rows = cache.meta.block(block)
            for start in range(rows.start, rows.stop, batch_size):
                yield list(range(start, min(start + batch_size, rows.stop)))


# ----------------------------------------------------------------------------------------------------
# Decode


class Rows(torch.utils.data.Dataset):
    """Batches of decoded rows; a row that cannot be used comes as zeros with its reason."""

    def __init__(self, manifest: Manifest, *, view: Any, size: tuple[int, int], tokenize: Any = None):
        self.manifest, self.view, self.size, self.tokenize = manifest, view, size, tokenize
        self.texts = manifest.texts if tokenize is not None else 0  # without a tokenizer: pictures alone
        self.has_images = any(manifest.column("image"))

    def __len__(self) -> int:
        return len(self.manifest)

    def __getitems__(self, rows: list[int]) -> dict[str, Any]:
        """Pictures [n, 3, H, W], token ids [n * texts, length], masks and reasons of these rows."""
        samples = [self.manifest.row(row) for row in rows]
        reasons: list[dict[str, Any]] = []
        batch: dict[str, Any] = {"rows": rows, "key": [s.key for s in samples], "reasons": reasons}
        valid = np.ones(len(rows), bool)
        if self.has_images:
            pictures = torch.zeros(len(rows), 3, *self.size)
            for i, sample in enumerate(samples):
                try:
                    if sample.problem:
                        raise BadSample(sample.problem)
                    if not sample.image:
                        raise BadSample("the row has no picture")
                    pictures[i] = self.view(read_image(self.manifest, sample))
                except BadSample as error:
                    valid[i] = False
                    reasons.append({"row": rows[i], "key": sample.key, "reason": str(error)})
            batch["image"] = pictures
        if self.texts:
            text_valid = np.zeros((len(rows), self.texts), bool)
            texts = [[""] * self.texts for _ in rows]
            for i, sample in enumerate(samples):
                for k, (text, usable) in enumerate(clean_texts(sample)):
                    texts[i][k], text_valid[i, k] = text, usable
                if sample.problem and not self.has_images:
                    text_valid[i] = False
                if not text_valid[i].any():
                    valid[i] = False
                    reason = sample.problem or "the row has no text that is not empty"
                    reasons.append({"row": rows[i], "key": sample.key, "reason": reason})
                else:
                    empty = [k for k, (_, usable) in enumerate(clean_texts(sample)) if not usable]
                    reasons += [{"row": rows[i], "key": sample.key, "text": k, "reason": "empty text"} for k in empty]
            batch["text"] = self.tokenize([text for row in texts for text in row])
            batch["text_valid"] = text_valid
        batch["valid"] = valid
        return batch


def rows_for(teacher: Teacher, manifest: Manifest) -> Rows:
    """Rows as the teacher sees them."""
    return Rows(manifest, view=teacher.view, size=tuple(teacher.spec.view["size"]), tokenize=teacher.tokenize)


def _loader(teacher: Teacher, manifest: Manifest, batches: Iterator[list[int]], workers: int) -> DataLoader:
    return DataLoader(
        rows_for(teacher, manifest),
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_as_it_is,
        prefetch_factor=2 if workers else None,
        worker_init_fn=ignore_interrupt,
    )


def ignore_interrupt(worker: int) -> None:
    """Ctrl-C reaches the whole process group: the builder ends its workers itself, without their tracebacks."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _as_it_is(batch: Any) -> Any:
    return batch


# ----------------------------------------------------------------------------------------------------
# Forward


def _forward_block(teacher: Teacher, module: torch.nn.Module, cache: store.Cache, block: int, parts: Any,
                   device: str, dtype: torch.dtype, tick: Any) -> tuple[dict[str, np.ndarray], list[dict]]:  # fmt: skip
    """All arrays of one block and its unusable rows."""
    collected: dict[str, list[np.ndarray]] = {name: [] for name in (*cache.fields, "key")}
    invalid: list[dict[str, Any]] = []
    for batch in parts:
        inputs = {}
        if "image" in batch:
            inputs["image"] = batch["image"].to(device, dtype, memory_format=torch.channels_last)
        if "text" in batch:
            inputs["text"] = batch["text"].to(device)
        with torch.inference_mode():
            outputs = teacher.encode(module, inputs)
        arrays = {name: tensor.float().cpu().numpy() for name, tensor in outputs.items()}
        _store_precision(arrays, batch, cache)
        invalid += sorted(batch["reasons"], key=lambda entry: (entry["row"], entry.get("text", -1)))
        arrays |= {name: batch[name] for name in ("valid", "text_valid") if name in cache.fields}
        arrays["key"] = np.array(batch["key"], dtype=np.dtypes.StringDType())
        for name, values in arrays.items():
            collected[name].append(values)
        tick.step(len(batch["rows"]))
    return {name: np.concatenate(parts) for name, parts in collected.items()}, invalid


def _store_precision(arrays: dict[str, np.ndarray], batch: dict[str, Any], cache: store.Cache) -> None:
    """Cast in place to the stored dtype; NaN quarantines a row or text, float16 overflow is an error naming the row."""
    rows = len(batch["rows"])
    for name, values in arrays.items():
        field = cache.fields[name]
        values = values.reshape(field.array_shape(rows, cache.meta.texts))
        usable = batch["text_valid" if field.per == "text" else "valid"]  # [rows] or [rows, texts]
        values[~usable] = 0
        inner = tuple(range(usable.ndim, values.ndim))
        for place in np.argwhere(~np.isfinite(values).all(axis=inner)).tolist():
            usable[tuple(place)] = False
            values[tuple(place)] = 0
            entry = {"row": batch["rows"][place[0]], "key": batch["key"][place[0]], "reason": f"{name} is not finite"}
            batch["reasons"].append(entry | ({"text": place[1]} if field.per == "text" else {}))
        limit = np.finfo(field.dtype).max
        for place in np.argwhere((np.abs(values) > limit).any(axis=inner)).tolist():
            key = batch["key"][place[0]]
            raise UserError(f"{name} of row '{key}' is above {limit:g} and does not fit into {field.dtype}")
        arrays[name] = values.astype(field.dtype)
    if "text_valid" in batch:
        batch["valid"] &= batch["text_valid"].any(1)


def announce(summary: Summary) -> None:
    """Say what the build did and what comes next."""
    cache = summary.cache
    if summary.blocks_left:
        say(f"{summary.blocks_left} blocks are in the hands of another builder; run the same command to check on them")
        return
    if summary.quarantined:
        say(f"{summary.quarantined} entries in {cache.path / 'quarantine.jsonl'} (rows or texts that cannot be used)")
    say(f"{cache.path} is complete: {cache.meta.rows:,} rows ({summary.rows_written:,} written now)")
