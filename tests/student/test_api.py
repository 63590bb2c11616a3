"""The Python interface of phase 2: the same as the commands, and a training leaves nothing behind in its process."""

import json
import logging
import os
import shutil
import signal
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib
import pytest
import torch
from processes import start

from student import api
from teachercache.core.errors import UserError

ROOT = Path(__file__).parents[2]
SMALL = {"model": "vit-micro", "run.workers": 0}
FIRST = {"recipe": "clip_kd", "settings": SMALL | {"fd": 1000}, "steps": 3, "batch_size": 8}
SECOND = {
    "recipe": "clip_kd",
    "settings": SMALL | {"mfd": 500, "mask_ratio": 0.5, "optim.max_grad_norm": 1.0},
    "steps": 3,
    "batch_size": 8,
    "seed": 2,
}
BETWEEN = [
    {"recipe": "psd", "settings": SMALL | {"run.zero": 3}, "steps": 2, "batch_size": 8, "seed": 5},
    {
        "recipe": "clip",
        "settings": SMALL | {"run.precision": "bfloat16", "run.grad_checkpointing": True},
        "steps": 2,
        "batch_size": 16,
        "micro_batch": 8,
        "eval_every": 2,
    },
]


def numbers(run: Path) -> dict[str, bytes]:
    """What a training computed: its losses and its weights."""
    return {name: (run / name).read_bytes() for name in ("metrics.jsonl", "model.safetensors")}


def train_alone(words: dict) -> None:
    """What a process of its own does."""
    api.train(**words)


@pytest.fixture(scope="module")
def alone(squares, cache, tmp_path_factory) -> list[dict[str, bytes]]:
    """The first and the second training, each in a process of its own."""
    home = tmp_path_factory.mktemp("alone")
    processes = []
    for name, words in (("first", FIRST), ("second", SECOND)):
        places = {"data": str(squares), "cache": str(cache), "out": str(home / name)}
        processes.append(start(train_alone, words | places))
    for process in processes:
        process.join()
        assert process.exitcode == 0
    return [numbers(home / name) for name in ("first", "second")]


def traces() -> dict[str, object]:
    """What a training could leave in its process."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR")
    return {
        "variables": {name: os.environ.get(name) for name in names},
        "group": torch.distributed.is_initialized(),
        "linear": torch.nn.functional.linear,
        "random": torch.get_rng_state().tolist(),
        "signals": [
            signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
        ],
        "levels": [logging.getLogger(name).level for name in ("", "DeepSpeed", "transformers")],
        "backend": matplotlib.get_backend(auto_select=False),
        "warnings": list(warnings.filters),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "default": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "streams": (sys.stdout, sys.stderr),
    }


def test_trainings_of_one_process_are_those_of_two(alone, squares, cache, tmp_path):
    torch.manual_seed(123)
    logging.getLogger("DeepSpeed")  # it exists before the first training as after it
    before = traces()
    for number, words in enumerate([FIRST, *BETWEEN, SECOND]):
        api.train(data=squares, cache=cache, out=tmp_path / str(number), **words)
        if words is FIRST:
            before["warnings"] = list(warnings.filters)  # libraries add some when they are imported
            from deepspeed.accelerator import cuda_accelerator, set_accelerator

            set_accelerator(cuda_accelerator.CUDA_Accelerator())  # as a training on a GPU leaves it
        assert traces() == before, words
    assert [numbers(tmp_path / name) for name in ("0", "3")] == alone


def test_train_returns_a_record_and_prints_nothing(squares, cache, tmp_path, capsys):
    out = tmp_path / "run"
    words = FIRST | {"eval_every": 2, "steps": 2}
    trained = api.train(data=str(squares), cache=str(cache), out=out, **words)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    scores = [json.loads(line) for line in (out / "evals.jsonl").read_text().splitlines()]
    assert (trained.run, trained.recipe, trained.steps) == (out, "clip_kd", 2)
    assert (trained.metrics, trained.scores) == (lines[-1], scores[-1])
    assert {"loss", "task", "fd"} <= set(trained.metrics)
    assert json.loads((out / "run.json").read_text())["recipe"]["constants"]["fd"] == 1000
    assert capsys.readouterr().out == ""
    settings = [f"{name}={value}" for name, value in words["settings"].items()]
    again = api.train(data=squares, cache=cache, out=tmp_path / "texts", **words | {"settings": settings})
    assert again.metrics == trained.metrics


def test_a_dry_run_writes_nothing(squares, cache, tmp_path):
    trained = api.train(data=squares, cache=cache, out=tmp_path / "run", dry_run=True, **FIRST)
    assert (trained.steps, trained.metrics) == (0, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ({"recipe": "clip_kdd"}, "did you mean 'clip_kd'?"),
        ({"settings": {"fdd": 1}}, "did you mean 'fd'?"),
        ({"settings": {"fd": "many"}}, "--set fd=many: a value of type float"),
        ({"batch_sizes": 8}, "no option 'batch_sizes': did you mean 'batch_size'?"),
        ({"batch_size": 1}, "batch_size=1: a value of type int from 2"),
        ({"steps": "8"}, "steps=8: a value of type int"),
        ({"resume": "perhaps"}, "resume=perhaps: "),
        ({"data": "nowhere"}, "no data at nowhere"),
    ],
)
def test_mistakes_are_user_errors(words, says, squares, cache, tmp_path):
    given = {"recipe": "clip_kd", "data": squares, "cache": cache, "out": tmp_path / "run"} | words
    with pytest.raises(UserError) as error:
        api.train(**given)
    assert says in str(error.value)
    assert not (tmp_path / "run").exists()


def test_evaluate_and_export(finished_run, squares, tmp_path, capsys):
    run = shutil.copytree(finished_run, tmp_path / "run")
    (result,) = api.evaluate(run, "retrieval", squares)
    assert result["metrics"]["image_retrieval_recall@10"] >= result["metrics"]["image_retrieval_recall@1"]
    assert [each["model"] for each in api.evaluate([run, str(run)], "zeroshot", squares)] == [run.name] * 2
    exported = api.export(run, "open_clip", tmp_path / "export")
    assert (exported.folder, exported.format) == (tmp_path / "export", "open_clip")
    assert str(tmp_path / "export") in exported.load
    assert (tmp_path / "export" / "open_clip_config.json").exists()
    assert capsys.readouterr().out == ""
    with pytest.raises(UserError, match="--format onnx: choose from open_clip, hf"):
        api.export(run, "onnx")
    with pytest.raises(UserError, match="did you mean 'retrieval'"):
        api.evaluate(run, "retrievel", squares)
    with pytest.raises(UserError, match="samples=0"):
        api.evaluate(run, "winoground", squares, samples=0)


def test_a_training_in_a_thread(squares, cache, tmp_path):
    """Such as that of a server or of a notebook's widget: signals belong to the main thread."""
    words = {"recipe": "clip_kd", "settings": SMALL, "steps": 2, "batch_size": 8}
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(api.train, data=squares, cache=cache, out=tmp_path / "run", **words)
        assert future.result().steps == 2
