"""Reproduce tables of a paper at laptop scale over several seeds and write them to docs/RESULTS.md.

    python -m scripts.papers.run clip_kd --table fd_weight    one table
    python -m scripts.papers.run clip_kd                      all tables

Each run is trained and evaluated with the commands of the project, in one worker process per core: starting a process
takes as long as a small run. Finished runs under runs/reproduce are reused, so an interrupted command can be repeated.
"""

import argparse
import concurrent.futures
import contextlib
import io
import itertools
import json
import multiprocessing
import os
import re
import shutil
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from scripts.benchmarks.report import cores
from scripts.papers import clip_kd, clip_td, psd, sds_clip, vlkd
from scripts.papers.tables import METRICS, TASKS, Evaluations, Metric, Paper, Results, Row, Table, spread
from teachercache.core.paths import write_whole
from teachercache.core.progress import say, ticker

RESULTS = Path("docs/RESULTS.md")


def main() -> int:
    """Run the missing rows and write the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("paper", choices=sorted(PAPERS))
    parser.add_argument("--table", nargs="+", default=[], help="names of tables (default: all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=cores(), help="number of parallel runs, one core each")
    options = parser.parse_args()
    paper = PAPERS[options.paper]
    unknown = sorted(set(options.table) - set(paper.tables))
    if unknown:
        parser.error(f"no table {', '.join(unknown)}: choose from {', '.join(paper.tables)}")
    tables = {name: paper.tables[name] for name in options.table or paper.tables}
    paper.prepare([row for table in tables.values() for row in table.rows], options.seeds, options.jobs)
    folders = {
        folder_of(options.paper, row, seed): paper.argv(row, seed)
        for table in tables.values()
        for row in table.rows
        for seed in paper.seeds_of(row, options.seeds)
    }
    run_missing(options.paper, folders, options.jobs)
    for name, table in tables.items():
        results: dict[Row, list[dict[str, float]]] = {row: [] for row in table.rows}
        for row in table.rows:
            for seed in paper.seeds_of(row, options.seeds):
                metrics = result_of(folder_of(options.paper, row, seed), paper.argv(row, seed))
                assert metrics is not None, row
                results[row].append(metrics)
        text = paper.section(table, results, options.seeds)
        print(text, end="\n\n")
        replace_section(f"{options.paper} {name}", text)
    say(f"written to {RESULTS}")
    return 0


# ----------------------------------------------------------------------------------------------------
# Runs


def folder_of(paper: str, row: Row, seed: int) -> Path:
    """Return the folder of a run. Rows of different tables with the same settings share it."""
    settings = "-".join(
        f"{name}={value if isinstance(value, str) else f'{value:g}'}" for name, value in row.settings
    )
    settings = re.sub(r"[^\w.=+-]+", "_", settings)
    return Path("runs/reproduce", paper, f"{settings or 'paper'}-seed{seed}")


def result_of(folder: Path, argv: Sequence[str]) -> dict[str, float] | None:
    """Return the metrics of a finished run, or None if it is missing or has other arguments."""
    path = folder / "result.json"
    result = json.loads(path.read_text()) if path.exists() else {}
    return result["metrics"] if result.get("words") == list(argv) else None


def run_missing(paper: str, folders: Mapping[Path, Sequence[str]], jobs: int) -> None:
    """Run every folder without a result, `jobs` at a time."""
    missing = {folder: argv for folder, argv in folders.items() if result_of(folder, argv) is None}
    say(f"{len(folders) - len(missing)} of {len(folders)} runs are finished")
    os.environ["OMP_NUM_THREADS"] = "1"
    fresh = multiprocessing.get_context("spawn")
    with (
        ticker(len(missing), "runs", paper) as tick,
        concurrent.futures.ProcessPoolExecutor(min(jobs, len(missing) or 1), mp_context=fresh) as pool,
    ):
        waiting = {
            pool.submit(run_one, folder, argv, PAPERS[paper].evaluations(argv)): folder
            for folder, argv in missing.items()
        }
        try:
            for done in concurrent.futures.as_completed(waiting):
                if error := done.result():
                    sys.exit(f"error: {waiting[done]}: {error}")
                tick.step(1, str(waiting[done].name))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def run_one(folder: Path, argv: Sequence[str], evaluations: Evaluations = TASKS) -> str:
    """Train and evaluate one run. Numbers and curves are kept, weights are deleted.

    Args:
        folder: folder of the run.
        argv: arguments of `student train`, or `--model MODEL` to evaluate an existing model.
        evaluations: arguments of each `student eval` after the model. The name of a named evaluation is a prefix of its
            metrics; `other/` is an additional prefix for the metrics of a second model.

    Returns:
        The last line of the error output if a command fails, otherwise "".
    """
    from student.cli import main as student

    folder.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=folder.parent) as inner,
        contextlib.redirect_stderr(io.StringIO()) as errors,
    ):
        run = Path(inner, "run")
        metrics: dict[str, float] = {}
        trained = argv[0] != "--model"
        model = str(run) if trained else argv[1]
        named = (
            evaluations.items() if isinstance(evaluations, Mapping) else [("", each) for each in evaluations]
        )
        commands = [("", ["train", *argv, "--out", str(run)])] if trained else []
        commands += [(name, ["eval", model, *options, "--json"]) for name, options in named]
        for name, command in commands:
            with contextlib.redirect_stdout(io.StringIO()) as output:
                if student(command):
                    return (errors.getvalue().strip().splitlines() or ["?"])[-1]
            results = json.loads(output.getvalue())["results"] if command[0] == "eval" else []
            for n, result in enumerate(results):
                prefix = "".join(f"{level}/" for level in (name, "other" if n else "") if level)
                metrics |= {prefix + key: value for key, value in result["metrics"].items()}
        if trained:
            metrics |= json.loads((run / "speed.json").read_text())
            shutil.rmtree(run / "checkpoints")
            (run / "model.safetensors").unlink()
        run.mkdir(exist_ok=True)
        write_whole(run / "result.json", json.dumps({"words": argv, "metrics": metrics}) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        run.rename(folder)
    return ""


# ----------------------------------------------------------------------------------------------------
# Tables


def section(table: Table, results: Results, seeds: Sequence[int]) -> str:
    """Return Markdown with a row per setting: the paper's numbers, ours, and the differences to the reference row.

    Our differences are paired by seed.
    """
    reference = table.rows[table.reference]
    head = [
        "",
        *(f"{metric.theirs}, paper" for metric in METRICS if any_paper(table, metric)),
        *(f"{metric.ours}, here" for metric in METRICS),
        "paper's difference",
        "ours",
        "same sign",
    ]
    lines = [head, ["---"] * len(head)]
    for row in table.rows:
        theirs = [number(row.paper[metric.column]) for metric in METRICS if any_paper(table, metric)]
        ours = [spread([100 * metrics[metric.key] for metrics in results[row]]) for metric in METRICS]
        lines.append([f"`{row.label}`", *theirs, *ours, *difference(row, reference, results)])
    agreement = (
        f"Pairs of rows that zero-shot top-1 orders as the paper's top-1 does: {order(table, results)}."
    )
    seeds_text = f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''}: mean (lowest to highest)"
    body = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    title = f"### {table.title}"
    return f"{title}\n\n{body}\n\n{seeds_text}; differences to `{reference.label}`. {agreement} {table.note}".strip()


def any_paper(table: Table, metric: Metric) -> bool:
    """Return whether the paper reports the metric for any row."""
    return any(row.paper[metric.column] is not None for row in table.rows)


def number(value: float | None) -> str:
    """Format a number of the paper."""
    return "-" if value is None else f"{value:g}"


def difference(row: Row, reference: Row, results: Results) -> list[str]:
    """Return the differences of top-1 to the reference row: the paper's, ours by seed, and whether the signs agree."""
    if row == reference:
        return ["-", "-", "-"]
    key = METRICS[0].key
    ours = [100 * (a[key] - b[key]) for a, b in zip(results[row], results[reference], strict=True)]
    if row.paper[0] is None or reference.paper[0] is None:
        return ["-", spread(ours), "-"]
    theirs = row.paper[0] - reference.paper[0]
    clear = min(ours) > 0 or max(ours) < 0
    same = theirs * statistics.mean(ours) > 0
    return [f"{theirs:+.1f}", spread(ours), ("yes" if same else "no") + ("" if clear else ", within noise")]


def order(table: Table, results: Results) -> str:
    """Return "k of n" pairs of rows with the same order here and in the paper. Ties in the paper are excluded."""
    published = [(row, row.paper[0]) for row in table.rows if row.paper[0] is not None]
    key, pairs = METRICS[0].key, 0
    agreeing = 0
    for (a, paper_a), (b, paper_b) in itertools.combinations(published, 2):
        theirs = paper_a - paper_b
        ours = statistics.mean(r[key] for r in results[a]) - statistics.mean(r[key] for r in results[b])
        pairs += theirs != 0
        agreeing += theirs * ours > 0
    return f"{agreeing} of {pairs}"


def replace_section(name: str, text: str) -> None:
    """Replace the table between its two marks in docs/RESULTS.md."""
    begin, end = f"<!-- {name}: scripts/reproduce -->", f"<!-- end of {name} -->"
    content = RESULTS.read_text()
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    if not pattern.search(content):
        sys.exit(f"error: {RESULTS} has no marks for the table: add the lines {begin} and {end}")
    write_whole(RESULTS, pattern.sub(lambda _: f"{begin}\n{text}\n{end}", content))


PAPERS = {
    "clip_kd": Paper(clip_kd.TABLES, clip_kd.argv, section),
    "clip_td": Paper(
        clip_td.TABLES,
        clip_td.argv,
        clip_td.section,
        evaluations=clip_td.evaluations,
        prepare=clip_td.prepare,
    ),
    "psd": Paper(psd.TABLES, psd.argv, psd.section, evaluations=psd.evaluations, prepare=psd.prepare),
    "sds_clip": Paper(
        sds_clip.TABLES,
        sds_clip.argv,
        sds_clip.section,
        evaluations=sds_clip.evaluations,
        prepare=sds_clip.prepare,
        seeds_of=sds_clip.seeds_of,
    ),
    "vlkd": Paper(vlkd.TABLES, vlkd.argv, vlkd.section, evaluations=vlkd.evaluations, prepare=vlkd.prepare),
}


if __name__ == "__main__":
    sys.exit(main())
