"""What an evaluation of matching sees of a model: how well texts fit a picture. Not for choosing among answers.

Of an encoder it is the cosine. Of a diffusion model it is minus the error of SDS-CLIP Eq. 1,
d(x, c) = E || eps_theta(z_t, t, c) - eps ||^2, over the same draws of (t, eps) for every picture and text; Eq. 2 takes
the text of least error. Asked for, also d(x, "") - d(x, c): what a text explains, comparable between pictures.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from evaluation.models.encoder import Encoder, embed_texts
from teachercache.core.errors import UserError
from teachercache.core.progress import ticker
from teachercache.data.sample import BadSample
from teachercache.teachers.teacher import Teacher

if TYPE_CHECKING:
    from PIL import Image

SAMPLES = 16  # free choice: draws of (t, eps); SDS-CLIP does not say how many
BATCH = 32  # pictures at once
NORMALISED = "normalised"


@dataclasses.dataclass(frozen=True)
class Matcher:
    """A model under evaluation; a task knows nothing else of it.

    `score(pictures, texts)` takes RGB pictures and each picture's texts, and gives `score`: per picture a float32 value
    per text, higher where it fits better. With `normalise=True` a diffusion matcher adds `normalised`.
    """

    name: str
    pretrained: str
    score: Callable[..., dict[str, list[Tensor]]]


def of_encoder(encoder: Encoder) -> Matcher:
    """Cosines."""

    def score(
        pictures: Sequence["Image.Image"], texts: Sequence[Sequence[str]], *, normalise: bool = False
    ) -> dict[str, list[Tensor]]:
        place, unique = places_of(texts)
        views = torch.stack([encoder.view(picture) for picture in pictures])
        with torch.inference_mode():
            images = encoder.encode_image(views.to(encoder.device))
        images = torch.nn.functional.normalize(images.float().cpu(), dim=1)
        said = embed_texts(encoder, unique).double()
        pairs = zip(images.double(), texts, strict=True)
        # not a matrix product: it rounds equal rows differently, and a tie is then a hit by chance
        return {
            "score": [
                (said[[place[text] for text in group]] * image).sum(1).float() for image, group in pairs
            ]
        }

    return Matcher(encoder.name, encoder.pretrained, score)


def of_diffusion(
    teacher: Teacher,
    *,
    samples: int = SAMPLES,
    t_range: tuple[int, int] | None = None,
    seed: int = 0,
    device: str = "cpu",
) -> Matcher:
    """Minus the error of Eq. 1 over `samples` draws of (t, eps), one draw for all pictures and texts."""
    from teachercache.teachers.diffusion import model as diffusion

    module: Any = teacher.module.to(device)
    tokenize = teacher.tokenize
    if tokenize is None:
        raise UserError(f"{teacher.spec.name} reads no texts: name a text-to-image model (`tc teachers`)")
    t, noise = diffusion.draw_noise(module, samples, seed=seed, t_range=t_range)

    def score(
        pictures: Sequence["Image.Image"], texts: Sequence[Sequence[str]], *, normalise: bool = False
    ) -> dict[str, list[Tensor]]:
        asked = [[*group, ""] for group in texts] if normalise else texts
        place, unique = places_of(asked)
        pairs = [(i, place[text]) for i, group in enumerate(asked) for text in group]
        with torch.inference_mode():
            views = torch.stack([teacher.view(picture) for picture in pictures]).to(device)
            latents = torch.cat([diffusion.encode_latent(module, part) for part in views.split(VIEWS)])
            states = torch.cat(
                [
                    diffusion.encode_states(module, tokenize(unique[i : i + BATCH]).to(device))
                    for i in range(0, len(unique), BATCH)
                ]
            )
            errors = [
                diffusion.pair_errors(
                    module, latents[[i for i, _ in part]], states[[j for _, j in part]][:, None], t, noise
                )[:, 0]
                .float()
                .cpu()
                for part in (pairs[k : k + PAIRS] for k in range(0, len(pairs), PAIRS))
            ]
        found = torch.cat(errors).split([len(group) for group in asked])
        if not normalise:
            return {"score": [-error for error in found]}
        return {
            "score": [-error[:-1] for error in found],
            NORMALISED: [error[-1] - error[:-1] for error in found],
        }

    return Matcher(teacher.spec.name, f"{teacher.spec.weights}, {samples} draws", score)


PAIRS = 1024  # of pictures and texts whose states lie side by side at one time
VIEWS = 4  # pictures in the VAE at once: at 512 pixels it needs far more memory than the UNet


def places_of(texts: Sequence[Sequence[str]]) -> tuple[dict[str, int], list[str]]:
    """Each different text once, and its place."""
    unique = list(dict.fromkeys(text for group in texts for text in group))
    return {text: i for i, text in enumerate(unique)}, unique


# ----------------------------------------------------------------------------------------------------
# Asking a whole set


@dataclasses.dataclass(frozen=True)
class Question:
    """A picture, read when its turn comes, and the texts that it is matched with."""

    read: Callable[[], "Image.Image"]  # BadSample where it cannot be read
    texts: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Heard:
    """Scores per question, None where its picture cannot be read; and what they cost."""

    scores: dict[str, list[Tensor | None]]  # each [texts]
    seconds: float  # in the model alone, without reading pictures
    matches: int  # pictures x texts that the model compared
    problems: list[str]

    def cost(self) -> dict[str, Any]:
        """The part of a result that says how long a match took, and how many pictures could not be read."""
        return {
            "seconds_per_match": self.seconds / self.matches,
            "num_matches": self.matches,
            "num_skipped": len(self.problems),
        }


def together(parts: Sequence[Heard]) -> Heard:
    """What several sets cost in all; their scores are their own."""
    problems = [problem for part in parts for problem in part.problems]
    return Heard({}, sum(part.seconds for part in parts), sum(part.matches for part in parts), problems)


def ask(matcher: Matcher, questions: Sequence[Question], *, normalise: bool = False) -> Heard:
    """A matcher's scores of all questions; UserError where no picture can be read."""
    scores: dict[str, list[Tensor | None]] = {}
    problems: list[str] = []
    seconds, matches = 0.0, 0
    with ticker(len(questions), "pictures", matcher.name) as tick:
        for start in range(0, len(questions), BATCH):
            part = questions[start : start + BATCH]
            pictures = [_read(question) for question in part]
            problems += [found for found in pictures if isinstance(found, str)]
            kept = [i for i, found in enumerate(pictures) if not isinstance(found, str)]
            if kept:
                texts = [list(part[i].texts) for i in kept]
                begin = time.perf_counter()
                heard = matcher.score([pictures[i] for i in kept], texts, normalise=normalise)
                seconds += time.perf_counter() - begin
                matches += sum(map(len, texts)) + (len(kept) if NORMALISED in heard else 0)
                for name, values in heard.items():
                    column = scores.setdefault(name, [None] * len(questions))
                    for i, value in zip(kept, values, strict=True):
                        column[start + i] = value
            tick.step(len(part))
    if not matches:
        raise UserError(
            "no picture can be read" + (f", the first because: {problems[0]}" if problems else "")
        )
    return Heard(scores, seconds, matches, problems)


def _read(question: Question) -> "Image.Image | str":
    """The picture, or why there is none."""
    try:
        return question.read()
    except BadSample as error:
        return str(error)
