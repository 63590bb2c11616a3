"""Modality importance: how much attention a single-stream model pays to image and text, as numbers and as figures.

    MI_M[layer, head] = mean over rows of  sum over tokens i of modality M of  attention[q, i]

where q is the [CLS] token, from which the answer is predicted (Cao et al. 2020, followed by CLIP-TD's figures 3 and 4).
The value per token divides the sum by the number of M's tokens in the row. Special tokens belong to neither modality.
`scripts/papers/attention.py` extracts the attention of a model.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Int

from teachercache.core.errors import UserError
from teachercache.core.paths import stream_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Of a drawn text: characters per line, inches per line, inches per heading
WIDTH, LINE, ROW = 96, 0.34, 0.5
Heads = Float[np.ndarray, "layers heads"]


@dataclasses.dataclass(frozen=True)
class Importance:
    """Modality importance of each layer and head [layers, heads].

    Attributes:
        picture: Attention mass on the image.
        text: Attention mass on the text.
        picture_per_token: The mass on the image divided by its number of tokens.
        text_per_token: The mass on the text divided by its number of tokens.
        num_rows: Rows with both modalities.
        num_skipped: Rows without an image or without a text.
    """

    picture: Heads
    text: Heads
    picture_per_token: Heads
    text_per_token: Heads
    num_rows: int
    num_skipped: int

    def heads(self) -> dict[str, Heads]:
        """Return the four arrays by name."""
        return {
            "picture": self.picture,
            "text": self.text,
            "picture_per_token": self.picture_per_token,
            "text_per_token": self.text_per_token,
        }


def importance(batches: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]], query: int = 0) -> Importance:
    """Compute modality importance over batches.

    Args:
        batches: Attention [layers, n, heads, queries, length] after the softmax, and the masks of image tokens and of
            text tokens, bool [n, length] each. Batches may differ in n and length; none is kept.
        query: The token whose attention counts, 0 for [CLS].

    Raises:
        ValueError: If attention does not sum to 1.
        UserError: If no row has both an image and a text.
    """
    sums: list[np.ndarray | float] = [0.0, 0.0, 0.0, 0.0]
    rows = skipped = 0
    for attention, picture, text in batches:
        weights = np.asarray(attention, np.float64)[:, :, :, query]  # [layers, n, heads, length]
        if not np.allclose(weights.sum(-1), 1, atol=1e-2):
            raise ValueError("attention does not sum to 1: pass the output of its softmax")
        both = picture.any(1) & text.any(1)
        skipped, rows = skipped + int((~both).sum()), rows + int(both.sum())
        for i, mask in enumerate((picture, text)):
            mass = np.einsum("lnhj,nj->lnh", weights[:, both], mask[both].astype(np.float64))
            sums[i] = sums[i] + mass.sum(1)
            sums[i + 2] = sums[i + 2] + (mass / mask[both].sum(1)[:, None]).sum(1)
    if not rows:
        raise UserError(
            "no row has both a picture and a text: modality importance needs a model that reads both"
        )
    means = [np.asarray(total / rows) for total in sums]
    return Importance(means[0], means[1], means[2], means[3], num_rows=rows, num_skipped=skipped)


def as_numbers(result: Importance) -> dict[str, float | int | list]:
    """Return lists for JSON: each head, the mean of each layer (CLIP-TD's figure 3), and `difference`."""
    numbers: dict[str, float | int | list] = {
        "num_rows": result.num_rows,
        "num_skipped": result.num_skipped,
    }
    for name, values in result.heads().items():
        numbers |= {
            name: values.tolist(),
            f"{name}_by_layer": values.mean(1).tolist(),
            f"{name}_mean": float(values.mean()),
        }
    return numbers | {"difference": difference(result)}


def difference(result: Importance) -> float:
    """Return the mean over layers of |text - image|, the area between the lines of CLIP-TD's figure 3."""
    return float(np.abs(result.text.mean(1) - result.picture.mean(1)).mean())


def change(before: Importance, after: Importance) -> dict[str, float]:
    """Return the relative reduction of the difference and gain of the image; CLIP-TD reports .36 and .106 on VCR."""
    return {
        "difference_reduction": 1 - difference(after) / difference(before),
        "picture_gain": float(after.picture.mean() / before.picture.mean() - 1),
    }


# ----------------------------------------------------------------------------------------------------
# Figures


def draw_importance(results: Mapping[str, Importance], out: Path, *, per_token: bool = False) -> Path:
    """Draw two heatmaps of layers by heads for each model, image and text, all on one scale.

    Args:
        results: Model name -> importance.
        out: The PNG to write.
        per_token: Draw the values per token.
    """
    from matplotlib.figure import Figure

    kinds = [f"{name}{'_per_token' if per_token else ''}" for name in ("picture", "text")]
    top = max(result.heads()[kind].max() for result in results.values() for kind in kinds)
    layers, heads = next(iter(results.values())).picture.shape
    size = (max(3.0, 0.32 * heads + 1.2), max(2.0, 0.26 * layers + 1.1))
    figure = Figure(figsize=(2 * size[0] + 0.8, len(results) * size[1]), layout="constrained")
    axes = figure.subplots(len(results), 2, squeeze=False)
    for row, (name, result) in zip(axes, results.items(), strict=True):
        for axis, kind in zip(row, kinds, strict=True):
            values = result.heads()[kind]
            image = axis.imshow(values, vmin=0, vmax=top, cmap="viridis", aspect="auto", origin="lower")
            axis.set_title(f"{name}: {kind.replace('_', ' ')}, mean {values.mean():.3g}", fontsize=9)
            axis.set_xticks(range(heads), [str(k + 1) for k in range(heads)], fontsize=7)
            axis.set_yticks(range(layers), [str(k + 1) for k in range(layers)], fontsize=7)
            axis.set_xlabel("head", fontsize=8)
            axis.set_ylabel("layer", fontsize=8)
    figure.colorbar(
        image, ax=axes, label="attention from [CLS]" + (" per token" if per_token else ""), shrink=0.8
    )
    return _save(figure, out)


def draw_token_scores(
    text: str,
    scores: Mapping[str, tuple[Int[np.ndarray, "l 2"], Float[np.ndarray, " l"]]],
    out: Path,
    *,
    title: str = "",
) -> Path:
    """Draw a text once for each row of scores, with a darker background behind words with higher scores.

    Args:
        text: The text.
        scores: Heading -> (character spans, scores) of tokens. Spans (0, 0) are no words. The highest score of a row
            has the darkest background, so rows are comparable in their order, not in their values.
        out: The PNG to write.
        title: Title of the figure.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    lines = wrapped(text)
    height = len(scores) * (ROW + LINE * len(lines)) + (0.4 if title else 0.1)
    figure = Figure(figsize=(0.1 * WIDTH + 0.4, height))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set(xlim=(-2, WIDTH + 2), ylim=(0, height))
    axis.axis("off")
    y = height - (0.4 if title else 0.1)
    axis.text(0, height - 0.25, title, fontsize=9, color="0.3")
    for name, (spans, values) in scores.items():
        shade = _shades(len(text), spans, values)
        of_words = np.asarray(values)[np.asarray(spans)[:, 1] > 0]
        extent = f"{of_words.min():.3g} to {of_words.max():.3g}" if len(of_words) else "no words"
        axis.text(0, y - 0.24, f"{name} ({extent})", fontsize=9)
        y -= ROW - 0.18
        for start, end in lines:
            y -= LINE
            for i in range(start, end):
                shaded = matplotlib.colormaps["Oranges"](shade[i]) if shade[i] else "white"
                axis.add_patch(Rectangle((i - start, y - 0.08), 1, LINE - 0.04, color=shaded, lw=0))
                axis.text(
                    i - start + 0.5,
                    y,
                    text[i],
                    family="monospace",
                    fontsize=10,
                    ha="center",
                    color="white" if shade[i] > 0.6 else "black",
                )
        y -= 0.18
    return _save(figure, out)


def wrapped(text: str) -> list[tuple[int, int]]:
    """Return begin and end of each drawn line of a text: at most WIDTH characters, broken at spaces if possible."""
    lines, start = [], 0
    while len(text) - start > WIDTH:
        space = text.rfind(" ", start + 1, start + WIDTH + 1)
        end = space if space > start else start + WIDTH
        lines.append((start, end))
        start = end + 1 if space > start else end
    return [*lines, (start, len(text))]


def _shades(length: int, spans: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Darkness of each character, 0 to 0.85: a word's share of the highest score."""
    shade = np.zeros(length)
    spans = np.asarray(spans)
    values = np.where(spans[:, 1] > 0, values, 0.0)  # without the score of [CLS] itself
    top = max(float(values.max(initial=0)), 1e-12)
    for (start, end), value in zip(spans.tolist(), values.tolist(), strict=True):
        shade[start:end] = np.maximum(shade[start:end], 0.85 * max(value, 0) / top)
    return shade


def _save(figure: "Figure", out: Path) -> Path:
    """Write a figure as PNG."""
    stream_whole(out, lambda file: figure.savefig(file, format="png", dpi=130))
    return out
