"""Ablations of CLIP-TD (tables 2, 5, 6, 8): drawn scenes as VCR and SNLI-VE, easy-vqa as VQA, at three data sizes.

The teacher is a CLIP trained with our `clip` recipe on other drawn scenes, because clip-lite does not distinguish the
attributes of shapes. Students are tiny and pretrained, as in the paper: by stage=adapt without distillation on questions
about other scenes with right answers and rationales.
"""

import concurrent.futures
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from scripts.papers.tables import Results, Row, Table, set_flags, spread

FOLDER = Path("runs/reproduce/clip_td")
PICTURES, PAIRS, SIZE = 3000, 8000, 96
STEPS = {"vcr": 200, "snli_ve": 400, "vqa": 300}  # a VCR row has four texts
BATCH, ADAPT = 32, 150
LR = {"vcr": 3e-4, "snli_ve": 3e-4, "vqa": 1e-3}  # on VCR, 1e-3 destroys the pretraining
PRETRAIN, PRETRAIN_BATCH, SCRATCH_LR = 1000, 64, 1e-3
VQA_PICTURES = 600  # per split
HOME, CACHES = Path("data/clip_td"), Path("caches/clip_td")
DATA = {
    "vcr": str(HOME / "scenes/vcr1"),
    "snli_ve": str(HOME / "scenes/snli_ve"),
    "vqa": str(HOME / "easy-vqa"),
}
OTHER, CAPTIONED = str(HOME / "scenes-other/vcr1"), str(HOME / "pairs")
SCORE = {"vcr": "q2a", "snli_ve": "accuracy", "vqa": "accuracy"}
SIZES = {  # number of labels: per category (6) in VCR, per class (3) in SNLI-VE, in total in VQA
    "vcr": ("low:17", "low:170", "full"),
    "snli_ve": ("low:34", "low:334", "full"),
    "vqa": ("low:100", "low:1000", "full"),
}
TEACHER, WORDS = FOLDER / "teacher", FOLDER / "words"
W = "0.15"  # default weight of the distillation; the table `weight` varies it
NAIVE = {"select": "none", "confidence": "false"}
WEIGHTS = ("1", "0.5", "0.1", "0.05", "0.01")
METHODS: dict[str, dict[str, str]] = {  # settings; "adapted" selects the initialization
    "baseline": {"distill_weight": "0"},
    "naive V": NAIVE | {"text_term": "0"},
    "naive L": NAIVE | {"image_term": "0"},
    "naive VL": NAIVE,
    "VL RTS": {"select": "random", "confidence": "false"},
    "VL TS": {"confidence": "false"},
    "VL CW": {"select": "none"},
    "2nd-stage pretraining": {"distill_weight": "0", "adapted": "0"},
    "VL AF": NAIVE | {"adapted": W},
    "CLIP-TD (AF + TS + CW)": {"adapted": W},
}
SWEEP = {f"naive VL, w={w}": NAIVE | {"distill_weight": w} for w in WEIGHTS}
LAYERS = {
    "1 linear, concat": {"model": "clip-1-linear", "fusion": "concat"},
    "1 linear, cosine": {"model": "clip-1-linear", "fusion": "cosine"},
    "3 linear, concat": {"model": "clip-3-linear", "fusion": "concat"},
    "3 linear, cosine": {"model": "clip-3-linear", "fusion": "cosine"},
    "1 transformer layer": {"model": "clip-transformer"},
}
SETTINGS = METHODS | SWEEP | LAYERS
PAPER = {  # tables 2, 5, 6 and 8, VL-BERT; SNLI-VE and VQA with a ViT-B/16
    "vcr": {
        "baseline": (30.85, 57.59, 76.02),
        "naive V": (40.13, 55.23, 76.28),
        "naive L": (44.07, 57.86, 76.57),
        "naive VL": (45.18, 58.91, 76.74),
        "VL RTS": (40.21, 57.24, 75.34),
        "VL TS": (46.28, 59.68, 77.08),
        "VL CW": (46.54, 58.93, 76.84),
        "2nd-stage pretraining": (38.32, 58.13, 76.38),
        "VL AF": (46.02, 59.23, 76.93),
        "CLIP-TD (AF + TS + CW)": (46.74, 59.98, 77.24),
        "naive VL, w=1": (35.39, 58.57, 76.4),
        "naive VL, w=0.5": (37.20, 58.96, 76.42),
        "naive VL, w=0.1": (40.47, 58.72, 76.62),
        "naive VL, w=0.05": (45.18, 58.91, 76.74),
        "naive VL, w=0.01": (42.31, 58.65, 76.23),
        "1 linear, concat": (30.13, 30.39, 31.86),
        "1 linear, cosine": (28.64, 29.31, 30.42),
        "3 linear, concat": (30.43, 30.86, 32.31),
        "3 linear, cosine": (29.65, 30.23, 30.84),
        "1 transformer layer": (34.41, 35.34, 36.42),
    },
    "snli_ve": {
        "baseline": (53.28, 62.31, 74.66),
        "naive VL": (56.02, 64.92, 75.08),
        "CLIP-TD (AF + TS + CW)": (56.78, 65.37, 75.75),
    },
    "vqa": {
        "baseline": (35.33, 63.29, 69.05),
        "naive VL": (36.83, 64.43, 70.22),
        "CLIP-TD (AF + TS + CW)": (37.12, 65.71, 71.42),
    },
    "uniter": {
        "baseline": (31.31, 57.02, 74.23),
        "naive VL": (39.32, 57.23, 75.21),
        "CLIP-TD (AF + TS + CW)": (45.58, 58.42, 76.35),
    },
}
THEIRS = {
    "vcr": ("700", "7000", "full"),
    "snli_ve": ("3000", "30000", "full"),
    "vqa": ("100", "1000", "full"),
}


def row(task: str, face: str, method: str, size: int) -> Row:
    """Return the row of a cell: a method at a data size."""
    published = PAPER["uniter" if face == "uniter" and task == "vcr" else task].get(method)
    settings = (("task", task), ("face", face), ("method", method), ("size", SIZES[task][size]))
    return Row(method, settings, (published[size] if published else None, None, None))


def table(task: str, face: str, title: str, methods: Sequence[str] = tuple(METHODS)) -> Table:
    """Return the table of methods by data sizes."""
    rows = tuple(row(task, face, method, size) for method in methods for size in range(3))
    return Table(title, rows, reference=0)


# The paper reports 2nd-stage pretraining only on VCR
ONE_STAGE = tuple(name for name in METHODS if name != "2nd-stage pretraining")
TABLES = {
    "vcr": table("vcr", "vl-bert", "VCR Q2A on drawn scenes, tiny VL-BERT (tables 2 and 8)"),
    "vcr_uniter": table(
        "vcr",
        "uniter",
        "VCR Q2A on drawn scenes, tiny UNITER (table 1)",
        ("baseline", "naive VL", "CLIP-TD (AF + TS + CW)"),
    ),
    "snli_ve": table("snli_ve", "vl-bert", "SNLI-VE on drawn scenes, tiny VL-BERT (table 5)", ONE_STAGE),
    "vqa": table("vqa", "vl-bert", "VQA on easy-vqa, tiny VL-BERT (table 6)", ONE_STAGE),
    "adapters": table("vcr", "vl-bert", "Layers on frozen CLIP, VCR Q2A (table 11)", ("baseline", *LAYERS)),
    "weight": table("vcr", "vl-bert", "Weight of the distillation, VCR Q2A (table 8)", ("baseline", *SWEEP)),
}


# ----------------------------------------------------------------------------------------------------
# Runs


def common(task: str, face: str, seed: int) -> list[str]:
    """Return the arguments of `student train` that all runs on a task share."""
    settings = [f"model={face}-tiny", f"subset={seed}", "run.save_every=1000000", "run.workers=0"]
    options = ["--recipe", "clip_td", "--data", DATA[task], "--cache", str(CACHES / task)]
    options += ["--seed", str(seed), "--batch-size", str(BATCH)]
    return options + set_flags(settings)


def argv(row: Row, seed: int) -> list[str]:
    """Return the arguments of `student train` without --out."""
    names = row.names()
    task, face, size = names["task"], names["face"], names["size"]
    values = {"distill_weight": W} | SETTINGS[names["method"]]
    weight = values.pop("adapted", "")
    init = adapted(task, face, size, weight, seed) if weight else pretrained(face)
    scratch = "model" in values
    settings = [f"regime={size}", f"optim.lr={SCRATCH_LR if scratch else LR[task]:g}"]
    settings += [] if scratch else [f"init={init}"]
    settings += [f"{name}={value}" for name, value in values.items()]
    return [*common(task, face, seed), "--steps", str(STEPS[task]), *set_flags(settings)]


def evaluations(argv: Sequence[str]) -> list[list[str]]:
    """Return the arguments of `student eval` after the model: the task of the training data."""
    data = argv[argv.index("--data") + 1]
    return [["--task", next(task for task, folder in DATA.items() if folder == data), "--data", data]]


def pretrained(face: str) -> Path:
    """Return the folder of the pretrained student that all runs start from."""
    return FOLDER / f"pretrained-{face}"


def adapted(task: str, face: str, size: str, weight: str, seed: int) -> Path:
    """Return the folder of a student after Adaptive Finetuning (weight 0: after a second pretraining)."""
    return FOLDER / "adapted" / f"{task}-{face}-{size.replace(':', '')}-w{weight}-seed{seed}"


def adapt_argv(task: str, face: str, size: str, weight: str, seed: int) -> list[str]:
    """Return the arguments of Adaptive Finetuning on all training rows. As many rows are labeled as in the run itself."""
    settings = [
        "stage=adapt",
        f"distill_weight={weight}",
        f"init={pretrained(face)}",
        f"regime={size.replace('low', 'semi')}",
        f"optim.lr={LR[task]:g}",
    ]
    return [*common(task, face, seed), "--steps", str(ADAPT), *set_flags(settings)]


def prepare(rows: Sequence[Row], seeds: Sequence[int], jobs: int) -> None:
    """Make the missing data, teacher, caches, pretrained and adapted students."""
    prepare_data()
    cells = [row.names() for row in rows]
    faces = sorted({cell["face"] for cell in cells})
    settings = [
        f"tokenizer={WORDS}",
        "stage=adapt",
        "mode=qa2r",
        "distill_weight=0",
        f"optim.lr={SCRATCH_LR:g}",
        "run.workers=0",
    ]
    start = ["--recipe", "clip_td", "--data", OTHER, "--cache", str(CACHES / "other")]
    start += ["--batch-size", str(PRETRAIN_BATCH), "--steps", str(PRETRAIN), *set_flags(settings)]
    train_all({pretrained(face): [*start, "--set", f"model={face}-tiny"] for face in faces}, jobs)
    wanted = {
        (cell["task"], cell["face"], cell["size"], SETTINGS[cell["method"]].get("adapted", ""))
        for cell in cells
    }
    keys = [(*key, seed) for key in sorted(wanted) if key[-1] for seed in seeds]
    train_all({adapted(*key): adapt_argv(*key) for key in keys}, jobs)


def train_all(runs: dict[Path, list[str]], jobs: int) -> None:
    """Train each run that is missing or has other arguments, `jobs` at a time.

    Args:
        runs: arguments of `student train` by folder, without --out.
        jobs: number of parallel processes.
    """
    from teachercache.core.paths import write_whole

    def recorded(out: Path) -> str:
        return (out / "words.json").read_text() if (out / "words.json").exists() else ""

    def train(out: Path) -> None:
        shutil.rmtree(out, ignore_errors=True)
        command("student", "train", "--out", str(out), *runs[out])
        write_whole(out / "words.json", json.dumps(runs[out]))

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        list(pool.map(train, [out for out, argv in runs.items() if recorded(out) != json.dumps(argv)]))


def command(module: str, *options: str) -> None:
    """Run a command of the project in a new process and exit if it fails."""
    process = subprocess.run([sys.executable, "-m", module, *options], capture_output=True, text=True)
    if process.returncode:
        sys.exit(f"error: {' '.join(options)}: {(process.stderr.strip().splitlines() or ['?'])[-1]}")


def prepare_data() -> None:
    """Make the missing scenes, easy-vqa files, teacher, caches and tokenizer."""
    for out, seed in ((HOME / "scenes", 0), (HOME / "scenes-other", 7)):
        if not out.exists():
            out.parent.mkdir(parents=True, exist_ok=True)
            command(
                "scripts.datasets.scene_vcr_snli_ve",
                "--out",
                str(out),
                "--num",
                str(PICTURES),
                "--seed",
                str(seed),
            )
    if not Path(DATA["vqa"]).exists():
        command("scripts.datasets.easy_vqa", "--out", DATA["vqa"], "--limit", str(VQA_PICTURES))
    if not Path(CAPTIONED).exists():
        sizes = ["--num", str(PAIRS), "--size", str(SIZE)]
        command("scripts.datasets.scenes", "--out", CAPTIONED, "--seed", "100", *sizes)
    if not TEACHER.exists():
        run = FOLDER / "scene-clip"
        sizes = [
            "--steps",
            "800",
            "--batch-size",
            "64",
            "--set",
            "model=vit-tiny-long",
            "--set",
            "run.workers=0",
        ]
        train_all({run: ["--recipe", "clip", "--data", CAPTIONED, *sizes]}, 1)
        command("student", "export", str(run), "--format", "open_clip", "--out", str(TEACHER))
    for task, data in {**DATA, "other": OTHER}.items():
        regions = [
            "--teacher",
            "regions-lite",
            "--outputs",
            "regions:5",
            "--out",
            str(CACHES / task / "regions.zarr"),
        ]
        command("teachercache", "build", "--data", data, *regions)
        if task in DATA:
            command(
                "teachercache",
                "build",
                "--data",
                data,
                "--teacher",
                str(TEACHER),
                "--outputs",
                "embeddings,tokens,random_tokens",
                "--out",
                str(CACHES / task / "clip.zarr"),
            )
    if not (WORDS / "tokenizer.json").exists():
        write_tokenizer()


def write_tokenizer() -> None:
    """Write a tokenizer with the words of all three data sets, which all students share."""
    from student.models.single_stream.tokenizer import vocabulary_tokenizer
    from teachercache.core.paths import write_whole
    from teachercache.data.read import read_manifest

    texts = [text for data in DATA.values() for row in read_manifest(data).column("texts") for text in row]
    WORDS.mkdir(parents=True, exist_ok=True)
    write_whole(WORDS / "tokenizer.json", vocabulary_tokenizer(texts).to_str())


# ----------------------------------------------------------------------------------------------------
# Tables


def section(table: Table, results: Results, seeds: Sequence[int]) -> str:
    """Return Markdown with a line per method: our numbers and both differences to the baseline at each data size.

    Our differences are paired by seed.
    """
    task = table.rows[0].names()["task"]
    head = [""]
    for size, paper_size in zip(SIZES[task], THEIRS[task], strict=True):
        head += [f"{size}, here", "to baseline, here", f"paper at {paper_size}"]
    lines = [[*head, "time of a step"], ["---"] * (len(head) + 1)]
    base = table.rows[:3]
    for start in range(0, len(table.rows), 3):
        cells = table.rows[start : start + 3]
        line = [cells[0].label]
        for cell, reference in zip(cells, base, strict=True):
            ours, theirs = (
                [100 * metrics[SCORE[task]] for metrics in results[row]] for row in (cell, reference)
            )
            gains = [a - b for a, b in zip(ours, theirs, strict=True)]
            published, baseline = cell.paper[0], reference.paper[0]
            paper = "-" if published is None or baseline is None else f"{published - baseline:+.1f}"
            line += [
                spread(ours),
                "-" if cell == reference else spread(gains),
                "-" if cell == reference else paper,
            ]
        times = [
            [metrics["seconds_per_step"] for row in rows for metrics in results[row]]
            for rows in (cells, base)
        ]
        lines.append([*line, f"{statistics.median(times[0]) / statistics.median(times[1]):.2f}"])
    body = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    count = f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''}, each with labels of its own: mean (lowest to highest)"
    return f"### {table.title}\n\n{body}\n\n{count}; the paper's columns are its differences. {table.note}".strip()
