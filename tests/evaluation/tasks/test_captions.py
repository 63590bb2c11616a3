"""Captions and open-ended answers: scores against other libraries, readers on files in their true layout."""

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evaluation.metrics import captions as caption_scores
from evaluation.metrics.captions import bleu, cider, plain_words, score_captions
from evaluation.models.generator import MASK, Generator, answer_prompt, caption_prompt
from evaluation.results.run import measure, table
from evaluation.tasks.registry import find
from teachercache.core.errors import UserError
from teachercache.data.read import read_manifest

WORDS = [
    "a",
    "the",
    "red",
    "blue",
    "cat",
    "dog",
    "on",
    "under",
    "mat",
    "box",
    "sits",
    "runs",
    "and",
    "with",
    "two",
]


@pytest.fixture(autouse=True)
def no_java(monkeypatch: pytest.MonkeyPatch) -> None:
    """METEOR takes half a minute to start."""
    monkeypatch.setattr(caption_scores, "has_java", lambda: False)


def corpus(num: int, seed: int, shortest: int = 1) -> tuple[list[str], list[list[str]]]:
    draw = random.Random(seed)

    def text(low: int = 4) -> str:
        return " ".join(draw.choice(WORDS) for _ in range(draw.randint(low, 12)))

    references = [[text() for _ in range(draw.randint(1, 5))] for _ in range(num)]
    said = [draw.choice(own) if draw.random() < 0.4 else text(shortest) for own in references]
    return said, references


def slow_cider(said: list[str], references: list[list[str]]) -> float:
    """CIDEr-D from its equations, with a dense vector of each n-gram length (Vedantam et al. 2015, section 4 and 8)."""
    total = 0.0
    for n in range(1, 5):

        def grams(text: str, n: int = n) -> list[tuple]:
            words = text.split()
            return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]

        known = sorted({gram for texts in [said, *references] for text in texts for gram in grams(text)})
        found_in = {
            gram: sum(any(gram in grams(text) for text in texts) for texts in references) for gram in known
        }

        def vector(text: str, known=known, found_in=found_in, grams=grams) -> np.ndarray:
            own = grams(text)
            return np.array([own.count(g) * math.log(len(references) / max(1, found_in[g])) for g in known])

        for text, texts in zip(said, references, strict=True):
            for other in texts:
                h, s = vector(text), vector(other)
                norm = np.linalg.norm(h) * np.linalg.norm(s)
                away = max(0, len(text.split()) - 1) - max(0, len(other.split()) - 1)
                near = math.exp(-(away**2) / 72)
                total += 10 / 4 / len(texts) * near * (np.minimum(h, s) @ s / norm if norm else 0)
    return total / len(said)


@pytest.mark.parametrize("seed", range(3))
def test_cider_is_its_equations(seed):
    said, references = corpus(8, seed)
    assert cider(said, references)["CIDEr"] == pytest.approx(slow_cider(said, references), rel=1e-12)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_bleu_is_nltks(n):
    corpus_bleu = pytest.importorskip("nltk.translate.bleu_score").corpus_bleu
    said, references = corpus(
        40, seed=n, shortest=4
    )  # nltk counts an n-gram in a text that is too short for one
    split = [[text.split() for text in texts] for texts in references]
    theirs = corpus_bleu(split, [text.split() for text in said], weights=(1 / n,) * n)
    assert 0.1 < theirs < 0.9
    assert bleu(said, references)[f"Bleu_{n}"] == pytest.approx(theirs, rel=1e-6)


def test_scores_are_pycocoevalcaps():
    module = pytest.importorskip("pycocoevalcap.cider.cider")
    said, references = corpus(60, seed=9)
    said[3], said[4] = "", "zebra"
    numbered = dict(enumerate(references)), {i: [text] for i, text in enumerate(said)}
    assert cider(said, references)["CIDEr"] == pytest.approx(
        module.Cider().compute_score(*numbered)[0], rel=1e-12
    )
    from pycocoevalcap.bleu.bleu import Bleu

    theirs = Bleu(4).compute_score(*numbered, verbose=0)[0]
    assert list(bleu(said, references).values()) == pytest.approx(theirs, rel=1e-9)


def test_every_metric_stands_or_says_why_not(monkeypatch):
    """Without the extra, and with it but without Java or SPICE's jars: a reason, never a number."""
    said, references = (
        ["A cat sits on the mat.", "two dogs"],
        [["a cat on a mat", "the cat sits"], ["two red dogs"]],
    )
    found = score_captions(said, references)
    assert found["tokenizer"] == "plain"
    assert isinstance(found["CIDEr"], float)
    assert 0 < found["Bleu_1"] < 1
    for name in ("METEOR", "SPICE"):
        assert found[name].startswith("skipped: ")
    monkeypatch.setattr(caption_scores.importlib.util, "find_spec", lambda _: None)
    bare = score_captions(said, references, only=("Bleu", "CIDEr", "ROUGE_L"))
    assert bare["ROUGE_L"] == caption_scores.INSTALL
    assert "METEOR" not in bare
    for name in ("CIDEr", "Bleu_1", "Bleu_2"):
        assert bare[name] == pytest.approx(found[name], rel=1e-9)


def test_words_are_split_as_the_treebank_has_them_where_it_matters():
    assert plain_words("A cat, don't you see? It's on the man's T-shirt...") == (
        ["a", "cat", "do", "n't", "you", "see", "it", "'s", "on", "the", "man", "'s", "t-shirt"]
    )
    assert plain_words('5,000.5 dogs - "cats" a--b') == ["5,000.5", "dogs", "cats", "a", "b"]
    assert plain_words(" ... ") == []


# ----------------------------------------------------------------------------------------------------
# Tasks


def pictures(folder: Path, names: list[str]) -> None:
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (i * 20, 0, 0)).save(folder / name)


def writer(texts: dict[int, str], asked: list) -> Generator:
    """Says a text by the red of the picture."""

    def generate(images, prompts, beams, longest):
        asked.append((list(prompts), beams, longest))
        return [texts[round(image.getpixel((0, 0))[0] / 20)] for image in images]

    return Generator("fake", "fake", generate)


def test_karpathys_test_split_is_captioned(tmp_path):
    """dataset_coco.json: other splits are left alone, a picture that is missing is counted."""
    rows = [
        ("train", "a1.png"),
        ("test", "a2.png"),
        ("test", "a3.png"),
        ("test", "gone.png"),
        ("val", "a4.png"),
    ]
    images = [
        {
            "filename": name,
            "filepath": "val2014",
            "cocoid": 7 + i,
            "split": split,
            "imgid": i,
            "sentences": [{"raw": f"A cat number {i} .", "tokens": []}, {"raw": "the animal", "tokens": []}],
        }
        for i, (split, name) in enumerate(rows)
    ]
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": images, "dataset": "coco"}))
    pictures(tmp_path, [f"val2014/{name}" for _, name in rows if name != "gone.png"])
    asked: list = []
    texts = {1: "A cat number 1.", 2: "the  dog"}
    found = next(measure(find("captions"), [writer(texts, asked)], str(tmp_path / "dataset_coco.json")))
    assert found["results"] == [
        {"image_id": 8, "caption": "A cat number 1."},
        {"image_id": 9, "caption": "the dog"},
    ]
    metrics = found["metrics"]
    assert (metrics["num_images"], metrics["num_skipped"], metrics["num_different"]) == (2, 1, 2)
    assert asked == [([f"A picture of {MASK * 6}."] * 2, 6, 24)]
    assert "CIDEr" in table([found])
    next(measure(find("captions:masks=8"), [writer(texts, asked)], str(tmp_path / "dataset_coco.json")))
    assert asked[-1][0] == [f"A picture of {MASK * 8}."] * 2


def test_nocaps_is_scored_by_domain_with_its_own_frequencies(tmp_path):
    domains = ["in-domain", "near-domain", "out-domain", "near-domain"]
    images = [
        {
            "id": i,
            "file_name": f"{i:016x}.jpg",
            "open_images_id": f"{i:016x}",
            "domain": domain,
            "width": 8,
            "height": 8,
            "coco_url": "",
            "date_captured": "",
            "license": 0,
        }
        for i, domain in enumerate(domains)
    ]
    texts = {0: "a red cat", 1: "a blue dog runs", 2: "two boxes", 3: "the mat"}
    notes = [
        {"id": 10 * i + k, "image_id": i, "caption": caption}
        for i in texts
        for k, caption in enumerate([texts[i], "a thing on a mat"])
    ]
    path = tmp_path / "nocaps_val_4500_captions.json"
    path.write_text(json.dumps({"info": {}, "licenses": [], "images": images, "annotations": notes}))
    pictures(tmp_path, [f"images/{image['file_name']}" for image in images])
    metrics = find("captions").function(writer(texts, []), read_manifest(str(path)))
    near = [[texts[i], "a thing on a mat"] for i in (1, 3)]
    assert metrics["CIDEr:domain=near-domain"] == pytest.approx(cider([texts[1], texts[3]], near)["CIDEr"])
    assert metrics["CIDEr"] == pytest.approx(
        cider(list(texts.values()), [[text, "a thing on a mat"] for text in texts.values()])["CIDEr"]
    )
    assert {key.split("=")[1] for key in metrics if key.startswith("Bleu_4:")} == set(domains)


def vqa_files(folder: Path, answers: list[list[str]], raw: list[list[str]] | None = None) -> Path:
    """OK-VQA's two files where `raw` is given, else VQA v2's."""
    questions = [
        {"image_id": i, "question": f"What is {i}?", "question_id": 100 + i} for i in range(len(answers))
    ]
    notes = [
        {
            "question_id": 100 + i,
            "image_id": i,
            "question_type": "one",
            "answer_type": "other",
            "confidence": 3,
            "multiple_choice_answer": given[0],
            "answers": [
                {
                    "answer": one,
                    "answer_confidence": "yes",
                    "answer_id": k + 1,
                    **({"raw_answer": raw[i][k]} if raw else {}),
                }
                for k, one in enumerate(given)
            ],
        }
        for i, given in enumerate(answers)
    ]
    head = {"info": {}, "license": {}, "data_type": "mscoco", "data_subtype": "val2014"}
    version = "" if raw else "v2_"
    path = folder / f"{version}OpenEnded_mscoco_val2014_questions.json"
    path.write_text(json.dumps(head | {"task_type": "Open-Ended", "questions": questions}))
    (folder / f"{version}mscoco_val2014_annotations.json").write_text(
        json.dumps(head | {"annotations": notes})
    )
    pictures(folder, [f"val2014/COCO_val2014_{i:012d}.jpg" for i in range(len(answers))])
    return path


def test_open_answers_have_the_official_accuracy(tmp_path):
    path = vqa_files(tmp_path, [["cat"] * 2 + ["dog"] * 8, ["red"] * 10, ["two"] * 4 + ["2"] * 6])
    asked: list = []
    found = next(measure(find("open_vqa"), [writer({0: "Cat", 1: "", 2: "two"}, asked)], str(path)))
    metrics = found["metrics"]
    assert metrics["accuracy"] == pytest.approx(((2 * 1 / 3 + 8 * 2 / 3) / 10 + 0 + 1) / 3)
    assert asked[0][0][0] == f"What is 0? Answer: {MASK * 2}."
    assert asked[0][1] == 1
    assert found["results"][2] == {"question_id": 102, "answer": "two"}
    assert metrics["accuracy:answer_type=other"] == metrics["accuracy"]


def test_ok_vqa_is_also_compared_with_what_people_wrote(tmp_path):
    path = vqa_files(tmp_path, [["race"] * 10], [["racing"] * 10])
    metrics = next(measure(find("open_vqa"), [writer({0: "racing"}, [])], str(path)))["metrics"]
    assert (metrics["accuracy"], metrics["accuracy:raw_answer"]) == (0.0, 1.0)


def test_questions_without_answers_are_written_but_not_scored(tmp_path):
    path = vqa_files(tmp_path, [["cat"] * 10])
    (tmp_path / "v2_mscoco_val2014_annotations.json").unlink()
    found = next(measure(find("open_vqa"), [writer({0: "cat"}, [])], str(path)))
    assert found["metrics"]["accuracy"].startswith("skipped: ")
    assert found["results"] == [{"question_id": 100, "answer": "cat"}]


def test_prompts_are_those_of_the_paper():
    assert caption_prompt(3) == "A picture of [MASK][MASK][MASK]."
    assert answer_prompt(" Why? ", 2) == "Why? Answer: [MASK][MASK]."


@pytest.mark.parametrize(("task", "reason"), [("captions", "no captions"), ("open_vqa", "has no questions")])
def test_data_without_texts_are_one_line(tmp_path, task, reason):
    pictures(tmp_path, ["a.png"])
    with pytest.raises(UserError, match=reason):
        next(measure(find(task), [writer({0: "x"}, [])], str(tmp_path)))


def test_what_cannot_write_is_one_line(capsys, tmp_path):
    from student.cli import main

    pictures(tmp_path, ["a.png"])
    for task, reason in (
        ("captions", "is not a run: pass a folder that `student train` wrote"),
        ("captions:masks=0", "a number above 0"),
        ("open_vqa:mask=2", "choose from masks=NUMBER"),
        ("glue:lr=high", "choose from epochs=NUMBER"),
        ("retrieval:k=3", "has no options"),
        ("linear_probe:c=3", "no options"),
        ("glue:lr=1e-4", "no GLUE at"),
    ):
        assert main(["eval", str(tmp_path), "--task", task, "--data", str(tmp_path)]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ")
        assert reason in error
