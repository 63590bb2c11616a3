"""Where single-stream students look: modality importance per layer and head, and one text with what weighs in it.

    python -m scripts.papers.attention runs/baseline runs/clip_td --data data/scenes/vcr1/val.jsonl --out attention
    python -m scripts.papers.attention runs/clip_td --data ... --tokens caches/vcr1/clip-lite.zarr --example val-12

Writes modality.json, modality.png (a line of heatmaps for each run, in the order given: before, after),
modality_per_token.png, and text.png: the right answer of one row, with the last layer's attention from [CLS] to its
words, mean over heads, for each run, and the teacher's word scores (Eq. 5) where --tokens names a cache of them. All
choices of a row count in the numbers. Not for two-tower students, whose towers never look at each other.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
from student.inference.answerer import TaskModel, batches_of, is_task_run, load_task_model
from student.inputs.questions import read_question
from student.models.single_stream.tokenizer import SPECIAL, encode_pairs, load_tokenizer
from teachercache.cache import store
from teachercache.core.device import pick_device
from teachercache.core.errors import UserError
from teachercache.core.paths import write_whole
from teachercache.data.manifest import Manifest
from teachercache.data.read import read_manifest


class Looks:
    """A run's student with its attention in the open."""

    def __init__(self, run: Path, data: str, device: str):
        if not (run / "run.json").exists() or not is_task_run(run):
            raise UserError(f"{run} is no run of a single-stream student: pass runs of clip_td")
        self.made = json.loads((run / "run.json").read_text())
        self.cache = self.made["run"]["cache"] if self.made["run"]["data"] == data else ""
        self.model: TaskModel = load_task_model(run, device=device)
        if not hasattr(self.model.student, "regions"):
            raise UserError(
                f"{run} has no words and regions in one stream: pass runs of uniter, vl-bert or villa"
            )
        self.tokenizer, self.device = load_tokenizer(run), device
        self.model.student.bert.config._attn_implementation = "eager"  # the others never make the weights
        self.kept: list[torch.Tensor] = []
        for layer in self.model.student.bert.encoder.layer:
            layer.attention.self.register_forward_hook(
                lambda _, inputs, output: self.kept.append(output[1][:, :, :1])
            )

    def parts(
        self, manifest: Manifest, rows: np.ndarray
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Attention from [CLS] [layers, texts, heads, 1, length], and which elements are picture and which text."""
        student, most = self.model.student, self.made["student"]["max_text"]
        special = torch.tensor([self.tokenizer.token_to_id(name) for name in SPECIAL], device=self.device)
        for batch in batches_of(self.model.task, student, self.tokenizer, manifest, rows, most, self.cache):
            batch = {name: value.to(self.device) for name, value in batch.items()}
            with torch.inference_mode():
                student(batch)
            attention = torch.stack(self.kept).float().cpu().numpy()
            self.kept.clear()
            words = batch["there"] & ~torch.isin(batch["text"], special)
            words = words.flatten(0, 1).cpu().numpy()
            box = batch["region_box"].repeat_interleave(batch["text"].shape[1], 0)
            regions = (box[..., 2] > box[..., 0]).cpu().numpy()
            text = np.concatenate([words, np.zeros_like(regions)], 1)
            picture = np.concatenate([np.zeros_like(words), regions], 1)
            yield attention, picture, text

    def example(self, manifest: Manifest, row: int) -> tuple[str, int, np.ndarray, np.ndarray]:
        """The right input of a row, its place among the row's texts, its sub-words' spans, and attention to them."""
        question = read_question(self.model.task, manifest.row(row))
        chosen = int(max(question.target, key=question.target.__getitem__)) if len(question.parts) > 1 else 0
        spans = encode_pairs(self.tokenizer, question.parts, self.made["student"]["max_text"]).spans[chosen]
        attention, _, _ = next(self.parts(manifest, np.array([row])))
        weights = attention[-1, chosen, :, 0, : len(spans)].mean(0)
        text = " ".join(part for part in question.parts[chosen] if part)
        return text, question.places[chosen], spans, weights * (spans[:, 1] > spans[:, 0])


def word_scores(path: Path, key: str, place: int) -> tuple[np.ndarray, np.ndarray]:
    """Spans and scores of the words of a row's text in a cache with --outputs tokens."""
    cache = store.open_complete(path)
    row = int(store.join(cache, [key])[0])
    if row < 0:
        raise UserError(f"'{key}' is not in {path}: pass a cache of this data")
    return store.read_field(cache, "word_span")[row, place], store.read_field(cache, "word_score")[row, place]


def show(
    runs: list[Path], data: str, out: Path, *, rows: int, example: str, tokens: Path | None
) -> dict[str, Any]:
    """Writes everything into `out`; returns the numbers."""
    manifest, device = read_manifest(data), pick_device()
    there = rows_to_measure(manifest)
    chosen = np.sort(np.random.default_rng(0).permutation(there)[:rows])
    keys = manifest.column("key")
    if example and example not in keys:
        raise UserError(f"no row '{example}' in {data}: pass a key of `tc manifest {data}`")
    row = keys.index(example) if example else int(chosen[0])
    found, drawn, text = {}, {}, ""
    names = [run.name for run in runs]
    for run in runs:
        looks = Looks(run, data, device)
        name = run.name if names.count(run.name) == 1 else str(run)  # runs/a/best and runs/b/best
        found[name] = importance(looks.parts(manifest, chosen))
        text, place, spans, weights = looks.example(manifest, row)
        drawn[f"{name}: attention from [CLS], last layer"] = (spans, weights)
    if tokens is not None:
        drawn["teacher's word scores S (Eq. 5)"] = word_scores(tokens, keys[row], place)
    numbers: dict[str, Any] = {name: as_numbers(one) for name, one in found.items()}
    if len(runs) == 2:
        numbers["change"] = change(*found.values())
    write_whole(out / "modality.json", json.dumps(numbers, indent=1) + "\n")
    draw_importance(found, out / "modality.png")
    draw_importance(found, out / "modality_per_token.png", per_token=True)
    draw_token_scores(text, drawn, out / "text.png", title=keys[row])
    return numbers


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+", help="runs of clip_td, before first")
    parser.add_argument("--data", required=True, help="what the runs are asked; its caches as in training")
    parser.add_argument("--out", type=Path, default=Path("attention"), help="folder for numbers and pictures")
    parser.add_argument("--rows", type=int, default=256, help="rows in the mean, drawn from the val split")
    parser.add_argument("--example", default="", help="key of the row whose text is drawn")
    parser.add_argument("--tokens", type=Path, help="a CLIP teacher's cache with --outputs tokens")
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
