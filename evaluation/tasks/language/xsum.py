"""XSUM: one-sentence summaries by fine-tuning (VLKD, table 6; hyperparameters of Lewis et al. 2020), measured by ROUGE.

`--data` is a folder in one of three forms: `train.source`, `train.target` and the same for test, with a text per line,
as BART's code reads it; XSum's own `bbc-summary-data/<id>.summary` with XSum-TRAINING-DEV-TEST-SPLIT-90-5-5.json; or
train.jsonl and test.jsonl with `document` and `summary`.
"""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from evaluation.data.files import file_json, file_text
from evaluation.probes.finetune_text import Options, Row, batches, encode_texts, fine_tune, load_text_model
from evaluation.tasks.task import Metrics
from teachercache.core.errors import UserError
from teachercache.core.progress import say, ticker
from teachercache.data.foreign import Foreign, caption_of
from teachercache.data.readers.questions import json_lines

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer

SPLIT_FILE = "XSum-TRAINING-DEV-TEST-SPLIT-90-5-5.json"
BART = Options(epochs=5, batch=64, lr=3e-5, weight_decay=0.01, clip=0.1, label_smoothing=0.1, longest=1024)
BEAMS, SHORTEST, LONGEST, NO_REPEAT = 6, 10, 60, 3
ROUGE = {"rouge1": "ROUGE_1", "rouge2": "ROUGE_2", "rougeL": "ROUGE_L"}  # rouge-score's key -> ours


def evaluate(folder: str, data: str, options: Options = BART) -> Metrics:
    """Fine-tune on the training split, and compute F-measures of ROUGE-1, -2 and -L with stems on the test split.

    Args:
        folder: A transformers folder.
        data: The data's folder.
        options: The hyperparameters.

    Raises:
        UserError: If the data, the model or rouge-score is missing.
    """
    rouge = _rouge()
    train, test = read_split(data, "train"), read_split(data, "test")
    say(f"fine-tuning {folder} on {len(train):,} documents, {options.epochs} epochs")
    texts = summaries(folder, train, test, options)
    scores = [rouge.score(truth, text) for (_, truth), text in zip(test, texts, strict=True)]
    metrics: Metrics = {
        name: sum(score[key].fmeasure for score in scores) / len(scores) for key, name in ROUGE.items()
    }
    metrics |= {"num_train": len(train), "num_test": len(test), "num_different": len(set(texts))}
    return metrics | dataclasses.asdict(options) | {"beams": BEAMS}


def _rouge() -> "RougeScorer":
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise UserError("XSUM needs rouge-score: try `pip install -e .[language]`") from error
    return RougeScorer(list(ROUGE), use_stemmer=True)


# ----------------------------------------------------------------------------------------------------
# Files


def read_split(data: str, split: str) -> list[Row]:
    """Read the documents and summaries of train or test; pairs with an empty text are left out.

    Raises:
        UserError: If the folder has none of the three forms, or the split is empty.
    """
    root = Path(data)
    pairs: Iterator[tuple[str, str]] | None = None
    if (root / f"{split}.source").exists():
        pairs = _lines(root, split)
    elif (root / SPLIT_FILE).exists():
        pairs = _bbc(root, split)
    elif (root / f"{split}.jsonl").exists():
        lines = json_lines(root / f"{split}.jsonl")
        pairs = ((_text(line, "document"), _text(line, "summary")) for line in lines)
    if pairs is None:
        raise UserError(
            f"no XSUM at {data}: {split}.source and {split}.target, {split}.jsonl, or {SPLIT_FILE} with "
            "bbc-summary-data/ are expected"
        )
    rows: list[Row] = [
        ((document.strip(),), summary.strip())
        for document, summary in pairs
        if document.strip() and summary.strip()
    ]
    if not rows:
        raise UserError(f"the split {split} of {data} is empty")
    return rows


def _text(line: dict[str, Any], name: str) -> str:
    """Return a text of a line, "" for null and for what is no text: the pair is left out."""
    try:
        return caption_of(line.get(name)) or ""
    except Foreign:
        return ""


def _lines(root: Path, split: str) -> Iterator[tuple[str, str]]:
    documents, targets = (
        file_text(root / f"{split}.{kind}").removesuffix("\n").split("\n") for kind in ("source", "target")
    )
    if len(documents) != len(targets):
        raise UserError(
            f"{root}/{split}.source has {len(documents)} lines, {split}.target {len(targets)}: they belong "
            "together line by line"
        )
    yield from zip(documents, targets, strict=True)


def _bbc(root: Path, split: str) -> Iterator[tuple[str, str]]:
    """Pairs from files of marked sections; files that the split names but do not exist are left out."""
    numbers = file_json(root / SPLIT_FILE)
    numbers = numbers.get(split) if isinstance(numbers, dict) else None
    if not isinstance(numbers, list) or not all(str(number).isalnum() for number in numbers):
        raise UserError(
            f"{root / SPLIT_FILE} has no list of numbers under {split!r}: XSUM's own file is expected"
        )
    for number in numbers:
        path = root / "bbc-summary-data" / f"{number}.summary"
        if path.exists():
            sections = read_sections(file_text(path))
            yield sections.get("RESTBODY", ""), sections.get("FIRST-SENTENCE", "")


def read_sections(text: str) -> dict[str, str]:
    """Parse the sections `[SN]NAME[SN]` of a .summary file: name -> text, with lines joined by spaces."""
    parts = re.split(r"\[SN\]([A-Z-]+)\[SN\]", text)
    return {name: " ".join(body.split()) for name, body in zip(parts[1::2], parts[2::2], strict=True)}


# ----------------------------------------------------------------------------------------------------
# The model


def summaries(folder: str, train: Sequence[Row], test: Sequence[Row], options: Options) -> list[str]:
    """Fine-tune a model, and summarize each test document by beam search with BART's settings for XSUM."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)  # dropout
        model, tokenizer = load_text_model("Seq2SeqLM", folder)
        longest = min(options.longest, model.config.max_position_embeddings)

        def collate(rows: Sequence[Row]) -> dict[str, torch.Tensor]:
            labels = encode_texts(
                tokenizer, [((str(summary),), None) for _, summary in rows], min(longest, 128)
            )
            ids = labels["input_ids"].masked_fill(labels["attention_mask"] == 0, -100)
            return encode_texts(tokenizer, rows, longest) | {"labels": ids}

        fine_tune(model, train, collate, options, "XSUM")
    writer: Any = model  # transformers declares `generate` on the concrete classes alone
    texts, device = [], next(model.parameters()).device
    with torch.inference_mode(), ticker(len(test), "summaries", folder) as tick:
        for batch in batches(test, 16):
            inputs = {
                name: value.to(device) for name, value in encode_texts(tokenizer, batch, longest).items()
            }
            ids = writer.generate(
                **inputs,
                num_beams=BEAMS,
                min_new_tokens=SHORTEST,
                max_new_tokens=LONGEST,
                no_repeat_ngram_size=NO_REPEAT,
                early_stopping=True,
                length_penalty=1.0,
                do_sample=False,
            )
            texts += [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]
            tick.step(len(batch))
    return texts
