"""Figures hold what slow loops say: the first pictures of a text, the likeliest classes, cosines; and the commands."""

import dataclasses
import json
import shutil

import numpy as np
import published_sets
import pytest
from own_encoder import ENCODER, slow_image, slow_text
from PIL import Image
from small import make_folder, save_teacher

from evaluation.models import encoder
from evaluation.results import figures
from evaluation.tasks.encoding.zeroshot import TEMPLATES
from evaluation.tasks.registry import find
from student.cli import main
from teachercache.core.errors import UserError

MODELS = [
    ENCODER,
    dataclasses.replace(ENCODER, name="other", encode_image=lambda images: -ENCODER.encode_image(images)),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Fourteen pictures in three classes; a caption with a dollar, which is no formula."""
    folder = make_folder(tmp_path_factory.mktemp("figures") / "squares", 14)
    (folder / "class0/000.txt").write_text("costs $5 or $6\n")
    return folder


@pytest.fixture
def drawn(data, tmp_path, monkeypatch) -> dict:
    """The figures by the ends of their names, before they are pixels."""
    found = {}
    real = figures._save

    def save(figure, path):
        found[path.stem.split("-")[1]] = figure
        real(figure, path)

    monkeypatch.setattr(figures, "_save", save)
    monkeypatch.setattr(encoder, "default_workers", lambda: 0)
    paths = figures.draw_data(MODELS, find("retrieval"), str(data), tmp_path)
    assert [path.name for path in paths] == [
        "squares-retrieval.png",
        "squares-similarity.png",
        "squares-classes.png",
    ]
    for path in paths:
        with Image.open(path) as picture:
            assert min(picture.size) > 200
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 50
    return found


def pairs(data) -> list[tuple]:
    """Pixels of a thumbnail, embedding, caption of each picture."""
    paths = sorted(data.rglob("*.png"))
    texts = [path.with_suffix(".txt").read_text().strip() for path in paths]
    pixels = [np.asarray(Image.open(path).convert("RGB")) for path in paths]
    return list(zip(pixels, map(slow_image, paths), texts, strict=True))


def shown(axis) -> np.ndarray:
    return np.asarray(axis.get_images()[0].get_array())


def same(thumbnail: np.ndarray, pixels: np.ndarray) -> bool:
    """A thumbnail is the picture, larger and on white."""
    padded = np.asarray(Image.fromarray(pixels).resize((128, 107), Image.Resampling.BICUBIC), np.float32)
    return float(np.abs(thumbnail[10:117] - padded).mean()) < 2


def test_retrievals_are_the_first_of_a_slow_ranking(drawn, data):
    known = pairs(data)
    parts = drawn["retrieval"].subfigs
    assert len(parts) == figures.QUERIES
    framed = 0
    for part in parts:
        text = part._suptitle.get_text()
        axes = np.array(part.axes).reshape(2, figures.TOP)
        for line, sign in ((0, 1), (1, -1)):
            order = sorted(
                range(len(known)), key=lambda i, s=sign, t=text: -s * float(known[i][1] @ slow_text(t))
            )
            for axis, i in zip(axes[line], order, strict=False):
                assert same(shown(axis), known[i][0])
                mine = axis.spines["left"].get_visible()
                assert mine == (known[i][2] == text)
                framed += mine
    assert framed > 0


def test_similarities_are_cosines(drawn, data):
    known = {text: image for _, image, text in pairs(data)}
    figure = drawn["similarity"]
    matrices = [axis for axis in figure.axes if len(axis.texts) == figures.PAIRS**2]
    assert len(matrices) == 2
    texts = [label.get_text().replace("\n", " ") for label in matrices[0].get_yticklabels()]
    for axis, sign in zip(matrices, (1, -1), strict=True):
        wanted = [[sign * float(slow_text(text) @ known[other]) for other in texts] for text in texts]
        assert shown(axis) == pytest.approx(np.array(wanted), abs=1e-5)


def test_bars_are_softmax_shares_and_the_right_class_is_green(drawn, data):
    names = [f"class{i}" for i in range(3)]
    weights = [np.mean([slow_text(each.format(name)) for each in TEMPLATES], 0) for name in names]
    weights = np.stack([weight / np.linalg.norm(weight) for weight in weights])
    known = {f"class{i % 3}": [] for i in range(3)}
    for path in sorted(data.rglob("*.png")):
        known[path.parent.name].append(slow_image(path))
    axes = np.array(drawn["classes"].axes).reshape(3, 3)
    for line in axes:
        right = line[0].get_title()
        widths = [bar.get_width() for bar in line[1].patches]
        assert widths == sorted(widths, reverse=True)
        shares = [
            np.exp(100 * weights @ image) / np.exp(100 * weights @ image).sum() for image in known[right]
        ]
        assert any(sorted(each, reverse=True) == pytest.approx(widths, abs=1e-4) for each in shares)
        greens = [bar.get_facecolor()[1] > bar.get_facecolor()[0] for bar in line[1].patches]
        assert [text.get_text().split("  ")[0] for text in line[1].texts][greens.index(True)] == right
        assert sum(greens) == 1


def test_rows_without_captions_or_labels(tmp_path):
    published_sets.picture(tmp_path / "bare" / "1.png")
    published_sets.picture(tmp_path / "bare" / "2.png")
    with pytest.raises(UserError, match="nothing to draw"):
        figures.draw_data(MODELS, find("retrieval"), str(tmp_path / "bare"), tmp_path / "out")


# ----------------------------------------------------------------------------------------------------
# The commands


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> list[str]:
    """Two models."""
    root = tmp_path_factory.mktemp("models")
    return [str(save_teacher(root / name, seed=seed)) for seed, name in enumerate(("one", "two"))]


def test_two_models_side_by_side(two, data, capfd):
    assert main(["eval", *two, "--task", "zeroshot", "--data", str(data)]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[0].split() == ["metric", *two]
    assert len({len(line.split()) for line in lines}) == 1
    found = []
    for model in two:
        assert main(["eval", model, "--task", "zeroshot", "--data", str(data), "--json"]) == 0
        found += json.loads(capfd.readouterr().out)["results"]
    assert main(["eval", *two, "--task", "zeroshot", "--data", str(data), "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["results"] == found


def test_all_of_a_folder(two, tmp_path, monkeypatch, capfd):
    published_sets.food101(tmp_path / "sets")
    published_sets.captions(tmp_path / "sets")
    shutil.rmtree(tmp_path / "sets/coco")
    monkeypatch.chdir(tmp_path)
    assert main(["eval", *two, "--task", "all", "--data", "sets", "--figures", "pictures", "--json"]) == 0
    captured = capfd.readouterr()
    found = json.loads(captured.out)
    assert {each["dataset"] for each in found["results"]} == {"food101", "flickr30k", "cc3m"}
    assert {each["model"] for each in found["results"]} == set(two)
    assert "skipped pets zeroshot_classification: there is no annotations/trainval.txt" in captured.err
    assert json.loads((tmp_path / "evals/sets/suite.json").read_text()) == found
    names = [
        "cc3m-retrieval",
        "cc3m-similarity",
        "flickr30k-retrieval",
        "flickr30k-similarity",
        "food101-classes",
    ]
    assert sorted(path.stem for path in (tmp_path / "pictures").iterdir()) == names


def test_out_belongs_to_all(two, data, capsys):
    assert main(["eval", two[0], "--task", "zeroshot", "--data", str(data), "--out", "x"]) == 2
    assert "--out is where --task all writes" in capsys.readouterr().err
