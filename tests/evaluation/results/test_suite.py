"""The suite of published data sets: layouts against torchvision's readers, metrics against other libraries' numbers."""

import csv
import dataclasses
import json
import pickle
import shutil
from collections import Counter
from importlib import resources

import numpy as np
import published_sets
import pytest
import torch
from own_encoder import CONSTANT, ENCODER, slow_image, slow_text
from PIL import Image
from published_sets import CIFAR10, IMAGENET, SHARED, WNIDS
from sklearn.metrics import average_precision_score
from torchmetrics.classification import MulticlassAccuracy

from evaluation.data import classification as datasets
from evaluation.data.prompts import CALTECH, CIFAR, IMAGENET_PLUS, fill
from evaluation.metrics.ranking import average_precision
from evaluation.metrics.robustness import effective_robustness, read_baselines
from evaluation.models import encoder
from evaluation.results import suite
from evaluation.results.suite import CAPTIONED, LABELED, locate, measured_rows, run_suite, without_border
from evaluation.results.suite_tables import suite_table, write_suite
from teachercache.core.errors import UserError
from teachercache.data.pictures import read_image


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return published_sets.make_all(tmp_path_factory.mktemp("published"))


@pytest.fixture(scope="module")
def report(root):
    """The suite of an encoder written by hand, and of one that says the same of everything."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoder, "default_workers", lambda: 0)
        yield run_suite([ENCODER, dataclasses.replace(CONSTANT, name="constant")], root)


def metrics_of(report, dataset: str, task: str = "zeroshot_classification", model: str = "linear") -> dict:
    found = [
        each["metrics"]
        for each in report.results
        if (each["dataset"], each["task"], each["model"]) == (dataset, task, model)
    ]
    assert len(found) == 1, (dataset, task)
    return found[0]


def read(name: str, root, scratch):
    labeled = LABELED[name]
    return labeled.read(locate(root, labeled.marker), scratch)


# ----------------------------------------------------------------------------------------------------
# Readers


def torchvision_set(name: str, root):
    """(picture, class) of test rows, as torchvision reads the same folder; digests of the true files do not count."""
    from torchvision import datasets as theirs

    make = {
        "cifar10": lambda: theirs.CIFAR10(root, train=False),
        "cifar100": lambda: theirs.CIFAR100(root, train=False),
        "caltech101": lambda: theirs.Caltech101(root),
        "food101": lambda: theirs.Food101(root, split="test"),
        "pets": lambda: theirs.OxfordIIITPet(root, split="test"),
    }
    with pytest.MonkeyPatch.context() as patch:
        for kind in (theirs.CIFAR10, theirs.CIFAR100):
            patch.setattr(kind, "_check_integrity", lambda self: True)
        patch.setattr("torchvision.datasets.cifar.check_integrity", lambda *words: True)
        return make[name]()


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "caltech101", "food101", "pets"])
def test_a_layout_is_what_torchvision_reads(name, root, tmp_path):
    found, theirs = read(name, root, tmp_path), torchvision_set(name, root)
    classes = theirs.categories if name == "caltech101" else theirs.classes
    labels, rows = found.manifest.column("label"), measured_rows(found)
    assert len(rows) == len(theirs) > 0
    ours, wanted = Counter(), Counter()
    for row in rows:
        picture = read_image(found.manifest, found.manifest.row(row))
        ours[np.asarray(picture).tobytes(), found.names[labels[row]].lower()] += 1
    for picture, label in theirs:
        wanted[np.asarray(picture.convert("RGB")).tobytes(), classes[label].replace("_", " ").lower()] += 1
    assert ours == wanted


@pytest.mark.parametrize(
    ("name", "splits", "words"),
    [
        ("cifar10", {"train": 100, "test": 30}, set(CIFAR10)),
        ("cifar100", {"train": 300, "test": 100}, {f"thing {i}" for i in range(100)}),
        ("caltech101", {"train": 90, "test": 10}, {"Faces easy", "accordion", "ewer"}),
        ("food101", {"train": 12, "test": 9}, {"Apple pie", "Baby back ribs", "Waffles"}),
        ("pets", {"train": 15, "test": 12}, {"Abyssinian", "great pyrenees", "Sphynx"}),
        ("birdsnap", {"train": 8, "test": 6}, {"Blue Jay", "Acadian Flycatcher"}),
        ("places365", {"test": 7}, {"airfield", "apartment building outdoor", "youth hostel"}),
        ("objectnet", {"test": 18}, {"air freshener", "alarm clock", "backpack", "t-shirt"}),
        ("imagenet1k", {"": 21}, {"goldfish", "stingray", "goldfinch", "goose", "ambulance", "volcano"}),
        ("imagenet-a", {"": 16}, {"stingray", "goldfinch", "goose", "ambulance"}),
        ("imagenetv2", {"": 12}, {"goldfish", "stingray", "goldfinch", "goose", "ambulance", "volcano"}),
    ],
)
def test_rows_splits_and_words(name, splits, words, root, tmp_path):
    found = read(name, root, tmp_path)
    assert Counter(found.manifest.column("split")) == splits
    assert set(found.names.values()) == words
    assert set(found.manifest.column("label")) == set(found.names)


def test_birdsnap_and_places_by_their_lists(root, tmp_path):
    birds = read("birdsnap", root, tmp_path).manifest
    rows = [birds.row(i) for i in range(len(birds))]
    assert {row.key for row in rows if row.split == "test"} == {
        f"{bird}/{i}.jpg" for bird in ("Blue_Jay", "Acadian_Flycatcher") for i in (4, 5, 6)
    }
    assert {(row.key.split("/")[0], row.label) for row in rows} == {
        ("Blue_Jay", "1"),
        ("Acadian_Flycatcher", "2"),
    }
    places = read("places365", root, tmp_path)
    found = {places.manifest.row(i).key: places.names[places.manifest.row(i).label] for i in range(7)}
    assert (
        found["Places365_val_00000002.jpg"]
        == found["Places365_val_00000005.jpg"]
        == "apartment building outdoor"
    )


def test_a_pickle_that_would_run_something_is_refused(root, tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("ran",))

    path = tmp_path / "test_batch"
    path.write_bytes(pickle.dumps({"data": Evil()}, protocol=2))
    with pytest.raises(UserError, match=r"contains __builtin__.print, which is no array"):
        datasets.unpickle(path, "data")
    for content in (
        b"\x80\x02}",
        b"no pickle",
        pickle.dumps({"other": 1}, protocol=2),
        pickle.dumps(3, protocol=2),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"test_batch is not one of CIFAR's"):
            datasets.unpickle(path, "data")
    with pytest.raises(UserError, match=r"there is no .*data_batch_1"):
        datasets.unpickle(tmp_path / "data_batch_1", "data")
    (values,) = datasets.unpickle(root / "cifar-10-batches-py/test_batch", "data")
    assert values.shape == (30, 3072)


# ----------------------------------------------------------------------------------------------------
# Prompts


def test_prompts_are_the_papers():
    assert (len(CIFAR), len(CALTECH), len(IMAGENET_PLUS)) == (18, 34, 10)
    assert len(set(CIFAR)) == 18
    assert len(set(CALTECH)) == 34
    assert {template for template in CIFAR if "small" in template} == {
        "a photo of a small {}.",
        "a photo of the small {}.",
    }
    assert {"a embroidered {}.", "the plushie {}.", "art of a {}.", "the cartoon {}.", "{}"} - {*CALTECH} == {
        "{}"
    }


@pytest.mark.parametrize(
    ("name", "templates"), [("cifar10", CIFAR), ("cifar100", CIFAR), ("caltech101", CALTECH)]
)
def test_prompts_are_clip_benchmarks_own_file(name, templates):
    """MIT data of the installed package, where it is; the paper's are CLIP's of these sets."""
    pytest.importorskip("clip_benchmark", reason="clip-benchmark is not installed")
    path = resources.files("clip_benchmark").joinpath("datasets", "en_zeroshot_classification_templates.json")
    theirs = json.loads(path.read_text())[name]
    assert {template.format(c="{}") for template in theirs} == set(templates)


@pytest.mark.parametrize(
    ("template", "name", "wanted"),
    [
        ("a photo of a {}.", "airplane", "a photo of an airplane."),
        ("a {} in a video game.", "Otter", "an Otter in a video game."),
        ("A photo of a {}", "cat", "A photo of a cat"),
        ("a photo of a small {}.", "ewer", "a photo of a small ewer."),
        ("a photo of the {}.", "ewer", "a photo of the ewer."),
    ],
)
def test_an_article_before_a_vowel(template, name, wanted):
    assert fill(template, name) == wanted


# ----------------------------------------------------------------------------------------------------
# Metrics


def slow(root, scratch, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines [n, classes] and classes by the definitions, pictures opened here."""
    found, border = read(name, root, scratch), 2 if name == "objectnet" else 0
    templates = {"cifar10": CIFAR, "cifar100": CIFAR, "caltech101": CALTECH}.get(name, IMAGENET_PLUS)
    weights = [
        np.mean([slow_text(fill(each, words)) for each in templates], 0) for words in found.names.values()
    ]
    weights = np.stack([weight / np.linalg.norm(weight) for weight in weights])
    images, target = [], []
    for row in measured_rows(found):
        sample = found.manifest.row(row)
        path = found.manifest.root / sample.image
        if not path.exists():
            continue
        if sample.offset >= 0:
            picture = read_image(found.manifest, sample)
        else:
            with Image.open(path) as opened:
                picture = opened.convert("RGB")
        picture = picture.crop((border, border, picture.width - border, picture.height - border))
        picture.save(scratch / "one.png")
        images.append(slow_image(scratch / "one.png"))
        target.append(list(found.names).index(sample.label))
    return torch.from_numpy(np.stack(images) @ weights.T), torch.tensor(target)


SETS = (
    "cifar10",
    "caltech101",
    "food101",
    "pets",
    "birdsnap",
    "places365",
    "objectnet",
    "imagenet1k",
    "imagenet-a",
    "imagenet-r",
    "imagenetv2",
)


@pytest.mark.parametrize("name", SETS)
def test_zero_shot_is_torchmetrics_on_slow_scores(name, report, root, tmp_path):
    scores, target = slow(root, tmp_path, name)
    found = metrics_of(report, name)
    for key, average in (("acc1", "micro"), ("mean_per_class_recall", "macro")):
        wanted = MulticlassAccuracy(num_classes=scores.shape[1], average=average)(scores, target)
        assert found[key] == pytest.approx(float(wanted)), key
    assert (found["num_images"], found["num_classes"]) == tuple(scores.shape)
    assert found["num_skipped"] == (1 if name == "birdsnap" else 0)


def test_borders_are_cut():
    """Of ObjectNet alone."""
    assert LABELED["objectnet"].border == 2
    assert {name for name, each in LABELED.items() if each.border} == {"objectnet"}
    seen = []
    without_border(dataclasses.replace(ENCODER, view=seen.append), 2).view(Image.new("RGB", (9, 8)))
    assert seen[0].size == (5, 4)
    assert without_border(ENCODER, 0) is ENCODER


def test_objectnets_classes_that_imagenet_has(report, root, tmp_path):
    scores, target = slow(root, tmp_path, "objectnet")
    names = list(read("objectnet", root, tmp_path).names)
    columns = [i for i, name in enumerate(names) if name != "air_freshener"]
    rows = torch.isin(target, torch.tensor(columns))
    hits = [
        columns[int(score[columns].argmax())] == int(label)
        for score, label in zip(scores[rows], target[rows], strict=True)
    ]
    assert metrics_of(report, "objectnet")["acc1_imagenet_classes"] == pytest.approx(np.mean(hits))


def test_imagenet_o_is_scikit_learns_average_precision(report, root, tmp_path):
    """The anomaly score is minus the largest softmax probability, of the classes that -O has."""
    outside, _ = slow(root, tmp_path, "imagenet-o")
    inside, target = slow(root, tmp_path, "imagenet1k")
    columns = [IMAGENET.index(place) for place in SHARED]
    inside = inside[torch.isin(target, torch.tensor(columns))][:, columns]
    assert len(inside) == 14
    score = np.array([-float(torch.softmax(100 * line, 0).max()) for line in [*outside, *inside]])
    wanted = average_precision_score([1] * len(outside) + [0] * len(inside), score)
    found = metrics_of(report, "imagenet-o")
    assert found["aupr"] == pytest.approx(wanted)
    assert "acc1" in found


@pytest.mark.parametrize("seed", range(5))
def test_average_precision_with_ties(seed):
    draw = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 6, (40,), generator=draw).float()
    positive = torch.rand(40, generator=draw) < 0.3
    wanted = average_precision_score(positive.numpy(), scores.numpy())
    assert average_precision(scores, positive) == pytest.approx(wanted)
    share = float(positive.double().mean())
    assert average_precision(torch.zeros(40), positive) == pytest.approx(share)
    assert average_precision(torch.full((40,), torch.nan), positive) <= share


def test_the_same_classes_of_imagenet_are_what_a_shift_is_compared_with(report, root, tmp_path):
    scores, target = slow(root, tmp_path, "imagenet1k")
    columns = [IMAGENET.index(place) for place in SHARED]
    rows = torch.isin(target, torch.tensor(columns))
    hits = [
        columns[int(score[columns].argmax())] == int(label)
        for score, label in zip(scores[rows], target[rows], strict=True)
    ]
    assert metrics_of(report, "imagenet-r")["imagenet1k_acc1"] == pytest.approx(np.mean(hits))
    assert metrics_of(report, "imagenetv2")["imagenet1k_acc1"] == metrics_of(report, "imagenet1k")["acc1"]


def test_a_model_that_says_one_thing_is_at_chance_everywhere(report):
    """Nothing is 100; accuracies and recalls are 0, and what ranks is at its base rate."""
    seen = set()
    for result in report.results:
        if result["model"] != "constant":
            continue
        seen.add((result["dataset"], result["task"]))
        metrics = result["metrics"]
        for name, value in metrics.items():
            if value is None or name.startswith("num_") or name in ("C", "iterations", "features"):
                continue
            if name == "aupr":
                assert value == pytest.approx(16 / (16 + 14))
            elif name.endswith("tie_rate"):
                assert value == 1 or name.startswith("lp_")
            elif name.startswith(
                "lp_"
            ):  # the probe has biases: it says the commonest class, or the five of them
                assert value <= (5.5 if name == "lp_acc5" else 1.5) / min(metrics["num_classes"], 10)
            else:
                assert value == 0, (result["dataset"], name)
    assert seen == {(each["dataset"], each["task"]) for each in report.results if each["model"] == "linear"}
    assert len(seen) > 20


# ----------------------------------------------------------------------------------------------------
# Retrieval


def test_retrieval_of_karpathys_coco(report, root):
    """Five captions of a picture count, of seven; folds that are larger than the set are none."""
    found = metrics_of(report, "mscoco_captions", "zeroshot_retrieval")
    assert (found["num_images"], found["num_texts"], found["num_folds"]) == (9, 45, 0)
    flickr = metrics_of(report, "flickr30k", "zeroshot_retrieval")
    assert (flickr["num_images"], flickr["num_texts"]) == (5, 25)
    cc3m = metrics_of(report, "cc3m", "zeroshot_retrieval")
    assert (cc3m["num_images"], cc3m["num_texts"], cc3m["num_skipped"]) == (5, 5, 1)
    assert CAPTIONED["mscoco_captions"].fold == 1000


def test_folds_are_means_of_parts(root, monkeypatch):
    """Of nine pictures two folds of four; recall by hand in each."""
    from evaluation.tasks.encoding.retrieval import evaluate
    from teachercache.data.read import read_manifest

    monkeypatch.setattr(encoder, "default_workers", lambda: 0)
    manifest = read_manifest(str(root / "coco/dataset_coco.json"))
    found = evaluate(ENCODER, manifest, captions=5, fold=4)
    rows = [manifest.row(row) for row in manifest.rows_of_split("test")]
    recalls = []
    for part in (rows[:4], rows[4:8]):
        images = np.stack([slow_image(manifest.root / row.image) for row in part])
        ranks = [
            sorted(range(4), key=lambda j, t=text: -float(images[j] @ slow_text(t))).index(i)
            for i, row in enumerate(part)
            for text in row.texts[:5]
        ]
        recalls.append(np.mean([rank < 1 for rank in ranks]))
    assert found["num_folds"] == 2
    assert found["4/image_retrieval_recall@1"] == pytest.approx(np.mean(recalls))
    assert 0 < np.mean(recalls) < 1
    assert (
        found["4/image_retrieval_recall@5"] is found["image_retrieval_recall@10"] is None
    )  # every model would be 1
    assert found["text_retrieval_recall@10"] is not None


# ----------------------------------------------------------------------------------------------------
# Effective robustness


def test_effective_robustness_is_numpys_line_through_logits():
    points = [(0.5, 0.3), (0.6, 0.42), (0.7, 0.5), (0.76, 0.63), (0.8, 0.0)]
    logit = lambda p: np.log(p / (1 - p))  # noqa: E731
    slope, offset = np.polyfit([logit(x) for x, y in points[:4]], [logit(y) for x, y in points[:4]], 1)
    expected = 1 / (1 + np.exp(-(slope * logit(0.65) + offset)))
    assert effective_robustness(0.65, 0.6, points) == pytest.approx(0.6 - expected)
    with pytest.raises(UserError, match="two standard models"):
        effective_robustness(0.5, 0.4, points[:1])
    with pytest.raises(UserError, match="not defined"):
        effective_robustness(0.0, 0.4, points)


def test_baselines_beside_the_data_give_effective_robustness(root, tmp_path, monkeypatch):
    monkeypatch.setattr(encoder, "default_workers", lambda: 0)
    for name in ("imagenet", "imagenet-r"):
        shutil.copytree(root / name, tmp_path / name)
    lines = [
        "model,imagenet1k,imagenet-r,imagenet-r:imagenet1k",
        "a,0.6,0.3,0.8",
        "b,0.7,0.4,0.85",
        "c,0.8,,",
    ]
    (tmp_path / "baselines.csv").write_text("\n".join(lines) + "\n")
    assert read_baselines(tmp_path / "baselines.csv") == {"imagenet-r": [(0.8, 0.3), (0.85, 0.4)]}
    metrics = metrics_of(run_suite([ENCODER], tmp_path), "imagenet-r")
    wanted = effective_robustness(metrics["imagenet1k_acc1"], metrics["acc1"], [(0.8, 0.3), (0.85, 0.4)])
    assert metrics["effective_robustness"] == pytest.approx(wanted)
    (tmp_path / "baselines.csv").write_text("model,imagenet1k,imagenet-r\na,60,30\n")
    with pytest.raises(UserError, match="not percent"):
        read_baselines(tmp_path / "baselines.csv")


# ----------------------------------------------------------------------------------------------------
# What is skipped, what is written


def test_what_is_not_there_is_skipped_with_a_reason(report):
    reasons = {(each["dataset"], each["task"]): each["reason"] for each in report.skipped}
    assert "there is no sketch in" in reasons["imagenet_sketch", "zeroshot_classification"]
    assert "training images" in reasons["places365", "linear_probe"]
    assert "baselines.csv" in reasons["imagenet shifts", "effective_robustness"]
    measured = {each["dataset"] for each in report.results}
    assert measured == {*LABELED, *CAPTIONED} - {
        "imagenet_sketch",
        "imagenetv2-threshold0.7",
        "imagenetv2-top-images",
    }
    probed = {each["dataset"] for each in report.results if each["task"] == "linear_probe"}
    assert probed == {"cifar10", "cifar100", "caltech101", "food101", "pets", "birdsnap"}


def test_one_json_one_csv_and_one_table(report, tmp_path):
    paths = write_suite(report, tmp_path / "new")
    assert [path.name for path in paths] == ["suite.json", "suite.csv", "suite.md"]
    found = json.loads(paths[0].read_text())
    assert found == {"results": report.results, "skipped": report.skipped}
    with open(paths[1], newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(report.results)
    assert float(lines[0]["acc1"]) == report.results[0]["metrics"]["acc1"]
    table = paths[2].read_text().splitlines()
    assert table[0] == "| task | data | metric | linear | constant |"
    pets = 100 * metrics_of(report, "pets")["mean_per_class_recall"]
    assert f"| zeroshot_classification | pets | mean per class | {pets:.1f} | 0.0 |" in table
    assert any(line.startswith("| zeroshot_retrieval | flickr30k | T2I R@1 |") for line in table)
    assert any(line.startswith("- imagenet_sketch zeroshot_classification: there is no") for line in table)


def test_the_mean_is_over_sets_that_all_models_have():
    def result(dataset: str, model: str, value: float) -> dict:
        return {
            "dataset": dataset,
            "model": model,
            "pretrained": model,
            "task": "zeroshot_classification",
            "language": "en",
            "metrics": {"acc1": value},
        }

    results = [
        result("food101", "a", 0.2),
        result("cifar10", "a", 0.4),
        result("objectnet", "a", 1.0),
        result("food101", "b", 0.3),
        result("cifar10", "b", 0.9),
    ]
    lines = suite_table(suite.Report(results, [])).splitlines()
    assert "| zeroshot_classification | objectnet | top-1 | 100.0 | - |" in lines
    assert "| zeroshot_classification | mean of 2 | top-1 or mean per class | 30.0 | 60.0 |" in lines


def test_a_folder_without_any_is_an_error(tmp_path):
    with pytest.raises(UserError, match="nothing below"):
        run_suite([ENCODER], tmp_path)
    with pytest.raises(UserError, match="no folder"):
        run_suite([ENCODER], tmp_path / "none")


def test_wnids_are_in_order():
    assert sorted(WNIDS) == WNIDS
