"""Measure CLIP-TD's modality importance (section 5.1, figures 2 to 4) and write it to docs/RESULTS.md and docs/*.png.

    python -m scripts.papers.modality    # trains runs of the VCR table of clip_td and keeps them

The table has a row per seed: attention from [CLS] to picture and words over all held-out questions, averaged over layers
and heads, for the baseline and for CLIP-TD with all labels. The pictures show the first seed.
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
FULL = 2  # index of the data size
ALL = 1_000_000  # more rows than there are: measure all of them
PAPER = (0.36, 0.106)  # reduction of the difference, gain of the picture


def main() -> int:
    """Train the missing runs, measure them and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    rows = {name: paper.row("vcr", "vl-bert", method, FULL) for name, method in METHODS.items()}
    paper.prepare(list(rows.values()), options.seeds, cores())
    home = paper.FOLDER / "modality"
    runs = {
        seed: {home / f"seed{seed}" / name: paper.argv(row, seed) for name, row in rows.items()}
        for seed in options.seeds
    }
    paper.train_all({out: argv for pair in runs.values() for out, argv in pair.items()}, cores())
    tokens, data = paper.CACHES / "vcr" / "clip.zarr", paper.DATA["vcr"]
    numbers = [
        show(list(pair), data, home / f"seed{seed}", rows=ALL, example="", tokens=tokens)
        for seed, pair in runs.items()
    ]
    for name, picture in (("modality", "modality"), ("word_scores", "text")):
        shutil.copy(home / f"seed{options.seeds[0]}" / f"{picture}.png", Path("docs") / f"{name}.png")
    text = section(options.seeds, numbers)
    print(text)
    replace_section("clip_td modality", text)
    say("written to docs/RESULTS.md")
    return 0


def section(seeds: list[int], numbers: list[dict[str, Any]]) -> str:
    """Return Markdown with a line per seed and the paper's line."""
    head = ["", "picture before", "after", "words before", "after", "difference shrinks by", "picture gains"]
    lines = [head, ["---"] * len(head)]
    for seed, values in zip(seeds, numbers, strict=True):
        means = [f"{values[name][f'{kind}_mean']:.3f}" for kind in ("picture", "text") for name in METHODS]
        changes = values["change"]
        shares = [f"{100 * changes[name]:.1f} %" for name in ("difference_reduction", "picture_gain")]
        lines.append([f"seed {seed}", *means, *shares])
    lines.append(["paper", "", "", "", "", *(f"{100 * share:.1f} %" for share in PAPER)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
