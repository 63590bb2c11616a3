"""Search among some rows: what brute force finds among them, with every kind of index and without one."""

import dataclasses

import numpy as np
import pytest

from teachercache.core.errors import UserError
from teachercache.search import filtered, index
from teachercache.search.filtered import open_searcher, search_rows
from tests.teachercache.search.test_index import brute_force, clusters, make_cache, vectors

ROWS = 3000


@pytest.fixture(scope="module", params=["none", "flat", "ivf", "hnsw"])
def searcher(request, tmp_path_factory):
    cache = make_cache(tmp_path_factory.mktemp("filtered") / "c.zarr", clusters(ROWS))
    if request.param != "none":
        index.build_index(cache, kind=request.param)
    opened = open_searcher(cache, "image_emb")
    assert (opened.index is None) == (request.param == "none")
    return opened


def selection(share: float) -> np.ndarray:
    return np.random.default_rng(7).random(ROWS) < share


@pytest.mark.parametrize("share", [0.0, 0.002, 0.3])
def test_a_small_selection_is_exact_beside_any_index(searcher, share: float):
    rows = selection(share)
    values = clusters(ROWS)
    for query in values[:5]:
        places, cosine = brute_force(values[rows], query, 10)
        found = search_rows(searcher, query, top=10, rows=rows)
        assert found.exact
        assert found.ids.tolist() == np.flatnonzero(rows)[places].tolist()
        np.testing.assert_allclose(found.scores, cosine, atol=1e-5)


def test_a_large_selection_is_searched_in_the_index(searcher, monkeypatch):
    """As many rows as asked for, all of the selection, and marked where some may be missing."""
    monkeypatch.setattr(filtered, "EXACT_UP_TO", 100)
    rows, values, hits = selection(0.5), clusters(ROWS), []
    for query in values[:20]:
        found = search_rows(searcher, query, top=10, rows=rows)
        assert len(found.ids) == 10
        assert rows[found.ids].all()
        assert found.exact == (searcher.kind in ("", "flat"))
        assert (np.diff(found.scores) <= 0).all()
        places, _ = brute_force(values[rows], query, 10)
        hits.append(np.isin(np.flatnonzero(rows)[places], found.ids).mean())
    assert np.mean(hits) >= (1.0 if searcher.kind in ("", "flat") else 0.8)


def test_a_selection_far_from_the_query_is_found(searcher, monkeypatch):
    """The lists next to the query hold none of these rows: more lists are read until there are enough."""
    monkeypatch.setattr(filtered, "EXACT_UP_TO", 10)
    values = clusters(ROWS)
    _, cosine = brute_force(values, values[0], ROWS)
    order, _ = brute_force(values, values[0], ROWS)
    rows = np.zeros(ROWS, bool)
    rows[order[-200:]] = True
    found = search_rows(searcher, values[0], top=10, rows=rows)
    assert len(found.ids) == 10
    assert rows[found.ids].all()
    assert found.scores.max() <= cosine[-200] + 1e-2


def test_all_rows_and_more_than_there_are(searcher):
    values = clusters(ROWS)
    found = search_rows(searcher, values[3], top=5)
    assert found.ids[0] in brute_force(values, values[3], 3)[0]
    assert (
        len(search_rows(searcher, values[3], top=2 * ROWS, rows=selection(0.01)).ids) == selection(0.01).sum()
    )


def test_a_selection_of_rows_selects_all_their_texts(tmp_path):
    texts = vectors(150, seed=3).reshape(50, 3, 16)
    cache = make_cache(tmp_path / "c.zarr", vectors(50), texts=texts)
    rows = np.arange(50) % 5 == 2
    found = search_rows(open_searcher(cache, "text_emb"), texts[9, 1], top=40, rows=rows)
    ids, _ = brute_force(texts.reshape(150, 16), texts[9, 1], 150)
    assert found.ids.tolist() == [i for i in ids if rows[i // 3]]


def test_unusable_rows_are_not_found(tmp_path):
    valid = np.arange(60) % 2 == 0
    cache = make_cache(tmp_path / "c.zarr", vectors(60), valid=valid)
    found = search_rows(open_searcher(cache, "image_emb"), vectors(60)[1], top=60, rows=np.arange(60) < 30)
    assert set(found.ids.tolist()) == set(range(0, 30, 2))


def test_an_index_of_other_rows_is_damaged(searcher):
    if not searcher.kind:
        pytest.skip("it has no index")
    fewer = dataclasses.replace(searcher.vectors, ids=searcher.vectors.ids[::2])
    with pytest.raises(
        UserError, match=r"is damaged .it finds rows that the cache does not have.: run `tc index"
    ):
        search_rows(dataclasses.replace(searcher, vectors=fewer), clusters(ROWS)[1], top=50)
