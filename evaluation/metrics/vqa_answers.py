"""VQA's answers made comparable by the rules of its official evaluation; its vocabulary. Not for scores.

Its quirks are kept: a mark beside a space, or any mark where digits stand about a comma, goes without a
trace, others become a space; a period goes unless a digit follows it, whatever is before it, and only 32 times; some
contractions are missing and one is taken apart.
"""

import functools
import re
from collections import Counter
from collections.abc import Iterable

NUM_ANSWERS, MIN_ANSWERS = (
    3129,
    9,
)  # VQA's vocabulary: answers that are the most common one of 9 questions or more
MARKS = ';/[]"{}()=+\\_-><@`,?!'
NUMBERS = dict(
    zip(
        ["none", "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"],
        ["0", "0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "10"],
        strict=True,
    )
)
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
CONTRACTIONS = {
    word[: at.start()] + word[at.end() :]: word
    for word in CONTRACTED.split()
    for at in re.finditer("'", word)
} | {"somebody'd": "somebodyd"}


@functools.lru_cache(maxsize=1 << 18)  # annotators repeat themselves
def normalize_answer(answer: str) -> str:
    """Punctuation, number words, articles and contractions as the official evaluation has them."""
    out, digits = answer, re.search(r"\d,\d", answer)
    for mark in MARKS:
        alone = f"{mark} " in answer or f" {mark}" in answer
        out = out.replace(mark, "" if alone or digits else " ")
    out = re.sub(r"\.(?!\d)", "", out, count=32)
    words = [NUMBERS.get(word, word) for word in out.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ("a", "an", "the"))


def vocabulary(answers: Iterable[str]) -> list[str]:
    """VQA's answers to choose from, of each question's most common one ("" for none), the most common first.

    Those of nine questions or more, 3,129 at most; of small data (fewer than 20 are that common) all of them.
    """
    counts = Counter(normalize_answer(answer) for answer in answers if answer)
    ordered = sorted(counts, key=lambda answer: (-counts[answer], answer))
    common = [answer for answer in ordered if counts[answer] >= MIN_ANSWERS]
    return (common if len(common) >= 20 else ordered)[:NUM_ANSWERS]


def soft_accuracy(said: str | None, answers: list[str], protocol: str = "official") -> float:
    """How right an answer is by what the annotators said; 0 for no answer."""
    if said is None:
        return 0.0
    given, said = [tidy(answer) for answer in answers], tidy(said)
    if protocol == "mmf" or len(set(given)) > 1:
        given, said = [normalize_answer(answer) for answer in given], normalize_answer(said)
    times = Counter(given)
    # an annotator's nine others: those who said `said`, without the annotator where that is one of them
    shares = [min((times[said] - (answer == said)) / 3, 1.0) for answer in given]
    return sum(shares) / len(shares)


def tidy(answer: str) -> str:
    """One line without spaces about it."""
    return answer.replace("\n", " ").replace("\t", " ").strip()
