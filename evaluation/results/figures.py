"""Draw the predictions of models for a few images side by side, as PNG: PSD's figures 1 to 4.

Rows are drawn with a seed, the same ones for every model, so that nothing is selected by hand. The figures are
illustrations: a retrieval figure searches among a thousand images at most.
"""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from evaluation.data.prompts import fill
from evaluation.data.splits import rows_or_only_split
from evaluation.models.encoder import Encoder, embed_images, embed_texts
from evaluation.results.suite import LABELED
from evaluation.tasks.encoding.zeroshot import TEMPLATES, Fill, class_names, classifier
from evaluation.tasks.task import Task
from teachercache.core.errors import UserError
from teachercache.data.manifest import Manifest
from teachercache.data.pictures import read_image
from teachercache.data.read import read_manifest

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL import Image
    from torch import Tensor

SEED, POOL = 0, 1000
QUERIES, TOP = 6, 10  # figures 1 and 2
CLASSES, BARS = 6, 5  # figure 3
PAIRS = 8  # figure 4
RIGHT, WRONG = "tab:green", "0.7"


def draw_data(encoders: Sequence[Encoder], task: Task, data: str, out: Path) -> list[Path]:
    """Draw retrieval and similarities of test rows with captions, and classes of test rows with labels.

    Args:
        encoders: The models.
        task: The task, which knows the names of its classes.
        data: Anything that `read_manifest` opens.
        out: The folder to write to.

    Returns:
        The paths of the figures.

    Raises:
        UserError: If no test row has captions or labels.
    """
    manifest = read_manifest(data, quiet=True)
    name = manifest.data.rstrip("/").rsplit("/", 1)[-1]
    rows, labels = rows_or_only_split(manifest, "test").tolist(), manifest.column("label")
    paths = []
    if manifest.has_text()[rows].sum() > 1:
        paths += draw_captions(encoders, manifest, rows, out, name)
    labeled = [row for row in rows if labels[row]]
    if labeled:
        names = task.class_names(manifest, labeled) if task.class_names else class_names(manifest)
        paths += draw_classes(encoders, manifest, labeled, names, TEMPLATES, out, name)
    if not paths:
        raise UserError(f"{data} has no test rows with captions or labels: there is nothing to draw")
    return paths


def draw_suite(
    out: Path,
    encoders: Sequence[Encoder],
    name: str,
    manifest: Manifest,
    rows: Sequence[int],
    names: Mapping[str, str],
) -> None:
    """Draw the figures of one of the suite's data sets, with the prompts it is measured with; see `suite.Seen`."""
    if names:
        draw_classes(encoders, manifest, rows, names, LABELED[name].templates, out, name, fill)
    else:
        draw_captions(encoders, manifest, rows, out, name)


def draw_captions(
    encoders: Sequence[Encoder], manifest: Manifest, rows: Sequence[int], out: Path, name: str
) -> list[Path]:
    """Draw figures 1, 2 and 4 of rows with captions: `<name>-retrieval.png`, `<name>-similarity.png`.

    Raises:
        UserError: If fewer than two rows have captions.
    """
    captions = _captions(manifest, rows)
    pool = _draw([row for row in rows if captions.get(row)], POOL)
    if len(pool) < 2:
        raise UserError(f"{manifest.data} has fewer than two rows with captions: there is nothing to draw")
    embedded = [embed_images(encoder, manifest, pool) for encoder in encoders]
    pool, images = embedded[0][1], [embeddings for embeddings, _, _ in embedded]
    queries = [(row, captions[row]) for row in _draw(pool, QUERIES)]
    pairs = [(row, captions[row]) for row in _draw(pool, PAIRS)]
    paths = [out / f"{name}-retrieval.png", out / f"{name}-similarity.png"]
    _save(_retrievals(encoders, manifest, pool, images, queries), paths[0])
    _save(_similarities(encoders, manifest, pool, images, pairs), paths[1])
    return paths


def draw_classes(
    encoders: Sequence[Encoder],
    manifest: Manifest,
    rows: Sequence[int],
    names: Mapping[str, str],
    templates: Sequence[str],
    out: Path,
    name: str,
    fill: Fill = str.format,
) -> list[Path]:
    """Draw figure 3 of rows with labels, each class at most once: `<name>-classes.png`."""
    labels = manifest.column("label")
    shown: dict[str, int] = {}
    for row in _draw(list(rows), len(rows), ordered=False):
        shown.setdefault(labels[row], row)
    chosen = list(shown.values())[:CLASSES]
    figure = _figure(3.0 + 3.2 * len(encoders), 1.5 * len(chosen) + 0.5)
    grid = figure.subplots(
        len(chosen), 1 + len(encoders), squeeze=False, width_ratios=[1.2] + [2] * len(encoders)
    )
    words = list(names.values())
    for column, encoder in enumerate(encoders, start=1):
        images, kept, _ = embed_images(encoder, manifest, chosen)
        probabilities = (encoder.scale * images @ classifier(encoder, words, templates, fill).T).softmax(1)
        for line, row in enumerate(chosen):
            axis = grid[line][column]
            if row in kept:
                _bars(axis, probabilities[kept.index(row)], words, list(names).index(labels[row]))
            if line == 0:
                axis.set_title(encoder.name, fontsize=9)
    for line, row in enumerate(chosen):
        _picture(grid[line][0], manifest, row)
        grid[line][0].set_title(textwrap.shorten(names[labels[row]], 28), fontsize=8, parse_math=False)
    path = out / f"{name}-classes.png"
    _save(figure, path)
    return [path]


# ----------------------------------------------------------------------------------------------------
# Figures 1 and 2: the images retrieved for a text


def _retrievals(
    encoders: Sequence[Encoder],
    manifest: Manifest,
    pool: list[int],
    images: "list[Tensor]",
    queries: list[tuple[int, str]],
) -> "Figure":
    """A line of images for each text and model, best first; the text's own image has a frame."""
    top = min(TOP, len(pool))
    figure = _figure(0.9 * top + 1.2, (0.95 * len(encoders) + 0.35) * len(queries))
    subfigures = figure.subfigures(len(queries), 1, squeeze=False)[:, 0]
    for subfigure, (own_row, text) in zip(subfigures, queries, strict=True):
        subfigure.suptitle(textwrap.shorten(text, 100), fontsize=9, x=0.02, ha="left", parse_math=False)
        grid = subfigure.subplots(len(encoders), top, squeeze=False)
        for line, (encoder, embeddings) in enumerate(zip(encoders, images, strict=True)):
            scores = embeddings @ embed_texts(encoder, [text])[0]
            best = scores.argsort(descending=True, stable=True)[:top].tolist()
            for axis, place in zip(grid[line], best, strict=True):
                _picture(axis, manifest, pool[place], frame=RIGHT if pool[place] == own_row else "")
            grid[line][0].set_ylabel(
                textwrap.fill(encoder.name, 14), fontsize=7, rotation=0, ha="right", va="center"
            )
    return figure


# ----------------------------------------------------------------------------------------------------
# Figure 3: the most likely classes


def _bars(axis: "Axes", probabilities: "Tensor", words: Sequence[str], right: int) -> None:
    """The most likely classes, the first on top, the right one in color."""
    best = probabilities.argsort(descending=True, stable=True)[:BARS].tolist()
    places = range(len(best))
    axis.barh(
        places, [float(probabilities[i]) for i in best], color=[RIGHT if i == right else WRONG for i in best]
    )
    for place, i in zip(places, best, strict=True):
        label = f"{textwrap.shorten(words[i], 36)}  {100 * float(probabilities[i]):.0f} %"
        axis.text(0.01, place, label, va="center", fontsize=7, parse_math=False)
    axis.set(xlim=(0, 1), xticks=[], yticks=[])
    axis.invert_yaxis()


# ----------------------------------------------------------------------------------------------------
# Figure 4: similarities of pairs


def _similarities(
    encoders: Sequence[Encoder],
    manifest: Manifest,
    pool: list[int],
    images: "list[Tensor]",
    pairs: list[tuple[int, str]],
) -> "Figure":
    """Cosines of each text (line) and each image (column), one matrix per model, all on one color scale."""
    texts = [text for _, text in pairs]
    places = [pool.index(row) for row, _ in pairs]
    matrices = [
        (embed_texts(encoder, texts) @ embeddings[places].T).numpy()
        for encoder, embeddings in zip(encoders, images, strict=True)
    ]
    low, high = min(matrix.min() for matrix in matrices), max(matrix.max() for matrix in matrices)
    size = len(pairs)
    figure = _figure(2.6 + 0.62 * size * len(encoders), 0.62 * size + 1.4)
    grid = figure.subplots(2, len(encoders), squeeze=False, height_ratios=[1, size], sharex="col")
    for column, (encoder, matrix) in enumerate(zip(encoders, matrices, strict=True)):
        strip, axis = grid[0][column], grid[1][column]
        for i, (row, _) in enumerate(pairs):
            picture = np.asarray(_thumbnail(manifest, row))
            strip.imshow(picture, extent=(i - 0.45, i + 0.45, 0, 0.9), aspect="equal")
        strip.set(ylim=(0, 0.9), xlim=(-0.5, size - 0.5))
        strip.axis("off")
        strip.set_title(encoder.name, fontsize=9)
        axis.imshow(matrix, vmin=low, vmax=high, cmap="viridis", aspect="equal")
        for (i, j), value in np.ndenumerate(matrix):
            color = "black" if value > (low + high) / 2 else "white"
            axis.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=7, color=color)
        axis.set_xticks([])
        axis.set_yticks([])
        if column == 0:
            lines = [textwrap.fill(textwrap.shorten(text, 60), 30) for text in texts]
            axis.set_yticks(range(size), lines, fontsize=7, parse_math=False)
    return figure


# ----------------------------------------------------------------------------------------------------
# Shared parts


def _captions(manifest: Manifest, rows: Sequence[int]) -> dict[int, str]:
    """The first text that is not empty, for each row that has one."""
    texts = manifest.column("texts")
    return {
        row: next(text for text in texts[row] if text.strip())
        for row in rows
        if any(map(str.strip, texts[row]))
    }


def _draw(rows: Sequence[int], count: int, *, ordered: bool = True) -> list[int]:
    """Draw `count` rows with the seed."""
    drawn = np.random.default_rng(SEED).permutation(len(rows))[:count].tolist()
    return [rows[i] for i in (sorted(drawn) if ordered else drawn)]


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _thumbnail(manifest: Manifest, row: int) -> "Image.Image":
    """An image on a white square."""
    from PIL import Image, ImageOps

    picture = read_image(manifest, manifest.row(row), at_least=128)
    return ImageOps.pad(picture, (128, 128), method=Image.Resampling.BICUBIC, color="white")


def _picture(axis: "Axes", manifest: Manifest, row: int, *, frame: str = "") -> None:
    """An image without ticks, in a frame of that color."""
    axis.imshow(_thumbnail(manifest, row))
    axis.set(xticks=[], yticks=[])
    for side in axis.spines.values():
        side.set(visible=bool(frame), color=frame or "white", linewidth=3)


def _save(figure: "Figure", path: Path) -> None:
    """Write a figure as PNG."""
    import io

    from teachercache.core.leftovers import sweep_beside
    from teachercache.core.paths import write_whole

    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110, format="png")
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep_beside(path)
    write_whole(path, buffer.getvalue())
