"""Zero-shot answers from a cache alone, against loops over its arrays; `student eval CACHE --task ...` as a user."""

import importlib
import json
import shutil

import numpy as np
import pytest
import zarr
from small import build_cache

from evaluation.models import cache_answerer as from_cache
from evaluation.models.anchors import three_means
from student.cli import main
from teachercache.core.errors import UserError
from teachercache.data.read import read_manifest

scene_tasks = importlib.import_module("scripts.datasets.scene_vcr_snli_ve")
VQA = "v2_OpenEnded_mscoco_{}2014_questions.json"


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """VCR and SNLI-VE of 24 scenes, one picture damaged; VQA of the same pictures, train and val."""
    folder = tmp_path_factory.mktemp("tasks") / "scenes"
    scene_tasks.write_tasks(folder, 24, seed=0, size=32, test=0.9)
    pictures = sorted((folder / "snli_ve/flickr30k-images").iterdir())
    (folder / "vqa").mkdir()
    for start, subset in ((0, "train2014"), (4, "val2014")):
        (folder / f"vqa/{subset}").mkdir()
        questions, annotations = [], []
        for i in range(start, start + 8):
            shutil.copy(pictures[i], folder / f"vqa/{subset}/COCO_{subset}_{i:012d}.jpg")
            questions.append({"image_id": i, "question": "what is it?", "question_id": start * 1000 + i})
            answers = [["cat", "dog", "owl"][i % 3]] * 9 + ["ant"]
            annotations.append(
                {
                    "question_id": start * 1000 + i,
                    "multiple_choice_answer": answers[0],
                    "image_id": i,
                    "answers": [{"answer": a} for a in answers],
                    "answer_type": "other",
                    "question_type": "what is",
                }
            )
        head = {"data_subtype": subset, "data_type": "mscoco"}
        (folder / f"vqa/{VQA.format(subset[:-4])}").write_text(json.dumps(head | {"questions": questions}))
        (folder / f"vqa/v2_mscoco_{subset}_annotations.json").write_text(
            json.dumps({"annotations": annotations})
        )
    next(iter(sorted((folder / "vcr1/vcr1images").rglob("*.jpg")))).write_bytes(b"no picture")
    return folder


@pytest.fixture(scope="module")
def caches(tasks, teacher_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("caches")
    data = {
        "vcr": tasks / "vcr1/val.jsonl",
        "snli_ve": tasks / "snli_ve/snli_ve_dev.jsonl",
        "vqa": ",".join(str(tasks / "vqa" / VQA.format(split)) for split in ("train", "val")),
    }
    return {
        name: (build_cache(where, teacher_folder, out / f"{name}.zarr"), str(where))
        for name, where in data.items()
    }


def student_eval(capfd, *words: object) -> list[dict]:
    capfd.readouterr()
    assert main(["eval", *map(str, words), "--json"]) == 0
    return json.loads(capfd.readouterr().out)["results"]


def cosine(a, b) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def all_cosines(path) -> list[tuple[dict, list[float]]]:
    """Each cached row's task, and the cosine of its picture to each of its texts; nan where the picture is damaged."""
    cache, found = zarr.open(str(path), mode="r"), []
    manifest = read_manifest(str(path / "manifest.parquet"))
    for i, task in enumerate(map(json.loads, manifest.column("task"))):
        image = cache["image_emb"][i]
        values = [
            cosine(image, cache["text_emb"][i, k]) if image.any() else np.nan
            for k in range(len(task["texts"]))
        ]
        found.append((task, values))
    return found


def test_vcr_by_picture_and_answer_and_by_picture_and_both(caches, capfd):
    path, data = caches["vcr"]
    results = student_eval(capfd, path, "--task", "vcr", "--data", data)
    assert [result["model"].split()[-1] for result in results] == ["IA", "IQA"]
    for result, kinds in zip(results, (("choice", "rationale"), ("pair", "rationale_pair")), strict=True):
        right = []
        for task, values in all_cosines(path):
            if np.isnan(values[0]):
                continue
            hits = []
            for kind, label in zip(kinds, (task["label"], task["rationale_label"]), strict=True):
                mine = [value for value, told in zip(values, task["texts"], strict=True) if told == kind]
                hits.append(all(mine[label] > value + 1e-6 for k, value in enumerate(mine) if k != label))
            right.append(hits)
        metrics = result["metrics"]
        wanted = np.array(right)
        assert metrics["q2a"] == pytest.approx(wanted[:, 0].mean())
        assert metrics["qa2r"] == pytest.approx(wanted[:, 1].mean())
        assert metrics["q2ar"] == pytest.approx(wanted.all(1).mean())
        assert metrics["num_rows"] - metrics["q2a_num_skipped"] == len(right) < metrics["num_rows"]
        assert any("q2a:category=" in name for name in metrics)
    assert 0 < results[0]["metrics"]["q2a"] < 1


def test_snli_ve_by_three_means_without_labels(caches, tasks, capfd, tmp_path):
    path, data = caches["snli_ve"]
    (result,) = student_eval(capfd, path, "--task", "snli_ve", "--data", data)
    rows = all_cosines(path)
    similar = sorted(values[0] for _, values in rows)
    # one-dimensional 3-means exactly: the best of all ways to cut the sorted values in three
    cuts = [
        (sum(np.var(part) * len(part) for part in np.split(np.array(similar), [i, j])), i, j)
        for i in range(1, len(similar))
        for j in range(i + 1, len(similar))
    ]
    _, i, j = min(cuts)
    low, high = similar[i], similar[j]
    names = {-1: "contradiction", 0: "neutral", 1: "entailment"}
    said = [names[int(values[0] >= high) - int(values[0] < low)] for _, values in rows]
    gold = [task["choices"][task["label"]] for task, _ in rows]
    assert result["metrics"]["accuracy"] == pytest.approx(
        np.mean([a == b for a, b in zip(said, gold, strict=True)])
    )
    assert "transductive" in result["metrics"]["protocol"]
    assert result["metrics"]["accuracy_best_mapping"] >= result["metrics"]["accuracy"]


def test_three_means_put_the_nearest_first_and_tie_where_all_are_alike():
    assert three_means(np.array([0.1, 0.5, 0.9, 0.12, 0.52])) == pytest.approx([0.11, 0.51, 0.9])
    assert three_means(np.full(9, 0.3)) is None


def test_vqa_by_the_nearest_answer_of_training(caches, capfd):
    path, data = caches["vqa"]
    (result,) = student_eval(capfd, path, "--task", "vqa", "--data", data)
    cache = zarr.open(str(path), mode="r")
    rows = [json.loads(task) for task in read_manifest(str(path / "manifest.parquet")).column("task")]
    words = {task["answer"]: cache["text_emb"][i, 1] for i, task in enumerate(rows)}
    hits = []
    for i, task in list(enumerate(rows))[8:]:
        near = {word: cosine(cache["image_emb"][i], vector) for word, vector in words.items()}
        hits.append(float(max(near, key=near.get) == task["answers"][0]))  # nine of ten say so: 1, else 0
    assert result["metrics"]["accuracy"] == pytest.approx(np.mean(hits))
    assert result["metrics"]["num_answers"] == 3
    assert result["metrics"]["num_rows"] == 8


def test_the_vocabulary_keeps_the_most_common(caches, monkeypatch):
    from evaluation.metrics import vqa_answers as answers
    from teachercache.cache import store

    monkeypatch.setattr(answers, "NUM_ANSWERS", 2)
    words, vectors = from_cache.answers_of(store.open_complete(caches["vqa"][0]))
    assert words == ["cat", "dog"]  # 3, 3 and 2 of the training rows; alphabetical among equals
    monkeypatch.setattr(answers, "NUM_ANSWERS", 3129)
    assert from_cache.answers_of(store.open_complete(caches["vqa"][0]))[0] == ["cat", "dog", "owl"]
    assert np.linalg.norm(vectors, axis=1) == pytest.approx([1, 1])


def test_other_texts_under_the_same_keys_are_refused(caches, tasks, tmp_path, capsys):
    path, _ = caches["vcr"]
    lines = [json.loads(line) for line in (tasks / "vcr1/val.jsonl").read_text().splitlines()]
    lines[2]["answer_choices"][0] = ["He", "is", "gone", "."]
    changed = tasks / "vcr1/val_rule_singular.jsonl"
    changed.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["eval", str(path), "--task", "vcr", "--data", str(changed)]) == 2
    assert "1 rows of" in (error := capsys.readouterr().err)
    assert "tc build --teacher" in error
    assert main(["eval", str(path), "--task", "vcr", "--data", str(tasks / "vcr1/train.jsonl")]) == 2
    assert "are not in" in capsys.readouterr().err


def test_what_cannot_answer_is_said_in_one_line(caches, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/run.json").write_text(
        json.dumps({"format": 2, "questions": None, "student": {"family": "two_tower", "config": {}}})
    )
    for words, message in (
        (("nowhere",), "neither a run nor a cache"),
        ((tmp_path / "run",), "was not trained to answer"),
        ((tmp_path / "none.zarr",), "no cache at"),
    ):
        assert main(["eval", *map(str, words), "--task", "vcr", "--data", caches["vcr"][1]]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    with pytest.raises(UserError, match="holds no answers"):
        from_cache.answerers(caches["vcr"][0], "vqa")


def test_views_or_texts_alone_are_no_zero_shot(tmp_path, teacher_folder):
    (tmp_path / "names.txt").write_text("a cat\na dog\n")
    path = build_cache(tmp_path / "names.txt", teacher_folder, tmp_path / "names.zarr")
    with pytest.raises(UserError, match="no plain image and text embeddings in one space"):
        from_cache.answerers(path, "vcr")
