"""Zero-shot classification: the folder (or label column) is the class, templates are ensembled (CLIP, section 3.1)."""

from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from evaluation.metrics.ranking import accuracies
from evaluation.models.encoder import Encoder, embed_images, embed_texts
from teachercache.core.errors import UserError
from teachercache.data.manifest import Manifest

Fill = Callable[[str, str], str]  # template and name to a prompt
TEMPLATES = ("a picture of {}.", "a photo of {}.", "a drawing of {}.", "{}.")


def evaluate(encoder: Encoder, manifest: Manifest, split: str = "test") -> dict[str, Any]:
    """acc1, acc5 and mean_per_class_recall over a split; keys as clip-benchmark writes them."""
    labels = manifest.column("label")
    chosen = manifest.rows_of_split(split).tolist()
    if not chosen:
        raise UserError(
            f"{manifest.data} has no {split} rows: give it a folder `{split}`, or pass other --data"
        )
    rows = [row for row in chosen if labels[row]]
    if not rows:
        raise UserError(f"{manifest.data} has no labels: zero-shot classification needs a folder per class")
    names = class_names(manifest)
    return classify(encoder, manifest, rows, {label: names[label] for label in sorted(names)}, TEMPLATES)


def classify(
    encoder: Encoder,
    manifest: Manifest,
    rows: Sequence[int],
    names: Mapping[str, str],
    templates: Sequence[str],
    fill: Fill = str.format,
) -> dict[str, Any]:
    """Metrics of labelled rows; the labels of `names` compete, in that order."""
    scores, target, skipped = class_scores(encoder, manifest, rows, names, templates, fill)
    return {
        **accuracies(scores, target),
        "num_images": len(scores),
        "num_classes": len(names),
        "num_skipped": skipped,
    }


def class_scores(
    encoder: Encoder,
    manifest: Manifest,
    rows: Sequence[int],
    names: Mapping[str, str],
    templates: Sequence[str],
    fill: Fill = str.format,
) -> tuple[Float[Tensor, "n classes"], Int[Tensor, " n"], int]:
    """Cosines of the rows that can be read to each class, their classes, and how many rows cannot be read."""
    labels, column = manifest.column("label"), {label: i for i, label in enumerate(names)}
    images, kept, skipped = embed_images(encoder, manifest, list(rows))
    weights = classifier(encoder, list(names.values()), templates, fill)
    return images @ weights.T, torch.tensor([column[labels[row]] for row in kept]), len(skipped)


def classifier(
    encoder: Encoder, names: Sequence[str], templates: Sequence[str], fill: Fill = str.format
) -> Float[Tensor, "classes dim"]:
    """One unit vector per class: the mean over templates of unit text embeddings, normalised again."""
    texts = [fill(template, name) for name in names for template in templates]
    embeddings = embed_texts(encoder, texts).reshape(len(names), len(templates), -1)
    return normalize(embeddings.mean(1), dim=1)


def class_names(manifest: Manifest) -> dict[str, str]:
    """Label to words: lines `label<TAB>name` of classnames.txt beside the data, else the label itself."""
    labels = sorted(set(manifest.column("label")) - {""})
    names = {label: label.split("/")[-1].replace("_", " ") for label in labels}
    return names | given_names(manifest, names)


def given_names(manifest: Manifest, labels: Container[str]) -> dict[str, str]:
    """What lines `label<TAB>name` of classnames.txt beside the data say; nothing where there is no such file."""
    names: dict[str, str] = {}
    path = manifest.root / "classnames.txt"
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        label, tab, name = line.partition("\t")
        if label not in labels or not tab:
            raise UserError(f"{path}: '{line}' is not `label<TAB>name` of a class that occurs")
        names[label] = name
    return names
