"""Compare clip_kd with clip on the demo data in a table: the same student, steps and seeds, and the teacher.

    python -m scripts.demo_table --seeds 0               as in scripts/demo
    python -m scripts.demo_table --seeds 0 1 2 --write   means over seeds, written to README.md and LOG.md

Existing runs and evaluations are reused.
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
CACHE = "caches/demo/clip-lite.zarr"  # explicit, because other caches of the data may exist
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
    """Train and evaluate the missing runs, print the table, and write it if requested."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
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
    """Train and evaluate a run if it is missing, and return its metrics."""
    run = Path("runs/demo", f"{recipe}-seed{seed}")
    if not (run / "model.safetensors").exists():
        options = ["--recipe", recipe, "--out", run, "--seed", seed, "--cache", CACHE]
        options += ["--steps", STEPS, "--batch-size", BATCH]
        options += [word for setting in SETTINGS for word in ("--set", setting)]
        options += ["--resume"] if (run / "run.json").exists() else []
        command("student", "train", *options)
    return evaluate(str(run), run)


def evaluate(model: str, folder: Path) -> dict[str, float]:
    """Return the metrics of both tasks. Existing result files are reused."""
    metrics: dict[str, float] = {}
    for task in TASKS:
        path = folder / "eval" / f"demo_{task}.json"
        if not path.exists():
            text = command("student", "eval", model, "--task", task, "--json")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(json.loads(text)["results"][0]))
        metrics |= json.loads(path.read_text())["metrics"]
    return metrics


def command(module: str, *words: object) -> str:
    """Run a command of the project and return its stdout. Exit with its status if it fails; it prints its own error."""
    print("$", module, *words, file=sys.stderr, flush=True)
    argv = [sys.executable, "-m", module, *map(str, words)]
    process = subprocess.run(argv, stdout=subprocess.PIPE, text=True)
    if process.returncode:
        sys.exit(process.returncode)
    return process.stdout


def table(teacher: dict[str, float], runs: dict[str, list[dict[str, float]]]) -> str:
    """Return Markdown with a row per metric: the mean and, for several seeds, the range."""
    seeds = len(next(iter(runs.values())))
    header = ["", *(f"student, `{recipe}`" for recipe in runs), "teacher clip-lite"]
    lines = [header, ["---"] * len(header)]
    for title, name in ROWS.items():
        cells = [cell([metrics[name] for metrics in seed_runs]) for seed_runs in runs.values()]
        lines.append([title, *cells, cell([teacher[name]]) if name in teacher else "-"])
    note = f"{STEPS} steps of {BATCH}, {seeds} seed{'s: mean (lowest to highest)' if seeds > 1 else ''}"
    note += f"; {teacher['num_images']} held-out pictures, {teacher['num_texts']} texts, {teacher['num_classes']} classes"
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + f"\n\n{note}."


def cell(values: list[float]) -> str:
    """Format the mean of values and, if there are several, their range."""
    mean = f"{statistics.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.3f} to {max(values):.3f})"


def replace_table(path: Path, text: str) -> None:
    """Replace the table between its two marks in a file."""
    content = path.read_text()
    pattern = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.DOTALL)
    if not pattern.search(content):
        sys.exit(f"error: {path} has no marks for the table: add the lines {BEGIN} and {END}")
    path.write_text(pattern.sub(lambda _: f"{BEGIN}\n{text}\n{END}", content))


if __name__ == "__main__":
    main()
