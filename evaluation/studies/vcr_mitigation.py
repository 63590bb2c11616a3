"""Remove the shortcuts of VCR: by rules on person tags, by synonyms, or by the answers of a text-only model.

    rules      Ye & Kovashka 2021: the right choice's person becomes a pronoun, wrong choices get the question's person
    explicit   CLIP-TD, 8.4: frequent words shared by question (or image) and right choice become synonyms
    implicit   CLIP-TD, 8.4: rows that a text-only model answers correctly and confidently, and rows that it gets wrong

Functions read and return lines of VCR's own files, so that the same readers and `tasks/answering/vcr.py` apply.
"""

import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from evaluation.models.answerer import softmax

Line = dict[str, Any]  # one JSON object of VCR's files
Token = str | list[int]  # a word, or the objects that a mention refers to
PEOPLE = frozenset({"person"})
PRONOUNS = {False: frozenset({"he", "she"}), True: frozenset({"they"})}  # for a person, for a group
GENDER = {"he": "he", "him": "he", "his": "he", "she": "she", "her": "she", "hers": "she"}


# ----------------------------------------------------------------------------------------------------
# Rules


def rule_mitigated(
    lines: Iterable[Line], *, plural: bool = False, people: frozenset[str] = PEOPLE
) -> list[Line]:
    """Apply the published Rule-Singular (or with `plural` Rule-Plural) to answers and rationales.

    Singular: a choice changes if it contains exactly one person, or "he" or "she". In a right choice the person becomes
    "he" or "she": whichever the choice, otherwise the question, uses more often, otherwise "he". In a wrong choice the
    person or pronoun becomes the question's person. Plural: a choice changes if its only mention is a group, or if it
    contains "they".

    Args:
        lines: Lines of VCR.
        plural: Apply Rule-Plural.
        people: Names of objects that are people.

    Returns:
        The lines whose question mentions one person (with `plural` one group and nothing else), changed.
    """
    return [
        _ruled(line, whom, people)
        for line in lines
        if (whom := asked_about(line["question"], line, people, plural))
    ]


def asked_about(tokens: Sequence[Token], line: Line, people: frozenset[str], plural: bool) -> list[int]:
    """Return the objects of the only person (with `plural` the only group) in the tokens, or []."""
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
    tokens: list[Token], line: Line, whom: list[int], people: frozenset[str], *, right: bool
) -> list[Token]:
    """A choice without the shortcut, unchanged if the rule does not apply."""
    plural = len(whom) > 1
    pronouns = {token.lower() for token in tokens if isinstance(token, str)} & PRONOUNS[plural]
    named = {
        place
        for token in tokens
        if isinstance(token, list)
        for place in token
        if line["objects"][place] in people
    }
    mention = asked_about(tokens, line, people, plural)
    if not (mention or pronouns) or (not plural and len(named) + len(pronouns) != 1):
        return tokens
    pronoun = "they" if plural else _pronoun(tokens, line["question"])
    out: list[Token] = []
    for i, token in enumerate(tokens):
        is_mention = isinstance(token, list) and sorted(token) == mention
        if right:
            out.append((pronoun if i else pronoun.capitalize()) if is_mention else token)
        else:
            out.append(
                whom if is_mention or (isinstance(token, str) and token.lower() in pronouns) else token
            )
    return out


def _pronoun(*texts: Sequence[Token]) -> str:
    """The pronoun of the first text that uses one of "he" and "she" more often; otherwise "he"."""
    for tokens in texts:
        counts = Counter(GENDER.get(token.lower()) for token in tokens if isinstance(token, str))
        if counts["he"] != counts["she"]:
            return "he" if counts["he"] > counts["she"] else "she"
    return "he"


# ----------------------------------------------------------------------------------------------------
# Words shared by question or image and a choice


def lemma(word: str) -> str:
    """Remove a word's ending: plural and third-person s, ing, ed, a doubled consonant before those, a final e.

    The result is compared, not shown, and need not be a word. There is no dictionary, so "went" does not become "go";
    pass a better lemmatizer where a function takes one.
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


def words_of(tokens: Sequence[Token], lemmatize: Callable[[str], str] = lemma) -> list[str]:
    """Return the lemmas of the words, and `[2]` for each mentioned object; punctuation is left out."""
    out: list[str] = []
    for token in tokens:
        if isinstance(token, list):
            out += [f"[{place}]" for place in token]
        elif re.search(r"\w", token):
            out.append(lemmatize(token))
    return out


def overlap_table(lines: Sequence[Line], lemmatize: Callable[[str], str] = lemma) -> dict[str, float]:
    """Compute CLIP-TD's table 9: how many distinct words of a choice occur in the question or name an object.

    Args:
        lines: Lines of VCR.
        lemmatize: Maps a word to its lemma.

    Returns:
        Under `question_...` and `image_...`: `correct` is the mean number of shared words of right choices, `incorrect`
        that of the three wrong choices, `..._more` the share of rows in which that side shares more than the other.
    """
    shared: dict[str, list[tuple[float, float]]] = {"question": [], "image": []}
    for line in lines:
        choices = [set(words_of(choice, lemmatize)) for choice in line["answer_choices"]]
        places = {
            "question": set(words_of(line["question"], lemmatize)),
            "image": set(_labels(line, lemmatize)),
        }
        for where, words in places.items():
            counts = [len(words & choice) for choice in choices]
            right = counts.pop(line["answer_label"])
            shared[where].append((right, sum(counts) / len(counts)))
    table: dict[str, float] = {}
    for where, pairs in shared.items():
        of_right, of_wrong = np.array(pairs, np.float64).reshape(-1, 2).T
        table |= {
            f"{where}_correct": float(of_right.mean()),
            f"{where}_incorrect": float(of_wrong.mean()),
            f"{where}_correct_more": float((of_right > of_wrong).mean()),
            f"{where}_incorrect_more": float((of_wrong > of_right).mean()),
        }
    return table


def _labels(line: Line, lemmatize: Callable[[str], str]) -> list[str]:
    return [lemmatize(word) for name in line["objects"] for word in re.findall(r"\w+", name)]


class Explicit(NamedTuple):
    """The result of explicit mitigation: the lines, and how often each n-gram was replaced."""

    lines: list[Line]
    replaced: dict[str, int]


def explicit_mitigated(
    lines: Sequence[Line],
    synonyms: Mapping[str, Sequence[str]],
    *,
    n: int = 3,
    min_count: int = 5,
    seed: int = 0,
    lemmatize: Callable[[str], str] = lemma,
) -> Explicit:
    """Replace frequent n-grams that right choices share with the question or the image.

    An n-gram of the word list that at least `min_count` right choices share is replaced by one of its synonyms or
    hypernyms, longest n-grams first, but never by words of the question.

    Args:
        lines: Lines of VCR.
        synonyms: n-gram -> its synonyms and hypernyms.
        n: Largest length of an n-gram.
        min_count: Number of right choices that share a frequent n-gram.
        seed: With a row's annot_id it determines the draws.
        lemmatize: Maps a word to its lemma.
    """
    table = {
        tuple(lemmatize(word) for word in key.split()): (key, list(values))
        for key, values in synonyms.items()
    }
    table = {key: entry for key, entry in table.items() if len(key) <= n}
    shared = [_shared_grams(line, table, n, lemmatize) for line in lines]
    counts = Counter(gram for grams in shared for gram in grams)
    out, replaced = [], Counter[str]()
    for line, grams in zip(lines, shared, strict=True):
        rng = random.Random(f"{seed} {line['annot_id']}")
        choice = line["answer_choices"][line["answer_label"]]
        excluded = {*words_of(line["question"], lemmatize), *_labels(line, lemmatize)}
        for gram in sorted(grams, key=lambda gram: (-len(gram), gram)):
            key, values = table[gram]
            fits = [value for value in values if not excluded & {lemmatize(word) for word in value.split()}]
            if counts[gram] < min_count or not fits:
                continue
            changed = _replaced(choice, gram, key, rng.choice(fits), lemmatize)
            replaced[key] += changed != choice
            choice = changed
        choices = list(line["answer_choices"])
        choices[line["answer_label"]] = choice
        out.append(line | {"answer_choices": choices})
    return Explicit(out, dict(replaced.most_common()))


def _shared_grams(
    line: Line, table: Mapping[tuple[str, ...], Any], n: int, lemmatize: Callable[[str], str]
) -> set[tuple[str, ...]]:
    """N-grams of the word list in both the right choice and the question or the image's object names."""
    right = line["answer_choices"][line["answer_label"]]
    context = _grams(words_of(line["question"], lemmatize), n)
    context |= {
        gram
        for name in line["objects"]
        for gram in _grams([lemmatize(w) for w in re.findall(r"\w+", name)], n)
    }
    return _grams(words_of(right, lemmatize), n) & context & table.keys()


def _grams(words: Sequence[str], n: int) -> set[tuple[str, ...]]:
    return {tuple(words[i : i + k]) for k in range(1, n + 1) for i in range(len(words) - k + 1)}


def _replaced(
    choice: Sequence[Token], gram: tuple[str, ...], key: str, value: str, lemmatize: Callable[[str], str]
) -> list[Token]:
    """The tokens with `value` for each occurrence of the n-gram, inflected like the last word that it replaces."""
    out: list[Token] = []
    i = 0
    while i < len(choice):
        words = [token for token in choice[i : i + len(gram)] if isinstance(token, str)]
        if tuple(map(lemmatize, words)) == gram:
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
    """Return the word with the ending that `like` has in addition to `base`: "strolling" for "walking" and "walk"."""
    for ending in ("ing", "ed"):
        if like.endswith(ending) and not base.endswith(ending):
            return word.removesuffix("e") + ending
    if like.endswith("s") and not base.endswith("s"):
        return word + ("es" if re.search(r"(?:s|x|z|ch|sh)$", word) else "s")
    return word


# ----------------------------------------------------------------------------------------------------
# Answers of a text-only model


def implicit_parts(
    lines: Iterable[Line], scores: Mapping[str, Sequence[float]], *, sure: float = 0.9
) -> dict[str, list[Line]]:
    """Split lines by the answers of a text-only model.

    Args:
        lines: Lines of VCR.
        scores: annot_id -> four logits, or four probabilities that sum to 1.
        sure: Probability above which a right answer is confident.

    Returns:
        `language_biased`: right and confident; `image_biased`: wrong or a tie; `unsure`: right but not confident.
    """
    parts: dict[str, list[Line]] = {"language_biased": [], "image_biased": [], "unsure": []}
    for line in lines:
        probabilities = _probabilities(np.asarray(scores[line["annot_id"]], np.float64))
        label = line["answer_label"]
        right = bool((np.delete(probabilities, label) < probabilities[label]).all())
        name = "image_biased" if not right else "language_biased" if probabilities[label] > sure else "unsure"
        parts[name].append(line)
    return parts


def _probabilities(scores: np.ndarray) -> np.ndarray:
    """The softmax of logits; probabilities as they are."""
    if (scores >= 0).all() and abs(scores.sum() - 1) < 1e-3:
        return scores
    return softmax(scores[None])[0]
