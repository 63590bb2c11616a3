"""Tag the nouns and adjectives of captions, for ARO's shuffles.

The published sets were tagged by spaCy's en_core_web_sm, which is not on PyPI. A file `pos_tags.json` beside the data is
used first: it maps each caption to [[token, "noun" | "adjective" | "other"], ...]. Otherwise spaCy is used if it is
installed, otherwise HanTa (`pip install 'teachercache[eval]'`), whose package contains its model.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from evaluation.data.files import file_json
from teachercache.core.errors import UserError
from teachercache.data.foreign import clean

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
    "ARO's order sets need a tagger of nouns and adjectives: pip install 'teachercache[eval]', or put pos_tags.json "
    "beside the data"
)
Tagged = list[tuple[str, str]]  # each token with one of KINDS


@dataclasses.dataclass(frozen=True)
class Tagger:
    """A tagger of captions.

    Attributes:
        name: Stored with the options that were made with it.
        tag: Tags a list of captions.
    """

    name: str
    tag: Callable[[Sequence[str]], list[Tagged]]


def find_tagger(folder: Path) -> Tagger:
    """Return the tags beside the data, otherwise spaCy, otherwise HanTa.

    Args:
        folder: The data's folder.

    Raises:
        UserError: If there is none; the error names the package to install.
    """
    if (folder / "pos_tags.json").exists():
        return of_file(folder / "pos_tags.json")
    for load in (of_spacy, of_hanta):
        tagger = load()
        if tagger is not None:
            return tagger
    raise UserError(MISSING)


def of_file(path: Path) -> Tagger:
    """Return a tagger that reads the tags of captions from a JSON file.

    Raises:
        UserError: If the file is malformed; its `tag` raises it for a caption that is missing.
    """
    tags_of = file_json(path)
    if not isinstance(tags_of, dict):
        raise UserError(f"{path} is not an object of captions")

    def tags(text: str) -> Tagged:
        if text not in tags_of:
            raise UserError(f"{path} has no tags of the caption {text!r}")
        pairs = tags_of[text]
        if not isinstance(pairs, list) or not all(
            isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) and pair[1] in KINDS
            for pair in pairs
        ):
            raise UserError(f"{path}: the tags of {text!r} are not pairs of a token and {', '.join(KINDS)}")
        return [(clean(token), kind) for token, kind in pairs]

    return Tagger(path.name, lambda texts: [tags(text) for text in texts])


def of_spacy() -> Tagger | None:
    """Return ARO's own tagger, or None if spaCy or its model is not installed."""
    try:
        import spacy

        nlp = spacy.load(SPACY_MODEL)
    except (ImportError, OSError):
        return None

    def tag(texts: Sequence[str]) -> list[Tagged]:
        return [[(token.text, PENN.get(token.tag_, "other")) for token in doc] for doc in nlp.pipe(texts)]

    return Tagger(f"spacy {SPACY_MODEL} {nlp.meta.get('version', '')}".strip(), tag)


def of_hanta() -> Tagger | None:
    """Return HanTa on NLTK's tokens, with the tags of the British National Corpus; None if it is not installed."""
    try:
        from importlib.metadata import version

        from HanTa import HanoverTagger
    except ImportError:
        return None
    tagger: _HanTa = HanoverTagger.HanoverTagger("morphmodel_en.pgz")
    tokenize = word_tokenizer()

    def tag(texts: Sequence[str]) -> list[Tagged]:
        tagged = []
        for text in texts:
            tokens = tokenize(text)
            kinds = [CLAWS.get(tag, "other") for _, _, tag in tagger.tag_sent(tokens)] if tokens else []
            tagged.append(list(zip(tokens, kinds, strict=True)))
        return tagged

    return Tagger(f"HanTa {version('HanTa')}", tag)


class _HanTa(Protocol):
    def tag_sent(self, tokens: list[str]) -> list[tuple[str, str, str]]: ...


def word_tokenizer() -> Callable[[str], list[str]]:
    """Return NLTK's Penn Treebank tokenizer of words, without its splitting into sentences, which needs a download.

    Raises:
        UserError: If NLTK is not installed.
    """
    try:
        from nltk.tokenize import NLTKWordTokenizer
    except ImportError as error:
        raise UserError("ARO's order sets need NLTK's tokenizer: pip install 'teachercache[eval]'") from error
    return NLTKWordTokenizer().tokenize
