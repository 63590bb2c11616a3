"""Read SNLI-VE and VCR: questions, choices, answers and boxes become task columns; `vqa.py` reads VQA.

`texts` of a row are encoded by a teacher; the task column `texts` names the kind of each. SNLI-VE: hypothesis. VCR: question, 4 choice, 4 pair, 4 rationale, 4 rationale_pair, kind after kind.
"""

import functools
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from teachercache.core.errors import UserError, is_machine
from teachercache.core.urls import below, sizes_below
from teachercache.data.foreign import (
    Foreign,
    caption_of,
    clean,
    decode_whole,
    kind_of,
    label_of,
    lines_of,
    parse_json,
    split_in_name,
)
from teachercache.data.readers.files import picture_folder
from teachercache.data.readers.rows import boxes_of, file_named
from teachercache.data.sample import Sample, task_columns
from teachercache.data.unused import Unused

LABELS = ("entailment", "neutral", "contradiction")
FLICKR_IDS = ("Flickr30K_ID", "Flikr30kID", "Flickr30kID")  # all three spellings exist
NUM_CHOICES = 4  # of answers, and of rationales, in VCR
VCR_FIELDS = ("question", "answer_choices", "objects", "img_fn", "annot_id")


def json_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a .jsonl file; raise UserError with the number of an invalid line."""
    objects = []
    try:
        text = decode_whole(path.read_bytes(), what=str(path))
    except Foreign as error:
        raise UserError(str(error)) from error
    for number, line in enumerate(lines_of(text), start=1):
        if line.strip():
            try:
                value = parse_json(line.encode(), what=f"line {number} of {path}")
            except Foreign as error:
                raise UserError(str(error)) from error
            if not isinstance(value, dict):
                raise UserError(f"line {number} of {path} is not a JSON object")
            objects.append(value)
    return objects


# ----------------------------------------------------------------------------------------------------
# SNLI-VE: snli_ve_{train,dev,test}.jsonl and flickr30k-images


def read_snli_ve(path: Path, lines: list[dict[str, Any]], unused: Unused) -> Iterator[Sample]:
    """Yield a row per hypothesis (sentence2), with label gold_label and key pairID; `dev` becomes the
    split val.
    """
    images = [_flickr_image(line) for line in lines]
    names, size = [name for name, _ in images if name], sizes_below(path.parent)
    if not names:
        raise UserError(f"{path} names no picture: one of {', '.join(FLICKR_IDS)} is expected in each line")
    near = ["flickr30k-images", "flickr30k_images", "images"]
    folders = [*near, *(f"../{name}" for name in near), ""]
    folder = picture_folder(path.parent, names, folders, advice=path.parent / near[0], size=size)
    for number, (line, (image, problem)) in enumerate(zip(lines, images, strict=True), start=1):
        where = os.path.normpath(os.path.join(folder, image)) if image else ""
        texts = {name: _text_or_none(line.get(name)) for name in ("sentence1", "sentence2", "pairID")}
        missing = [name for name in ("sentence2", "pairID") if texts[name] is None]
        if missing:
            problem = f"the line has no {' and no '.join(missing)}"
        gold = _text_or_none(line.get("gold_label")) or ""
        label = gold if gold in LABELS else ""
        noted = line.get("annotator_labels")
        task = task_columns(
            task="snli-ve",
            id=texts["pairID"],
            premise=texts["sentence1"],
            hypothesis=texts["sentence2"],
            choices=LABELS,
            label=LABELS.index(label) if label else None,
            texts=["hypothesis"],
            annotator_labels=[_text_or_none(name) for name in noted] if isinstance(noted, list) else None,
        )
        yield Sample(
            texts["pairID"] or f"line {number}",
            where,
            () if texts["sentence2"] is None else (texts["sentence2"],),
            label=label,
            split=split_in_name(path.stem),
            size=(size(where) or 0) if where else 0,
            problem=problem,
            task=task,
        )


def _flickr_image(line: dict[str, Any]) -> tuple[str, str]:
    """Return the file name of the picture of a line, and a problem if it names none."""
    try:
        names = (file_named(line.get(name), what=name) for name in FLICKR_IDS)
        number = next(filter(None, names), "").removesuffix(".jpg")
    except Foreign as error:
        return "", str(error)
    return (f"{number}.jpg", "") if number else ("", f"the line names no picture: no {FLICKR_IDS[0]}")


def _text_or_none(value: Any) -> str | None:
    try:
        return caption_of(value)
    except Foreign:
        return None


# ----------------------------------------------------------------------------------------------------
# VCR: {train,val,test}.jsonl, vcr1images/<movie>/<file>.jpg with a .json of boxes beside each


def read_vcr(path: Path, lines: list[dict[str, Any]], unused: Unused) -> Iterator[Sample]:
    """Yield a row per question. In its texts a person is `person 3`, its position in `objects` from 1: see
    `_vcr_texts`.

    Boxes (x1, y1, x2, y2 of each object) and labels are task columns; the test split has no labels. The files
    of the shortcut study (val_rule_singular, val_adv_...) have the same format.
    """
    _vcr_boxes.cache_clear()  # the files may have changed since this process read them
    images = [_vcr_image(line) for line in lines]
    folders = ["vcr1images", "../vcr1images", "images", "../images", ""]
    names, size = [name for name in images if name], sizes_below(path.parent)
    if not names:
        raise UserError(f"{path} names no picture: img_fn is expected in each line")
    folder = picture_folder(path.parent, names, folders, advice=path.parent / "vcr1images", size=size)
    for number, (line, image) in enumerate(zip(lines, images, strict=True), start=1):
        where = os.path.normpath(os.path.join(folder, image)) if image else ""
        key, split = _text_or_none(line.get("annot_id")) or f"line {number}", split_in_name(path.stem)
        size_of_image = (size(where) or 0) if where else 0
        try:
            if not image:
                raise Foreign("img_fn names no picture")
            texts, task = _vcr_row(line, below(path.parent, folder) if folder else path.parent)
        except (KeyError, TypeError, IndexError, ValueError, AttributeError) as error:
            missing = ", ".join(name for name in VCR_FIELDS if name not in line)
            problem = f"the line is not VCR's: {f'it has no {missing}' if missing else repr(error)}"
            yield Sample(key, where, split=split, size=size_of_image, problem=problem)
            continue
        yield Sample(key, where, texts, split=split, size=size_of_image, task=task)


def _vcr_image(line: dict[str, Any]) -> str:
    try:
        return file_named(line.get("img_fn"), what="img_fn")
    except Foreign:
        return ""


def check_tokens(line: dict[str, Any]) -> None:
    """Check that the objects, the question and the choices of a line of VCR are lists of names and of tokens.

    Raises:
        ValueError: One is not.
        KeyError: One is missing.
        IndexError: A token refers to an object that is not there.
    """
    if not isinstance(line["objects"], list) or not all(isinstance(name, str) for name in line["objects"]):
        raise ValueError("objects is not a list of names")
    for name in ("answer_choices", "rationale_choices"):
        if not isinstance(line[name] if name in VCR_FIELDS else line.get(name) or [], list):
            raise ValueError(f"{name} is {kind_of(line[name])}, a list is expected")
    for tokens in (line["question"], *line["answer_choices"], *(line.get("rationale_choices") or [])):
        fits = isinstance(tokens, list) and all(
            isinstance(token, str) or (isinstance(token, list) and all(type(place) is int for place in token))
            for token in tokens
        )
        if not fits:
            raise ValueError("a question or choice is not a list of words and of lists of numbers")
        for token in tokens:
            if not isinstance(token, str):
                _names(token, line["objects"])


def _vcr_row(line: dict[str, Any], images: Path) -> tuple[tuple[str, ...], str]:
    check_tokens(line)
    objects, rationale_choices = line["objects"], line.get("rationale_choices") or []
    sentences = [line["question"], *line["answer_choices"], *rationale_choices]
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
        if line.get(name) not in (None, *range(NUM_CHOICES)) or isinstance(line.get(name), bool):
            raise ValueError(f"{name} is {line[name]}, 0 to {NUM_CHOICES - 1} is expected")
    texts = _vcr_texts(question, choices, rationales, "" if label is None else choices[label])
    task = task_columns(
        task="vcr",
        id=label_of(line["annot_id"], what="annot_id"),
        question=question,
        choices=choices,
        label=label,
        rationales=rationales or None,
        rationale_label=line.get("rationale_label"),
        objects=[clean(name) for name in objects],
        category=_text_or_none(line.get("category")),
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
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        if is_machine(error):
            raise
        raise Foreign(f"cannot read {path.name}: {error.strerror}") from error
    return boxes_of([box[:4] for box in parse_json(content, what=path.name)["boxes"]])


def render_tokens(tokens: list[Any], objects: list[str]) -> str:
    """Render VCR's tokens as a sentence: [0, 2] is `person 1 and person 3`, other objects appear by class."""
    words = [token if isinstance(token, str) else _mention(token, objects) for token in tokens]
    text = clean(" ".join(words))
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
