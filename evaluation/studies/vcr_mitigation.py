"""VCR with its shortcuts taken away: by rules on person tags, by other words, by what a text-only model can answer.

    rules      Ye & Kovashka 2021: the right choice loses its person to a pronoun, the wrong ones get the question's
    explicit   CLIP-TD, 8.4: frequent words that question (or picture) and right choice share give way to others
    implicit   CLIP-TD, 8.4: rows that a text-only model answers rightly and surely, apart from those it gets wrong

Takes and gives lines of VCR's own files, which readers and tasks take unchanged; not for measuring: see `tasks/answering/vcr.py`.
"""

import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

Line = dict[str, Any]
PEOPLE = frozenset({"person"})
NAMED = {
    False: frozenset({"he", "she"}),
    True: frozenset({"they"}),
}  # pronouns that stand for a person, for a group
COUNTED = {"he": "he", "him": "he", "his": "he", "she": "she", "her": "she", "hers": "she"}


# ----------------------------------------------------------------------------------------------------
# Rules


def rule_mitigated(
    lines: Iterable[Line], *, plural: bool = False, people: frozenset[str] = PEOPLE
) -> list[Line]:
    """Lines whose question speaks of one person (`plural`: of one group and of nothing else), answers and rationales
    changed as in the published Rule-Singular and Rule-Plural.

    Of one person: a choice with exactly one person or he or she in it changes, wherever those stand. In a right choice
    its person becomes he or she, by the pronouns of the choice, else of the question, else he; in a wrong one both
    become the question's person. Of a group: a choice whose only mention is a group, or that has they in it.
    """
    return [
        _ruled(line, whom, people)
        for line in lines
        if (whom := asked_about(line["question"], line, people, plural))
    ]


def asked_about(tokens: Sequence[Any], line: Line, people: frozenset[str], plural: bool) -> list[int]:
    """The one person (the one group) that the tokens name, [] where there is none or another besides."""
    mentions = [token for token in tokens if isinstance(token, list)]
    persons = sorted({place for mention in mentions for place in mention if line["objects"][place] in people})
    if not plural:
        return persons if len(persons) == 1 else []
    return persons if len(mentions) == 1 and 1 < len(persons) == len(mentions[0]) else []


def _ruled(line: Line, whom: list[int], people: frozenset[str]) -> Line:
    changed = {}
    for kind in ("answer", "rationale"):
        if line.get(f"{kind}_label") is not None and f"{kind}_choices" in line:
            choices = enumerate(line[f"{kind}_choices"])
            changed[f"{kind}_choices"] = [
                _choice(tokens, line, whom, people, right=k == line[f"{kind}_label"]) for k, tokens in choices
            ]
    return line | changed


def _choice(
    tokens: list[Any], line: Line, whom: list[int], people: frozenset[str], *, right: bool
) -> list[Any]:
    """A choice without the shortcut, as it was where the rule does not reach it."""
    plural = len(whom) > 1
    said = {token.lower() for token in tokens if isinstance(token, str)} & NAMED[plural]
    named = {
        place
        for token in tokens
        if isinstance(token, list)
        for place in token
        if line["objects"][place] in people
    }
    mine = asked_about(tokens, line, people, plural)
    if not (mine or said) or (not plural and len(named) + len(said) != 1):
        return tokens
    pronoun = "they" if plural else _pronoun(tokens, line["question"])
    out: list[Any] = []
    for i, token in enumerate(tokens):
        is_mine = isinstance(token, list) and sorted(token) == mine
        if right:
            out.append((pronoun if i else pronoun.capitalize()) if is_mine else token)
        else:
            out.append(whom if is_mine or (isinstance(token, str) and token.lower() in said) else token)
    return out


def _pronoun(*texts: Sequence[Any]) -> str:
    """Whether it is he or she: whichever the first text with more of one than of the other uses; else he."""
    for tokens in texts:
        counts = Counter(COUNTED.get(token.lower()) for token in tokens if isinstance(token, str))
        if counts["he"] != counts["she"]:
            return "he" if counts["he"] > counts["she"] else "she"
    return "he"


# ----------------------------------------------------------------------------------------------------
# Words that question or picture and a choice share


def lemma(word: str) -> str:
    """A word without its ending: plural and third person s, ing, ed, a doubled consonant before those, a last e.

    What is left need be no word: it is compared, not shown. No dictionary, so went is not go; pass a lemmatiser that
    knows better where this one is an argument.
    """
    word = word.lower()
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    if len(word) > 4 and re.search(r"(?:s|x|z|ch|sh)es$", word):
        word = word[:-2]
    elif len(word) > 3 and word.endswith("s") and word[-2] not in "siu":
        word = word[:-1]
    for ending in ("ing", "ed"):
        stem = word.removesuffix(ending)
        if stem != word and len(stem) > 2 and re.search("[aeiouy]", stem):
            doubled = stem[-1] == stem[-2] and stem[-1] not in "lsz"
            return stem[:-1] if doubled else stem.removesuffix("e")
    return word.removesuffix("e") if len(word) > 3 else word


def words_of(tokens: Sequence[Any], lemmatise: Callable[[str], str] = lemma) -> list[str]:
    """Lemmas of the words, and `[2]` for each object named; punctuation is left out."""
    out: list[str] = []
    for token in tokens:
        if isinstance(token, list):
            out += [f"[{place}]" for place in token]
        elif re.search(r"\w", token):
            out.append(lemmatise(token))
    return out


def overlap_table(lines: Sequence[Line], lemmatise: Callable[[str], str] = lemma) -> dict[str, float]:
    """CLIP-TD's table 9: how many of a choice's different words are in the question, or name an object of the picture.

    `incorrect` is the mean of the three; `more` the share of rows where that side has more than the other one.
    """
    shared: dict[str, list[tuple[float, float]]] = {"question": [], "image": []}
    for line in lines:
        choices = [set(words_of(choice, lemmatise)) for choice in line["answer_choices"]]
        places = {
            "question": set(words_of(line["question"], lemmatise)),
            "image": set(_labels(line, lemmatise)),
        }
        for where, words in places.items():
            counts = [len(words & choice) for choice in choices]
            right = counts.pop(line["answer_label"])
            shared[where].append((right, sum(counts) / len(counts)))
    found: dict[str, float] = {}
    for where, pairs in shared.items():
        of_right, of_wrong = np.array(pairs, np.float64).reshape(-1, 2).T
        found |= {
            f"{where}_correct": float(of_right.mean()),
            f"{where}_incorrect": float(of_wrong.mean()),
            f"{where}_correct_more": float((of_right > of_wrong).mean()),
            f"{where}_incorrect_more": float((of_wrong > of_right).mean()),
        }
    return found


def _labels(line: Line, lemmatise: Callable[[str], str]) -> list[str]:
    return [lemmatise(word) for name in line["objects"] for word in re.findall(r"\w+", name)]


class Explicit(NamedTuple):
    """What explicit mitigation made: the lines, and how many times each n-gram was replaced."""

    lines: list[Line]
    replaced: dict[str, int]


def explicit_mitigated(
    lines: Sequence[Line],
    synonyms: Mapping[str, Sequence[str]],
    *,
    n: int = 3,
    min_count: int = 5,
    seed: int = 0,
    lemmatise: Callable[[str], str] = lemma,
) -> Explicit:
    """Right choices without the frequent n-grams that they share with question or picture.

    An n-gram of the word list that `min_count` right choices or more share gives way to one of its synonyms or
    hypernyms, longest first, drawn by the row's annot_id; never to words that the question has too.
    """
    table = {
        tuple(lemmatise(word) for word in key.split()): (key, list(values))
        for key, values in synonyms.items()
    }
    table = {key: found for key, found in table.items() if len(key) <= n}
    shared = [_shared_grams(line, table, n, lemmatise) for line in lines]
    counts = Counter(gram for grams in shared for gram in grams)
    out, replaced = [], Counter[str]()
    for line, grams in zip(lines, shared, strict=True):
        rng = random.Random(f"{seed} {line['annot_id']}")
        choice = line["answer_choices"][line["answer_label"]]
        taken = {*words_of(line["question"], lemmatise), *_labels(line, lemmatise)}
        for gram in sorted(grams, key=lambda gram: (-len(gram), gram)):
            key, values = table[gram]
            fits = [value for value in values if not taken & {lemmatise(word) for word in value.split()}]
            if counts[gram] < min_count or not fits:
                continue
            changed = _replaced(choice, gram, key, rng.choice(fits), lemmatise)
            replaced[key] += changed != choice
            choice = changed
        choices = list(line["answer_choices"])
        choices[line["answer_label"]] = choice
        out.append(line | {"answer_choices": choices})
    return Explicit(out, dict(replaced.most_common()))


def _shared_grams(
    line: Line, table: Mapping[tuple[str, ...], Any], n: int, lemmatise: Callable[[str], str]
) -> set[tuple[str, ...]]:
    """N-grams of the word list that the right choice has, and the question or the picture's labels too."""
    right = line["answer_choices"][line["answer_label"]]
    given = _grams(words_of(line["question"], lemmatise), n)
    given |= {
        gram
        for name in line["objects"]
        for gram in _grams([lemmatise(w) for w in re.findall(r"\w+", name)], n)
    }
    return _grams(words_of(right, lemmatise), n) & given & table.keys()


def _grams(words: Sequence[str], n: int) -> set[tuple[str, ...]]:
    return {tuple(words[i : i + k]) for k in range(1, n + 1) for i in range(len(words) - k + 1)}


def _replaced(
    choice: Sequence[Any], gram: tuple[str, ...], key: str, value: str, lemmatise: Callable[[str], str]
) -> list[Any]:
    """The tokens with `value` for each occurrence of the n-gram; its last word takes the ending of what was there."""
    out: list[Any] = []
    i = 0
    while i < len(choice):
        words = choice[i : i + len(gram)]
        if all(isinstance(word, str) for word in words) and tuple(map(lemmatise, words)) == gram:
            new = value.split()
            new[-1] = inflected(new[-1], words[-1].lower(), key.split()[-1])
            new[0] = new[0].capitalize() if words[0][0].isupper() else new[0]
            if out and isinstance(out[-1], str) and out[-1].lower() in ("a", "an"):
                out[-1] = out[-1][0] + ("n" if new[0][0].lower() in "aeiou" else "")
            out += new
            i += len(gram)
        else:
            out.append(choice[i])
            i += 1
    return out


def inflected(word: str, like: str, base: str) -> str:
    """The word with the ending that `like` has and `base` has not: walking is to walk as strolling to stroll."""
    for ending in ("ing", "ed"):
        if like.endswith(ending) and not base.endswith(ending):
            return word.removesuffix("e") + ending
    if like.endswith("s") and not base.endswith("s"):
        return word + ("es" if re.search(r"(?:s|x|z|ch|sh)$", word) else "s")
    return word


# ----------------------------------------------------------------------------------------------------
# What a text-only model can answer


def implicit_parts(
    lines: Iterable[Line], scores: Mapping[str, Sequence[float]], *, sure: float = 0.9
) -> dict[str, list[Line]]:
    """`language_biased`: right and surer than `sure`; `image_biased`: wrong, a tie too; `unsure`: right, but not sure.

    `scores` has four logits for each annot_id, or four chances that add up to one.
    """
    parts: dict[str, list[Line]] = {"language_biased": [], "image_biased": [], "unsure": []}
    for line in lines:
        chances = _chances(np.asarray(scores[line["annot_id"]], np.float64))
        label = line["answer_label"]
        right = bool((np.delete(chances, label) < chances[label]).all())
        name = "image_biased" if not right else "language_biased" if chances[label] > sure else "unsure"
        parts[name].append(line)
    return parts


def _chances(scores: np.ndarray) -> np.ndarray:
    if (scores >= 0).all() and abs(scores.sum() - 1) < 1e-3:
        return scores
    powers = np.exp(scores - scores.max())
    return powers / powers.sum()
