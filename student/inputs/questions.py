"""Read the question, the answer choices and the label of a row, and select the labels that may be used."""

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

# Score of an answer given by 0, 1, 2 or 3 of ten annotators; it is 1 from four on
VQA_SCORES = (0.0, 0.3, 0.6, 0.9)


@dataclasses.dataclass(frozen=True)
class Task:
    """A task with questions about pictures. All fields are JSON types, because run.json stores them.

    Args:
        name: A key of `QUESTION_TASKS`.
        which: The kind of question, for tasks with several (q2a or qa2r in VCR).
        inputs: Number of texts that the student reads per row.
        classes: Number of answers to choose from: one per input if there are several inputs, otherwise all
            for the single input.
        answers: The answer vocabulary of VQA.
    """

    name: str
    which: str
    inputs: int
    classes: int
    answers: tuple[str, ...] = ()

    @property
    def several_right(self) -> bool:
        """Whether a row can have several right answers, each with a score between 0 and 1."""
        return QUESTION_TASKS[self.name].several_right


Mentions = tuple[tuple[int, int, int], ...]  # (first character, end character, index of the object) each


@dataclasses.dataclass(frozen=True)
class Question:
    """One row of a task.

    Args:
        parts: For each input, the texts before and after [SEP].
        places: For each input, the index of its text among the row's texts, as in a teacher's cache.
        answers: Indices of the texts that a teacher compares with the picture; () if there are none.
        target: Maps a class to its score; {} if unknown.
        labeled: Whether the row has a label.
        group: The group of the row; low:N uses N labels of each group.
        mentions: For each input, the mentions of objects in its joined parts (VCR).
    """

    parts: tuple[tuple[str, str], ...]
    places: tuple[int, ...]
    answers: tuple[int, ...]
    target: Mapping[int, float]
    labeled: bool
    group: str
    mentions: tuple[Mentions, ...] = ()


Columns = Mapping[str, Any]  # the decoded JSON of a row's `task` column


@dataclasses.dataclass(frozen=True)
class QuestionTask:
    """Functions that read the rows of one task.

    Args:
        open: Maps manifest, training rows and mode to the Task.
        read: Maps task, sample, its task column and the kind of each of its texts to the Question.
        statement: Maps a question, its sample, the kinds of its texts and whether its label may be used to a
            Question with one input, for masked words and image-text matching. The input is the right choice
            if the label may be used, otherwise the question.
        several_right: Whether a row can have several right answers.
        scoring: How CLIP scores the answers zero-shot: "texts" (cosines of picture and answers), "answers"
            (cosines of picture and all answers of the vocabulary) or "anchors" (distances of a cosine to
            three cluster centers).
    """

    open: Callable[[Manifest, np.ndarray, str], Task]
    read: Callable[[Task, Sample, Columns, Sequence[str]], Question]
    statement: Callable[[Question, Sample, Sequence[str], bool], Question]
    several_right: bool = False
    scoring: str = "texts"


def find_task(manifest: Manifest, rows: np.ndarray, mode: str) -> Task:
    """Return the task of the rows; raise a UserError if they have no questions."""
    samples = (manifest.row(row) for row in rows[:1].tolist())
    name = next((json.loads(sample.task).get("task", "") for sample in samples if sample.task), "").replace(
        "-", "_"
    )
    if name not in QUESTION_TASKS:
        raise UserError(
            f"{manifest.data} has no questions: pass VCR's .jsonl, SNLI-VE's .jsonl or VQA's questions .json "
            "as --data (python -m scripts.datasets.scene_vcr_snli_ve and scripts.datasets.easy_vqa make "
            "small ones)"
        )
    return QUESTION_TASKS[name].open(manifest, rows, mode)


def read_question(task: Task, sample: Sample) -> Question:
    """Return the question of a row; raise a UserError if the row belongs to another task."""
    try:
        columns = json.loads(sample.task)
        return QUESTION_TASKS[task.name].read(task, sample, columns, columns["texts"])
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise UserError(f"row '{sample.key}' is not a row of {task.name}: {error!r}") from error


def read_statement(task: Task, sample: Sample, question: Question, labeled: bool) -> Question:
    """Return a text about the picture: the right choice if the label may be used, otherwise the question."""
    kinds = json.loads(sample.task)["texts"]
    return QUESTION_TASKS[task.name].statement(question, sample, kinds, labeled)


def _places(kinds: Sequence[str], kind: str) -> tuple[int, ...]:
    """Return the indices of the texts of one kind."""
    return tuple(place for place, name in enumerate(kinds) if name == kind)


def _only_input(question: Question, k: int) -> Question:
    """Return a question with only the k-th input and without answers."""
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
    """Pair the question with each choice (q2a), or question and right answer with each rationale (qa2r)."""
    q2a = task.which == "q2a"
    pairs = _places(kinds, "pair" if q2a else "rationale_pair")
    label = columns.get("label" if q2a else "rationale_label")
    mentions = columns.get("mentions") or [()] * (1 + 2 * task.inputs)  # for question, choices, rationales
    first, mentioned = columns["question"].strip(), _shifted(mentions[0], 0)
    if not q2a and "label" in columns:
        mentioned += _shifted(mentions[1 + columns["label"]], len(first) + 1)
        first = f"{first} {columns['choices'][columns['label']].strip()}"
    target = {} if label is None else {int(label): 1.0}
    group = columns.get("category") or question_category(columns["question"])
    texts = [sample.texts[place].strip() for place in pairs]
    if len(texts) != task.inputs:
        raise ValueError(f"{len(texts)} choices, {task.inputs} are expected")
    parts = tuple((first, text[len(first) + 1 :]) for text in texts)
    choices = _places(kinds, "choice" if q2a else "rationale")
    start = 1 if q2a else 1 + len(columns["choices"])
    input_mentions = tuple(
        mentioned + _shifted(choice, len(first) + 1) for choice in mentions[start : start + task.inputs]
    )
    return Question(parts, pairs, choices, target, label is not None, group, input_mentions)


def _shifted(mentions: Sequence[Sequence[int]], by: int) -> Mentions:
    """Return mentions with their characters shifted."""
    return tuple((start + by, end + by, place) for start, end, place in mentions)


def _vcr_statement(question: Question, sample: Sample, kinds: Sequence[str], labeled: bool) -> Question:
    """Return the right choice if the label may be used, otherwise the bare question."""
    if labeled:
        return _only_input(question, max(question.target, key=question.target.__getitem__))
    place = kinds.index("question")
    text = sample.texts[place].strip()
    mentions = tuple(mention for mention in question.mentions[0] if mention[1] <= len(text))
    return Question(((text, ""),), (place,), (), {}, False, "", (mentions,))


# VCR, section "question types": the seven kinds of inference and the keywords that its authors used
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
    """Return the kind of inference of a VCR question, `activity` by default.

    The order of the patterns and some of their words are our choice.
    """
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
    """Return the hypothesis or the question alone: the label adds no text."""
    return _only_input(question, 0)


# ----------------------------------------------------------------------------------------------------
# VQA


def _open_vqa(manifest: Manifest, rows: np.ndarray, mode: str) -> Task:
    answers = vocabulary(manifest.row(row).label for row in rows.tolist())
    if len(answers) < 2:
        raise UserError(
            "the training rows have fewer than two different answers: is the annotations file missing?"
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
    return {answer: index for index, answer in enumerate(answers)}


QUESTION_TASKS: dict[str, QuestionTask] = {
    "vcr": QuestionTask(_open_vcr, _read_vcr, _vcr_statement),
    "snli_ve": QuestionTask(_open_snli_ve, _read_snli_ve, _first_input, scoring="anchors"),
    "vqa": QuestionTask(_open_vqa, _read_vqa, _first_input, several_right=True, scoring="answers"),
}


# ----------------------------------------------------------------------------------------------------
# Regimes: the number of labels


def parse_regime(regime: str) -> tuple[str, int]:
    """Split a regime into its kind ("full", "zero", "low" or "semi") and the N of low:N or semi:N, else 0."""
    kind, colon, number = regime.partition(":")
    if kind not in ("full", "low", "semi", "zero") or bool(colon) != (kind in ("low", "semi")):
        raise UserError(f"--set regime={regime}: choose full, zero, low:N or semi:N (N labels of each group)")
    if colon and (not number.isdecimal() or not int(number)):
        raise UserError(
            f"--set regime={regime}: {number or 'nothing'} is not a number of rows; write low:100 for example"
        )
    return kind, int(number or 0)


def labeled_rows(task: Task, manifest: Manifest, rows: np.ndarray, *, regime: str, subset: int) -> np.ndarray:
    """Select the rows whose label may be used.

    Args:
        task: The task of the rows.
        manifest: All rows of the data.
        rows: Indices of the training rows.
        regime: "full" for all rows with a label; "low:N" and "semi:N" for N random rows of each group (the
            category in VCR, the class in SNLI-VE, all rows in VQA); "zero" for none.
        subset: Seed of the random rows.

    Returns:
        A mask, bool [rows].
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
