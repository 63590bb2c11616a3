"""One of GLUE's tasks in its own files, about drawn scenes; and prose that a small language model has not read.

    python -m scripts.datasets.scene_glue --out data/vlkd/language

MNLI: a scene's caption as the premise, a hypothesis that the scene entails, contradicts or leaves open. Captions tell
not all of a scene, so no model is always right; a second caption in other words makes the mismatched set. `texts.txt`
is out of numpy's docstrings. (Which of two sentences has its words in order, as CoLA asks, was tried: the small BART
does not learn it.) Nothing here is in GLUE.
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
    """MNLI's lines of `num` scenes, three of each: with the first caption, and with the second."""
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
    """Pieces of numpy's docstrings, each once, in an order that no file decides."""
    texts = docstrings(Path(numpy.__file__).parent)
    pieces = (piece for text in texts for piece in sentences(text) if is_prose(piece))
    found = dict.fromkeys(piece for piece in pieces if " : " not in piece and "--" not in piece)  # parameters
    return sorted(found, key=lambda piece: random.Random(piece).random())


def write_sets(out: Path, *, train: int, dev: int, texts: int, seed: int) -> dict[str, int]:
    """Writes GLUE/MNLI and texts.txt below `out`, whole or not at all; how many lines each file has."""
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
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    parser.add_argument("--train", type=int, default=1500, help="rows of the train file, about")
    parser.add_argument("--dev", type=int, default=600, help="rows of each dev file, about")
    parser.add_argument("--texts", type=int, default=400, help="lines of texts.txt")
    parser.add_argument("--seed", type=int, default=20)
    options = parser.parse_args()
    if options.out.exists():
        print(f"error: {options.out} exists; give another --out or remove it", file=sys.stderr)
        return 2
    options.out.parent.mkdir(parents=True, exist_ok=True)
    found = write_sets(
        options.out, train=options.train, dev=options.dev, texts=options.texts, seed=options.seed
    )
    for name, num in found.items():
        print(f"{options.out / name}: {num} lines")
    return 0


if __name__ == "__main__":
    sys.exit(main())
