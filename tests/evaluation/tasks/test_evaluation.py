"""Tasks against slow loops in numpy, the JSON that clip-benchmark's tools read, and every kind of MODEL."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from own_encoder import CONSTANT, ENCODER, slow_image, slow_text
from PIL import Image
from small import make_folder

from evaluation.models.encoder import embed_images, embed_texts
from evaluation.results.run import measure
from evaluation.tasks.encoding.zeroshot import TEMPLATES
from evaluation.tasks.registry import SHORT, find
from student.cli import main
from teachercache.core.errors import UserError
from teachercache.data.read import read_manifest

ANY_FOLDER = (
    *SHORT,
    "linear_probe",
)  # tasks that take `squares`; the others are in test_imagenet, test_detection


def slow_recall(scores: list[list[float]], positives: list[set[int]], k: int) -> float:
    hits = 0
    for row, wanted in zip(scores, positives, strict=True):
        order = sorted(range(len(row)), key=lambda i, row=row: -row[i])
        hits += any(i in wanted for i in order[:k])
    return hits / len(scores)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """28 test pictures; one has a single caption, one none that is usable, one an empty caption beside another."""
    folder = make_folder(tmp_path_factory.mktemp("data") / "squares", 112, texts=3, splits=True)
    texts = sorted((folder / "test").rglob("*.txt"))
    texts[0].write_text("a lonely caption\n")
    texts[1].write_text("\n  \n")
    texts[2].write_text("first\n\nthird\n")
    return folder


def captioned(folder) -> list[tuple]:
    """Picture and its usable captions, test split, in the order of the folder."""
    found = []
    for path in sorted((folder / "test").rglob("*.png"), key=lambda p: str(p)):
        texts = [line for line in path.with_suffix(".txt").read_text().splitlines() if line.strip()]
        if texts:
            found.append((path, texts))
    return found


# ----------------------------------------------------------------------------------------------------
# Retrieval


def test_retrieval_is_the_slow_loop(data):
    found = find("retrieval").function(ENCODER, read_manifest(str(data)))
    pairs = captioned(data)
    images = [slow_image(path) for path, _ in pairs]
    texts = [(i, slow_text(text)) for i, (_, group) in enumerate(pairs) for text in group]
    to_text = [[float(image @ vector) for _, vector in texts] for image in images]
    to_image = [[float(image @ vector) for image in images] for _, vector in texts]
    text_positives = [{j for j, (owner, _) in enumerate(texts) if owner == i} for i in range(len(images))]
    image_positives = [{owner} for owner, _ in texts]
    for k in (1, 5, 10):
        assert found[f"text_retrieval_recall@{k}"] == pytest.approx(
            slow_recall(to_text, text_positives, k)
        ), k
        assert found[f"image_retrieval_recall@{k}"] == pytest.approx(
            slow_recall(to_image, image_positives, k)
        ), k
    assert 0 < found["text_retrieval_recall@10"] < 1  # neither nothing nor everything
    assert (found["num_images"], found["num_texts"], found["num_skipped"]) == (27, 1 + 2 + 25 * 3, 0)
    assert (found["text_retrieval_tie_rate"], found["image_retrieval_tie_rate"]) == (0, 0)


def test_retrieval_in_chunks_is_the_same(data, monkeypatch):
    from evaluation.tasks.encoding import retrieval

    manifest = read_manifest(str(data))
    whole = retrieval.evaluate(ENCODER, manifest)
    monkeypatch.setattr(retrieval, "CHUNK", 4)
    assert retrieval.evaluate(ENCODER, manifest) == whole


@pytest.mark.parametrize("task", list(SHORT))
def test_a_model_that_says_one_thing_scores_nothing(task, data):
    metrics = find(task).function(CONSTANT, read_manifest(str(data)))
    scores = [
        value for name, value in metrics.items() if name.startswith(("acc", "mean_per")) or "recall@" in name
    ]
    assert {value for value in scores if value is not None} == {0.0}
    assert {value for name, value in metrics.items() if name.endswith("tie_rate")} == {1.0}


def test_retrieval_without_captions(data, tmp_path):
    bare = shutil.copytree(data, tmp_path / "bare")
    for path in bare.rglob("*.txt"):
        path.unlink()
    with pytest.raises(UserError, match="no test rows with texts: retrieval needs captions"):
        find("retrieval").function(ENCODER, read_manifest(str(bare)))


# ----------------------------------------------------------------------------------------------------
# Zero-shot


def slow_zeroshot(folder, names: dict[str, str]) -> tuple[float, float, np.ndarray]:
    """acc1, mean per class, and the scores."""
    classes = sorted(names)
    weights = []
    for label in classes:
        vectors = [slow_text(template.replace("{}", names[label])) for template in TEMPLATES]
        mean = sum(vectors) / len(vectors)
        weights.append(mean / np.sqrt((mean**2).sum()))
    hits, scores = {label: [] for label in classes}, []
    for path in sorted((folder / "test").rglob("*.png")):
        label = path.parent.relative_to(folder / "test").as_posix()
        row = [float(slow_image(path) @ weight) for weight in weights]
        hits[label].append(max(range(len(classes)), key=lambda i, row=row: row[i]) == classes.index(label))
        scores.append(row)
    counted = [value for values in hits.values() for value in values]
    shares = [sum(values) / len(values) for values in hits.values() if values]
    return sum(counted) / len(counted), sum(shares) / len(shares), np.array(scores)


@pytest.fixture
def classes(data, tmp_path):
    """Seven classes of different size, one nested, one without test pictures."""
    folder = shutil.copytree(data, tmp_path / "classes")
    for i, path in enumerate(sorted((folder / "test" / "class0").glob("*.png"))):
        target = folder / "test" / ("big_cats/lion" if i < 2 else f"small_{i % 3}")
        target.mkdir(parents=True, exist_ok=True)
        path.rename(target / path.name)
    return folder


def test_zeroshot_is_the_slow_loop(classes):
    found = find("zeroshot").function(ENCODER, read_manifest(str(classes)))
    names = {
        "class0": "class0",
        "class1": "class1",
        "class2": "class2",
        "big_cats/lion": "lion",
        "small_0": "small 0",
        "small_1": "small 1",
        "small_2": "small 2",
    }
    acc1, per_class, _ = slow_zeroshot(classes, names)
    assert found["acc1"] == pytest.approx(acc1)
    assert found["mean_per_class_recall"] == pytest.approx(per_class)
    assert found["acc1"] != pytest.approx(found["mean_per_class_recall"], abs=1e-3)
    assert found["acc1"] <= found["acc5"] <= 1
    assert (found["num_images"], found["num_classes"], found["num_skipped"], found["tie_rate"]) == (
        28,
        7,
        0,
        0,
    )


def test_acc5_says_nothing_of_few_classes(data):
    assert find("zeroshot").function(ENCODER, read_manifest(str(data)))["acc5"] is None


def test_names_of_classnames_txt_count(classes):
    (classes / "classnames.txt").write_text("class1\tred bird\nbig_cats/lion\tking of beasts\n")
    found = find("zeroshot").function(ENCODER, read_manifest(str(classes)))
    names = {
        "class0": "class0",
        "class1": "red bird",
        "class2": "class2",
        "big_cats/lion": "king of beasts",
        "small_0": "small 0",
        "small_1": "small 1",
        "small_2": "small 2",
    }
    _, _, scores = slow_zeroshot(classes, names)
    acc1, per_class, _ = slow_zeroshot(classes, names)
    assert (found["acc1"], found["mean_per_class_recall"]) == (pytest.approx(acc1), pytest.approx(per_class))
    plain = {**names, "class1": "class1", "big_cats/lion": "lion"}
    assert not np.allclose(scores, slow_zeroshot(classes, plain)[2])


@pytest.mark.parametrize("line", ["class9\tnine", "class1 one", "class1"])
def test_a_wrong_line_of_classnames_txt(line, classes):
    (classes / "classnames.txt").write_text(f"class2\ttwo\n{line}\n")
    with pytest.raises(UserError, match=f"'{line}' is not `label<TAB>name` of a class that occurs"):
        find("zeroshot").function(ENCODER, read_manifest(str(classes)))


def test_zeroshot_without_classes(tmp_path):
    folder = make_folder(tmp_path / "one", 4)
    for path in list(folder.rglob("*.*")):
        path.rename(folder / path.name)
    with pytest.raises(UserError, match="no labels: zero-shot classification needs a folder per class"):
        find("zeroshot").function(ENCODER, read_manifest(str(folder)))


def test_data_that_has_splits_but_no_test(data, tmp_path):
    """The error speaks of the split, not of labels that are there."""
    folder = shutil.copytree(data, tmp_path / "trainonly")
    shutil.rmtree(folder / "test")
    for task in ANY_FOLDER:
        with pytest.raises(UserError, match="no test"):
            find(task).function(ENCODER, read_manifest(str(folder)))


def test_data_without_splits_is_measured_whole(tmp_path):
    folder = make_folder(tmp_path / "flat", 9)
    assert find("zeroshot").function(ENCODER, read_manifest(str(folder)))["num_images"] == 9


# ----------------------------------------------------------------------------------------------------
# Embeddings


def test_embeddings_are_unit_rows_whatever_the_batch(data):
    manifest = read_manifest(str(data))
    rows = manifest.rows_of_split("test").tolist()
    for batch in (5, 64):
        found, kept, skipped = embed_images(ENCODER, manifest, rows, batch=batch)
        assert (kept, skipped) == (rows, [])
        for vector, row in zip(found.double().numpy(), rows, strict=True):
            np.testing.assert_allclose(vector, slow_image(data / manifest.row(row).image), atol=1e-6)
    texts = [f"text {i}" for i in range(7)]
    for batch in (3, 100):
        found = embed_texts(ENCODER, texts, batch=batch)
        np.testing.assert_allclose(found.double().numpy(), [slow_text(text) for text in texts], atol=1e-6)


@pytest.mark.parametrize("task", ANY_FOLDER)
def test_pictures_that_cannot_be_read_are_counted_and_left_out(task, data, tmp_path):
    folder = shutil.copytree(data, tmp_path / "damaged")
    pictures = [path for path, _ in captioned(folder)]
    pictures[3].write_bytes(b"no picture")
    pictures[9].write_bytes(pictures[9].read_bytes()[:-700])
    found = find(task).function(ENCODER, read_manifest(str(folder)))
    gone = shutil.copytree(folder, tmp_path / "gone")
    for i in (3, 9):
        (gone / pictures[i].relative_to(folder)).unlink()
    without = find(task).function(ENCODER, read_manifest(str(gone)))
    assert (found.pop("num_skipped"), without.pop("num_skipped")) == (2, 0)
    assert found == without


@pytest.mark.parametrize("task", ANY_FOLDER)
def test_no_readable_picture_is_an_error(task, data, tmp_path):
    folder = shutil.copytree(data, tmp_path / "damaged")
    for path in (folder / "test").rglob("*.png"):
        path.write_bytes(b"no picture")
    with pytest.raises(UserError):
        find(task).function(ENCODER, read_manifest(str(folder)))


# ----------------------------------------------------------------------------------------------------
# Results and MODEL


KEYS = ["dataset", "model", "pretrained", "task", "language", "metrics"]
METRICS = {
    "zeroshot_classification": ["acc1", "acc5", "mean_per_class_recall"],
    "zeroshot_retrieval": [f"{way}_retrieval_recall@{k}" for way in ("image", "text") for k in (1, 5, 10)],
}


@pytest.mark.parametrize("short", list(SHORT))
def test_a_result_has_the_shape_of_clip_benchmark(short, data):
    result = next(measure(find(short), [ENCODER], str(data) + "/"))
    assert list(result) == KEYS
    assert (result["dataset"], result["model"], result["pretrained"]) == ("squares", "linear", "by hand")
    assert (result["task"], result["language"]) == (SHORT[short], "en")
    assert set(METRICS[SHORT[short]]) <= set(result["metrics"])
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def student_eval(capfd, *words: object) -> dict:
    assert main(["eval", *map(str, words), "--json"]) == 0
    (result,) = json.loads(capfd.readouterr().out)["results"]
    return result


def test_a_run_and_its_export_measure_the_same(finished_run, squares, tmp_path, capfd):
    run = shutil.copytree(finished_run, tmp_path / "run")
    assert main(["export", str(run), "--format", "open_clip", "--out", str(tmp_path / "out")]) == 0
    capfd.readouterr()
    for task in ("retrieval", "zeroshot"):
        of_run = student_eval(capfd, run, "--task", task, "--data", squares)
        of_export = student_eval(capfd, tmp_path / "out", "--task", task, "--data", squares)
        assert of_run["metrics"] == of_export["metrics"]
        assert of_run["metrics"]["num_images"] == 16
        saved = run / "eval" / f"squares_{SHORT[task]}.json"
        assert json.loads(saved.read_text()) == of_run
    assert not (tmp_path / "out" / "eval").exists()


def test_a_run_is_measured_as_open_clip_measures_it(finished_run, squares, tmp_path, capfd):
    """R@1 by open_clip's own transform, tokenizer and encoders."""
    import open_clip

    assert main(["export", str(finished_run), "--format", "open_clip", "--out", str(tmp_path / "out")]) == 0
    capfd.readouterr()
    found = student_eval(capfd, tmp_path / "out", "--task", "retrieval", "--data", squares)["metrics"]
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'out'}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'out'}")
    pairs = captioned(squares)
    with torch.inference_mode():
        pictures = torch.stack([transform(Image.open(path).convert("RGB")) for path, _ in pairs])
        images = model.eval().encode_image(pictures, normalize=True).double().numpy()
        texts = (
            model.encode_text(tokenizer([t for _, group in pairs for t in group]), normalize=True)
            .double()
            .numpy()
        )
    owners = [i for i, (_, group) in enumerate(pairs) for _ in group]
    recall = slow_recall((texts @ images.T).tolist(), [{owner} for owner in owners], 5)
    assert found["image_retrieval_recall@5"] == pytest.approx(recall)


def test_a_teacher_by_folder_and_by_name(teacher_folder, squares, tmp_path, monkeypatch, capfd):
    of_folder = student_eval(capfd, teacher_folder, "--task", "retrieval", "--data", squares)
    assert (of_folder["model"], of_folder["pretrained"]) == (str(teacher_folder), "pretrained")
    (tmp_path / "my_teachers.py").write_text(
        "from teachercache.teachers.registry import Entry, find\n"
        f"FOLDER = {str(teacher_folder)!r}\n"
        "ENTRY = Entry('mine', lambda name, **words: find(FOLDER).load(FOLDER, **words))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    of_name = student_eval(capfd, "my_teachers:ENTRY", "--task", "retrieval", "--data", squares)
    sys.modules.pop("my_teachers")
    assert of_name["metrics"] == of_folder["metrics"]


@pytest.mark.parametrize(
    ("model", "words"),
    [("nothing", "nothing"), ("clip-vit-b61", "did you mean 'clip-vit-b16'"), (".", "")],
)
def test_a_model_that_is_none(model, words, squares, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["eval", model, "--task", "retrieval", "--data", str(squares)]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert words in error
    assert "\n" not in error
