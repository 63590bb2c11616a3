"""Decode rows of a manifest in worker processes: images or augmented views, token ids, and what could not be read.

An image or text that several rows of a batch share is decoded once; every row has its index. A row whose image cannot
be decoded has zeros and a reason.
"""

import dataclasses
import json
import math
import time
from collections.abc import Callable, Generator, Hashable, Iterable, Sequence
from typing import Any, TypedDict, TypeVar

import numpy as np
import torch
from PIL.Image import Image
from torch.utils.data import DataLoader, Dataset

from teachercache.cache.picture_bytes import DIGEST, digest_of, file_time
from teachercache.core.errors import calling, lacks_memory, name_of
from teachercache.data.manifest import Manifest
from teachercache.data.pictures import decode_image, read_bytes, seen_size
from teachercache.data.sample import BadSample, Sample, clean_texts
from teachercache.data.views import PARAMS, Augment, check_view, draw_params
from teachercache.data.workers import hand_over, ignore_interrupt, limited, received, start_method

VIEWS_AT_ONCE = 4  # views of one work item: bounds the memory of a decoded batch for any --views
Value = TypeVar("Value", bound=Hashable)


@dataclasses.dataclass(frozen=True)
class WorkItem:
    """One batch to decode: rows, their views (0 alone for unaugmented images) and their texts, all of one block."""

    rows: tuple[int, ...]
    views: range = range(1)
    texts: range = range(0)
    block: int = 0


@dataclasses.dataclass(frozen=True)
class ImageInput:
    """How images are decoded.

    Attributes:
        view: Map an RGB image to a tensor.
        size: Height and width of that tensor.
        at_least: The shortest side that a JPEG may be decoded at; 0 for full size.
        num_boxes: The number of boxes per image to read from the data; 0 for none.
        augment: How augmented views are drawn; None for the plain view.
        replay: Map an image and the parameters of an augmented view to a tensor.
    """

    view: Callable[[Image], torch.Tensor]
    size: tuple[int, int]
    at_least: int = 0
    num_boxes: int = 0
    augment: Augment | None = None
    replay: Callable[[Image, np.ndarray], torch.Tensor] | None = None


@dataclasses.dataclass(frozen=True)
class TextInput:
    """How texts are prepared: `tokenize` maps texts to ids, `find_words` to anything that `Teacher.encode` reads."""

    tokenize: Callable[[list[str]], torch.Tensor] | None = None
    find_words: Callable[[list[str]], object] | None = None


class Batch(TypedDict, total=False):
    """A decoded work item of n rows with t texts each; images and texts are distinct.

    Attributes:
        item: The work item.
        key: The key of each row.
        problems: Entries of the quarantine.
        usable: Whether the image of each row was decoded, [n].
        seconds: How long decoding took.
        image: [views, images, 3, height, width].
        image_at: The index of each row's image, [n].
        boxes: x1, y1, x2, y2 as fractions of the image, [images, boxes, 4].
        num_boxes: [images].
        view_params: [n, views, parameters].
        text_valid: Whether each text can be used, [n, t].
        text: Token ids [texts, length].
        text_at: The index of each text, [n * t].
        words: What `TextInput.find_words` returned for all n * t texts.
        digests: The digest of the bytes of each row's picture, zeros if it was not read: uint8 [n, 16].
        times: When each row's picture file was last written, 0 if that is not known: int64 [n].
    """

    item: WorkItem
    key: list[str]
    problems: list[dict[str, Any]]
    usable: np.ndarray
    seconds: float
    image: torch.Tensor
    image_at: torch.Tensor
    boxes: torch.Tensor
    num_boxes: torch.Tensor
    view_params: np.ndarray
    text_valid: np.ndarray
    text: torch.Tensor
    text_at: torch.Tensor
    words: object
    digests: np.ndarray
    times: np.ndarray


class Rows(Dataset):
    """A dataset whose index is a WorkItem. `tc build`, `tc verify` and evaluation decode with it."""

    def __init__(
        self, manifest: Manifest, *, images: ImageInput | None = None, texts: TextInput | None = None
    ) -> None:
        self.manifest, self.images, self.texts = manifest, images, texts or TextInput()

    def __len__(self) -> int:
        return len(self.manifest)

    def __getitems__(self, item: WorkItem) -> Batch:
        """Decode the rows of a work item."""
        start, samples = time.perf_counter(), [self.manifest.row(row) for row in item.rows]
        batch: Batch = {
            "item": item,
            "key": [sample.key for sample in samples],
            "problems": [],
            "usable": np.ones(len(samples), bool),
        }
        if self.images is not None and self.manifest.has_images and len(item.views):
            self._decode_images(self.images, samples, batch)
        if len(item.texts):
            self._prepare_texts(samples, batch)
        batch["seconds"] = time.perf_counter() - start
        return batch

    def _prepare_texts(self, samples: list[Sample], batch: Batch) -> None:
        """Add the texts; one that cannot be used is an empty text."""
        numbers = batch["item"].texts
        clean = [[*clean_texts(sample)] for sample in samples]
        picked = [[texts[k] if k < len(texts) else ("", False) for k in numbers] for texts in clean]
        broken = [bool(sample.problem) and not self.manifest.has_images for sample in samples]
        batch["text_valid"] = np.array(
            [[good and not bad for _, good in row] for row, bad in zip(picked, broken, strict=True)], bool
        ).reshape(len(samples), len(numbers))
        texts = [text if good else "" for row in picked for text, good in row]
        if self.texts.find_words is not None:
            batch["words"] = self.texts.find_words(texts)
        if self.texts.tokenize is not None:
            distinct, batch["text_at"] = _distinct(texts)
            batch["text"] = self.texts.tokenize(distinct) if distinct else torch.zeros(0, 1, dtype=torch.long)

    def _decode_images(self, images: ImageInput, samples: list[Sample], batch: Batch) -> None:
        """Add the distinct images, and to `usable` and `problems` what cannot be decoded."""
        item = batch["item"]
        identities, image_at = _distinct([_identity(images, sample) for sample in samples])
        owners = [samples[place] for place in np.unique(image_at.numpy(), return_index=True)[1].tolist()]
        pixels = torch.zeros(len(item.views), len(identities), 3, *images.size)
        params = np.zeros((len(identities), len(item.views), len(PARAMS)), np.float32)
        boxes = torch.zeros(len(identities), images.num_boxes, 4)
        num_boxes = torch.zeros(len(identities), dtype=torch.int64)
        digests, times = np.zeros((len(identities), DIGEST), np.uint8), np.zeros(len(identities), np.int64)
        reasons, name = {}, name_of(images.view)
        for i, sample in enumerate(owners):
            try:
                times[i] = file_time(self.manifest.root, sample.image)  # before it is read
                content = self._content(sample)
                digests[i] = digest_of(content)
                image = decode_image(content, images.at_least)
                if images.num_boxes:
                    stored = _boxes(sample, seen_size(content))[: images.num_boxes]
                    num_boxes[i], boxes[i, : len(stored)] = len(stored), stored
                if images.augment is None or images.replay is None:
                    with calling(f"the view {name}", images.view):
                        pixels[0, i] = check_view(images.view(image), images.size, f"the view {name}")
                    continue
                for v, number in enumerate(item.views):
                    params[i, v] = draw_params(
                        images.augment, sample.key, number, width=image.width, height=image.height
                    )
                    pixels[v, i] = images.replay(image, params[i, v])
            except BadSample as error:
                reasons[i] = str(error)
            except (MemoryError, RuntimeError) as error:
                if not lacks_memory(error):
                    raise
                reasons[i] = "the picture does not fit into memory"
        for i, (row, key, place) in enumerate(zip(item.rows, batch["key"], image_at.tolist(), strict=True)):
            if place in reasons:
                batch["usable"][i] = False
                batch["problems"].append({"row": row, "key": key, "reason": reasons[place]})
        batch["image"], batch["image_at"] = pixels, image_at
        batch["digests"], batch["times"] = digests[image_at.numpy()], times[image_at.numpy()]
        if images.num_boxes:
            batch["boxes"], batch["num_boxes"] = boxes, num_boxes
        if images.augment is not None:
            batch["view_params"] = params[image_at.numpy()]

    def _content(self, sample: Sample) -> bytes:
        if sample.picture_problem or not sample.image:
            raise BadSample(sample.problem or "the row has no picture")
        return read_bytes(self.manifest, sample)


def _identity(images: ImageInput, sample: Sample) -> tuple[Hashable, ...]:
    """The key of an image: rows with the same key share one forward pass. Augmented views belong to one row."""
    boxes = repr(_stored_boxes(sample)) if images.num_boxes else ""
    key = "" if images.augment is None else sample.key
    return sample.image, sample.offset, sample.size, sample.problem, boxes, key


def _distinct(values: Sequence[Value]) -> tuple[list[Value], torch.Tensor]:
    """Return the distinct values in their order, and the index of each value among them."""
    places = {value: i for i, value in enumerate(dict.fromkeys(values))}
    return [*places], torch.tensor([places[value] for value in values], dtype=torch.long)


def _stored_boxes(sample: Sample) -> list[Any]:
    return (json.loads(sample.task).get("boxes") if sample.task else None) or []


def _boxes(sample: Sample, size: tuple[int, int]) -> torch.Tensor:
    """Convert the task column `boxes`, pixels of the upright image, to fractions [boxes, 4]."""
    stored = _stored_boxes(sample)
    for number, box in enumerate(stored, start=1):
        numeric = (
            isinstance(box, list) and len(box) == 4 and all(isinstance(value, int | float) for value in box)
        )
        if not (numeric and all(map(math.isfinite, box)) and box[0] <= box[2] and box[1] <= box[3]):
            raise BadSample(f"box {number} of the row is not x1, y1, x2, y2")
    fractions = torch.tensor(stored, dtype=torch.float64).reshape(-1, 4) / torch.tensor([*size, *size])
    return fractions.clamp(0, 1).float()


def decoded(rows: Rows, items: Iterable[WorkItem], *, workers: int, pin: bool = False) -> Generator[Batch]:
    """Decode work items in their order, ahead of the caller, in worker processes.

    Close the generator if an error may leave it unfinished: it ends the workers at once, while torch would wait for ten
    seconds.

    Args:
        rows: The dataset.
        items: The work items.
        workers: The number of processes; 0 decodes in this one.
        pin: Copy tensors to pinned memory.

    Raises:
        MachineError: A worker process died, or the machine failed in one.
        Exception: What a worker raised, with its own message alone.
    """
    workers = limited(workers)
    batches = iter(
        DataLoader(
            rows,
            batch_sampler=items,  # type: ignore[arg-type]
            num_workers=workers,
            multiprocessing_context=start_method(workers),
            collate_fn=hand_over(workers),
            prefetch_factor=2 if workers else None,
            worker_init_fn=ignore_interrupt,
            pin_memory=pin,
        )
    )
    try:
        yield from received(batches)
    finally:
        for process in getattr(batches, "_workers", []):
            process.terminate()  # torch's workers exit cleanly on it
