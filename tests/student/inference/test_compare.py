"""`student compare`: what the tables hold, by logs written here; and what is no run, or a damaged one, as one line."""

import csv
import json
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image
from small import train_here

from student.cli import main
from student.inference.compare import best_of, compare
from student.training.telemetry.metrics import terms_of
from teachercache.core.digests import write_proved


def write_run(source: Path, folder: Path, *, fd: float = 2000.0, loss: float = 1.0, recipe: str = "") -> Path:
    """Copy a finished run, with other settings, a log of 100 steps that falls to `loss`, and its speed."""
    shutil.copytree(source, folder)
    record = json.loads((folder / "run.json").read_text())
    record["recipe"]["constants"]["fd"] = fd
    record["recipe"]["steps"] = 100
    record["recipe"]["name"] = recipe or record["recipe"]["name"]
    write_proved(folder / "run.json", folder, json.dumps(record))
    lines = []
    for step in range(100):
        task, crd = loss + (99 - step) / 100, 0.5
        lines.append({"step": step, "loss": task + crd, "task": task, "crd": crd, "scale": 14.0, "lr": 1e-3})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_proved(folder / "speed.json", folder, json.dumps({"samples_per_second": 80.5, "data_wait": 0.25}))
    return folder


def measure(folder: Path, task: str = "zeroshot_retrieval", name: str = "", **metrics: object) -> Path:
    (folder / "eval").mkdir(exist_ok=True)
    path = folder / "eval" / f"squares_{name or task}.json"
    write_proved(path, folder, json.dumps({"dataset": "squares", "task": task, "metrics": metrics}))
    return path


@pytest.fixture
def runs(finished_run, tmp_path):
    """Two runs that differ in `fd`, their losses and one of two metrics."""
    first = write_run(finished_run, tmp_path / "first")
    second = write_run(finished_run, tmp_path / "second", fd=1000.0, loss=2.0)
    measure(first, **{"image_retrieval_recall@1": 0.25, "text_retrieval_recall@1": 0.5, "num_images": 10})
    measure(second, **{"image_retrieval_recall@1": 0.75, "text_retrieval_recall@1": 0.5, "num_images": 12})
    return first, second


def rows_of(*folders: Path) -> dict[str, tuple]:
    return {f"{row.part} {row.name}": row.cells for row in compare(folders).rows}


def test_settings_that_differ_and_no_others(runs):
    rows = rows_of(*runs)
    assert {name: cells for name, cells in rows.items() if name.startswith("setting")} == {
        "setting fd": ("2000", "1000")
    }


def test_losses_are_running_means_over_a_fiftieth_of_the_steps(runs):
    rows = rows_of(*runs)
    assert rows["loss task, last"] == (pytest.approx(1.005), pytest.approx(2.005))
    assert rows["loss loss, last"] == (pytest.approx(1.505), pytest.approx(2.505))
    assert rows["loss crd, best"] == (0.5, 0.5)
    assert rows["loss task, best at step"] == (100, 100)
    assert rows["loss lr, last"] == (1e-3, 1e-3)
    assert "loss lr, best" not in rows
    assert rows["run samples_per_second"] == (80.5, 80.5)


def test_the_best_metrics_are_marked_and_counts_are_not(runs, capsys):
    marked = {row.name.split()[-1]: row.best for row in compare(runs).rows if row.part == "metric"}
    assert marked == {"image_retrieval_recall@1": (1,), "text_retrieval_recall@1": (), "num_images": ()}
    assert main(["compare", *map(str, runs)]) == 0
    out, err = capsys.readouterr()
    assert "squares retrieval: T2I R@1 0.2500 0.7500 *" in " ".join(out.split())
    assert "num_images" not in out
    assert err.splitlines()[-1].startswith("next: student compare ")


def test_a_smaller_loss_of_texts_is_better(runs):
    for folder, value in zip(runs, (3.0, 2.0), strict=True):
        measure(folder, "text_loss", nll_per_token=value)
    marked = {row.name: row.best for row in compare(runs).rows}
    assert marked["squares text_loss nll_per_token"] == (1,)


@pytest.mark.parametrize(
    ("cells", "lower", "best"),
    [
        ((0.1, 0.3, 0.3), False, (1, 2)),
        ((0.1, None, 0.3), True, (0,)),
        ((0.1, None), False, ()),
        ((0.3, 0.3), False, ()),
        ((), False, ()),
    ],
)
def test_best_of(cells, lower, best):
    assert best_of(cells, lower=lower) == best


@pytest.mark.parametrize(
    ("lines", "terms"),
    [
        ([{"step": 0, "loss": 3.0, "task": 1.0, "fd": 2.0, "scale": 14.0}], ("task", "fd")),
        ([{"step": 0, "loss": 1.0, "task": 1.0, "fd": 0.0}, {"step": 1, "loss": 3.0, "task": 1.0, "fd": 2.0}], ("task", "fd")),
        ([{"step": 0, "loss": 3e6, "task": 1.0, "fd": 3e6 - 1.1, "lr": 1.0}], ("task", "fd")),  # float32 sums
        ([{"step": 0, "loss": 3.0, "other": 1.0}], ()),
        ([{"step": 0, "loss": 3.0}], ()),
        ([], ()),
    ],
)  # fmt: skip
def test_terms_are_the_values_that_add_up_to_the_loss(lines, terms):
    assert terms_of(lines) == terms


def test_json_and_files(runs, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["compare", *map(str, runs), "--json", "--out", str(out)]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["names"] == ["first", "second"]
    assert {"part": "setting", "name": "fd", "values": ["2000", "1000"], "best": []} in printed["rows"]
    assert printed["files"] == [str(out / f"compare.{ending}") for ending in ("png", "csv", "md")]
    table = list(csv.reader((out / "compare.csv").read_text().splitlines()))
    assert table[0] == ["part", "name", "first", "second"]
    assert ["setting", "fd", "2000", "1000"] in table
    page = (out / "compare.md").read_text()
    assert "| squares retrieval: T2I R@1 | 0.2500 | **0.7500** |" in page
    with Image.open(out / "compare.png") as picture:
        assert picture.size == (1800, 408)  # three panels: loss, task, crd
    assert main(["compare", *map(str, runs), "--out", str(out)]) == 0  # writes them again


def test_curves_lie_where_the_log_says(runs, monkeypatch):
    """The drawn lines, read back from matplotlib."""
    from matplotlib.figure import Figure

    from student.inference import compare_figure

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    comparison = compare(runs)
    compare_figure.draw_curves(comparison.names, comparison.runs)
    (figure,) = figures
    panels = {axis.get_title(): axis.get_lines() for axis in figure.axes}
    assert list(panels) == ["loss", "task", "crd"]
    raw_first, mean_first, raw_second, _ = panels["task"]
    assert (raw_first.get_xdata()[0], raw_first.get_ydata()[0]) == (1, pytest.approx(1.99))
    assert raw_second.get_ydata()[-1] == pytest.approx(2.0)
    assert mean_first.get_label() == "first"
    assert mean_first.get_color() == raw_first.get_color() != raw_second.get_color()


def test_runs_of_two_recipes(finished_run, squares, cache, tmp_path, capsys):
    """Two real runs: a term of one recipe alone is missing in the other."""
    other = tmp_path / "clip"
    assert train_here(squares, cache, other, "--steps", 3, recipe="clip") == 0
    capsys.readouterr()
    assert main(["compare", str(finished_run), str(other), "--json"]) == 0
    out, err = capsys.readouterr()
    rows = {f"{row['part']} {row['name']}": row["values"] for row in json.loads(out)["rows"]}
    assert rows["run recipe"] == ["clip_kd", "clip"]
    assert rows["setting fd"] == ["2000", None]
    assert rows["loss crd, last"][1] is None
    assert rows["loss crd, last"][0] > 0
    assert rows["run steps"] == [4, 3]
    assert rows["run parameters"][0] > 100_000
    assert "note: losses of different recipes (clip_kd, clip) are not comparable" in err


# ----------------------------------------------------------------------------------------------------
# Damage, and what is no run


def damage_log(folder: Path) -> None:
    with open(folder / "metrics.jsonl", "r+b") as file:
        file.write(b"\xff\xff")


def damage(name: str, content: bytes):
    return lambda folder: (folder / name).write_bytes(content)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "second is unfinished: 100 of 100 steps"),
        (lambda folder: (folder / "metrics.jsonl").unlink(), "second has no log: its losses are missing"),
        (damage_log, "WARNING: 1 lines of"),
        (damage("metrics.jsonl", b""), "second has no log"),
        (damage("metrics.jsonl", b'{"step": 3, "loss": NaN, "task": Infinity}\n'), ""),
        (damage("evals.jsonl", b'{"step": 3}\n{"step": 4, "score": 0.5}\n'), ""),
        (damage("speed.json", b"{"), "speed.json is damaged"),
        (damage("speed.json", b"[" * 10_000), "speed.json is damaged"),
        (damage("eval/squares_zeroshot_retrieval.json", b'{"dataset": "x"}'), "zeroshot_retrieval.json is damaged"),
        (damage("eval/own.json", b'{"dataset": 3, "task": null, "metrics": []}'), "own.json is no result"),
        (lambda folder: shutil.rmtree(folder / "eval"), "second was not measured"),
        (damage("model.safetensors", b"\0" * 20), "model.safetensors cannot be read"),
    ],
)  # fmt: skip
def test_a_damaged_or_unfinished_run_is_compared_with_a_line(change, said, runs, tmp_path, capsys):
    change(runs[1])
    log = runs[1] / "metrics.jsonl"
    drawn = ["--out", str(tmp_path / "out")] if log.exists() and b"NaN" in log.read_bytes() else []
    assert main(["compare", *map(str, runs), *drawn]) == 0
    out, err = capsys.readouterr()
    assert "fd" in out
    assert said in err
    assert "Traceback" not in err
    assert sum(said in line for line in err.splitlines()) == 1 if said else True


def no_run(folder: Path, kind: str) -> list[str]:
    """Arguments of a comparison that cannot be made."""
    first, second = str(folder / "first"), folder / "second"
    if kind == "missing":
        return [first, str(folder / "second2")]
    if kind == "twice":
        return [first, str(folder / "second" / ".." / "first")]
    if kind == "one":
        return [first]
    if kind == "url":
        return [first, str(second), "--out", "s3://bucket/x"]
    if kind == "export":
        (second / "open_clip_config.json").write_text("{}")
        (second / "run.json").unlink()
    if kind == "generator":
        (second / "run.json").rename(second / "seq2seq.json")
    if kind == "flipped":
        content = (second / "run.json").read_bytes()
        (second / "run.json").write_bytes(content.replace(b"2000", b"2001").replace(b"1000", b"1001"))
    if kind == "foreign":
        record = {"format": 2, "student": {"family": "two_tower"}, "recipe": [], "run": {}}
        write_proved(second / "run.json", second, json.dumps(record))
    return [first, str(second)]


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("missing", "did you mean"),
        ("twice", "is named twice: pass each run once"),
        ("one", "needs two runs: student compare RUN ANOTHER"),
        ("url", "--out"),
        ("export", "is an export, which has no log: pass the run that it was exported from"),
        ("generator", "is an export, which has no log"),
        ("flipped", "run.json is damaged"),
        ("foreign", "run.json is damaged"),
    ],
)
def test_what_cannot_be_compared_is_one_line(kind, said, runs, tmp_path, capsys):
    assert main(["compare", *no_run(tmp_path, kind)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert said in line
    assert "Traceback" not in err


def test_a_task_of_a_result_is_never_imported_by_path(runs, tmp_path, monkeypatch, capsys):
    (tmp_path / "evil_task.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    measure(runs[0], "evil_task:TASK", "own", own_score=0.5)
    assert main(["compare", *map(str, runs)]) == 0
    assert "evil_task:TASK: own_score" in capsys.readouterr().out
    assert "evil_task" not in sys.modules


def test_names_of_others_stay_text(finished_run, tmp_path, capsys):
    first = write_run(finished_run, tmp_path / "=first|<b>\x1b[2J$x$")
    second = write_run(finished_run, tmp_path / "_second", loss=2.0)
    out = tmp_path / "out"
    assert main(["compare", str(first), str(second), "--out", str(out)]) == 0
    printed, _ = capsys.readouterr()
    assert "\x1b" not in printed
    assert r"=first\|&lt;b>\x1b[2J$x$" in (out / "compare.md").read_text()
    assert (out / "compare.csv").read_text().startswith("part,name,'=first|<b>")


def test_runs_of_one_name_are_told_apart(runs, tmp_path):
    shutil.copytree(runs[0], tmp_path / "elsewhere" / "first")
    folders = (runs[0], tmp_path / "elsewhere" / "first", runs[1])
    assert compare(folders).names == (str(folders[0]), str(folders[1]), "second")
