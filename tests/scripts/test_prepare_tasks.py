"""Scenes as VCR and SNLI-VE, easy-vqa as VQA v2: right answers, no shortcuts in the words, readable files."""

import importlib
import json
import sys
from collections import Counter
from pathlib import Path

import pytest

from teachercache.data.pictures import read_image
from teachercache.data.read import read_manifest
from teachercache.data.readers.questions import render_tokens

scenes = importlib.import_module("scripts.datasets.scenes")
questions = importlib.import_module("scripts.datasets.scene_questions")
hypotheses = importlib.import_module("scripts.datasets.scene_hypotheses")
scene_tasks = importlib.import_module("scripts.datasets.scene_vcr_snli_ve")
easy = importlib.import_module("scripts.datasets.easy_vqa")


def many(num: int) -> list[tuple[dict, dict]]:
    """Return (scene, question) pairs of drawn scenes, without pictures."""
    import random

    items = []
    for i in range(num):
        rng = random.Random(i)
        scene = scenes.draw_scene_values(rng)
        if questions.usable(scene):
            items += [(scene, item) for item in questions.questions_of(scene, rng)]
    return items


def holds(sentence: str, scene: dict, target: dict) -> bool:
    """Return whether every color, texture, size, shape, relation and count in a sentence fits the target object."""
    things, words = scene["objects"], sentence.rstrip(".").split()
    if "shapes" in words or "shape" in words:
        present = {thing["color"] for thing in things}
        return (("two" in words) == (len(things) == 2)) and words[-1] in present
    for fact in ("color", "texture", "size"):
        domain = {"color": scenes.COLORS, "texture": scenes.TEXTURES, "size": scenes.SIZES}[fact]
        if any(word in domain and word != target[fact] for word in words):
            return False
    if words[:2] in (["It", "is"],) and words[-1] != target["shape"]:
        return False
    relation = next((name for name in scenes.RELATIONS if name in sentence), None)
    if relation is None:
        return True
    other = next(thing for thing in things if thing is not target)
    step = scenes.RELATIONS[relation]
    away = [a - b for a, b in zip(target["center"], other["center"], strict=True)]
    return sum(a * b for a, b in zip(step, away, strict=True)) > 0.3


def target_of(item: dict, scene: dict) -> dict:
    """Return the object that a question refers to."""
    if item["category"] == "count":
        return scene["objects"][item["rationale_choices"][0][5][0]]
    if item["category"] == "shape":
        color = item["question"][4]
        return next(thing for thing in scene["objects"] if thing["color"] == color)
    place = next(token for token in item["question"] if isinstance(token, list))
    return scene["objects"][place[0]]


def test_the_right_choice_alone_is_true_of_the_scene():
    for scene, item in many(400):
        objects, target = [thing["shape"] for thing in scene["objects"]], target_of(item, scene)
        for what in ("answer", "rationale"):
            choices = [render_tokens(tokens, objects) for tokens in item[f"{what}_choices"]]
            assert len(set(choices)) == 4
            true = [i for i, choice in enumerate(choices) if holds(choice, scene, target)]
            assert true == [item[f"{what}_label"]], (choices, scene)


def test_words_do_not_reveal_the_right_choice():
    """Position, single words and overlap with the other choices do not reveal the right choice."""
    items = [item for _, item in many(6000)]
    for what in ("answer", "rationale"):
        places = Counter(item[f"{what}_label"] for item in items)
        assert max(places.values()) / len(items) < 0.265
        occurrences, right = Counter(), Counter()
        common = 0.0
        for item in items:
            choices = [{str(token) for token in choice} for choice in item[f"{what}_choices"]]
            for words in choices:
                occurrences.update(words)
            right.update(choices[item[f"{what}_label"]])
            shared = [sum(len(words & other) for other in choices) for words in choices]
            best = [i for i in range(4) if shared[i] == max(shared)]
            common += (item[f"{what}_label"] in best) / len(best)
        shares = {word: right[word] / count for word, count in occurrences.items() if count > 1500}
        assert all(abs(share - 0.25) < 0.04 for share in shares.values()), shares
        assert abs(common / len(items) - 0.25) < 0.02


def test_hypotheses_and_how_far_their_words_go():
    import random

    phrased = {label: Counter() for label in ("entailment", "neutral", "contradiction")}
    for i in range(3000):
        rng = random.Random(i)
        scene = scenes.draw_scene_values(rng)
        if not questions.usable(scene):
            continue
        present = {f"{thing['color']} {thing['shape']}" for thing in scene["objects"]}
        for sentence, label in hypotheses.hypotheses_of(scene, rng):
            is_open = any(words in sentence for words in hypotheses.OPEN)
            phrased[label][is_open] += 1
            if is_open:
                assert any(f" {name} that" in sentence for name in present) == (label == "neutral"), sentence
            if sentence.startswith("There is a") and not is_open:
                assert any(f" {name}." in sentence for name in present) == (label == "entailment"), sentence
    assert phrased["entailment"][True] == phrased["neutral"][False] == 0
    assert abs(phrased["contradiction"][True] / phrased["contradiction"].total() - 0.5) < 0.03


def test_both_sets_are_read_and_share_no_description(tmp_path):
    counts = scene_tasks.write_tasks(tmp_path / "a", 60, seed=1, size=48, test=0.4)
    assert scene_tasks.write_tasks(tmp_path / "b", 60, seed=1, size=48, test=0.4) == counts
    for path in (tmp_path / "a").rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()
    premises = {}
    for split, other in (("train", "train"), ("val", "dev")):
        vcr = read_manifest(str(tmp_path / f"a/vcr1/{split}.jsonl"))
        snli = read_manifest(str(tmp_path / f"a/snli_ve/snli_ve_{other}.jsonl"))
        assert (len(vcr), len(snli)) == (
            counts[f"vcr1/{split}.jsonl"],
            counts[f"snli_ve/snli_ve_{other}.jsonl"],
        )
        assert set(vcr.column("problem") + snli.column("problem")) == {""}
        assert read_image(vcr, vcr.row(0)).size == (48, 48)
        assert read_image(snli, snli.row(0)).size == (48, 48)
        tasks = [json.loads(task) for task in vcr.column("task")]
        assert all(len(task["boxes"]) == len(task["objects"]) for task in tasks)
        assert all(
            0 <= x < x2 <= 48 and 0 <= y < y2 <= 48 for task in tasks for x, y, x2, y2 in task["boxes"]
        )
        assert Counter(snli.column("label")) == dict.fromkeys(phrased_labels(), len(snli) // 3)
        premises[split] = {json.loads(task)["premise"] for task in snli.column("task")}
    assert premises["train"]
    assert not premises["train"] & premises["val"]
    line = json.loads((tmp_path / "a/vcr1/val.jsonl").read_text().splitlines()[0])
    assert line["category"] in questions.CATEGORIES
    assert line["question_orig"].endswith("?")


def phrased_labels() -> tuple[str, ...]:
    return ("entailment", "neutral", "contradiction")


def test_easy_vqa_in_the_layout_of_vqa(tmp_path):
    pytest.importorskip("easy_vqa")
    import easy_vqa

    package = Path(easy_vqa.__file__).parent
    counts = easy.write_vqa(tmp_path / "vqa", package, limit=4)
    for subset, folder in (("train2014", "train"), ("val2014", "test")):
        manifest = read_manifest(str(tmp_path / f"vqa/v2_OpenEnded_mscoco_{subset}_questions.json"))
        entries = json.loads((package / f"data/{folder}/questions.json").read_text())
        wanted = Counter((question, answer) for question, answer, image in entries if image < 4)
        tasks = [json.loads(task) for task in manifest.column("task")]
        assert Counter((task["question"], task["answer"]) for task in tasks) == wanted
        assert len(manifest) == counts[subset] == wanted.total()
        images = [task["image_id"] for task in tasks]
        assert images == sorted(images)
        assert len(set(images)) == 4
        assert all(task["answers"] == [task["answer"]] * 10 for task in tasks)
        assert {task["answer_type"] for task in tasks} == {"yes/no", "other"}
        assert all(task["question"].startswith(task["question_type"]) for task in tasks)
        assert read_image(manifest, manifest.row(0)).size == (64, 64)


def test_an_existing_folder_stays(tmp_path, monkeypatch, capsys):
    for module in (scene_tasks, easy):
        monkeypatch.setattr(sys, "argv", ["x", "--out", str(tmp_path)])
        assert module.main() == 2
        assert "exists; give another --out" in capsys.readouterr().err
