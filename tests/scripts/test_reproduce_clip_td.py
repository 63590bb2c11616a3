"""scripts/reproduce clip_td: every row and stage is a valid command of `student train`; tables of given results."""

import pytest

from scripts.papers import clip_td as paper
from scripts.papers import modality as reproduce_modality
from scripts.papers import run as reproduce
from student.recipe import Run
from student.recipes.registry import find
from student.settings import override


def settings_of(words: list[str]) -> list[str]:
    return [words[i + 1] for i, word in enumerate(words) if word == "--set"]


@pytest.mark.parametrize("name", paper.TABLES)
def test_every_row_is_a_command_and_stages_belong_together(name):
    table = paper.TABLES[name]
    folders = {reproduce.folder_of("clip_td", row, 1) for row in table.rows}
    assert len(folders) == len(table.rows)
    for row in table.rows:
        words = paper.argv(row, 1)
        recipe, _ = override(find("clip_td"), Run("", "", ""), settings_of(words))
        names, constants = row.names(), recipe.constants
        assert recipe.fields
        assert constants.regime == names["size"]
        assert constants.subset == 1
        assert (constants.distill_weight == 0) == (row.label in ("baseline", "2nd-stage pretraining"))
        assert any(value.startswith("init=") for value in settings_of(words)) == (
            row.label not in paper.LAYERS
        )
        adapted = [value for value in settings_of(words) if "adapted" in value]
        assert bool(adapted) == any(method in row.label for method in ("AF", "2nd-stage"))
        if adapted:
            weight = "0" if constants.distill_weight == 0 else paper.W
            key = (names["task"], names["face"], names["size"], weight, 1)
            assert adapted == [f"init={paper.adapted(*key)}"]
            first, _ = override(find("clip_td"), Run("", "", ""), settings_of(paper.adapt_argv(*key)))
            assert first.constants.stage == "adapt"
            assert first.constants.distill_weight == float(weight)
            assert first.constants.regime.partition(":")[0] in ("semi", "full")  # all pictures, no label more
        task, data = paper.evaluations(words)[0][1::2]
        assert paper.DATA[task] == data


def test_a_table_pairs_seeds_and_shows_the_time_of_a_step():
    table = paper.table("vcr", "vl-bert", "Some title", ("baseline", "naive V"))
    values = {"baseline": (0.3, 0.5), "naive V": (0.4, 0.45)}
    results = {
        row: [
            {"q2a": value, "seconds_per_step": 0.1 if row.label == "baseline" else 0.12}
            for value in values[row.label]
        ]
        for row in table.rows
    }
    lines = paper.section(table, results, [0, 1]).splitlines()
    cells = [cell.strip() for cell in lines[-3].split("|")[1:-1]]
    assert cells[:4] == ["naive V", "42.5 (40.0 to 45.0)", "2.5 (-5.0 to 10.0)", "+9.3"]
    assert cells[-1] == "1.20"
    assert [cell.strip() for cell in lines[-4].split("|")[1:-1]][:4] == [
        "baseline",
        "40.0 (30.0 to 50.0)",
        "-",
        "-",
    ]


def test_modality_rows_are_the_tables_and_figures_stand_in_their_columns():
    for method in reproduce_modality.METHODS.values():
        assert paper.row("vcr", "vl-bert", method, reproduce_modality.FULL) in paper.TABLES["vcr"].rows
    numbers = {
        "before": {"picture_mean": 0.1, "text_mean": 0.8},
        "after": {"picture_mean": 0.2, "text_mean": 0.7},
        "change": {"difference_reduction": 0.25, "picture_gain": 1.0},
    }
    lines = reproduce_modality.section([4], [numbers]).splitlines()
    assert lines[2] == "| seed 4 | 0.100 | 0.200 | 0.800 | 0.700 | 25.0 % | 100.0 % |"
    assert lines[3] == "| paper |  |  |  |  | 36.0 % | 10.6 % |"
