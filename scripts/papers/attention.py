"""Measure the attention of single-stream students: modality importance per layer and head, and weights of words.

    python -m scripts.papers.attention runs/baseline runs/clip_td --data data/scenes/vcr1/val.jsonl --out attention
    python -m scripts.papers.attention runs/clip_td --data ... --tokens caches/vcr1/clip-lite.zarr --example val-12

Writes modality.json, modality.png (a line of heatmaps per run, in the order of the arguments: before, after),
modality_per_token.png, and text.png. The last one shows the right answer of one row, with the attention of the last layer
from [CLS] to its words (mean over heads) for each run, and the teacher's word scores (Eq. 5) if --tokens is passed. The
numbers include all choices of a row. Two-tower students have no cross-modal attention and are rejected.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from evaluation.data.splits import rows_to_measure
from evaluation.studies.modality_importance import (
    as_numbers,
    change,
    draw_importance,
    draw_token_scores,
    importance,
)
from student.inference.answerer import RowsOfRun, TaskModel, is_task_run, load_task_model
from student.inputs.questions import read_question
from student.models.single_stream.model import SingleStream
from student.models.single_stream.tokenizer import SPECIAL, encode_pairs, load_tokenizer
from teachercache.cache import store
from teachercache.core.device import pick_device
from teachercache.core.errors import UserError
from teachercache.core.paths import write_whole
from teachercache.data.manifest import Manifest
from teachercache.data.read import read_manifest


class AttentionReader:
    """A student of a run with hooks that store its attention weights."""

    def __init__(self, run: Path, data: str, device: str) -> None:
        if not (run / "run.json").exists() or not is_task_run(run):
            raise UserError(f"{run} is not a run of a single-stream student: pass runs of clip_td")
        self.record = json.loads((run / "run.json").read_text())
        self.cache = self.record["run"]["cache"] if self.record["run"]["data"] == data else ""
        self.model: TaskModel = load_task_model(run, device=device)
        if "region_box" not in self.model.student.row_inputs.fields:
            raise UserError(f"{run} does not read words and regions: pass runs of uniter, vl-bert or villa")
        self.tokenizer, self.device = load_tokenizer(run), device
        bert = cast(SingleStream, self.model.student).bert
        bert.config._attn_implementation = "eager"  # only "eager" returns attention weights
        self.weights: list[torch.Tensor] = []
        for layer in bert.encoder.layer:
            layer.attention.self.register_forward_hook(
                lambda _, inputs, output: self.weights.append(output[1][:, :, :1])
            )

    def batches(
        self, manifest: Manifest, rows: np.ndarray
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yield the attention from [CLS] and the masks of picture and text elements.

        Args:
            manifest: rows of the data.
            rows: indices of the rows.

        Yields:
            Attention [layers, texts, heads, 1, length], picture mask [texts, length], text mask [texts, length].
        """
        student, max_text = self.model.student, self.record["questions"]["max_text"]
        special = torch.tensor([self.tokenizer.token_to_id(name) for name in SPECIAL], device=self.device)
        reader = RowsOfRun(self.model.task, student, self.tokenizer, max_text, self.cache)
        for batch in reader.read(manifest, rows):
            batch = {name: value.to(self.device) for name, value in batch.items()}
            with torch.inference_mode():
                student(batch)
            attention = torch.stack(self.weights).float().cpu().numpy()
            self.weights.clear()
            is_word = batch["attention_mask"] & ~torch.isin(batch["text"], special)
            words = is_word.flatten(0, 1).cpu().numpy()
            box = batch["region_box"].repeat_interleave(batch["text"].shape[1], 0)
            regions = (box[..., 2] > box[..., 0]).cpu().numpy()
            text = np.concatenate([words, np.zeros_like(regions)], 1)
            picture = np.concatenate([np.zeros_like(words), regions], 1)
            yield attention, picture, text

    def example(self, manifest: Manifest, row: int) -> tuple[str, int, np.ndarray, np.ndarray]:
        """Return the right text of a row, its index in the row, the spans of its sub-words, and their attention."""
        question = read_question(self.model.task, manifest.row(row))
        right = int(max(question.target, key=question.target.__getitem__)) if len(question.parts) > 1 else 0
        max_text = self.record["questions"]["max_text"]
        spans = encode_pairs(self.tokenizer, question.parts, max_text).spans[right]
        attention, _, _ = next(self.batches(manifest, np.array([row])))
        weights = attention[-1, right, :, 0, : len(spans)].mean(0)
        text = " ".join(segment for segment in question.parts[right] if segment)
        return text, question.places[right], spans, weights * (spans[:, 1] > spans[:, 0])


def word_scores(path: Path, key: str, text: int) -> tuple[np.ndarray, np.ndarray]:
    """Return spans and scores of the words of a text, from a cache with --outputs tokens.

    Args:
        path: cache.
        key: key of the row.
        text: index of the text in the row.
    """
    cache = store.open_complete(path)
    row = int(store.join(cache, [key])[0])
    if row < 0:
        raise UserError(f"'{key}' is not in {path}: pass a cache of this data")
    return store.read_field(cache, "word_span")[row, text], store.read_field(cache, "word_score")[row, text]


def show(
    runs: list[Path], data: str, out: Path, *, rows: int, example: str, tokens: Path | None
) -> dict[str, Any]:
    """Measure runs, write the numbers and pictures, and return the numbers.

    Args:
        runs: folders of runs, the run before distillation first.
        data: data of the questions.
        out: folder to write.
        rows: maximum number of rows in the mean.
        example: key of the row whose text is drawn; the first row if empty.
        tokens: cache with the teacher's word scores, or None.
    """
    manifest, device = read_manifest(data), pick_device()
    candidates = rows_to_measure(manifest)
    chosen = np.sort(np.random.default_rng(0).permutation(candidates)[:rows])
    keys = manifest.column("key")
    if example and example not in keys:
        raise UserError(f"no row '{example}' in {data}: pass a key of `tc manifest {data}`")
    row = keys.index(example) if example else int(chosen[0])
    importances, drawn, text, index = {}, {}, "", 0
    names = [run.name for run in runs]
    for run in runs:
        reader = AttentionReader(run, data, device)
        name = run.name if names.count(run.name) == 1 else str(run)  # runs/a/best and runs/b/best
        importances[name] = importance(reader.batches(manifest, chosen))
        text, index, spans, weights = reader.example(manifest, row)
        drawn[f"{name}: attention from [CLS], last layer"] = (spans, weights)
    if tokens is not None:
        drawn["teacher's word scores S (Eq. 5)"] = word_scores(tokens, keys[row], index)
    numbers: dict[str, Any] = {name: as_numbers(values) for name, values in importances.items()}
    if len(runs) == 2:
        numbers["change"] = change(*importances.values())
    write_whole(out / "modality.json", json.dumps(numbers, indent=1) + "\n")
    draw_importance(importances, out / "modality.png")
    draw_importance(importances, out / "modality_per_token.png", per_token=True)
    draw_token_scores(text, drawn, out / "text.png", title=keys[row])
    return numbers


def main() -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "runs", type=Path, nargs="+", help="runs of clip_td; the run before distillation first"
    )
    parser.add_argument("--data", required=True, help="data of the questions, with caches as in training")
    parser.add_argument("--out", type=Path, default=Path("attention"), help="folder for numbers and pictures")
    parser.add_argument(
        "--rows", type=int, default=256, help="number of rows in the mean, sampled from the val split"
    )
    parser.add_argument("--example", default="", help="key of the row whose text is drawn")
    parser.add_argument("--tokens", type=Path, help="cache of a CLIP teacher with --outputs tokens")
    options = parser.parse_args()
    try:
        numbers = show(
            options.runs,
            options.data,
            options.out,
            rows=options.rows,
            example=options.example,
            tokens=options.tokens,
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, values in numbers.items():
        shown = {key: round(value, 4) for key, value in values.items() if isinstance(value, float)}
        print(name, *(f"{key} {value}" for key, value in shown.items()), sep="  ")
    print(f"{options.out}: modality.json, modality.png, modality_per_token.png, text.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
