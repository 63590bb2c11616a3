"""Zero-shot classification: each folder (or label) is a class, with an ensemble of prompts (CLIP, section 3.1)."""

import unicodedata
from collections.abc import Callable, Container, Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from evaluation.data.files import file_lines
from evaluation.data.splits import others_than, rows_or_only_split
from evaluation.metrics.ranking import accuracies
from evaluation.models.encoder import Encoder, embed_images, embed_texts
from evaluation.tasks.task import Metrics
from teachercache.core.errors import UserError
from teachercache.core.progress import say
from teachercache.data.manifest import Manifest

Fill = Callable[[str, str], str]  # (template, class name) -> prompt
TEMPLATES = ("a picture of {}.", "a photo of {}.", "a drawing of {}.", "{}.")


def evaluate(encoder: Encoder, manifest: Manifest, split: str = "test") -> Metrics:
    """Compute acc1, acc5 and mean_per_class_recall over a split, with clip-benchmark's keys.

    Raises:
        UserError: If the split has no rows or no labels.
    """
    labels = manifest.column("label")
    split_rows = rows_or_only_split(manifest, split).tolist()
    if not split_rows:
        raise UserError(
            f"{manifest.data} has no {split} rows{others_than(manifest, split)}: give it a folder `{split}`, or pass "
            "other --data"
        )
    rows = [row for row in split_rows if labels[row]]
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
) -> Metrics:
    """Compute the metrics of labeled rows; see `class_scores` for the arguments."""
    scores, target, num_skipped = class_scores(encoder, manifest, rows, names, templates)
    return {
        **accuracies(scores, target),
        "num_images": len(scores),
        "num_classes": len(names),
        "num_skipped": num_skipped,
    }


def class_scores(
    encoder: Encoder,
    manifest: Manifest,
    rows: Sequence[int],
    names: Mapping[str, str],
    templates: Sequence[str],
    fill: Fill = str.format,
) -> tuple[Float[Tensor, "n classes"], Int[Tensor, " n"], int]:
    """Compute the cosines of images and classes.

    Args:
        encoder: The model.
        manifest: The data.
        rows: Rows with a label in `names`.
        names: The classes in the order of the columns: label -> name.
        templates: Prompts with a place for the name.
        fill: Puts a name into a template.

    Returns:
        Cosines of the readable rows and the classes, the columns of their labels, and the number of unreadable rows.
    """
    labels, column_of = manifest.column("label"), {label: i for i, label in enumerate(names)}
    images, kept, skipped = embed_images(encoder, manifest, list(rows))
    for line in shared_names(names):
        say(f"WARNING: {manifest.data}: {line}")
    weights = classifier(encoder, list(names.values()), templates, fill)
    return images @ weights.T, torch.tensor([column_of[labels[row]] for row in kept]), len(skipped)


def shared_names(names: Mapping[str, str]) -> list[str]:
    """Return a line for each name that several classes share: they tie on every image, and ties count as misses.

    Names are compared without case and repeated spaces, as most tokenizers read them.

    Args:
        names: label -> name.
    """
    labels: dict[str, list[str]] = {}
    for label, name in names.items():
        read = " ".join(unicodedata.normalize("NFKC", name).casefold().split())
        labels.setdefault(read, []).append(label)
    return [
        f"the classes {', '.join(map(repr, same))} have the same name {name!r}, so no picture of them can be told apart "
        "and every one is a miss: name them in classnames.txt, a line `label<TAB>name` each"
        for name, same in labels.items()
        if len(same) > 1
    ]


def classifier(
    encoder: Encoder, names: Sequence[str], templates: Sequence[str], fill: Fill = str.format
) -> Float[Tensor, "classes dim"]:
    """Return one unit vector per class: the normalized mean of the unit embeddings of its prompts."""
    texts = [fill(template, name) for name in names for template in templates]
    embeddings = embed_texts(encoder, texts).reshape(len(names), len(templates), -1)
    return normalize(embeddings.mean(1), dim=1)


def class_names(manifest: Manifest) -> dict[str, str]:
    """Return a name for each label: from classnames.txt if the label is there, otherwise from the label itself."""
    labels = sorted(set(manifest.column("label")) - {""})
    names = {label: label.split("/")[-1].replace("_", " ") for label in labels}
    return names | names_beside_data(manifest, names)


def names_beside_data(manifest: Manifest, labels: Container[str]) -> dict[str, str]:
    """Read the lines `label<TAB>name` of classnames.txt beside the data; return {} if there is no such file.

    Raises:
        UserError: If a line is malformed or its label is not one of `labels`.
    """
    names: dict[str, str] = {}
    path = manifest.root / "classnames.txt"
    for line in file_lines(path) if path.exists() else ():
        if not line.strip():
            continue
        label, _, name = (part.strip() for part in line.partition("\t"))
        if label not in labels or not name:
            raise UserError(f"{path}: '{line}' is not `label<TAB>name` of a class that occurs")
        if names.get(label, name) != name:
            raise UserError(f"{path} names the class '{label}' twice: '{names[label]}' and '{name}'")
        names[label] = name
    return names
