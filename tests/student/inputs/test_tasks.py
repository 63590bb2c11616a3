"""A task's questions as a student reads them: parts, places, targets, vocabularies, regimes."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evaluation.metrics.vqa_answers import vocabulary
from student.inputs.questions import (
    VQA_SCORES,
    Task,
    find_task,
    labeled_rows,
    question_category,
    read_question,
)
from teachercache.core.errors import UserError
from teachercache.data.read import read_manifest

VCR = Task("vcr", "q2a", 4, 4)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VCR and an SNLI-VE set of 40 pictures."""
    from scripts.datasets import scene_vcr_snli_ve as prepare_scene_tasks

    out = tmp_path_factory.mktemp("tasks") / "scenes"
    prepare_scene_tasks.write_tasks(out, 40, seed=1, size=32, test=0.2)
    return out


def write_vqa(folder: Path, answers: list[list[str]]) -> Path:
    """VQA v2's two files and a picture for all questions."""
    (folder / "train2014").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(folder / "train2014" / "COCO_train2014_000000000001.jpg")
    questions = [{"image_id": 1, "question": f"What is {i}?", "question_id": i} for i in range(len(answers))]
    notes = [
        {
            "question_id": i,
            "image_id": 1,
            "question_type": "what is",
            "answer_type": "other",
            "multiple_choice_answer": Counter(given).most_common(1)[0][0],
            "answers": [
                {"answer": one, "answer_confidence": "yes", "answer_id": k} for k, one in enumerate(given)
            ],
        }
        for i, given in enumerate(answers)
    ]
    path = folder / "v2_OpenEnded_mscoco_train2014_questions.json"
    path.write_text(json.dumps({"data_subtype": "train2014", "questions": questions}))
    (folder / "v2_mscoco_train2014_annotations.json").write_text(json.dumps({"annotations": notes}))
    return path


def test_a_vcr_row_asks_four_pairs_and_its_rationales_know_the_right_answer(scenes):
    manifest = read_manifest(str(scenes / "vcr1"))
    for number in range(0, len(manifest), 7):
        sample, line = manifest.row(number), json.loads(manifest.row(number).task)
        found = read_question(VCR, sample)
        assert found.target == {line["label"]: 1.0}
        assert found.labeled
        assert found.group == line["category"]
        for k, (first, second) in enumerate(found.parts):
            assert (first, second) == (line["question"], line["choices"][k])
            assert sample.texts[found.places[k]] == f"{first} {second}"
            assert sample.texts[found.answers[k]] == second
        reasons = read_question(Task("vcr", "qa2r", 4, 4), sample)
        assert reasons.target == {line["rationale_label"]: 1.0}
        right = f"{line['question']} {line['choices'][line['label']]}"
        for k, (first, second) in enumerate(reasons.parts):
            assert (first, second) == (right, line["rationales"][k])
            assert sample.texts[reasons.places[k]] == f"{first} {second}"


@pytest.mark.parametrize("which", ["q2a", "qa2r"])
def test_mentions_point_at_the_words_of_their_objects_in_the_joined_parts(scenes, which):
    """Each reference of VCR's own lines once, in order: the question's, then of what follows."""
    manifest = read_manifest(str(scenes / "vcr1"))
    texts = [
        line for name in ("train", "val") for line in (scenes / f"vcr1/{name}.jsonl").read_text().splitlines()
    ]
    lines = {line["annot_id"]: line for line in map(json.loads, texts)}
    checked = 0
    for number in range(len(manifest)):
        sample = manifest.row(number)
        line, found = lines[sample.key.split("/")[-1]], read_question(Task("vcr", which, 4, 4), sample)
        before = line["question"] + (line["answer_choices"][line["answer_label"]] if which == "qa2r" else [])
        for k, (parts, named) in enumerate(zip(found.parts, found.mentions, strict=True)):
            tokens = before + line["answer_choices" if which == "q2a" else "rationale_choices"][k]
            places = [place for token in tokens if isinstance(token, list) for place in token]
            assert [place for *_, place in named] == places
            assert [" ".join(parts)[a:b] for a, b, _ in named] == [line["objects"][place] for place in places]
            checked += len(places)
    assert checked > 500


def test_an_snli_ve_row_asks_its_hypothesis(scenes):
    manifest = read_manifest(str(scenes / "snli_ve"))
    task = find_task(manifest, np.arange(3), "q2a")
    assert (task.name, task.inputs, task.classes) == ("snli_ve", 1, 3)
    sample = manifest.row(0)
    found = read_question(task, sample)
    assert found.parts == ((sample.texts[0], ""),)
    assert found.places == (0,)
    assert found.target == {("entailment", "neutral", "contradiction").index(sample.label): 1.0}


def test_vqa_targets_are_the_mean_accuracy_over_nine_of_ten_people(tmp_path):
    """Against the official definition: mean over the people left out of min(matches among the other nine / 3, 1)."""
    answers = [["red"] * n + ["blue"] * (10 - n) for n in range(11)]
    manifest = read_manifest(str(write_vqa(tmp_path, answers)))
    task = find_task(manifest, np.arange(len(manifest)), "q2a")
    assert set(task.answers) == {"red", "blue"}
    assert task.classes == 2
    for n in range(11):
        given = answers[n]
        expected = {}
        for answer in set(given):
            left = [
                min(sum(one == answer for k, one in enumerate(given) if k != i) / 3, 1) for i in range(10)
            ]
            expected[task.answers.index(answer)] = sum(left) / 10
        found = read_question(task, manifest.row(n)).target
        assert found == pytest.approx(expected)
    assert len(VQA_SCORES) == 4


def test_a_vocabulary_has_the_common_answers_first_and_all_of_small_data(tmp_path):
    assert vocabulary(["red"] * 3 + [""] * 9 + ["blue"] * 5 + ["Red", "a red"]) == ["blue", "red"]
    many = [f"answer{n:02d}" for n in range(25) for _ in range(9 if n < 21 else 8)]
    assert vocabulary(many) == [f"answer{n:02d}" for n in range(21)]
    assert len(vocabulary(f"answer{n}" for n in range(3200) for _ in range(9))) == 3129
    manifest = read_manifest(str(write_vqa(tmp_path, [["red"] * 10] * 3)))
    with pytest.raises(UserError, match="annotations file"):
        find_task(manifest, np.arange(3), "q2a")


def test_regimes_choose_so_many_of_each_group_and_the_same_again(scenes):
    manifest = read_manifest(str(scenes / "vcr1"))
    rows = manifest.rows_of_split("train")
    groups = np.array([read_question(VCR, manifest.row(row)).group for row in rows.tolist()])
    chosen = labeled_rows(VCR, manifest, rows, regime="low:3", subset=0)
    assert Counter(groups[chosen]) == {group: min(3, n) for group, n in Counter(groups).items()}
    assert (chosen == labeled_rows(VCR, manifest, rows, regime="semi:3", subset=0)).all()
    assert (chosen != labeled_rows(VCR, manifest, rows, regime="low:3", subset=1)).any()
    assert labeled_rows(VCR, manifest, rows, regime="full", subset=0).all()
    assert not labeled_rows(VCR, manifest, rows, regime="zero", subset=0).any()
    snli = read_manifest(str(scenes / "snli_ve"))
    rows = snli.rows_of_split("train")
    chosen = labeled_rows(find_task(snli, rows, "q2a"), snli, rows, regime="low:4", subset=0)
    assert set(Counter(snli.row(row).label for row in rows[chosen].tolist()).values()) == {4}
    for regime in ("low", "low:", "low:x", "low:0", "some:3", "full:3"):
        with pytest.raises(UserError, match="--set regime"):
            labeled_rows(VCR, manifest, rows[:1], regime=regime, subset=0)


@pytest.mark.parametrize(
    ("question", "category"),
    [
        ("Why is person 1 smiling?", "explanation"),
        ("What will happen next?", "temporal"),
        ("Where are they?", "scene"),
        ("What is person 2 doing?", "activity"),
        ("How does person 1 feel?", "explanation"),
        ("What is the relationship of person 1 and person 2?", "role"),
        ("Is person 1 angry?", "mental"),
        ("What would person 1 do if it rained?", "hypothetical"),
    ],
)
def test_question_categories(question, category):
    assert question_category(question) == category


def test_data_that_asks_nothing_and_rows_of_another_task_are_told(data, scenes):
    manifest = read_manifest(str(data))
    with pytest.raises(UserError, match="has no questions"):
        find_task(manifest, np.arange(2), "q2a")
    with pytest.raises(UserError, match="is not a row of vcr"):
        read_question(VCR, read_manifest(str(scenes / "snli_ve")).row(0))
    with pytest.raises(UserError, match="choose q2a"):
        find_task(read_manifest(str(scenes / "vcr1")), np.arange(2), "both")
