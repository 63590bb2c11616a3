"""Train the recipes clip_td, sds_clip, vlkd and psd once for a short time, each beside its baseline.

`bash scripts/demo --all` runs this after the other stages. It writes runs/demo/others.md. One seed of a short run shows that a
recipe works on its data; docs/RESULTS.md has tables over seeds.
"""

import json
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from scripts.papers.vlkd import hold_out
from student import api
from student.cli import main as student
from teachercache.cli import main as tc
from teachercache.core.paths import write_whole
from teachercache.core.progress import say

RUNS, TABLE = Path("runs/demo/others"), Path("runs/demo/others.md")
SCENES, PAIRS, COMPOSITIONS = Path("data/scenes"), Path("data/scene-pairs"), Path("data/compositions")
NOISY, CAPTIONS = Path("data/demo-noisy.parquet"), Path("data/demo-captions.parquet")
VANILLA = RUNS / "vanilla"


@dataclass(frozen=True)
class Comparison:
    """A recipe and its baseline on one data set.

    Args:
        recipe: The recipe.
        prepare: Makes what is missing of its data and caches.
        train: Arguments of both runs without the recipe, --out and what differs.
        runs: What differs, by the name of the run; the baseline is the first one.
        task: The value of `student eval --task`.
        data: Its data.
        metric: The metric that is shown.
    """

    recipe: str
    prepare: Callable[[], None]
    train: tuple[str, ...]
    runs: dict[str, tuple[str, ...]]
    task: str
    data: str
    metric: str


def call(main: Callable[[list[str]], int], program: str, *words: object) -> None:
    """Print a command and run it in this process; exit with its status if it fails."""
    argv = [str(word) for word in words]
    say("$", program, shlex.join(argv))
    if status := main(argv):
        sys.exit(status)


def questions() -> None:
    """Draw scenes as VCR, and cache their regions and the words that CLIP-TD selects."""
    from scripts.datasets.scene_vcr_snli_ve import write_tasks

    make(SCENES, lambda out: write_tasks(out, 200), "datasets.scene_vcr_snli_ve --num 200")
    call(tc, "tc", "build", "--teacher", "regions-lite", "--data", SCENES / "vcr1")
    call(
        tc,
        "tc",
        "build",
        "--teacher",
        "clip-lite",
        "--outputs",
        "embeddings,tokens",
        "--data",
        SCENES / "vcr1",
    )


def compositions() -> None:
    """Draw captioned scenes and Winoground-shaped pairs, cache sd-tiny, and train the CLIP that is fine-tuned."""
    from scripts.datasets.scene_winoground_aro import write_compositions
    from scripts.datasets.scenes import write_scenes

    make(PAIRS, lambda out: write_scenes(out, 400, size=64), "datasets.scenes --num 400 --size 64")
    make(COMPOSITIONS, lambda out: write_compositions(out, 100), "datasets.scene_winoground_aro --num 100")
    call(tc, "tc", "build", "--teacher", "sd-tiny", "--data", PAIRS)
    sizes = ("--steps", "150", "--batch-size", "64", "--set", "optim.lr=1e-3")
    train(VANILLA, "clip", "--data", PAIRS, *sizes, "--set", "model=vit-tiny-long")


def captions() -> None:
    """Write a manifest of 200 held-out pictures: captions by beam search of all of them would take longer than training."""
    if not CAPTIONS.exists():
        hold_out(Path("data/demo"), CAPTIONS)


def noisy_pairs() -> None:
    """Write a manifest in which 40 % of the training captions are shuffled."""
    if not NOISY.exists():
        call(tc, "tc", "manifest", "data/demo", "--noise", "shuffle=0.4", "--out", NOISY)


def make(out: Path, write: Callable[[Path], object], words: str) -> None:
    """Write a folder of drawn scenes if it is missing."""
    if not out.exists():
        say(f"$ python -m scripts.{words} --out {out}")
        write(out)


COMPARISONS = (
    Comparison(
        "clip_td",
        questions,
        ("--data", str(SCENES / "vcr1"), "--steps", "150", "--batch-size", "32", "--set", "optim.lr=1e-3"),
        {"baseline": ("--set", "distill_weight=0"), "clip_td": ()},
        "vcr",
        str(SCENES / "vcr1"),
        "q2a",
    ),
    Comparison(
        "sds_clip",
        compositions,
        (
            *("--data", str(PAIRS), "--steps", "60", "--batch-size", "32", "--set", f"init={VANILLA}"),
            *("--set", "optim.lr=1e-3", "--set", "sds_weight=1", "--set", "t_max=500"),
        ),
        {"baseline": ("--set", "objective=none"), "sds_clip": ()},
        "winoground",
        str(COMPOSITIONS / "winoground"),
        "text_score",
    ),
    Comparison(
        "vlkd",
        captions,
        (
            *("--data", "data/demo", "--cache", "caches/demo/clip-lite.zarr"),
            *("--steps", "200", "--batch-size", "32", "--set", "optim.lr=2e-3"),
        ),
        {"baseline": ("--set", "ttdm=0", "--set", "itcl=0"), "vlkd": ("--set", "ttdm=2")},
        "captions:masks=6,java=0",
        str(CAPTIONS),
        "CIDEr",
    ),
    Comparison(
        "psd",
        noisy_pairs,
        ("--data", str(NOISY), "--steps", "300", "--batch-size", "64", "--set", "model=vit-micro"),
        {"clip": ("--recipe", "clip"), "psd": ()},
        "zeroshot",
        "data/demo",
        "acc1",
    ),
)


def main() -> None:
    """Run what is missing, and print and write the table."""
    rows = []
    for comparison in COMPARISONS:
        comparison.prepare()
        rows.append((comparison, [run_one(comparison, name) for name in comparison.runs]))
    text = table(rows)
    write_whole(TABLE, text + "\n")
    print(text)


def run_one(comparison: Comparison, name: str) -> float:
    """Train and measure a run if it has no result, and return its metric."""
    run = RUNS / f"{comparison.recipe}-{name}"
    result = run / "result.json"
    if not result.exists():
        different = comparison.runs[name]
        recipe = different[1] if different[:1] == ("--recipe",) else comparison.recipe
        train(run, recipe, *comparison.train, *(different[2:] if recipe != comparison.recipe else different))
        say("$ student", "eval", run, "--task", comparison.task, "--data", comparison.data)
        metrics = api.evaluate(run, comparison.task, comparison.data)[0]["metrics"]
        write_whole(result, json.dumps(metrics) + "\n")
    return float(json.loads(result.read_text())[comparison.metric])


def train(run: Path, recipe: str, *options: object) -> None:
    """Train a run if it is not finished."""
    if not (run / "model.safetensors").exists():
        call(student, "student", "train", "--recipe", recipe, *options, "--out", run, "--resume", "auto")


def table(rows: Sequence[tuple[Comparison, Sequence[float]]]) -> str:
    """Return Markdown with a line per recipe: the metric of its baseline and of the recipe."""
    lines = [["recipe", "measured", "baseline", "value", "recipe's value"], ["---"] * 5]
    for comparison, values in rows:
        baseline, *_ = comparison.runs
        different = " ".join(word for word in comparison.runs[baseline] if not word.startswith("--"))
        task = f"{comparison.task.partition(':')[0]}, {comparison.metric}"
        lines.append(
            [f"`{comparison.recipe}`", task, f"`{different}`", *(f"{value:.3f}" for value in values)]
        )
    body = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"{body}\n\nOne seed of a short run each; docs/RESULTS.md has tables over seeds."
