"""Effective robustness (Taori et al. 2020): accuracy on a shifted test set beyond what a model's accuracy predicts.

    rho = acc_shift - beta(acc),  beta = expit(a logit(acc) + b), fitted by least squares to standard models

If a shifted set has only some of ImageNet's classes (-A, -R), acc is the accuracy on ImageNet's images of those classes.
The user provides the accuracies of the standard models, `baselines.csv` beside the data, for example from the authors'
testbed.
"""

import math
from collections.abc import Sequence
from pathlib import Path

from teachercache.core.errors import UserError
from teachercache.data.foreign import Foreign
from teachercache.data.readers.csv_files import parse_table

Points = list[tuple[float, float]]  # for each standard model its accuracy on ImageNet and on the shifted set


def read_baselines(path: Path) -> dict[str, Points]:
    """Read the accuracies of standard models.

    Args:
        path: A CSV file with the columns `model`, `imagenet1k` and one for each shifted set; accuracies are shares of 1.
            A column `<set>:imagenet1k` holds accuracies on ImageNet's images of that set's classes, for -A and -R.

    Returns:
        The points of each shifted set.

    Raises:
        UserError: If an accuracy is not a number between 0 and 1.
    """
    try:
        table = parse_table(path.read_bytes(), known=("model", "imagenet1k"))
    except Foreign as error:
        raise UserError(f"{path} is not a CSV file that can be read: {error}") from error
    repeated = next((name for name in table.names if name and table.names.count(name) > 1), "")
    problem = next((line.problem for line in table.lines if line.problem), "")
    if repeated or problem:
        raise UserError(f"{path}: {problem or f'column {repeated!r} comes several times'}")
    rows = [dict(zip(table.names, map(str.strip, line.cells), strict=True)) for line in table.lines]
    if not any(name.rpartition(":")[2] == "imagenet1k" for name in table.names):
        raise UserError(f"{path} has no column imagenet1k: see evaluation/metrics/robustness.py")
    names = {
        name
        for row in rows
        for name in row
        if name and name not in ("model", "imagenet1k") and ":" not in name
    }
    points: dict[str, Points] = {name: [] for name in sorted(names)}
    try:
        for name, row in ((name, row) for name in points for row in rows):
            inside = row.get(f"{name}:imagenet1k") or row.get("imagenet1k")
            if inside and row[name]:
                points[name].append((float(inside), float(row[name])))
    except ValueError as error:
        raise UserError(f"{path}: {error}; write accuracies as shares, 0.562") from error
    outside = [
        value for of_set in points.values() for pair in of_set for value in pair if not 0 <= value <= 1
    ]
    if outside:
        raise UserError(f"{path} has an accuracy of {outside[0]:g}: write shares of 1, not percentages")
    return points


def effective_robustness(inside: float, shifted: float, points: Sequence[tuple[float, float]]) -> float:
    """Return the effective robustness rho of a model.

    Args:
        inside: Its accuracy on ImageNet.
        shifted: Its accuracy on the shifted set.
        points: The standard models.

    Raises:
        UserError: If there are too few standard models, or the accuracy has no logit.
    """
    if not 0 < inside < 1:
        raise UserError(f"an accuracy of {inside:g} has no logit, so effective robustness is not defined")
    usable = [(logit(x), logit(y)) for x, y in points if 0 < x < 1 and 0 < y < 1]
    if len({x for x, _ in usable}) < 2:
        raise UserError("effective robustness needs two standard models at least, of different accuracy")
    mean_x, mean_y = (sum(values) / len(usable) for values in zip(*usable, strict=True))
    slope = sum((x - mean_x) * (y - mean_y) for x, y in usable) / sum((x - mean_x) ** 2 for x, _ in usable)
    expected = mean_y + slope * (logit(inside) - mean_x)
    return shifted - 1 / (1 + math.exp(-expected))


def logit(share: float) -> float:
    """Return ln(p / (1 - p))."""
    return math.log(share / (1 - share))
