"""From a manifest and caches to batches: step s of a run is a pure function of (seed, s), so any step can be resumed.

Every rank draws the same global batch and keeps its own rows. Not for choosing caches or rows (`caches`), nor for
losses, devices or gradients.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from student.ensemble import concat_teachers, named
from student.inputs.caches import Source, open_source, places, same_views
from student.inputs.order import Order
from teachercache.cache import store
from teachercache.core.errors import UserError
from teachercache.data.manifest import Manifest
from teachercache.data.pictures import read_image
from teachercache.data.sample import BadSample, Sample, clean_texts
from teachercache.data.views import replay_view

Draw = Callable[[np.random.Generator], dict[str, np.ndarray]]  # what a recipe draws for a row


class Look(NamedTuple):
    """How one model sees a picture: plain, or replayed from stored parameters; and how small it may be decoded."""

    view: Callable[[Any], torch.Tensor]
    replay: Callable[[Any, np.ndarray], torch.Tensor] | None
    at_least: int


class Batches(Dataset):
    """Item s is this rank's part of the batch of step s: pictures, token ids and the cached fields of its rows."""

    def __init__(
        self,
        manifest: Manifest,
        rows: np.ndarray,
        *,
        student: Any,
        cache: store.Cache | None,
        reads: tuple[str, ...],
        batch: int,
        steps: int,
        seed: int,
        live: Any = None,
        draw: Draw | None = None,
        views: store.Cache | None = None,
        more: Sequence[store.Cache] = (),
        ensemble: str = "average",
        rank: int = 0,
        world: int = 1,
    ):
        self.manifest, self.rows, self.inputs = manifest, rows, student.inputs
        self.tokenizer, self.num_chances = (
            getattr(student, "tokenizer", None),
            getattr(student, "num_chances", 0),
        )
        self.read_texts = getattr(student, "read_texts", None)  # rows, texts, a generator a row -> tensors
        self.batch, self.steps, self.seed, self.rank, self.world, self.draw = (
            batch,
            steps,
            seed,
            rank,
            world,
            draw,
        )
        block_rows = cache.meta.block_rows if cache else len(manifest)
        self.order = Order(rows, batch=batch, seed=seed, block_rows=block_rows)
        self.looks, self.live_tokenize = looks(student, live), getattr(live, "tokenize", None)
        self.num_views, self.view_params = 0, np.empty(0)
        views = cache if cache is not None else views
        if views is not None and views.meta.views:
            self._draw_views_of(views)
        caches = (cache, *more) if cache else ()
        same_views(caches, manifest, rows)
        fields = reads if live is None else ()
        self.sources: list[Source] = [open_source(cache, manifest, rows, fields) for cache in caches]
        self.concat = ensemble == "concat" and len(caches) > 1

    def _draw_views_of(self, cache: store.Cache) -> None:
        """Show pictures in the views that the teacher saw, decoded as small as it decoded them."""
        self.num_views, self.view_params = cache.meta.views, store.read_field(cache, "view_params")
        self.views_at, at_least = (
            places(cache, self.manifest, self.rows),
            cache.meta.spec.view.get("at_least", 0),
        )
        if any(look.replay is None for look in self.looks.values()):
            raise UserError(
                f"{cache.path} holds augmented views, this student cannot replay them: pass another --cache"
            )
        self.looks = {name: look._replace(at_least=at_least) for name, look in self.looks.items()}

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int | tuple[int, int, int]) -> dict[str, Any]:
        """The rows of this rank in a step; of (step, first, last) those of its rows alone, a micro-batch."""
        epoch, rows = self.order.share_of(step, self.rank, self.world)
        samples = [self.manifest.row(row) for row in rows.tolist()]
        chosen = {
            "text": [self._text(sample, row, epoch) for sample, row in zip(samples, rows, strict=True)],
            "image": [self._view(row, epoch) for row in rows.tolist()],
        }
        batch: dict[str, Any] = {}
        for k, source in enumerate(self.sources):
            batch |= {named(name, k): value for name, value in self._read(source, rows, chosen).items()}
        batch = concat_teachers(batch) if self.concat else batch
        if self.num_chances:
            batch["chance"] = torch.stack([self._chances(row, epoch) for row in rows.tolist()])
        if self.draw is not None:
            batch |= self._drawn(self.draw, rows, epoch)
        texts = [sample.texts[k] for sample, k in zip(samples, chosen["text"], strict=True)]
        if self.live_tokenize is not None:
            batch["teacher_text"] = self.live_tokenize(texts)
        if self.looks:
            shown = [
                self._show(sample, row, v)
                for sample, row, v in zip(samples, rows, chosen["image"], strict=True)
            ]
            batch |= {name: torch.stack([pictures[name] for pictures in shown]) for name in self.looks}
        if self.read_texts is not None:
            random = [np.random.default_rng([self.seed, epoch, row, 3]) for row in rows.tolist()]
            batch |= self.read_texts(samples, texts, random)
        elif "text" in self.inputs:
            batch["text"] = self.tokenizer(texts)
        return batch

    def _read(
        self, source: Source, rows: np.ndarray, chosen: dict[str, list[int]]
    ) -> dict[str, torch.Tensor]:
        """What one cache holds of some rows, and its constants."""
        found = {name: torch.tensor(value) for name, value in source.constants.items()}
        for name, values in source.fields.items():
            per, at = source.per[name], source.at[rows]
            one = per == "row" or (per == "image" and not self.num_views)
            found[name] = torch.from_numpy(
                values[at] if one else values[at, chosen["text" if per == "pair" else per]]
            ).float()
        return found

    def _chances(self, row: int, epoch: int) -> torch.Tensor:
        """Random numbers for a model that needs some per picture: the same on any number of ranks."""
        random = np.random.default_rng([self.seed, epoch, row, 1])
        return torch.from_numpy(random.random(self.num_chances, np.float32))

    def _drawn(self, draw: Draw, rows: np.ndarray, epoch: int) -> dict[str, torch.Tensor]:
        """What a recipe draws for each row, anew in every epoch: the same on any number of ranks, and resumed."""
        found = [draw(np.random.default_rng([self.seed, epoch, row, 2])) for row in rows.tolist()]
        return {name: torch.from_numpy(np.stack([one[name] for one in found])) for name in found[0]}

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
        return {
            name: look.replay(pictures[look.at_least], params)
            for name, look in self.looks.items()
            if look.replay
        }

    def _text(self, sample: Sample, row: int, epoch: int) -> int:
        """Which of a row's usable texts this epoch shows."""
        if self.sources:
            masks = [source.text_valid[source.at[row]] for source in self.sources]
            usable = np.flatnonzero(
                np.logical_and.reduce([mask[: min(map(len, masks))] for mask in masks])
            ).tolist()
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
        found["teacher_image"] = Look(
            live.view, replay_view(live.spec.view), live.spec.view.get("at_least", 0)
        )
    return found


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
