"""Filters: the rows that a slow loop over the manifest selects."""

import json
from pathlib import Path

import numpy as np
import pytest

from teachercache.core.errors import UserError
from teachercache.data.manifest import make_manifest
from teachercache.data.sample import Sample
from teachercache.serve.facets import MOST_VALUES, find_facets, selected_rows

ROWS = 500


def samples() -> list[Sample]:
    random = np.random.default_rng(0)
    rows = []
    for i in range(ROWS):
        task = {
            "tag": ["small", "red"][: i % 3],
            "kind": i % 4,
            "sure": i % 2 == 0,
            "question": f"what is {i}?",
        }
        split = ("train", "test", "")[random.integers(3)]
        label = f"label {random.integers(7)}" if i % 5 else ""
        rows.append(Sample(f"k{i}", "", (f"text {i}",), label, split, task=json.dumps(task) if i % 7 else ""))
    return rows


@pytest.fixture(scope="module")
def manifest():
    return make_manifest("d", Path("d"), samples())


def loop(name: str, value: str) -> np.ndarray:
    """Whether each row has a value, by the letter."""
    kept = []
    for row in samples():
        task = json.loads(row.task or "{}")
        values = {"split": [row.split], "label": [row.label], "tag": task.get("tag", [])}
        values |= {part: [json.dumps(task[part])] for part in ("kind", "sure") if part in task}
        kept.append(value in values.get(name, []))
    return np.array(kept)


def test_every_value_selects_its_rows(manifest):
    facets = find_facets(manifest)
    assert [facet.name for facet in facets] == ["split", "label", "tag", "kind", "sure"]  # not the questions
    for facet in facets:
        values = facet.values.to_pylist()
        assert "" not in values
        assert list(facet.counts) == sorted(facet.counts, reverse=True)
        for value, count in zip(values, facet.counts, strict=True):
            rows = selected_rows(manifest, facets, {facet.name: value})
            assert np.array_equal(rows, loop(facet.name, value)), (facet.name, value)
            assert rows.sum() == count


def test_filters_together_are_an_and(manifest):
    chosen = {"split": "train", "label": "label 3", "tag": "red"}
    rows = selected_rows(manifest, find_facets(manifest), chosen)
    assert np.array_equal(rows, np.logical_and.reduce([loop(*pair) for pair in chosen.items()]))
    assert rows.any()


def test_no_choice_and_unknown_choices(manifest):
    facets = find_facets(manifest)
    assert selected_rows(manifest, facets, {}) is None
    assert not selected_rows(manifest, facets, {"label": "label 77"}).any()
    with pytest.raises(UserError, match="no row has a column 'labels': did you mean 'label'"):
        selected_rows(manifest, facets, {"labels": "x"})


def test_a_column_of_too_many_values_and_odd_columns_are_no_filters():
    rows = [
        Sample(f"{i}", "", task=json.dumps({"id": i // 3, "nested": {"a": 1}, "ok": "yes"}))
        for i in range(3 * MOST_VALUES + 9)
    ]
    odd = [Sample("a", "", task="no JSON {"), Sample("b", "", task="[1]")]
    assert [facet.name for facet in find_facets(make_manifest("d", Path("d"), [*rows, *odd]))] == ["ok"]


def test_data_without_splits_and_labels_has_no_filters():
    assert (
        find_facets(make_manifest("d", Path("d"), [Sample("a", "", ("x",)), Sample("b", "", ("y",))])) == []
    )
