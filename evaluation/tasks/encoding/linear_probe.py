"""Linear probe as in CLIP (Radford et al. 2021, appendix A.3): logistic regression on frozen image features.

scikit-learn's L-BFGS with at most 1,000 iterations. The L2 strength is chosen on validation rows among 97 values from
1e-6 to 1e6, eight per decade, by CLIP's parametric binary search: first seven values two decades apart, then the two
values around the best at half the distance, and so on down to neighboring values. The final probe is fitted on train
and val together and measured on test. scikit-learn's C is the inverse of CLIP's lambda; the grid is the same.

Features are the unnormalized ones before the projection into the joint space if the tower has such a projection (ViT,
timm). A ModifiedResNet projects inside its pooling, and other encoders are used as a whole: their features are the
embeddings. `features` in the result names the choice. Free choices: without a split `val` a fifth of each class's
training rows, drawn with seed 0, is used for validation; among equally good strengths the strongest is chosen.
"""

import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.func import functional_call

from evaluation.data.splits import known_splits
from evaluation.metrics.ranking import accuracies
from evaluation.models.encoder import Encoder, encode_rows
from evaluation.tasks.task import Metrics
from teachercache.core.errors import UserError
from teachercache.data.manifest import Manifest
from teachercache.teachers.clip.towers import tower_kind
from teachercache.teachers.hooks import output_tensor

if TYPE_CHECKING:
    from sklearn.linear_model import LogisticRegression

PER_DECADE, DECADES = 8, 6
HELD_OUT, SEED = 5, 0  # one row in five


def evaluate(encoder: Encoder, manifest: Manifest) -> Metrics:
    """Compute lp_acc1, lp_acc5 and lp_mean_per_class_recall (clip-benchmark's keys), and the C that was chosen.

    CLIP reports the mean per class for Caltech101, Pets, Flowers and Aircraft, and plain accuracy otherwise.

    Raises:
        UserError: If the data have too few labeled images, or features are not finite.
    """
    _sklearn()
    splits = labeled_splits(manifest)
    encode, kind = probe_features(encoder)
    rows = [row for split_rows in splits.values() for row in split_rows]
    features, kept, skipped = encode_rows(encoder, manifest, rows, encode)
    if not features.isfinite().all():
        raise UserError(
            f"{encoder.name} outputs NaN or infinity for some pictures of {manifest.data}: train it anew"
        )
    x, y, num_classes = arrays(manifest, splits, features, kept)
    c = best_strength(lambda c: float((fit(x["train"], y["train"], c).predict(x["val"]) == y["val"]).mean()))
    probe = fit(np.concatenate([x["train"], x["val"]]), np.concatenate([y["train"], y["val"]]), c)
    scores = class_scores(probe, x["test"], max(num_classes, y["test"].max() + 1))
    values = accuracies(scores, torch.from_numpy(y["test"]))
    metrics: Metrics = {f"lp_{name}": value for name, value in values.items()}
    return metrics | {
        "C": c,
        "iterations": int(probe.n_iter_.max()),
        "features": kind,
        "num_train": len(y["train"]) + len(y["val"]),
        "num_val": len(y["val"]),
        "num_images": len(y["test"]),
        "num_classes": num_classes,
        "num_skipped": len(skipped),
    }


# ----------------------------------------------------------------------------------------------------
# Rows and features


def labeled_splits(manifest: Manifest) -> dict[str, list[int]]:
    """Return the labeled rows of train, val and test; val is held out of train if the data have none.

    Raises:
        UserError: If train or test has no labeled rows.
    """
    labels = manifest.column("label")
    splits: dict[str, list[int]] = {"train": [], "val": [], "test": []}
    for row, name in enumerate(known_splits(manifest)):
        if labels[row] and name in splits:
            splits[name].append(row)
    for name in ("train", "test"):
        if not splits[name]:
            raise UserError(
                f"{manifest.data} has no {name} rows with labels: a linear probe needs folders "
                "`train/<class>` and `test/<class>`"
            )
    if not splits["val"]:
        splits["train"], splits["val"] = hold_out(splits["train"], [labels[row] for row in splits["train"]])
    return splits


def hold_out(rows: Sequence[int], labels: Sequence[str]) -> tuple[list[int], list[int]]:
    """Split rows into training and validation rows, drawn by class with seed 0.

    A fifth of each class (rounded; one row of two to seven) is for validation.
    """
    draw, held = np.random.default_rng(SEED), set()
    for label in sorted(set(labels)):
        members = [row for row, other in zip(rows, labels, strict=True) if other == label]
        count = max(1, round(len(members) / HELD_OUT)) if len(members) > 1 else 0
        held |= set(draw.permutation(members)[:count].tolist())
    return [row for row in rows if row not in held], [row for row in rows if row in held]


def arrays(
    manifest: Manifest, splits: dict[str, list[int]], features: Float[Tensor, "n width"], kept: list[int]
) -> tuple[dict[str, Float[np.ndarray, "_ width"]], dict[str, Int[np.ndarray, " _"]], int]:
    """Return the features and class numbers of each split's readable rows, and the number of training classes.

    A class that only test rows have gets a number after the others, which no prediction can hit.

    Raises:
        UserError: If too few images are readable.
    """
    labels, place = manifest.column("label"), {row: i for i, row in enumerate(kept)}
    usable = {name: [row for row in rows if row in place] for name, rows in splits.items()}
    if len({labels[row] for row in usable["train"]}) < 2 or not usable["val"] or not usable["test"]:
        raise UserError(
            f"{manifest.data} has too few pictures: a linear probe needs two classes of several training "
            "pictures, and test pictures"
        )
    classes = sorted({labels[row] for row in usable["train"] + usable["val"]})
    number = {label: i for i, label in enumerate(classes)}
    x = {name: features[[place[row] for row in rows]].numpy() for name, rows in usable.items()}
    y = {
        name: np.array([number.get(labels[row], len(classes)) for row in rows])
        for name, rows in usable.items()
    }
    return x, y, len(classes)


def probe_features(encoder: Encoder) -> tuple[Callable[[Tensor], Tensor], str]:
    """Return a function from images [n, 3, height, width] to the probe's features [n, width], and its description."""
    if encoder.tower is None:
        return encoder.encode_image, "embedding"
    tower: Any = encoder.tower
    kind = tower_kind(tower)
    if kind == "vit" and tower.proj is not None:
        identity = torch.eye(len(tower.proj), dtype=tower.proj.dtype, device=tower.proj.device)

        def unprojected(images: Tensor) -> Tensor:
            return output_tensor(functional_call(tower, {"proj": identity}, (images,)))

        return unprojected, "before the projection"
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
    """Return the C that CLIP's parametric binary search chooses; the smallest among equally good ones."""
    step, furthest = 2 * PER_DECADE, DECADES * PER_DECADE
    tried: dict[int, float] = {}  # exponent in steps of 1/8 -> accuracy

    def best_of(exponents: list[int]) -> int:
        for exponent in exponents:
            if exponent not in tried and abs(exponent) <= furthest:
                tried[exponent] = accuracy(10 ** (exponent / PER_DECADE))
        return min(tried, key=lambda exponent: (-tried[exponent], exponent))

    best = best_of(list(range(-furthest, furthest + 1, step)))
    while step > 1:
        step //= 2
        best = best_of([best - step, best + step])
    return 10 ** (best / PER_DECADE)


def fit(x: Float[np.ndarray, "n width"], y: Int[np.ndarray, " n"], c: float) -> "LogisticRegression":
    """Fit a logistic regression; stopping after 1,000 iterations without convergence is no error."""
    sklearn = _sklearn()
    with warnings.catch_warnings():
        # `iterations` in the result shows it
        warnings.simplefilter("ignore", sklearn.exceptions.ConvergenceWarning)
        return sklearn.linear_model.LogisticRegression(C=c, solver="lbfgs", max_iter=1000).fit(x, y)


def class_scores(
    probe: "LogisticRegression", x: Float[np.ndarray, "n width"], num_classes: int
) -> Float[Tensor, "n classes"]:
    """Return the probe's scores of each class; -inf for a class without training rows."""
    values = probe.decision_function(x)
    values = np.stack([-values, values], 1) if values.ndim == 1 else values
    scores = torch.full((len(x), num_classes), -torch.inf)
    scores[:, torch.from_numpy(probe.classes_)] = torch.from_numpy(values).float()
    return scores


def _sklearn() -> ModuleType:
    """scikit-learn with the parts that the probe uses."""
    try:
        import sklearn
        import sklearn.exceptions
        import sklearn.linear_model
    except ImportError as error:
        raise UserError("a linear probe needs scikit-learn: pip install 'teachercache[eval]'") from error
    return sklearn
