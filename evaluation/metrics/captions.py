"""Captions against several references: BLEU, ROUGE-L, CIDEr-D, METEOR, SPICE. Not for writing captions.

pycocoevalcap's scorers one by one (`pip install -e .[caption]`): its COCOEvalCap always makes SPICE, which downloads.
Without it BLEU and CIDEr-D are computed here, as it computes them. Texts are split by the Penn Treebank's tokenizer
where there is Java, else by a likeness of it. What cannot be had says why, and is never 0.
"""

import contextlib
import functools
import importlib.util
import io
import math
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from evaluation.metrics.cider import cider_d, document_frequency, ngrams
from teachercache.core.errors import UserError

NGRAMS = 4
METRICS = ("Bleu", "METEOR", "ROUGE_L", "CIDEr", "SPICE")
INSTALL = "skipped: pycocoevalcap is not installed; try `pip install -e .[caption]`"
JAVA = "skipped: METEOR and SPICE need java (apt-get install default-jre-headless)"
JARS = "skipped: SPICE needs {0}/stanford-corenlp-3.6.0.jar and {0}/stanford-corenlp-3.6.0-models.jar"
Scorer = Callable[[list[str], list[list[str]]], dict[str, float | str]]  # words with a space between


def score_captions(
    said: Sequence[str],
    references: Sequence[Sequence[str]],
    groups: dict[str, list[int]] | None = None,
    *,
    only: Sequence[str] = METRICS,
    java: bool = True,
) -> dict[str, Any]:
    """Bleu_1 to Bleu_4, METEOR, ROUGE_L, CIDEr and SPICE, clip-benchmark's keys, as they are (papers: times 100).

    `groups`: places of the captions that a name is about; its keys are `CIDEr:NAME`, with document frequencies of its
    own references, as NoCaps has it. `tokenizer` says how texts were split.
    """
    split, how = tokenize([[text] for text in said] + [list(texts) for texts in references], java=java)
    words, truth = [texts[0] for texts in split[: len(said)]], split[len(said) :]
    found: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        made = scorers(stack, only, java)
        for name, places in {"": list(range(len(said))), **(groups or {})}.items():
            part = ([words[i] for i in places], [truth[i] for i in places])
            scores = {key: value for score in made for key, value in score(*part).items()}
            found |= {f"{key}:{name}" if name else key: value for key, value in scores.items()}
    return found | {"tokenizer": how}


def scorers(stack: contextlib.ExitStack, only: Sequence[str], java: bool) -> list[Scorer]:
    """A function for each metric of `only`, or one that says why not; `stack` ends the Java that METEOR is."""
    known: dict[str, Callable[[], Scorer]] = {"Bleu": lambda: bleu, "CIDEr": lambda: cider}
    if importlib.util.find_spec("pycocoevalcap") is None:
        known |= {name: functools.partial(_missing, name, INSTALL) for name in ("METEOR", "ROUGE_L", "SPICE")}
    else:
        known = {
            "Bleu": lambda: _peer_bleu,
            "ROUGE_L": lambda: functools.partial(_peer, "rouge.rouge", "Rouge", "ROUGE_L"),
            "CIDEr": lambda: functools.partial(_peer, "cider.cider", "Cider", "CIDEr"),
            "METEOR": lambda: meteor(stack),
            "SPICE": spice,
        }
    if not java:
        known |= {name: functools.partial(_missing, name, "skipped: java=0") for name in ("METEOR", "SPICE")}
    return [known[name]() for name in METRICS if name in only]


# ----------------------------------------------------------------------------------------------------
# BLEU and CIDEr-D as pycocoevalcap has them


def bleu(said: list[str], references: list[list[str]]) -> dict[str, float | str]:
    """Corpus BLEU-1 to -4 (Papineni et al. 2002): clipped matches, the closest reference's length.

    With pycocoevalcap's tiny numbers, by which no factor is 0.
    """
    correct, guessed = [0] * NGRAMS, [0] * NGRAMS
    length = closest = 0
    for text, others in zip(said, references, strict=True):
        own, theirs = ngrams(text.split()), [ngrams(other.split()) for other in others]
        count = len(text.split())
        length += count
        closest += min((abs(n - count), n) for n in (len(other.split()) for other in others))[1]
        for gram, times in own.items():
            guessed[len(gram) - 1] += times
            correct[len(gram) - 1] += min(times, max(other[gram] for other in theirs))
    tiny, small = 1e-15, 1e-9
    penalty = math.exp(min(0.0, 1 - (closest + small) / (length + tiny)))
    product, scores = 1.0, {}
    for n in range(NGRAMS):
        product *= (correct[n] + tiny) / (guessed[n] + small)
        scores[f"Bleu_{n + 1}"] = penalty * product ** (1 / (n + 1))
    return scores


def cider(said: list[str], references: list[list[str]]) -> dict[str, float | str]:
    """CIDEr-D (Vedantam et al. 2015), ten times the mean over captions; frequencies from these references."""
    theirs = [[other.split() for other in others] for others in references]
    frequency = document_frequency(theirs)
    pairs = zip(said, theirs, strict=True)
    scores = [cider_d(text.split(), others, frequency, len(references)) for text, others in pairs]
    return {"CIDEr": sum(scores) / len(scores)}


# ----------------------------------------------------------------------------------------------------
# pycocoevalcap and its Java


def _missing(key: str, reason: str) -> Scorer:
    """What says why there is no score."""
    return lambda said, references: {key: reason}


def _peer(
    module: str, name: str, key: str, said: list[str], references: list[list[str]]
) -> dict[str, float | str]:
    """One of its scorers, a fresh one each time."""
    made = getattr(importlib.import_module(f"pycocoevalcap.{module}"), name)()
    return {key: float(made.compute_score(*_numbered(said, references))[0])}


def _peer_bleu(said: list[str], references: list[list[str]]) -> dict[str, float | str]:
    from pycocoevalcap.bleu.bleu import Bleu

    with contextlib.redirect_stdout(io.StringIO()):  # it prints its counts
        values = Bleu(NGRAMS).compute_score(*_numbered(said, references))[0]
    return {f"Bleu_{n}": float(value) for n, value in enumerate(values, start=1)}


def meteor(stack: contextlib.ExitStack) -> Scorer:
    """METEOR 1.5, by its own jar: one process, as it takes 10 s to start."""
    if not has_java():
        return _missing("METEOR", JAVA)
    from pycocoevalcap.meteor.meteor import Meteor

    made = Meteor()
    stack.callback(_end, made)

    def score(said: list[str], references: list[list[str]]) -> dict[str, float | str]:
        try:
            return {"METEOR": float(made.compute_score(*_numbered(said, references))[0])}
        except (OSError, ValueError) as error:  # its process ended
            return {"METEOR": f"skipped: METEOR's java failed: {error}"}
        finally:
            if made.lock.locked():  # after an error the next to want it would wait for ever
                made.lock.release()

    return score


def _end(made: Any) -> None:
    made.meteor_p.kill()
    for stream in (made.meteor_p.stdout, made.meteor_p.stderr):
        stream.close()


def spice() -> Scorer:
    """SPICE, where Stanford's CoreNLP 3.6.0 lies beside it: nothing is downloaded here."""
    if not has_java():
        return _missing("SPICE", JAVA)
    from pycocoevalcap.spice import spice as peer

    jars = Path(peer.__file__).parent / "lib"
    if not all((jars / f"stanford-corenlp-3.6.0{kind}.jar").exists() for kind in ("", "-models")):
        return _missing("SPICE", JARS.format(jars))

    def score(said: list[str], references: list[list[str]]) -> dict[str, float | str]:
        try:
            return _peer("spice.spice", "Spice", "SPICE", said, references)
        except (OSError, ValueError, subprocess.CalledProcessError) as error:
            return {"SPICE": f"skipped: SPICE's java failed: {error}"}

    return score


def has_java() -> bool:
    """Whether there is a Java."""
    return shutil.which("java") is not None


def _numbered(
    said: list[str], references: list[list[str]]
) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
    """References and captions by number, as its scorers take them."""
    return dict(enumerate(references)), {i: [text] for i, text in enumerate(said)}


# ----------------------------------------------------------------------------------------------------
# Words


def tokenize(groups: list[list[str]], *, java: bool) -> tuple[list[list[str]], str]:
    """Each text in lower case, without punctuation, a space between words; and what split them."""
    flat = [" ".join(text.split()) for texts in groups for text in texts]
    if importlib.util.find_spec("pycocoevalcap") is None or not java or not has_java():
        split, how = [plain_words(text) for text in flat], "plain"
    else:
        split, how = _treebank_words(flat), "ptb"
    words = iter(split)
    return [[" ".join(next(words)) for _ in texts] for texts in groups], how


def _treebank_words(texts: list[str]) -> list[list[str]]:
    """The Penn Treebank's, by the jar that pycocoevalcap's PTBTokenizer runs on a file in its own folder."""
    from pycocoevalcap.tokenizer import ptbtokenizer as peer

    command = [
        "java",
        "-cp",
        peer.STANFORD_CORENLP_3_4_1_JAR,
        "edu.stanford.nlp.process.PTBTokenizer",
        "-preserveLines",
        "-lowerCase",
        "-encoding",
        "utf-8",
    ]
    done = subprocess.run(
        command,
        cwd=Path(peer.__file__).parent,
        input="\n".join(texts) + "\n",
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    lines = done.stdout.split("\n")
    if done.returncode or len(lines) != len(texts) + 1:
        raise UserError(f"java cannot split the captions: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    return [[word for word in line.split() if word not in peer.PUNCTUATIONS] for line in lines[:-1]]


def plain_words(text: str) -> list[str]:
    """Words without the Treebank's rules: clitics come off (`don't` is `do n't`), hyphens and numbers stay whole."""
    text = re.sub(r"n't\b", " n't", text.lower())
    return re.findall(r"n't|'(?:s|re|ve|ll|d|m)\b|[^\W_]+(?:[-.,/][^\W_]+)*", text)
