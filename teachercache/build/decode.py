"""Rows of a manifest to tensors, in worker processes: pictures or their augmented views, token ids, what went wrong.

A picture or text that several rows of a piece share comes once, with each row's place in what came. A row whose picture
cannot be used comes as zeros with its reason. Not for deciding which rows: see `build.py`.
"""

import contextlib
import dataclasses
import json
import math
import multiprocessing
import signal
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from teachercache.core.errors import UserError
from teachercache.data.manifest import Manifest
from teachercache.data.pictures import decode_image, read_bytes, seen_size
from teachercache.data.sample import BadSample, Sample, clean_texts
from teachercache.data.views import PARAMS, Augment, draw_params


@dataclasses.dataclass(frozen=True)
class Piece:
    """One batch of work: rows, which of their views (0 alone where none are stored) and which of their texts."""

    rows: tuple[int, ...]
    views: range = range(1)
    texts: range = range(0)
    block: int = 0


class Rows(Dataset):
    """What a DataLoader decodes: a Piece is its index. Evaluation and `tc verify` decode with it too."""

    def __init__(
        self,
        manifest: Manifest,
        *,
        view: Callable[[Any], torch.Tensor],
        size: tuple[int, int],
        at_least: int = 0,
        num_boxes: int = 0,
        tokenize: Any = None,
        find: Any = None,
        replay: Any = None,
        augment: Augment | None = None,
    ):
        self.manifest, self.view, self.size, self.at_least = manifest, view, size, at_least
        self.num_boxes, self.tokenize, self.find = num_boxes, tokenize, find
        self.replay, self.augment = replay, augment
        self.has_images = manifest.has_images

    def __len__(self) -> int:
        return len(self.manifest)

    def __getitems__(self, piece: Piece) -> dict[str, Any]:
        """What is there of these; masks and problems are per row and text.

        `image` [views, pictures, 3, H, W], each row's place in it `image_at` [n]; `boxes` [pictures, boxes, 4] as
        shares of it and how many there are, `num_boxes` [pictures]; `view_params` [n, views, P];
        `text` [distinct, length], each text's place in it `text_at` [n * texts]; `words` of all n * texts.
        """
        start, samples = time.perf_counter(), [self.manifest.row(row) for row in piece.rows]
        batch: dict[str, Any] = {"piece": piece, "key": [sample.key for sample in samples], "problems": []}
        batch["usable"] = np.ones(len(samples), bool)
        if self.has_images and len(piece.views):
            batch |= self._pictures(piece, samples, batch)
        if len(piece.texts):
            batch |= self._texts(piece, samples)
        batch["seconds"] = time.perf_counter() - start
        return batch

    def _texts(self, piece: Piece, samples: list[Sample]) -> dict[str, Any]:
        """Which texts can be used, and their ids: a text that cannot is empty."""
        clean = [[*clean_texts(sample)] for sample in samples]
        picked = [[texts[k] if k < len(texts) else ("", False) for k in piece.texts] for texts in clean]
        lost = [bool(sample.problem) and not self.has_images for sample in samples]
        valid = np.array(
            [[good and not bad for _, good in row] for row, bad in zip(picked, lost, strict=True)], bool
        ).reshape(len(samples), len(piece.texts))
        found: dict[str, Any] = {"text_valid": valid}
        known = [text if good else "" for row in picked for text, good in row]
        if self.find is not None:
            found["words"] = self.find(known)
        if self.tokenize is not None:
            texts, found["text_at"] = _once(known)
            found["text"] = self.tokenize(texts) if texts else torch.zeros(0, 1, dtype=torch.long)
        return found

    def _pictures(self, piece: Piece, samples: list[Sample], batch: dict[str, Any]) -> dict[str, Any]:
        """The pictures of a piece; what cannot be read is noted in `usable` and `problems`."""
        identities, at = _once([self._identity(sample) for sample in samples])
        owners = [samples[place] for place in np.unique(at.numpy(), return_index=True)[1].tolist()]
        pictures = torch.zeros(len(piece.views), len(identities), 3, *self.size)
        params = np.zeros((len(identities), len(piece.views), len(PARAMS)), np.float32)
        boxes, num_boxes = (
            torch.zeros(len(identities), self.num_boxes, 4),
            torch.zeros(len(identities), dtype=torch.int64),
        )
        reasons = {}
        for i, sample in enumerate(owners):
            try:
                content = self._content(sample)
                picture = decode_image(content, self.at_least)
                if self.num_boxes:
                    given = _boxes(sample, seen_size(content))[: self.num_boxes]
                    num_boxes[i], boxes[i, : len(given)] = len(given), given
                if self.augment is None:
                    pictures[0, i] = self.view(picture)
                    continue
                for v, number in enumerate(piece.views):
                    params[i, v] = draw_params(
                        self.augment, sample.key, number, width=picture.width, height=picture.height
                    )
                    pictures[v, i] = self.replay(picture, params[i, v])
            except BadSample as error:
                reasons[i] = str(error)
        for row, key, place, i in zip(
            piece.rows, batch["key"], at.tolist(), range(len(samples)), strict=True
        ):
            if place in reasons:
                batch["usable"][i] = False
                batch["problems"].append({"row": row, "key": key, "reason": reasons[place]})
        found = {"image": pictures, "image_at": at}
        found |= {"boxes": boxes, "num_boxes": num_boxes} if self.num_boxes else {}
        return found | ({} if self.augment is None else {"view_params": params[at.numpy()]})

    def _identity(self, sample: Sample) -> tuple[Any, ...]:
        """Rows that are equal in this share what is said of their picture; augmented views are each row's own."""
        boxes = repr(_given_boxes(sample)) if self.num_boxes else ""
        key = "" if self.augment is None else sample.key
        return sample.image, sample.offset, sample.size, sample.problem, boxes, key

    def _content(self, sample: Sample) -> bytes:
        if sample.problem or not sample.image:
            raise BadSample(sample.problem or "the row has no picture")
        return read_bytes(self.manifest, sample)


def _once(values: list[Any]) -> tuple[list[Any], torch.Tensor]:
    """The distinct values in the order in which they come, and the place of each value among them."""
    places = {value: i for i, value in enumerate(dict.fromkeys(values))}
    return [*places], torch.tensor([places[value] for value in values], dtype=torch.long)


def _given_boxes(sample: Sample) -> list[Any]:
    return (json.loads(sample.task).get("boxes") if sample.task else None) or []


def _boxes(sample: Sample, size: tuple[int, int]) -> torch.Tensor:
    """The task column `boxes` (x1, y1, x2, y2 in pixels of the picture as a person sees it) as shares [boxes, 4]."""
    given = _given_boxes(sample)
    for number, box in enumerate(given, start=1):
        known = (
            isinstance(box, list) and len(box) == 4 and all(isinstance(value, int | float) for value in box)
        )
        if not (known and all(map(math.isfinite, box)) and box[0] <= box[2] and box[1] <= box[3]):
            raise BadSample(f"box {number} of the row is not x1, y1, x2, y2")
    return (
        (torch.tensor(given, dtype=torch.float64).reshape(-1, 4) / torch.tensor([*size, *size]))
        .clamp(0, 1)
        .float()
    )


def decoded(
    rows: Rows, pieces: Iterable[Piece], *, workers: int, pin: bool = False
) -> Generator[dict[str, Any]]:
    """Batches of pieces in their order, decoded ahead by worker processes; tensors come through shared memory.

    Close it where an error may leave it half read: the workers end at once, where torch would wait ten seconds.
    UserError where one of them died.
    """
    batches = iter(
        DataLoader(
            rows,
            batch_sampler=pieces,  # type: ignore[arg-type]
            num_workers=workers,
            collate_fn=_as_it_is,
            prefetch_factor=2 if workers else None,
            worker_init_fn=ignore_interrupt,
            pin_memory=pin,
        )
    )
    try:
        with deaths_told(RuntimeError, ConnectionError, EOFError):
            yield from batches
    finally:
        for process in getattr(batches, "_workers", []):
            process.terminate()  # which torch's workers take from their parent as a good end


@contextlib.contextmanager
def deaths_told(*kinds: type[Exception]) -> Iterator[None]:
    """A worker that died is told in one line; torch says so wherever its process happens to be."""
    try:
        yield
    except kinds as error:
        if not _is_death(error):
            raise
        raise UserError(
            "a decoding process died (killed, or out of memory): run the same command again, a build goes on where it "
            "left off; try fewer --workers"
        ) from error


def _is_death(error: Exception) -> bool:
    """Whether a worker is gone, which torch says or a connection that ends while a tensor is handed over."""
    if isinstance(error, RuntimeError):
        return "DataLoader worker (pid" in str(error)
    return "in DataLoader worker process" not in str(error)  # that is an error which a worker told of


def ignore_interrupt(worker: int) -> None:
    """Ctrl-C reaches the whole process group: the builder ends its workers itself, without their tracebacks."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.excepthook = _say_nothing_of_a_gone_builder  # the thread that hands over tensors calls it


def _say_nothing_of_a_gone_builder(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """A connection that ends while it is made is no news: the builder was told to stop."""
    if not issubclass(kind, (OSError, EOFError, multiprocessing.AuthenticationError)):
        sys.__excepthook__(kind, error, trace)


def _as_it_is(batch: Any) -> Any:
    return batch


VIEWS_AT_ONCE = 4  # of a piece: what decoding hands over stays small, whatever --views is
