"""From a manifest and a cache to batches: step s of a run is a pure function of (seed, s), so any step can be resumed.

Caches join by key; rows that cannot be used are skipped. Every rank draws the same global batch and keeps its own
rows. Not for losses, devices or gradients.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from student.distributed import from_all_ranks
from teachercache import store
from teachercache.names import UserError
from teachercache.paths import as_path
from teachercache.runtime import rank, say, ticker, world_size
from teachercache.samples import BadSample, Manifest, Sample, clean_texts, read_image
from teachercache.views import replay_view

WINDOW_BLOCKS = 64  # blocks whose rows are mixed; a mapped cache of up to 64 blocks is shuffled as a whole


def epoch_order(rows: np.ndarray, *, seed: int, epoch: int, block_rows: int, window: int = WINDOW_BLOCKS) -> np.ndarray:
    """Rows in this epoch's order: blocks shuffled, then rows shuffled within windows of `window` blocks.

    Reading stays within a window of files, so a cache larger than memory is read at disk speed; blocks mix freely.
    """
    random = np.random.default_rng([seed, epoch])
    shuffle = random.permutation(len(rows))  # first: up to `window` blocks it alone decides, whatever their size
    blocks = rows // block_rows
    place = random.permutation(int(blocks.max()) + 1)  # a block's place in this epoch
    group = place[blocks] // window
    return rows[shuffle[np.argsort(group[shuffle], kind="stable")]]


class Look(NamedTuple):
    """How one model sees a picture: plain, or replayed from stored parameters; and how small it may be decoded."""

    view: Callable[[Any], torch.Tensor]
    replay: Callable[[Any, np.ndarray], torch.Tensor] | None
    at_least: int


class Batches(Dataset):
    """Item s is this rank's part of the batch of step s: pictures, token ids and the cached fields of its rows."""

    def __init__(self, manifest: Manifest, rows: np.ndarray, *, student: Any, cache: store.Cache | None,
                 reads: tuple[str, ...], batch: int, steps: int, seed: int, live: Any = None,
                 views: store.Cache | None = None, rank: int = 0, world: int = 1):  # fmt: skip
        self.manifest, self.rows, self.inputs = manifest, rows, student.inputs
        self.tokenizer = getattr(student, "tokenizer", None)
        self.batch, self.steps, self.seed, self.rank, self.world = batch, steps, seed, rank, world
        self.block_rows = cache.meta.block_rows if cache else len(manifest)
        self.per_epoch = len(rows) // batch
        if not self.per_epoch:
            raise UserError(f"{len(rows)} usable training rows are fewer than --batch-size {batch}")
        self.fields: dict[str, np.ndarray] = {}
        self.per: dict[str, str] = {}
        self.constants: dict[str, float] = {}
        self.text_valid: np.ndarray | None = None
        self.order = (-1, rows)  # the epoch that was shuffled last
        self.looks, self.live_tokenize = looks(student, live), getattr(live, "tokenize", None)
        self.num_views, self.view_params = 0, np.empty(0)
        views = cache if cache is not None else views
        if views is not None and views.meta.views:
            self._draw_views_of(views)
        if cache is None:
            return
        self.at = self._places(cache)
        self.fields = {} if live is not None else {name: store.read_field(cache, name) for name in reads}
        self.per = {name: cache.fields[name].per for name in reads}
        self.constants = dict(cache.meta.spec.constants)
        self.text_valid = store.read_field(cache, "text_valid")

    def _places(self, cache: store.Cache) -> np.ndarray:
        """Manifest row -> cache row, -1 for rows that are not trained on."""
        at = np.full(len(self.manifest), -1)
        at[self.rows] = store.join(cache, self.manifest.table["key"].take(self.rows))
        return at

    def _draw_views_of(self, cache: store.Cache) -> None:
        """Show pictures in the views that the teacher saw, decoded as small as it decoded them."""
        self.num_views, self.view_params = cache.meta.views, store.read_field(cache, "view_params")
        self.views_at, at_least = self._places(cache), cache.meta.spec.view.get("at_least", 0)
        if any(look.replay is None for look in self.looks.values()):
            raise UserError(
                f"{cache.path} holds augmented views, this student cannot replay them: pass another --cache"
            )
        self.looks = {name: look._replace(at_least=at_least) for name, look in self.looks.items()}

    def __len__(self) -> int:
        return self.steps

    def rows_of(self, step: int) -> np.ndarray:
        """Manifest rows of the global batch of a step; the last incomplete batch of an epoch is dropped."""
        epoch, place = divmod(step, self.per_epoch)
        if self.order[0] != epoch:
            self.order = (epoch, epoch_order(self.rows, seed=self.seed, epoch=epoch, block_rows=self.block_rows))
        return self.order[1][place * self.batch : (place + 1) * self.batch]

    def __getitem__(self, step: int | tuple[int, int, int]) -> dict[str, Any]:
        """The rows of this rank in a step; of (step, first, last) those of its rows alone, a micro-batch."""
        share = self.batch // self.world
        step, first, last = step if isinstance(step, tuple) else (step, 0, share)
        rows = self.rows_of(step)[self.rank * share : (self.rank + 1) * share][first:last]
        samples, epoch = [self.manifest.row(row) for row in rows.tolist()], step // self.per_epoch
        chosen = {"text": [self._text(sample, row, epoch) for sample, row in zip(samples, rows, strict=True)],
                  "image": [self._view(row, epoch) for row in rows.tolist()]}  # fmt: skip
        batch: dict[str, Any] = {name: torch.tensor(value) for name, value in self.constants.items()}
        for name, values in self.fields.items():
            one = self.per[name] == "row" or (self.per[name] == "image" and not self.num_views)
            picked = values[self.at[rows]] if one else values[self.at[rows], chosen[self.per[name]]]
            batch[name] = torch.from_numpy(picked).float()
        texts = [sample.texts[k] for sample, k in zip(samples, chosen["text"], strict=True)]
        if self.live_tokenize is not None:
            batch["teacher_text"] = self.live_tokenize(texts)
        if self.looks:
            shown = [self._show(sample, row, v) for sample, row, v in zip(samples, rows, chosen["image"], strict=True)]
            batch |= {name: torch.stack([pictures[name] for pictures in shown]) for name in self.looks}
        if "text" in self.inputs:
            batch["text"] = self.tokenizer(texts)
        return batch

    def _view(self, row: int, epoch: int) -> int:
        """Which stored view this epoch shows: each once in as many epochs as there are views, rows out of step."""
        if not self.num_views:
            return 0
        first = int(np.random.default_rng([self.seed, row]).integers(self.num_views))
        return (first + epoch) % self.num_views

    def _show(self, sample: Sample, row: int, view: int) -> dict[str, torch.Tensor]:
        """One picture as the student sees it, and as a live teacher does."""
        sizes = {look.at_least for look in self.looks.values()}
        pictures = {size: self._picture(sample, size) for size in sizes}
        if not self.num_views:
            return {name: look.view(pictures[look.at_least]) for name, look in self.looks.items()}
        params = self.view_params[self.views_at[row], view]
        return {name: look.replay(pictures[look.at_least], params) for name, look in self.looks.items() if look.replay}

    def _text(self, sample: Sample, row: int, epoch: int) -> int:
        """Which of a row's usable texts this epoch shows."""
        if self.text_valid is not None:
            usable = np.flatnonzero(self.text_valid[self.at[row]]).tolist()
        else:
            usable = [k for k, (_, good) in enumerate(clean_texts(sample)) if good]
        if len(usable) == 1:
            return usable[0]
        return usable[np.random.default_rng([self.seed, epoch, row]).integers(len(usable))]

    def _picture(self, sample: Sample, at_least: int) -> Any:
        try:
            return read_image(self.manifest, sample, at_least=at_least)
        except BadSample as error:
            raise UserError(f"the picture of '{sample.key}' cannot be read any more: {error}") from error


def looks(student: Any, live: Any) -> dict[str, Look]:
    """How the student sees pictures, if it does, and how a live teacher does, by the batch's names."""
    found = {}
    if "image" in student.inputs:
        found["image"] = Look(student.view, getattr(student, "replay", None), getattr(student, "at_least", 0))
    if live is not None:
        found["teacher_image"] = Look(live.view, replay_view(live.spec.view), live.spec.view.get("at_least", 0))
    return found


def training_rows(manifest: Manifest, cache: store.Cache | None) -> np.ndarray:
    """Rows of the training split that have a text and that the cache holds and calls usable."""
    rows = manifest.rows_of_split("train")
    rows = rows[manifest.has_text()[rows]]
    if not len(rows):
        raise UserError(f"{manifest.data} has no training rows with a text")
    if cache is None:
        return rows
    keys = manifest.table["key"].take(rows)
    at = store.join(cache, keys)
    if (at < 0).any():
        raise UserError(
            f"{(at < 0).sum()} of {len(rows)} training rows of {manifest.data} are not in {cache.path}, the first is "
            f"'{keys[int(np.argmax(at < 0))]}': extend it with `{cache.command(data=manifest.data)}`"
        )
    _same_rows(manifest, cache, rows, at)
    return rows[np.asarray(store.read_field(cache, "valid"))[at]]


def _same_rows(manifest: Manifest, cache: store.Cache, rows: np.ndarray, at: np.ndarray) -> None:
    """Refuse a cache whose rows of the same keys had other texts or another picture file."""
    if manifest.digest == cache.meta.manifest:
        return
    then = store.cached_manifest(cache).table.take(at)
    now = manifest.table.take(rows)
    for name in ("texts", "size"):
        changed = [
            i for i, (a, b) in enumerate(zip(then[name].to_pylist(), now[name].to_pylist(), strict=True)) if a != b
        ]
        if changed:
            raise UserError(
                f"{len(changed)} rows of {manifest.data} changed since {cache.path} was built, the first is "
                f"'{now['key'][changed[0]].as_py()}': follow them with `{cache.command(data=manifest.data)} --prune`"
            )


def same_data_cache(folder: str, manifest: Manifest) -> store.Cache | None:
    """Any finished cache of exactly this data, one with augmented views first: it knows which rows can be read."""
    found = [cache for cache in caches_in(folder) if cache.meta.manifest == manifest.digest]
    whole = [cache for cache in found if len(store.done_blocks(cache)) == cache.meta.num_blocks]
    return next((cache for cache in whole if cache.meta.views), whole[0] if whole else None)


def caches_in(folder: str) -> list[store.Cache]:
    """The cache at `folder`, or those inside it in order of their names."""
    path = as_path(folder)
    if (path / "zarr.json").exists():
        return [store.open_cache(path)]
    return [store.open_cache(entry.parent) for entry in sorted(path.glob("*.zarr/zarr.json"))]


def readable_rows(manifest: Manifest, rows: np.ndarray) -> np.ndarray:
    """Rows whose picture can be read, by reading each once on one rank; the others are named with their reason."""
    kept, left_out = [], []
    mine = rows[rank() :: world_size()].tolist()
    with ticker(len(mine), "pictures", "checking pictures") as tick:
        for row in mine:
            sample = manifest.row(row)
            try:
                read_image(manifest, sample)
            except BadSample as error:
                left_out.append(f"left out {sample.key}: {error}")
            else:
                kept.append(row)
            tick.step(1)
    for line in [line for part in from_all_ranks(left_out) for line in part]:
        say(line)
    return np.array(sorted(row for part in from_all_ranks(kept) for row in part), int)


def loader(batches: Batches, *, start: int, workers: int, micro: int = 0) -> DataLoader:
    """Batches from step `start` on, or their micro-batches in turn, decoded ahead by `workers` processes."""
    share = batches.batch // batches.world
    cuts = range(0, share, micro or share)
    return DataLoader(
        batches,
        batch_size=None,
        sampler=((step, cut, cut + (micro or share)) for step in range(start, len(batches)) for cut in cuts),
        num_workers=workers,
        generator=torch.Generator(),  # its own: a resumed run must not draw from the global one at another time
        prefetch_factor=4 if workers else None,
    )


# ----------------------------------------------------------------------------------------------------
# Which cache


def find_cache(folder: str, reads: tuple[str, ...], build_hint: str) -> store.Cache:
    """The cache at `folder`, or the one inside it that holds what the recipe reads.

    Trained teachers come before random ones, and of one teacher the cache of augmented views before the plain one.
    """
    path = as_path(folder)
    there = caches_in(folder)
    found = [cache for cache in there if all(name in cache.fields for name in reads)]
    if there and there[0].path == path and not found:
        missing = [name for name in reads if name not in there[0].fields]
        raise UserError(f"{path} has no field {', '.join(missing)}: run `{build_hint}`")
    found = [cache for cache in found if not cache.meta.spec.weights.startswith("random:")] or found
    if len({cache.meta.spec.digest for cache in found}) == 1:
        found = [cache for cache in found if cache.meta.views] or found
    if not found:
        raise UserError(f"no cache with {', '.join(reads)} in {folder}: run `{build_hint}`")
    if len(found) > 1:
        names = ", ".join(str(cache.path) for cache in found)
        raise UserError(f"several caches fit, pass one as --cache: {names}")
    return store.open_complete(found[0].path)
