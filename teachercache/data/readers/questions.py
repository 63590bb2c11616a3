"""Read VQA v2 (and OK-VQA), SNLI-VE and VCR: questions, choices, answers and boxes become task columns.

`texts` of a row are encoded by a teacher; the task column `texts` names the kind of each. VQA: question,
answer. SNLI-VE: hypothesis. VCR: question, 4 choice, 4 pair, 4 rationale, 4 rationale_pair, kind after kind.
"""

import functools
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from teachercache.core.errors import UserError
from teachercache.core.urls import below, sizes_below
from teachercache.data.foreign import split_in_name
from teachercache.data.readers.files import picture_folder
from teachercache.data.sample import Sample, task_columns
from teachercache.data.unused import Unused

LABELS = ("entailment", "neutral", "contradiction")
FLICKR_IDS = ("Flickr30K_ID", "Flikr30kID", "Flickr30kID")  # all three spellings exist
NUM_CHOICES = 4  # of answers, and of rationales, in VCR
VCR_FIELDS = ("question", "answer_choices", "objects", "img_fn", "annot_id")


def json_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a .jsonl file; raise UserError with the number of an invalid line."""
    objects = []
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    value = json.loads(line)
                except ValueError as error:
                    raise UserError(f"line {number} of {path} is not JSON: {error}") from error
                if not isinstance(value, dict):
                    raise UserError(f"line {number} of {path} is not a JSON object")
                objects.append(value)
    return objects


# ----------------------------------------------------------------------------------------------------
# VQA v2 and OK-VQA: a file of questions, and beside it (or in ../Annotations) the file of answers


def read_vqa(path: Path, values: Any, unused: Unused) -> Iterator[Sample]:
    """Yield a row per question. Texts are the question and the most common answer, which is the label, too;
    the key is question_id.

    The answer is a text so that a cache holds an embedding of every answer in the data; the test split has
    none.
    """
    try:
        subset = values["data_subtype"].replace("test-dev", "test")
        questions = [(q["question_id"], q["image_id"], q["question"]) for q in values["questions"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a VQA questions file: {error!r} is missing or invalid") from error
    answers = _vqa_answers(path)
    images = [f"COCO_{subset}_{image:012d}.jpg" for _, image, _ in questions]
    folders = [
        subset,
        f"../{subset}",
        f"../Images/{subset}",
        f"images/{subset}",
        f"../images/{subset}",
        "images",
        "",
    ]
    size = sizes_below(path.parent)
    folder = picture_folder(path.parent, images, folders, advice=path.parent / subset, size=size)
    for (number, image_id, question), name in zip(questions, images, strict=True):
        where = os.path.normpath(os.path.join(folder, name))
        facts = answers.get(number, {})
        stored, common = facts.get("answers"), facts.get("multiple_choice_answer") or ""
        texts = {"question": question} | ({"answer": common} if common else {})
        task = task_columns(
            task="vqa",
            id=number,
            image_id=image_id,
            question=question,
            texts=[*texts],
            answers=None if stored is None else [answer["answer"] for answer in stored],
            raw_answers=[a["raw_answer"] for a in stored] if stored and "raw_answer" in stored[0] else None,
            answer=facts.get("multiple_choice_answer"),
            answer_type=facts.get("answer_type"),
            question_type=facts.get("question_type"),
        )
        yield Sample(
            str(number),
            where,
            tuple(texts.values()),
            label=common,
            split=split_in_name(subset),
            size=size(where) or 0,
            task=task,
        )


def _vqa_answers(path: Path) -> dict[int, dict[str, Any]]:
    """Return the annotations by question, or {} without an annotation file, as for the test split."""
    name = path.name.replace("OpenEnded_", "").replace("questions", "annotations")
    places = [below(path.parent, f"{folder}{name}") for folder in ("", "../Annotations/", "../annotations/")]
    file = next((place for place in places if name != path.name and place.exists()), None)
    if file is None:
        return {}
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        return {
            entry["question_id"]: entry for entry in values["annotations"] if entry["answers"] is not None
        }
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is not a VQA annotations file: {error!r}") from error


# ----------------------------------------------------------------------------------------------------
# SNLI-VE: snli_ve_{train,dev,test}.jsonl and flickr30k-images


def read_snli_ve(path: Path, lines: list[dict[str, Any]], unused: Unused) -> Iterator[Sample]:
    """Yield a row per hypothesis (sentence2), with label gold_label and key pairID; `dev` becomes the
    split val.
    """
    ids = [next((str(line[name]) for name in FLICKR_IDS if name in line), "") for line in lines]
    images = [f"{number.removesuffix('.jpg')}.jpg" if number else "" for number in ids]
    if not any(images):
        raise UserError(f"{path} names no picture: one of {', '.join(FLICKR_IDS)} is expected in each line")
    near = ["flickr30k-images", "flickr30k_images", "images"]
    folders = [*near, *(f"../{name}" for name in near), ""]
    names, size = [name for name in images if name], sizes_below(path.parent)
    folder = picture_folder(path.parent, names, folders, advice=path.parent / near[0], size=size)
    for number, (line, image) in enumerate(zip(lines, images, strict=True), start=1):
        where = os.path.normpath(os.path.join(folder, image)) if image else ""
        gold = line.get("gold_label")
        label = gold if gold in LABELS else ""
        missing = [name for name in ("sentence2", "pairID") if not isinstance(line.get(name), str)]
        task = task_columns(
            task="snli-ve",
            id=line.get("pairID"),
            premise=line.get("sentence1"),
            hypothesis=line.get("sentence2"),
            choices=LABELS,
            label=LABELS.index(label) if label else None,
            texts=["hypothesis"],
            annotator_labels=line.get("annotator_labels"),
        )
        yield Sample(
            line["pairID"] if "pairID" not in missing else f"line {number}",
            where,
            () if "sentence2" in missing else (line["sentence2"],),
            label=label,
            split=split_in_name(path.stem),
            size=(size(where) or 0) if where else 0,
            problem=f"the line has no {' and no '.join(missing)}" if missing else "",
            task=task,
        )


# ----------------------------------------------------------------------------------------------------
# VCR: {train,val,test}.jsonl, vcr1images/<movie>/<file>.jpg with a .json of boxes beside each


def read_vcr(path: Path, lines: list[dict[str, Any]], unused: Unused) -> Iterator[Sample]:
    """Yield a row per question. In its texts a person is `person 3`, its position in `objects` from 1: see
    `_vcr_texts`.

    Boxes (x1, y1, x2, y2 of each object) and labels are task columns; the test split has no labels. The files
    of the shortcut study (val_rule_singular, val_adv_...) have the same format.
    """
    images = [str(line.get("img_fn", "")) for line in lines]
    folders = ["vcr1images", "../vcr1images", "images", "../images", ""]
    names, size = [name for name in images if name], sizes_below(path.parent)
    folder = picture_folder(path.parent, names, folders, advice=path.parent / "vcr1images", size=size)
    for number, (line, image) in enumerate(zip(lines, images, strict=True), start=1):
        where = os.path.normpath(os.path.join(folder, image)) if image else ""
        key, split = str(line.get("annot_id", f"line {number}")), split_in_name(path.stem)
        size_of_image = (size(where) or 0) if where else 0
        try:
            texts, task = _vcr_row(line, below(path.parent, folder) if folder else path.parent)
        except (KeyError, TypeError, IndexError, ValueError) as error:
            yield Sample(
                key, where, split=split, size=size_of_image, problem=f"the line is not VCR's: {error!r}"
            )
            continue
        yield Sample(key, where, texts, split=split, size=size_of_image, task=task)


def _vcr_row(line: dict[str, Any], images: Path) -> tuple[tuple[str, ...], str]:
    objects = line["objects"]
    sentences = [line["question"], *line["answer_choices"], *line.get("rationale_choices", [])]
    question, *others = [render_tokens(tokens, objects) for tokens in sentences]
    num = len(line["answer_choices"])
    choices, rationales = others[:num], others[num:]
    boxes = _vcr_boxes(images / line["metadata_fn"]) if line.get("metadata_fn") else None
    label = line.get("answer_label")
    if len(choices) != NUM_CHOICES or len(rationales) not in (0, NUM_CHOICES):
        raise ValueError(
            f"{len(choices)} answers and {len(rationales)} rationales, {NUM_CHOICES} of each are expected"
        )
    for name in ("answer_label", "rationale_label"):
        if line.get(name) not in (None, *range(NUM_CHOICES)):
            raise ValueError(f"{name} is {line[name]}, 0 to {NUM_CHOICES - 1} is expected")
    texts = _vcr_texts(question, choices, rationales, "" if label is None else choices[label])
    task = task_columns(
        task="vcr",
        id=line["annot_id"],
        question=question,
        choices=choices,
        label=label,
        rationales=rationales or None,
        rationale_label=line.get("rationale_label"),
        objects=objects,
        category=line.get("category"),
        boxes=boxes,
        texts=[kind for kind, _ in texts],
        mentions=[mentions_of(tokens, objects) for tokens in sentences],
    )
    return tuple(text for _, text in texts), task


def _vcr_texts(
    question: str, choices: list[str], rationales: list[str], answer: str
) -> list[tuple[str, str]]:
    """Return kind and text: question, choices, question with choice, rationales, question with answer and
    rationale.
    """
    return [
        ("question", question),
        *(("choice", choice) for choice in choices),
        *(("pair", f"{question} {choice}") for choice in choices),
        *(("rationale", rationale) for rationale in rationales),
        *(("rationale_pair", f"{question} {answer} {rationale}") for rationale in rationales if answer),
    ]


@functools.lru_cache(maxsize=64)  # the questions of an image are consecutive
def _vcr_boxes(path: Path) -> list[list[float]] | None:
    """Return the boxes of the objects of an image without their scores, or None without a file."""
    try:
        content = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    return [box[:4] for box in json.loads(content)["boxes"]]


def render_tokens(tokens: list[Any], objects: list[str]) -> str:
    """Render VCR's tokens as a sentence: [0, 2] is `person 1 and person 3`, other objects appear by class."""
    words = [token if isinstance(token, str) else _mention(token, objects) for token in tokens]
    text = " ".join(words)
    text = re.sub(r" (?=[,.?!;:%)\]}])", "", text)
    text = re.sub(r" (?=(?:'(?:s|re|ve|ll|d|m)|n't)\b)", "", text, flags=re.IGNORECASE)
    return re.sub(r"(?<=[(\[{]) ", "", text)


def mentions_of(tokens: list[Any], objects: list[str]) -> list[list[int]]:
    """Return the spans in the sentence of `render_tokens` that mention objects: first character, end,
    object.
    """
    spans = []
    for k, token in enumerate(tokens):
        if isinstance(token, str):
            continue
        text = render_tokens(tokens[: k + 1], objects)  # later tokens do not move it
        at = len(text) - len(_mention(token, objects))
        for place, name in zip(token, _names(token, objects), strict=True):
            at = text.index(name, at)
            spans.append([at, at + len(name), place])
            at += len(name)
    return spans


def _mention(places: list[int], objects: list[str]) -> str:
    names = _names(places, objects)
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _names(places: list[int], objects: list[str]) -> list[str]:
    if any(not 0 <= place < len(objects) for place in places):
        raise IndexError(f"{places} names an object that is not among the {len(objects)} of the picture")
    return [f"person {place + 1}" if objects[place] == "person" else objects[place] for place in places]
