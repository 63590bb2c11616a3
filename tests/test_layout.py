"""The layout law read from the source: imports, lengths, the README's map of files, tests that test."""

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("teachercache", "student", "evaluation")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
SCRIPTS = sorted(path for path in (ROOT / "scripts").iterdir() if path.is_file())
TESTS = sorted((ROOT / "tests").glob("test_*.py"))
MAX_FILE, MAX_FUNCTION, MAX_NOQA = 400, 80, 3


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in SOURCES}


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, anywhere in it: inside functions and under TYPE_CHECKING too."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module_name(path).split(".")
                package = package if path.name == "__init__.py" else package[:-1]
                base = ".".join([*package[: len(package) - node.level + 1], *filter(None, [base])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield inner if inner in MODULES else base


EDGES = {(name, target) for name, path in MODULES.items() for target in imports(path)}


def crossing(source: str, target: str) -> list[tuple[str, str]]:
    """Imports from one package into another."""
    return sorted((a, b) for a, b in EDGES if a.split(".")[0] == source and b.split(".")[0] == target)


# ----------------------------------------------------------------------------------------------------
# Imports run one way


def test_the_reader_of_imports_sees_them():
    """Otherwise every law below would hold of nothing."""
    assert ("student.training.loop", "student.training.checkpoint") in EDGES  # from student import checkpoint
    assert ("student.cli", "student.training.loop") in EDGES  # inside a function
    assert ("student.recipes.clip_kd", "student.recipes.clip") in EDGES
    assert len(EDGES) > 150
    assert {module.split(".")[0] for module in MODULES} == set(PACKAGES)


@pytest.mark.parametrize(
    ("source", "target"),
    [("teachercache", "student"), ("teachercache", "evaluation"), ("evaluation", "student")],
)
def test_no_import_runs_upward(source, target):
    assert crossing(source, target) == []


def test_training_and_evaluation_meet_in_the_command_alone():
    assert {source for source, _ in crossing("student", "evaluation")} == {"student.cli"}
    assert {source for source, target in EDGES if target == "student.cli"} == {"student.__main__"}
    assert {source for source, target in EDGES if target == "teachercache.cli"} == {"teachercache.__main__"}


def test_nothing_imports_tests_or_scripts():
    names = {path.stem for path in (ROOT / "scripts").glob("*.py")} | {"tests", "scripts", "conftest"}
    assert [(a, b) for a, b in EDGES if b.split(".")[0] in names] == []


def test_losses_know_torch_alone():
    own = {
        source: set() for source in ("student.losses.papers", "student.losses.tiled", "student.losses.tiles")
    }
    for source, target in EDGES:
        if source in own:
            own[source].add(target if target in MODULES else target.split(".")[0])
    assert own["student.losses.papers"] == {"torch", "jaxtyping", "student.losses.tiled"}
    assert own["student.losses.tiled"] - set(sys.stdlib_module_names) == {
        "torch",
        "jaxtyping",
        "student.losses.tiles",
    }
    assert own["student.losses.tiles"] - set(sys.stdlib_module_names) == {"torch", "jaxtyping"}


def test_no_module_is_reached_from_itself():
    """No cycles, not even through imports inside functions; a table of names may load what it names when asked."""
    graph = {
        a: {b for x, b in EDGES if x == a and b in MODULES and not b.startswith(f"{a}.")} for a in MODULES
    }
    done: set[str] = set()

    def walk(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail[trail.index(name) :], name))
        if name in done:
            return
        for target in sorted(graph[name]):
            walk(target, (*trail, name))
        done.add(name)

    for name in sorted(graph):
        walk(name, ())
    assert done == set(MODULES)


# ----------------------------------------------------------------------------------------------------
# Size and habits


def test_git_ignores_no_source():
    """A pattern such as `models/` without a leading slash keeps a package out of every clone."""
    inside = subprocess.run(
        ["git", "rev-parse", "--is-inside-work-tree"], cwd=ROOT, capture_output=True, text=True
    )
    if inside.returncode:
        pytest.skip("not a git checkout")
    command = ["git", "check-ignore", *map(str, [*SOURCES, *SCRIPTS, *TESTS])]
    ignored = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    assert [path for path in ignored if "__pycache__" not in path] == []


@pytest.mark.parametrize(
    "path",
    [*SOURCES, *(path for path in SCRIPTS if path.suffix == ".py")],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_files_and_functions_are_short(path):
    lines = path.read_text(encoding="utf-8").count("\n")
    assert lines <= MAX_FILE
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno + 1 <= MAX_FUNCTION, node.name


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_module_says_what_it_is_for(path):
    assert ast.get_docstring(tree(path))
    assert "__future__" not in set(imports(path))  # jaxtyping's annotations must stay objects
    assert path.read_text(encoding="utf-8").isascii()


def test_few_lint_rules_are_silenced():
    pattern = re.compile(r"#\s*(?:noqa|type:\s*ignore)")
    places = [
        f"{path.name}: {line.strip()}"
        for path in SOURCES
        for line in path.read_text().splitlines()
        if pattern.search(line)
    ]
    assert len(places) <= MAX_NOQA, places
    assert all(re.search(r"noqa: [A-Z]+\d+|ignore\[", place) for place in places)  # each names its rule


# ----------------------------------------------------------------------------------------------------
# The README's map of files


def mapped_files() -> dict[str, list[str]]:
    """Folder -> files, from the indented block below README's heading "Files"."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"^## Files\n+((?:(?: {4}.*)?\n)+)", text, re.MULTILINE)
    assert block, "README.md has no file map under `## Files`"
    found: dict[str, list[str]] = {"": []}
    folder = ""
    for line in filter(str.strip, block[1].splitlines()):
        names = re.split(r"\s{2,}", line.strip())[0].split()
        if line.startswith("      "):
            found[folder] += names
        elif names[0].endswith("/"):
            folder = names[0]
            found[folder] = []
        else:
            found[""] += names
    return found


def test_the_map_names_every_module():
    found = mapped_files()
    for package in PACKAGES:
        files = [
            path for path in (ROOT / package).rglob("*") if path.suffix in (".py", ".html", ".css", ".js")
        ]
        present = {path.relative_to(ROOT / package).as_posix() for path in files}
        present -= {"__init__.py"}  # the line of the folder itself
        assert set(found[f"{package}/"]) == present, package


def test_the_map_names_every_script():
    assert set(mapped_files()["scripts/"]) == {path.name for path in SCRIPTS}


def test_the_map_names_nothing_that_does_not_exist():
    found = mapped_files()
    assert [folder for folder in found if not (ROOT / folder).is_dir()] == []
    assert [
        f"{folder}{name}"
        for folder, names in found.items()
        for name in names
        if not (ROOT / folder / name).exists()
    ] == []
    names = [f"{folder}{name}" for folder, names in found.items() for name in names]
    assert len(names) == len(set(names))


# ----------------------------------------------------------------------------------------------------
# Tests test


def checks(function: ast.AST, known: dict[str, ast.AST], seen: frozenset[str] = frozenset()) -> bool:
    """Whether a function can fail by its own words: an assert, pytest.raises or fail, assert_close, or one it calls."""
    for node in ast.walk(function):
        if isinstance(node, ast.Assert):
            return True
        if isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("raises", "fail") or called.startswith("assert_"):
                return True
            if called in known and called not in seen and checks(known[called], known, seen | {called}):
                return True
    return False


def functions(path: Path) -> dict[str, ast.AST]:
    return {node.name: node for node in ast.walk(tree(path)) if isinstance(node, ast.FunctionDef)}


def test_the_check_of_checks_can_say_no():
    bodies = {"helper": "assert x", "good": "helper()", "bad": "print(other())", "other": "bad()"}
    source = "\n".join(f"def {name}():\n    {body}" for name, body in bodies.items())
    known = {node.name: node for node in ast.parse(source).body}
    assert {name for name, node in known.items() if checks(node, known)} == {"helper", "good"}


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.name)
def test_every_test_can_fail(path):
    known = functions(ROOT / "tests" / "conftest.py") | functions(path)
    empty = [
        name for name, node in functions(path).items() if name.startswith("test_") and not checks(node, known)
    ]
    assert empty == []
