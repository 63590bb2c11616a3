"""What all commands of both programs have in common, read from click and typed."""

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
from small import contained

from student.cli import main as student_main
from student.cli import student
from teachercache import __version__, api
from teachercache.cli import main as tc_main
from teachercache.cli import tc
from teachercache.core import command as run

ROOT = Path(__file__).parents[1]
MAINS = {"tc": tc_main, "student": student_main}
COMMANDS = [
    (group.name, name, command) for group in (tc, student) for name, command in group.commands.items()
]
NAMES = [f"{program} {name}" for program, name, _ in COMMANDS]
TYPES = (click.types.IntParamType, click.Choice, click.types.BoolParamType, click.types.StringParamType)
READERS = {"text", "place", "path", "local", "Path"}  # functions that read a word


def call(line: str) -> int:
    """Type a command line, in this process."""
    program, *words = shlex.split(line)
    with contained():
        return MAINS[program](words)


# ----------------------------------------------------------------------------------------------------
# All commands


@pytest.mark.parametrize(("program", "name", "command"), COMMANDS, ids=NAMES)
def test_every_command_has_json_quiet_examples_and_known_types(program, name, command):
    options = {option for parameter in command.params for option in parameter.opts}
    assert {"--json", "--quiet", "-q"} <= options
    context = click.Context(command, info_name=name, parent=click.Context(click.Group(program)))
    text = command.get_help(context)
    assert re.search(rf"^  (torchrun .*-m )?{program} {name}\b", text, re.MULTILINE), "no line of example"
    for parameter in command.params:
        kind = parameter.type
        reader = getattr(getattr(kind, "func", None), "__name__", "")
        assert isinstance(kind, TYPES) or reader in READERS, f"{parameter.name}: {kind}"
        if isinstance(parameter, click.Option) and parameter.name not in ("batch_size", "device", "top"):
            assert parameter.help or parameter.name == "noise_seed", parameter.name


@pytest.mark.parametrize("program", MAINS)
def test_version(program, capsys):
    assert call(f"{program} --version") == 0
    assert capsys.readouterr().out == f"{program} {__version__}\n"


@pytest.fixture(scope="module")
def home(squares, teacher_folder, finished_run, tmp_path_factory) -> Path:
    """A folder with data, a teacher, a cache and a run at the places where people have them."""
    home = tmp_path_factory.mktemp("home")
    (home / "runs").mkdir()
    (home / "caches" / "squares").mkdir(parents=True)
    for name, target in {"squares": squares, "tiny": teacher_folder}.items():
        (home / name).symlink_to(target)
    shutil.copytree(finished_run, home / "runs" / "mine")
    with contextlib.chdir(home):
        api.build("tiny", "squares", CACHE, device="cpu", workers=0)
    return home


@pytest.fixture
def here(home, monkeypatch) -> Path:
    monkeypatch.chdir(home)
    return home


CACHE = "caches/squares/tiny.zarr"
QUICK = "--batch-size 8 --set model=vit-micro --set run.workers=0 --steps 2"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("tc searchh", "did you mean 'search'?"),
        ("tc info", "Missing argument 'CACHE'"),
        ("tc build --teachr tiny", "--teacher"),
        ("tc build --teacher clip-lit", "did you mean 'clip-lite'?"),
        ("tc build --teacher tiny --data squers", "did you mean 'squares'?"),
        ("tc build --teacher tiny --data squares --outputs embedings", "did you mean 'embeddings'?"),
        ("tc build --teacher clip-vit-b32 --data squares --weights tinny", "did you mean 'tiny'?"),
        ("tc build --teacher tiny --data squares --precision fp61", "choose from auto, fp32, bf16, fp16"),
        ("tc manifest squers", "did you mean 'squares'?"),
        ("tc manifest squares --noise shufffle=0.4", "did you mean 'shuffle'?"),
        ("tc info caches/squares/tini.zarr", f"did you mean '{CACHE}'?"),
        ("tc verify caches/squers/tiny.zarr", f"did you mean '{CACHE}'?"),
        ("tc index caches/squares/tini.zarr", f"did you mean '{CACHE}'?"),
        (f"tc index {CACHE} --field image_em", "did you mean 'image_emb'?"),
        (f"tc index {CACHE} --kind ivff", "did you mean 'ivf'?"),
        (f"tc search {CACHE} --key train/class0/00", "did you mean 'train/class0/0"),
        (
            f"tc search {CACHE} --image squars/train/class0/000.png",
            "did you mean 'squares/train/class0/000.png'?",
        ),
        ("tc analyze caches/squares/tini.zarr", f"did you mean '{CACHE}'?"),
        (f"tc analyze {CACHE} --against caches/squares/tini.zarr", f"did you mean '{CACHE}'?"),
        (f"tc analyze {CACHE} --map umapp", "did you mean 'umap'?"),
        ("student trainn", "did you mean 'train'?"),
        ("student train", "pass --recipe NAME"),
        ("student train --recipe clip_kdd", "did you mean 'clip_kd'?"),
        ("student train --recipes clip", "--recipe"),
        ("student train --recipe clip --set tempretur=1", "choose from"),
        ("student train --recipe clip_kd --set mask_ration=1", "did you mean 'mask_ratio'?"),
        ("student train --recipe clip_kd --data squers", "did you mean 'squares'?"),
        (
            "student train --recipe clip_kd --data squares --cache caches/squars",
            "did you mean 'caches/squares'?",
        ),
        ("student train --config runs/mnie/run.json", "did you mean 'runs/mine/run.json'?"),
        ("student train --config runs/mnie", "did you mean 'runs/mine'?"),
        ("student eval runs/mnie --task retrieval", "did you mean 'runs/mine'?"),
        ("student eval runs/mine --task retrievl --data squares", "did you mean 'retrieval'?"),
        ("student eval runs/mine --task retrieval --data squers", "did you mean 'squares'?"),
        (
            "student generate runs/mine --image squars/train/class0/000.png",
            "did you mean 'squares/train/class0/000.png'?",
        ),
        ("student generate runs/mnie --image squares/train/class0/000.png", "did you mean 'runs/mine'?"),
        ("student export runs/mnie --format hf", "did you mean 'runs/mine'?"),
        ("student export runs/mine --format open-clip", "'open_clip', 'hf'"),
        ("student verify runs/mnie", "did you mean 'runs/mine'?"),
        ("student recipes clip_dt", "did you mean 'clip_td'?"),
    ],
)
def test_a_slip_of_the_hand_is_answered_with_the_name_that_was_meant(line, says, here, capsys):
    before = sorted(here.rglob("*"))
    assert call(line) == 2
    out, err = capsys.readouterr()
    assert out == ""
    (error,) = [each for each in err.splitlines() if each.startswith("error: ")]
    assert says in error
    assert sorted(here.rglob("*")) == before


# ----------------------------------------------------------------------------------------------------
# The last line says what to type next, and it runs


def next_of(err: str) -> str:
    """The command in the last line."""
    last = err.splitlines()[-1]
    assert last.startswith("next: "), err
    return last.removeprefix("next: ")


@pytest.mark.parametrize(
    ("line", "then"),
    [
        (f"tc build --teacher tiny --data squares --device cpu --workers 0 --out {CACHE}", "tc search"),
        ("tc teachers", "tc build"),
        (f"student train --recipe clip_kd --data squares {QUICK} --out trained/chain", "student eval"),
        ("student recipes", "student recipes clip"),
    ],
)
def test_commands_lead_from_one_to_the_next(line, then, here, capsys, monkeypatch):
    seen = []
    while line not in seen and len(seen) < 6:
        seen.append(line)
        assert call(line) == 0, line
        line = next_of(capsys.readouterr().err)
        if len(seen) == 1:
            assert line.startswith(then)
        program = line.split()[0]
        assert program in ("tc", "student", "python")
        if program == "python" or "analyze" in line or "tc build" in line:
            break  # a browser, an optional package, the demo's data
        if "--print-config" in line:
            assert call(line) == 0
            break
    assert len(seen) == len(set(seen))


@pytest.mark.parametrize(
    "line",
    [
        "tc teachers",
        "tc manifest squares",
        f"tc build --teacher tiny --data squares --device cpu --workers 0 --out {CACHE}",
        f"tc info {CACHE}",
        f"tc verify {CACHE} --samples 0",
        f"tc index {CACHE}",
        f"tc search {CACHE} --key train/class0/000",
        "student recipes",
        "student recipes clip_kd",
        f"student train --recipe clip_kd --data squares {QUICK} --out trained/one",
        "student train --recipe clip_kd --data squares --print-config",
        "student eval runs/mine --task retrieval --data squares",
        "student eval runs/mine runs/mine --task zeroshot --data squares",
        "student export runs/mine --format open_clip",
        "student verify runs/mine",
    ],
)
def test_quiet_json_is_one_document_and_nothing_else(line, here, capfd):
    assert call(f"{line} --quiet --json") == 0
    out, err = capfd.readouterr()
    assert isinstance(json.loads(out), dict | list)
    assert [each for each in err.splitlines() if not re.search(r"ld|collect2", each)] == []  # a compiler's


def test_quiet_keeps_warnings_and_errors(here, tmp_path, capsys):
    words = f"tc build --teacher open_clip:ViT-S-32-alt/x --weights random:0 --data squares --limit 2 --out {tmp_path}/c"
    assert call(f"{words} --device cpu --workers 0 -q") == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert [line.split(":")[0] for line in err.splitlines()] == ["WARNING"]
    assert call("tc info nowhere -q") == 2
    assert capsys.readouterr().err.startswith("error: no cache at nowhere")


# ----------------------------------------------------------------------------------------------------
# Shell completion


def completed(line: str, monkeypatch, capsys) -> list[str]:
    """What bash offers behind the last word of a line."""
    program, *words = line.split(" ")
    monkeypatch.setenv(f"_{program.upper()}_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", str(len(words)))
    with pytest.raises(SystemExit) as left:
        run.run_command({"tc": tc, "student": student}[program], [])
    assert left.value.code == 0
    return [item.partition(",")[2] for item in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("tc ana", ["analyze"]),
        ("tc build --teacher clip-vit-l", ["clip-vit-l14", "clip-vit-l14-336"]),
        ("tc info ca", [CACHE]),
        ("tc search caches/squares/t", [CACHE]),
        ("student train --recipe clip_", ["clip_kd", "clip_td"]),
        ("student train --config r", ["runs/mine/run.json"]),
        ("student eval runs/mine --task zeroshot_", ["zeroshot_classification", "zeroshot_retrieval"]),
        ("student eval runs/m", ["runs/mine"]),
        ("student export runs/m", ["runs/mine"]),
        ("student recipes sds", ["sds_clip"]),
        ("student export runs/mine --format o", ["open_clip"]),
        ("student train --dr", ["--dry-run"]),
    ],
)
def test_a_shell_completes_names_and_paths(line, expected, here, monkeypatch, capsys):
    assert completed(line, monkeypatch, capsys) == expected


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
@pytest.mark.parametrize("program", MAINS)
def test_the_script_for_a_shell(program, shell, monkeypatch, capsys):
    monkeypatch.setenv(f"_{program.upper()}_COMPLETE", f"{shell}_source")
    monkeypatch.setattr("click.shell_completion.BashComplete._check_version", lambda *self: None)
    with pytest.raises(SystemExit) as left:
        MAINS[program]([])
    assert left.value.code == 0
    assert f"_{program.upper()}_COMPLETE={shell}_complete" in capsys.readouterr().out


@pytest.mark.parametrize("line", ["tc build --teacher cl", "student train --recipe cl", "student eval r"])
def test_completion_imports_no_heavy_module(line, home):
    program = line.split()[0]
    module = {"tc": "teachercache", "student": "student"}[program]
    words = {f"_{program.upper()}_COMPLETE": "bash_complete", "COMP_WORDS": line}
    words["COMP_CWORD"] = str(len(line.split()) - 1)
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", module],
        env={**os.environ, **words, "PYTHONPATH": str(ROOT)},
        cwd=home,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    imported = {each.rsplit("|", 1)[-1].strip().split(".")[0] for each in done.stderr.splitlines()}
    assert done.stdout
    assert imported & {"torch", "open_clip", "transformers", "deepspeed", "zarr", "faiss"} == set()
