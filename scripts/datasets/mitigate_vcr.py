"""Make the shortcut-mitigated and language-mitigated sets of VCR from a .jsonl file of VCR.

    python -m scripts.datasets.mitigate_vcr singular vcr1/val.jsonl                       # -> vcr1/val_rule_singular.jsonl
    python -m scripts.datasets.mitigate_vcr plural vcr1/val.jsonl                         # -> vcr1/val_rule_plural.jsonl
    python -m scripts.datasets.mitigate_vcr overlap vcr1/val.jsonl                        # words shared by question and choice
    python -m scripts.datasets.mitigate_vcr explicit vcr1/val.jsonl --words words.json    # -> vcr1/val_explicit.jsonl
    python -m scripts.datasets.mitigate_vcr implicit vcr1/val.jsonl --run runs/text       # -> val_image_biased, ...
    python -m scripts.datasets.mitigate_vcr implicit vcr1/val.jsonl --scores text.json

words.json is {"walk": ["stroll", "move"], "coffee cup": ["mug"]}: synonyms and hypernyms, from WordNet or written by
hand. No such list is included. runs/text is a text-only student (`student train --recipe clip_td --set model=bert-base
--set distill_weight=0 --set init=BERT`). text.json is {annot_id: [four logits or probabilities]} from a text-only model; an .npz file
with annot_id and scores also works. `implicit` writes val_image_biased, val_language_biased and val_unsure.

The outputs are files in VCR's format. The reader of a VCR folder skips them, so pass the file:
`student eval MODEL --task vcr --data FILE`.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.studies.vcr_mitigation import (
    explicit_mitigated,
    implicit_parts,
    overlap_table,
    rule_mitigated,
)
from teachercache.core.errors import UserError
from teachercache.core.paths import write_whole
from teachercache.data.foreign import parse_json
from teachercache.data.readers.questions import check_tokens, json_lines


def read(path: Path) -> list[dict[str, Any]]:
    """Read the labeled lines of a VCR file.

    Raises:
        UserError: if the file does not exist or has no labels.
    """
    if not path.is_file():
        raise UserError(f"no file {path}: pass a .jsonl file of VCR")
    lines = json_lines(path)
    needed = ("question", "answer_choices", "answer_label", "objects", "annot_id")
    for number, line in enumerate(lines, start=1):
        if missing := [name for name in needed if name not in line]:
            raise UserError(
                f"line {number} of {path} has no {', '.join(missing)}: pass VCR's train or val .jsonl"
            )
        try:
            check_tokens(line)
            if line["answer_label"] not in range(len(line["answer_choices"])):
                raise ValueError(f"answer_label is {line['answer_label']!r:.40}")
        except (ValueError, TypeError, KeyError, IndexError) as error:
            raise UserError(f"line {number} of {path} is not VCR's: {error}") from error
    return lines


def read_words(path: Path) -> dict[str, list[str]]:
    """Read a word list, {word: [replacements]}.

    Raises:
        UserError: if the file does not exist or has another format.
    """
    try:
        words = parse_json(path.read_bytes())
        assert all(
            isinstance(value, list) and all(isinstance(word, str) for word in value)
            for value in words.values()
        )
    except FileNotFoundError as error:
        raise UserError(f'no word list {path}: write one as {{"walk": ["stroll"]}}') from error
    except (ValueError, AttributeError, AssertionError) as error:
        raise UserError(f'{path} is not a word list: write it as {{"walk": ["stroll"]}}') from error
    return words


def read_scores(path: Path, lines: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Read the four scores of each line.

    Raises:
        UserError: if the file cannot be read or scores are missing.
    """
    try:
        if path.suffix == ".npz":
            with np.load(path) as file:
                scores = dict(zip(map(str, file["annot_id"]), file["scores"].tolist(), strict=True))
        else:
            scores = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"cannot read {path}: {error}; pass a .json or .npz file of annot_id and scores"
        ) from error
    missing = [line["annot_id"] for line in lines if len(scores.get(line["annot_id"], ())) != 4]
    if missing:
        raise UserError(f"{path} lacks four scores for {len(missing)} lines; the first is '{missing[0]}'")
    return scores


def write(path: Path, lines: list[dict[str, Any]]) -> None:
    """Write lines in the format of VCR."""
    write_whole(path, "".join(json.dumps(line) + "\n" for line in lines))
    print(f"{path}: {len(lines)} lines")


def run(options: argparse.Namespace) -> None:
    """Run the chosen command."""
    lines, path = read(options.file), options.file
    people = frozenset(options.people.split(","))
    if options.command in ("singular", "plural"):
        mitigated = rule_mitigated(lines, plural=options.command == "plural", people=people)
        write(path.with_name(f"{path.stem}_rule_{options.command}.jsonl"), mitigated)
    elif options.command == "overlap":
        print(json.dumps(overlap_table(lines), indent=1))
    elif options.command == "explicit":
        if options.words is None:
            raise UserError("explicit mitigation needs replacement words: pass --words FILE.json")
        explicit = explicit_mitigated(
            lines, read_words(options.words), min_count=options.min_count, seed=options.seed
        )
        write(path.with_name(f"{path.stem}_explicit.jsonl"), explicit.lines)
        print(
            json.dumps(
                {
                    "before": overlap_table(lines),
                    "after": overlap_table(explicit.lines),
                    "replaced": explicit.replaced,
                },
                indent=1,
            )
        )
    else:
        if (options.scores is None) == (options.run is None):
            raise UserError(
                "implicit mitigation needs a text-only model: pass --run RUN or --scores FILE.json"
            )
        scores = read_scores(options.scores, lines) if options.scores else scores_of(options.run, path)
        subsets = implicit_parts(lines, scores, sure=options.sure)
        for name, subset in subsets.items():
            write(path.with_name(f"{path.stem}_{name}.jsonl"), subset)


def scores_of(run: Path, path: Path) -> dict[str, list[float]]:
    """Compute the scores of a text-only student for each line.

    Raises:
        UserError: if the run is not a text-only clip_td student trained to choose answers.
    """
    from student.inference.answerer import is_task_run, load_task_model
    from teachercache.core.device import pick_device
    from teachercache.data.read import read_manifest

    if not (run / "run.json").exists() or not is_task_run(run):
        raise UserError(
            f"{run} is not a run of clip_td: train one with --set model=bert-base --set distill_weight=0"
        )
    model = load_task_model(run, device=pick_device())
    inputs = model.student.row_inputs
    if inputs.fields or inputs.picture is not None:
        raise UserError(
            f"{run} reads pictures: train a run with --set model=bert-base --set distill_weight=0"
        )
    manifest = read_manifest(str(path))
    scores = model.score(manifest, np.arange(len(manifest)), "q2a")
    if scores is None:
        raise UserError(f"{run} was trained on rationales: train a run with --set mode=q2a")
    return dict(zip(manifest.column("key"), scores.tolist(), strict=True))


def main() -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("singular", "plural", "overlap", "explicit", "implicit"))
    parser.add_argument("file", type=Path, help="a .jsonl file of VCR with labels")
    parser.add_argument("--people", default="person", help="object classes of people, separated by commas")
    parser.add_argument("--words", type=Path, help="explicit: JSON file of replacement words")
    parser.add_argument(
        "--min-count", type=int, default=5, help="explicit: minimum number of right choices that share a word"
    )
    parser.add_argument("--seed", type=int, default=0, help="explicit: seed for choosing replacement words")
    parser.add_argument("--scores", type=Path, help="implicit: scores of a text-only model")
    parser.add_argument("--run", type=Path, help="implicit: run of a text-only student")
    parser.add_argument("--sure", type=float, default=0.9, help="implicit: probability that counts as sure")
    try:
        run(parser.parse_args())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
