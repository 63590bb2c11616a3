"""Measure encoders on every published data set below a folder (`--task all`), as in PSD's evaluation.

Zero-shot classification with the prompts of PSD's supplement (table 4), linear probes on sets that have training
images, retrieval, and the compositional sets. Sets that are missing or unreadable are skipped with a reason. ImageNet-O
contains out-of-distribution classes: besides its accuracy, which PSD's table reports, AUPR measures how well the largest
of the 200 softmax probabilities separates its images from ImageNet's validation images of those classes.
"""

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from evaluation.data import classification as datasets
from evaluation.data.classification import LabeledSet
from evaluation.data.prompts import CALTECH, CIFAR, IMAGENET_PLUS, fill
from evaluation.data.splits import TEST_FIRST, known_splits, rows_in
from evaluation.metrics.ranking import accuracies, average_precision
from evaluation.metrics.robustness import effective_robustness, read_baselines
from evaluation.models.encoder import Encoder
from evaluation.models.matcher import of_encoder
from evaluation.results.run import Result, result_of
from evaluation.tasks.encoding.linear_probe import evaluate as linear_probe
from evaluation.tasks.encoding.retrieval import evaluate as retrieve
from evaluation.tasks.encoding.zeroshot import class_scores
from evaluation.tasks.registry import TASKS
from evaluation.tasks.task import Metrics
from teachercache.core.errors import UserError
from teachercache.core.paths import closest_path
from teachercache.core.progress import say
from teachercache.data.manifest import Manifest
from teachercache.data.read import read_manifest

CLASSIFICATION = TASKS["zeroshot_classification"].name
RETRIEVAL = TASKS["zeroshot_retrieval"].name
PROBE = TASKS["linear_probe"].name
IMAGENET = "imagenet1k"
Read = Callable[[Path, Path], LabeledSet]


@dataclasses.dataclass(frozen=True)
class Labeled:
    """A classification set: where it lies, its reader, its prompts, and what is reported about it."""

    marker: str  # a path that exists where the set is
    read: Read
    templates: tuple[str, ...] = IMAGENET_PLUS
    border: int = 0  # pixels cut off on each side
    per_class: bool = False  # papers report the mean per class instead of the accuracy
    wnids: bool = (
        False  # its classes are ImageNet's: its accuracy is compared with ImageNet's on the same classes
    )
    unknown_classes: bool = False  # its images show none of its classes: AUPR
    imagenet_labels: Callable[[Path], set[str]] | None = (
        None  # the labels that ImageNet has too, from the folder
    )


@dataclasses.dataclass(frozen=True)
class Captioned:
    """A retrieval set: its file, how many captions of an image count, and the size of its folds."""

    marker: str
    captions: int | None = None
    fold: int = 0


def imagenet_folder(folder: str, *, unknown_classes: bool = False) -> Labeled:
    """Describe a set of ImageNet's family by the name of its folder."""
    return Labeled(
        folder,
        lambda root, scratch: datasets.read_wnids(root / folder),
        wnids=True,
        unknown_classes=unknown_classes,
    )


LABELED: dict[str, Labeled] = {
    "cifar10": Labeled("cifar-10-batches-py", datasets.read_cifar10, CIFAR),
    "cifar100": Labeled("cifar-100-python", datasets.read_cifar100, CIFAR),
    "caltech101": Labeled("101_ObjectCategories", datasets.read_caltech101, CALTECH, per_class=True),
    "food101": Labeled("food-101", datasets.read_food101),
    "pets": Labeled("annotations/trainval.txt", datasets.read_pets, per_class=True),
    "birdsnap": Labeled("test_images.txt", datasets.read_birdsnap),
    "places365": Labeled("places365_val.txt", datasets.read_places365),
    "objectnet": Labeled(
        "objectnet-1.0",
        datasets.read_objectnet,
        border=2,  # a red line of 2 pixels
        imagenet_labels=lambda root: datasets.in_imagenet(root / "objectnet-1.0"),
    ),
    IMAGENET: Labeled("val/n[0-9]*", lambda root, scratch: datasets.read_wnids(root / "val"), wnids=True),
    "imagenet-a": imagenet_folder("imagenet-a"),
    "imagenet-o": imagenet_folder("imagenet-o", unknown_classes=True),
    "imagenet-r": imagenet_folder("imagenet-r"),
    "imagenetv2": imagenet_folder("imagenetv2-matched-frequency-format-val"),
    "imagenetv2-threshold0.7": imagenet_folder("imagenetv2-threshold0.7-format-val"),
    "imagenetv2-top-images": imagenet_folder("imagenetv2-top-images-format-val"),
    "imagenet_sketch": imagenet_folder("sketch"),
}
CAPTIONED: dict[str, Captioned] = {
    "mscoco_captions": Captioned("dataset_coco.json", captions=5, fold=1000),
    "flickr30k": Captioned("dataset_flickr30k.json", captions=5),
    "cc3m": Captioned("Validation_GCC-1.1.0-Validation.tsv"),
}
COMPOSED = {  # task -> paths, one of which exists where its set is
    "winoground": ("data/examples.jsonl", "data/test-*.parquet"),
    "aro": ("visual_genome_relation.json", "visual_genome_attribution.json"),
    "sugar_crepe": ("swap_att.json", "replace_att.json"),
}
# Distribution shifts of ImageNet: the sets that effective robustness is computed on
SHIFTED = tuple(
    name
    for name, labeled in LABELED.items()
    if labeled.wnids and not labeled.unknown_classes and name != IMAGENET
)


@dataclasses.dataclass
class Report:
    """The results in clip-benchmark's JSON form, and what was skipped and why."""

    results: list[Result] = dataclasses.field(default_factory=list)
    skipped: list[dict[str, str]] = dataclasses.field(default_factory=list)

    def add(self, dataset: str, task: str, encoder: Encoder, metrics: Metrics) -> None:
        """Append a result."""
        self.results.append(result_of(task, encoder, dataset, metrics))

    @contextlib.contextmanager
    def skipping(self, dataset: str, task: str, model: str = "") -> Iterator[None]:
        """Record a UserError raised inside the block as skipped, and go on."""
        try:
            yield
        except UserError as error:
            self.skipped.append({"dataset": dataset, "task": task, "model": model, "reason": str(error)})
            say(f"skipped {dataset} {task} {model}".rstrip() + f": {error}")


# Called after each set with: the models as they saw it, its name, its manifest, the measured rows, and the names of its
# classes (empty for a set with captions)
Seen = Callable[[Sequence[Encoder], str, Manifest, list[int], Mapping[str, str]], None]


# ----------------------------------------------------------------------------------------------------
# The suite


def run_suite(encoders: Sequence[Encoder], root: Path, *, seen: Seen | None = None) -> Report:
    """Measure encoders on all sets below a folder.

    Args:
        encoders: The models.
        root: The folder that holds the data sets' own folders, up to two levels deep.
        seen: Called after each set, to draw figures.

    Raises:
        UserError: If the folder holds no known data set.
    """
    report = Report()
    if not root.is_dir():
        raise UserError(
            f"no folder {root}: {closest_path(root)}--task all needs the folder that holds the data sets' own folders"
        )
    _classification(report, encoders, root, seen)
    _retrieval(report, encoders, root, seen)
    for name, markers in COMPOSED.items():
        with report.skipping(name, name):
            folder = locate_any(root, markers)
            for encoder in encoders:
                with report.skipping(name, name, encoder.name):
                    report.add(name, name, encoder, TASKS[name].function(of_encoder(encoder), folder))
    _robustness(report, root)
    if not report.results:
        raise UserError(
            f"nothing below {root} is a known data set: docs/how-to/evaluate.md lists their folders"
        )
    return report


def _classification(report: Report, encoders: Sequence[Encoder], root: Path, seen: Seen | None) -> None:
    """Zero-shot classification and linear probes on every labeled set."""
    imagenet: dict[str, Scores] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, labeled in LABELED.items():
            with report.skipping(name, CLASSIFICATION):
                say(f"{name} ...")
                folder = locate(root, labeled.marker)
                content = labeled.read(folder, Path(scratch))
                for encoder in encoders:
                    with report.skipping(name, CLASSIFICATION, encoder.name):
                        _classify(report, name, encoder, content, folder, imagenet)
                    with report.skipping(name, PROBE, encoder.name):
                        _probe(report, name, encoder, content)
                if seen:
                    shown = [without_border(encoder, labeled.border) for encoder in encoders]
                    seen(shown, name, content.manifest, measured_rows(content), content.names)


def _retrieval(report: Report, encoders: Sequence[Encoder], root: Path, seen: Seen | None) -> None:
    """Retrieval on every captioned set."""
    for name, captioned in CAPTIONED.items():
        with report.skipping(name, RETRIEVAL):
            manifest = read_manifest(str(locate(root, captioned.marker) / captioned.marker))
            present = set(known_splits(manifest))
            split = next((split for split in TEST_FIRST if split in present), "test")
            for encoder in encoders:
                metrics = retrieve(encoder, manifest, split, captions=captioned.captions, fold=captioned.fold)
                report.add(name, RETRIEVAL, encoder, metrics)
            if seen:
                seen(encoders, name, manifest, rows_in(manifest, split).tolist(), {})


def locate(root: Path, marker: str) -> Path:
    """Return the folder that holds `marker`: `root`, or a folder at most two levels below it.

    Raises:
        UserError: If there is none.
    """
    depth = len(Path(marker).parts)
    for pattern in (marker, f"*/{marker}", f"*/*/{marker}"):
        hits = sorted(root.glob(pattern))
        if hits:
            return hits[0].parents[depth - 1]
    raise UserError(f"there is no {marker} in {root} or in a folder below it")


def locate_any(root: Path, markers: Sequence[str]) -> Path:
    """Return the folder that holds the first of the markers that exists.

    Raises:
        UserError: If there is none.
    """
    for marker in markers:
        with contextlib.suppress(UserError):
            return locate(root, marker)
    raise UserError(f"there is no {' or '.join(markers)} in {root} or in a folder below it")


def measured_rows(content: LabeledSet) -> list[int]:
    """Return the rows that zero-shot classification measures."""
    if content.whole:
        return list(range(len(content.manifest)))
    return rows_in(content.manifest, "test").tolist()


def without_border(encoder: Encoder, border: int) -> Encoder:
    """Return the encoder with a view that first cuts `border` pixels off each side of an image."""
    if not border:
        return encoder

    def view(picture: Image.Image) -> Tensor:
        return encoder.view(picture.crop((border, border, picture.width - border, picture.height - border)))

    return dataclasses.replace(encoder, view=view)


# ----------------------------------------------------------------------------------------------------
# One set, one model


@dataclasses.dataclass(frozen=True)
class Scores:
    """Cosines [n, classes] of a set's images and classes, the target columns [n], and the class of each column."""

    cosines: Tensor
    target: Tensor
    places: tuple[int, ...]  # of each column among ImageNet's 1,000 classes, or among the set's own

    def restricted(self, places: Sequence[int]) -> "Scores":
        """Return the scores of some classes: their images, their columns.

        Raises:
            UserError: If one of the classes is missing.
        """
        column_of = {place: i for i, place in enumerate(self.places)}
        if missing := set(places) - set(column_of):
            raise UserError(f"{len(missing)} of its classes are missing in the set that it is compared with")
        columns = torch.tensor([column_of[place] for place in places])
        rows = torch.isin(self.target, columns)
        renumbered = torch.full((len(self.places),), -1).index_put((columns,), torch.arange(len(columns)))
        return Scores(self.cosines[rows][:, columns], renumbered[self.target[rows]], tuple(places))


def _classify(
    report: Report,
    name: str,
    encoder: Encoder,
    content: LabeledSet,
    folder: Path,
    imagenet: dict[str, Scores],
) -> None:
    """Zero-shot classification, and the additional metrics of this kind of set."""
    labeled = LABELED[name]
    cosines, target, skipped = class_scores(
        without_border(encoder, labeled.border),
        content.manifest,
        measured_rows(content),
        content.names,
        labeled.templates,
        fill,
    )
    metrics: Metrics = {
        **accuracies(cosines, target),
        "num_images": len(cosines),
        "num_classes": len(content.names),
        "num_skipped": skipped,
    }
    labels = tuple(content.names)
    if labeled.imagenet_labels:
        shared = labeled.imagenet_labels(folder)
        columns = [i for i, label in enumerate(labels) if label in shared]
        subset = Scores(cosines, target, tuple(range(len(labels)))).restricted(columns)
        metrics["acc1_imagenet_classes"] = accuracies(subset.cosines, subset.target)["acc1"]
    if labeled.wnids:
        places = datasets.class_places(labels, content.manifest.data)
        scores = Scores(cosines, target, tuple(places[label] for label in labels))
        if name == IMAGENET:
            imagenet[_identity(encoder)] = scores
        elif _identity(encoder) in imagenet:
            with report.skipping(name, "imagenet1k_acc1", encoder.name):
                same_classes = imagenet[_identity(encoder)].restricted(scores.places)
                metrics["imagenet1k_acc1"] = accuracies(same_classes.cosines, same_classes.target)["acc1"]
                if labeled.unknown_classes:
                    metrics["aupr"] = out_of_distribution(same_classes.cosines, cosines, encoder.scale)
    report.add(name, CLASSIFICATION, encoder, metrics)


def _identity(encoder: Encoder) -> str:
    return f"{encoder.name} {encoder.pretrained}"


def out_of_distribution(in_distribution: Tensor, unknown: Tensor, scale: float) -> float:
    """Return the AUPR of detecting images of unknown classes by a small maximum softmax probability.

    Args:
        in_distribution: Cosines [n, classes] of images of the classes.
        unknown: Cosines [m, classes] of images of other classes.
        scale: Multiplies the cosines in the softmax.
    """
    largest = torch.cat(
        [(scale * cosines.double()).softmax(1).amax(1) for cosines in (unknown, in_distribution)]
    )
    return average_precision(-largest, torch.arange(len(largest)) < len(unknown))


def _probe(report: Report, name: str, encoder: Encoder, content: LabeledSet) -> None:
    """A linear probe, if the set's training images are read."""
    if "train" not in set(known_splits(content.manifest)):
        raise UserError(
            "its training images are not read here: `--task linear_probe --data FOLDER` takes any folder"
        )
    report.add(name, PROBE, encoder, linear_probe(encoder, content.manifest))


def _robustness(report: Report, root: Path) -> None:
    """Effective robustness of each result on a shifted set, if there is a table of standard models."""
    shifted = [result for result in report.results if result["dataset"] in SHIFTED]
    if not shifted:
        return
    path = root / "baselines.csv"
    with report.skipping("imagenet shifts", "effective_robustness"):
        if not path.exists():
            raise UserError(
                f"no {path} with the accuracies of standard models: see evaluation/metrics/robustness.py"
            )
        points = read_baselines(path)
        for result in shifted:
            with report.skipping(result["dataset"], "effective_robustness", result["model"]):
                metrics = result["metrics"]
                inside, accuracy = metrics.get("imagenet1k_acc1"), metrics.get("acc1")
                if not isinstance(inside, float) or not isinstance(accuracy, float):
                    raise UserError("ImageNet's own validation was not measured")
                metrics["effective_robustness"] = effective_robustness(
                    inside, accuracy, points.get(result["dataset"], [])
                )
