"""Makes VCR's shortcut- and language-mitigated sets out of a .jsonl of VCR; the reader takes them as it takes VCR.

    python -m scripts.datasets.mitigate_vcr singular vcr1/val.jsonl                       # -> vcr1/val_rule_singular.jsonl
    python -m scripts.datasets.mitigate_vcr plural vcr1/val.jsonl                         # -> vcr1/val_rule_plural.jsonl
    python -m scripts.datasets.mitigate_vcr overlap vcr1/val.jsonl                        # words that question and choice share
    python -m scripts.datasets.mitigate_vcr explicit vcr1/val.jsonl --words words.json    # -> vcr1/val_explicit.jsonl
    python -m scripts.datasets.mitigate_vcr implicit vcr1/val.jsonl --run runs/text       # -> val_image_biased, ...
    python -m scripts.datasets.mitigate_vcr implicit vcr1/val.jsonl --scores text.json

words.json is {"walk": ["stroll", "move"], "coffee cup": ["mug"]}: synonyms and hypernyms, from WordNet or by hand; none
come with it. runs/text is a student without pictures (`student train --recipe clip_td --set model=bert-base --set w=0
--set init=BERT`); text.json is {annot_id: [four logits or chances]} of a model that saw no picture (or an .npz with
annot_id and scores); `implicit` writes val_image_biased, val_language_biased and val_unsure. A folder is read without
these files: name the one that is to be measured, `student eval MODEL --task vcr --data FILE`.
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
from teachercache.data.readers.questions import json_lines


def read(path: Path) -> list[dict[str, Any]]:
    """VCR's lines with labels; UserError where they are not."""
    if not path.is_file():
        raise UserError(f"no file {path}: pass a .jsonl of VCR")
    lines = json_lines(path)
    needed = ("question", "answer_choices", "answer_label", "objects", "annot_id")
    for number, line in enumerate(lines, start=1):
        if missing := [name for name in needed if name not in line]:
            raise UserError(
                f"line {number} of {path} has no {', '.join(missing)}: pass VCR's train or val .jsonl"
            )
    return lines


def read_words(path: Path) -> dict[str, list[str]]:
    """The word list; UserError where it is not one."""
    try:
        words = json.loads(path.read_text(encoding="utf-8"))
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
    """Four scores for each line; UserError where some are missing."""
    try:
        if path.suffix == ".npz":
            with np.load(path) as file:
                scores = dict(zip(map(str, file["annot_id"]), file["scores"].tolist(), strict=True))
        else:
            scores = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"cannot read {path}: {error}; pass a .json or .npz of annot_id and scores"
        ) from error
    missing = [line["annot_id"] for line in lines if len(scores.get(line["annot_id"], ())) != 4]
    if missing:
        raise UserError(f"{path} has no four scores for {len(missing)} lines, the first is '{missing[0]}'")
    return scores


def write(path: Path, lines: list[dict[str, Any]]) -> None:
    """Lines as VCR writes them."""
    write_whole(path, "".join(json.dumps(line) + "\n" for line in lines))
    print(f"{path}: {len(lines)} lines")


def run(options: argparse.Namespace) -> None:
    """One of the commands."""
    lines, path = read(options.file), options.file
    people = frozenset(options.people.split(","))
    if options.command in ("singular", "plural"):
        found = rule_mitigated(lines, plural=options.command == "plural", people=people)
        write(path.with_name(f"{path.stem}_rule_{options.command}.jsonl"), found)
    elif options.command == "overlap":
        print(json.dumps(overlap_table(lines), indent=1))
    elif options.command == "explicit":
        if options.words is None:
            raise UserError("explicit mitigation needs other words: pass --words FILE.json")
        made = explicit_mitigated(
            lines, read_words(options.words), min_count=options.min_count, seed=options.seed
        )
        write(path.with_name(f"{path.stem}_explicit.jsonl"), made.lines)
        print(
            json.dumps(
                {
                    "before": overlap_table(lines),
                    "after": overlap_table(made.lines),
                    "replaced": made.replaced,
                },
                indent=1,
            )
        )
    else:
        if (options.scores is None) == (options.run is None):
            raise UserError(
                "implicit mitigation needs a text-only model: pass --run RUN, or its --scores FILE.json"
            )
        scores = read_scores(options.scores, lines) if options.scores else scores_of(options.run, path)
        parts = implicit_parts(lines, scores, sure=options.sure)
        for name, part in parts.items():
            write(path.with_name(f"{path.stem}_{name}.jsonl"), part)


def scores_of(run: Path, path: Path) -> dict[str, list[float]]:
    """What a student without pictures says of each line; UserError where it has seen them."""
    from student.inference.answerer import is_task_run, load_task_model
    from teachercache.core.device import pick_device
    from teachercache.data.read import read_manifest

    if not (run / "run.json").exists() or not is_task_run(run):
        raise UserError(f"{run} is no run of clip_td: train one with --set model=bert-base --set w=0")
    model = load_task_model(run, device=pick_device())
    if model.student.inputs != ("text",):
        raise UserError(f"{run} sees pictures: train one with --set model=bert-base --set w=0")
    manifest = read_manifest(str(path))
    found = model.score(manifest, np.arange(len(manifest)), "q2a")
    if found is None:
        raise UserError(f"{run} was trained for rationales: train one with --set mode=q2a")
    return dict(zip(manifest.column("key"), found.tolist(), strict=True))


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("singular", "plural", "overlap", "explicit", "implicit"))
    parser.add_argument("file", type=Path, help="a .jsonl of VCR with labels")
    parser.add_argument("--people", default="person", help="object classes that count as people, with commas")
    parser.add_argument("--words", type=Path, help="explicit: a JSON of other words")
    parser.add_argument(
        "--min-count", type=int, default=5, help="explicit: right choices that share a word, at least"
    )
    parser.add_argument("--seed", type=int, default=0, help="explicit: draws among other words")
    parser.add_argument("--scores", type=Path, help="implicit: a text-only model's scores")
    parser.add_argument("--run", type=Path, help="implicit: a run of a student that sees no picture")
    parser.add_argument("--sure", type=float, default=0.9, help="implicit: how sure is sure")
    try:
        run(parser.parse_args())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
