"""Train clip_kd and clip on the demo data, same student, steps and seed; evaluate both and the teacher; one table.

    python -m scripts.demo_table --seeds 0               what scripts/demo does
    python -m scripts.demo_table --seeds 0 1 2 --write   means over seeds, into README.md and LOG.md

Runs and evaluations that are there already are reused.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

RECIPES = ("clip", "clip_kd")
TASKS = ("zeroshot_classification", "zeroshot_retrieval")
STEPS, BATCH = 450, 128
CACHE = "caches/demo/clip-lite.zarr"  # that one, not another that may lie beside it
SETTINGS = ("optim.lr=1e-3", "run.save_every=200")
ROWS = {
    "zero-shot top-1": "acc1",
    "text->image R@1": "image_retrieval_recall@1",
    "text->image R@5": "image_retrieval_recall@5",
    "text->image R@10": "image_retrieval_recall@10",
    "image->text R@1": "text_retrieval_recall@1",
    "image->text R@5": "text_retrieval_recall@5",
    "image->text R@10": "text_retrieval_recall@10",
}
BEGIN, END = "<!-- demo table: scripts/demo_table.py -->", "<!-- end of demo table -->"


def main() -> None:
    """Run what is missing, print the table, perhaps write it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--write", action="store_true", help="replace the table in README.md and LOG.md")
    options = parser.parse_args()
    teacher = evaluate("clip-lite", Path("runs/demo/clip-lite"))
    runs = {recipe: [trained(recipe, seed) for seed in options.seeds] for recipe in RECIPES}
    text = table(teacher, runs)
    print(text)
    print(
        "\nstudents: runs/demo   teacher: models/clip-lite   cache and index: caches/demo   pictures: data/demo"
    )
    if options.write:
        for name in ("README.md", "LOG.md"):
            replace_table(Path(name), text)


def trained(recipe: str, seed: int) -> dict[str, float]:
    """Metrics of one run, trained and evaluated if it is not there yet."""
    run = Path("runs/demo", f"{recipe}-seed{seed}")
    if not (run / "model.safetensors").exists():
        words = ["--recipe", recipe, "--out", run, "--seed", seed, "--cache", CACHE]
        words += ["--steps", STEPS, "--batch-size", BATCH]
        chosen = [word for setting in SETTINGS for word in ("--set", setting)]
        resume = ["--resume"] if (run / "run.json").exists() else []
        command("student", "train", *words, *chosen, *resume)
    return evaluate(str(run), run)


def evaluate(model: str, folder: Path) -> dict[str, float]:
    """Metrics of both tasks, from files where they are there already."""
    metrics: dict[str, float] = {}
    for task in TASKS:
        path = folder / "eval" / f"demo_{task}.json"
        if not path.exists():
            text = command("student", "eval", model, "--task", task, "--json")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        metrics |= json.loads(path.read_text())["metrics"]
    return metrics


def command(module: str, *words: object) -> str:
    """Run one of our commands and return its stdout; its own error line is enough where it fails."""
    print("$", module, *words, file=sys.stderr, flush=True)
    done = subprocess.run([sys.executable, "-m", module, *map(str, words)], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout


def table(teacher: dict[str, float], runs: dict[str, list[dict[str, float]]]) -> str:
    """Markdown: one row per metric; mean (and the range where there are several seeds)."""
    seeds = len(next(iter(runs.values())))
    header = ["", *(f"student, `{recipe}`" for recipe in runs), "teacher clip-lite"]
    lines = [header, ["---"] * len(header)]
    for title, name in ROWS.items():
        cells = [cell([run[name] for run in part]) for part in runs.values()]
        lines.append([title, *cells, cell([teacher[name]]) if name in teacher else "-"])
    note = f"{STEPS} steps of {BATCH}, {seeds} seed{'s: mean (lowest to highest)' if seeds > 1 else ''}"
    note += f"; {teacher['num_images']} held-out pictures, {teacher['num_texts']} texts, {teacher['num_classes']} classes"
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + f"\n\n{note}."


def cell(values: list[float]) -> str:
    """Mean, with lowest and highest of several."""
    mean = f"{statistics.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.3f} to {max(values):.3f})"


def replace_table(path: Path, text: str) -> None:
    """Put the table between its two marks."""
    content = path.read_text()
    pattern = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.DOTALL)
    if not pattern.search(content):
        sys.exit(f"error: {path} has no marks for the table: add the lines {BEGIN} and {END}")
    path.write_text(pattern.sub(lambda _: f"{BEGIN}\n{text}\n{END}", content))


if __name__ == "__main__":
    main()
