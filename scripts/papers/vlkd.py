"""Ablations of VLKD (tables 7, 8, 9) and its language results (tables 5, 6) with clip-lite on demo data and scenes.

The student of each row is trained on both data sets. It captions held-out pictures of both and answers easy-vqa, which is
not in the training data. The rows of table 8 evaluate one student with different numbers of masks. The language tables
compare this student with its initial BART. Captions are scored without Java, so that the numbers are reproducible.
"""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from scripts.papers.tables import Results, Row, Table, set_flags, spread

HOME, CACHE = Path("data/vlkd"), Path("caches/vlkd/clip-lite.zarr")
DEMO, SCENES, VQA, LANGUAGE = Path("data/demo"), HOME / "scenes", HOME / "easy-vqa", HOME / "language"
HELD_OUT = {"demo": HOME / "demo-test.parquet", "scenes": HOME / "scenes-test.parquet"}
NUM_SCENES, SCENES_SEED, SIZE, VQA_PICTURES, NUM_HELD_OUT = 3000, 8, 96, 60, 200
STEPS, BATCH, LR = 300, 32, 2e-3  # 0.25 s per step on one core
# Weight of TTDM. It equals 1000 times a mean over the 512 dimensions, which matches the paper's magnitudes; the printed
# equation is a sum.
GAMMA = 2.0
FITTING = "lr=5e-4,epochs=4,longest=48"
MASKS = (5, 6, 7, 8)
PARTS = {"ttdm": "TTDM", "itcl": "ITCL"}
SIZES = {"all pairs": 1.0, "a third": 1 / 3, "a thirtieth": 1 / 30}
# VQA v2 (val) and COCO CIDEr of tables 7 and 9 with ViT-B/16
LOSSES: dict[tuple[str, ...], tuple[float, float]] = {
    (): (38.6, 58.3),
    ("ttdm",): (35.5, 55.7),
    ("itcl",): (36.3, 54.1),
    ("ttdm", "itcl"): (30.1, 48.6),
}
AMOUNTS = {"all pairs": (38.6, 58.3), "a third": (38.3, 56.2), "a thirtieth": (33.8, 45.1)}  # 3M, 1M, 100K
CIDER = dict(zip(MASKS, (59.7, 61.1, 60.6, 59.6), strict=True))  # table 8, with RN50x16
SHOWN = {  # column: (key in result.json, index in Row.paper, what the paper measures)
    "easy-vqa": ("vqa/accuracy", 0, "VQA v2"),
    "CIDEr, demo": ("demo/CIDEr", 1, "COCO CIDEr"),
    "CIDEr, scenes": ("scenes/CIDEr", None, ""),
}


def _losses(removed: tuple[str, ...]) -> Row:
    names = " and ".join(PARTS[name] for name in removed)
    label = f"without {names}" if removed else "VLKD"
    return Row(label, tuple((name, 0.0) for name in removed), (*LOSSES[removed], None))


PRINTED = Row("gamma = 1000 of the printed sum", (("ttdm", 1000.0),), (*LOSSES[()], None))


def _size(name: str) -> Row:
    share = SIZES[name]
    return Row(name, () if share == 1 else (("data_share", round(share, 4)),), (*AMOUNTS[name], None))


LANGUAGE_ROWS = (Row("BART as it was", (), (87.2, 45.14, None)), Row("after VLKD", (), (85.7, 44.86, None)))
TABLES = {
    "losses": Table("What each loss brings (table 7)", (*map(_losses, LOSSES), PRINTED), reference=0),
    "masks": Table(
        "How many masks (table 8)", tuple(Row(f"{m} masks", (), (None, CIDER[m], None)) for m in MASKS), 1
    ),
    "size": Table(
        "How many pairs (table 9)",
        tuple(map(_size, SIZES)),
        reference=0,
        note="The paper's pairs: 3M, 1M, 100K.",
    ),
    "language": Table(
        "The language model before and after (tables 5 and 6)",
        LANGUAGE_ROWS,
        reference=0,
        note="A loss is in nats a token, of prose that no training has seen; lower is better.",
    ),
}


# ----------------------------------------------------------------------------------------------------
# Runs


def bart() -> Path:
    """Return the folder of the small BART that students start from."""
    return next(
        (
            path
            for path in map(Path, ("student/models/seq2seq/bart_tiny", "models/bart-tiny"))
            if path.exists()
        ),
        Path("models/bart-tiny"),
    )


def argv(row: Row, seed: int) -> list[str]:
    """Return the arguments of `student train` without --out."""
    settings = [f"model={bart()}", f"optim.lr={LR:g}", "run.save_every=1000000", "run.workers=0"]
    settings += [f"{name}={value:g}" for name, value in ({"ttdm": GAMMA} | row.numbers()).items()]
    return [
        *("--recipe", "vlkd", "--data", f"{DEMO},{SCENES}", "--cache", str(CACHE)),
        *("--steps", str(STEPS), "--batch-size", str(BATCH), "--seed", str(seed)),
        *set_flags(settings),
    ]


def evaluations(argv: Sequence[str]) -> dict[str, list[str]]:
    """Return the arguments of each `student eval` after the model, by the prefix of its metrics."""
    commands = {
        "vqa": ["--task", "open_vqa", "--data", str(VQA / "v2_OpenEnded_mscoco_val2014_questions.json")]
    }
    whole = f"ttdm={GAMMA:g}" in argv and not any(
        word.split("=")[0] in ("itcl", "data_share") for word in argv
    )
    for name, data in HELD_OUT.items():
        for masks in MASKS if whole else (6,):
            label = name if masks == 6 else f"{name} {masks}"
            commands[label] = ["--task", f"captions:masks={masks},java=0", "--data", str(data)]
    if whole:
        seed = argv[argv.index("--seed") + 1]
        commands["text"] = [str(bart()), "--task", "text_loss", "--data", str(LANGUAGE / "texts.txt")]
        commands["glue"] = [
            str(bart()),
            "--task",
            f"glue:{FITTING},seed={seed}",
            "--data",
            str(LANGUAGE / "GLUE"),
        ]
    return commands


def prepare(rows: Sequence[Row], seeds: Sequence[int], jobs: int) -> None:
    """Make the missing scenes, questions, language tasks, held-out manifests and the cache."""
    if not DEMO.exists() or not bart().exists():
        sys.exit(
            f"error: {DEMO} or {bart()} is missing: "
            "run `bash scripts/demo` and `python -m scripts.teachers.bart_tiny` first"
        )
    HOME.mkdir(parents=True, exist_ok=True)
    generated: dict[Path, list[str | int]] = {
        SCENES: ["scenes", "--num", NUM_SCENES, "--seed", SCENES_SEED, "--size", SIZE],
        VQA: ["easy_vqa", "--limit", VQA_PICTURES],
        LANGUAGE: ["scene_glue"],
    }
    for out, (script, *options) in generated.items():
        if not out.exists():
            command("-m", f"scripts.datasets.{script}", "--out", str(out), *map(str, options))
    for name, data in (("demo", DEMO), ("scenes", SCENES)):
        if not HELD_OUT[name].exists():
            hold_out(data, HELD_OUT[name])
    command(
        "-m",
        "teachercache",
        "build",
        "--teacher",
        "clip-lite",
        "--data",
        f"{DEMO},{SCENES}",
        "--out",
        str(CACHE),
    )


def hold_out(data: Path, out: Path) -> None:
    """Write a manifest of sampled test rows. Beam search over all of them would take longer than training."""
    import numpy as np

    from teachercache.data.manifest import make_manifest
    from teachercache.data.read import read_manifest, save

    manifest = read_manifest(str(data))
    rows = manifest.rows_of_split("test")
    chosen = np.sort(np.random.default_rng(0).permutation(rows)[:NUM_HELD_OUT])
    save(make_manifest(out.stem, manifest.root, [manifest.row(row) for row in chosen.tolist()]), out)


def command(*options: str) -> None:
    """Run a command of the project in a new process and exit if it fails."""
    process = subprocess.run([sys.executable, *options], capture_output=True, text=True)
    if process.returncode:
        sys.exit(f"error: {' '.join(options)}: {(process.stderr.strip().splitlines() or ['?'])[-1]}")


# ----------------------------------------------------------------------------------------------------
# Tables


def section(table: Table, results: Results, seeds: Sequence[int]) -> str:
    """Return Markdown with our numbers, their differences to the reference row (paired by seed), and the paper's."""
    is_language = table.rows == LANGUAGE_ROWS
    lines = language_lines(table, results) if is_language else ablation_lines(table, results)
    lines.insert(1, ["---"] * len(lines[0]))
    body = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    count = f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''}: mean (lowest to highest)"
    always = {metrics["vqa/accuracy:always"] for row in table.rows for metrics in results[row]}
    constant = f" Always saying the most frequent answer gets {100 * max(always):.1f} of easy-vqa."
    text = "." if is_language else f"; differences to `{table.rows[table.reference].label}`."
    text += constant if not is_language and table.rows[0].paper[0] is not None else ""
    return f"### {table.title}\n\n{body}\n\n{count}{text} {table.note}".strip()


def ablation_lines(table: Table, results: Results) -> list[list[str]]:
    """Return a line per row in percent, with CIDEr times 100."""
    reference, head = table.rows[table.reference], [""]
    has_vqa = table.rows[0].paper[0] is not None  # table 8 reports only captions
    shown = {name: column for name, column in SHOWN.items() if has_vqa or "CIDEr" in name}
    for name, (_, index, metric) in shown.items():
        head += [
            f"{name}, here",
            "difference",
            *([f"{metric}, paper", "difference"] if index is not None else []),
        ]
    lines = [head]
    for row in table.rows:
        line = [row.label]
        for key, index, _ in shown.values():
            ours, base = (
                [100 * metrics[key_of(each, key)] for metrics in results[each]] for each in (row, reference)
            )
            gains = [a - b for a, b in zip(ours, base, strict=True)]
            line += [spread(ours), "-" if row == reference else spread(gains)]
            if index is not None:
                theirs, baseline = row.paper[index], reference.paper[index]
                assert theirs is not None
                assert baseline is not None
                line += [f"{theirs:g}", "-" if row == reference else f"{theirs - baseline:+.1f}"]
        lines.append(line)
    return lines


def key_of(row: Row, key: str) -> str:
    """Return the key of a row's metric. Evaluations with a number of masks other than 6 have their own prefix."""
    number = row.label.split()[0]
    name, metric = key.split("/")
    return f"{name} {number}/{metric}" if number.isdecimal() and number != "6" else key


def language_lines(table: Table, results: Results) -> list[list[str]]:
    """Return a line for the initial BART and a line for the language model after VLKD."""
    keys = {
        "loss": "text/nll_per_token",
        "loss of what is masked": "text/nll_per_masked_token",
        "MNLI-m": "glue/MNLI/acc",
        "MNLI-mm": "glue/MNLI-mm/acc",
    }
    lines = [["", *keys, "GLUE, paper", "XSUM ROUGE-1, paper"]]
    for row, model in zip(table.rows, ("other/", ""), strict=True):
        line = [row.label]
        for key in keys.values():
            label, metric = key.split("/", 1)
            values = [metrics[f"{label}/{model}{metric}"] for metrics in results[row]]
            line.append(spread3(values) if label == "text" else spread([100 * value for value in values]))
        lines.append([*line, *(f"{value:g}" for value in row.paper[:2])])
    majority = [
        [100 * metrics[f"glue/{name}/majority"] for metrics in results[table.rows[0]]]
        for name in ("MNLI", "MNLI-mm")
    ]
    lines.append(["the most frequent label", "-", "-", *map(spread, majority), "-", "-"])
    return lines


def spread3(values: Sequence[float]) -> str:
    """Format values like `spread`, with three digits."""
    mean = f"{sum(values) / len(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.3f} to {max(values):.3f})"
