"""Read VQA v2 and OK-VQA: a file of questions, and beside it (or in ../Annotations) the file of answers.

`texts` of a row are encoded by a teacher: its question, and its most common answer. The task column `texts` names the
kind of each.
"""

import dataclasses
import os
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

from teachercache.core.errors import UserError
from teachercache.core.urls import below, sizes_below
from teachercache.data.foreign import (
    Foreign,
    caption_of,
    captions_of,
    clean,
    kind_of,
    label_of,
    parse_json,
    split_in_name,
)
from teachercache.data.readers.files import picture_folder
from teachercache.data.readers.rows import file_named
from teachercache.data.sample import Sample, task_columns
from teachercache.data.unused import Unused


def read_vqa(path: Path, values: Any, unused: Unused) -> Iterator[Sample]:
    """Yield a row per question. Texts are the question and the most common answer, which is the label, too;
    the key is question_id.

    The answer is a text so that a cache holds an embedding of every answer in the data; the test split has
    none. An id may be a number in one file and a text in the other.
    """
    try:
        subset = file_named(values["data_subtype"], what="data_subtype").replace("test-dev", "test")
        questions = [_question(i, entry) for i, entry in enumerate(values["questions"])]
    except (KeyError, TypeError, AttributeError, Foreign) as error:
        raise UserError(f"{path} is not a VQA questions file: {error!r} is missing or invalid") from error
    answers = _vqa_answers(path, {question.key for question in questions}, unused)
    folders = [
        subset,
        f"../{subset}",
        f"../Images/{subset}",
        f"images/{subset}",
        f"../images/{subset}",
        "images",
        "",
    ]
    images = {question.key: f"COCO_{subset}_{question.image}.jpg" for question in questions if question.image}
    size = sizes_below(path.parent)
    names, advice = list(images.values()), path.parent / subset
    if questions and not names:
        raise UserError(f"{path} is not a VQA questions file: {questions[0].problem}")
    folder = picture_folder(path.parent, names, folders, advice=advice, size=size) if names else ""
    for question in questions:
        name = images.get(question.key, "")
        where = os.path.normpath(os.path.join(folder, name)) if name else ""
        facts = answers.get(question.key, {})
        common = facts.get("answer") or ""
        texts = {"question": question.text} | ({"answer": common} if common else {})
        task = task_columns(
            task="vqa",
            question=question.text,
            texts=[*texts],
            **question.ids,
            **facts,
        )
        yield Sample(
            question.key,
            where,
            () if question.problem else tuple(texts.values()),
            label=common,
            split=split_in_name(subset),
            size=(size(where) or 0) if where else 0,
            problem=question.problem,
            task="" if question.problem else task,
        )


@dataclasses.dataclass(frozen=True)
class _Question:
    """A question: its key, the digits of its image, its text, why it cannot be used, and its ids as they are stored."""

    key: str
    image: str
    text: str
    problem: str
    ids: dict[str, Any]


def _question(place: int, entry: Any) -> _Question:
    ids = {"id": entry["question_id"], "image_id": entry["image_id"]}
    key, image, text, problem = f"question {place}", "", entry["question"], ""
    try:
        key = label_of(ids["id"], what="question_id") or key
        image = _twelve_digits(ids["image_id"])
        ids = {name: clean(value) if isinstance(value, str) else value for name, value in ids.items()}
        text = caption_of(text, what="the question")
        problem = "the question is null" if text is None else ""
    except Foreign as error:
        text, problem = "", str(error)
    return _Question(key, image, text or "", problem, ids)


def _twelve_digits(number: Any) -> str:
    """Return the digits of an image in COCO's file names."""
    digits = label_of(number, what="image_id")
    if not (digits.isascii() and digits.isdecimal()):
        raise Foreign(f"image_id is {digits[:20] or 'null'}, a number is expected")
    return digits.zfill(12)


def _vqa_answers(path: Path, keys: Container[str], unused: Unused) -> dict[str, dict[str, Any]]:
    """Return task columns by question, or {} without an annotation file, as for the test split."""
    name = path.name.replace("OpenEnded_", "").replace("questions", "annotations")
    places = [below(path.parent, f"{folder}{name}") for folder in ("", "../Annotations/", "../annotations/")]
    file = next((place for place in places if name != path.name and place.exists()), None)
    if file is None:
        return {}
    answers: dict[str, dict[str, Any]] = {}
    strays = 0
    try:
        entries = parse_json(file.read_bytes(), what="it")["annotations"]
        for i, entry in enumerate(entries):
            key = label_of(entry["question_id"], what="question_id")
            if key not in keys:
                unused.add(f"annotations of {file.name} belong to no question", f"question_id {key}")
                strays += 1
            elif entry["answers"] is not None:
                try:
                    answers[key] = _vqa_facts(entry)
                except (Foreign, AttributeError) as error:
                    unused.add(f"annotations of {file.name} have no answers ({error})", f"entry {i}")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is not a VQA annotations file: {error!r}") from error
    if strays and strays == len(entries):
        raise UserError(f"0 of {strays:,} annotations of {file} belong to a question of {path.name}")
    return answers


def _vqa_facts(entry: dict[str, Any]) -> dict[str, Any]:
    """Return the task columns of an annotation."""
    stored = entry["answers"]
    if not isinstance(stored, list):
        raise Foreign(f"answers is {kind_of(stored)}, a list is expected")
    records = [answer if isinstance(answer, dict) else {"answer": answer} for answer in stored]
    raw = list(captions_of([record.get("raw_answer") for record in records], what="raw_answer"))
    return {
        "answers": list(captions_of([record.get("answer") for record in records], what="an answer")),
        "raw_answers": raw or None,
        "answer": caption_of(entry.get("multiple_choice_answer"), what="multiple_choice_answer"),
        "answer_type": caption_of(entry.get("answer_type"), what="answer_type"),
        "question_type": caption_of(entry.get("question_type"), what="question_type"),
    }
