"""VCR, SNLI-VE and VQA as a task student reads them: a row's texts, what is right, which rows have labels.

Rows come from `teachercache.data.readers.questions`. Not for batches (`task_batches`), nor for measuring (`evaluation.tasks.registry`).
"""

import dataclasses
import functools
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from evaluation.metrics.vqa_answers import normalize_answer, vocabulary
from teachercache.core.errors import UserError
from teachercache.data.manifest import Manifest
from teachercache.data.readers.questions import LABELS
from teachercache.data.sample import Sample

VQA_SCORES = (0.0, 0.3, 0.6, 0.9)  # of an answer that 0, 1, 2 or 3 of the ten people gave; 1 from four on


@dataclasses.dataclass(frozen=True)
class Task:
    """What is asked: `inputs` texts a row, `classes` answers to choose from (one a text in VCR, else of one text)."""

    name: str  # vcr, snli_ve, vqa
    which: str  # q2a or qa2r in VCR
    inputs: int
    classes: int
    answers: tuple[str, ...] = ()  # VQA's vocabulary


Mentions = tuple[tuple[int, int, int], ...]  # first character, the one behind the last, object


@dataclasses.dataclass(frozen=True)
class Question:
    """One row: the parts before and behind [SEP] of each input, which of the row's texts it is, what is right."""

    parts: tuple[tuple[str, str], ...]
    places: tuple[int, ...]  # of the inputs among the row's texts, as a teacher's cache numbers them
    answers: tuple[
        int, ...
    ]  # of the texts that the teacher compares with the picture, () where it is otherwise
    target: dict[int, float]  # class -> how right it is; {} where nobody says
    labelled: bool
    group: str  # low-shot takes as many of each
    mentions: tuple[Mentions, ...] = ()  # of each input: where its joined parts speak of which object (VCR)


def find_task(manifest: Manifest, rows: np.ndarray, mode: str) -> Task:
    """The task that the rows are about; UserError where they are about none."""
    samples = (manifest.row(row) for row in rows[:1].tolist())
    name = next((json.loads(sample.task)["task"] for sample in samples if sample.task), "")
    if name == "vcr":
        if mode not in ("q2a", "qa2r"):
            raise UserError(f"--set mode={mode}: choose q2a (the answer) or qa2r (the rationale)")
        return Task("vcr", mode, 4, 4)
    if name == "snli-ve":
        return Task("snli_ve", "", 1, len(LABELS))
    if name == "vqa":
        answers = vocabulary(manifest.row(row).label for row in rows.tolist())
        if len(answers) < 2:
            raise UserError(
                "the training rows have fewer than two different answers: is the annotations file beside "
                "them?"
            )
        return Task("vqa", "", 1, len(answers), tuple(answers))
    raise UserError(
        f"{manifest.data} asks nothing: pass VCR's .jsonl, SNLI-VE's .jsonl or VQA's questions .json as --data "
        "(scripts/datasets/scene_vcr_snli_ve.py and scripts/datasets/easy_vqa.py make small ones)"
    )


def read_question(task: Task, sample: Sample) -> Question:
    """The row as the task asks it; UserError names a row that is about something else."""
    try:
        columns = json.loads(sample.task)
        return READERS[task.name](task, sample, columns, columns["texts"])
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise UserError(f"row '{sample.key}' is no {task.name} row: {error!r}") from error


def _vcr(task: Task, sample: Sample, columns: dict, kinds: Sequence[str]) -> Question:
    """Inputs: question and each choice; question, right answer and each rationale where the mode is qa2r."""
    q2a = task.which == "q2a"
    pairs = _places(kinds, "pair" if q2a else "rationale_pair")
    label = columns.get("label" if q2a else "rationale_label")
    mentions = columns.get("mentions") or [()] * (
        1 + 2 * task.inputs
    )  # the question's, the choices', the rationales'
    first, named = columns["question"].strip(), _moved(mentions[0], 0)
    if not q2a and "label" in columns:
        named += _moved(mentions[1 + columns["label"]], len(first) + 1)
        first = f"{first} {columns['choices'][columns['label']].strip()}"
    target = {} if label is None else {int(label): 1.0}
    group = columns.get("category") or question_category(columns["question"])
    texts = [sample.texts[place].strip() for place in pairs]
    if len(texts) != task.inputs:
        raise ValueError(f"{len(texts)} texts to choose from, {task.inputs} are expected")
    parts = tuple((first, text[len(first) + 1 :]) for text in texts)
    choices = _places(kinds, "choice" if q2a else "rationale")
    start = 1 if q2a else 1 + len(columns["choices"])
    named_in = tuple(named + _moved(one, len(first) + 1) for one in mentions[start : start + task.inputs])
    return Question(parts, pairs, choices, target, label is not None, group, named_in)


def _moved(mentions: Sequence[Sequence[int]], by: int) -> Mentions:
    return tuple((start + by, end + by, place) for start, end, place in mentions)


def _snli_ve(task: Task, sample: Sample, columns: dict, kinds: Sequence[str]) -> Question:
    label = columns.get("label")
    target = {} if label is None else {int(label): 1.0}
    places = _places(kinds, "hypothesis")
    return Question(
        ((sample.texts[places[0]].strip(), ""),), places, (), target, label is not None, sample.label
    )


def _vqa(task: Task, sample: Sample, columns: dict, kinds: Sequence[str]) -> Question:
    places = _places(kinds, "question")
    counts = Counter(normalize_answer(answer) for answer in columns.get("answers") or ())
    index = _index_of(task.answers)
    target = {
        index[answer]: VQA_SCORES[n] if n < len(VQA_SCORES) else 1.0
        for answer, n in counts.items()
        if answer in index
    }
    return Question(((sample.texts[places[0]].strip(), ""),), places, (), target, bool(counts), "")


@functools.lru_cache(maxsize=4)
def _index_of(answers: tuple[str, ...]) -> dict[str, int]:
    return {answer: place for place, answer in enumerate(answers)}


READERS: dict[str, Callable[[Task, Sample, dict, Sequence[str]], Question]] = {
    "vcr": _vcr,
    "snli_ve": _snli_ve,
    "vqa": _vqa,
}


def _places(kinds: Sequence[str], kind: str) -> tuple[int, ...]:
    return tuple(place for place, name in enumerate(kinds) if name == kind)


# VCR, section "question types": the seven kinds of inference, told by the words that its authors looked for
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
    """Which of VCR's seven kinds a question is, `activity` where no word tells (free choice: order and words)."""
    lowered = question.lower()
    return next((name for name, pattern in CATEGORIES if re.search(pattern, lowered)), "activity")


# ----------------------------------------------------------------------------------------------------
# Regimes: how many labels there are


def labelled_rows(task: Task, manifest: Manifest, rows: np.ndarray, regime: str, subset: int) -> np.ndarray:
    """Which of the rows have a label that may be used, bool [rows].

    full: all that have one. low:N and semi:N: N of each group (VCR's category, SNLI-VE's class, VQA's rows as one),
    drawn by the seed `subset`. zero: none.
    """
    kind, colon, number = regime.partition(":")
    if kind not in ("full", "low", "semi", "zero") or bool(colon) != (kind in ("low", "semi")):
        raise UserError(f"--set regime={regime}: choose full, zero, low:N or semi:N (N labels of each group)")
    if colon and (not number.isdecimal() or not int(number)):
        raise UserError(
            f"--set regime={regime}: {number or 'nothing'} is no number of rows; low:100 for example"
        )
    questions = [read_question(task, manifest.row(row)) for row in rows.tolist()]
    labelled = np.array([question.labelled for question in questions], bool)
    if kind in ("full", "zero"):
        return labelled & (kind == "full")
    chosen = np.zeros(len(rows), bool)
    groups: dict[str, list[int]] = {}
    for i in np.random.default_rng([subset, 5]).permutation(len(rows)).tolist():
        members = groups.setdefault(questions[i].group, [])
        if labelled[i] and len(members) < int(number):
            members.append(i)
            chosen[i] = True
    return chosen
