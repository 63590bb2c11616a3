"""The contract of a model that scores how well texts match an image, and its scores of a whole data set.

An encoder matches by cosine. A diffusion model matches by the negative denoising error of SDS-CLIP Eq. 1,

    d(x, c) = E_{t, eps} || eps_theta(z_t, t, c) - eps ||^2

over the same draws of (t, eps) for every image and text; Eq. 2 chooses the text with the smallest error. On request it
also returns d(x, "") - d(x, c), how much of the error a text explains, which is comparable between images.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize as unit_rows

from evaluation.models.encoder import Encoder, embed_texts
from teachercache.core.errors import UserError
from teachercache.core.progress import ticker
from teachercache.data.sample import BadSample
from teachercache.teachers.teacher import Teacher

SAMPLES = 16  # draws of (t, eps); a free choice, SDS-CLIP does not give a number
BATCH = 32  # images at a time
NORMALIZED = "normalised"  # key of the scores relative to the empty text; it is part of metric names
PAIRS = 1024  # (image, text) pairs whose states are in memory at a time
VIEWS = 4  # images in the VAE at a time: at 512 pixels it needs far more memory than the UNet

Scores = dict[str, list[Tensor]]


@dataclasses.dataclass(frozen=True)
class Matcher:
    """A model under evaluation that scores how well texts match images.

    `score(images, texts, normalize=False)` receives n RGB images and for each image its texts, any number of them. It
    returns {"score": [n tensors]}: for each image a float32 tensor with one value per text, higher for a better match.
    Equal inputs must give exactly equal scores, because ties count as misses. With `normalize=True` a model whose
    scores are not comparable between images adds the key NORMALIZED with scores that are.

    Attributes:
        name: The model's name in results and tables.
        pretrained: Where its weights come from; together with `name` it identifies the model.
        score: See above.
    """

    name: str
    pretrained: str
    score: Callable[..., Scores]


def of_encoder(encoder: Encoder) -> Matcher:
    """Return a Matcher whose scores are the cosines of an encoder."""

    def score(
        images: Sequence[Image.Image], texts: Sequence[Sequence[str]], *, normalize: bool = False
    ) -> Scores:
        column_of, unique = unique_texts(texts)
        views = torch.stack([encoder.view(image) for image in images])
        with torch.inference_mode():
            embeddings = encoder.encode_image(views.to(encoder.device))
        embeddings = unit_rows(embeddings.float().cpu(), dim=1).double()
        text_embeddings = embed_texts(encoder, unique).double()
        # Not a matrix product: it rounds equal rows differently, which turns a tie into a hit by chance
        return {
            "score": [
                (text_embeddings[[column_of[text] for text in group]] * embedding).sum(1).float()
                for embedding, group in zip(embeddings, texts, strict=True)
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
    """Return a Matcher whose scores are the negative denoising errors of a diffusion model (SDS-CLIP Eq. 1).

    Args:
        teacher: A text-to-image diffusion model.
        samples: Number of draws of (t, eps), the same ones for all images and texts.
        t_range: First and last timestep to draw from; None for the model's own.
        seed: Seed of the draws.
        device: The model moves there.

    Raises:
        UserError: If the model reads no texts.
    """
    from teachercache.teachers.diffusion import model as diffusion

    module: Any = teacher.module.to(device)
    tokenize = teacher.tokenize
    if tokenize is None:
        raise UserError(f"{teacher.spec.name} reads no texts: name a text-to-image model (`tc teachers`)")
    t, noise = diffusion.draw_noise(module, samples, seed=seed, t_range=t_range)

    view = teacher.view
    assert view is not None, f"{teacher.spec.name} is a diffusion model, which reads images"

    def score(
        images: Sequence[Image.Image], texts: Sequence[Sequence[str]], *, normalize: bool = False
    ) -> Scores:
        conditions = [[*group, ""] for group in texts] if normalize else texts
        column_of, unique = unique_texts(conditions)
        pairs = [(i, column_of[text]) for i, group in enumerate(conditions) for text in group]
        with torch.inference_mode():
            views = torch.stack([view(image) for image in images]).to(device)
            latents = torch.cat([diffusion.encode_latent(module, chunk) for chunk in views.split(VIEWS)])
            states = torch.cat(
                [
                    diffusion.encode_states(module, tokenize(unique[i : i + BATCH]).to(device))
                    for i in range(0, len(unique), BATCH)
                ]
            )
            errors = []
            for start in range(0, len(pairs), PAIRS):
                chunk = pairs[start : start + PAIRS]
                chunk_latents = latents[[i for i, _ in chunk]]
                chunk_states = states[[j for _, j in chunk]][:, None]
                error = diffusion.pair_errors(module, chunk_latents, chunk_states, t, noise)[:, 0]
                errors.append(error.float().cpu())
        by_image = torch.cat(errors).split([len(group) for group in conditions])
        if not normalize:
            return {"score": [-error for error in by_image]}
        return {
            "score": [-error[:-1] for error in by_image],
            NORMALIZED: [error[-1] - error[:-1] for error in by_image],
        }

    return Matcher(teacher.spec.name, f"{teacher.spec.weights}, {samples} draws", score)


def unique_texts(texts: Sequence[Sequence[str]]) -> tuple[dict[str, int], list[str]]:
    """Return the place of each distinct text, and the distinct texts in the order of their first occurrence."""
    unique = list(dict.fromkeys(text for group in texts for text in group))
    return {text: i for i, text in enumerate(unique)}, unique


# ----------------------------------------------------------------------------------------------------
# Scores of a whole data set


@dataclasses.dataclass(frozen=True)
class Question:
    """An image and the texts that it is matched with.

    Attributes:
        read: Reads the image when its batch is scored; raises BadSample if it cannot be read.
        texts: The texts.
    """

    read: Callable[[], Image.Image]
    texts: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class MatchScores:
    """Scores of questions, and what they cost."""

    scores: dict[str, list[Tensor | None]]  # for each question [texts], None if its image cannot be read
    seconds: float  # in the model alone, without reading images
    matches: int  # (image, text) pairs that the model compared
    problems: list[str]  # why images cannot be read

    def cost(self) -> dict[str, float | int]:
        """Return the metrics about cost and unreadable images."""
        return {
            "seconds_per_match": self.seconds / self.matches,
            "num_matches": self.matches,
            "num_skipped": len(self.problems),
        }


def total_cost(runs: Sequence[MatchScores]) -> dict[str, float | int]:
    """Return `MatchScores.cost` of several data sets together."""
    problems = [problem for run in runs for problem in run.problems]
    return MatchScores(
        {}, sum(run.seconds for run in runs), sum(run.matches for run in runs), problems
    ).cost()


def score_questions(
    matcher: Matcher, questions: Sequence[Question], *, normalize: bool = False
) -> MatchScores:
    """Score questions in batches of BATCH images.

    Args:
        matcher: The model.
        questions: Images and texts.
        normalize: Also request scores that are comparable between images; see `Matcher`.

    Raises:
        UserError: If no image can be read.
    """
    scores: dict[str, list[Tensor | None]] = {}
    problems: list[str] = []
    seconds, matches = 0.0, 0
    with ticker(len(questions), "pictures", matcher.name) as tick:
        for start in range(0, len(questions), BATCH):
            batch = questions[start : start + BATCH]
            images, texts, places = [], [], []
            for i, question in enumerate(batch, start=start):
                try:
                    images.append(question.read())
                except BadSample as error:
                    problems.append(str(error))
                else:
                    texts.append(list(question.texts))
                    places.append(i)
            if images:
                begin = time.perf_counter()
                batch_scores = matcher.score(images, texts, normalize=normalize)
                seconds += time.perf_counter() - begin
                matches += sum(map(len, texts)) + (len(images) if NORMALIZED in batch_scores else 0)
                for name, values in batch_scores.items():
                    column = scores.setdefault(name, [None] * len(questions))
                    for i, value in zip(places, values, strict=True):
                        column[i] = value
            tick.step(len(batch))
    if not matches:
        raise UserError(
            "no picture can be read" + (f", the first because: {problems[0]}" if problems else "")
        )
    return MatchScores(scores, seconds, matches, problems)
