"""Every published data set that lies below a folder, one after the other, for several models: PSD's evaluation.

Zero-shot with the prompts of its supplement's table 4, linear probes where a set has training pictures, retrieval. What
is missing or cannot be read is skipped with its reason. ImageNet-O is a set of unknown classes: beside its accuracy,
which PSD's table has, AUPR says how well the largest of 200 softmax probabilities tells it from ImageNet's validation
pictures of those classes. Not for tables and pictures: see `report.py`, `figures.py`.
"""

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from evaluation.data import classification as datasets
from evaluation.data.classification import Found
from evaluation.data.prompts import CALTECH, CIFAR, IMAGENET_PLUS, fill
from evaluation.metrics.ranking import accuracies, average_precision
from evaluation.metrics.robustness import effective_robustness, read_baselines
from evaluation.models.encoder import Encoder
from evaluation.models.matcher import of_encoder
from evaluation.tasks.encoding.retrieval import evaluate as retrieve
from evaluation.tasks.encoding.zeroshot import class_scores
from evaluation.tasks.registry import MATCHED
from evaluation.tasks.registry import find as find_task
from teachercache.core.errors import UserError
from teachercache.core.progress import say
from teachercache.data.manifest import Manifest
from teachercache.data.read import read_manifest

IMAGENET, ZEROSHOT = "imagenet1k", "zeroshot_classification"
Read = Callable[[Path, Path], Found]


@dataclasses.dataclass(frozen=True)
class Labelled:
    """A classification set: the path that says it is there, its reader, its prompts."""

    marker: str
    read: Read
    templates: tuple[str, ...] = IMAGENET_PLUS
    border: int = 0  # pixels cut off on each side


@dataclasses.dataclass(frozen=True)
class Captioned:
    """A retrieval set: the file that says it is there, how many captions of a picture count, the size of its folds."""

    marker: str
    captions: int | None = None
    fold: int = 0


def wnids(folder: str) -> Labelled:
    """A set of ImageNet's family, by the name of its folder."""
    return Labelled(folder, lambda root, scratch: datasets.read_wnids(root / folder))


LABELLED: dict[str, Labelled] = {
    "cifar10": Labelled("cifar-10-batches-py", datasets.read_cifar10, CIFAR),
    "cifar100": Labelled("cifar-100-python", datasets.read_cifar100, CIFAR),
    "caltech101": Labelled("101_ObjectCategories", datasets.read_caltech101, CALTECH),
    "food101": Labelled("food-101", datasets.read_food101),
    "pets": Labelled("annotations/trainval.txt", datasets.read_pets),
    "birdsnap": Labelled("test_images.txt", datasets.read_birdsnap),
    "places365": Labelled("places365_val.txt", datasets.read_places365),
    "objectnet": Labelled("objectnet-1.0", datasets.read_objectnet, border=2),  # a red line of 2 pixels
    IMAGENET: Labelled("val/n[0-9]*", lambda root, scratch: datasets.read_wnids(root / "val")),
    "imagenet-a": wnids("imagenet-a"),
    "imagenet-o": wnids("imagenet-o"),
    "imagenet-r": wnids("imagenet-r"),
    "imagenetv2": wnids("imagenetv2-matched-frequency-format-val"),
    "imagenetv2-threshold0.7": wnids("imagenetv2-threshold0.7-format-val"),
    "imagenetv2-top-images": wnids("imagenetv2-top-images-format-val"),
    "imagenet_sketch": wnids("sketch"),
}
CAPTIONED: dict[str, Captioned] = {
    "mscoco_captions": Captioned("dataset_coco.json", captions=5, fold=1000),
    "flickr30k": Captioned("dataset_flickr30k.json", captions=5),
    "cc3m": Captioned("Validation_GCC-1.1.0-Validation.tsv"),
}
COMPOSED = {  # task -> what says that its set is there
    "winoground": ("data/examples.jsonl", "data/test-*.parquet"),
    "aro": ("visual_genome_relation.json", "visual_genome_attribution.json"),
    "sugar_crepe": ("swap_att.json", "replace_att.json"),
}
SHIFTED = (
    "imagenet-a",
    "imagenet-r",
    "imagenetv2",
    "imagenetv2-threshold0.7",
    "imagenetv2-top-images",
    "imagenet_sketch",
)
OF_IMAGENET = {IMAGENET, "imagenet-o", *SHIFTED}


@dataclasses.dataclass
class Report:
    """What was measured, clip-benchmark's JSON each, and what was skipped and why."""

    results: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    skipped: list[dict[str, str]] = dataclasses.field(default_factory=list)

    def add(self, dataset: str, task: str, encoder: Encoder, metrics: Mapping[str, Any]) -> None:
        """A result."""
        self.results.append(
            {
                "dataset": dataset,
                "model": encoder.name,
                "pretrained": encoder.pretrained,
                "task": task,
                "language": "en",
                "metrics": dict(metrics),
            }
        )

    @contextlib.contextmanager
    def skipping(self, dataset: str, task: str, model: str = "") -> Iterator[None]:
        """A UserError inside is a line among what was skipped."""
        try:
            yield
        except UserError as error:
            self.skipped.append({"dataset": dataset, "task": task, "model": model, "reason": str(error)})
            say(f"skipped {dataset} {task} {model}".rstrip() + f": {error}")


# The models as they saw a set, its name, manifest and rows that count, its classes' names (none where it has captions)
Seen = Callable[[Sequence[Encoder], str, Manifest, list[int], Mapping[str, str]], None]


def run_suite(encoders: Sequence[Encoder], root: Path, *, seen: Seen | None = None) -> Report:
    """All sets below `root`; `seen` is told of each one that could be read."""
    report = Report()
    if not root.is_dir():
        raise UserError(
            f"no folder {root}: --task all wants the folder that holds the data sets' own folders"
        )
    with tempfile.TemporaryDirectory() as scratch:
        imagenet: dict[str, Scores] = {}
        for name, labelled in LABELLED.items():
            with report.skipping(name, ZEROSHOT):
                say(f"{name} ...")
                folder = locate(root, labelled.marker)
                found = labelled.read(folder, Path(scratch))
                for encoder in encoders:
                    with report.skipping(name, ZEROSHOT, encoder.name):
                        _classify(report, name, encoder, found, folder, imagenet)
                    with report.skipping(name, "linear_probe", encoder.name):
                        _probe(report, name, encoder, found)
                if seen:
                    shown = [bordered(each, labelled.border) for each in encoders]
                    seen(shown, name, found.manifest, measured_rows(found), found.names)
    for name, captioned in CAPTIONED.items():
        with report.skipping(name, "zeroshot_retrieval"):
            manifest = read_manifest(str(locate(root, captioned.marker) / captioned.marker))
            split = next((each for each in ("test", "val") if each in set(manifest.column("split"))), "test")
            for encoder in encoders:
                metrics = retrieve(encoder, manifest, split, captions=captioned.captions, fold=captioned.fold)
                report.add(name, "zeroshot_retrieval", encoder, metrics)
            if seen:
                seen(encoders, name, manifest, manifest.rows_of_split(split).tolist(), {})
    for name, markers in COMPOSED.items():
        with report.skipping(name, name):
            folder = locate_any(root, markers)
            for encoder in encoders:
                with report.skipping(name, name, encoder.name):
                    report.add(name, name, encoder, MATCHED[name](of_encoder(encoder), folder))
    _robustness(report, root)
    if not report.results:
        raise UserError(
            f"nothing below {root} is a known data set: README lists their folders under Evaluation"
        )
    return report


def locate(root: Path, marker: str) -> Path:
    """The folder that holds `marker`: `root`, one in it, or one in that; UserError where there is none."""
    parts = len(Path(marker).parts)
    for pattern in (marker, f"*/{marker}", f"*/*/{marker}"):
        hits = sorted(root.glob(pattern))
        if hits:
            return hits[0].parents[parts - 1]
    raise UserError(f"there is no {marker} in {root} or in a folder below it")


def locate_any(root: Path, markers: Sequence[str]) -> Path:
    """The folder that holds the first of the markers that is there."""
    for marker in markers:
        with contextlib.suppress(UserError):
            return locate(root, marker)
    raise UserError(f"there is no {' or '.join(markers)} in {root} or in a folder below it")


def measured_rows(found: Found) -> list[int]:
    """The rows that zero-shot measures."""
    return list(range(len(found.manifest))) if found.whole else found.manifest.rows_of_split("test").tolist()


def bordered(encoder: Encoder, border: int) -> Encoder:
    """The same model, that sees each picture without its outermost pixels."""
    if not border:
        return encoder

    def view(picture):
        return encoder.view(picture.crop((border, border, picture.width - border, picture.height - border)))

    return dataclasses.replace(encoder, view=view)


# ----------------------------------------------------------------------------------------------------
# One set, one model


@dataclasses.dataclass(frozen=True)
class Scores:
    """What a model says of a set: cosines [n, classes], classes [n], and which class is which column."""

    cosines: torch.Tensor
    target: torch.Tensor
    labels: tuple[Any, ...]

    def of(self, labels: Sequence[Any]) -> "Scores":
        """Pictures and columns of some classes alone; UserError where one is not there."""
        places = {label: i for i, label in enumerate(self.labels)}
        if missing := set(labels) - set(places):
            raise UserError(f"{len(missing)} of its classes are missing in the set that it is compared with")
        columns = torch.tensor([places[label] for label in labels])
        rows = torch.isin(self.target, columns)
        place = torch.full((len(self.labels),), -1).index_put((columns,), torch.arange(len(columns)))
        return Scores(self.cosines[rows][:, columns], place[self.target[rows]], tuple(labels))


def _classify(
    report: Report, name: str, encoder: Encoder, found: Found, folder: Path, imagenet: dict[str, Scores]
) -> None:
    """Zero-shot, and what a set of its kind is reported with besides."""
    cosines, target, skipped = class_scores(
        bordered(encoder, LABELLED[name].border),
        found.manifest,
        measured_rows(found),
        found.names,
        LABELLED[name].templates,
        fill,
    )
    metrics: dict[str, Any] = {
        **accuracies(cosines, target),
        "num_images": len(cosines),
        "num_classes": len(found.names),
        "num_skipped": skipped,
    }
    labels: tuple[Any, ...] = tuple(found.names)
    if name == "objectnet":
        shared = datasets.in_imagenet(folder / "objectnet-1.0")
        part = Scores(cosines, target, labels).of([label for label in labels if label in shared])
        metrics["acc1_imagenet_classes"] = accuracies(part.cosines, part.target)["acc1"]
    if name in OF_IMAGENET:
        places = datasets.class_places(labels, found.manifest.data)
        scores = Scores(cosines, target, tuple(places[label] for label in labels))
        if name == IMAGENET:
            imagenet[key_of(encoder)] = scores
        elif key_of(encoder) in imagenet:
            with report.skipping(name, "imagenet1k_acc1", encoder.name):
                inside = imagenet[key_of(encoder)].of(scores.labels)
                metrics["imagenet1k_acc1"] = accuracies(inside.cosines, inside.target)["acc1"]
                if name == "imagenet-o":
                    metrics["aupr"] = out_of_distribution(inside.cosines, cosines, encoder.scale)
    report.add(name, ZEROSHOT, encoder, metrics)


def key_of(encoder: Encoder) -> str:
    """Which of several models."""
    return f"{encoder.name} {encoder.pretrained}"


def out_of_distribution(known: torch.Tensor, unknown: torch.Tensor, scale: float) -> float:
    """AUPR of unknown pictures by how small their largest softmax probability is; cosines [n, classes] of both."""
    sure = torch.cat([(scale * cosines.double()).softmax(1).amax(1) for cosines in (unknown, known)])
    return average_precision(-sure, torch.arange(len(sure)) < len(unknown))


def _probe(report: Report, name: str, encoder: Encoder, found: Found) -> None:
    """A linear probe, where training pictures are read."""
    if "train" not in set(found.manifest.column("split")):
        raise UserError(
            "its training pictures are not read here: `--task linear_probe --data FOLDER` takes any folder"
        )
    report.add(name, "linear_probe", encoder, find_task("linear_probe")[1](encoder, found.manifest))


def _robustness(report: Report, root: Path) -> None:
    """Effective robustness of each result on a shifted set, where there are standard models to compare with."""
    shifted = [result for result in report.results if result["dataset"] in SHIFTED]
    if not shifted:
        return
    path = root / "baselines.csv"
    with report.skipping("imagenet shifts", "effective_robustness"):
        if not path.exists():
            raise UserError(f"no {path} with the accuracies of standard models: see evaluation/robustness.py")
        points = read_baselines(path)
        for result in shifted:
            with report.skipping(result["dataset"], "effective_robustness", result["model"]):
                metrics = result["metrics"]
                if "imagenet1k_acc1" not in metrics:
                    raise UserError("ImageNet's own validation was not measured")
                metrics["effective_robustness"] = effective_robustness(
                    metrics["imagenet1k_acc1"], metrics["acc1"], points.get(result["dataset"], [])
                )
