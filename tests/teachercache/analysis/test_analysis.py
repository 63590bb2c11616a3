"""The measures of embeddings against scikit-learn, scipy and slow loops from their definitions."""

import re
from pathlib import Path

import numpy as np
import pytest
from scipy import spatial, stats
from sklearn.decomposition import PCA
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import LocalOutlierFactor, NearestNeighbors

from teachercache import analysis
from teachercache.analysis import matching, measures, neighbors
from teachercache.analysis.report import one_cache as describe
from teachercache.search import vectors as vectors_module
from teachercache.search.vectors import Vectors
from tests.teachercache.search.test_index import make_cache

ROOT = Path(__file__).parents[3]


def points(rows: int, dim: int, *, seed: int = 0, shift: float = 0.3) -> np.ndarray:
    """Unit vectors in a cone, as embeddings are."""
    return analysis.unit(np.random.default_rng(seed).standard_normal((rows, dim)) + shift)


def in_parts(*arrays: np.ndarray):
    for first in (0, 7, 20):
        part = [array[first : {0: 7, 7: 20, 20: None}[first]] for array in arrays]
        yield part[0] if len(part) == 1 else tuple(part)


# ----------------------------------------------------------------------------------------------------
# One space


def test_spectrum_and_axes_are_those_of_pca():
    x = points(60, 8)
    fitted = PCA().fit(x.astype(np.float64))
    found = measures.moments(in_parts(x))
    np.testing.assert_allclose(measures.spectrum(found), fitted.explained_variance_ * 59 / 60, atol=1e-6)
    axes = measures.principal_axes(found)
    np.testing.assert_allclose(np.abs(axes.T), np.abs(fitted.components_[:2]), atol=1e-4)
    assert (axes[np.abs(axes).argmax(0), [0, 1]] > 0).all()
    placed = analysis.flatten(x)
    np.testing.assert_allclose(np.abs(placed), np.abs(fitted.transform(x)[:, :2]), atol=1e-4)


def test_effective_rank_counts_directions_in_use():
    assert measures.effective_rank(np.array([4.0, 4.0, 4.0, 0.0])) == pytest.approx(3)
    assert measures.effective_rank(np.array([1.0, 0.0])) == pytest.approx(1)
    singular = np.array([3.0, 1.0])  # shares 3/4 and 1/4
    assert measures.effective_rank(singular**2) == pytest.approx(np.exp(stats.entropy([0.75, 0.25])))
    assert measures.effective_rank(np.zeros(3)) == 0


def test_cosine_gap_alignment_uniformity_by_slow_loops():
    x, y = points(30, 5), points(30, 5, seed=1)
    pairs = [(i, j) for i in range(30) for j in range(i)]
    mx, my = measures.moments(in_parts(x)), measures.moments([y])
    assert measures.mean_cosine(mx) == pytest.approx(np.mean([x[i] @ x[j] for i, j in pairs]), abs=1e-6)
    assert measures.modality_gap(mx, my) == pytest.approx(np.linalg.norm(x.mean(0) - y.mean(0)), abs=1e-6)
    assert measures.alignment(x, y) == pytest.approx(
        np.mean([((a - b) ** 2).sum() for a, b in zip(x, y, strict=True)])
    )
    slow = np.log(np.mean([np.exp(-2 * ((x[i] - x[j]) ** 2).sum()) for i, j in pairs]))
    assert measures.uniformity(x) == pytest.approx(slow, abs=1e-5)
    long = points(1500, 4)
    slow = np.log(np.exp(-2 * spatial.distance.pdist(long, "sqeuclidean")).mean())
    assert measures.uniformity(long) == pytest.approx(slow, abs=1e-5)


def test_hubness_is_the_skewness_of_how_often_a_row_is_a_neighbour():
    x = points(200, 40)
    _, found = analysis.nearest(x, 5)
    counts = measures.occurrences(found, 200)
    assert counts.sum() == 1000
    assert counts[3] == sum(3 in row for row in found.tolist())
    assert measures.skewness(counts) == pytest.approx(stats.skew(counts))
    assert measures.skewness(np.ones(4)) == 0


# ----------------------------------------------------------------------------------------------------
# Two spaces


def slow_cka(x: np.ndarray, y: np.ndarray) -> float:
    """From whole kernels, Song et al. 2012, Eq. 5."""
    n = len(x)
    kernels = [k - np.diag(np.diag(k)) for k in (x @ x.T, y @ y.T)]

    def hsic(k, el):
        one = np.ones(n)
        return (
            (
                np.trace(k @ el)
                + one @ k @ one * (one @ el @ one) / (n - 1) / (n - 2)
                - 2 / (n - 2) * (one @ k @ el @ one)
            )
            / n
            / (n - 3)
        )

    k, el = kernels
    return hsic(k, el) / np.sqrt(hsic(k, k) * hsic(el, el))


@pytest.mark.parametrize("scale", [1, 3])
def test_cka_in_parts_is_that_of_whole_kernels(scale: int):
    x, y = (points(40, dim, seed=dim).astype(np.float64) for dim in (6, 9))
    y[:, :6] += scale * x
    y *= np.random.default_rng(0).uniform(0.5, 2, (40, 1))  # lengths that differ: diagonals matter
    assert measures.cka(measures.cross_moments(in_parts(x, y))) == pytest.approx(slow_cka(x, y), abs=1e-9)
    assert analysis.linear_cka(x, y) == pytest.approx(slow_cka(x, y), abs=1e-9)


def test_cka_knows_no_rotation_and_no_chance():
    x = points(400, 12).astype(np.float64)
    turned = 2 * x @ np.linalg.qr(np.random.default_rng(0).standard_normal((12, 12)))[0]
    assert analysis.linear_cka(x, turned) == pytest.approx(1)
    assert (
        abs(analysis.linear_cka(x, points(400, 12, seed=9).astype(np.float64))) < 0.02
    )  # biased: about 0.03
    assert np.isnan(analysis.linear_cka(x[:3], turned[:3]))


def test_procrustes_is_scipys():
    x, noise = points(50, 5).astype(np.float64), np.random.default_rng(1).standard_normal((50, 5))
    y = 3 * x @ np.linalg.qr(noise[:5])[0] + 0.2 * noise + 1
    disparity = spatial.procrustes(x, y)[2]
    assert measures.procrustes(measures.cross_moments(in_parts(x, y))) == pytest.approx(disparity)
    wide = np.pad(y, ((0, 0), (0, 3)))
    assert measures.procrustes(measures.cross_moments([(x, wide)])) == pytest.approx(disparity)
    moved = measures.turn_onto(x, y)
    left = np.square(moved - x).sum() / np.square(x - x.mean(0)).sum()
    assert left == pytest.approx(disparity)


def test_overlap_and_rank_correlation():
    a, b = np.array([[1, 2, 3], [0, 2, 3]]), np.array([[3, 9, 1], [7, 8, 9]])
    assert analysis.neighbor_overlap(a, b).tolist() == pytest.approx([2 / 3, 0])
    x, y = points(40, 6), points(40, 4, seed=2)
    cosines = [1 - spatial.distance.pdist(z, "cosine") for z in (x, y)]
    assert analysis.rank_correlation(x, y) == pytest.approx(stats.spearmanr(*cosines).statistic, abs=1e-3)
    ties = np.array([1, 2, 2, 3, 3, 3.0]), np.array([2, 1, 1, 5, 4, 4.0])
    assert analysis.spearman(*ties) == pytest.approx(stats.spearmanr(*ties).statistic)
    assert np.isnan(analysis.spearman(np.ones(3), np.arange(3.0)))


# ----------------------------------------------------------------------------------------------------
# Neighbours, duplicates, outliers


@pytest.mark.parametrize("rows_at_once", [1, 13, 500])
def test_nearest_are_scikit_learns(monkeypatch, rows_at_once: int):
    monkeypatch.setattr(vectors_module, "CHUNK_BYTES", rows_at_once * 6 * 4)
    x = points(120, 6)
    distances, found = NearestNeighbors(n_neighbors=8, metric="cosine").fit(x).kneighbors()
    cosines, at = analysis.nearest(x, 8)
    assert at.tolist() == found.tolist()
    np.testing.assert_allclose(cosines, 1 - distances, atol=1e-5)
    some = np.array([5, 99])
    assert analysis.nearest(x, 8, some)[1].tolist() == found[some].tolist()
    scattered = Vectors(x, np.array([40, 3, 77, 5]), 1)  # positions are those in its ids
    assert analysis.nearest(scattered, 1)[1].ravel().tolist() == [
        max((j for j in range(4) if j != i), key=lambda j, a=a: x[a] @ x[[40, 3, 77, 5][j]])
        for i, a in enumerate([40, 3, 77, 5])
    ]


def test_a_row_is_never_its_own_neighbour_however_many_are_the_same():
    x = np.repeat(points(2, 4), 9, axis=0)
    cosines, found = analysis.nearest(x, 3)
    assert (found != np.arange(18)[:, None]).all()
    assert (found // 9 == np.arange(18)[:, None] // 9).all()
    np.testing.assert_allclose(cosines, 1, atol=1e-6)


@pytest.mark.parametrize("at", [None, [3, 50, 199]])
def test_near_pairs_are_all_of_them(monkeypatch, at):
    monkeypatch.setattr(neighbors, "BLOCK_SCORES", 900)
    x = points(200, 3)
    cosines = x @ x.T
    asked = set(range(200) if at is None else at)
    slow = {(i, j) for i in range(200) for j in range(i + 1, 200) if cosines[i, j] >= 0.97 and {i, j} & asked}
    pairs, found, count = analysis.near_pairs(x, 0.97, None if at is None else np.array(at))
    assert set(map(tuple, pairs.tolist())) == slow
    assert len(pairs) == count == len(slow) > 0
    np.testing.assert_allclose(found, cosines[tuple(pairs.T)], atol=1e-6)
    assert (np.diff(found) <= 0).all()
    best, kept, every = analysis.near_pairs(x, 0.97, None if at is None else np.array(at), limit=2)
    assert (every, len(best)) == (count, 2)
    np.testing.assert_allclose(kept, found[:2])


def test_exact_groups_and_joined_pairs():
    x = points(50, 4).astype(np.float16)
    x[[7, 20, 33]], x[41] = x[3], x[9]
    assert analysis.exact_groups(x) == [[3, 7, 20, 33], [9, 41]]
    assert analysis.grouped([(5, 6), (1, 2), (2, 9), (6, 7)]) == [[5, 6, 7], [1, 2, 9]]
    assert analysis.grouped(np.empty((0, 2), int)) == []


def test_outliers_are_those_of_neighbour_distances():
    x = points(150, 10, shift=2)
    x[[10, 60]] = analysis.unit(-x[[10, 60]])
    scores = analysis.outlier_scores(analysis.nearest(x, 10)[0])
    slow = NearestNeighbors(n_neighbors=10, metric="cosine").fit(x).kneighbors()[0].mean(1)
    np.testing.assert_allclose(scores, slow, atol=1e-5)
    assert set(np.argsort(-scores)[:2]) == {10, 60}
    factor = LocalOutlierFactor(n_neighbors=10, metric="cosine").fit(x).negative_outlier_factor_
    assert set(np.argsort(factor)[:2]) == {10, 60}


# ----------------------------------------------------------------------------------------------------
# Pictures and texts


def slow_surprise(x: np.ndarray, y: np.ndarray, owner: np.ndarray, reference: list[int]) -> list[float]:
    found = []
    for t, text in enumerate(y):
        picture, others = x[owner[t]], [r for r in reference if owner[r] != owner[t]]
        texts = np.log(np.mean([np.exp(50 * picture @ y[r]) for r in others]))
        pictures = np.log(np.mean([np.exp(50 * text @ x[owner[r]]) for r in others]))
        found.append(texts + pictures - 2 * 50 * picture @ text)
    return found


def test_surprise_is_the_contrastive_loss_of_a_pair(monkeypatch):
    monkeypatch.setattr(matching, "BLOCK_SCORES", 600)
    x, y, owner = (
        points(20, 6),
        points(35, 6, seed=1),
        np.sort(np.random.default_rng(0).integers(20, size=35)),
    )
    reference = [0, 4, 5, 17, 30]
    found = analysis.surprise(x, y, owner, np.array(reference))
    np.testing.assert_allclose(
        found, slow_surprise(*(z.astype(np.float64) for z in (x, y)), owner, reference), rtol=1e-4
    )
    np.testing.assert_allclose(
        analysis.pair_cosines(x, y, owner), [x[i] @ text for i, text in zip(owner, y, strict=True)], atol=1e-6
    )


def test_ranks_are_strict_and_ties_are_lost(monkeypatch):
    monkeypatch.setattr(matching, "BLOCK_SCORES", 100)
    x, y, owner = points(20, 6), points(35, 6, seed=1), np.sort(np.r_[np.arange(20), np.arange(15)])
    x[7] = x[8]  # a tie
    scores = y.astype(np.float64) @ x.T
    by_text = analysis.strict_ranks(y, owner, x, np.arange(20))
    slow = [
        1 + sum(scores[t, i] >= scores[t, owner[t]] - 1e-6 for i in range(20) if i != owner[t])
        for t in range(35)
    ]
    assert by_text.tolist() == slow
    by_picture = analysis.strict_ranks(x, np.arange(20), y, owner)
    slow = [
        1 + sum(scores[t, i] >= scores[owner == i, i].max() - 1e-6 for t in range(35) if owner[t] != i)
        for i in range(20)
    ]
    assert by_picture.tolist() == slow
    same = np.ones((3, 2), np.float32) / np.sqrt(2)
    assert analysis.strict_ranks(same, np.arange(3), same, np.arange(3)).tolist() == [3, 3, 3]
    assert analysis.recalls(np.array([1, 2, 6, 20])) == {
        "R@1": 0.25,
        "R@5": 0.5,
        "R@10": 0.75,
        "median_rank": 4,
    }


def test_auc_is_scikit_learns():
    random = np.random.default_rng(0)
    high, low = random.integers(0, 9, 40) / 9 + 0.2, random.integers(0, 9, 60) / 9
    expected = roc_auc_score(np.r_[np.ones(40), np.zeros(60)], np.r_[high, low])
    assert describe._auc(high, low) == pytest.approx(expected)


def test_clusters_and_their_words():
    x = np.concatenate([analysis.unit(np.eye(6)[i] + 0.05 * points(40, 6, seed=i)) for i in range(3)])
    centers = analysis.fit_centers(x, 3)
    number, distance = neighbors.far_from_centers(x, centers)
    assert [len(set(number[i : i + 40].tolist())) for i in (0, 40, 80)] == [1, 1, 1]
    assert len(set(number.tolist())) == 3
    assert distance.max() < 0.1
    texts = [
        "a red racing bicycle",
        "old red bicycle in the rain",
        "the bicycle of my aunt",
        "red bicycle wheel",
    ]
    assert any("bicycle" in phrase.lower() for phrase in analysis.keywords(texts))
    assert analysis.keywords(["", " "]) == []


def test_the_examples_of_the_docs_run(tmp_path, monkeypatch, capsys):
    """docs/reference/analysis.md, top to bottom, over a cache at the path that it names."""
    monkeypatch.chdir(tmp_path)
    make_cache(Path("caches/demo/clip-lite.zarr"), points(150, 8).astype(np.float16))
    examples = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs" / "reference" / "analysis.md").read_text(), re.S
    )
    assert len(examples) == 2
    names: dict = {}
    for example in examples:
        exec(compile(example, "docs/reference/analysis.md", "exec"), names)
    assert names["near"].shape == (10, 10)
    rank, cosine = map(float, capsys.readouterr().out.split())
    assert 5 < rank <= 8
    assert 0 < cosine < 1


def test_what_the_door_offers_is_there():
    assert all(callable(getattr(analysis, name)) for name in analysis.__all__)
