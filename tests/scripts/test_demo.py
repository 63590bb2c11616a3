"""The demo: its stages, times, table and the other recipes, with commands that are only written down."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import demo, demo_others, demo_table
from scripts.benchmarks import demo as bench_demo

ROOT = Path(__file__).parents[2]

METRICS = dict.fromkeys(demo_table.ROWS.values(), 0.5)
SIZES = {"num_images": 500, "num_texts": 772, "num_classes": 25}


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """An empty folder, and the commands that the demo runs in it."""
    monkeypatch.chdir(tmp_path)
    seen: list[str] = []
    monkeypatch.setattr(demo, "command", lambda *words: seen.append(" ".join(map(str, words))))
    monkeypatch.setattr(demo_table, "show_table", lambda seeds: seen.append(f"table {seeds}"))
    monkeypatch.setattr(demo_others, "main", lambda: seen.append("others"))
    Path("data/demo").mkdir(parents=True)
    return seen


def run(monkeypatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["demo", *words])
    return demo.main()


BUILD = "tc build --teacher clip-lite --data data/demo"
FIRST = [f"{BUILD} --limit 1000", "tc search caches/demo/clip-lite.zarr a bird on a branch --top 5"]
SEARCH = [BUILD, FIRST[1]]
LOOK = [BUILD, "tc analyze caches/demo/clip-lite.zarr"]
DISTIL = [
    BUILD,
    "table [0]",
    "tc build --teacher runs/demo/clip_kd-seed0 --data data/demo --out caches/demo/clip_kd.zarr",
    "tc analyze caches/demo/clip-lite.zarr --against caches/demo/clip_kd.zarr",
]


def touch(*paths: str) -> None:
    for path in map(Path, paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def make_caches() -> None:
    touch("caches/demo/clip-lite.zarr/zarr.json", "caches/demo/clip_kd.zarr/zarr.json")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((), [*FIRST, *LOOK, *DISTIL]),
        (("look", "search"), [*FIRST, *LOOK]),
        (("--all",), [*FIRST, *LOOK, *DISTIL, "others"]),
    ],
)
def test_stages_run_in_their_order(calls, monkeypatch, capsys, words, expected):
    assert run(monkeypatch, *words) == 0
    assert calls == expected
    printed = capsys.readouterr()
    assert "open tc serve caches/demo/clip-lite.zarr" in printed.err
    (call,) = json.loads(Path("runs/demo/times.json").read_text())
    assert list(call["seconds"]) == [line.split()[0] for line in printed.out.splitlines()[2:-1]]


def test_every_call_keeps_its_times(calls, monkeypatch):
    for started in ("first", "second"):
        demo.keep_times(started, {"search": 1.0})
        demo.keep_times(started, {"search": 1.0, "look": 2.0})
    kept = json.loads(Path("runs/demo/times.json").read_text())
    assert [(call["started"], call["seconds"]) for call in kept] == [
        (started, {"search": 1.0, "look": 2.0}) for started in ("first", "second")
    ]


def test_a_report_is_written_again_only_for_a_newer_cache(calls, monkeypatch):
    make_caches()
    touch("caches/demo/clip-lite.report/report.html", "caches/demo/clip-lite-clip_kd.report/report.html")
    assert run(monkeypatch) == 0
    assert calls == [*SEARCH, BUILD, *DISTIL[:3]]
    calls.clear()
    newer = Path("caches/demo/clip-lite-clip_kd.report/report.html").stat().st_mtime + 5
    os.utime("caches/demo/clip_kd.zarr/zarr.json", (newer, newer))
    assert run(monkeypatch) == 0
    assert calls == [*SEARCH, BUILD, *DISTIL]


def test_an_unknown_stage_names_the_others(calls, monkeypatch, capsys):
    with pytest.raises(SystemExit) as left:
        run(monkeypatch, "serch")
    assert left.value.code == 2
    assert "no stage serch: choose from search, look, distil, others" in capsys.readouterr().err


def test_a_failed_command_ends_the_demo(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as left:
        demo.command("tc", "info", "nothing.zarr")
    assert left.value.code == 2
    assert capsys.readouterr().err.startswith("$ tc info nothing.zarr\n")


# --- the table ---------------------------------------------------------------------------------


def keep_results(model: Path, **changed: float) -> None:
    for task in demo_table.TASKS:
        path = demo_table.result_file(model, task)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"metrics": METRICS | SIZES | changed}))


def keep_run(run: Path, steps: int, batch: int) -> None:
    run.mkdir(parents=True, exist_ok=True)
    (run / "run.json").write_text(json.dumps({"recipe": {"steps": steps, "batch": batch}}))


def test_finished_runs_make_the_table_without_training(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    keep_results(demo_table.TEACHER, acc1=0.9)
    for recipe, value in (("clip", 0.1), ("clip_kd", 0.3)):
        for seed in (0, 1):
            run = demo_table.folder(recipe, seed)
            keep_run(run, demo_table.STEPS, demo_table.BATCH)
            keep_results(run, acc1=value + seed / 10)
    text = demo_table.show_table([0, 1])
    row = "| zero-shot top-1 | 0.150 (0.100 to 0.200) | 0.350 (0.300 to 0.400) | 0.900 |"
    assert row in text.splitlines()
    assert capsys.readouterr().out == text + "\n"
    Path("page.md").write_text(f"before\n{demo_table.BEGIN}\nold\n{demo_table.END}\nafter\n")
    demo_table.replace_table(Path("page.md"), text)
    assert Path("page.md").read_text() == f"before\n{demo_table.BEGIN}\n{text}\n{demo_table.END}\nafter\n"


def test_runs_with_other_settings_are_not_shown(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = demo_table.folder("clip", 0)
    keep_run(run, demo_table.STEPS + 1, demo_table.BATCH)
    keep_results(run)
    with pytest.raises(SystemExit, match="runs/demo/clip-seed0 is a run with other settings: remove it"):
        demo_table.is_done(run)


def test_a_failed_training_ends_with_its_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    error = demo_table.make_one(demo_table.folder("clip_kd", 0))
    assert error.startswith("error: ")
    assert "data/demo" in error


def test_a_worker_ends_when_the_demo_is_killed():
    """A trainer without its parent would hold the lock of its run, and the next call would be refused."""
    worker = "import os, time; from scripts.demo_table import end_with; end_with(os.getppid()); print(os.getpid(), flush=True); time.sleep(60)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {worker!r}])"
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert re.fullmatch(r"\d+", process.stdout.readline().strip())
    process.kill()
    assert process.stdout.read() == ""  # ends only when the worker, which shares the pipe, is gone
    process.wait()
    process.stdout.close()


# --- the other recipes -------------------------------------------------------------------------


def test_each_recipe_is_measured_beside_its_baseline(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    trained: list[str] = []
    monkeypatch.setattr(demo_others, "call", lambda main, *words: trained.append(" ".join(map(str, words))))
    for name in ("questions", "compositions", "captions", "noisy_pairs"):
        assert any(comparison.prepare.__name__ == name for comparison in demo_others.COMPARISONS)

    def measured(run: Path, task: str, data: str) -> list[dict]:
        (metric,) = {c.metric for c in demo_others.COMPARISONS if c.task == task}
        return [{"metrics": {metric: 0.25 if run.name.endswith(("baseline", "-clip")) else 0.75}}]

    monkeypatch.setattr(demo_others.api, "evaluate", measured)
    chosen = [
        demo_others.Comparison(**{**vars(comparison), "prepare": lambda: None})
        for comparison in demo_others.COMPARISONS
    ]
    monkeypatch.setattr(demo_others, "COMPARISONS", chosen)
    demo_others.main()
    table = capsys.readouterr().out
    assert "| `clip_td` | vcr, q2a | `distill_weight=0` | 0.250 | 0.750 |" in table
    assert "| `psd` | zeroshot, acc1 | `clip` | 0.250 | 0.750 |" in table
    assert [line.split()[3] for line in trained] == ["clip_td"] * 2 + ["sds_clip"] * 2 + ["vlkd"] * 2 + [
        "clip",
        "psd",
    ]
    demo_others.main()
    assert capsys.readouterr().out == table
    assert len(trained) == 8  # nothing is trained twice


def test_the_figures_of_the_readme_are_those_of_the_newest_report():
    report = max((ROOT / "docs" / "benchmarks").glob("demo_*.md")).read_text()
    (line,) = re.findall(r"^On two CPU cores .*$", report, re.MULTILINE)
    assert line in " ".join((ROOT / "README.md").read_text().split())


def test_the_report_of_times():
    runs = [{"search": 40.0, "all": 250.0, "again": 15.4}, {"search": 46.0, "all": 260.0, "again": 16.0}]
    assert bench_demo.sentence(runs) == (
        "On two CPU cores the first search result took 43 s (40 to 46), all three stages took 255 s (250 to 260), "
        "a second run took 16 s (15 to 16)."
    )
    assert bench_demo.table(runs)[-1] == "| bar | 120 s | 480 s | 40 s |"
