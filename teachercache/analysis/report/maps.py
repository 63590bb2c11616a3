"""Two-dimensional maps of a cache for the report."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, Int

from teachercache.analysis import measures
from teachercache.analysis.maps import flatten
from teachercache.analysis.measures import Moments
from teachercache.analysis.report.opened import Subject, vectors_at


def make_maps(
    subject: Subject, rows: Int[np.ndarray, " n"], moments: Mapping[str, Moments], *, kind: str = "pca"
) -> dict[str, Float[np.ndarray, "n 2"]]:
    """Return the coordinates of rows on each map: images, texts, and both together (two arrays); nan for
    rows without a vector.
    """
    spaces = {"pictures": subject.pictures, "texts": subject.firsts}
    vectors = {name: vectors_at(values, rows) for name, values in spaces.items() if values is not None}
    maps = {}
    for name, (rows_with, x) in vectors.items():
        maps[name] = np.full((len(rows), 2), np.nan)
        maps[name][rows_with] = flatten(x, moments.get(name), kind=kind)
    if subject.both:
        (at, x), (text_at, y) = vectors["pictures"], vectors["texts"]
        placed = flatten(np.concatenate([x, y]), moments["pictures"] + moments["texts"], kind=kind)
        for name, rows_with, values in (
            ("both", at, placed[: len(x)]),
            ("both_texts", text_at, placed[len(x) :]),
        ):
            maps[name] = np.full((len(rows), 2), np.nan)
            maps[name][rows_with] = values
    return maps


def second_map(
    first: Float[np.ndarray, "n 2"], subject: Subject, at: Int[np.ndarray, " n"], *, kind: str = "pca"
) -> Float[np.ndarray, "n 2"]:
    """Map the same rows of another cache (at[i] is the row there, -1: none), aligned with the first map."""
    rows_with, x = vectors_at(subject.main, at)
    placed = np.full((len(at), 2), np.nan)
    if len(rows_with) > 2:
        placed[rows_with] = flatten(x, kind=kind)
        common = rows_with[~np.isnan(first[rows_with, 0])]
        if len(common) > 2:
            placed[rows_with] = measures.turn_onto(first[common], placed[common], placed[rows_with])
    return placed
