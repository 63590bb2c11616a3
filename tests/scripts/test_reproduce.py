"""scripts/reproduce: tables of given results; every row is a valid command of `student train`."""

import concurrent.futures
import json
from pathlib import Path

import pytest

from scripts.papers import clip_kd as reproduce_clip_kd
from scripts.papers import psd as reproduce_psd
from scripts.papers import run as reproduce
from scripts.papers.tables import METRICS, Row, Table
from student.recipe import Run
from student.recipes.registry import find
from student.settings import override

A = Row("a", (("fd", 1.0),), (30.0, None, None))
B = Row("b", (("fd", 2.0),), (31.5, None, None))
C = Row("c", (("fd", 3.0),), (31.0, None, None))
D = Row("d", (("fd", 4.0),), (None, None, None))
TABLE = Table("Some table", (A, B, C, D), reference=0, note="A note.")


def results_of(**top1: list[float]) -> dict:
    """Results whose other metrics are 0."""
    rows = {row.label: row for row in TABLE.rows}
    empty = {metric.key: 0.0 for metric in METRICS}
    return {rows[label]: [empty | {"acc1": value} for value in values] for label, values in top1.items()}


RESULTS = results_of(a=[0.10, 0.20], b=[0.12, 0.24], c=[0.11, 0.16], d=[0.3, 0.3])


def test_a_table_holds_both_numbers_and_their_differences():
    lines = reproduce.section(TABLE, RESULTS, [0, 1]).splitlines()
    assert lines[0] == "### Some table"
    cells = {
        line.split("`")[1]: [cell.strip() for cell in line.split("|")[2:-1]]
        for line in lines
        if "`" in line[:4]
    }
    assert cells["a"][:2] == ["30", "15.0 (10.0 to 20.0)"]
    assert cells["a"][-3:] == ["-", "-", "-"]
    assert cells["b"][-3:] == ["+1.5", "3.0 (2.0 to 4.0)", "yes"]
    assert cells["c"][-3:] == ["+1.0", "-1.5 (-4.0 to 1.0)", "no, within noise"]
    assert cells["d"][-3:] == ["-", "15.0 (10.0 to 20.0)", "-"]
    assert "orders as the paper's top-1 does: 2 of 3." in lines[-1]  # a < b and c < b; not a < c
    assert lines[-1].endswith("A note.")
    assert lines[2].count("paper") == 2  # the columns that the paper lacks are not there


def test_ties_are_no_agreement():
    same = results_of(a=[0.1], b=[0.1], c=[0.1], d=[0.1])
    assert reproduce.order(TABLE, same) == "0 of 3"


@pytest.mark.parametrize("name", reproduce_clip_kd.TABLES)
def test_every_row_is_a_command_that_can_be_run(name):
    table = reproduce_clip_kd.TABLES[name]
    assert 0 <= table.reference < len(table.rows)
    for row in table.rows:
        words = reproduce_clip_kd.argv(row, 7)
        settings = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
        recipe, _ = override(find("clip_kd"), Run(data="", cache="", out=""), settings)
        assert {key: getattr(recipe.constants, key) for key, _ in row.settings} == dict(row.settings)
        assert words[words.index("--seed") + 1] == "7"


def test_a_setting_of_two_tables_is_one_run():
    rows = {row.label: row for table in reproduce_clip_kd.TABLES.values() for row in table.rows}
    for first, second in (
        ("+ fd=2000", "fd=2000"),
        ("+ mfd=2000", "mask_ratio=0.75"),
        ("+ gd=1e8", "gd=1e+08"),
    ):
        assert reproduce.folder_of("clip_kd", rows[first], 0) == reproduce.folder_of(
            "clip_kd", rows[second], 0
        )
    folders = {reproduce.folder_of("clip_kd", row, 0) for row in rows.values()}
    assert len(folders) == len({row.settings for row in rows.values()})


def test_a_table_takes_its_place_between_its_marks(tmp_path, monkeypatch):
    path = tmp_path / "RESULTS.md"
    path.write_text("above\n<!-- clip_kd x: scripts/reproduce -->\nold\n<!-- end of clip_kd x -->\nbelow\n")
    monkeypatch.setattr(reproduce, "RESULTS", path)
    reproduce.replace_section("clip_kd x", r"new \1")
    marks = "<!-- clip_kd x: scripts/reproduce -->\nnew \\1\n<!-- end of clip_kd x -->"
    assert path.read_text() == f"above\n{marks}\nbelow\n"
    with pytest.raises(SystemExit, match="has no marks"):
        reproduce.replace_section("clip_kd y", "new")


def test_what_is_there_is_not_run_again(tmp_path, monkeypatch):
    folders = []
    monkeypatch.setattr(reproduce, "run_one", lambda folder, words, evaluations: folders.append(folder) or "")
    threads = concurrent.futures.ThreadPoolExecutor  # in whose workers the line above holds
    monkeypatch.setattr(concurrent.futures, "ProcessPoolExecutor", lambda jobs, mp_context: threads(jobs))
    (tmp_path / "done").mkdir()
    result = {"words": ["--steps", "2"], "metrics": {"acc1": 0.5}}
    (tmp_path / "done" / "result.json").write_text(json.dumps(result))
    reproduce.run_missing("clip_kd", {tmp_path / "done": ["--steps", "2"], tmp_path / "new": []}, jobs=2)
    assert folders == [tmp_path / "new"]
    assert reproduce.result_of(tmp_path / "done", ["--steps", "2"]) == {"acc1": 0.5}
    reproduce.run_missing(
        "clip_kd", {tmp_path / "done": ["--steps", "3"]}, jobs=2
    )  # other settings: another run
    assert folders == [tmp_path / "new", tmp_path / "done"]


def test_a_run_leaves_numbers_and_no_weights(squares, cache, tmp_path, monkeypatch):
    words = [
        "--recipe",
        "clip_kd",
        "--data",
        str(squares),
        "--cache",
        str(cache),
        "--steps",
        "2",
        "--batch-size",
        "8",
        "--set",
        "model=vit-micro",
        "--set",
        "run.workers=0",
    ]
    from small import contained

    with contained(), monkeypatch.context() as patch:
        from student import cli

        def main(argv: list[str]) -> int:  # `eval` of this data, not of the demo's
            return real([*argv, "--data", str(squares)] if argv[0] == "eval" else argv)

        real = cli.main
        patch.setattr(cli, "main", main)
        assert reproduce.run_one(tmp_path / "runs" / "one", words) == ""
    result = json.loads((tmp_path / "runs" / "one" / "result.json").read_text())
    assert {metric.key for metric in METRICS} <= result["metrics"].keys()
    assert result["words"] == words
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["one"]
    assert not list((tmp_path / "runs").rglob("*.safetensors"))
    assert (tmp_path / "runs" / "one" / "metrics.jsonl").exists()


# ----------------------------------------------------------------------------------------------------
# PSD: other rows, other columns, data of its own


@pytest.mark.parametrize("name", reproduce_psd.TABLES)
def test_rows_of_psd_are_commands_and_pairs(name):
    rows = reproduce_psd.TABLES[name].rows
    for row in rows:
        words = reproduce_psd.argv(row, 7)
        settings = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
        recipe, _ = override(
            find(words[words.index("--recipe") + 1]), Run(data="", cache="", out=""), settings
        )
        assert (recipe.optim.weight_decay, recipe.optim.warmup, recipe.constants.model) == (
            1e-3,
            0.2,
            "vit-micro",
        )
        share = dict(row.settings)["noise"]
        data = words[words.index("--data") + 1]
        assert data == f"runs/reproduce/psd/{name}" + (f"-{share:g}.parquet" if share else "")
        tasks = reproduce_psd.evaluations(words)
        assert {each[1]: each[3] for each in tasks} == dict.fromkeys(
            ("retrieval", "zeroshot"), f"runs/reproduce/psd/{name}"
        )  # clean rows, whatever it was trained on
    for clip, psd in zip(rows[::2], rows[1::2], strict=True):
        first, second = reproduce_psd.argv(clip, 3), reproduce_psd.argv(psd, 3)
        assert [(a, b) for a, b in zip(first, second, strict=True) if a != b] == [("clip", "psd")]
    assert len({reproduce.folder_of("psd", row, 0) for row in rows}) == len(rows)


def test_psd_table_pairs_by_seed():
    table = reproduce_psd.TABLES["demo"]
    keys = [key for _, keys in reproduce_psd.COLUMNS for key in keys]
    results = {
        row: [dict.fromkeys(keys, 0.01 * (i + seed)) for seed in range(2)] for i, row in enumerate(table.rows)
    }
    results[table.rows[1]] = [
        dict.fromkeys(keys, 0.30),
        dict.fromkeys(keys, 0.00) | {"image_retrieval_recall@1": 0.5},
    ]
    lines = reproduce_psd.section(table, results, [0, 1]).splitlines()
    cells = [cell.strip() for cell in lines[4].split("|")[1:-1]]
    assert cells[:4] == ["0%", "0.5 (0.0 to 1.0)", "15.0 (0.0 to 30.0)", "14.5 (-1.0 to 30.0)"]
    assert cells[4:7] == [
        "0.5 (0.0 to 1.0)",
        "27.5 (25.0 to 30.0)",
        "27.0 (24.0 to 30.0)",
    ]  # R@1 of both directions
    assert [line.split("|")[1].strip() for line in lines[4:8]] == ["0%", "20%", "40%", "60%"]
    assert lines[2].count("psd - clip") == 3


def test_psd_prepares_its_data_once(tmp_path, monkeypatch):
    from small import make_folder

    from teachercache.data.read import read_manifest

    monkeypatch.chdir(tmp_path)
    prepared = []

    def make(out: Path) -> None:
        prepared.append(out.name)
        make_folder(out, 20, splits=True)

    monkeypatch.setattr(reproduce_psd, "PREPARE", dict.fromkeys(("demo", "scenes"), make))
    rows = [row for table in reproduce_psd.TABLES.values() for row in table.rows]
    for _ in range(2):
        reproduce_psd.prepare(rows, [0], 1)
    assert prepared == ["demo", "scenes"]
    noisy = read_manifest("runs/reproduce/psd/demo-0.4.parquet")
    changed = sum('"noise"' in task for task in noisy.column("task"))
    assert changed == 6  # of 15 training rows


def test_the_demo_is_shrunk(tmp_path, monkeypatch):
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "data/demo/train/bird"
    folder.mkdir(parents=True)
    Image.new("RGB", (200, 100), "red").save(folder / "a.jpg")
    (folder / "a.txt").write_text("a red bird\n")
    (tmp_path / "runs/reproduce/psd").mkdir(parents=True)
    reproduce_psd.shrink_demo(Path("runs/reproduce/psd/demo"))
    out = tmp_path / "runs/reproduce/psd/demo/train/bird"
    with Image.open(out / "a.png") as small:
        assert small.size == (64, 32)
    assert (out / "a.txt").read_text() == "a red bird\n"
