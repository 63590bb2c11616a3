"""Table 1 of SDS-CLIP and its variants on drawn scenes: a small CLIP, fine-tuned with and without sd-tiny.

The vanilla model of each seed is trained from scratch with our `clip` recipe on scenes that no other set contains. All
other models are fine-tuned from it on further scenes. There are two sets of data with different seeds: hyperparameters
are chosen on `validation`, the tables report `test`.
"""

import concurrent.futures
from collections.abc import Sequence
from pathlib import Path

from scripts.papers.clip_td import command, train_all
from scripts.papers.tables import Results, Row, Table, set_flags, spread

FOLDER, HOME, CACHES = Path("runs/reproduce/sds_clip"), Path("data/sds_clip"), Path("caches/sds_clip")
SIZE, PRETRAIN, PAIRS, QUESTIONS = 64, 8000, 4000, 400  # pixels; numbers of scenes; examples per question set
VANILLA_STEPS, VANILLA_BATCH, MODEL = 1000, 64, "vit-tiny-long"
STEPS, BATCH = 300, 32
WORLDS = {"test": (4, 1), "validation": (5, 2)}  # seeds of the pairs and of the questions
TEACHER, FEATURE = "sd-tiny", "unet_features:100+out"
USUAL = {"lr": "0.001", "sds_weight": "1"}  # defaults of the sweep; the paper uses 5e-5 and 0.001
CHOSEN = USUAL | {"t_max": "500"}  # the best Winoground score of the sweep
NONE = {"objective": "none"}
METHODS: dict[str, dict[str, str]] = {
    "vanilla CLIP": {},
    "FT, L_CLIP": NONE,
    "FT, L_CLIP + L_SDS": {},
    "FT, L_CLIP + L_SDS, grad=sds": {"grad": "sds"},
    "FT, L_CLIP + features (Eq. 6)": {"objective": "features"},
    "full FT, L_CLIP": NONE | {"train": "all"},
    "diffusion score (Eq. 2)": {},
}
SWEEP: dict[str, dict[str, str]] = {
    **{f"L_CLIP, lr={lr}": NONE | {"lr": lr} for lr in ("0.00005", "0.0003", "0.001", "0.003")},
    **{f"L_SDS, lam={lam}": {"sds_weight": lam} for lam in ("0.001", "0.1", "1", "10", "100")},
    "full, L_CLIP": NONE | {"train": "all"},
    **{f"full, L_SDS, lam={lam}": {"train": "all", "sds_weight": lam} for lam in ("1", "10", "100")},
    "L_SDS, t in 0 to 500": {"t_max": "500"},
    "L_SDS, t in 0 to 500, lam=3": {"t_max": "500", "sds_weight": "3"},
    "L_SDS, t in 0 to 500, lam=10": {"t_max": "500", "sds_weight": "10"},
    "L_SDS, t in 300 to 1000": {"t_min": "300"},
    "L_SDS, h_w to unit variance": {"latent_init": "unit"},
}
PAPER = {  # table 1, ViT-B/16, percent
    "vanilla CLIP": (24, 28, 18, 57, 29, 11, 57, 52, 62),
    "FT, L_CLIP": (23, 27, 19, 56, 30, 11, 56, 51, 62),
    "FT, L_CLIP + L_SDS": (31, 35, 25, 69, 36, 16, 58, 53.5, 63),
}
COLUMNS = (
    ("Winoground", "text_score"),
    ("object", "text_score/object"),
    ("relation", "text_score/relation"),
    ("both", "text_score/both"),
    ("1 pred", "text_score/1_pred"),
    ("2 preds", "text_score/2_preds"),
    ("ARO", "aro_overall"),
    ("relation", "relation_macro"),
    ("attribution", "attribution_macro"),
    ("COCO-order", "coco_order"),
    ("Flickr-order", "flickr_order"),
    ("zero-shot", "acc1"),
)


def rows(world: str, names: Sequence[str]) -> tuple[Row, ...]:
    """Return a row per method."""
    return tuple(Row(name, (("world", world), ("method", name)), (None, None, None)) for name in names)


TABLES = {
    "table1": Table("Winoground- and ARO-shaped scenes (table 1)", rows("test", tuple(METHODS)), reference=1),
    "sweep": Table(
        "What was tried, on the validation sets", rows("validation", ("vanilla CLIP", *SWEEP)), reference=0
    ),
}


# ----------------------------------------------------------------------------------------------------
# Runs


def argv(row: Row, seed: int) -> list[str]:
    """Return the arguments of `student train` without --out, or `--model MODEL` for an existing model."""
    names = row.names()
    world, method = names["world"], names["method"]
    if method == "vanilla CLIP":
        return ["--model", str(vanilla(seed)), "--data", str(HOME / world)]
    if method == "diffusion score (Eq. 2)":
        return ["--model", TEACHER, "--data", str(HOME / world)]
    values = CHOSEN | METHODS[method] if method in METHODS else USUAL | SWEEP[method]
    lr = values.pop("lr")
    settings = [f"init={vanilla(seed)}", f"optim.lr={lr}", "run.save_every=1000000", "run.workers=0"]
    settings += [f"{name}={value}" for name, value in values.items()]
    sizes = ["--steps", str(STEPS), "--batch-size", str(BATCH), "--seed", str(seed)]
    paths = ["--data", str(HOME / world / "pairs"), "--cache", str(CACHES / world)]
    return ["--recipe", "sds_clip", *paths, *sizes, *set_flags(settings)]


def evaluations(argv: Sequence[str]) -> list[list[str]]:
    """Return the arguments of each `student eval` after the model. A diffusion model has no zero-shot task."""
    world = next(HOME / world for world in WORLDS if str(HOME / world) in argv[argv.index("--data") + 1])
    matching = [["--task", task, "--data", str(world / task)] for task in ("winoground", "aro")]
    return (
        matching if TEACHER in argv else [*matching, ["--task", "zeroshot", "--data", str(world / "pairs")]]
    )


def seeds_of(row: Row, seeds: Sequence[int]) -> Sequence[int]:
    """Return the seeds of a row: only one for sd-tiny, which was trained once."""
    return seeds[:1] if "diffusion" in row.label else seeds


def vanilla(seed: int) -> Path:
    """Return the folder of the vanilla CLIP of a seed."""
    return FOLDER / f"vanilla-seed{seed}"


def prepare(rows: Sequence[Row], seeds: Sequence[int], jobs: int) -> None:
    """Make the missing scenes, questions, vanilla CLIPs and caches."""
    pretrain, worlds = HOME / "pretrain", {row.names()["world"] for row in rows}
    drawn = {pretrain: ("scenes", PRETRAIN, 3)}
    for world in worlds:
        pairs, questions = WORLDS[world]
        drawn[HOME / world / "pairs"] = ("scenes", PAIRS, pairs)
        drawn[HOME / world / "questions"] = ("scene_winoground_aro", QUESTIONS, questions)
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda out: draw(out, *drawn[out]), [out for out in drawn if not out.exists()]))
    for world in worlds:
        for task in ("winoground", "aro"):
            link = HOME / world / task
            if not link.is_symlink():
                link.symlink_to(Path("questions", task))
    settings = [f"model={MODEL}", "run.workers=0", "run.save_every=1000000"]
    sizes = ["--steps", str(VANILLA_STEPS), "--batch-size", str(VANILLA_BATCH)]
    start = ["--recipe", "clip", "--data", str(pretrain), *sizes, *set_flags(settings)]
    train_all({vanilla(seed): [*start, "--seed", str(seed)] for seed in seeds}, jobs)
    for world in worlds:
        outputs = ["text_states", "latents"] + ([FEATURE] if world == "test" else [])
        paths = ["--data", str(HOME / world / "pairs"), "--out", str(CACHES / world / "sd-tiny.zarr")]
        command("teachercache", "build", "--teacher", TEACHER, "--outputs", ",".join(outputs), *paths)


def draw(out: Path, script: str, num: int, seed: int) -> None:
    """Draw a set of scenes or of questions about scenes."""
    out.parent.mkdir(parents=True, exist_ok=True)
    sizes = ["--num", str(num), "--seed", str(seed), "--size", str(SIZE)]
    command(f"scripts.datasets.{script}", "--out", str(out), *sizes)


# ----------------------------------------------------------------------------------------------------
# Tables


def section(table: Table, results: Results, seeds: Sequence[int]) -> str:
    """Return Markdown with a line per method, followed by our differences to the reference and the paper's.

    Our differences are paired by seed.
    """
    lines = [["", *(name for name, _ in COLUMNS), "ms a match"], ["---"] * (len(COLUMNS) + 2)]
    base = table.rows[table.reference]
    for row in table.rows:
        runs = results[row]
        cost = f"{min(1000 * metrics['seconds_per_match'] for metrics in runs):.2g}"
        lines.append([row.label, *(cell([metrics.get(key) for metrics in runs]) for _, key in COLUMNS), cost])
        if row != base and len(runs) == len(results[base]):
            pairs = list(zip(runs, results[base], strict=True))
            lines.append(
                ["- to reference", *(cell([a[key] - b[key] for a, b in pairs]) for _, key in COLUMNS), ""]
            )
        if row != base and {row.label, base.label} <= PAPER.keys():
            gains = [f"{a - b:g}" for a, b in zip(PAPER[row.label], PAPER[base.label], strict=True)]
            lines.append(["- to reference, paper", *gains, *[""] * (len(COLUMNS) + 1 - len(gains))])
    body = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    count = f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''}: mean (lowest to highest), percent"
    chance = "Chance is 25 in Winoground's columns, 50 in ARO's, 20 in the orders'"
    return f"### {table.title}\n\n{body}\n\n{count}; the reference is {base.label}. {chance}. {table.note}".strip()


def cell(values: Sequence[float | None]) -> str:
    """Format the mean and range in percent, or a dash if the model lacks the metric."""
    present = [100 * value for value in values if value is not None]
    return spread(present) if len(present) == len(values) else "-"
