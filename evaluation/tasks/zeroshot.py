"""Zero-shot classification: the folder (or label column) is the class, templates are ensembled (CLIP, section 3.1)."""

from collections.abc import Container, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from evaluation.encoder import Encoder, embed_images, embed_texts
from evaluation.metrics import accuracies
from teachercache.names import UserError
from teachercache.samples import Manifest

TEMPLATES = ("a picture of {}.", "a photo of {}.", "a drawing of {}.", "{}.")


def evaluate(encoder: Encoder, manifest: Manifest, split: str = "test") -> dict[str, Any]:
    """acc1, acc5 and mean_per_class_recall over a split; keys as clip-benchmark writes them."""
    labels = manifest.column("label")
    chosen = manifest.rows_of_split(split).tolist()
    if not chosen:
        raise UserError(f"{manifest.data} has no {split} rows: give it a folder `{split}`, or pass other --data")
    rows = [row for row in chosen if labels[row]]
    if not rows:
        raise UserError(f"{manifest.data} has no labels: zero-shot classification needs a folder per class")
    names = class_names(manifest)
    classes = sorted(names)
    images, kept, skipped = embed_images(encoder, manifest, rows)
    weights = classifier(encoder, [names[label] for label in classes], TEMPLATES)
    target = torch.tensor([classes.index(labels[row]) for row in kept])
    return {
        **accuracies(images @ weights.T, target),
        "num_images": len(images),
        "num_classes": len(classes),
        "num_skipped": len(skipped),
    }


def classifier(encoder: Encoder, names: Sequence[str], templates: Sequence[str]) -> Float[Tensor, "classes dim"]:
    """One unit vector per class: the mean over templates of unit text embeddings, normalised again."""
    texts = [template.format(name) for name in names for template in templates]
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
