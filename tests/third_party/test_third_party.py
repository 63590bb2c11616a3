"""The promise of the design: a package of strangers goes through every command with no edit of ours.

`visitor` is installed beside ours (its dist-info names entry points) and uses no name that the contracts do not have;
its students, teachers and constants raise when core reads an attribute outside of the contracts.
"""

import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import run_command, start
from safetensors.torch import load_file
from small import RANK_VARIABLES, contained, make_folder, read_lines
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import student as student_package
from evaluation.data.splits import rows_or_only_split
from evaluation.models.answerer import Answerer
from evaluation.tasks.task import Kind, Metrics, Task
from scripts.datasets import scene_vcr_snli_ve
from student.cli import main as student
from student.inference.measure import measure_models
from teachercache.cache import store
from teachercache.cli import main as tc
from teachercache.data.manifest import Manifest
from teachercache.data.read import read_manifest

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
STEPS = 6


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures with texts, questions about drawn scenes, and the visitors' caches of both."""
    root = tmp_path_factory.mktemp("visitors")
    make_folder(root / "pairs", 32, texts=2, splits=True)
    words = ["scene_vcr_snli_ve", "--out", str(root / "scenes"), "--num", "24", "--size", "64", "--seed", "3"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", words)
        assert not scene_vcr_snli_ve.main()
    for teacher, data in (
        ("visitor-pairs", "pairs"),
        ("visitor-grid", "pairs"),
        ("visitor-grid", "scenes/vcr1"),
    ):
        out = root / "caches" / f"{teacher}-{data.replace('/', '-')}.zarr"
        assert tc(["build", "--teacher", teacher, "--data", str(root / data), "--out", str(out)]) == 0
    return root


def cache_of(home: Path, teacher: str, data: str = "pairs") -> Path:
    return home / "caches" / f"{teacher}-{data}.zarr"


def train_words(home: Path, out: Path, *words: object) -> list[str]:
    cache = cache_of(home, "visitor-pairs")
    fixed = ["train", "--recipe", "visitor_pairs", "--data", home / "pairs", "--cache", cache, "--out", out]
    return [*map(str, fixed), *map(str, words)]


def losses_of(run: Path) -> list[float]:
    return [line["loss"] for line in read_lines(run)]


def refusal(capsys: pytest.CaptureFixture, *words: object) -> str:
    """The one error line of a `student` command that must fail."""
    capsys.readouterr()
    assert student([*map(str, words)]) == 2
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    return line


@pytest.fixture(scope="module")
def run(home: Path) -> Path:
    """A finished run of the pair recipe."""
    with contained():
        assert student(train_words(home, home / "run")) == 0
    return home / "run"


# ----------------------------------------------------------------------------------------------------
# Phase 1


def test_installed_names_are_listed(capsys):
    assert tc(["teachers"]) == 0
    assert "visitor-grid" in capsys.readouterr().out
    assert student(["recipes"]) == 0
    assert "visitor_questions" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["TWO", "PAIRS"])
def test_core_cannot_ask_for_what_no_contract_names(name):
    """Otherwise the other tests would prove nothing: the strictness is added where the entry points lead."""
    from visitor import installed, recipes, students
    from visitor.strict import OutsideContract

    asked = {"TWO": students.Two(2), "PAIRS": recipes.PAIRS.constants}[name]
    assert getattr(installed, name) is not None
    code = compile("hasattr(asked, 'dropout')", str(Path(student_package.__file__)), "exec")
    with pytest.raises(OutsideContract, match="dropout"):
        exec(code, {"asked": asked})


def test_outputs_and_weights_select_what_is_built(home, tmp_path):
    data, out = str(home / "pairs"), str(tmp_path / "out.zarr")
    words = ["build", "--data", data, "--limit", "4", "--workers", "0", "--out", out]
    assert tc([*words, "--teacher", "visitor-grid", "--outputs", "color"]) == 0
    assert [field.name for field in store.open_cache(tmp_path / "out.zarr").meta.spec.fields] == ["color"]
    words[-1] = str(tmp_path / "views.zarr")
    assert tc([*words, "--teacher", "visitor-grid", "--views", "2"]) == 0
    words[-1] = str(tmp_path / "random.zarr")
    assert tc([*words, "--teacher", "visitor-pairs", "--weights", "random:1"]) == 0
    other = store.open_complete(tmp_path / "random.zarr").meta.spec.digest
    assert other != store.open_complete(cache_of(home, "visitor-pairs")).meta.spec.digest


def test_a_field_per_pair_holds_each_text_beside_its_picture(home):
    cache = store.open_complete(cache_of(home, "visitor-pairs"))
    colors, texts, affinity = (
        store.read_field(cache, name) for name in ("image_emb", "text_emb", "affinity")
    )
    usable = store.read_field(cache, "text_valid")
    assert affinity.shape == (32, 2, 3)
    np.testing.assert_allclose(affinity[usable], (colors[:, None] * texts)[usable], rtol=1e-5)


def test_a_teacher_of_pictures_alone_writes_a_dense_field(home):
    cache = store.open_complete(cache_of(home, "visitor-grid"))
    grid, color = (np.asarray(store.read_field(cache, name), np.float32) for name in ("grid", "color"))
    assert grid.shape == (32, 3, 4, 4)
    np.testing.assert_allclose(grid.mean((2, 3)), color, atol=1e-3)


@pytest.mark.parametrize("teacher", ["visitor-pairs", "visitor-grid"])
def test_verify_computes_the_fields_again(home, teacher, capsys):
    assert tc(["verify", str(cache_of(home, teacher)), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"]
    assert {"affinity"} <= set(report["cosine"]) or {"grid", "color"} <= set(report["cosine"])


def test_search_and_analyze(home, tmp_path, capsys):
    cache = cache_of(home, "visitor-pairs")
    key = store.cached_manifest(store.open_cache(cache)).table["key"][0].as_py()
    assert tc(["search", str(cache), "--key", key, "--top", "3", "--json"]) == 0
    hits = json.loads(capsys.readouterr().out)
    assert len(hits["results"]) == 3
    assert tc(["analyze", str(cache), "--out", str(tmp_path / "report")]) == 0
    assert list((tmp_path / "report").iterdir())


# ----------------------------------------------------------------------------------------------------
# Phase 2


def test_training_lowers_the_loss_and_logs_the_terms(run):
    lines = read_lines(run)
    assert len(lines) == STEPS
    assert {"task", "huber", "scale"} <= set(lines[0])
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert (run / "visitor.txt").read_text() == "hello\n"


def test_micro_batches_have_the_same_losses(home, run, tmp_path):
    with contained():
        assert student(train_words(home, tmp_path / "micro", "--micro-batch", 4)) == 0
    np.testing.assert_allclose(losses_of(tmp_path / "micro"), losses_of(run), rtol=1e-4)


def launch(words: list[str]) -> None:
    """Train on two processes of torchrun's own launcher, which are forks here."""
    how = LaunchConfig(
        1, 1, 2, run_id="two", rdzv_backend="c10d", rdzv_endpoint="localhost:0", start_method="forkserver"
    )
    assert elastic_launch(how, student)(words) == {0: 0, 1: 0}


def test_two_processes_have_the_same_losses(home, run, tmp_path):
    launcher = start(launch, train_words(home, tmp_path / "two"))  # its threads do not survive a later fork
    launcher.join()
    assert launcher.exitcode == 0
    np.testing.assert_allclose(losses_of(tmp_path / "two"), losses_of(run), rtol=1e-4)


def environment(**more: str) -> dict[str, str]:
    """The environment of a child process in which `visitor` is installed."""
    kept = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
    return {**kept, "PYTHONPATH": f"{ROOT}:{HERE}", **more}


def test_a_killed_run_goes_on_with_the_same_bits(home, tmp_path):
    settings = ("--set", "dropout=0.2", "--set", "run.save_every=2")
    words = train_words(home, tmp_path / "killed", *settings)
    killed = run_command("student", *words, environment=environment(VISITOR_KILL_AT="3"))
    assert killed.returncode == -signal.SIGKILL
    resumed = run_command("student", *words, "--resume", environment=environment())
    assert resumed.returncode == 0, resumed.stderr
    with contained():
        assert student(train_words(home, tmp_path / "whole", *settings)) == 0
    assert losses_of(tmp_path / "killed") == losses_of(tmp_path / "whole")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("killed", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_run_is_measured_by_our_task_and_by_theirs(home, run, capsys):
    for task, metric in (("retrieval", "image_retrieval_recall@1"), ("visitor_brightness", "longer")):
        assert student(["eval", str(run), "--task", task, "--data", str(home / "pairs"), "--json"]) == 0
        (result,) = json.loads(capsys.readouterr().out)["results"]
        assert 0 <= result["metrics"][metric] <= 1
    assert (run / "eval").is_dir()


def test_a_task_measures_the_test_rows_and_counts_the_unreadable(run, tmp_path, capsys):
    make_folder(tmp_path / "pairs", 32, texts=2, splits=True)
    manifest = read_manifest(str(tmp_path / "pairs"))
    rows = rows_or_only_split(manifest, "test").tolist()
    (tmp_path / "pairs" / manifest.row(rows[0]).image).write_bytes(b"no picture")
    words = ["eval", str(run), "--task", "visitor_brightness", "--data", str(tmp_path / "pairs"), "--json"]
    assert student(words) == 0
    (result,) = json.loads(capsys.readouterr().out)["results"]
    assert 1 < len(rows) < len(manifest)
    assert (result["metrics"]["num_images"], result["metrics"]["num_skipped"]) == (len(rows) - 1, 1)


def test_export_writes_what_the_family_writes(run, tmp_path):
    assert student(["export", str(run), "--format", "hf", "--out", str(tmp_path / "out")]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "two.safetensors",
        "two.json",
        "README.md",
        "digests.json",
    }


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("export", "RUN", "--format", "open_clip"), "open_clip has no linear models"),
        (("generate", "RUN", "--image", "none.jpg"), "none.jpg"),
        (("eval", "RUN", "--task", "captions", "--data", "PAIRS"), "cannot write texts"),
        (("eval", "RUN", "--task", "vcr", "--data", "PAIRS"), "was not trained to answer"),
        (("train", "--recipe", "visitor_pairs", "--set", "run.compile=maybe"), "bool"),
    ],
)
def test_what_a_student_cannot_do_is_one_line(home, run, words, reason, capsys):
    places = {"RUN": run, "PAIRS": home / "pairs"}
    assert reason in refusal(capsys, *(places.get(word, word) for word in words))


# ----------------------------------------------------------------------------------------------------
# Questions


def sure(answerer: Answerer, manifest: Manifest) -> Metrics:
    """The mean difference of the best answer's score and the second's."""
    scores = np.sort(answerer.score(manifest, rows_or_only_split(manifest, "val"), "q2a"))
    return {"sure": float((scores[:, -1] - scores[:, -2]).mean())}


SURE = Task(
    name="visitor_sure", kind=Kind.ANSWERER, answers="vcr", function=sure, doc="another view of VCR's answers"
)


def test_a_question_recipe_trains_goes_on_and_answers(home, tmp_path, capsys):
    data, cache = home / "scenes" / "vcr1", cache_of(home, "visitor-grid", "scenes-vcr1")
    fixed = ["train", "--recipe", "visitor_questions", "--data", str(data), "--cache", str(cache)]
    with contained():
        assert student([*fixed, "--out", str(tmp_path / "run")]) == 0
        assert student([*fixed, "--out", str(tmp_path / "micro"), "--micro-batch", "4"]) == 0
    np.testing.assert_allclose(losses_of(tmp_path / "micro"), losses_of(tmp_path / "run"), rtol=1e-4)
    capsys.readouterr()
    words = ["eval", str(tmp_path / "run"), "--task", "vcr", "--data", str(data), "--json"]
    assert student(words) == 0
    (result,) = json.loads(capsys.readouterr().out)["results"]
    assert 0 <= result["metrics"]["q2a"] <= 1
    assert result["metrics"]["qa2r"].startswith("skipped")
    (result,) = measure_models([str(tmp_path / "run")], SURE, str(data))
    assert (result["task"], result["metrics"]["sure"] > 0) == ("visitor_sure", True)


def test_the_commands_that_runs_recommend_work(home, run, tmp_path, capsys):
    """The command behind `next:` ends well: it once ended in a KeyError for a student of one's own."""
    with contained():
        assert student(train_words(home, tmp_path / "run")) == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("next: student ")]
    assert student(line.removeprefix("next: student ").split()) == 0


def test_a_missing_cache_names_the_command_that_builds_it(home, tmp_path, capsys):
    words = train_words(home, tmp_path / "run")
    words[words.index("--cache") + 1] = str(tmp_path)
    error = refusal(capsys, *words)
    assert "tc build --teacher visitor-pairs" in error
