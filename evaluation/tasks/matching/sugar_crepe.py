"""SugarCrepe (Hsieh et al. 2023): a caption against a fluent hard negative, made in one of seven ways.

A tie is a miss and is counted. `acc` is the mean over the files that exist; `add`, `replace` and `swap` are the paper's
means.
"""

from pathlib import Path

from evaluation.data.compositional import read_sugar_crepe
from evaluation.models.matcher import Matcher, MatchScores, total_cost
from evaluation.tasks.matching.aro import cases_metrics
from evaluation.tasks.task import Metrics
from teachercache.core.errors import UserError

FILES = ("add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj")
# Endings of our keys, and of those of `cases_metrics`
ENDINGS = {"_low": "_micro_low", "_high": "_micro_high", "_ties": "_ties", "_n": "_n"}


def evaluate(matcher: Matcher, data: Path) -> Metrics:
    """Compute the accuracy of each file and their means.

    Args:
        matcher: The model.
        data: The folder with the files, or with a folder `data` that has them. Images are in val2017/ or images/ of
            one of the two or beside `data`.

    Raises:
        UserError: If there are no files or no images.
    """
    folder = next((folder for folder in (data, data / "data") if _has_files(folder)), None)
    if folder is None:
        raise UserError(f"no SugarCrepe in {data}: put {', '.join(f'{name}.json' for name in FILES)} there")
    places = [root / name for root in (data, folder, data.parent) for name in ("val2017", "images")]
    images = next((place for place in places if place.is_dir()), None)
    if images is None:
        raise UserError(f"no pictures for {folder}: put COCO's val2017/ into {data}")
    metrics: Metrics = {}
    accuracy: dict[str, float] = {}
    measured: list[MatchScores] = []
    for name in FILES:
        if (folder / f"{name}.json").is_file():
            values, scores = cases_metrics(matcher, name, read_sugar_crepe(folder / f"{name}.json", images))
            metrics[name] = accuracy[name] = float(values[f"{name}_micro"])
            metrics |= {f"{name}{ending}": values[f"{name}{key}"] for ending, key in ENDINGS.items()}
            measured.append(scores)
    metrics["acc"] = sum(accuracy.values()) / len(accuracy)
    for way in ("add", "replace", "swap"):
        of_way = [value for name, value in accuracy.items() if name.startswith(way)]
        if of_way:
            metrics[way] = sum(of_way) / len(of_way)
    return metrics | total_cost(measured)


def _has_files(folder: Path) -> bool:
    return any((folder / f"{name}.json").is_file() for name in FILES)
