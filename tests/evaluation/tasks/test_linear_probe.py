"""The linear probe against scikit-learn and torchmetrics, CLIP's search against its whole grid, features by hand."""

import json
import shutil
import sys

import numpy as np
import open_clip
import pytest
import torch
from own_encoder import CONSTANT, ENCODER, IMAGE_MATRIX, view
from PIL import Image
from sklearn.linear_model import LogisticRegression
from small import make_folder
from torchmetrics.classification import MulticlassAccuracy

from evaluation.models.encoder import Encoder
from evaluation.results.run import measure
from evaluation.tasks.encoding.linear_probe import (
    best_strength,
    evaluate,
    fit,
    hold_out,
    labeled_splits,
    probe_features,
)
from evaluation.tasks.registry import find
from student.cli import main
from teachercache.core.errors import UserError
from teachercache.data.read import read_manifest

GRID = 10.0 ** (np.arange(-48, 49) / 8)


def colored(root, split: str, counts: dict[str, int], *, noise: int, seed: int):
    """Pictures whose mean color says their class, more or less."""
    random = np.random.default_rng(seed)
    for number, (label, count) in enumerate(sorted(counts.items())):
        (root / split / label).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            color = np.array([60 + 40 * (number % 3), 60 + 40 * (number // 3), 128])
            pixels = np.clip(color + random.integers(-noise, noise + 1, (8, 8, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / split / label / f"{i:03d}.png")
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Six classes of different size, hard enough that the probe errs; splits train, val and test."""
    root = tmp_path_factory.mktemp("probe") / "colors"
    for seed, (split, most) in enumerate({"train": 30, "val": 14, "test": 22}.items()):
        colored(root, split, {f"c{i}": most - 2 * i for i in range(6)}, noise=100, seed=seed)
    return root


def slow_features(root, *splits: str) -> tuple[np.ndarray, np.ndarray]:
    """Features by the matrix, not normalized, and class numbers."""
    paths = [path for split in splits for path in sorted((root / split).rglob("*.png"))]
    x = np.stack(
        [view(Image.open(path)).numpy().reshape(-1).astype(np.float64) @ IMAGE_MATRIX for path in paths]
    )
    return x.astype(np.float32), np.array([int(path.parent.name[1:]) for path in paths])


def test_the_probe_is_scikit_learns(data):
    found = evaluate(ENCODER, read_manifest(str(data)))
    assert np.isclose(GRID, found["C"]).any()
    probe = LogisticRegression(C=found["C"], max_iter=1000).fit(*slow_features(data, "train", "val"))
    x, y = slow_features(data, "test")
    scores = torch.from_numpy(probe.predict_proba(x))

    def accuracy(**words) -> float:
        return float(MulticlassAccuracy(num_classes=6, **words)(scores, torch.from_numpy(y)))

    assert found["lp_acc1"] == pytest.approx(probe.score(x, y)) == pytest.approx(accuracy(average="micro"))
    assert found["lp_acc5"] == pytest.approx(accuracy(average="micro", top_k=5))
    assert found["lp_mean_per_class_recall"] == pytest.approx(accuracy(average="macro"))
    assert 1 / 6 < found["lp_acc1"] < 1
    assert found["lp_acc1"] != pytest.approx(found["lp_mean_per_class_recall"], abs=1e-3)
    assert (found["num_train"], found["num_val"], found["num_images"], found["num_classes"]) == (
        204,
        54,
        102,
        6,
    )
    assert (found["features"], found["num_skipped"], found["lp_tie_rate"]) == ("embedding", 0, 0)
    assert 0 < found["iterations"] <= 1000


def test_the_strength_is_as_good_on_validation_as_any_of_the_grids_start(data):
    chosen = evaluate(ENCODER, read_manifest(str(data)))["C"]
    train, val = slow_features(data, "train"), slow_features(data, "val")
    scores = {
        c: LogisticRegression(C=c, max_iter=1000).fit(*train).score(*val) for c in (*GRID[::16], chosen)
    }
    assert scores[chosen] == max(scores.values())
    assert len(set(scores.values())) > 1


def test_a_result_is_json(data):
    result = next(measure(find("linear_probe"), [ENCODER], str(data)))
    assert (result["dataset"], result["task"]) == ("colors", "linear_probe")
    assert json.loads(json.dumps(result, allow_nan=False)) == result


# ----------------------------------------------------------------------------------------------------
# CLIP's search


@pytest.mark.parametrize("peak", [0, 1, 31, 48, 50, 77, 95, 96])
def test_the_search_finds_the_peak_of_the_grid(peak):
    asked = []

    def accuracy(c: float) -> float:
        asked.append(c)
        return -abs(np.log10(c) - np.log10(GRID[peak]))

    assert best_strength(accuracy) == pytest.approx(GRID[peak])
    np.testing.assert_allclose(asked[:7], [1e-6, 1e-4, 1e-2, 1, 1e2, 1e4, 1e6])
    assert len(asked) == len(set(asked)) <= 7 + 2 * 4
    assert 1e-6 <= min(asked) <= max(asked) <= 1e6


def test_of_equally_good_strengths_the_strongest_regularization():
    assert best_strength(lambda c: 0.5) == pytest.approx(1e-6)
    assert best_strength(lambda c: float(c > 0.5e-2)) == pytest.approx(GRID[np.searchsorted(GRID, 0.5e-2)])


# ----------------------------------------------------------------------------------------------------
# Splits


def test_val_is_held_out_of_each_class_where_there_is_none(tmp_path):
    root = colored(tmp_path / "noval", "train", {"c0": 20, "c1": 10, "c2": 1, "c3": 2}, noise=9, seed=0)
    colored(root, "test", {"c0": 2, "c1": 2, "c2": 2, "c3": 2}, noise=9, seed=1)
    manifest = read_manifest(str(root))
    parts, labels = labeled_splits(manifest), manifest.column("label")
    counts = {
        name: {label: [labels[row] for row in part].count(label) for label in sorted(set(labels))}
        for name, part in parts.items()
    }
    assert counts["val"] == {"c0": 4, "c1": 2, "c2": 0, "c3": 1}
    assert counts["train"] == {"c0": 16, "c1": 8, "c2": 1, "c3": 1}
    assert sorted(row for part in parts.values() for row in part) == list(range(len(manifest)))
    assert evaluate(ENCODER, manifest)["num_train"] == 33  # the refit takes both


def test_the_draw_is_the_same_every_time_and_no_first_rows():
    rows, labels = list(range(100)), ["a"] * 100
    stay, held = hold_out(rows, labels)
    assert (stay, held) == hold_out(rows, labels)
    assert sorted(stay + held) == rows
    assert held != rows[:20] != rows[-20:]


def test_a_class_that_training_lacks_is_never_hit(data, tmp_path):
    root = shutil.copytree(data, tmp_path / "more")
    before = evaluate(ENCODER, read_manifest(str(root)))
    shutil.copytree(root / "test" / "c0", root / "test" / "c9")
    after = evaluate(ENCODER, read_manifest(str(root)))
    assert after["num_images"] == 124
    assert after["lp_acc1"] * 124 == pytest.approx(before["lp_acc1"] * 102)
    assert after["num_classes"] == 6


def test_without_splits(tmp_path):
    with pytest.raises(
        UserError, match="no train rows with labels: a linear probe needs folders `train/<class>`"
    ):
        evaluate(ENCODER, read_manifest(str(make_folder(tmp_path / "flat", 9))))


def test_one_class_is_not_enough(tmp_path):
    root = colored(tmp_path / "one", "train", {"c0": 9}, noise=9, seed=0)
    colored(root, "test", {"c0": 2}, noise=9, seed=1)
    with pytest.raises(UserError, match="needs two classes"):
        evaluate(ENCODER, read_manifest(str(root)))


# ----------------------------------------------------------------------------------------------------
# Models that say nothing, and what is missing


def test_a_model_that_says_one_thing_knows_the_largest_class_at_most(data):
    found = evaluate(CONSTANT, read_manifest(str(data)))
    assert found["lp_acc1"] == pytest.approx(22 / 102)
    assert found["lp_mean_per_class_recall"] == pytest.approx(1 / 6)


def test_a_model_that_says_nan(data):
    broken = Encoder(
        **{**vars(ENCODER), "encode_image": lambda images: torch.full((len(images), 4), torch.nan)}
    )
    with pytest.raises(UserError, match="linear outputs NaN or infinity"):
        evaluate(broken, read_manifest(str(data)))


def test_without_scikit_learn_the_extra_is_named(data, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(UserError, match=r"pip install 'teachercache\[eval\]'"):
        evaluate(ENCODER, read_manifest(str(data)))


def test_too_few_iterations_warn_nobody(monkeypatch):
    random = np.random.default_rng(0)
    x, y = random.normal(size=(200, 30)) * np.logspace(0, 6, 30), random.integers(4, size=200)
    assert fit(x, y, 1e6).n_iter_.max() == 1000  # with warnings as errors


# ----------------------------------------------------------------------------------------------------
# Features


def tower_of(vision: dict, **more) -> Encoder:
    torch.manual_seed(0)
    text = {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    model = open_clip.CLIP if "layers" in vision else open_clip.CustomTextCLIP
    built = model(embed_dim=12, vision_cfg=vision, text_cfg=text, **more).eval()
    return Encoder(**{**vars(ENCODER), "encode_image": built.encode_image, "tower": built.visual})


IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
VIT = {"image_size": 32, "layers": 1, "width": 24, "head_width": 12, "patch_size": 16}


def test_a_vits_features_are_those_before_its_projection():
    encoder = tower_of(VIT)
    encode, which = probe_features(encoder)
    found, before = (
        encode(IMAGES),
        {name: value.clone() for name, value in encoder.tower.state_dict().items()},
    )
    assert (which, found.shape) == ("before the projection", (3, 24))
    torch.testing.assert_close(found @ encoder.tower.proj, encoder.encode_image(IMAGES))
    encoder.tower.proj = None
    torch.testing.assert_close(found, encoder.tower(IMAGES), rtol=0, atol=0)
    assert all(torch.equal(before[name], value) for name, value in encoder.tower.state_dict().items())


def test_a_teacher_is_probed_before_its_projection(teacher_folder, squares, capfd):
    """The command, and the teacher's own tower: 32 wide before, 16 behind."""
    assert (
        main(["eval", str(teacher_folder), "--task", "linear_probe", "--data", str(squares), "--json"]) == 0
    )
    (result,) = json.loads(capfd.readouterr().out)["results"]
    assert (result["task"], result["metrics"]["features"]) == ("linear_probe", "before the projection")
    assert result["metrics"]["num_images"] == 16


@pytest.mark.parametrize("proj", ["linear", "mlp"])
def test_a_timm_towers_features_are_those_before_its_head(proj):
    encoder = tower_of(
        {
            "timm_model_name": "resnet10t",
            "timm_pool": "avg",
            "timm_proj": proj,
            "image_size": 32,
            "timm_model_pretrained": False,
        }
    )
    encode, which = probe_features(encoder)
    assert which == "before the projection"
    torch.testing.assert_close(encode(IMAGES), encoder.tower.trunk(IMAGES))
    torch.testing.assert_close(encoder.tower.head(encode(IMAGES)), encoder.encode_image(IMAGES))


@pytest.mark.parametrize(
    "encoder",
    [
        ENCODER,
        tower_of({"image_size": 32, "layers": [1, 1, 1, 1], "width": 4, "head_width": 32}),
    ],
    ids=["unknown", "ModifiedResNet"],
)
def test_other_towers_give_their_embedding(encoder):
    assert probe_features(encoder) == (encoder.encode_image, "embedding")
