"""Score captions against several references: BLEU, ROUGE-L, CIDEr-D, METEOR and SPICE.

Uses pycocoevalcap's scorers one by one (`pip install -e .[caption]`), because its COCOEvalCap always runs SPICE, which
downloads files. Without pycocoevalcap BLEU and CIDEr-D are computed here with the same definitions. The Penn Treebank
tokenizer splits texts if Java is installed, otherwise an approximation of it. A metric that cannot be computed is a text
with the reason, never 0.
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
from typing import TYPE_CHECKING

from evaluation.metrics.cider import cider_d, document_frequency, ngrams
from teachercache.core.errors import UserError

if TYPE_CHECKING:
    from pycocoevalcap.meteor.meteor import Meteor

NGRAMS = 4
METRICS = ("Bleu", "METEOR", "ROUGE_L", "CIDEr", "SPICE")
INSTALL = "skipped: pycocoevalcap is not installed; try `pip install -e .[caption]`"
JAVA = "skipped: METEOR and SPICE need java (apt-get install default-jre-headless)"
JARS = "skipped: SPICE needs {0}/stanford-corenlp-3.6.0.jar and {0}/stanford-corenlp-3.6.0-models.jar"
Scores = dict[str, float | str]
# (captions, references of each caption) -> metrics; texts are tokens joined by spaces
Scorer = Callable[[list[str], list[list[str]]], Scores]


def score_captions(
    captions: Sequence[str],
    references: Sequence[Sequence[str]],
    groups: dict[str, list[int]] | None = None,
    *,
    only: Sequence[str] = METRICS,
    java: bool = True,
) -> Scores:
    """Compute Bleu_1 to Bleu_4, METEOR, ROUGE_L, CIDEr and SPICE under clip-benchmark's keys (papers: times 100).

    Args:
        captions: The captions.
        references: The reference captions of each caption.
        groups: For each name the indices of some captions, which are also scored alone under keys such as `CIDEr:NAME`.
            Their document frequencies are those of their own references, as in NoCaps.
        only: Metrics to compute, out of METRICS.
        java: Whether Java may be used.

    Returns:
        The metrics, and under `tokenizer` how texts were split: "ptb" or "plain".
    """
    texts = [[text] for text in captions] + [list(group) for group in references]
    tokens, tokenizer = tokenize(texts, java=java)
    candidates, truth = [group[0] for group in tokens[: len(captions)]], tokens[len(captions) :]
    metrics: Scores = {}
    with contextlib.ExitStack() as stack:
        functions = scorers(stack, only, java)
        for name, rows in {"": list(range(len(captions))), **(groups or {})}.items():
            of_group = ([candidates[i] for i in rows], [truth[i] for i in rows])
            scores = {key: value for score in functions for key, value in score(*of_group).items()}
            metrics |= {f"{key}:{name}" if name else key: value for key, value in scores.items()}
    return metrics | {"tokenizer": tokenizer}


def scorers(stack: contextlib.ExitStack, only: Sequence[str], java: bool) -> list[Scorer]:
    """Return a scorer for each metric of `only`.

    Args:
        stack: Ends METEOR's Java process when it is closed.
        only: Metrics out of METRICS.
        java: Whether Java may be used.

    Returns:
        Scorers; those that cannot run return the reason instead of a number.
    """
    loaders: dict[str, Callable[[], Scorer]] = {"Bleu": lambda: bleu, "CIDEr": lambda: cider}
    if importlib.util.find_spec("pycocoevalcap") is None:
        loaders |= {
            name: functools.partial(_missing, name, INSTALL) for name in ("METEOR", "ROUGE_L", "SPICE")
        }
    else:
        loaders = {
            "Bleu": lambda: _peer_bleu,
            "ROUGE_L": lambda: functools.partial(_peer, "rouge.rouge", "Rouge", "ROUGE_L"),
            "CIDEr": lambda: functools.partial(_peer, "cider.cider", "Cider", "CIDEr"),
            "METEOR": lambda: meteor(stack),
            "SPICE": spice,
        }
    if not java:
        loaders |= {
            name: functools.partial(_missing, name, "skipped: java=0") for name in ("METEOR", "SPICE")
        }
    return [loaders[name]() for name in METRICS if name in only]


# ----------------------------------------------------------------------------------------------------
# BLEU and CIDEr-D with pycocoevalcap's definitions


def bleu(captions: list[str], references: list[list[str]]) -> Scores:
    """Compute corpus BLEU-1 to -4 (Papineni et al. 2002) with clipped matches and the closest reference's length.

    pycocoevalcap's small constants keep every factor above 0.
    """
    correct, guessed = [0] * NGRAMS, [0] * NGRAMS
    length = closest = 0
    for text, others in zip(captions, references, strict=True):
        candidate, truth = ngrams(text.split()), [ngrams(other.split()) for other in others]
        count = len(text.split())
        length += count
        closest += min((abs(n - count), n) for n in (len(other.split()) for other in others))[1]
        for gram, times in candidate.items():
            guessed[len(gram) - 1] += times
            correct[len(gram) - 1] += min(times, max(other[gram] for other in truth))
    tiny, small = 1e-15, 1e-9
    penalty = math.exp(min(0.0, 1 - (closest + small) / (length + tiny)))
    product, scores = 1.0, {}
    for n in range(NGRAMS):
        product *= (correct[n] + tiny) / (guessed[n] + small)
        scores[f"Bleu_{n + 1}"] = penalty * product ** (1 / (n + 1))
    return scores


def cider(captions: list[str], references: list[list[str]]) -> Scores:
    """Compute the mean CIDEr-D (Vedantam et al. 2015), with document frequencies of these references."""
    truth = [[other.split() for other in others] for others in references]
    frequency = document_frequency(truth)
    pairs = zip(captions, truth, strict=True)
    scores = [cider_d(text.split(), others, frequency, len(references)) for text, others in pairs]
    return {"CIDEr": sum(scores) / len(scores)}


# ----------------------------------------------------------------------------------------------------
# pycocoevalcap and its Java


def _missing(key: str, reason: str) -> Scorer:
    return lambda captions, references: {key: reason}


def _peer(module: str, name: str, key: str, captions: list[str], references: list[list[str]]) -> Scores:
    """Score with a new instance of one of pycocoevalcap's scorers."""
    scorer = getattr(importlib.import_module(f"pycocoevalcap.{module}"), name)()
    return {key: float(scorer.compute_score(*_numbered(captions, references))[0])}


def _peer_bleu(captions: list[str], references: list[list[str]]) -> Scores:
    from pycocoevalcap.bleu.bleu import Bleu

    with contextlib.redirect_stdout(io.StringIO()):  # it prints its counts
        values = Bleu(NGRAMS).compute_score(*_numbered(captions, references))[0]
    return {f"Bleu_{n}": float(value) for n, value in enumerate(values, start=1)}


def meteor(stack: contextlib.ExitStack) -> Scorer:
    """Return METEOR 1.5, which runs in one Java process because it takes 10 s to start."""
    if not has_java():
        return _missing("METEOR", JAVA)
    from pycocoevalcap.meteor.meteor import Meteor

    scorer = Meteor()
    stack.callback(_end, scorer)

    def score(captions: list[str], references: list[list[str]]) -> Scores:
        try:
            return {"METEOR": float(scorer.compute_score(*_numbered(captions, references))[0])}
        except (OSError, ValueError) as error:  # its process ended
            return {"METEOR": f"skipped: METEOR's java failed: {error}"}
        finally:
            if scorer.lock.locked():  # after an error the next call would block forever
                scorer.lock.release()

    return score


def _end(scorer: "Meteor") -> None:
    """End METEOR's process."""
    scorer.meteor_p.kill()
    for stream in (scorer.meteor_p.stdout, scorer.meteor_p.stderr):
        stream.close()


def spice() -> Scorer:
    """Return SPICE if the files of Stanford's CoreNLP 3.6.0 are there; nothing is downloaded."""
    if not has_java():
        return _missing("SPICE", JAVA)
    from pycocoevalcap.spice import spice as peer

    jars = Path(peer.__file__).parent / "lib"
    if not all((jars / f"stanford-corenlp-3.6.0{kind}.jar").exists() for kind in ("", "-models")):
        return _missing("SPICE", JARS.format(jars))

    def score(captions: list[str], references: list[list[str]]) -> Scores:
        try:
            return _peer("spice.spice", "Spice", "SPICE", captions, references)
        except (OSError, ValueError, subprocess.CalledProcessError) as error:
            return {"SPICE": f"skipped: SPICE's java failed: {error}"}

    return score


def has_java() -> bool:
    """Return whether Java is installed."""
    return shutil.which("java") is not None


def _numbered(
    captions: list[str], references: list[list[str]]
) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
    """References and captions by number, the arguments of pycocoevalcap's scorers."""
    return dict(enumerate(references)), {i: [text] for i, text in enumerate(captions)}


# ----------------------------------------------------------------------------------------------------
# Words


def tokenize(groups: list[list[str]], *, java: bool) -> tuple[list[list[str]], str]:
    """Split texts into lower-case tokens without punctuation.

    Args:
        groups: Groups of texts.
        java: Whether Java may be used.

    Returns:
        The groups, with each text's tokens joined by spaces; and the tokenizer, "ptb" or "plain".

    Raises:
        UserError: If Java fails.
    """
    flat = [" ".join(text.split()) for texts in groups for text in texts]
    if importlib.util.find_spec("pycocoevalcap") is None or not java or not has_java():
        tokens, tokenizer = [plain_words(text) for text in flat], "plain"
    else:
        tokens, tokenizer = _treebank_words(flat), "ptb"
    remaining = iter(tokens)
    return [[" ".join(next(remaining)) for _ in texts] for texts in groups], tokenizer


def _treebank_words(texts: list[str]) -> list[list[str]]:
    """Tokens of the Penn Treebank's tokenizer, by the jar that pycocoevalcap's PTBTokenizer runs."""
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
    """Approximate the Treebank's tokens: clitics are split off (`do n't`), hyphenated words and numbers stay whole."""
    text = re.sub(r"n't\b", " n't", text.lower())
    return re.findall(r"n't|'(?:s|re|ve|ll|d|m)\b|[^\W_]+(?:[-.,/][^\W_]+)*", text)
