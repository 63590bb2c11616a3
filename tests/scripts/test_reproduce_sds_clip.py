"""scripts/reproduce sds_clip: rows are valid commands, test and validation are separate, tables of given results."""

import pytest

from scripts.papers import run as reproduce
from scripts.papers import sds_clip as paper
from student.recipe import Run
from student.recipes.registry import find
from student.settings import override


@pytest.mark.parametrize("name", paper.TABLES)
def test_every_row_is_a_command_in_one_world(name):
    rows = paper.TABLES[name].rows
    assert len({reproduce.folder_of("sds_clip", row, 1) for row in rows}) == len(rows)
    commands = [paper.argv(row, 1) for row in rows]
    assert len({tuple(words) for words in commands}) == len(rows)
    for row, words in zip(rows, commands, strict=True):
        world = dict(row.settings)["world"]
        assert {
            str(paper.HOME / world) in word for options in paper.evaluations(words) for word in options[3:]
        } == {True}
        if words[0] == "--model":
            continue
        settings = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
        recipe, _ = override(find("sds_clip"), Run("", "", ""), settings)
        assert (
            recipe.fields
            == {"score": ("text_states",), "features": ("unet_feature",), "none": ()}[
                recipe.constants.objective
            ]
        )
        assert recipe.constants.init == str(paper.vanilla(1))
        assert ("full" in row.label) == (recipe.constants.train == "all")
        assert ("L_SDS" in row.label) == (recipe.constants.objective == "score")
        assert words[words.index("--data") + 1] == str(paper.HOME / world / "pairs")
    assert paper.WORLDS["test"][0] != paper.WORLDS["validation"][0] != 3
    assert len({seed for seeds in paper.WORLDS.values() for seed in seeds}) == 4


def test_a_table_pairs_seeds_and_leaves_out_missing_metrics():
    table = paper.TABLES["table1"]
    results = {}
    for i, row in enumerate(table.rows):
        runs = [{key: 0.3 + 0.01 * i + 0.1 * seed * (i > 0) for _, key in paper.COLUMNS} for seed in (0, 1)]
        if "diffusion" in row.label:
            runs = [{key: value for key, value in runs[0].items() if key != "acc1"}]
        results[row] = [
            metrics | {"seconds_per_match": 0.002 / (1 + seed)} for seed, metrics in enumerate(runs)
        ]
    lines = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in paper.section(table, results, [0, 1]).splitlines()
    ]
    index = {line[0]: i for i, line in enumerate(lines) if line}
    sds = index["FT, L_CLIP + L_SDS"]
    assert lines[sds][1] == "37.0 (32.0 to 42.0)"
    assert lines[sds][-1] == "1"
    assert lines[sds + 1][:2] == ["- to reference", "1.0 (1.0 to 1.0)"]
    assert lines[sds + 2][:7] == ["- to reference, paper", "8", "8", "6", "13", "6", "5"]
    assert lines[index["vanilla CLIP"] + 1][1] == "-6.0 (-11.0 to -1.0)"
    score = lines[index["diffusion score (Eq. 2)"]]
    assert score[1:] == ["36.0"] * 11 + ["-", "2"]
    assert paper.seeds_of(table.rows[-1], [3, 4]) == [3]
    assert paper.seeds_of(table.rows[0], [3, 4]) == [3, 4]


def test_an_existing_model_is_measured_without_training(tmp_path, monkeypatch):
    commands = []

    def student(command):
        commands.append(command)
        print('{"results": [{"metrics": {"acc1": 0.5}}], "skipped": []}')

    monkeypatch.setattr("student.cli.main", student)
    folder = tmp_path / "runs" / "one"
    words = ["--model", "some/run", "--data", "d"]
    assert reproduce.run_one(folder, words, [["--task", "zeroshot"]]) == ""
    assert commands == [["eval", "some/run", "--task", "zeroshot", "--json"]]
    assert reproduce.result_of(folder, words) == {"acc1": 0.5}
