"""Compare PSD with CLIP on data with shuffled pairs: the demo's pictures and drawn scenes, with clean test rows.

This tests the claim of the paper at laptop scale. The paper has no such table, so there are no published numbers.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

from scripts.papers.tables import Results, Row, Table, set_flags, spread

BATCH, LR, MODEL = 64, 1e-3, "vit-micro"
STEPS = {"demo": 300, "scenes": 700}  # 8 and 15 epochs: PSD needs long training (LOG.md)
SCENES, SMALL = (
    3500,
    64,
)  # number of scenes; pixels of the demo's pictures (scenes: half): the input of MODEL is 32
NOISE = (0.0, 0.2, 0.4, 0.6)
METHODS = ("clip", "psd")
DATA = ("demo", "scenes")
FOLDER = Path("runs/reproduce/psd")
RECALLS = ("image_retrieval_recall", "text_retrieval_recall")
COLUMNS = (  # name, and the metrics of `student eval` whose mean is shown
    ("zero-shot top-1", ("acc1",)),
    ("R@1", tuple(f"{name}@1" for name in RECALLS)),
    ("R@10", tuple(f"{name}@10" for name in RECALLS)),
)


def row(data: int, noise: float, method: int) -> Row:
    """Return the row of a cell: indices into DATA and METHODS, and the share of shuffled pairs."""
    settings = (("data", float(data)), ("method", float(method)), ("noise", noise))
    return Row(f"{METHODS[method]}, {noise:.0%} of {DATA[data]}", settings, (None, None, None))


def table(data: int, title: str) -> Table:
    """Return the table of a data set: for each share of noise one row per method."""
    rows = tuple(row(data, noise, method) for noise in NOISE for method in range(len(METHODS)))
    return Table(title, rows, reference=0)


TABLES = {
    "demo": table(0, "Pairs shuffled, the demo's pictures"),
    "scenes": table(1, "Pairs shuffled, drawn scenes"),
}


def source(row: Row) -> tuple[str, Path, Path]:
    """Return the name of a row's data, the folder of the clean data, and the path of its training data."""
    values = row.numbers()
    name = DATA[int(values["data"])]
    clean = FOLDER / name
    return name, clean, FOLDER / f"{name}-{values['noise']:g}.parquet" if values["noise"] else clean


def argv(row: Row, seed: int) -> list[str]:
    """Return the arguments of `student train` without --out. Both methods use the optimizer of the supplement's table 3."""
    settings = [f"model={MODEL}", f"optim.lr={LR:g}", "optim.weight_decay=0.001", "optim.warmup=0.2"]
    settings += ["run.save_every=1000000", "run.workers=0"]
    name, _, training_data = source(row)
    method = METHODS[int(row.numbers()["method"])]
    sizes = ["--steps", str(STEPS[name]), "--batch-size", str(BATCH), "--seed", str(seed)]
    return ["--recipe", method, "--data", str(training_data), *sizes, *set_flags(settings)]


def evaluations(argv: Sequence[str]) -> list[list[str]]:
    """Return the arguments of each `student eval` after the model: both tasks on the clean data of the run."""
    name = Path(argv[argv.index("--data") + 1]).name.split("-")[0]
    return [["--task", task, "--data", str(FOLDER / name)] for task in ("retrieval", "zeroshot")]


def prepare(rows: Sequence[Row], seeds: Sequence[int], jobs: int) -> None:
    """Make the missing pictures and noisy manifests."""
    from teachercache.cli import main as tc

    for name, clean, training_data in sorted({source(row) for row in rows}):
        if not clean.exists():
            PREPARE[name](clean)
        if not training_data.exists():
            share = training_data.stem.split("-")[1]
            if tc(["manifest", str(clean), "--noise", f"shuffle={share}", "--out", str(training_data)]):
                raise SystemExit(f"error: could not write {training_data}")


def shrink_demo(out: Path) -> None:
    """Copy the demo data with pictures of SMALL pixels. Decoding the originals would dominate the step time."""
    from PIL import Image

    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    for path in sorted(path for path in Path("data/demo").rglob("*") if path.is_file()):
        target = partial / path.relative_to("data/demo")
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix != ".jpg":
            shutil.copy(path, target)
            continue
        with Image.open(path) as picture:
            small = picture.convert("RGB")
        small.thumbnail((SMALL, SMALL))
        small.save(target.with_suffix(".png"))
    partial.rename(out)


def draw_scenes(out: Path) -> None:
    """Draw scenes at half of SMALL pixels."""
    from scripts.datasets.scenes import write_scenes

    out.parent.mkdir(parents=True, exist_ok=True)
    write_scenes(out, SCENES, size=SMALL // 2)


PREPARE = {"demo": shrink_demo, "scenes": draw_scenes}


def section(table: Table, results: Results, seeds: Sequence[int]) -> str:
    """Return Markdown with a line per share of noise: both methods and their difference, paired by seed."""
    head = ["wrong pairs"]
    for name, _ in COLUMNS:
        head += [f"{name}, clip", "psd", "psd - clip"]
    lines = [head, ["---"] * len(head)]
    for clip, psd in zip(table.rows[::2], table.rows[1::2], strict=True):
        line = [f"{clip.numbers()['noise']:.0%}"]
        for _, keys in COLUMNS:
            both = [
                [100 * sum(metrics[key] for key in keys) / len(keys) for metrics in results[row]]
                for row in (clip, psd)
            ]
            gains = [b - a for a, b in zip(*both, strict=True)]
            line += [spread(both[0]), spread(both[1]), spread(gains)]
        lines.append(line)
    body = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    count = f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''}: mean (lowest to highest)"
    return f"### {table.title}\n\n{body}\n\n{count}; R@K is the mean of both directions. {table.note}".strip()
