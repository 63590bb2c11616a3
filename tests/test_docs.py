"""The documentation: every block of code runs or is checked, no link is dead, and the site builds strictly."""

import contextlib
import dataclasses
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pages import (
    INDENTED,
    ROOT,
    blocks,
    check,
    commands,
    copy_world,
    pages,
    run,
    run_python,
)
from small import contained, make_folder, save_teacher

from evaluation.tasks.task import Kind, Option, Selection
from student.cli import main as student
from student.contract import Capability, Exported
from student.recipe import Optim
from teachercache.cli import main as tc
from teachercache.teachers import registry

SMALL = ("clip-lite", "clip-vit-b16", "clip-vit-b32")  # teachers of pages that a tiny CLIP stands for
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
LINKED = [*pages(), "CONTRIBUTING.md", "SECURITY.md", "data/README.md", "examples/README.md"]


@pytest.fixture(scope="module", autouse=True)
def no_drawings():
    """Runs without curve.png, whose drawing takes longer than two steps; reports without PNG files."""
    from student.training import loop
    from teachercache.analysis.report import write

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "draw_curve", lambda run, terms: None)
        patch.setattr(write, "draw_figures", lambda report, page, out: [])
        yield


@pytest.fixture(scope="module", autouse=True)
def small_teachers(tmp_path_factory: pytest.TempPathFactory):
    """Tiny CLIPs under the names of teachers that need weights."""
    folders = {
        name: save_teacher(tmp_path_factory.mktemp("teachers") / name, seed=i) for i, name in enumerate(SMALL)
    }

    def load(name: str, *, weights: str, outputs: tuple[str, ...]):
        folder = str(folders[name])
        teacher = registry.find_stored(folder).load(folder, weights="pretrained", outputs=outputs)
        return dataclasses.replace(
            teacher, spec=dataclasses.replace(teacher.spec, name=name, weights=weights)
        )

    with pytest.MonkeyPatch.context() as patch:
        for name in SMALL:
            patch.setitem(registry.TEACHERS, name, dataclasses.replace(registry.TEACHERS[name], load=load))
        yield


@pytest.fixture(scope="module")
def world(small_teachers, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What every page may use: pictures, the demo's data, a cache of it, and a run."""
    home = tmp_path_factory.mktemp("world")
    make_folder(home / "photos", 24)
    make_folder(home / "data" / "demo", 24, texts=2, splits=True)
    make_folder(home / "holiday", 3)
    shutil.copy(home / "photos" / "class0" / "000.png", home / "cat.png")
    with contextlib.chdir(home), contained():
        assert tc(["build", "--teacher", "clip-lite", "--workers", "0"]) == 0
        words = ["--out", "runs/mine", "--steps", "2", "--batch-size", "8", "--set", "run.workers=0"]
        assert student(["train", "--recipe", "clip_kd", "--set", "model=vit-micro", *words]) == 0
        shutil.rmtree("runs/mine/checkpoints")
    return home


# ----------------------------------------------------------------------------------------------------
# Blocks


@pytest.mark.parametrize("page", pages())
def test_every_block_of_a_page_runs(page, world, tmp_path):
    """In order, in one folder; marked blocks are checked against the programs' options."""
    if any(block.language in ("bash", "python") and not block.mark for block in blocks(page)):
        copy_world(world, tmp_path)
    names: dict = {"__name__": "page"}
    with contextlib.chdir(tmp_path):
        for block in blocks(page):
            if block.language == "python" and not block.mark:
                run_python(block, names)
            elif block.language == "bash":
                for words in commands(block):
                    (check if block.mark else run)(words)
            elif block.mark == "included":
                assert included(block.text)
            elif block.language == "python":
                assert compile(block.text, str(block), "exec")


def included(text: str) -> str:
    """The code that a block includes by the name of a file, or of a section between marks in it."""
    found = re.fullmatch(r'--8<-- "([^":]+)(?::(\w+))?"\n', text)
    assert found, f"not a line that includes code: {text}"
    source = (ROOT / found[1]).read_text(encoding="utf-8")
    mark = "# --8<-- [{}:" + f"{found[2]}]\n"
    return source.partition(mark.format("start"))[2].partition(mark.format("end"))[0] if found[2] else source


@pytest.mark.parametrize("page", pages())
def test_commands_stand_in_fences(page):
    """An indented command would not be run."""
    text = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    assert INDENTED.findall(text) == []


@pytest.mark.parametrize("page", pages())
def test_blocks_name_their_language(page):
    languages = {block.language for block in blocks(page)}
    assert languages <= {"bash", "python", "ini", "json", "text", "toml"}


def test_blocks_that_are_not_run_are_few():
    every = [block for page in pages() for block in blocks(page) if block.language in ("bash", "python")]
    marked = [block for block in every if block.mark and block.mark != "included"]
    assert len(marked) < len(every) / 3


def test_the_check_of_commands_can_say_no():
    for line in (
        "tc build --teacher a --outputz b",
        "tc bild",
        "student eval runs/mine",
        "torchrun --nproc-per-node 8 -m student train --recip clip",
        "bash scripts/nothing",
        "bash scripts/bench cache --nothing",
        "pip install 'teachercache[" + "nothing]'",
        "frobnicate",
    ):
        with pytest.raises((AssertionError, pytest.fail.Exception)):
            check(shlex.split(line))
    with pytest.raises(pytest.fail.Exception):
        run(["curl", "x"])


# ----------------------------------------------------------------------------------------------------
# Links and the site


def anchors_of(page: Path) -> set[str]:
    """The anchors of the headings of a page, as code hosts and the site make them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    plain = (
        re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).replace("`", "") for title in HEADING.findall(text)
    )
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in plain}


@pytest.mark.parametrize("page", LINKED)
def test_no_link_is_dead(page):
    source = (ROOT / page).read_text(encoding="utf-8")
    text = re.sub(r"`[^`\n]*`(?!\])", "", re.sub(r"^```.*?^```$", "", source, flags=re.MULTILINE | re.DOTALL))
    dead = []
    for link in (first or second for first, second in LINK.findall(text)):
        path, _, anchor = link.partition("#")
        if re.match(r"\w+:", link):
            continue
        target = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        if not target.exists() or (anchor and anchor not in anchors_of(target)):
            dead.append(link)
    assert dead == []


def test_readme_fits_a_screen_or_two():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site. `--quiet` would drop warnings before `--strict` counts them."""
    pytest.importorskip("mkdocs", reason="pip install -e '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_site_has_its_generated_parts_and_loads_nothing_from_elsewhere(site):
    for name in ("reference/commands", "reference/settings", "reference/api", "index"):
        page = (site / f"{name}.html").read_text(encoding="utf-8")
        loaded = re.findall(r'<(?:script|img|iframe)[^>]* src="([^"]+)"|<link[^>]* href="([^"]+)"', page)
        assert not [url for pair in loaded for url in pair if re.match(r"\w+:|//", url)]
    assert "--outputs" in (site / "reference/commands.html").read_text(encoding="utf-8")
    assert "mask_ratio" in (site / "reference/settings.html").read_text(encoding="utf-8")
    assert "huber_loss" in (site / "how-to/add_recipe.html").read_text(encoding="utf-8")
    assert (site / "source/tests/third_party/visitor/teachers.py").is_file()


HTML = re.compile(
    r"a|article|body|button|code|div|em|footer|form|h[1-6]|head|header|html|img|input|label|li|link|main|meta|nav|ol|p"
    r"|path|pre|script|small|span|strong|svg|table|tbody|td|th|thead|title|tr|ul"
)


def test_placeholders_of_docstrings_are_no_tags(site):
    """A browser drops what it takes for a tag: `caches/<data>` without backticks would be shown as caches/."""
    for page in site.rglob("*.html"):
        tags = set(re.findall(r"<([a-zA-Z][\w-]*)", page.read_text(encoding="utf-8")))
        assert [tag for tag in tags if not HTML.fullmatch(tag)] == [], page


def test_the_api_page_shows_the_members_of_records(site):
    """Members whose meaning is in a comment beside them are shown, too."""
    page = (site / "reference/api.html").read_text(encoding="utf-8")
    shown = set(re.findall(r'id="([\w.]+)"', page))
    records = [*Capability, *Kind]
    names = [f"{type(member).__module__}.{type(member).__name__}.{member.name}" for member in records]
    for record in (Option, Selection, Optim):
        names += [f"{record.__module__}.{record.__name__}.{f.name}" for f in dataclasses.fields(record)]
    names += [f"student.contract.Exported.{name}" for name in Exported._fields]
    names += ["teachercache.data.manifest.Manifest.row", "teachercache.data.pictures.read_image"]
    assert [name for name in names if name not in shown] == []
    assert "has the members of Encodes" in page
