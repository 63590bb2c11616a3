"""Measures of one embedding space, and of two spaces over the same rows, from arrays.

Many rows are processed in chunks by `moments(parts)` and `cross_moments(parts)`, which keep [dim, dim]
statistics.
"""

import dataclasses
from collections.abc import Iterable

import numpy as np
from jaxtyping import Float, Int

ROWS_AT_ONCE = (
    8192  # rows that are multiplied at once in their own precision; the products are added up in float64
)


@dataclasses.dataclass(frozen=True)
class Moments:
    """The statistics for a spectrum of any number of rows: their sum and x x^T, in float64."""

    count: int
    total: Float[np.ndarray, " dim"]
    gram: Float[np.ndarray, "dim dim"]

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(self.count + other.count, self.total + other.total, self.gram + other.gram)


@dataclasses.dataclass(frozen=True)
class CrossMoments:
    """The statistics for CKA and Procrustes of pairs of rows x and y: both Moments, x y^T, and sums
    weighted by squared lengths.
    """

    x: Moments
    y: Moments
    cross: Float[np.ndarray, "dim_x dim_y"]
    lengths: Float[np.ndarray, "2 2"]  # sums of |x|^2 |x|^2, |x|^2 |y|^2; |y|^2 |x|^2, |y|^2 |y|^2
    x_by: Float[np.ndarray, "2 dim_x"]  # sum of x |x|^2, of x |y|^2
    y_by: Float[np.ndarray, "2 dim_y"]  # sum of y |x|^2, of y |y|^2


# ----------------------------------------------------------------------------------------------------
# One space


def moments(parts: Iterable[Float[np.ndarray, "n dim"]]) -> Moments:
    """Return the Moments of all rows of some chunks, at least one."""
    result: Moments | None = None
    for chunk in parts:
        for first in range(0, len(chunk), ROWS_AT_ONCE):
            rows = chunk[first : first + ROWS_AT_ONCE]
            more = Moments(len(rows), rows.sum(0, dtype=np.float64), (rows.T @ rows).astype(np.float64))
            result = more if result is None else result + more
    assert result is not None
    return result


def spectrum(values: Moments) -> Float[np.ndarray, " dim"]:
    """Return the variances along the principal axes, largest first."""
    mean = values.total / values.count
    covariance = values.gram / values.count - np.outer(mean, mean)
    return np.maximum(np.linalg.eigvalsh(covariance)[::-1], 0)


def principal_axes(values: Moments, count: int = 2) -> Float[np.ndarray, "dim count"]:
    """Return the axes of the largest variances, with signs that make their largest entry positive."""
    mean = values.total / values.count
    axes = np.linalg.eigh(values.gram / values.count - np.outer(mean, mean))[1][:, ::-1][:, :count]
    return axes * np.sign(axes[np.abs(axes).argmax(0), np.arange(axes.shape[1])])


def effective_rank(variances: Float[np.ndarray, " dim"]) -> float:
    """Return the exponential of the entropy of the normalized singular values (Roy and Vetterli 2007)."""
    singular = np.sqrt(variances)
    if not singular.sum():
        return 0.0
    shares = singular[singular > 0] / singular.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def mean_cosine(values: Moments) -> float:
    """Return the mean cosine of two different unit rows: 0 for an isotropic space, 1 for a narrow cone."""
    squares = np.trace(values.gram)
    return float((values.total @ values.total - squares) / (values.count * (values.count - 1)))


def modality_gap(x: Moments, y: Moments) -> float:
    """Return the distance between the two centroids (Liang et al. 2022)."""
    return float(np.linalg.norm(x.total / x.count - y.total / y.count))


def alignment(x: Float[np.ndarray, "n dim"], y: Float[np.ndarray, "n dim"]) -> float:
    """Return the mean squared distance within pairs (Wang and Isola 2020); 0 is perfect."""
    return float(np.square(x.astype(np.float64) - y).sum(1).mean())


def uniformity(x: Float[np.ndarray, "n dim"]) -> float:
    """Return the log of the mean of exp(-2 |x_i - x_j|^2) over all pairs i < j (Wang and Isola 2020);
    lower is more uniform.
    """
    squares, total = np.square(x).sum(1), 0.0
    for first in range(0, len(x), 1024):
        chunk = x[first : first + 1024]
        distances = np.maximum(np.square(chunk).sum(1)[:, None] + squares - 2 * chunk @ x.T, 0)
        kernel = np.exp(-2 * distances.astype(np.float64))
        kernel[np.arange(len(chunk)), np.arange(first, first + len(chunk))] = 0
        total += kernel.sum()
    return float(np.log(total / (len(x) * (len(x) - 1))))


def occurrences(neighbors: Int[np.ndarray, "q k"], count: int) -> Int[np.ndarray, " count"]:
    """Return how often each of `count` points is a neighbor of another."""
    return np.bincount(neighbors.reshape(-1), minlength=count)


def skewness(values: Float[np.ndarray, " n"] | Int[np.ndarray, " n"]) -> float:
    """Return the third standardized moment, which for `occurrences` is the hubness (Radovanovic et al.
    2010); 0 for constant values.
    """
    centered = values - values.mean()
    spread = np.sqrt(np.square(centered).mean())
    return float((centered**3).mean() / spread**3) if spread else 0.0


# ----------------------------------------------------------------------------------------------------
# Two spaces over the same rows


def cross_moments(
    parts: Iterable[tuple[Float[np.ndarray, "n dim_x"], Float[np.ndarray, "n dim_y"]]],
) -> CrossMoments:
    """Return the CrossMoments of all rows of some chunks, with the same rows in both."""
    result: CrossMoments | None = None
    for x_all, y_all in parts:
        for first in range(0, len(x_all), ROWS_AT_ONCE):
            x, y = x_all[first : first + ROWS_AT_ONCE], y_all[first : first + ROWS_AT_ONCE]
            squares = np.stack([np.square(x).sum(1), np.square(y).sum(1)]).astype(np.float64)
            more = CrossMoments(
                moments([x]),
                moments([y]),
                (x.T @ y).astype(np.float64),
                squares @ squares.T,
                squares @ x,
                squares @ y,
            )
            result = more if result is None else _add(result, more)
    assert result is not None
    return result


def _add(a: CrossMoments, b: CrossMoments) -> CrossMoments:
    names = [field.name for field in dataclasses.fields(CrossMoments)]
    return CrossMoments(*(getattr(a, name) + getattr(b, name) for name in names))


def linear_cka(x: Float[np.ndarray, "n dim_x"], y: Float[np.ndarray, "n dim_y"]) -> float:
    """Return linear CKA with the unbiased HSIC: 1 for spaces that agree up to rotation and scale, about 0
    for unrelated ones.
    """
    return cka(cross_moments([(x, y)]))


def cka(pairs: CrossMoments) -> float:
    """Return `linear_cka` from CrossMoments; nan below four rows."""
    n, x, y, by = pairs.x.count, pairs.x, pairs.y, pairs
    if n < 4:
        return float("nan")
    xy = _hsic(
        by.cross,
        x.total,
        y.total,
        by.x_by[1],
        by.y_by[0],
        (np.trace(x.gram), np.trace(y.gram)),
        by.lengths[0, 1],
        n,
    )
    xx = _hsic(
        x.gram,
        x.total,
        x.total,
        by.x_by[0],
        by.x_by[0],
        (np.trace(x.gram), np.trace(x.gram)),
        by.lengths[0, 0],
        n,
    )
    yy = _hsic(
        y.gram,
        y.total,
        y.total,
        by.y_by[1],
        by.y_by[1],
        (np.trace(y.gram), np.trace(y.gram)),
        by.lengths[1, 1],
        n,
    )
    return float(xy / np.sqrt(xx * yy)) if xx > 0 and yy > 0 else float("nan")


def _hsic(
    cross: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
    x_by_y: np.ndarray,
    y_by_x: np.ndarray,
    traces: tuple[float, float],
    both: float,
    n: int,
) -> float:
    """Return the unbiased HSIC (Song et al. 2012, Eq. 5) of K = X X^T and L = Y Y^T with zero diagonals,
    without forming them.

    `cross` = X^T Y; x, y = sums of rows; x_by_y = sum of x |y|^2; `traces` of K and L; both = sum of |x|^2
    |y|^2.
    """
    trace = np.square(cross).sum() - both  # tr(K L) without the diagonals
    sums = (x @ x - traces[0]) * (y @ y - traces[1])  # 1^T K 1 1^T L 1
    middle = x @ cross @ y - x @ x_by_y - y @ y_by_x + both  # 1^T K L 1
    return float(trace + sums / ((n - 1) * (n - 2)) - 2 * middle / (n - 2)) / (n * (n - 3))


def procrustes(pairs: CrossMoments) -> float:
    """Return the share of the variance of y that the best shift, rotation and scale onto x leaves: 0 for
    the same shape.
    """
    n = pairs.x.count
    cross = pairs.cross - np.outer(pairs.x.total, pairs.y.total) / n
    spread = [np.trace(m.gram) - m.total @ m.total / n for m in (pairs.x, pairs.y)]
    if min(spread) <= 0:
        return float("nan")
    return float(max(0.0, 1 - np.linalg.svd(cross, compute_uv=False).sum() ** 2 / (spread[0] * spread[1])))


def turn_onto(
    x: Float[np.ndarray, "n dim"],
    y: Float[np.ndarray, "n dim"],
    moved: Float[np.ndarray, "m dim"] | None = None,
) -> Float[np.ndarray, "m dim"]:
    """Map `moved` (y) by the shift, rotation, reflection and scale that best align y with x, to compare
    two maps.
    """
    moved = y if moved is None else moved
    centered_x, centered_y = x - x.mean(0), y - y.mean(0)
    left, values, right = np.linalg.svd(centered_y.T @ centered_x)
    scale = values.sum() / max(float(np.square(centered_y).sum()), 1e-12)
    return scale * (moved - y.mean(0)) @ left @ right + x.mean(0)


def neighbor_overlap(a: Int[np.ndarray, "n k"], b: Int[np.ndarray, "n k"]) -> Float[np.ndarray, " n"]:
    """Return the share of each row's k neighbors in one space that are among its k neighbors in the other."""
    shares = np.empty(len(a))
    for first in range(0, len(a), 4096):  # k * k comparisons per row
        span = slice(first, first + 4096)
        shares[span] = (a[span, :, None] == b[span, None, :]).any(2).mean(1)
    return shares


def rank_correlation(x: Float[np.ndarray, "n dim_x"], y: Float[np.ndarray, "n dim_y"]) -> float:
    """Return Spearman's correlation of the pairwise cosines of unit rows in two spaces."""
    above = np.triu_indices(len(x), 1)
    return spearman((x @ x.T)[above], (y @ y.T)[above])


def spearman(x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"]) -> float:
    """Return the correlation of ranks, with mean ranks for ties; nan if one side is constant."""
    ranks = np.stack([_mean_ranks(x), _mean_ranks(y)])
    ranks -= ranks.mean(1, keepdims=True)
    spread = np.square(ranks).sum(1)
    return (
        float((ranks[0] * ranks[1]).sum() / np.sqrt(spread[0] * spread[1])) if spread.all() else float("nan")
    )


def _mean_ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[inverse]
