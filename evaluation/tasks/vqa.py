"""VQA v2 and OK-VQA by the official soft accuracy (Antol et al. 2015), its quirks included. Not for free-form text.

    accuracy(a) = mean over the ten sets of nine annotators of min(number who said a / 3, 1)

`official`: where all ten said the same, neither theirs nor the model's answer is normalised. `mmf`: always.
Quirks of the normalisation, kept: a mark beside a space, or any mark where digits stand about a comma, goes without a
trace, others become a space; a period goes unless a digit follows it, whatever is before it, and only 32 times; some
contractions are missing and one is taken apart.
"""

import functools
import json
import re
from collections import Counter
from typing import Any

import numpy as np

from evaluation.answerer import Answerer, asked, by_group, pick, rows_to_measure
from teachercache.names import UserError
from teachercache.samples import Manifest

CHUNK = 4096  # rows scored at once: their scores of 3,129 answers are 51 MB
MARKS = ';/[]"{}()=+\\_-><@`,?!'
NUMBERS = dict(zip(["none", "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"],
                   ["0", "0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "10"], strict=True))  # fmt: skip
# Each is meant where one of its apostrophes is missing; words are in lower case by then, so I'm and I've never come
CONTRACTED = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd "
    "he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've "
    "needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've "
    "somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll "
    "that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've "
    "weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll "
    "why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've"
)
CONTRACTIONS = {word[: at.start()] + word[at.end() :]: word for word in CONTRACTED.split()
                for at in re.finditer("'", word)} | {"somebody'd": "somebodyd"}  # fmt: skip


def evaluate(answerer: Answerer, manifest: Manifest, protocol: str = "official") -> dict[str, Any]:
    """The soft accuracy over a split, per answer type and question type; a tie for the best answer is no answer."""
    if protocol not in ("official", "mmf"):
        raise UserError(f"unknown protocol '{protocol}' of VQA: choose from official, mmf")
    rows = rows_to_measure(manifest)
    tasks = [json.loads(manifest.table["task"][row].as_py() or "{}") for row in rows.tolist()]
    known = np.array([bool(task.get("answers")) for task in tasks], bool)
    if not known.any():
        return {"accuracy": f"skipped: {manifest.data} has no answers"}
    tasks, rows = [task for task, there in zip(tasks, known, strict=True) if there], rows[known]
    chosen, ties, heard = _chosen(answerer, manifest, rows)
    if not heard.any():
        return {"accuracy": f"skipped: {answerer.name} has no score for any row"}
    tasks = [tasks[i] for i in np.flatnonzero(heard)]
    said = [None if place < 0 else answerer.answers[place] for place in chosen[heard].tolist()]
    hits = np.array([soft_accuracy(word, task["answers"], protocol) for word, task in zip(said, tasks, strict=True)])
    return {
        "accuracy": float(hits.mean()),
        "tie_rate": float(ties[heard].mean()),
        **by_group(hits, [task.get("answer_type") for task in tasks], "accuracy:answer_type"),
        **by_group(hits, [task.get("question_type") for task in tasks], "accuracy:question_type"),
        "protocol": protocol,
        "num_rows": len(hits),
        "num_answers": len(answerer.answers),
        "num_skipped": len(known) - len(hits),
    }


def _chosen(answerer: Answerer, manifest: Manifest, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which answer each row got (-1: none), where two shared the best score, which rows could be asked."""
    parts = []
    for start in range(0, len(rows), CHUNK):
        part = rows[start : start + CHUNK]
        scores = answerer.score(manifest, part, "")
        if scores is None:
            parts.append((np.full(len(part), -1), np.zeros(len(part), bool), np.zeros(len(part), bool)))
        else:
            parts.append((*pick(scores), asked(scores)))
    chosen, ties, heard = (np.concatenate(column) for column in zip(*parts, strict=True))
    return chosen, ties, heard


def soft_accuracy(said: str | None, answers: list[str], protocol: str = "official") -> float:
    """How right an answer is by what the annotators said; 0 for no answer."""
    if said is None:
        return 0.0
    given, said = [tidy(answer) for answer in answers], tidy(said)
    if protocol == "mmf" or len(set(given)) > 1:
        given, said = [normalise(answer) for answer in given], normalise(said)
    times = Counter(given)
    # an annotator's nine others: those who said `said`, without the annotator where that is one of them
    shares = [min((times[said] - (answer == said)) / 3, 1.0) for answer in given]
    return sum(shares) / len(shares)


def tidy(answer: str) -> str:
    """One line without spaces about it."""
    return answer.replace("\n", " ").replace("\t", " ").strip()


@functools.lru_cache(maxsize=1 << 18)  # annotators repeat themselves
def normalise(answer: str) -> str:
    """Punctuation, number words, articles and contractions as the official evaluation has them."""
    out, digits = answer, re.search(r"\d,\d", answer)
    for mark in MARKS:
        alone = f"{mark} " in answer or f" {mark}" in answer
        out = out.replace(mark, "" if alone or digits else " ")
    out = re.sub(r"\.(?!\d)", "", out, count=32)
    words = [NUMBERS.get(word, word) for word in out.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ("a", "an", "the"))
