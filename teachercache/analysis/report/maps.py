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
    """Coordinates of rows on each map: pictures, texts, and both together twice; nan where a row has no such vector."""
    found = {"pictures": subject.pictures, "texts": subject.firsts}
    vectors = {name: vectors_at(part, rows) for name, part in found.items() if part is not None}
    maps = {}
    for name, (there, x) in vectors.items():
        maps[name] = np.full((len(rows), 2), np.nan)
        maps[name][there] = flatten(x, moments.get(name), kind=kind)
    if subject.both:
        (at, x), (text_at, y) = vectors["pictures"], vectors["texts"]
        placed = flatten(np.concatenate([x, y]), moments["pictures"] + moments["texts"], kind=kind)
        for name, there, part in (("both", at, placed[: len(x)]), ("both_texts", text_at, placed[len(x) :])):
            maps[name] = np.full((len(rows), 2), np.nan)
            maps[name][there] = part
    return maps


def second_map(
    first: Float[np.ndarray, "n 2"], subject: Subject, at: Int[np.ndarray, " n"], *, kind: str = "pca"
) -> Float[np.ndarray, "n 2"]:
    """The same rows (at row at[i] of another cache, -1: nowhere) on a map of that cache, turned to lie on the first."""
    there, x = vectors_at(subject.main, at)
    placed = np.full((len(at), 2), np.nan)
    if len(there) > 2:
        placed[there] = flatten(x, kind=kind)
        known = there[~np.isnan(first[there, 0])]
        if len(known) > 2:
            placed[there] = measures.turn_onto(first[known], placed[known], placed[there])
    return placed
