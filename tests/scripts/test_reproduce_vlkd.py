"""scripts/reproduce vlkd: every row is a valid command of `student train`; tables of given results; its data."""

import json
from pathlib import Path

import pytest

from evaluation.tasks.language import glue
from evaluation.tasks.registry import find
from scripts.datasets import scene_glue as prepare_scene_glue
from scripts.papers import run as reproduce
from scripts.papers import vlkd as paper
from student.recipe import Run
from student.recipes.registry import find as find_recipe
from student.settings import override
from teachercache.data.read import read_manifest


def settings_of(words: list[str]) -> list[str]:
    return [words[i + 1] for i, word in enumerate(words) if word == "--set"]


def result(scale: float) -> dict[str, float]:
    """Return metrics of a run with a different value for each key."""
    masks = {
        f"{name}{suffix}/CIDEr": scale * (k + j / 10)
        for k, name in enumerate(("demo", "scenes"), start=1)
        for j, suffix in enumerate(("", " 5", " 7", " 8"))
    }
    text = {
        f"text/{other}{key}": scale + (other == "")
        for other in ("", "other/")
        for key in ("nll_per_token", "nll_per_masked_token")
    }
    nli = {
        f"glue/{other}{name}/{key}": 0.3 if key == "majority" else scale / 2
        for other in ("", "other/")
        for name in ("MNLI", "MNLI-mm")
        for key in ("acc", "majority")
    }
    return {"vqa/accuracy": scale / 2, "vqa/accuracy:always": 0.25} | masks | text | nli


@pytest.mark.parametrize("name", paper.TABLES)
def test_every_row_is_a_command(name):
    table = paper.TABLES[name]
    for row in table.rows:
        words = paper.argv(row, 1)
        recipe, _ = override(find_recipe("vlkd"), Run("", "", ""), settings_of(words))
        constants = recipe.constants
        assert (constants.ttdm == 0) == ("TTDM" in row.label)
        assert (constants.itcl == 0) == ("ITCL" in row.label)
        assert constants.data_share == pytest.approx(paper.SIZES.get(row.label, 1.0), abs=1e-4)
        assert recipe.fields[0] == "image_emb"
        for options in paper.evaluations(words).values():
            find(options[options.index("--task") + 1])
    folders = {reproduce.folder_of("vlkd", row, 1) for row in table.rows}
    assert len(folders) == (1 if name in ("masks", "language") else len(table.rows))


def test_rows_that_are_one_setting_are_one_run():
    whole = {table.rows[0].settings for table in paper.TABLES.values()}
    assert whole == {()}
    asked = paper.evaluations(paper.argv(paper.TABLES["losses"].rows[0], 0))
    assert set(asked) == {
        "vqa",
        "text",
        "glue",
        "demo",
        "scenes",
        *(f"{n} {m}" for n in paper.HELD_OUT for m in (5, 7, 8)),
    }
    assert set(paper.evaluations(paper.argv(paper.TABLES["size"].rows[2], 0))) == {"vqa", "demo", "scenes"}


def test_students_start_from_the_packaged_bart(monkeypatch):
    from student.models.seq2seq.loading import PACKAGED

    monkeypatch.chdir(Path(__file__).parents[2])
    assert paper.bart().resolve() == PACKAGED.resolve()
    assert (paper.bart() / "config.json").exists()


def cells(text: str, label: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.startswith(f"| {label} |"))
    return [cell.strip() for cell in line.split("|")[2:-1]]


def test_ablations_stand_beside_the_papers_differences():
    table = paper.TABLES["losses"]
    results = {row: [result(1.0 - i / 10), result(0.9 - i / 10)] for i, row in enumerate(table.rows)}
    text = paper.section(table, results, [0, 1])
    assert cells(text, "VLKD")[:4] == ["47.5 (45.0 to 50.0)", "-", "38.6", "-"]
    assert cells(text, "without TTDM")[:4] == ["42.5 (40.0 to 45.0)", "-5.0 (-5.0 to -5.0)", "35.5", "-3.1"]
    assert cells(text, "without TTDM and ITCL")[6:8] == ["48.6", "-9.7"]
    assert "gets 25.0 of easy-vqa" in text


def test_masks_are_read_from_one_run():
    table = paper.TABLES["masks"]
    text = paper.section(table, {row: [result(1.0)] for row in table.rows}, [0])
    assert [cells(text, f"{m} masks")[0] for m in paper.MASKS] == ["110.0", "100.0", "120.0", "130.0"]
    assert [cells(text, f"{m} masks")[4] for m in paper.MASKS] == ["210.0", "200.0", "220.0", "230.0"]
    assert cells(text, "8 masks")[1:4] == ["30.0", "59.6", "-1.5"]
    assert "easy-vqa" not in text


def test_language_is_that_of_both_models():
    table = paper.TABLES["language"]
    text = paper.section(table, {row: [result(1.0)] for row in table.rows}, [0])
    assert cells(text, "BART as it was") == ["1.000", "1.000", "50.0", "50.0", "87.2", "45.14"]
    assert cells(text, "after VLKD")[:2] == ["2.000", "2.000"]
    assert cells(text, "the most frequent label")[2] == "30.0"


def test_metrics_stand_behind_their_evaluations_name(tmp_path, monkeypatch):
    """If a command evaluates two models, the metrics of the second one have the prefix `other`."""

    def student(words):
        if words[0] == "train":
            run = Path(words[words.index("--out") + 1])
            (run / "checkpoints").mkdir(parents=True)
            (run / "model.safetensors").touch()
            (run / "speed.json").write_text("{}")
        else:
            results = [{"metrics": {"acc": n + 0.5}} for n in range(2 if "BART" in words else 1)]
            print(json.dumps({"results": results, "skipped": []}))
        return 0

    monkeypatch.setattr("student.cli.main", student)
    asked = {"glue": ["BART", "--task", "glue"], "demo 5": ["--task", "captions"]}
    assert reproduce.run_one(tmp_path / "runs" / "one", ["--steps", "1"], asked) == ""
    metrics = reproduce.result_of(tmp_path / "runs" / "one", ["--steps", "1"])
    assert metrics == {"glue/acc": 0.5, "glue/other/acc": 1.5, "demo 5/acc": 0.5}


def test_language_tasks_are_glues_files(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_scene_glue, "prose", lambda: ["Return the sorted array."] * 5)
    out = tmp_path / "language"
    prepare_scene_glue.write_sets(out, train=60, dev=30, texts=3, seed=1)
    rows, lost = glue.read_tsv(out / "GLUE/MNLI/train.tsv", glue.GLUE["MNLI"])
    assert (len(rows), lost) == (60, 0)
    assert [sum(label == k for _, label in rows) for k in range(3)] == [20, 20, 20]
    matched, mismatched = (
        glue.read_tsv(out / f"GLUE/MNLI/dev_{name}.tsv", glue.GLUE["MNLI"])[0]
        for name in ("matched", "mismatched")
    )
    assert [texts[1] for texts, _ in matched] == [texts[1] for texts, _ in mismatched]
    assert not {texts for texts, _ in rows} >= {texts for texts, _ in matched}
    assert len(read_manifest(str(out / "texts.txt"))) == 3


def test_held_out_pictures_are_test_rows(tmp_path, monkeypatch):
    from small import make_folder

    monkeypatch.setattr(paper, "NUM_HELD_OUT", 5)
    data = make_folder(tmp_path / "data", 40, splits=True)
    paper.hold_out(data, tmp_path / "test.parquet")
    held_out, whole = read_manifest(str(tmp_path / "test.parquet")), read_manifest(str(data))
    keys = whole.column("key")
    assert len(held_out) == 5
    assert set(held_out.column("key")) < {keys[row] for row in whole.rows_of_split("test")}
