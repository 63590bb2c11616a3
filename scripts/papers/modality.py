"""CLIP-TD's modality importance (section 5.1, figures 2 to 4) at laptop scale, into docs/RESULTS.md and docs/*.png.

    python -m scripts.papers.modality    # runs of scripts/reproduce clip_td's VCR table, kept this time

A row per seed: attention from [CLS] to picture and words in the mean of layers and heads, of the baseline and of the
whole of CLIP-TD with all labels, over all held-out questions. The pictures are the first seed's.
"""

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

from scripts.benchmarks.report import cores
from scripts.papers import clip_td as paper
from scripts.papers.attention import show
from scripts.papers.run import replace_section
from teachercache.core.progress import say

METHODS = {"before": "baseline", "after": "CLIP-TD (AF + TS + CW)"}
FULL = 2  # of the three data sizes
ALL = 1_000_000  # rows: every one
PAPER = (0.36, 0.106)  # shrinking of the difference, gain of the picture


def main() -> int:
    """Train what is missing, look, write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    rows = {name: paper.row("vcr", "vl-bert", method, FULL) for name, method in METHODS.items()}
    paper.prepare(list(rows.values()), options.seeds, cores())
    home = paper.FOLDER / "modality"
    runs = {
        seed: {home / f"seed{seed}" / name: paper.words(row, seed) for name, row in rows.items()}
        for seed in options.seeds
    }
    paper.train_all({out: given for pair in runs.values() for out, given in pair.items()}, cores())
    tokens, data = paper.CACHES / "vcr" / "clip.zarr", paper.DATA["vcr"]
    found = [
        show(list(pair), data, home / f"seed{seed}", rows=ALL, example="", tokens=tokens)
        for seed, pair in runs.items()
    ]
    for name, picture in (("modality", "modality"), ("word_scores", "text")):
        shutil.copy(home / f"seed{options.seeds[0]}" / f"{picture}.png", Path("docs") / f"{name}.png")
    text = section(options.seeds, found)
    print(text)
    replace_section("clip_td modality", text)
    say("written to docs/RESULTS.md")
    return 0


def section(seeds: list[int], found: list[dict[str, Any]]) -> str:
    """Markdown: a line per seed, the paper's last."""
    head = ["", "picture before", "after", "words before", "after", "difference shrinks by", "picture gains"]
    lines = [head, ["---"] * len(head)]
    for seed, one in zip(seeds, found, strict=True):
        means = [f"{one[name][f'{kind}_mean']:.3f}" for kind in ("picture", "text") for name in METHODS]
        changes = one["change"]
        shares = [f"{100 * changes[name]:.1f} %" for name in ("difference_reduction", "picture_gain")]
        lines.append([f"seed {seed}", *means, *shares])
    lines.append(["paper", "", "", "", "", *(f"{100 * share:.1f} %" for share in PAPER)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
