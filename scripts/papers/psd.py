"""PSD against CLIP where pairs are wrong on purpose: the demo's pictures and drawn scenes, measured on clean test rows.

The paper's claim at laptop scale; it has no such table, so no numbers of its own stand beside ours.
"""

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from scripts.papers.tables import Row, Table, spread

BATCH, LR, MODEL = 64, 1e-3, "vit-micro"
STEPS = {"demo": 300, "scenes": 700}  # 8 and 15 epochs: PSD needs time (LOG.md)
SCENES, SMALL = 3500, 64  # pictures of the demo that large and scenes half as large: MODEL sees 32 pixels
NOISE = (0.0, 0.2, 0.4, 0.6)
METHODS = ("clip", "psd")
DATA = ("demo", "scenes")
FOLDER = Path("runs/reproduce/psd")
RECALLS = ("image_retrieval_recall", "text_retrieval_recall")
COLUMNS = (  # what `student eval` calls them; the mean of these
    ("zero-shot top-1", ("acc1",)),
    ("R@1", tuple(f"{name}@1" for name in RECALLS)),
    ("R@10", tuple(f"{name}@10" for name in RECALLS)),
)


def row(data: int, noise: float, method: int) -> Row:
    """One cell: places in DATA and METHODS, the share of wrong pairs."""
    settings = (("data", float(data)), ("method", float(method)), ("noise", noise))
    return Row(f"{METHODS[method]}, {noise:.0%} of {DATA[data]}", settings, (None, None, None))


def table(data: int, title: str) -> Table:
    """All of one data set, method by method within a share of noise."""
    rows = tuple(row(data, noise, method) for noise in NOISE for method in range(len(METHODS)))
    return Table(title, rows, reference=0)


TABLES = {
    "demo": table(0, "Pairs shuffled, the demo's pictures"),
    "scenes": table(1, "Pairs shuffled, drawn scenes"),
}


def source(one: Row) -> tuple[str, Path, Path]:
    """Name of a row's data, where it lies clean, and what the row is trained on."""
    values = dict(one.settings)
    name = DATA[int(values["data"])]
    clean = FOLDER / name
    return name, clean, FOLDER / f"{name}-{values['noise']:g}.parquet" if values["noise"] else clean


def words(one: Row, seed: int) -> list[str]:
    """The command line of a run behind `student train --out RUN`: one optimizer for both, the supplement's table 3."""
    settings = [f"model={MODEL}", f"optim.lr={LR:g}", "optim.weight_decay=0.001", "optim.warmup=0.2"]
    chosen = [
        word
        for setting in (*settings, "run.save_every=1000000", "run.workers=0")
        for word in ("--set", setting)
    ]
    name, _, trained = source(one)
    sizes = ["--steps", str(STEPS[name]), "--batch-size", str(BATCH), "--seed", str(seed)]
    return ["--recipe", METHODS[int(dict(one.settings)["method"])], "--data", str(trained), *sizes, *chosen]


def evaluations(given: Sequence[str]) -> list[list[str]]:
    """The words of each `student eval RUN`, on the clean data of the run with these words."""
    name = Path(given[given.index("--data") + 1]).name.split("-")[0]
    return [["--task", task, "--data", str(FOLDER / name)] for task in ("retrieval", "zeroshot")]


def prepare(rows: Iterable[Row], seeds: Sequence[int], jobs: int) -> None:
    """Pictures and noisy manifests that rows need and that are not there."""
    from teachercache.cli import main as tc

    for name, clean, trained in sorted({source(one) for one in rows}):
        if not clean.exists():
            PREPARE[name](clean)
        if not trained.exists():
            share = trained.stem.split("-")[1]
            if tc(["manifest", str(clean), "--noise", f"shuffle={share}", "--out", str(trained)]):
                raise SystemExit(f"error: no {trained}")


def shrink_demo(out: Path) -> None:
    """The demo's pictures at SMALL pixels beside their texts: decoding would take most of a step."""
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
    """Scenes at half the size."""
    from scripts.datasets.scenes import write_scenes

    out.parent.mkdir(parents=True, exist_ok=True)
    write_scenes(out, SCENES, size=SMALL // 2)


PREPARE = {"demo": shrink_demo, "scenes": draw_scenes}


def section(one: Table, results: dict[Row, list[dict[str, float]]], seeds: Sequence[int]) -> str:
    """Markdown: a line per share of noise; each metric of both methods and psd less clip, paired by seed."""
    head = ["wrong pairs"]
    for name, _ in COLUMNS:
        head += [f"{name}, clip", "psd", "psd - clip"]
    lines = [head, ["---"] * len(head)]
    for clip, psd in zip(one.rows[::2], one.rows[1::2], strict=True):
        line = [f"{dict(clip.settings)['noise']:.0%}"]
        for _, keys in COLUMNS:
            both = [
                [100 * sum(found[key] for key in keys) / len(keys) for found in results[of]]
                for of in (clip, psd)
            ]
            gains = [b - a for a, b in zip(*both, strict=True)]
            line += [spread(both[0]), spread(both[1]), spread(gains)]
        lines.append(line)
    body = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    count = f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''}: mean (lowest to highest)"
    return f"### {one.title}\n\n{body}\n\n{count}; R@K is the mean of both directions. {one.note}".strip()
