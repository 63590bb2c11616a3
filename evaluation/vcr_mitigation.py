"""VCR with its shortcuts taken away: by rules on person tags, by other words, by what a text-only model can answer.

    rules      Ye & Kovashka 2021: the right choice loses the question's person, the wrong ones get it
    explicit   CLIP-TD, 8.4: frequent words that question (or picture) and right choice share give way to others
    implicit   CLIP-TD, 8.4: rows that a text-only model answers rightly and surely, apart from those it gets wrong

Takes and gives lines of VCR's own files, which readers and tasks take unchanged; not for measuring: see `tasks/vcr.py`.
"""

import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

Line = dict[str, Any]
PEOPLE = frozenset({"person"})
SINGULAR = {"he": "he", "him": "he", "his": "he", "she": "she", "her": "she", "hers": "she"}
PLURAL = {word: "they" for word in ("they", "them", "their", "theirs")}
POSSESSIVE = {"he": "his", "she": "her", "they": "their"}
OWNED = frozenset(POSSESSIVE.values())  # "her" as well: "saw her" gets an 's too much


# ----------------------------------------------------------------------------------------------------
# Rules


def rule_mitigated(lines: Iterable[Line], *, plural: bool = False, people: frozenset[str] = PEOPLE) -> list[Line]:
    """Lines whose question speaks of one person (`plural`: of one group of people) alone, with their choices changed.

    In the right choice that person becomes a pronoun, by the pronouns of the choice, else of the question, else he;
    a wrong choice that holds exactly one person or pronoun gets the question's person in its place. How groups are
    done is our reading: the group `[0, 1]` as a whole is the person, and they the pronoun.
    """
    return [_ruled(line, whom, people) for line in lines if (whom := asked_about(line, people, plural)) is not None]


def asked_about(line: Line, people: frozenset[str], plural: bool) -> list[int] | None:
    """The one person (the one group) that the question names, None where there is none or another besides."""
    named = {tuple(token) for token in line["question"] if _is_mention(token, line, people)}
    whom = next(iter(named)) if len(named) == 1 else ()
    return list(whom) if whom and (len(whom) > 1) == plural else None


def _is_mention(token: Any, line: Line, people: frozenset[str]) -> bool:
    return isinstance(token, list) and bool(token) and all(line["objects"][place] in people for place in token)


def _ruled(line: Line, whom: list[int], people: frozenset[str]) -> Line:
    choices = list(line["answer_choices"])
    known = PLURAL if len(whom) > 1 else SINGULAR
    for k, choice in enumerate(choices):
        if k == line["answer_label"]:
            choices[k] = _with_pronoun(choice, whom, _pronoun(known, choice, line["question"]))
            continue
        places = [i for i, token in enumerate(choice) if _is_person(token, line, people, len(whom), known)]
        if len(places) == 1:
            owned = isinstance(choice[places[0]], str) and choice[places[0]].lower() in OWNED
            choices[k] = [*choice[: places[0]], whom, *(["'s"] if owned else []), *choice[places[0] + 1 :]]
    return line | {"answer_choices": choices}


def _is_person(token: Any, line: Line, people: frozenset[str], size: int, known: Mapping[str, str]) -> bool:
    if isinstance(token, str):
        return token.lower() in known
    return (len(token) > 1) == (size > 1) and _is_mention(token, line, people)


def _pronoun(known: Mapping[str, str], *texts: Sequence[Any]) -> str:
    """The pronoun that the first text with more of one than of others uses."""
    for tokens in texts:
        counts = Counter(known[token.lower()] for token in tokens if isinstance(token, str) and token.lower() in known)
        best = counts.most_common(2)
        if best and (len(best) == 1 or best[0][1] > best[1][1]):
            return best[0][0]
    return "they" if known is PLURAL else "he"


def _with_pronoun(choice: Sequence[Any], whom: list[int], pronoun: str) -> list[Any]:
    """The tokens with a pronoun for the person; `'s` or `' s` behind goes into his, her or their."""
    out: list[Any] = []
    skip = 0
    for i, token in enumerate(choice):
        if skip:
            skip -= 1
            continue
        if token != whom:
            out.append(token)
            continue
        behind = [word for word in choice[i + 1 : i + 3] if isinstance(word, str)]
        skip = 1 if behind[:1] == ["'s"] else 2 if behind == ["'", "s"] else 0
        word = POSSESSIVE[pronoun] if skip else pronoun
        out.append(word.capitalize() if i == 0 else word)
    return out


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
        places = {"question": set(words_of(line["question"], lemmatise)), "image": set(_labels(line, lemmatise))}
        for where, words in places.items():
            counts = [len(words & choice) for choice in choices]
            right = counts.pop(line["answer_label"])
            shared[where].append((right, sum(counts) / len(counts)))
    found: dict[str, float] = {}
    for where, pairs in shared.items():
        of_right, of_wrong = np.array(pairs, np.float64).reshape(-1, 2).T
        found |= {f"{where}_correct": float(of_right.mean()), f"{where}_incorrect": float(of_wrong.mean()),
                  f"{where}_correct_more": float((of_right > of_wrong).mean()),
                  f"{where}_incorrect_more": float((of_wrong > of_right).mean())}  # fmt: skip
    return found


def _labels(line: Line, lemmatise: Callable[[str], str]) -> list[str]:
    return [lemmatise(word) for name in line["objects"] for word in re.findall(r"\w+", name)]


class Explicit(NamedTuple):
    """What explicit mitigation made: the lines, and how many times each n-gram was replaced."""

    lines: list[Line]
    replaced: dict[str, int]


def explicit_mitigated(lines: Sequence[Line], synonyms: Mapping[str, Sequence[str]], *, n: int = 3, min_count: int = 5,
                       seed: int = 0, lemmatise: Callable[[str], str] = lemma) -> Explicit:  # fmt: skip
    """Right choices without the frequent n-grams that they share with question or picture.

    An n-gram of the word list that `min_count` right choices or more share gives way to one of its synonyms or
    hypernyms, longest first, drawn by the row's annot_id; never to words that the question has too.
    """
    table = {tuple(lemmatise(word) for word in key.split()): (key, list(values)) for key, values in synonyms.items()}
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


def _shared_grams(line: Line, table: Mapping[tuple[str, ...], Any], n: int,
                  lemmatise: Callable[[str], str]) -> set[tuple[str, ...]]:  # fmt: skip
    """N-grams of the word list that the right choice has, and the question or the picture's labels too."""
    right = line["answer_choices"][line["answer_label"]]
    given = _grams(words_of(line["question"], lemmatise), n)
    given |= {gram for name in line["objects"] for gram in _grams([lemmatise(w) for w in re.findall(r"\w+", name)], n)}
    return _grams(words_of(right, lemmatise), n) & given & table.keys()


def _grams(words: Sequence[str], n: int) -> set[tuple[str, ...]]:
    return {tuple(words[i : i + k]) for k in range(1, n + 1) for i in range(len(words) - k + 1)}


def _replaced(choice: Sequence[Any], gram: tuple[str, ...], key: str, value: str,
              lemmatise: Callable[[str], str]) -> list[Any]:  # fmt: skip
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


def implicit_parts(lines: Iterable[Line], scores: Mapping[str, Sequence[float]], *,
                   sure: float = 0.9) -> dict[str, list[Line]]:  # fmt: skip
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
