"""SugarCrepe (Hsieh et al. 2023): a caption against a fluent wrong one, in seven ways of making it wrong.

A tie is a miss and is counted. `acc` is the mean over the files found; `add`, `replace`, `swap` are the paper's means.
"""

from pathlib import Path
from typing import Any

from evaluation.data.compositional import read_sugar_crepe
from evaluation.models.matcher import Matcher, MatchScores, total_cost
from evaluation.tasks.matching.aro import cases_metrics
from teachercache.core.errors import UserError

FILES = ("add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj")


def evaluate(matcher: Matcher, data: Path) -> dict[str, Any]:
    """Accuracy per file below `data` or `data`/data; pictures in val2017/ or images/ of `data` or beside it."""
    folder = next(
        (
            folder
            for folder in (data, data / "data")
            if any((folder / f"{name}.json").is_file() for name in FILES)
        ),
        None,
    )
    if folder is None:
        raise UserError(f"no SugarCrepe in {data}: put {', '.join(f'{name}.json' for name in FILES)} there")
    places = [root / name for root in (data, folder, data.parent) for name in ("val2017", "images")]
    pictures = next((place for place in places if place.is_dir()), None)
    if pictures is None:
        raise UserError(f"no pictures for {folder}: put COCO's val2017/ into {data}")
    metrics: dict[str, Any] = {}
    heard: list[MatchScores] = []
    for name in FILES:
        if (folder / f"{name}.json").is_file():
            found, cost = cases_metrics(matcher, name, read_sugar_crepe(folder / f"{name}.json", pictures))
            metrics[name] = found[f"{name}_micro"]
            metrics |= {f"{name}{end}": found[f"{name}{key}"] for end, key in ENDS.items()}
            heard.append(cost)
    own = [name for name in FILES if name in metrics]
    metrics["acc"] = sum(metrics[name] for name in own) / len(own)
    for way in ("add", "replace", "swap"):
        members = [metrics[name] for name in own if name.startswith(way)]
        if members:
            metrics[way] = sum(members) / len(members)
    return metrics | total_cost(heard)


ENDS = {"_low": "_micro_low", "_high": "_micro_high", "_ties": "_ties", "_n": "_n"}
