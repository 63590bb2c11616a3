"""VQA's answers: normalization by the rules of the official evaluation, soft accuracy, and the answer vocabulary.

The quirks of the official code are kept. A punctuation mark next to a space, or any mark if the answer has a comma
between digits, is removed; other marks become a space. A period is removed unless a digit follows it, whatever precedes
it, and at most 32 times. Some contractions are missing, and one loses its apostrophe.
"""

import functools
import re
from collections import Counter
from collections.abc import Iterable

# VQA's vocabulary: answers that are the most common one of 9 questions or more
NUM_ANSWERS, MIN_ANSWERS = 3129, 9
MARKS = ';/[]"{}()=+\\_-><@`,?!'
NUMBERS = dict(
    zip(
        ["none", "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"],
        ["0", "0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "10"],
        strict=True,
    )
)
# They replace their forms without one of the apostrophes. Words are in lower case by then, so I'm and I've never occur
CONTRACTED = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd "
    "he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've "
    "needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've "
    "somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll "
    "that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've "
    "weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll "
    "why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've"
)
CONTRACTIONS = {
    word[: apostrophe.start()] + word[apostrophe.end() :]: word
    for word in CONTRACTED.split()
    for apostrophe in re.finditer("'", word)
} | {"somebody'd": "somebodyd"}


@functools.lru_cache(maxsize=1 << 18)  # annotators repeat themselves
def normalize_answer(answer: str) -> str:
    """Normalize punctuation, number words, articles and contractions like the official evaluation."""
    out, digits = answer, re.search(r"\d,\d", answer)
    for mark in MARKS:
        alone = f"{mark} " in answer or f" {mark}" in answer
        out = out.replace(mark, "" if alone or digits else " ")
    out = re.sub(r"\.(?!\d)", "", out, count=32)
    words = [NUMBERS.get(word, word) for word in out.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ("a", "an", "the"))


def vocabulary(answers: Iterable[str]) -> list[str]:
    """Return the vocabulary of answers, the most common first.

    Args:
        answers: The most common answer of each question, "" for none.

    Returns:
        Normalized answers of at least nine questions, at most 3,129. On small data, where fewer than 20 answers are
        that common, all answers.
    """
    counts = Counter(normalize_answer(answer) for answer in answers if answer)
    ordered = sorted(counts, key=lambda answer: (-counts[answer], answer))
    common = [answer for answer in ordered if counts[answer] >= MIN_ANSWERS]
    return (common if len(common) >= 20 else ordered)[:NUM_ANSWERS]


def soft_accuracy(answer: str | None, references: list[str], protocol: str = "official") -> float:
    """Compute the soft accuracy of an answer.

    Args:
        answer: The model's answer; None for no answer, which is wrong.
        references: The annotators' answers, usually ten.
        protocol: "official": normalize unless all annotators gave the same answer. "mmf": always normalize.

    Returns:
        The mean over annotators of min(number of the others with the same answer / 3, 1).
    """
    if answer is None:
        return 0.0
    truth, answer = [tidy(reference) for reference in references], tidy(answer)
    if protocol == "mmf" or len(set(truth)) > 1:
        truth, answer = [normalize_answer(reference) for reference in truth], normalize_answer(answer)
    count = truth.count(answer)
    shares = [min((count - (reference == answer)) / 3, 1.0) for reference in truth]
    return sum(shares) / len(shares)


def tidy(answer: str) -> str:
    """Return the text as one line without surrounding spaces."""
    return answer.replace("\n", " ").replace("\t", " ").strip()
