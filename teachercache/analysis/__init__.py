"""Analyze the embeddings of a cache, and what a student preserves of its teacher's.

The functions take arrays; most also take the `Vectors` of a cache
(`teachercache.search.vectors.usable_vectors`), for many rows. docs/reference/analysis.md has examples.
"""

from teachercache.analysis.clusters import fit_centers, keywords
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
    neighbor_overlap,
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
from teachercache.analysis.neighbors import exact_groups, grouped, near_pairs, nearest, outlier_scores
from teachercache.search.vectors import unit

__all__ = [
    "alignment",
    "cka",
    "cross_moments",
    "effective_rank",
    "exact_groups",
    "fit_centers",
    "flatten",
    "grouped",
    "keywords",
    "linear_cka",
    "mean_cosine",
    "modality_gap",
    "moments",
    "near_pairs",
    "nearest",
    "neighbor_overlap",
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
