"""Batches of (picture, text) pairs.

The batch of a step is a function of the seed and the step alone, so that any step can be replayed. Every rank
draws the same global batch and keeps its own rows.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from student.contract import PictureView, RowInputs
from student.ensemble import concat_teachers, named
from student.inputs.caches import Source, open_source, places, same_views
from student.inputs.order import MicroBatch, Order, StepPlan
from student.recipe import Noise
from student.streams import stream
from teachercache.cache import store
from teachercache.core.errors import UserError, calling, name_of
from teachercache.data.manifest import Manifest
from teachercache.data.pictures import read_image
from teachercache.data.sample import BadSample, Sample, clean_texts
from teachercache.data.views import check_view, replay_view
from teachercache.teachers.teacher import Teacher

KEPT_BYTES = 128 * 2**20  # preprocessed pictures that a process keeps, if those of all rows fit


@dataclasses.dataclass(frozen=True)
class TeacherFields:
    """The teachers' part of a batch of pairs.

    Args:
        caches: One cache per teacher.
        fields: Names of the fields; each is read from every cache that has it.
        ensemble: "concat" joins several teachers into one; otherwise fields of teacher k are called `name@k`.
        views: A cache whose stored augmented views are applied to the pictures if `caches` is empty; None for
            unaugmented pictures.
        live: A teacher that runs in the training process and replaces the cached fields.
    """

    caches: tuple[store.Cache, ...] = ()
    fields: tuple[str, ...] = ()
    ensemble: str = ""
    views: store.Cache | None = None
    live: Teacher | None = None


class PairBatches(Dataset[dict[str, Tensor]]):
    """Item s is this rank's share of the batch of step s: pictures, token ids and cached fields.

    Args:
        manifest: All rows of the data.
        rows: Indices of the training rows.
        inputs: The inputs of the student.
        plan: Steps and ranks.
        teachers: Caches and fields; None for a recipe without teacher.
        noise: Functions that draw the recipe's random arrays per row, by name.
    """

    def __init__(
        self,
        manifest: Manifest,
        rows: np.ndarray,
        inputs: RowInputs,
        plan: StepPlan,
        *,
        teachers: TeacherFields | None = None,
        noise: Mapping[str, Noise] | None = None,
    ):
        teachers = teachers or TeacherFields()
        self.manifest, self.rows, self.inputs, self.plan = manifest, rows, inputs, plan
        self.live_tokenize = teachers.live.tokenize if teachers.live is not None else None
        self.noise = dict(noise or {})
        caches = teachers.caches
        block_rows = caches[0].meta.block_rows if caches else len(manifest)
        self.order = Order(rows, batch=plan.batch, seed=plan.seed, block_rows=block_rows)
        self.pictures = picture_views(inputs, teachers.live)
        self.num_views, self.view_params, self.views_at = 0, np.empty(0), np.empty(0, int)
        self.kept: dict[tuple[int, int], dict[str, Tensor]] = {}
        views = caches[0] if caches else teachers.views
        if views is not None and views.meta.views:
            self._show_views_of(views)
        same_views(caches, manifest, rows)
        self.sources: list[Source] = []
        for cache in caches:
            fields = tuple(name for name in teachers.fields if name in cache.fields and not teachers.live)
            self.sources.append(open_source(cache, manifest, rows, fields))
        self.is_ensemble = bool(teachers.ensemble) and len(caches) > 1
        self.concat = self.is_ensemble and teachers.ensemble == "concat"

    def _show_views_of(self, cache: store.Cache) -> None:
        """Apply the augmented views of a cache to the pictures, decoded at the size that its teacher used."""
        self.num_views, self.view_params = cache.meta.views, store.read_field(cache, "view_params")
        self.views_at = places(cache, self.manifest, self.rows)
        if any(picture.replay is None for picture in self.pictures.values()):
            raise UserError(
                f"{cache.path} holds augmented views; this student cannot replay them: pass another --cache"
            )
        at_least = cache.meta.spec.view.get("at_least", 0)
        self.pictures = {
            name: dataclasses.replace(picture, at_least=at_least) for name, picture in self.pictures.items()
        }

    def __len__(self) -> int:
        return self.plan.steps

    def __getitem__(self, item: int | MicroBatch) -> dict[str, Tensor]:
        """Return the batch of this rank in a step, or one micro-batch of it."""
        step, share = self.plan.cut(item)
        epoch, rows = self.order.epoch_of(step), self.order.rows_of(step)[share]
        samples = [self.manifest.row(row) for row in rows.tolist()]
        # Indices of the text and the view that each row shows in this epoch; pair fields follow the text
        copies = {
            "text": [self._text(sample, row, epoch) for sample, row in zip(samples, rows, strict=True)],
            "image": [self._view(row, epoch) for row in rows.tolist()],
        }
        copies["pair"] = copies["text"]
        batch: dict[str, Tensor] = {}
        for k, source in enumerate(self.sources):
            fields = self._read(source, rows, copies)
            batch |= {named(name, k): value for name, value in fields.items()} if self.is_ensemble else fields
        batch = concat_teachers(batch) if self.concat else batch
        if self.inputs.mask_noise:
            batch["mask_noise"] = torch.stack([self._mask_noise(row, epoch) for row in rows.tolist()])
        if self.noise:
            batch |= self._sample_noise(rows, epoch)
        texts = [sample.texts[k] for sample, k in zip(samples, copies["text"], strict=True)]
        if self.live_tokenize is not None:
            batch["teacher_text"] = self.live_tokenize(texts)
        if self.pictures:
            shown = [
                self._show(sample, row, view)
                for sample, row, view in zip(samples, rows, copies["image"], strict=True)
            ]
            batch |= {name: torch.stack([pictures[name] for pictures in shown]) for name in self.pictures}
        return batch | self._read_texts(samples, texts, rows, epoch)

    def _read(self, source: Source, rows: np.ndarray, copies: Mapping[str, list[int]]) -> dict[str, Tensor]:
        """Return the fields of some rows from one cache as float32, and its constants as 0-dim tensors."""
        fields = {name: torch.tensor(value) for name, value in source.constants.items()}
        for name, values in source.fields.items():
            per, cache_rows = source.per[name], source.at[rows]
            single = per == "row" or (per == "image" and not self.num_views)
            chosen = values[cache_rows] if single else values[cache_rows, copies[per]]
            fields[name] = torch.from_numpy(chosen).float()
        return fields

    def _read_texts(
        self, samples: list[Sample], texts: list[str], rows: np.ndarray, epoch: int
    ) -> dict[str, Tensor]:
        """Return the student's input tensors for the chosen texts."""
        if self.inputs.read_texts is not None:
            random = [stream("text_masking", self.plan.seed, epoch, row) for row in rows.tolist()]
            return self.inputs.read_texts(samples, texts, random)
        return {} if self.inputs.tokenize is None else {"text": self.inputs.tokenize(texts)}

    def _mask_noise(self, row: int, epoch: int) -> Tensor:
        """Draw the uniform random numbers by which a student masks a picture."""
        random = stream("mask_noise", self.plan.seed, epoch, row)
        return torch.from_numpy(random.random(self.inputs.mask_noise, np.float32))

    def _sample_noise(self, rows: np.ndarray, epoch: int) -> dict[str, Tensor]:
        """Draw the recipe's random arrays for each row."""
        arrays = {
            name: [noise(stream(f"sample_noise.{name}", self.plan.seed, epoch, row)) for row in rows.tolist()]
            for name, noise in self.noise.items()
        }
        return {name: torch.from_numpy(np.stack(of_rows)) for name, of_rows in arrays.items()}

    def _view(self, row: int, epoch: int) -> int:
        """Return the index of the stored view that a row shows in an epoch.

        The views of a row take turns over the epochs; the first one is random, so that rows differ.
        """
        if not self.num_views:
            return 0
        first = int(stream("first_view", self.plan.seed, row).integers(self.num_views))
        return (first + epoch) % self.num_views

    def _show(self, sample: Sample, row: int, view: int) -> dict[str, Tensor]:
        """Return one picture as the student and a live teacher see it. Small data is decoded in the first epoch alone."""
        if (row, view) in self.kept:
            return self.kept[row, view]
        pictures = self._preprocess(sample, row, view)
        size = sum(picture.nbytes for picture in pictures.values())
        if size * len(self.rows) * max(self.num_views, 1) <= KEPT_BYTES:
            self.kept[row, view] = pictures
        return pictures

    def _preprocess(self, sample: Sample, row: int, view: int) -> dict[str, Tensor]:
        """Decode and preprocess one picture for the student and for a live teacher."""
        sizes = {picture.at_least for picture in self.pictures.values()}
        decoded = {size: self._decode(sample, size) for size in sizes}
        if not self.num_views:
            return {
                name: _seen(decoded[picture.at_least], picture) for name, picture in self.pictures.items()
            }
        params = self.view_params[self.views_at[row], view]
        return {
            name: picture.replay(decoded[picture.at_least], params)
            for name, picture in self.pictures.items()
            if picture.replay
        }

    def _text(self, sample: Sample, row: int, epoch: int) -> int:
        """Return the index of the text that a row shows in an epoch, drawn from its valid texts."""
        if self.sources:
            masks = [source.text_valid[source.at[row]] for source in self.sources]
            shortest = min(map(len, masks))
            usable = np.flatnonzero(np.logical_and.reduce([mask[:shortest] for mask in masks])).tolist()
        else:
            usable = [k for k, (_, valid) in enumerate(clean_texts(sample)) if valid]
        if len(usable) == 1:
            return usable[0]
        return usable[stream("text_choice", self.plan.seed, epoch, row).integers(len(usable))]

    def _decode(self, sample: Sample, at_least: int) -> Image.Image:
        """Decode a picture; raise a UserError if it has become unreadable."""
        try:
            return read_image(self.manifest, sample, at_least=at_least)
        except BadSample as error:
            raise UserError(f"the picture of '{sample.key}' can no longer be read: {error}") from error


def _seen(image: Image.Image, picture: PictureView) -> Tensor:
    name = f"the view {name_of(picture.view)}"
    with calling(name, picture.view):
        return check_view(picture.view(image), None, name)


def picture_views(inputs: RowInputs, live: Teacher | None) -> dict[str, PictureView]:
    """Return the picture preprocessing of the student and a live teacher, by name in the batch."""
    views = {} if inputs.picture is None else {"image": inputs.picture}
    if live is not None and live.view is not None:
        view: Mapping[str, Any] = live.spec.view
        views["teacher_image"] = PictureView(live.view, replay_view(view), view.get("at_least", 0))
    return views
