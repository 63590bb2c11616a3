"""Captions with their words in a wrong order: ARO's COCO-order and Flickr-order (Yuksekgonul et al. 2023, section 2.3).

Of each caption four wrong ones, in this order behind the true one: nouns among nouns and adjectives among adjectives;
all other words; the words within each three; threes of words among each other. All five then lose their punctuation and
what follows the 30th word. What was drawn is kept in a file beside the data, so that models are asked the same; a seed
and the captions decide it where the tagger is the same. Not for scores: see `tasks/matching/aro.py`.
"""

import dataclasses
import hashlib
import json
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from evaluation.data.pos_tags import Tagged, Tagger, find_tagger, word_tokenizer
from teachercache.core.errors import UserError
from teachercache.core.paths import write_whole
from teachercache.core.progress import say

MAX_WORDS = 30
SHUFFLES = ("nouns_and_adjectives", "all_but_nouns_and_adjectives", "within_trigrams", "trigrams")


@dataclasses.dataclass(frozen=True)
class Options:
    """Per caption the true one and the four wrong ones, and which tagger they come from."""

    texts: list[list[str]]  # [captions][5]
    tagger: str
    seed: int


def pre_caption(caption: str, max_words: int = MAX_WORDS) -> str:
    """BLIP's: lower case, punctuation as spaces, single spaces, at most so many words."""
    bare = re.sub(r"\s{2,}", " ", re.sub(r"[.!\"()*#:;~]", " ", caption.lower())).rstrip("\n").strip(" ")
    return " ".join(bare.split(" ")[:max_words])


def shuffle_nouns_and_adjectives(tagged: Tagged, rng: random.Random) -> list[str]:
    """Nouns change places with nouns, adjectives with adjectives, the rest stays."""
    words = [token for token, _ in tagged]
    for wanted in ("noun", "adjective"):
        permute(words, [i for i, (_, kind) in enumerate(tagged) if kind == wanted], rng)
    return words


def shuffle_all_but_nouns_and_adjectives(tagged: Tagged, rng: random.Random) -> list[str]:
    """Nouns and adjectives stay, all other tokens change places, punctuation too."""
    words = [token for token, _ in tagged]
    permute(words, [i for i, (_, kind) in enumerate(tagged) if kind == "other"], rng)
    return words


def permute(words: list[str], places: Sequence[int], rng: random.Random) -> None:
    """Draws an order for the words at some places; it may be the one that they have."""
    taken = [words[i] for i in places]
    rng.shuffle(taken)
    for i, word in zip(places, taken, strict=True):
        words[i] = word


def trigrams(tokens: Sequence[str]) -> list[list[str]]:
    """Threes in their order, the last perhaps shorter."""
    return [list(tokens[i : i + 3]) for i in range(0, len(tokens), 3)]


def shuffle_within_trigrams(tokens: Sequence[str], rng: random.Random) -> list[str]:
    """The words of each three change places."""
    threes = trigrams(tokens)
    for three in threes:
        rng.shuffle(three)
    return [word for three in threes for word in three]


def shuffle_trigrams(tokens: Sequence[str], rng: random.Random) -> list[str]:
    """Threes change places as wholes."""
    threes = trigrams(tokens)
    rng.shuffle(threes)
    return [word for three in threes for word in three]


def options_of(captions: Sequence[str], tagger: Tagger, *, seed: int = 0) -> Options:
    """Five options per caption, the true one first; they depend on the seed, the caption and its place."""
    tokenize = word_tokenizer()
    texts = []
    for i, (caption, tagged) in enumerate(zip(captions, tagger.tag(captions), strict=True)):
        tokens = tokenize(caption)
        drawn: list[tuple[Callable[..., list[str]], Sequence]] = [
            (shuffle_nouns_and_adjectives, tagged),
            (shuffle_all_but_nouns_and_adjectives, tagged),
            (shuffle_within_trigrams, tokens),
            (shuffle_trigrams, tokens),
        ]
        wrong = [
            shuffle(words, random.Random(f"{seed} {i} {name} {caption}"))
            for name, (shuffle, words) in zip(SHUFFLES, drawn, strict=True)
        ]
        texts.append([pre_caption(caption), *(pre_caption(" ".join(words)) for words in wrong)])
    return Options(texts, tagger.name, seed)


def wrong_options(options: Sequence[str]) -> list[str]:
    """The wrong ones that differ from the true one, and not in spaces alone, which NLTK puts before a comma."""
    true = options[0].replace(" ", "")
    return [option for option in options[1:] if option.replace(" ", "") != true]


def stored_options(path: Path, captions: Sequence[str], *, seed: int = 0) -> Options:
    """What the file says if it was made of these captions, else new options, which are then put there."""
    source = hashlib.sha256(json.dumps(list(captions)).encode()).hexdigest()
    if path.exists():
        known = _read(path, len(captions))
        if known["source"] != source:
            raise UserError(f"{path} was made of other captions: remove it to have new ones drawn")
        return Options(known["options"], known["tagger"], known["seed"])
    made = options_of(captions, find_tagger(path.parent), seed=seed)
    content = {
        "tagger": made.tagger,
        "seed": seed,
        "source": source,
        "shuffles": SHUFFLES,
        "options": made.texts,
    }
    try:
        write_whole(path, json.dumps(content) + "\n")
    except OSError as error:
        say(f"the options are not kept: cannot write {path}: {error.strerror or error}")
    return made


def _read(path: Path, num: int) -> dict:
    """The file, checked."""
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        groups = known["options"] if {"tagger", "seed", "source", "options"} <= set(known) else []
        texts = [text for group in groups if len(group) == 5 for text in group]
        if len(groups) == num and len(texts) == 5 * num and all(isinstance(text, str) for text in texts):
            return known
    except (ValueError, TypeError):
        pass
    raise UserError(
        f"{path} is not the file of options that was written there: remove it to have it written anew"
    )
