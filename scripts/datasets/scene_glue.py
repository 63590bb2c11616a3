"""Write an MNLI-like task about drawn scenes in GLUE's file format, and held-out prose for a small language model.

    python -m scripts.datasets.scene_glue --out data/vlkd/language

The premise is the caption of a scene; the hypothesis is entailed, contradicted or left open by the scene. A caption does
not describe the whole scene, so perfect accuracy is impossible. The mismatched set uses the second caption of each scene.
`texts.txt` is taken from the docstrings of numpy. A CoLA-like task (which of two sentences has the right word order) was
tried, but the small BART does not learn it. No text here is in GLUE.
"""

import argparse
import random
import shutil
import sys
from pathlib import Path

import numpy

from scripts.datasets.prose import docstrings, is_prose, sentences
from scripts.datasets.scene_hypotheses import hypotheses_of
from scripts.datasets.scene_questions import usable
from scripts.datasets.scenes import captions_of, draw_scene_values

MNLI = (
    "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\t"
    "sentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label"
)


def inference(num: int, seed: int) -> tuple[list[str], list[str]]:
    """Return MNLI lines of `num` scenes, three per scene: with the first caption and with the second one."""
    lines: tuple[list[str], list[str]] = ([], [])
    drawn = 0
    while len(lines[0]) < 3 * num:
        rng = random.Random(f"{seed}-{drawn}")
        drawn += 1
        scene = draw_scene_values(rng)
        captions = captions_of(scene, rng)
        if not usable(scene):
            continue
        for sentence, label in hypotheses_of(scene, rng):
            for k, genre in enumerate(("scene", "scene-2")):
                number = len(lines[k])
                cells = [
                    number,
                    number,
                    f"{number}{label[0]}",
                    genre,
                    "( )",
                    "( )",
                    "(ROOT )",
                    "(ROOT )",
                    captions[k],
                    sentence,
                    label,
                    label,
                ]
                lines[k].append("\t".join(map(str, cells)))
    return lines


def prose() -> list[str]:
    """Return the distinct pieces of prose in numpy's docstrings, in an order that is independent of the files."""
    texts = docstrings(Path(numpy.__file__).parent)
    pieces = (piece for text in texts for piece in sentences(text) if is_prose(piece))
    # " : " and "--" mark lists of parameters
    distinct = dict.fromkeys(piece for piece in pieces if " : " not in piece and "--" not in piece)
    return sorted(distinct, key=lambda piece: random.Random(piece).random())


def write_sets(out: Path, *, train: int, dev: int, texts: int, seed: int) -> dict[str, int]:
    """Write GLUE/MNLI and texts.txt below `out` atomically and return the number of lines of each file."""
    first, _ = inference(train // 3, seed)
    matched, mismatched = inference(dev // 3, seed + 1)
    files = {
        "GLUE/MNLI/train.tsv": [MNLI, *first],
        "GLUE/MNLI/dev_matched.tsv": [MNLI, *matched],
        "GLUE/MNLI/dev_mismatched.tsv": [MNLI, *mismatched],
        "texts.txt": prose()[:texts],
    }
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    for name, rows in files.items():
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
        (partial / name).write_text("\n".join(rows) + "\n", encoding="utf-8")
    partial.rename(out)
    return {name: len(rows) for name, rows in files.items()}


def main() -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to create")
    parser.add_argument("--train", type=int, default=1500, help="approximate number of training rows")
    parser.add_argument("--dev", type=int, default=600, help="approximate number of rows of each dev file")
    parser.add_argument("--texts", type=int, default=400, help="lines of texts.txt")
    parser.add_argument("--seed", type=int, default=20)
    options = parser.parse_args()
    if options.out.exists():
        print(f"error: {options.out} exists; give another --out or remove it", file=sys.stderr)
        return 2
    options.out.parent.mkdir(parents=True, exist_ok=True)
    counts = write_sets(
        options.out, train=options.train, dev=options.dev, texts=options.texts, seed=options.seed
    )
    for name, num in counts.items():
        print(f"{options.out / name}: {num} lines")
    return 0


if __name__ == "__main__":
    sys.exit(main())
