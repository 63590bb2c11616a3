"""The contract of a model that generates text, the prompts of VLKD, and texts generated for a data set."""

import dataclasses
from collections.abc import Callable, Iterator

from PIL import Image

from teachercache.core.errors import UserError
from teachercache.core.progress import ticker
from teachercache.data.manifest import Manifest
from teachercache.data.pictures import read_image
from teachercache.data.sample import BadSample

MASK = "[MASK]"  # in prompts; the model puts its own mask token in its place
CAPTION, ANSWER = "A picture of", "Answer:"
MAX_NEW_TOKENS = 24
BATCH = 32  # images at a time


@dataclasses.dataclass(frozen=True)
class Generator:
    """A model under evaluation that writes texts about images.

    `generate(images, prompts, beams, max_new_tokens)` receives n RGB images and n prompts, in which MASK marks the
    places to fill, the beam size, and the maximum number of generated sub-words. It returns n texts: the words that fill
    the masks, without the prompt.

    Attributes:
        name: The model's name in results and tables.
        pretrained: Where its weights come from; together with `name` it identifies the model.
        generate: See above.
    """

    name: str
    pretrained: str
    generate: Callable[[list[Image.Image], list[str], int, int], list[str]]


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How many masks a prompt has, and the beam size (VLKD, section 4.3 and table 11)."""

    masks: int
    beams: int


CAPTIONING, ANSWERING = Decoding(masks=6, beams=6), Decoding(masks=2, beams=1)


def caption_prompt(masks: int) -> str:
    """Return "A picture of [MASK] x m." (VLKD, section 4.3.1)."""
    return f"{CAPTION} {MASK * masks}."


def answer_prompt(question: str, masks: int) -> str:
    """Return the question followed by "Answer: [MASK] x m." (VLKD, section 4.3.2)."""
    return f"{question.strip()} {ANSWER} {MASK * masks}."


@dataclasses.dataclass(frozen=True)
class Generated:
    """Texts generated for the rows of a data set."""

    texts: list[str]
    rows: list[int]  # one for each text
    skipped: list[dict[str, str]]  # key and reason of the rows whose image cannot be read


def generate_for_rows(
    generator: Generator,
    manifest: Manifest,
    rows: list[int],
    prompts: list[str],
    *,
    beams: int,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> Generated:
    """Generate a text for each row with a readable image.

    Args:
        generator: The model.
        manifest: The data.
        rows: Rows of the manifest.
        prompts: One for each row.
        beams: Beam size.
        max_new_tokens: Maximum number of generated sub-words.

    Raises:
        UserError: If no image can be read.
    """
    texts: list[str] = []
    kept: list[int] = []
    skipped: list[dict[str, str]] = []
    with ticker(len(rows), "pictures", generator.name) as tick:
        for start in range(0, len(rows), BATCH):
            batch = rows[start : start + BATCH]
            images, places = [], []
            for i, image in _images(manifest, batch, skipped):
                images.append(image)
                places.append(start + i)
            batch_prompts = [prompts[i] for i in places]
            batch_texts = generator.generate(images, batch_prompts, beams, max_new_tokens) if images else []
            if len(batch_texts) != len(batch_prompts):
                raise ValueError(
                    f"{generator.name} wrote {len(batch_texts)} texts for {len(batch_prompts)} prompts"
                )
            texts += [" ".join(text.split()) for text in batch_texts]
            kept += [rows[i] for i in places]
            tick.step(len(batch))
    if not kept:
        raise UserError(
            f"no picture of {manifest.data} can be read, the first because: {skipped[0]['reason']}"
        )
    return Generated(texts, kept, skipped)


def _images(
    manifest: Manifest, rows: list[int], skipped: list[dict[str, str]]
) -> Iterator[tuple[int, Image.Image]]:
    """Yield place and image of each readable row; append the others to `skipped`."""
    for i, row in enumerate(rows):
        sample = manifest.row(row)
        try:
            if sample.picture_problem or not sample.image:
                raise BadSample(sample.problem or "the row has no picture")
            yield i, read_image(manifest, sample)
        except BadSample as error:
            skipped.append({"key": sample.key, "reason": str(error)})
