"""Shuffle the words of captions: ARO's COCO-order and Flickr-order (Yuksekgonul et al. 2023, section 2.3).

Each caption gets four wrong ones, in this order after the true one: nouns shuffled among nouns and adjectives among
adjectives; all other words shuffled; the words within each trigram shuffled; the trigrams shuffled. All five then lose
their punctuation and everything after the 30th word. The options are stored in a file beside the data, so that all
models see the same ones; with the same tagger they depend only on the seed and the captions. `tasks/matching/aro.py`
scores them.
"""

import dataclasses
import hashlib
import json
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from evaluation.data.pos_tags import Tagged, Tagger, find_tagger, word_tokenizer
from teachercache.core.errors import UserError
from teachercache.core.paths import write_whole
from teachercache.core.progress import say
from teachercache.data.foreign import clean, parse_json

MAX_WORDS = 30
SHUFFLES = ("nouns_and_adjectives", "all_but_nouns_and_adjectives", "within_trigrams", "trigrams")


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of captions.

    Attributes:
        texts: For each caption the true one and the four wrong ones.
        tagger: The tagger's name.
        seed: The seed.
    """

    texts: list[list[str]]
    tagger: str
    seed: int


def pre_caption(caption: str, max_words: int = MAX_WORDS) -> str:
    """Normalize a caption as BLIP does: lower case, punctuation as spaces, single spaces, at most `max_words` words."""
    bare = re.sub(r"\s{2,}", " ", re.sub(r"[.!\"()*#:;~]", " ", caption.lower())).rstrip("\n").strip(" ")
    return " ".join(bare.split(" ")[:max_words])


def shuffle_nouns_and_adjectives(tagged: Tagged, rng: random.Random) -> list[str]:
    """Shuffle nouns among nouns and adjectives among adjectives; other tokens stay."""
    words = [token for token, _ in tagged]
    for wanted in ("noun", "adjective"):
        permute(words, [i for i, (_, kind) in enumerate(tagged) if kind == wanted], rng)
    return words


def shuffle_all_but_nouns_and_adjectives(tagged: Tagged, rng: random.Random) -> list[str]:
    """Shuffle all tokens, punctuation included, except nouns and adjectives."""
    words = [token for token, _ in tagged]
    permute(words, [i for i, (_, kind) in enumerate(tagged) if kind == "other"], rng)
    return words


def permute(words: list[str], places: Sequence[int], rng: random.Random) -> None:
    """Shuffle the words at some places in place; the order may stay the same."""
    shuffled = [words[i] for i in places]
    rng.shuffle(shuffled)
    for i, word in zip(places, shuffled, strict=True):
        words[i] = word


def trigrams(tokens: Sequence[str]) -> list[list[str]]:
    """Split tokens into consecutive threes; the last may be shorter."""
    return [list(tokens[i : i + 3]) for i in range(0, len(tokens), 3)]


def shuffle_within_trigrams(tokens: Sequence[str], rng: random.Random) -> list[str]:
    """Shuffle the tokens within each trigram."""
    threes = trigrams(tokens)
    for three in threes:
        rng.shuffle(three)
    return [word for three in threes for word in three]


def shuffle_trigrams(tokens: Sequence[str], rng: random.Random) -> list[str]:
    """Shuffle the trigrams, each as a whole."""
    threes = trigrams(tokens)
    rng.shuffle(threes)
    return [word for three in threes for word in three]


def options_of(captions: Sequence[str], tagger: Tagger, *, seed: int = 0) -> Options:
    """Make five options for each caption, the true one first; the seed, the caption and its index determine them."""
    tokenize = word_tokenizer()
    texts = []
    for i, (caption, tagged) in enumerate(zip(captions, tagger.tag(captions), strict=True)):
        tokens = tokenize(caption)
        shuffles: list[tuple[Callable[..., list[str]], Sequence]] = [
            (shuffle_nouns_and_adjectives, tagged),
            (shuffle_all_but_nouns_and_adjectives, tagged),
            (shuffle_within_trigrams, tokens),
            (shuffle_trigrams, tokens),
        ]
        wrong = [
            shuffle(words, random.Random(f"{seed} {i} {name} {caption}"))
            for name, (shuffle, words) in zip(SHUFFLES, shuffles, strict=True)
        ]
        texts.append([pre_caption(caption), *(pre_caption(" ".join(words)) for words in wrong)])
    return Options(texts, tagger.name, seed)


def wrong_options(options: Sequence[str]) -> list[str]:
    """Return the wrong options that differ from the true one in more than spaces, which NLTK puts before a comma."""
    true = options[0].replace(" ", "")
    return [option for option in options[1:] if option.replace(" ", "") != true]


def stored_options(path: Path, captions: Sequence[str], *, seed: int = 0) -> Options:
    """Return the options in a file, or make them and write the file.

    Args:
        path: The file.
        captions: The captions.
        seed: For new options; a file keeps the seed it was made with.

    Raises:
        UserError: If the file was made of other captions or is malformed.
    """
    source = hashlib.sha256(json.dumps(list(captions)).encode()).hexdigest()
    if path.exists():
        content = _read(path, len(captions))
        if content["source"] != source:
            raise UserError(f"{path} was made of other captions: remove it to have new ones drawn")
        return Options(content["options"], content["tagger"], content["seed"])
    options = options_of(captions, find_tagger(path.parent), seed=seed)
    stored = {
        "tagger": options.tagger,
        "seed": seed,
        "source": source,
        "shuffles": SHUFFLES,
        "options": options.texts,
    }
    try:
        write_whole(path, json.dumps(stored) + "\n")
    except OSError as error:
        say(f"the options are not stored: cannot write {path}: {error.strerror or error}")
    return options


def _read(path: Path, num: int) -> dict[str, Any]:
    """The content of a file with `num` captions, checked."""
    try:
        content = parse_json(path.read_bytes(), what="it")
        groups = content["options"] if {"tagger", "seed", "source", "options"} <= set(content) else []
        texts = [text for group in groups if len(group) == 5 for text in group]
        if len(groups) == num and len(texts) == 5 * num and all(isinstance(text, str) for text in texts):
            return content | {"options": [[clean(text) for text in group] for group in groups]}
    except (ValueError, TypeError, AttributeError):
        pass
    raise UserError(f"{path} is not a complete file of options: remove it to have it written anew")
