"""VLKD's ablations (tables 7, 8, 9) and its language (tables 5, 6): the demo's pictures and drawn scenes, clip-lite.

One student a row learns from both; it captions held-out pictures of both and answers easy-vqa, which it has never seen.
Table 8's rows are one student asked with other numbers of masks, and what becomes of the language is measured on that
student beside the BART that it began from. Captions are scored without Java, so that the figures are the same anywhere.
"""

import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from scripts.papers.tables import Row, Table, spread

HOME, CACHE = Path("data/vlkd"), Path("caches/vlkd/clip-lite.zarr")
DEMO, SCENES, VQA, LANGUAGE = Path("data/demo"), HOME / "scenes", HOME / "easy-vqa", HOME / "language"
HELD_OUT = {"demo": HOME / "demo-test.parquet", "scenes": HOME / "scenes-test.parquet"}
NUM_SCENES, SCENES_SEED, SIZE, VQA_PICTURES, NUM_HELD_OUT = 3000, 8, 96, 60, 200
STEPS, BATCH, LR = 300, 32, 2e-3  # 0.25 s a step of one core
GAMMA = 2.0  # 1000 TTDM where that is a mean over the 512 dimensions, as the paper's magnitudes have it; printed: a sum
FITTING = "lr=5e-4,epochs=4,longest=48"
MASKS = (5, 6, 7, 8)
PARTS = {"ttdm": "TTDM", "itcl": "ITCL"}
SIZES = {"all pairs": 1.0, "a third": 1 / 3, "a thirtieth": 1 / 30}
# VQA v2 (val) and COCO's CIDEr of tables 7 and 9, both by ViT-B/16
LOSSES = {(): (38.6, 58.3), ("ttdm",): (35.5, 55.7), ("itcl",): (36.3, 54.1), ("ttdm", "itcl"): (30.1, 48.6)}
AMOUNTS = {"all pairs": (38.6, 58.3), "a third": (38.3, 56.2), "a thirtieth": (33.8, 45.1)}  # 3M, 1M, 100K
CIDER = dict(zip(MASKS, (59.7, 61.1, 60.6, 59.6), strict=True))  # table 8, by RN50x16
SHOWN = {  # column: its key in result.json, its place in Row.paper and what the paper measures there
    "easy-vqa": ("vqa/accuracy", 0, "VQA v2"),
    "CIDEr, demo": ("demo/CIDEr", 1, "COCO CIDEr"),
    "CIDEr, scenes": ("scenes/CIDEr", None, ""),
}


def _losses(gone: tuple[str, ...]) -> Row:
    names = " and ".join(PARTS[name] for name in gone)
    return Row(
        f"without {names}" if gone else "VLKD", tuple((name, 0.0) for name in gone), (*LOSSES[gone], None)
    )


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
    """The small BART that a student begins from."""
    return next(
        (path for path in map(Path, ("student/models/bart_tiny", "models/bart-tiny")) if path.exists()),
        Path("models/bart-tiny"),
    )


def words(one: Row, seed: int) -> list[str]:
    """The command line of a run behind `student train --out RUN`."""
    settings = [f"model={bart()}", f"optim.lr={LR:g}", "run.save_every=1000000", "run.workers=0"]
    settings += [f"{name}={value:g}" for name, value in ({"ttdm": GAMMA} | dict(one.settings)).items()]
    return [
        *("--recipe", "vlkd", "--data", f"{DEMO},{SCENES}", "--cache", str(CACHE)),
        *("--steps", str(STEPS), "--batch-size", str(BATCH), "--seed", str(seed)),
        *(word for setting in settings for word in ("--set", setting)),
    ]


def evaluations(given: Sequence[str]) -> dict[str, list[str]]:
    """The words of each `student eval RUN`, by a name that stands before its metrics; a second model's is `other`."""
    found = {"vqa": ["--task", "open_vqa", "--data", str(VQA / "v2_OpenEnded_mscoco_val2014_questions.json")]}
    whole = f"ttdm={GAMMA:g}" in given and not any(
        word.split("=")[0] in ("itcl", "data_share") for word in given
    )
    for name, data in HELD_OUT.items():
        for masks in MASKS if whole else (6,):
            label = name if masks == 6 else f"{name} {masks}"
            found[label] = ["--task", f"captions:masks={masks},java=0", "--data", str(data)]
    if whole:
        seed = given[given.index("--seed") + 1]
        found["text"] = [str(bart()), "--task", "text_loss", "--data", str(LANGUAGE / "texts.txt")]
        found["glue"] = [
            str(bart()),
            "--task",
            f"glue:{FITTING},seed={seed}",
            "--data",
            str(LANGUAGE / "GLUE"),
        ]
    return found


def prepare(rows: Iterable[Row], seeds: Sequence[int], jobs: int) -> None:
    """Scenes, questions, language tasks, held-out pictures and what the teacher says, where they are not there."""
    if not DEMO.exists() or not bart().exists():
        sys.exit(
            f"error: no {DEMO} or no {bart()}: run `bash scripts/demo` and `python -m scripts.teachers.bart_tiny` first"
        )
    HOME.mkdir(parents=True, exist_ok=True)
    made: dict[Path, list[str | int]] = {
        SCENES: ["scenes", "--num", NUM_SCENES, "--seed", SCENES_SEED, "--size", SIZE],
        VQA: ["easy_vqa", "--limit", VQA_PICTURES],
        LANGUAGE: ["scene_glue"],
    }
    for out, (script, *options) in made.items():
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
    """A manifest of test rows, drawn once: beam search of all of them would take longer than training."""
    import numpy as np

    from teachercache.data.manifest import make_manifest
    from teachercache.data.read import read_manifest, save

    manifest = read_manifest(str(data))
    rows = manifest.rows_of_split("test")
    chosen = np.sort(np.random.default_rng(0).permutation(rows)[:NUM_HELD_OUT])
    save(make_manifest(out.stem, manifest.root, [manifest.row(row) for row in chosen.tolist()]), out)


def command(*given: str) -> None:
    """A command of ours in a process of its own; its error ends everything."""
    done = subprocess.run([sys.executable, *given], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"error: {' '.join(given)}: {(done.stderr.strip().splitlines() or ['?'])[-1]}")


# ----------------------------------------------------------------------------------------------------
# Tables


def section(one: Table, results: dict[Row, list[dict[str, float]]], seeds: Sequence[int]) -> str:
    """Markdown: ours and its difference to the reference row, paired by seed, beside the paper's."""
    lines = language_lines(one, results) if one.rows == LANGUAGE_ROWS else ablation_lines(one, results)
    lines.insert(1, ["---"] * len(lines[0]))
    body = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    count = f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''}: mean (lowest to highest)"
    always = {found["vqa/accuracy:always"] for row in one.rows for found in results[row]}
    constant = f" Always saying the most frequent answer gets {100 * max(always):.1f} of easy-vqa."
    known = "." if one.rows == LANGUAGE_ROWS else f"; differences to `{one.rows[one.reference].label}`."
    known += constant if one.rows != LANGUAGE_ROWS and one.rows[0].paper[0] is not None else ""
    return f"### {one.title}\n\n{body}\n\n{count}{known} {one.note}".strip()


def ablation_lines(one: Table, results: dict[Row, list[dict[str, float]]]) -> list[list[str]]:
    """A line per row: percent, CIDEr times 100."""
    reference, head = one.rows[one.reference], [""]
    asked = one.rows[0].paper[0] is not None  # table 8 has captions alone
    shown = {name: column for name, column in SHOWN.items() if asked or "CIDEr" in name}
    for name, (_, place, theirs) in shown.items():
        head += [
            f"{name}, here",
            "difference",
            *([f"{theirs}, paper", "difference"] if place is not None else []),
        ]
    lines = [head]
    for row in one.rows:
        line = [row.label]
        for key, place, _ in shown.values():
            ours, base = ([100 * found[key_of(of, key)] for found in results[of]] for of in (row, reference))
            gains = [a - b for a, b in zip(ours, base, strict=True)]
            line += [spread(ours), "-" if row == reference else spread(gains)]
            if place is not None:
                theirs, first = row.paper[place], reference.paper[place]
                line += [f"{theirs:g}", "-" if row == reference else f"{theirs - first:+.1f}"]
        lines.append(line)
    return lines


def key_of(row: Row, key: str) -> str:
    """Where a row's figure is: with other masks it has another name."""
    number = row.label.split()[0]
    name, metric = key.split("/")
    return f"{name} {number}/{metric}" if number.isdecimal() and number != "6" else key


def language_lines(one: Table, results: dict[Row, list[dict[str, float]]]) -> list[list[str]]:
    """BART and what VLKD made of it."""
    keys = {
        "loss": "text/nll_per_token",
        "loss of what is masked": "text/nll_per_masked_token",
        "MNLI-m": "glue/MNLI/acc",
        "MNLI-mm": "glue/MNLI-mm/acc",
    }
    lines = [["", *keys, "GLUE, paper", "XSUM ROUGE-1, paper"]]
    for row, place in zip(one.rows, ("other/", ""), strict=True):
        line = [row.label]
        for key in keys.values():
            label, metric = key.split("/", 1)
            values = [found[f"{label}/{place}{metric}"] for found in results[row]]
            line.append(spread3(values) if label == "text" else spread([100 * value for value in values]))
        lines.append([*line, *(f"{value:g}" for value in row.paper[:2])])
    usual = [
        [100 * found[f"glue/{name}/majority"] for found in results[one.rows[0]]]
        for name in ("MNLI", "MNLI-mm")
    ]
    lines.append(["the most frequent label", "-", "-", *map(spread, usual), "-", "-"])
    return lines


def spread3(values: Sequence[float]) -> str:
    """As `spread`, with three digits."""
    mean = f"{sum(values) / len(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.3f} to {max(values):.3f})"
