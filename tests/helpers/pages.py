"""Blocks of code in Markdown pages, and how a test runs or checks the commands in them."""

import configparser
import contextlib
import dataclasses
import importlib
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from small import contained

ROOT = Path(__file__).parents[2]
FENCE = re.compile(
    r"(?:^<!-- not run: (?P<mark>[^\n]+?) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
PROGRAMS = (
    "tc",
    "student",
    "python",
    "bash",
    "pip",
    "torchrun",
    "mkdocs",
    "clip_benchmark",
    "cp",
    "rm",
    "mkdir",
    "eval",
    "echo",
)
INDENTED = re.compile(rf"^    (?:{'|'.join(PROGRAMS)}) .*", re.MULTILINE)
# On small data with small students: options that are appended to, or take the place of, those of a page
SMALL_TRAIN = ("--steps", "2", "--set", "run.workers=0", "--set", "run.save_minutes=0")
SMALL_STUDENTS = {"clip": "vit-micro", "clip_kd": "vit-micro", "psd": "vit-micro"}
SMALLER = {"model=vit-tiny-long": "model=vit-micro"}
SMALL_DATA = {"scenes": ("--num", "16"), "scene_vcr_snli_ve": ("--num", "16", "--size", "64")}
SMALL_DATA |= {"scene_winoground_aro": ("--num", "4")}


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block: its page and line, its language, its text, and the reason why it is not run."""

    page: str
    line: int
    language: str
    text: str
    mark: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def pages() -> list[str]:
    """README, and every page of the documentation."""
    docs = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))
    return ["README.md", *docs]


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return [
        Block(
            page,
            text.count("\n", 0, found.start("text")),
            found["language"],
            found["text"],
            found["mark"] or "",
        )
        for found in FENCE.finditer(text)
    ]


def commands(block: Block) -> Iterator[list[str]]:
    """The commands of a shell block as words, without comments; lines that end in a backslash are joined."""
    for line in block.text.replace("\\\n", " ").splitlines():
        for part in line.split(" && "):
            words = shlex.split(part, comments=True)
            if words:
                yield words


# ----------------------------------------------------------------------------------------------------
# Running


def run(words: list[str]) -> None:
    """Run a command of a page in the current folder, on small data; fail unless it ends well."""
    program, *rest = words
    if words[:2] == ["tc", "serve"]:
        check(words)  # it runs until it is stopped
    elif program in ("tc", "student"):
        assert in_process(program, rest) == 0, shlex.join(words)
    elif program == "python" and rest[0] == "-m":
        run_script(rest[1], rest[2:])
    elif program in ("cp", "rm"):
        subprocess.run(words, check=True)
    else:
        pytest.fail(
            f"{shlex.join(words)}: no test can run this; mark the block with a reason, or teach `pages.run`"
        )


def in_process(program: str, words: list[str]) -> int:
    """`tc` or `student` in this process: the exit code."""
    from student.cli import main as student
    from teachercache.cli import main as tc

    with contained():
        return tc(small_build(words)) if program == "tc" else student(small_train(words))


def small_build(words: list[str]) -> list[str]:
    return [*words, "--workers", "0"] if words[0] == "build" else words


def small_train(words: list[str]) -> list[str]:
    """The words of a training with few steps of a small batch, and a small student unless one is named."""
    if words[0] != "train" or "--print-config" in words:
        return words
    recipe = words[words.index("--recipe") + 1] if "--recipe" in words else ""
    chosen = any(word.startswith(("model=", "init=")) for word in words)
    model = ["--set", f"model={SMALL_STUDENTS[recipe]}"] if recipe in SMALL_STUDENTS and not chosen else []
    micro = ["--micro-batch", "4"] if "--micro-batch" in words else []
    every = ["--eval-every", "2"] if "--eval-every" in words else []
    words = [SMALLER.get(word, word) for word in words]
    batch = "4" if recipe == "sds_clip" else "8"  # its UNet is in every step
    return [*words[:1], *model, *words[1:], *SMALL_TRAIN, "--batch-size", batch, *micro, *every]


def run_script(module: str, words: list[str]) -> None:
    """Run a script that makes data, with few rows; what is there already is not made again."""
    if not module.startswith("scripts.datasets."):
        pytest.fail(f"python -m {module}: only scripts that make data are run")
    out = Path(words[words.index("--out") + 1])
    if out.exists():
        return
    small = SMALL_DATA[module.rpartition(".")[2]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [module, *words, *small])
        main = importlib.import_module(module).main
        assert not main(), f"python -m {module} failed"


@contextlib.contextmanager
def small_training() -> Iterator[None]:
    """Let `student.api.train` take few steps of a small batch with a small student."""
    from student import api

    def train(recipe: str, *words: object, settings: dict | None = None, **options: object) -> api.Trained:
        small = {"model": SMALL_STUDENTS[recipe]} if recipe in SMALL_STUDENTS else {}
        chosen = {**small, **(settings or {}), "run.workers": 0}
        return whole(recipe, *words, settings=chosen, **{**options, "steps": 2, "batch_size": 8})

    whole = api.train
    with pytest.MonkeyPatch.context() as patch, contained():
        patch.setattr(api, "train", train)
        yield


def run_python(block: Block, names: dict) -> None:
    """Execute a block of Python in the names that earlier blocks of the page defined."""
    with small_training():
        exec(compile("\n" * (block.line - 1) + block.text, block.page, "exec"), names)


# ----------------------------------------------------------------------------------------------------
# Checking without running


def check(words: list[str]) -> None:
    """Check a command that is not run: its program, script, options and settings exist."""
    program, *rest = words
    if re.fullmatch("_(TC|STUDENT)_COMPLETE=(bash|zsh|fish)_source", program):
        assert rest[0] in ("tc", "student")
    elif program in ("tc", "student"):
        check_click(program, rest)
    elif program == "torchrun":
        at = rest.index("-m")
        check_click({"teachercache": "tc", "student": "student"}[rest[at + 1]], rest[at + 2 :])
    elif program == "bash":
        assert (ROOT / rest[0]).is_file(), f"{shlex.join(words)}: no such script"
        check_script((ROOT / rest[0]), rest[1:])
    elif program == "python":
        file = ROOT / (rest[1].replace(".", "/") + ".py" if rest[0] == "-m" else rest[0])
        file = file if file.is_file() else file.with_suffix("") / "__main__.py"
        assert file.is_file(), f"{shlex.join(words)}: no such script"
        check_script(file, rest[2 if rest[0] == "-m" else 1 :])
    elif program == "pip":
        check_extras(rest)
    else:
        assert program in (*PROGRAMS, "git"), f"{shlex.join(words)}: an unknown program"


def check_click(program: str, words: list[str]) -> None:
    """Parse a command line as the program does."""
    import click

    from student.cli import student
    from teachercache.cli import tc

    group = {"tc": tc, "student": student}[program]
    try:
        with click.Context(group, info_name=program) as context:
            name, command, rest = group.resolve_command(context, list(words))
            command.make_context(name, list(rest), parent=context)
    except click.ClickException as error:
        pytest.fail(f"{program} {shlex.join(words)}: {error.format_message()}")


def check_script(path: Path, words: list[str]) -> None:
    """Check that the source of a script, or of the modules that it starts, has each option."""
    source = path.read_text(encoding="utf-8")
    for module in re.findall(r"-m (scripts[\w.]*)", source):
        target = ROOT / module.replace(".", "/")
        parts = target.rglob("*.py") if target.is_dir() else [target.with_suffix(".py")]
        source += "".join(part.read_text(encoding="utf-8") for part in parts if part.is_file())
    for word in words:
        assert not word.startswith("--") or word.split("=")[0] in source, f"{path.name} has no option {word}"


def check_extras(words: list[str]) -> None:
    """Check that the extras of an installation are those of setup.cfg."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    named = {
        name
        for word in words
        for part in re.findall(r"^(?:teachercache|\.)\[(.*)\]", word)
        for name in part.split(",")
    }
    assert named <= config["options.extras_require"].keys(), (
        f"pip {shlex.join(words)}: setup.cfg has no such extra"
    )


def copy_world(world: Path, home: Path) -> None:
    """Give a page its own copy of the small data, cache and run; what is large is linked."""
    shutil.copytree(world, home, dirs_exist_ok=True)
