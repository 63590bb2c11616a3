"""Linear probe as in CLIP (Radford et al. 2021, appendix A.3): logistic regression on frozen features of pictures.

L-BFGS, at most 1,000 iterations, scikit-learn. The L2 strength is found on validation rows among 97 values from 1e-6
to 1e6, eight a decade: seven of them two decades apart first, then the two around the best at half the distance, and
half of that, until neighbours have been tried. Then the probe is fitted on train and val together and measured on test.
scikit-learn's C is the inverse of CLIP's lambda; the grid is the same either way.

Features are those before the projection into the joint space, as they are (not normalised), where a tower has one: a
ViT's, a timm tower's. A ModifiedResNet projects within its pooling, and any other encoder is not looked into: there
they are the embedding. `features` in the result says which. Free choices: without a split `val` every class gives a
fifth of its training rows, drawn by seed 0, for validation; of equally good strengths the strongest is taken.
"""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call

from evaluation.metrics.ranking import accuracies
from evaluation.models.encoder import Encoder, encode_rows
from teachercache.core.errors import UserError
from teachercache.data.manifest import Manifest
from teachercache.teachers.clip.towers import tower_kind
from teachercache.teachers.hooks import output_tensor

PER_DECADE, DECADES = 8, 6
HELD_OUT, SEED = 5, 0  # one row in five


def evaluate(encoder: Encoder, manifest: Manifest) -> dict[str, Any]:
    """lp_acc1, lp_acc5, lp_mean_per_class_recall (clip-benchmark's keys), and the C that validation chose.

    CLIP reports the mean per class for Caltech101, Pets, Flowers and Aircraft, and plain accuracy elsewhere.
    """
    _sklearn()
    parts = labelled_splits(manifest)
    encode, which = probe_features(encoder)
    rows = [row for part in parts.values() for row in part]
    features, kept, skipped = encode_rows(encoder, manifest, rows, encode)
    if not features.isfinite().all():
        raise UserError(
            f"{encoder.name} says NaN or infinity of some pictures of {manifest.data}: train it anew"
        )
    x, y, classes = arrays(manifest, parts, features, kept)
    c = best_strength(lambda c: float((fit(x["train"], y["train"], c).predict(x["val"]) == y["val"]).mean()))
    probe = fit(np.concatenate([x["train"], x["val"]]), np.concatenate([y["train"], y["val"]]), c)
    scores = class_scores(probe, x["test"], max(classes, y["test"].max() + 1))
    found = accuracies(scores, torch.from_numpy(y["test"]))
    return {f"lp_{name}": value for name, value in found.items()} | {
        "C": c,
        "iterations": int(probe.n_iter_.max()),
        "features": which,
        "num_train": len(y["train"]) + len(y["val"]),
        "num_val": len(y["val"]),
        "num_images": len(y["test"]),
        "num_classes": classes,
        "num_skipped": len(skipped),
    }


# ----------------------------------------------------------------------------------------------------
# Rows and features


def labelled_splits(manifest: Manifest) -> dict[str, list[int]]:
    """Labelled rows of train, val and test; val is held out of train where the data has none."""
    labels, split = manifest.column("label"), manifest.column("split")
    renamed = {"validation": "val"}
    parts: dict[str, list[int]] = {"train": [], "val": [], "test": []}
    for row, name in enumerate(split):
        if labels[row] and renamed.get(name, name) in parts:
            parts[renamed.get(name, name)].append(row)
    for name in ("train", "test"):
        if not parts[name]:
            raise UserError(
                f"{manifest.data} has no {name} rows with labels: a linear probe needs folders "
                "`train/<class>` and `test/<class>`"
            )
    if not parts["val"]:
        parts["train"], parts["val"] = hold_out(parts["train"], [labels[row] for row in parts["train"]])
    return parts


def hold_out(rows: list[int], labels: list[str]) -> tuple[list[int], list[int]]:
    """Rows that stay, and a fifth of each class (rounded; of two to seven rows one) for validation, by seed 0."""
    draw, held = np.random.default_rng(SEED), set()
    for label in sorted(set(labels)):
        own = [row for row, other in zip(rows, labels, strict=True) if other == label]
        count = max(1, round(len(own) / HELD_OUT)) if len(own) > 1 else 0
        held |= set(draw.permutation(own)[:count].tolist())
    return [row for row in rows if row not in held], [row for row in rows if row in held]


def arrays(
    manifest: Manifest, parts: dict[str, list[int]], features: Tensor, kept: list[int]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], int]:
    """Features [n, width] and classes [n] of each split's readable rows, and how many classes training has.

    A class that only test rows have gets the number behind the others: nothing can hit it.
    """
    labels, place = manifest.column("label"), {row: i for i, row in enumerate(kept)}
    usable = {name: [row for row in part if row in place] for name, part in parts.items()}
    if len({labels[row] for row in usable["train"]}) < 2 or not usable["val"] or not usable["test"]:
        raise UserError(
            f"{manifest.data} has too few pictures: a linear probe needs two classes of several training "
            "pictures, and test pictures"
        )
    classes = sorted({labels[row] for row in usable["train"] + usable["val"]})
    number = {label: i for i, label in enumerate(classes)}
    x = {name: features[[place[row] for row in part]].numpy() for name, part in usable.items()}
    y = {
        name: np.array([number.get(labels[row], len(classes)) for row in part])
        for name, part in usable.items()
    }
    return x, y, len(classes)


def probe_features(encoder: Encoder) -> tuple[Callable[[Tensor], Tensor], str]:
    """Pictures [n, 3, height, width] to the features of the probe [n, width], and in words which those are."""
    tower, kind = encoder.tower, "" if encoder.tower is None else tower_kind(encoder.tower)
    if kind == "vit" and tower.proj is not None:
        unprojected = {"proj": torch.eye(len(tower.proj), dtype=tower.proj.dtype, device=tower.proj.device)}
        return lambda images: output_tensor(
            functional_call(tower, unprojected, (images,))
        ), "before the projection"
    layers = dict(tower.head.named_children()) if kind == "timm" else {}
    if "proj" not in layers and "mlp" not in layers:
        return encoder.encode_image, "embedding"

    def pooled(images: Tensor) -> Tensor:
        features = tower.trunk(images)
        return layers["pool"](features) if "pool" in layers else features

    return pooled, "before the projection"


# ----------------------------------------------------------------------------------------------------
# The probe


def best_strength(accuracy: Callable[[float], float]) -> float:
    """CLIP's parametric binary search for C; equally good values are as good as the smallest of them."""
    step, furthest = 2 * PER_DECADE, DECADES * PER_DECADE
    tried: dict[int, float] = {}

    def best_of(eighths: list[int]) -> int:
        for eighth in eighths:
            if eighth not in tried and abs(eighth) <= furthest:
                tried[eighth] = accuracy(10 ** (eighth / PER_DECADE))
        return min(tried, key=lambda eighth: (-tried[eighth], eighth))

    best = best_of(list(range(-furthest, furthest + 1, step)))
    while step > 1:
        step //= 2
        best = best_of([best - step, best + step])
    return 10 ** (best / PER_DECADE)


def fit(x: np.ndarray, y: np.ndarray, c: float) -> Any:
    """Logistic regression on features [n, width] and classes [n]; that 1,000 iterations were too few is no error."""
    sklearn = _sklearn()
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", sklearn.exceptions.ConvergenceWarning
        )  # `iterations` in the result says it
        return sklearn.linear_model.LogisticRegression(C=c, solver="lbfgs", max_iter=1000).fit(x, y)


def class_scores(probe: Any, x: np.ndarray, classes: int) -> Tensor:
    """What the probe says of each class [n, classes]; -inf of one that it never saw."""
    found = probe.decision_function(x)
    found = np.stack([-found, found], 1) if found.ndim == 1 else found
    scores = torch.full((len(x), classes), -torch.inf)
    scores[:, torch.from_numpy(probe.classes_)] = torch.from_numpy(found).float()
    return scores


def _sklearn() -> Any:
    """scikit-learn with the parts that the probe uses."""
    try:
        import sklearn
        import sklearn.exceptions
        import sklearn.linear_model
    except ImportError as error:
        raise UserError("a linear probe needs scikit-learn: pip install 'teachercache[eval]'") from error
    return sklearn
