"""Measure students during and after training."""

import functools
import json
from pathlib import Path

from student.inference.answerer import run_answerer
from student.inference.encoder import find_encoder
from teachercache.core.progress import say


def encoder_scorer(run):
    """What scores a run folder while it trains: `run.eval_task` on the data's val rows, else on its test rows."""
    from evaluation.results.run import scorer

    score, split = scorer(run.eval_task, run.data)
    if split == "test":
        say(
            f"{run.data} has no val rows: the best student is chosen by test rows, on which its result is then too good"
        )
    return lambda folder: score(find_encoder(str(folder))[0])


def answer_scorer(run):
    """What scores a task student while it trains: the accuracy on the data's val rows, else on its test rows."""
    from evaluation.results.run import run_answered
    from student.inference.answerer import load_task_model

    def score(folder):
        task = load_task_model(folder, device="cpu", cache=run.cache).task.name
        metrics = run_answered(task, [[run_answerer(folder, task, run.data)]], run.data)[0]["metrics"]
        chosen = {
            key: metrics[key] for key in ("q2a", "qa2r", "accuracy") if isinstance(metrics.get(key), float)
        }
        return sum(chosen.values()) / len(chosen), chosen

    return score


def measure_suite(models: tuple[str, ...], data: str, out: Path, figures: Path | None, as_json: bool) -> None:
    """Every data set that is found below `data`."""
    from evaluation.results.figures import draw_suite
    from evaluation.results.suite import run_suite
    from evaluation.results.suite_tables import suite_table, write_suite

    loaded = [find_encoder(model) for model in models]
    seen = functools.partial(draw_suite, figures) if figures else None
    report = run_suite([encoder for encoder, _ in loaded], Path(data), seen=seen)
    for result in report.results:
        folders = [folder for encoder, folder in loaded if encoder.pretrained == result["pretrained"]]
        keep_result(result, folders[0] if folders else None)
    say("wrote " + ", ".join(map(str, write_suite(report, out))))
    found = {"results": report.results, "skipped": report.skipped}
    print(json.dumps(found) if as_json else suite_table(report))


def keep_result(result: dict, folder: Path | None) -> None:
    """A run's result stays with it, and what it wrote."""
    texts = result.pop("results", None)
    if folder is not None:
        from teachercache.core.paths import write_whole

        for inner, found in (("eval", result), ("written", texts)):
            if found is not None:
                path = folder / inner / f"{result['dataset']}_{result['task']}.json".replace(":", "-")
                path.parent.mkdir(exist_ok=True)
                write_whole(path, json.dumps(found) + "\n")
