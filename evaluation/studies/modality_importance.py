"""How much a single-stream model looks at picture and text: modality importance, as numbers and as pictures.

    MI_M[layer, head] = mean over rows of  sum over tokens i of modality M of  attention[q, i]

with q the [CLS] token, from which the answer is read (Cao et al. 2020, which CLIP-TD's figures 3 and 4 follow); per
token, the sum over the number of M's tokens in the row. Special tokens belong to neither. Not for dual encoders, whose
towers never look at each other, nor for getting attention out of a model: see scripts/papers/attention.py.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from teachercache.core.errors import UserError
from teachercache.core.paths import stream_whole

WIDTH, LINE, ROW = 96, 0.34, 0.5  # of a drawn text: characters a line, inches a line, inches a heading


@dataclasses.dataclass(frozen=True)
class Importance:
    """Per layer and head [layers, heads]: mass on each modality, and mass per token of it."""

    picture: np.ndarray
    text: np.ndarray
    picture_per_token: np.ndarray
    text_per_token: np.ndarray
    num_rows: int
    num_skipped: int  # rows without a picture or without a text


def importance(parts: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]], query: int = 0) -> Importance:
    """Modality importance over parts: attention [layers, n, heads, queries, length], and which tokens are the picture's
    and which the text's, bool [n, length] each. Parts may differ in n and length; none is kept.

    `query` is whose looks are counted, 0 for [CLS].
    """
    sums: list[Any] = [0.0, 0.0, 0.0, 0.0]
    rows = skipped = 0
    for attention, picture, text in parts:
        looks = np.asarray(attention, np.float64)[:, :, :, query]  # [layers, n, heads, length]
        if not np.allclose(looks.sum(-1), 1, atol=1e-2):
            raise ValueError("attention does not add up to one: pass what comes out of its softmax")
        both = picture.any(1) & text.any(1)
        skipped, rows = skipped + int((~both).sum()), rows + int(both.sum())
        for i, mask in enumerate((picture, text)):
            mass = np.einsum("lnhj,nj->lnh", looks[:, both], mask[both].astype(np.float64))
            sums[i] = sums[i] + mass.sum(1)
            sums[i + 2] = sums[i + 2] + (mass / mask[both].sum(1)[:, None]).sum(1)
    if not rows:
        raise UserError(
            "no row has both a picture and a text: modality importance needs a model that reads both"
        )
    means = [total / rows for total in sums]
    return Importance(means[0], means[1], means[2], means[3], num_rows=rows, num_skipped=skipped)


def as_numbers(found: Importance) -> dict[str, Any]:
    """Lists for JSON: each head's, each layer's mean (CLIP-TD's figure 3), and text minus picture over all."""
    numbers: dict[str, Any] = {"num_rows": found.num_rows, "num_skipped": found.num_skipped}
    for name in ("picture", "text", "picture_per_token", "text_per_token"):
        values = getattr(found, name)
        numbers |= {
            name: values.tolist(),
            f"{name}_by_layer": values.mean(1).tolist(),
            f"{name}_mean": float(values.mean()),
        }
    return numbers | {"difference": difference(found)}


def difference(found: Importance) -> float:
    """Mean over layers of how far text and picture are apart: the area between the lines of CLIP-TD's figure 3."""
    return float(np.abs(found.text.mean(1) - found.picture.mean(1)).mean())


def change(before: Importance, after: Importance) -> dict[str, float]:
    """By which share the difference shrank and the picture gained: CLIP-TD reports .36 and .106 on VCR."""
    return {
        "difference_reduction": 1 - difference(after) / difference(before),
        "picture_gain": float(after.picture.mean() / before.picture.mean() - 1),
    }


# ----------------------------------------------------------------------------------------------------
# Pictures


def draw_importance(found: Mapping[str, Importance], out: Path, *, per_token: bool = False) -> Path:
    """A PNG: for each model two heatmaps of layers by heads, picture and text, all of one scale."""
    plt = _pyplot()
    kinds = [f"{name}{'_per_token' if per_token else ''}" for name in ("picture", "text")]
    top = max(getattr(one, kind).max() for one in found.values() for kind in kinds)
    layers, heads = next(iter(found.values())).picture.shape
    size = (max(3.0, 0.32 * heads + 1.2), max(2.0, 0.26 * layers + 1.1))
    figure, axes = plt.subplots(
        len(found), 2, figsize=(2 * size[0] + 0.8, len(found) * size[1]), squeeze=False, layout="constrained"
    )
    for row, (name, one) in zip(axes, found.items(), strict=True):
        for axis, kind in zip(row, kinds, strict=True):
            values = getattr(one, kind)
            drawn = axis.imshow(values, vmin=0, vmax=top, cmap="viridis", aspect="auto", origin="lower")
            axis.set_title(f"{name}: {kind.replace('_', ' ')}, mean {values.mean():.3g}", fontsize=9)
            axis.set_xticks(range(heads), [str(k + 1) for k in range(heads)], fontsize=7)
            axis.set_yticks(range(layers), [str(k + 1) for k in range(layers)], fontsize=7)
            axis.set_xlabel("head", fontsize=8)
            axis.set_ylabel("layer", fontsize=8)
    figure.colorbar(
        drawn, ax=axes, label="attention from [CLS]" + (" per token" if per_token else ""), shrink=0.8
    )
    return _save(plt, figure, out)


def draw_token_scores(
    text: str,
    scores: Mapping[str, tuple[Int[np.ndarray, "l 2"], Float[np.ndarray, " l"]]],
    out: Path,
    *,
    title: str = "",
) -> Path:
    """A PNG: the text once for each row of (character spans, scores), the more score the darker behind the word.

    Spans 0, 0 are no words. Each row's darkest is its highest score: rows are compared by order, not by height.
    """
    plt = _pyplot()
    lines = wrapped(text)
    height = len(scores) * (ROW + LINE * len(lines)) + (0.4 if title else 0.1)
    figure = plt.figure(figsize=(0.1 * WIDTH + 0.4, height))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set(xlim=(-2, WIDTH + 2), ylim=(0, height))
    axis.axis("off")
    y = height - (0.4 if title else 0.1)
    axis.text(0, height - 0.25, title, fontsize=9, color="0.3")
    for name, (spans, values) in scores.items():
        shade = _shades(len(text), spans, values)
        told = np.asarray(values)[np.asarray(spans)[:, 1] > 0]
        span = f"{told.min():.3g} to {told.max():.3g}" if len(told) else "no words"
        axis.text(0, y - 0.24, f"{name} ({span})", fontsize=9)
        y -= ROW - 0.18
        for start, end in lines:
            y -= LINE
            for i in range(start, end):
                shaded = plt.cm.Oranges(shade[i]) if shade[i] else "white"
                axis.add_patch(plt.Rectangle((i - start, y - 0.08), 1, LINE - 0.04, color=shaded, lw=0))
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
    return _save(plt, figure, out)


def wrapped(text: str) -> list[tuple[int, int]]:
    """Where each drawn line of a text begins and ends: WIDTH characters at most, broken at spaces where it has some."""
    lines, start = [], 0
    while len(text) - start > WIDTH:
        space = text.rfind(" ", start + 1, start + WIDTH + 1)
        end = space if space > start else start + WIDTH
        lines.append((start, end))
        start = end + 1 if space > start else end
    return [*lines, (start, len(text))]


def _shades(length: int, spans: np.ndarray, values: np.ndarray) -> np.ndarray:
    """How dark each character is, 0 to .85: a word's share of the highest score."""
    shade = np.zeros(length)
    spans, values = (
        np.asarray(spans),
        np.where(np.asarray(spans)[:, 1] > 0, values, 0.0),
    )  # not what [CLS] has itself
    top = max(float(values.max(initial=0)), 1e-12)
    for (start, end), value in zip(spans.tolist(), values.tolist(), strict=True):
        shade[start:end] = np.maximum(shade[start:end], 0.85 * max(value, 0) / top)
    return shade


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _save(plt: Any, figure: Any, out: Path) -> Path:
    stream_whole(out, lambda file: figure.savefig(file, format="png", dpi=130))
    plt.close(figure)
    return out
