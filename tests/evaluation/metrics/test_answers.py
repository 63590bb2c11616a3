"""VCR, SNLI-VE and VQA metrics against loops by hand; ties, missing labels, models that collapsed or say NaN."""

import itertools
import json

import numpy as np
import pytest

from evaluation.data.splits import rows_to_measure
from evaluation.metrics.vqa_answers import normalize_answer
from evaluation.models.answerer import Answerer, ensemble, pick
from evaluation.results.run import measure, table
from evaluation.tasks.answering import snli_ve, vcr, vqa
from evaluation.tasks.registry import TASKS, find
from evaluation.tasks.task import Kind
from teachercache.core.errors import UserError
from teachercache.data.manifest import make_manifest, write_manifest
from teachercache.data.readers.questions import LABELS
from teachercache.data.sample import Sample, task_columns


def manifest_of(tasks: list[dict], tmp_path, splits=None):
    rows = [
        Sample(
            f"r{i}", "", (f"text {i}",), split=(splits or ["val"] * len(tasks))[i], task=task_columns(**task)
        )
        for i, task in enumerate(tasks)
    ]
    return make_manifest(str(tmp_path / "data"), tmp_path, rows)


def fixed(scores: dict[str, np.ndarray | None], task: str, **more) -> Answerer:
    """A model whose scores stand in a table, row by row of the manifest."""

    def score(manifest, rows, which):
        found = scores[which]
        return None if found is None else found[rows]

    return Answerer(more.pop("name", "fixed"), "by hand", task, score, **more)


# ----------------------------------------------------------------------------------------------------
# Picking


def test_pick_takes_a_single_best_only():
    scores = np.array(
        [[1, 2, 0], [2, 2, 0], [np.nan, 2, 0], [-np.inf, -3, -np.inf], [0, 0, 0], [1, 1, 2]], np.float32
    )
    chosen, ties = pick(scores)
    assert chosen.tolist() == [1, -1, -1, 1, -1, 2]
    assert ties.tolist() == [False, True, False, False, True, False]


def test_which_rows_are_measured(tmp_path):
    def of(*splits):
        return rows_to_measure(manifest_of([{}] * len(splits), tmp_path, splits)).tolist()

    assert of("train", "train") == [0, 1]  # the file of one split is what was asked for
    assert of("train", "test", "val", "val") == [2, 3]
    assert of("train", "test") == [1]
    with pytest.raises(UserError, match="neither val nor test"):
        of("train", "extra")
    assert of("train", "dev") == [1]  # as val


# ----------------------------------------------------------------------------------------------------
# VCR


@pytest.fixture
def vcr_tasks():
    random = np.random.default_rng(0)
    tasks = [
        {
            "task": "vcr",
            "category": ["color", "size"][i % 2],
            "label": int(random.integers(4)),
            "rationale_label": int(random.integers(4)),
        }
        for i in range(60)
    ]
    for i in (3, 4):
        del tasks[i]["rationale_label"]
    del tasks[5]["label"], tasks[5]["rationale_label"]
    del tasks[7]["category"]
    return tasks


@pytest.fixture
def vcr_scores():
    scores = {
        which: np.random.default_rng(k).integers(0, 6, (60, 4)).astype(np.float32)
        for k, which in enumerate(("q2a", "qa2r"))
    }
    scores["q2a"][9] = np.nan  # its picture could not be read
    scores["qa2r"][10, 2] = np.nan  # the model broke down
    return scores


def test_vcr_is_the_loop(vcr_tasks, vcr_scores, tmp_path):
    found = vcr.evaluate(fixed(vcr_scores, "vcr"), manifest_of(vcr_tasks, tmp_path))
    hits = {"q2a": {}, "qa2r": {}}
    tied = {"q2a": [], "qa2r": []}
    for i, task in enumerate(vcr_tasks):
        for which, column in (("q2a", "label"), ("qa2r", "rationale_label")):
            row = vcr_scores[which][i].tolist()
            if column not in task or all(value != value for value in row):
                continue
            others = [value for k, value in enumerate(row) if k != task[column]]
            hits[which][i] = all(row[task[column]] > other for other in others)
            best = max(value for value in row if value == value)
            tied[which].append(row.count(best) > 1)
    both = {i: hits["q2a"][i] and hits["qa2r"][i] for i in hits["q2a"] if i in hits["qa2r"]}
    for which, values in {**hits, "q2ar": both}.items():
        assert found[which] == pytest.approx(sum(values.values()) / len(values)), which
        assert 0 < found[which] < 1
        for category in ("color", "size"):
            mine = [value for i, value in values.items() if vcr_tasks[i].get("category") == category]
            assert found[f"{which}:category={category}"] == pytest.approx(sum(mine) / len(mine))
    for which, values in tied.items():
        assert found[f"{which}_tie_rate"] == pytest.approx(sum(values) / len(values))
        assert found[f"{which}_tie_rate"] > 0
    assert (found["q2a_num_skipped"], found["qa2r_num_skipped"], found["num_rows"]) == (2, 3, 60)


def test_vcr_says_what_cannot_be_measured(vcr_tasks, vcr_scores, tmp_path):
    bare = [{"task": "vcr"}] * 60
    found = vcr.evaluate(fixed(vcr_scores, "vcr"), manifest_of(bare, tmp_path))
    assert all(
        found[which].startswith("skipped: ") and "has no" in found[which] for which in ("q2a", "qa2r", "q2ar")
    )
    half = vcr.evaluate(fixed({**vcr_scores, "qa2r": None}, "vcr"), manifest_of(vcr_tasks, tmp_path))
    assert isinstance(half["q2a"], float)
    assert half["qa2r"] == half["q2ar"] == "skipped: fixed was not made for qa2r"
    broken = dict.fromkeys(("q2a", "qa2r"), np.full((60, 4), np.nan, np.float32))
    assert vcr.evaluate(fixed(broken, "vcr"), manifest_of(vcr_tasks, tmp_path))["q2a"].startswith(
        "skipped: fixed has"
    )
    apart = [{"label": 0}, {"rationale_label": 0}]
    some = {
        "q2a": np.eye(4, dtype=np.float32)[:1].repeat(2, 0),
        "qa2r": np.eye(4, dtype=np.float32)[:1].repeat(2, 0),
    }
    found = vcr.evaluate(fixed(some, "vcr"), manifest_of(apart, tmp_path))
    assert (found["q2a"], found["qa2r"], found["q2ar"]) == (1.0, 1.0, "skipped: no row has both labels")


# ----------------------------------------------------------------------------------------------------
# SNLI-VE


def test_snli_ve_is_the_loop(tmp_path):
    random = np.random.default_rng(1)
    labels = random.integers(0, 3, 50).tolist()
    tasks = [{"label": label} for label in labels]
    del tasks[4]["label"]
    scores = random.integers(0, 5, (50, 3)).astype(np.float32)
    scores[6] = np.nan
    found = snli_ve.evaluate(fixed({"": scores}, "snli_ve", clusters=True), manifest_of(tasks, tmp_path))
    picks, gold = [], []
    for i, row in enumerate(scores.tolist()):
        if i in (4, 6):
            continue
        best = [k for k in range(3) if all(row[k] > row[j] for j in range(3) if j != k)]
        picks.append(best[0] if best else None)
        gold.append(labels[i])
    assert found["accuracy"] == pytest.approx(sum(a == b for a, b in zip(picks, gold, strict=True)) / 48)
    for label, name in enumerate(LABELS):
        mine = [a == b for a, b in zip(picks, gold, strict=True) if b == label]
        assert found[f"accuracy:label={name}"] == pytest.approx(sum(mine) / len(mine))
    assert found["tie_rate"] == pytest.approx(picks.count(None) / 48)
    assert (found["num_rows"], found["num_skipped"]) == (48, 2)
    from scipy.optimize import linear_sum_assignment

    confusion = np.array(
        [
            [sum(a == k and b == j for a, b in zip(picks, gold, strict=True)) for j in range(3)]
            for k in range(3)
        ]
    )
    at = linear_sum_assignment(confusion, maximize=True)
    assert found["accuracy_best_mapping"] == pytest.approx(confusion[at].sum() / 48)
    assert found["accuracy_best_mapping"] >= found["accuracy"]
    assert "transductive" in found["protocol"]
    assert "accuracy_best_mapping" not in snli_ve.evaluate(
        fixed({"": scores}, "snli_ve"), manifest_of(tasks, tmp_path)
    )


# ----------------------------------------------------------------------------------------------------
# VQA


def slow_accuracy(said: str, given: list[str]) -> float:
    """The mean over the ten sets of nine, by their definition; answers are compared as they are."""
    shares = []
    for left_out in range(len(given)):
        others = [answer for i, answer in enumerate(given) if i != left_out]
        shares.append(min(1, sum(answer == said for answer in others) / 3))
    return sum(shares) / len(shares)


def test_soft_accuracy_is_the_loop():
    for times in range(11):
        given = ["cat"] * times + ["dog", "bird", "fish", "cow", "ant", "bee", "fly", "owl", "pig", "hen"][
            times:
        ]
        assert vqa.soft_accuracy("cat", given) == pytest.approx(slow_accuracy("cat", given))
    assert [round(vqa.soft_accuracy("x", ["x"] * k + ["y"] * (10 - k)), 3) for k in range(5)] == [
        0,
        0.3,
        0.6,
        0.9,
        1,
    ]
    assert vqa.soft_accuracy("x", ["y"] * 10) == vqa.soft_accuracy(None, ["y"] * 10) == 0
    for k, seed in itertools.product(range(4), range(20)):
        given = np.random.default_rng(seed).choice(["w", "x", "y", "z"], 10).tolist()
        assert vqa.soft_accuracy("wxyz"[k], given) == pytest.approx(slow_accuracy("wxyz"[k], given))


@pytest.mark.parametrize(
    ("raw", "tidy"),
    [
        ("The Cat", "cat"),
        ("two dogs and an apple", "2 dogs and apple"),
        ("None", "0"),
        ("dont", "don't"),
        ("couldn'tve", "couldn't've"),
        ("couldnt've", "couldn't've"),
        ("somebody'd", "somebodyd"),  # taken apart where all others are put together
        ("shes", "shes"),  # not in the table
        ("Im", "im"),  # is there with a capital, which never comes
        ("yall'd've", "y'all'd've"),
        ("ows'at", "ows'at"),
        ("'ows'at", "'ow's'at"),
        ("black/white", "black white"),  # nothing beside the mark: a space
        ("black /white", "black white"),  # a space beside it: gone
        ("black, white-ish", "black white ish"),
        ("1,000", "1000"),
        ("1,000/day", "1000day"),  # digits about a comma: every mark goes without a trace
        ("3.5", "3.5"),
        ("no.", "no"),
        ("3.a", "3a"),  # what is before the period does not matter
        ("a.m.", "am"),
        ("." * 40, "." * 8),  # 32 periods and no more
        ("t-shirt", "t shirt"),
        ("what?!", "what"),
        ("it's", "it's"),
        ("", ""),
    ],
)
def test_normalization(raw, tidy):
    assert normalize_answer(raw) == tidy


def test_equal_answers_are_compared_as_they_are():
    alike, one_other = ["The cat"] * 10, ["The cat"] * 9 + ["dog"]
    assert vqa.soft_accuracy("cat", alike) == 0.0
    assert vqa.soft_accuracy("The cat", alike) == 1.0
    assert vqa.soft_accuracy(" The cat\n", alike) == 1.0
    assert vqa.soft_accuracy("cat", one_other) == 1.0
    assert vqa.soft_accuracy("cat", alike, "mmf") == 1.0


def test_vqa_is_the_loop(tmp_path, monkeypatch):
    random = np.random.default_rng(2)
    words = ["yes", "no", "2", "red", "blue"]
    given = [random.choice(words, 10, p=[0.4, 0.3, 0.1, 0.1, 0.1]).tolist() for _ in range(40)]
    tasks = [
        {"answers": answers, "answer_type": ["yes/no", "other"][i % 2], "question_type": "is"}
        for i, answers in enumerate(given)
    ]
    del tasks[11]["answers"]
    scores = random.integers(0, 4, (40, 5)).astype(np.float32)
    scores[12] = np.nan
    monkeypatch.setattr(vqa, "CHUNK", 7)
    found = vqa.evaluate(fixed({"": scores}, "vqa", answers=tuple(words)), manifest_of(tasks, tmp_path))
    hits = {}
    for i in set(range(40)) - {11, 12}:
        row = scores[i].tolist()
        best = [k for k in range(5) if row.count(max(row)) == 1 and row[k] == max(row)]
        hits[i] = slow_accuracy(words[best[0]], given[i]) if best else 0.0
    assert found["accuracy"] == pytest.approx(sum(hits.values()) / 38)
    for k, name in enumerate(("yes/no", "other")):
        mine = [hit for i, hit in hits.items() if i % 2 == k]
        assert found[f"accuracy:answer_type={name}"] == pytest.approx(sum(mine) / len(mine))
    assert found["accuracy:question_type=is"] == pytest.approx(found["accuracy"])
    assert (found["num_rows"], found["num_skipped"], found["num_answers"]) == (38, 2, 5)
    with pytest.raises(UserError, match="choose from official, mmf"):
        vqa.evaluate(fixed({"": scores}, "vqa"), manifest_of(tasks, tmp_path), protocol="lavis")


# ----------------------------------------------------------------------------------------------------
# All three


LABELED = {
    "vcr": ({"label": 0, "rationale_label": 0}, 4, ("q2a", "qa2r", "q2ar"), "q2a_tie_rate"),
    "snli_ve": ({"label": 0}, 3, ("accuracy", "accuracy:label=entailment"), "tie_rate"),
    "vqa": ({"answers": ["a b"] * 9 + ["c"]}, 5, ("accuracy",), "tie_rate"),
}


@pytest.mark.parametrize("task", [task.name for task in TASKS.values() if task.kind is Kind.ANSWERER])
def test_a_collapsed_model_scores_nothing(task, tmp_path):
    columns, choices, names, ties = LABELED[task]
    same = np.zeros((8, choices), np.float32)
    model = fixed(
        {"": same, "q2a": same, "qa2r": same}, task, answers=tuple("abcde") if task == "vqa" else ()
    )
    found = find(task).function(model, manifest_of([columns] * 8, tmp_path))
    assert {found[name] for name in names} == {0.0}
    assert found[ties] == 1.0


@pytest.mark.parametrize("task", ["snli_ve", "vqa"])
def test_no_labels_are_no_zero(task, tmp_path):
    found = find(task).function(
        fixed({"": np.zeros((3, 3), np.float32)}, task), manifest_of([{"task": task}] * 3, tmp_path)
    )
    assert found["accuracy"].startswith("skipped: ")


def test_an_ensemble_is_the_mean_of_softmaxes_of_those_that_answer(vcr_tasks, vcr_scores, tmp_path):
    first = fixed({"q2a": vcr_scores["q2a"], "qa2r": None}, "vcr", name="one")
    second = fixed({"q2a": vcr_scores["q2a"][::-1] / 3, "qa2r": vcr_scores["qa2r"]}, "vcr", name="two")
    both = ensemble([first, second])
    manifest, rows = manifest_of(vcr_tasks, tmp_path), np.arange(20, 40)
    wanted = []
    for i in rows:
        chances = [
            np.exp(part[i].astype(float)) / np.exp(part[i].astype(float)).sum()
            for part in (vcr_scores["q2a"], vcr_scores["q2a"][::-1] / 3)
        ]
        wanted.append((chances[0] + chances[1]) / 2)
    np.testing.assert_allclose(both.score(manifest, rows, "q2a"), wanted, rtol=1e-5)
    alone = second.score(manifest, rows, "qa2r")
    assert (both.score(manifest, rows, "qa2r").argmax(1) == alone.argmax(1)).all()
    assert ensemble([first]).score(manifest, rows, "qa2r") is None
    assert both.name == "ensemble of one + two"


def test_an_ensemble_over_different_answers(tmp_path):
    first = fixed({"": np.array([[0.0, 1.0]], np.float32)}, "vqa", answers=("x", "y"))
    second = fixed({"": np.array([[3.0, 0.0]], np.float32)}, "vqa", answers=("z", "x"))
    both = ensemble([first, second])
    assert both.answers == ("x", "y", "z")
    one, two = np.exp([0, 1]) / np.exp([0, 1]).sum(), np.exp([3, 0]) / np.exp([3, 0]).sum()
    found = both.score(manifest_of([{}], tmp_path), np.array([0]), "")
    np.testing.assert_allclose(found, [[(one[0] + two[1]) / 2, one[1] / 2, two[0] / 2]], rtol=1e-5)


def test_results_of_two_models_and_of_both(vcr_tasks, vcr_scores, tmp_path):
    (tmp_path / "data").mkdir()
    write_manifest(manifest_of(vcr_tasks, tmp_path), tmp_path / "data/val.parquet")
    models = [
        [fixed({"q2a": vcr_scores["q2a"], "qa2r": None}, "vcr", name="answers")],
        [fixed({"q2a": None, "qa2r": vcr_scores["qa2r"]}, "vcr", name="reasons")],
    ]
    results = list(measure(find("vcr"), models, str(tmp_path / "data/val.parquet")))
    assert [result["model"] for result in results] == ["answers", "reasons", "ensemble of answers + reasons"]
    assert [isinstance(result["metrics"]["q2ar"], float) for result in results] == [False, False, True]
    assert results[2]["metrics"]["q2a"] == results[0]["metrics"]["q2a"]
    assert json.loads(json.dumps(results, allow_nan=False)) == results
    assert "skipped: answers was not made for qa2r" in table(results)
    assert len(list(measure(find("vcr"), models[:1], str(tmp_path / "data/val.parquet")))) == 1
