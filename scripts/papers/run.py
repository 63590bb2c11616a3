"""A paper's tables at laptop scale, its numbers beside ours over several seeds, written into docs/RESULTS.md.

    python -m scripts.papers.run clip_kd --table fd_weight    one table
    python -m scripts.papers.run clip_kd                      all of them

A run is trained and measured by the commands that a user types, in worker processes, one for each core: starting one
takes as long as a small run. What is there already under runs/reproduce is not run again: the same command goes on
after a stop.
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
from scripts.papers import clip_kd as reproduce_clip_kd
from scripts.papers import clip_td as reproduce_clip_td
from scripts.papers import psd as reproduce_psd
from scripts.papers import sds_clip as reproduce_sds_clip
from scripts.papers import vlkd as reproduce_vlkd
from scripts.papers.tables import METRICS, Row, Table, spread
from teachercache.core.paths import write_whole
from teachercache.core.progress import say, ticker

# Each has TABLES and words(row, seed); where clip_kd's do not fit also evaluations, prepare, seeds_of and section
PAPERS = {
    "clip_kd": reproduce_clip_kd,
    "clip_td": reproduce_clip_td,
    "psd": reproduce_psd,
    "sds_clip": reproduce_sds_clip,
    "vlkd": reproduce_vlkd,
}
TASKS = [["--task", task] for task in sorted({metric.task for metric in METRICS})]
RESULTS = Path("docs/RESULTS.md")
Results = dict[Row, list[dict[str, float]]]  # of each seed


def main() -> int:
    """Run what is missing, write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("paper", choices=sorted(PAPERS))
    parser.add_argument("--table", nargs="+", default=[], help="names; default all of the paper's")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=cores(), help="runs at a time, one core each")
    options = parser.parse_args()
    paper = PAPERS[options.paper]
    unknown = sorted(set(options.table) - set(paper.TABLES))
    if unknown:
        parser.error(f"no table {', '.join(unknown)}: choose from {', '.join(paper.TABLES)}")
    tables = {name: paper.TABLES[name] for name in options.table or paper.TABLES}
    if hasattr(paper, "prepare"):
        paper.prepare([row for table in tables.values() for row in table.rows], options.seeds, options.jobs)
    seeds_of = getattr(paper, "seeds_of", lambda row, seeds: seeds)
    folders = {
        folder_of(options.paper, row, seed): paper.words(row, seed)
        for table in tables.values()
        for row in table.rows
        for seed in seeds_of(row, options.seeds)
    }
    run_missing(options.paper, folders, options.jobs)
    for name, table in tables.items():
        results = {
            row: [
                result_of(folder_of(options.paper, row, seed), paper.words(row, seed))
                for seed in seeds_of(row, options.seeds)
            ]
            for row in table.rows
        }
        text = getattr(paper, "section", section)(table, results, options.seeds)
        print(text, end="\n\n")
        replace_section(f"{options.paper} {name}", text)
    say(f"written to {RESULTS}")
    return 0


# ----------------------------------------------------------------------------------------------------
# Runs


def folder_of(paper: str, row: Row, seed: int) -> Path:
    """Where a run lies: rows of several tables that are one setting share it."""
    settings = "-".join(
        f"{name}={value if isinstance(value, str) else f'{value:g}'}" for name, value in row.settings
    )
    settings = re.sub(r"[^\w.=+-]+", "_", settings)
    return Path("runs/reproduce", paper, f"{settings or 'paper'}-seed{seed}")


def result_of(folder: Path, words: Sequence[str]) -> dict[str, float] | None:
    """Metrics of a run that is there; None where it is not, or was another command."""
    path = folder / "result.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    return found["metrics"] if found.get("words") == list(words) else None


def run_missing(paper: str, folders: Mapping[Path, Sequence[str]], jobs: int) -> None:
    """Every run that has no result yet, `jobs` at a time."""
    missing = {folder: words for folder, words in folders.items() if result_of(folder, words) is None}
    say(f"{len(folders) - len(missing)} of {len(folders)} runs are there")
    os.environ["OMP_NUM_THREADS"] = "1"
    fresh = multiprocessing.get_context("spawn")
    with (
        ticker(len(missing), "runs", paper) as tick,
        concurrent.futures.ProcessPoolExecutor(min(jobs, len(missing) or 1), mp_context=fresh) as pool,
    ):
        evaluations = getattr(PAPERS[paper], "evaluations", lambda words: TASKS)
        waiting = {
            pool.submit(run_one, folder, words, evaluations(words)): folder
            for folder, words in missing.items()
        }
        try:
            for done in concurrent.futures.as_completed(waiting):
                if last := done.result():
                    sys.exit(f"error: {waiting[done]}: {last}")
                tick.step(1, str(waiting[done].name))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


Evaluations = Sequence[Sequence[str]] | Mapping[str, Sequence[str]]


def run_one(folder: Path, words: Sequence[str], evaluations: Evaluations = TASKS) -> str:
    """`student train` and each `student eval`; the last line where one fails.

    Weights are left behind, numbers and curves are kept. With the words `--model MODEL` that is measured, untrained.
    Evaluations with names have them before their metrics, and `other/` before those of a second model.
    """
    from student.cli import main as student

    folder.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=folder.parent) as inner,
        contextlib.redirect_stderr(io.StringIO()) as said,
    ):
        run, metrics = Path(inner, "run"), {}
        trained = words[0] != "--model"
        model = str(run) if trained else words[1]
        named = (
            evaluations.items() if isinstance(evaluations, Mapping) else [("", one) for one in evaluations]
        )
        commands = [("", ["train", *words, "--out", str(run)])] if trained else []
        commands += [(name, ["eval", model, *one, "--json"]) for name, one in named]
        for name, command in commands:
            with contextlib.redirect_stdout(io.StringIO()) as text:
                if student(command):
                    return (said.getvalue().strip().splitlines() or ["?"])[-1]
            for n, line in enumerate(text.getvalue().splitlines() if command[0] == "eval" else []):
                before = "".join(f"{part}/" for part in (name, "other" if n else "") if part)
                metrics |= {before + key: value for key, value in json.loads(line)["metrics"].items()}
        if trained:
            metrics |= json.loads((run / "speed.json").read_text())
            shutil.rmtree(run / "checkpoints")
            (run / "model.safetensors").unlink()
        run.mkdir(exist_ok=True)
        write_whole(run / "result.json", json.dumps({"words": words, "metrics": metrics}) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        run.rename(folder)
    return ""


# ----------------------------------------------------------------------------------------------------
# Tables


def section(table: Table, results: Results, seeds: Sequence[int]) -> str:
    """Markdown: a row per setting; paper, ours, and both's difference to the reference row, paired by seed."""
    reference = table.rows[table.reference]
    head = [
        "",
        *(f"{metric.theirs}, paper" for metric in METRICS if any_paper(table, metric.place)),
        *(f"{metric.ours}, here" for metric in METRICS),
        "paper's difference",
        "ours",
        "same sign",
    ]
    lines = [head, ["---"] * len(head)]
    for row in table.rows:
        theirs = [number(row.paper[m.place]) for m in METRICS if any_paper(table, m.place)]
        ours = [spread([100 * result[metric.key] for result in results[row]]) for metric in METRICS]
        lines.append([f"`{row.label}`", *theirs, *ours, *difference(row, reference, results)])
    agreement = (
        f"Pairs of rows that zero-shot top-1 orders as the paper's top-1 does: {order(table, results)}."
    )
    seeds_text = f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''}: mean (lowest to highest)"
    body = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    title = f"### {table.title}"
    return f"{title}\n\n{body}\n\n{seeds_text}; differences to `{reference.label}`. {agreement} {table.note}".strip()


def any_paper(table: Table, place: int) -> bool:
    """Whether the paper has that column."""
    return any(row.paper[place] is not None for row in table.rows)


def number(value: float | None) -> str:
    """A paper's figure."""
    return "-" if value is None else f"{value:g}"


def difference(row: Row, reference: Row, results: Results) -> list[str]:
    """Top-1 less the reference's, the paper's and ours seed by seed, and whether their signs agree."""
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
    """`k of n`, pairs that the paper ties left out."""
    known = [row for row in table.rows if row.paper[0] is not None]
    key, pairs = METRICS[0].key, 0
    agreeing = 0
    for a, b in itertools.combinations(known, 2):
        theirs = a.paper[0] - b.paper[0]
        ours = statistics.mean(r[key] for r in results[a]) - statistics.mean(r[key] for r in results[b])
        pairs += theirs != 0
        agreeing += theirs * ours > 0
    return f"{agreeing} of {pairs}"


def replace_section(name: str, text: str) -> None:
    """Put a table between its two marks in docs/RESULTS.md."""
    begin, end = f"<!-- {name}: scripts/reproduce -->", f"<!-- end of {name} -->"
    content = RESULTS.read_text()
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    if not pattern.search(content):
        sys.exit(f"error: {RESULTS} has no marks for the table: add the lines {begin} and {end}")
    write_whole(RESULTS, pattern.sub(lambda _: f"{begin}\n{text}\n{end}", content))


if __name__ == "__main__":
    sys.exit(main())
