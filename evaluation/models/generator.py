"""What an evaluation sees of a model that writes: pictures and prompts with masks to texts. Not for loading models."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from teachercache.core.errors import UserError
from teachercache.core.progress import ticker
from teachercache.data.manifest import Manifest
from teachercache.data.pictures import read_image
from teachercache.data.sample import BadSample

MASK = "[MASK]"  # the model's own mask in its place
BATCH = 32  # pictures at a time


@dataclasses.dataclass(frozen=True)
class Generator:
    """A model under evaluation; a task knows nothing else of it.

    `generate` takes RGB pictures, a prompt each, how many beams and the most sub-words that may be written; it gives
    what each prompt's MASKs stand for, without the prompt.
    """

    name: str
    pretrained: str
    generate: Callable[[list[Any], list[str], int, int], list[str]]


def caption_prompt(masks: int) -> str:
    """VLKD, 4.3.1: "A picture of [MASK] x m."."""
    return f"A picture of {MASK * masks}."


def answer_prompt(question: str, masks: int) -> str:
    """VLKD, 4.3.2: the question with "Answer: [MASK]." behind it."""
    return f"{question.strip()} Answer: {MASK * masks}."


def written(
    generator: Generator, manifest: Manifest, rows: list[int], prompts: list[str], *, beams: int, longest: int
) -> tuple[list[str], list[int], list[dict[str, str]]]:
    """What a model writes for each prompt where the row's picture can be read; those rows, and the others with reasons.

    `longest`: most sub-words that may be written.
    """
    texts: list[str] = []
    kept: list[int] = []
    skipped: list[dict[str, str]] = []
    with ticker(len(rows), "pictures", generator.name) as tick:
        for start in range(0, len(rows), BATCH):
            part = range(start, min(start + BATCH, len(rows)))
            pictures, there = [], []
            for i, picture in _pictures(manifest, [rows[i] for i in part], skipped):
                pictures.append(picture)
                there.append(start + i)
            asked = [prompts[i] for i in there]
            said = generator.generate(pictures, asked, beams, longest) if pictures else []
            if len(said) != len(asked):
                raise ValueError(f"{generator.name} wrote {len(said)} texts for {len(asked)} prompts")
            texts += [" ".join(text.split()) for text in said]
            kept += [rows[i] for i in there]
            tick.step(len(part))
    if not kept:
        raise UserError(
            f"no picture of {manifest.data} can be read, the first because: {skipped[0]['reason']}"
        )
    return texts, kept, skipped


def _pictures(
    manifest: Manifest, rows: list[int], skipped: list[dict[str, str]]
) -> Iterator[tuple[int, Any]]:
    """Place and picture of each row that has one; the others go to `skipped`."""
    for i, row in enumerate(rows):
        sample = manifest.row(row)
        try:
            if sample.problem or not sample.image:
                raise BadSample(sample.problem or "the row has no picture")
            yield i, read_image(manifest, sample)
        except BadSample as error:
            skipped.append({"key": sample.key, "reason": str(error)})
