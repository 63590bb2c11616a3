"""Question rows: what a row asks, which answers it offers, which is right, and which labels may be used."""

import dataclasses
import functools
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from evaluation.metrics.vqa_answers import normalize_answer, vocabulary
from student.streams import stream
from teachercache.core.errors import UserError
from teachercache.data.manifest import Manifest
from teachercache.data.readers.questions import LABELS
from teachercache.data.sample import Sample

VQA_SCORES = (0.0, 0.3, 0.6, 0.9)  # of an answer that 0, 1, 2 or 3 of the ten people gave; 1 from four on


@dataclasses.dataclass(frozen=True)
class Task:
    """A task whose rows ask a question about a picture. JSON types: run.json keeps it.

    Args:
        name: A key of `QUESTION_TASKS`.
        which: Which of its questions, where it has several (q2a or qa2r in VCR).
        inputs: Texts that the student reads per row.
        classes: Answers to choose from; one per input if there are several inputs, else of the single one.
        answers: VQA's vocabulary.
    """

    name: str
    which: str
    inputs: int
    classes: int
    answers: tuple[str, ...] = ()

    @property
    def several_right(self) -> bool:
        """Whether several answers of a row may be right, each to a degree."""
        return QUESTION_TASKS[self.name].several_right


Mentions = tuple[tuple[int, int, int], ...]  # first character, the one after the last, object


@dataclasses.dataclass(frozen=True)
class Question:
    """One row as a task asks it.

    Args:
        parts: The texts before and after [SEP] of each input.
        places: Which of the row's texts each input is, as a teacher's cache numbers them.
        answers: Which of the row's texts a teacher compares with the picture; () if there are none.
        target: Class -> how right it is; {} if unknown.
        labeled: Whether the row has a label.
        group: low:N takes N rows of each group.
        mentions: Of each input, where its joined parts mention which object (VCR).
    """

    parts: tuple[tuple[str, str], ...]
    places: tuple[int, ...]
    answers: tuple[int, ...]
    target: Mapping[int, float]
    labeled: bool
    group: str
    mentions: tuple[Mentions, ...] = ()


Columns = Mapping[str, Any]  # the JSON of a row's `task` column


@dataclasses.dataclass(frozen=True)
class QuestionTask:
    """How the rows of one task are read.

    Args:
        open: Manifest, training rows, mode -> the Task.
        read: Task, sample, its task column, the kind of each of its texts -> the Question.
        statement: Question, sample, kinds of its texts, whether its label may be used -> a Question of one input,
            which says as much of the picture as may be known: for masked words and image-text matching.
        several_right: Several answers of a row may be right.
        scoring: How a CLIP without training scores the answers: "texts" (cosines of picture and answers), "answers"
            (of picture and every answer of the vocabulary) or "anchors" (distances to three means of the cosines).
    """

    open: Callable[[Manifest, np.ndarray, str], Task]
    read: Callable[[Task, Sample, Columns, Sequence[str]], Question]
    statement: Callable[[Question, Sample, Sequence[str], bool], Question]
    several_right: bool = False
    scoring: str = "texts"


def find_task(manifest: Manifest, rows: np.ndarray, mode: str) -> Task:
    """Return the task of the rows; UserError if they ask nothing."""
    samples = (manifest.row(row) for row in rows[:1].tolist())
    name = next((json.loads(sample.task)["task"] for sample in samples if sample.task), "").replace("-", "_")
    if name not in QUESTION_TASKS:
        raise UserError(
            f"{manifest.data} asks nothing: pass VCR's .jsonl, SNLI-VE's .jsonl or VQA's questions .json as --data "
            "(python -m scripts.datasets.scene_vcr_snli_ve and scripts.datasets.easy_vqa make small ones)"
        )
    return QUESTION_TASKS[name].open(manifest, rows, mode)


def read_question(task: Task, sample: Sample) -> Question:
    """Return the row as the task asks it; UserError names a row of another task."""
    try:
        columns = json.loads(sample.task)
        return QUESTION_TASKS[task.name].read(task, sample, columns, columns["texts"])
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise UserError(f"row '{sample.key}' is no {task.name} row: {error!r}") from error


def read_statement(task: Task, sample: Sample, question: Question, labeled: bool) -> Question:
    """Return what may be known about the picture: the right choice if the label may be used, else the question."""
    kinds = json.loads(sample.task)["texts"]
    return QUESTION_TASKS[task.name].statement(question, sample, kinds, labeled)


def _places(kinds: Sequence[str], kind: str) -> tuple[int, ...]:
    return tuple(place for place, name in enumerate(kinds) if name == kind)


def _only_input(question: Question, k: int) -> Question:
    """Return the k-th input of a question, without its answers."""
    return Question(
        (question.parts[k],), (question.places[k],), (), {}, False, "", question.mentions[k : k + 1]
    )


# ----------------------------------------------------------------------------------------------------
# VCR


def _open_vcr(manifest: Manifest, rows: np.ndarray, mode: str) -> Task:
    if mode not in ("q2a", "qa2r"):
        raise UserError(f"--set mode={mode}: choose q2a (the answer) or qa2r (the rationale)")
    return Task("vcr", mode, 4, 4)


def _read_vcr(task: Task, sample: Sample, columns: Columns, kinds: Sequence[str]) -> Question:
    """Inputs: question and each choice; in qa2r question, right answer and each rationale."""
    q2a = task.which == "q2a"
    pairs = _places(kinds, "pair" if q2a else "rationale_pair")
    label = columns.get("label" if q2a else "rationale_label")
    mentions = columns.get("mentions") or [()] * (1 + 2 * task.inputs)  # of question, choices, rationales
    first, mentioned = columns["question"].strip(), _shifted(mentions[0], 0)
    if not q2a and "label" in columns:
        mentioned += _shifted(mentions[1 + columns["label"]], len(first) + 1)
        first = f"{first} {columns['choices'][columns['label']].strip()}"
    target = {} if label is None else {int(label): 1.0}
    group = columns.get("category") or question_category(columns["question"])
    texts = [sample.texts[place].strip() for place in pairs]
    if len(texts) != task.inputs:
        raise ValueError(f"{len(texts)} texts to choose from, {task.inputs} are expected")
    parts = tuple((first, text[len(first) + 1 :]) for text in texts)
    choices = _places(kinds, "choice" if q2a else "rationale")
    start = 1 if q2a else 1 + len(columns["choices"])
    of_inputs = tuple(
        mentioned + _shifted(choice, len(first) + 1) for choice in mentions[start : start + task.inputs]
    )
    return Question(parts, pairs, choices, target, label is not None, group, of_inputs)


def _shifted(mentions: Sequence[Sequence[int]], by: int) -> Mentions:
    return tuple((start + by, end + by, place) for start, end, place in mentions)


def _vcr_statement(question: Question, sample: Sample, kinds: Sequence[str], labeled: bool) -> Question:
    if labeled:
        return _only_input(question, max(question.target, key=question.target.__getitem__))
    place = kinds.index("question")
    text = sample.texts[place].strip()
    mentions = tuple(mention for mention in question.mentions[0] if mention[1] <= len(text))
    return Question(((text, ""),), (place,), (), {}, False, "", (mentions,))


# VCR, section "question types": the seven kinds of inference, by the words that its authors looked for
CATEGORIES = (
    ("explanation", r"\bwhy\b|\bhow come\b|\bhow does\b"),
    ("hypothetical", r"\bif\b|\bwould\b|\bcould\b|\bchance\b|\bmight\b|\bmay\b"),
    (
        "temporal",
        r"\bhappen(s|ed|ing)?\b|\bbefore\b|\bafter\b|\bearlier\b|\blater\b|\bfail\b|\bnext\b|\bgoing to\b",
    ),
    ("mental", r"\bfeel(s|ing)?\b|\bthink(s|ing)?\b|\blov(e|es)\b|\bupset\b|\bangry\b|\bhappy\b|\bemotion"),
    (
        "role",
        r"\brelat(ed|ion|ionship)\b|\boccupation\b|\bstrangers\b|\bmarried\b|\bjob\b|\bknow each other\b",
    ),
    ("scene", r"\bwhere\b|\btime\b|\bnear\b|\bweather\b|\bseason\b|\bplace\b"),
)


def question_category(question: str) -> str:
    """Return which of VCR's seven kinds a question is, `activity` by default (free choice: order and words)."""
    lowered = question.lower()
    return next((name for name, pattern in CATEGORIES if re.search(pattern, lowered)), "activity")


# ----------------------------------------------------------------------------------------------------
# SNLI-VE


def _open_snli_ve(manifest: Manifest, rows: np.ndarray, mode: str) -> Task:
    return Task("snli_ve", "", 1, len(LABELS))


def _read_snli_ve(task: Task, sample: Sample, columns: Columns, kinds: Sequence[str]) -> Question:
    label = columns.get("label")
    target = {} if label is None else {int(label): 1.0}
    places = _places(kinds, "hypothesis")
    parts = ((sample.texts[places[0]].strip(), ""),)
    return Question(parts, places, (), target, label is not None, sample.label)


def _first_input(question: Question, sample: Sample, kinds: Sequence[str], labeled: bool) -> Question:
    return _only_input(question, 0)


# ----------------------------------------------------------------------------------------------------
# VQA


def _open_vqa(manifest: Manifest, rows: np.ndarray, mode: str) -> Task:
    answers = vocabulary(manifest.row(row).label for row in rows.tolist())
    if len(answers) < 2:
        raise UserError(
            "the training rows have fewer than two different answers: is the annotations file beside them?"
        )
    return Task("vqa", "", 1, len(answers), tuple(answers))


def _read_vqa(task: Task, sample: Sample, columns: Columns, kinds: Sequence[str]) -> Question:
    places = _places(kinds, "question")
    counts = Counter(normalize_answer(answer) for answer in columns.get("answers") or ())
    classes = _classes_of(task.answers)
    target = {
        classes[answer]: VQA_SCORES[n] if n < len(VQA_SCORES) else 1.0
        for answer, n in counts.items()
        if answer in classes
    }
    parts = ((sample.texts[places[0]].strip(), ""),)
    return Question(parts, places, (), target, bool(counts), "")


@functools.lru_cache(maxsize=4)
def _classes_of(answers: tuple[str, ...]) -> dict[str, int]:
    return {answer: place for place, answer in enumerate(answers)}


QUESTION_TASKS: dict[str, QuestionTask] = {
    "vcr": QuestionTask(_open_vcr, _read_vcr, _vcr_statement),
    "snli_ve": QuestionTask(_open_snli_ve, _read_snli_ve, _first_input, scoring="anchors"),
    "vqa": QuestionTask(_open_vqa, _read_vqa, _first_input, several_right=True, scoring="answers"),
}


# ----------------------------------------------------------------------------------------------------
# Regimes: how many labels there are


def parse_regime(regime: str) -> tuple[str, int]:
    """Return the kind of a regime ("full", "zero", "low", "semi") and the N of low:N and semi:N, else 0."""
    kind, colon, number = regime.partition(":")
    if kind not in ("full", "low", "semi", "zero") or bool(colon) != (kind in ("low", "semi")):
        raise UserError(f"--set regime={regime}: choose full, zero, low:N or semi:N (N labels of each group)")
    if colon and (not number.isdecimal() or not int(number)):
        raise UserError(
            f"--set regime={regime}: {number or 'nothing'} is no number of rows; low:100 for example"
        )
    return kind, int(number or 0)


def labeled_rows(task: Task, manifest: Manifest, rows: np.ndarray, *, regime: str, subset: int) -> np.ndarray:
    """Return which of the rows have a label that may be used, bool [rows].

    full: all that have one. low:N and semi:N: N of each group (VCR's category, SNLI-VE's class, all rows of VQA),
    drawn by the seed `subset`. zero: none.
    """
    kind, number = parse_regime(regime)
    questions = [read_question(task, manifest.row(row)) for row in rows.tolist()]
    labeled = np.array([question.labeled for question in questions], bool)
    if kind in ("full", "zero"):
        return labeled & (kind == "full")
    chosen = np.zeros(len(rows), bool)
    groups: dict[str, list[int]] = {}
    for i in stream("labels", subset).permutation(len(rows)).tolist():
        members = groups.setdefault(questions[i].group, [])
        if labeled[i] and len(members) < number:
            members.append(i)
            chosen[i] = True
    return chosen
