"""Which words of a caption are nouns and which adjectives, for ARO's shuffles. Not for grammar beyond that.

The published sets come from spaCy's en_core_web_sm, which PyPI does not have. Where it is installed it is used; else
HanTa (`pip install 'teachercache[aro]'`), whose model is inside the package; before both, a file `pos_tags.json` beside
the data that says of each caption [[token, "noun" | "adjective" | "other"], ...].
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from teachercache.core.errors import UserError

KINDS = ("noun", "adjective", "other")
SPACY_MODEL = "en_core_web_sm"
PENN = {
    "NN": "noun",
    "NNS": "noun",
    "NNP": "noun",
    "NNPS": "noun",
    "JJ": "adjective",
    "JJR": "adjective",
    "JJS": "adjective",
}
CLAWS = {
    "NN0": "noun",
    "NN1": "noun",
    "NN2": "noun",
    "NP0": "noun",
    "AJ0": "adjective",
    "AJC": "adjective",
    "AJS": "adjective",
}
MISSING = (
    "ARO's order sets need a tagger of nouns and adjectives: pip install 'teachercache[aro]', or put pos_tags.json "
    "beside the data"
)
Tagged = list[tuple[str, str]]  # tokens, each with one of KINDS


@dataclasses.dataclass(frozen=True)
class Tagger:
    """A tagger, and the name that is kept with what was made by it."""

    name: str
    tag: Callable[[Sequence[str]], list[Tagged]]


def find_tagger(folder: Path) -> Tagger:
    """The tags beside the data, else spaCy, else HanTa; UserError says what to install."""
    if (folder / "pos_tags.json").exists():
        return of_file(folder / "pos_tags.json")
    for made in (of_spacy, of_hanta):
        tagger = made()
        if tagger is not None:
            return tagger
    raise UserError(MISSING)


def of_file(path: Path) -> Tagger:
    """Tags computed elsewhere."""
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(known, dict):
        raise UserError(f"{path} is not an object of captions")

    def one(text: str) -> Tagged:
        if text not in known:
            raise UserError(f"{path} has no tags of the caption {text!r}")
        pairs = known[text]
        if not isinstance(pairs, list) or not all(
            isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) and pair[1] in KINDS
            for pair in pairs
        ):
            raise UserError(f"{path}: the tags of {text!r} are not pairs of a token and {', '.join(KINDS)}")
        return [(token, kind) for token, kind in pairs]

    return Tagger(path.name, lambda texts: [one(text) for text in texts])


def of_spacy() -> Tagger | None:
    """ARO's own; None where spaCy or its model is not installed."""
    try:
        import spacy

        nlp = spacy.load(SPACY_MODEL)
    except (ImportError, OSError):
        return None

    def tag(texts: Sequence[str]) -> list[Tagged]:
        return [[(token.text, PENN.get(token.tag_, "other")) for token in doc] for doc in nlp.pipe(texts)]

    return Tagger(f"spacy {SPACY_MODEL} {nlp.meta.get('version', '')}".strip(), tag)


def of_hanta() -> Tagger | None:
    """HanTa on NLTK's tokens; its tags are those of the British National Corpus."""
    try:
        from importlib.metadata import version

        from HanTa import HanoverTagger
    except ImportError:
        return None
    tagger: Any = HanoverTagger.HanoverTagger("morphmodel_en.pgz")
    tokenize = word_tokenizer()

    def tag(texts: Sequence[str]) -> list[Tagged]:
        found = []
        for text in texts:
            tokens = tokenize(text)
            kinds = [CLAWS.get(tag, "other") for _, _, tag in tagger.tag_sent(tokens)] if tokens else []
            found.append(list(zip(tokens, kinds, strict=True)))
        return found

    return Tagger(f"HanTa {version('HanTa')}", tag)


def word_tokenizer() -> Callable[[str], list[str]]:
    """NLTK's words (the Penn Treebank's), without its splitting into sentences, which would need a download."""
    try:
        from nltk.tokenize import NLTKWordTokenizer
    except ImportError as error:
        raise UserError("ARO's order sets need NLTK's tokenizer: pip install 'teachercache[aro]'") from error
    return NLTKWordTokenizer().tokenize
