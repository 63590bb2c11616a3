"""The command `student` as a contract: its options, its speed, one line per error, what stands on stdout."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small import RANK_VARIABLES, build_cache, contained, make_folder, save_teacher, train_here

from student import cli
from student.cli import main
from student.recipes.clip_kd import CLIP_KD
from teachercache.cache import store
from teachercache.cli import main as tc_main

ROOT = Path(__file__).parents[2]

# Besides --json and --quiet, which all have. A change here is a change of the contract, and a line in CHANGELOG.md
OPTIONS = {
    "recipes": ["name"],
    "train": [
        "--batch-size",
        "--cache",
        "--config",
        "--data",
        "--dry-run",
        "--eval-every",
        "--live",
        "--micro-batch",
        "--out",
        "--print-config",
        "--recipe",
        "--report-to",
        "--resume",
        "--seed",
        "--set",
        "--steps",
    ],
    "eval": ["--data", "--figures", "--out", "--samples", "--task", "models"],
    "generate": ["--beams", "--image", "--masks", "--question", "model"],
    "export": ["--format", "--out", "run"],
    "compare": ["--out", "runs"],
    "verify": ["folder"],
}


def python(*words: str, **options) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
    return subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True, **options
    )


def test_the_options_are_frozen():
    found = {}
    for name, command in cli.student.commands.items():
        found[name] = sorted(option for parameter in command.params for option in parameter.opts)
    shared = ["--json", "--quiet", "-q"]
    assert found == {name: sorted([*options, *shared]) for name, options in OPTIONS.items()}


# Each of these takes longer to import than the rest of the command; scripts/benchmarks/startup.py measures the time
HEAVY = {
    *("torch", "open_clip", "diffusers", "transformers", "faiss", "deepspeed", "matplotlib", "sklearn"),
    *("wandb", "tensorboard", "plotly", "mteb"),
}


def heavy_modules(*words: str) -> tuple[str, set[str]]:
    """Run `student` in a new process; return its stdout and the heavy modules that it imported."""
    code = (
        "import sys; from student.cli import main; code = main(sys.argv[1:]); "
        "print(*sys.modules, file=sys.stderr); sys.exit(code)"
    )
    result = python("-c", code, *words)
    assert result.returncode == 0, result.stderr
    assert "student.cli" in result.stderr.split()
    return result.stdout, HEAVY & set(result.stderr.split())


@pytest.mark.parametrize("command", [[], *([name] for name in OPTIONS)])
def test_help_imports_no_heavy_module(command):
    text, heavy = heavy_modules(*command, "--help")
    assert heavy == set()
    assert text.startswith("Usage: ")
    if command:
        assert f"student {command[0]} " in text.split("Options:")[0].split("\n", 1)[1]  # an example


@pytest.mark.parametrize(
    "words", [["recipes"], ["recipes", "clip_kd"], ["train", "--recipe", "clip", "--print-config"]]
)
def test_what_only_prints_imports_no_heavy_module(words):
    text, heavy = heavy_modules(*words)
    assert heavy == set()
    assert "clip" in text


def test_recipes_lists_every_name_and_paper(capsys):
    from student.recipes.registry import RECIPES

    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[: len(RECIPES)]] == list(RECIPES)
    for line, recipe in zip(lines, RECIPES.values(), strict=False):  # then those of installed packages
        assert recipe.doc in line
        assert recipe.paper in line


def test_recipes_shows_equations_constants_and_the_build_command(capsys):
    assert main(["recipes", "clip_kd"]) == 0
    text = capsys.readouterr().out
    for equation in (
        "KL(sm(a_T V_T S_T^T) || sm(a_S V S^T))",
        "(V' - V_T)^2",
        "CE(g V' S_T^T, I)",
        "G_V = a/2N [(P - I) S' + (Q - I)^T S']",
        "A = norm(W [V'; V_T])",
        "(H' - H_T)^2",
    ):
        assert equation in text
    for line in (
        "--set fd=2000.0",
        "--set crd=1.0",
        "--set gd=0.0",
        "--set mask_ratio=0.75",
        "--set ensemble=average",
        "--set model=vit-tiny",
        "--set optim.lr=0.001",
        "--steps 500",
    ):
        assert line in text
    assert "tc build --teacher clip-lite" in text


# ----------------------------------------------------------------------------------------------------
# Errors: one line, exit code 2, what to type next


def error_of(capsys, *words: object) -> str:
    """The one line of an error."""
    assert main([str(word) for word in words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.strip().splitlines()
    assert lines[-1].startswith("error: ")
    assert sum(line.startswith("error") for line in lines) == 1
    return lines[-1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["recipes", "clipkd"], "unknown recipe 'clipkd': did you mean 'clip_kd'? choose from clip, clip_kd"),
        (["train", "--recipe", "sds"], "unknown recipe 'sds': "),
        (["train"], "pass --recipe NAME (`student recipes` lists them), or --config RUN.json"),
        (["train", "--recipe", "clip", "--steps", "0"], "Invalid value for '--steps'"),
        (["train", "--recipe", "clip", "--bach-size", "1"], "No such option"),
        (["train", "--recipe", "clip", "--set", "fd=1"], "no such setting of clip"),
        (["train", "--recipe", "clip", "--data", "nowhere"], "no data at nowhere: pass --data FOLDER, or"),
        (
            ["eval", "x", "--task", "zeroshot_retrieve"],
            "unknown task 'zeroshot_retrieve': did you mean 'zeroshot_retrieval'",
        ),
        (["eval", "x"], "Missing option '--task'"),
        (["eval", "clip-lit", "--task", "retrieval"], "clip-lit"),
        (["export", "nothing", "--format", "open_clip"], "nothing"),
        (["export", "nothing", "--format", "hf"], "nothing"),
        (["export", "nothing", "--format", "onnx"], "'onnx' is not"),
        (["nonsense"], "No such command 'nonsense'"),
    ],
)
def test_errors(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert said in error_of(capsys, *words)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_student_model_names_one_that_is_near(squares, cache, tmp_path, capsys):
    assert train_here(squares, cache, tmp_path / "run", "--set", "model=vit-tini") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(
        "error: --set model=vit-tini: did you mean 'vit-tiny'? choose vit-tiny, vit-demo, vit-tiny-long, "
        "vit-micro or an"
    )


def test_a_batch_larger_than_the_data(squares, cache, tmp_path, capsys):
    assert train_here(squares, cache, tmp_path / "run", "--batch-size", 49) == 2
    assert "48 usable training rows are fewer than --batch-size 49" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def hint_of(error: str) -> list[str]:
    """The words of the command in backticks that an error ends in."""
    assert error.endswith("`")
    words = shlex.split(error.split("`")[-2])
    assert words[:2] == ["tc", "build"]
    return words[1:]


@pytest.fixture
def home(tmp_path, monkeypatch, teacher_folder):
    """A folder to work in: data under data/squares, nothing built. The teacher stands in for clip-lite."""
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / "data" / "squares", 16, splits=True)
    shutil.copytree(teacher_folder, tmp_path / "models" / "clip-lite")
    return tmp_path


TRAIN = [
    "train",
    "--recipe",
    "clip_kd",
    "--data",
    "data/squares",
    "--dry-run",
    "--batch-size",
    "4",
    "--set",
    "model=vit-micro",
    "--set",
    "run.workers=0",
]


def mended(capsys, words: list[str]) -> None:
    """What the error says mends it: after it the same words train."""
    with contained():
        error = error_of(capsys, *words)
        hint = hint_of(error)
        if "remove the cache and run" in error:
            shutil.rmtree(hint[hint.index("--out") + 1])
        assert tc_main(hint) == 0, capsys.readouterr().err
        assert main(words) == 0, capsys.readouterr().err


def test_a_missing_cache_ends_in_the_command_that_makes_it(home, capsys):
    assert "no cache with image_emb, text_emb in caches/squares: run `tc build" in error_of(capsys, *TRAIN)
    mended(capsys, TRAIN)


def test_a_missing_cache_elsewhere_ends_in_the_command_that_makes_it_there(home, capsys):
    mended(capsys, [*TRAIN, "--cache", "elsewhere/mine"])


@pytest.mark.parametrize(
    "block_rows", [None, 8]
)  # what this version chooses, and what another may have chosen
def test_an_unfinished_cache_ends_in_the_command_that_finishes_it(block_rows, home, capsys):
    path = Path("caches/squares/clip-lite.zarr")
    build_cache(Path("data/squares"), Path("models/clip-lite"), path, block_rows=block_rows)
    store.forget_block(store.open_cache(path), 0)
    count = 1 if block_rows is None else 2
    assert f"is not finished, 1 of {count} blocks are missing: run `tc build" in error_of(capsys, *TRAIN)
    mended(capsys, TRAIN)


def test_new_rows_end_in_a_command_that_adds_them(home, capsys):
    assert tc_main(["build", "--teacher", "clip-lite", "--data", "data/squares"]) == 0
    capsys.readouterr()
    source = next(Path("data/squares/train/class0").glob("*.png"))
    shutil.copy(source, source.with_name("zzz.png"))
    shutil.copy(source.with_suffix(".txt"), source.with_name("zzz.txt"))
    mended(capsys, TRAIN)


def test_an_existing_run(home, capsys):
    build_cache(Path("data/squares"), Path("models/clip-lite"), Path("caches/squares/tiny.zarr"))
    words = [word for word in TRAIN if word != "--dry-run"] + ["--steps", "1", "--out", "runs/one"]
    with contained():
        assert main(words) == 0
        capsys.readouterr()
        assert (
            error_of(capsys, *words) == "error: runs/one exists: go on with --resume, or pass another --out"
        )


def test_resume_finds_the_newest_run_of_the_recipe(home, capsys):
    assert error_of(capsys, "train", "--recipe", "clip", "--resume") == (
        "error: no run of clip in runs/: pass --out RUN, or drop --resume"
    )
    for age, name in ((30, "clip-1"), (10, "clip-3"), (20, "clip-2"), (0, "clip_kd-9")):
        path = Path("runs", name, "run.json")
        path.parent.mkdir(parents=True)
        path.write_text("{}")
        os.utime(path, (time.time() - age, time.time() - age))
    assert main(["train", "--recipe", "clip", "--resume", "--print-config"]) == 0
    assert json.loads(capsys.readouterr().out)["run"]["out"] == "runs/clip-3"


def test_a_random_teacher_is_warned_of(home, capsys):
    words = [
        "build",
        "--teacher",
        "open_clip:ViT-S-32-alt/x",
        "--weights",
        "random:0",
        "--data",
        "data/squares",
    ]
    if tc_main([*words, "--limit", "16"]) != 0:
        pytest.fail(capsys.readouterr().err)
    with contained():
        assert main(TRAIN) == 0
    assert "has random weights; there is nothing in it to distil" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------
# stdout


def test_json_prints_one_object_and_nothing_else(finished_run, squares, tmp_path):
    run = shutil.copytree(finished_run, tmp_path / "run")
    result = python(
        "-m", "student", "eval", str(run), "--task", "retrieval", "--data", str(squares), "--json"
    )
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == 1
    assert json.loads(lines[0], parse_constant=pytest.fail)["results"][0]["task"] == "zeroshot_retrieval"


def test_a_table_without_json(finished_run, squares, tmp_path, capsys):
    run = shutil.copytree(finished_run, tmp_path / "run")
    assert main(["eval", str(run), "--task", "zeroshot", "--data", str(squares)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["metric", "run"]
    assert "acc5                   -" in lines


def test_training_leaves_stdout_alone(squares, cache, tmp_path, capfd):
    assert train_here(squares, cache, tmp_path / "run", "--steps", 1) == 0
    captured = capfd.readouterr()
    assert captured.out == ""
    assert f"next: student eval {tmp_path / 'run'} --task retrieval" in captured.err
    assert "Warning" not in captured.err


def test_what_train_says_comes_next_works(squares, cache, tmp_path, monkeypatch, capfd):
    """`student eval RUN` needs the --data that the run had, where it was not the demo's."""
    monkeypatch.chdir(tmp_path)
    assert train_here(squares, cache, tmp_path / "run", "--steps", 1) == 0
    line = next(line for line in capfd.readouterr().err.splitlines() if line.startswith("next: "))
    assert main(shlex.split(line.removeprefix("next: student "))) == 0


def test_a_launcher_adds_its_own_word():
    """DeepSpeed's launcher passes --local_rank; the environment says the same."""
    result = python("-m", "student", "--local_rank=0", "recipes", "clip_kd")
    assert result.returncode == 0, result.stderr
    assert f"{CLIP_KD.constants.fd}" in result.stdout


def test_the_teacher_is_named_by_the_command_of_its_cache(tmp_path, capsys):
    """A cache in another place, of a teacher in a folder: the command has both."""
    data, teacher = make_folder(tmp_path / "squares", 8), save_teacher(tmp_path / "my teacher")
    cache = build_cache(data, teacher, tmp_path / "a cache.zarr", block_rows=4)
    store.forget_block(store.open_cache(cache), 0)
    assert train_here(data, cache, tmp_path / "run", "--batch-size", 2) == 2
    words = hint_of(capsys.readouterr().err.strip().splitlines()[-1])
    assert words[:7] == ["build", "--teacher", str(teacher), "--data", str(data), "--out", str(cache)]
