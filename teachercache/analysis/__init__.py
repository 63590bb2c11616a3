"""Look into a cache, and at what a student kept of its teacher. Not for training.

The functions below take arrays; `Vectors` of a cache (`teachercache.search.vectors.usable_vectors`) do as well where rows are
many. docs/analysis.md shows them at work.
"""

from teachercache.analysis.clusters import fit_centres, keywords
from teachercache.analysis.maps import flatten
from teachercache.analysis.matching import pair_cosines, recalls, strict_ranks, surprise
from teachercache.analysis.measures import (
    alignment,
    cka,
    cross_moments,
    effective_rank,
    linear_cka,
    mean_cosine,
    modality_gap,
    moments,
    neighbour_overlap,
    occurrences,
    principal_axes,
    procrustes,
    rank_correlation,
    skewness,
    spearman,
    spectrum,
    turn_onto,
    uniformity,
)
from teachercache.analysis.neighbours import exact_groups, grouped, near_pairs, nearest, outlier_scores
from teachercache.search.vectors import unit

__all__ = [
    "alignment",
    "cka",
    "cross_moments",
    "effective_rank",
    "exact_groups",
    "fit_centres",
    "flatten",
    "grouped",
    "keywords",
    "linear_cka",
    "mean_cosine",
    "modality_gap",
    "moments",
    "near_pairs",
    "nearest",
    "neighbour_overlap",
    "occurrences",
    "outlier_scores",
    "pair_cosines",
    "principal_axes",
    "procrustes",
    "rank_correlation",
    "recalls",
    "skewness",
    "spearman",
    "spectrum",
    "strict_ranks",
    "surprise",
    "turn_onto",
    "uniformity",
    "unit",
]
