"""The laws of the house, read from the syntax trees: the tower, the floors, names, sizes, and tests that test."""

import ast
import fnmatch
import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from evaluation.tasks.registry import TASKS
from scripts.tree import map_of_files, replaced
from student.inputs.questions import QUESTION_TASKS
from student.recipes.registry import RECIPES
from teachercache.teachers.registry import TEACHERS

ROOT = Path(__file__).parent.parent
TOWER = ("teachercache", "evaluation", "student", "scripts")  # a package imports only those left of it
FLOORS = {  # within a package, a folder or module imports only those before it in the list
    "teachercache": (
        "core",
        "data",
        "cache",
        "teachers",
        "search",
        "build",
        "analysis",
        "serve",
        "api",
        "commands",
        "cli",
    ),
    "evaluation": ("metrics", "data", "models", "probes", "tasks", "studies", "results"),
    "student": (
        ("losses", "streams", "rows", "contract", "recipe", "settings", "distributed", "ensemble"),
        "models",
        "inputs",
        "recipes",
        "training",
        "inference",
        "export",
        "run_config",
        "api",
        "commands",
        "cli",
    ),
    "scripts": ("datasets", "teachers", "benchmarks", "papers"),
}
PACKAGES = TOWER[:3]
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
SCRIPTS = sorted((ROOT / "scripts").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("test_*.py"))
MAX_FILE, MAX_FUNCTION, MAX_NOQA, MAX_SIBLINGS, MAX_PARAMETERS = 400, 80, 3, 12, 8


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in [*SOURCES, *SCRIPTS]}


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


# ----------------------------------------------------------------------------------------------------
# Laws 1 and 2: imports run one way


def floor_of(module: str) -> int | None:
    """The place of a module's floor within its package, None for the package itself."""
    package, *rest = module.split(".")
    if not rest or rest[0] in (
        "__main__",
        "check_prose",
        "demo",
        "demo_others",
        "demo_table",
        "docs_comments",
        "docs_pages",
        "install",
        "lowest",
        "record",
        "release",
        "screenshots",
        "smoke",
        "tree",
    ):
        return None
    floors = [(floor,) if isinstance(floor, str) else floor for floor in FLOORS[package]]
    found = [place for place, floor in enumerate(floors) if rest[0] in floor]
    assert found, f"{module} stands on no floor: add it to FLOORS"
    return found[0]


def upward(edges: set[tuple[str, str]]) -> list[str]:
    """Imports that run against the tower or against the floors of a package."""
    wrong = []
    for source, target in sorted(edges):
        if target.split(".")[0] not in TOWER or target not in MODULES:
            continue
        ours, theirs = source.split(".")[0], target.split(".")[0]
        if ours != theirs:
            wrong += [f"{source} -> {target}"] if TOWER.index(ours) < TOWER.index(theirs) else []
            continue
        here, there = floor_of(source), floor_of(target)
        if here is not None and there is not None and here < there:
            wrong.append(f"{source} -> {target}")
    return wrong


def test_the_reader_of_imports_sees_them():
    """Otherwise every law below would hold of nothing."""
    assert ("student.training.loop", "student.training.checkpoint") in EDGES
    assert ("student.api", "student.training.loop") in EDGES  # inside a function
    assert ("student.recipes.clip_kd", "student.recipes.clip") in EDGES
    assert len(EDGES) > 300
    assert {module.split(".")[0] for module in MODULES} == set(TOWER)


def test_no_import_runs_upward():
    assert upward(EDGES) == []


def test_the_check_of_floors_can_say_no():
    edges = {
        ("teachercache.core.paths", "teachercache.cache.store"),
        ("evaluation.metrics.ranking", "student.recipe"),
        ("student.cli", "student.recipe"),
    }
    assert len(upward(edges)) == 2


@pytest.mark.parametrize("package", TOWER)
def test_every_module_stands_on_a_floor(package):
    for module in MODULES:
        if module.split(".")[0] == package:
            floor_of(module)


@pytest.mark.parametrize("package", PACKAGES)
def test_a_command_is_imported_by_main_alone(package):
    assert {source for source, target in EDGES if target == f"{package}.cli"} <= {
        f"{package}.__main__",
        *(module for module in MODULES if module.startswith("scripts.")),
    }


def test_nothing_imports_tests():
    assert [(a, b) for a, b in EDGES if b.split(".")[0] in ("tests", "conftest", "small")] == []


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
# Laws 3 and 4: core names no recipe, teacher, student or task


def field_names() -> set[str]:
    """Names of fields in the sources of our teachers: strings that an output of a teacher writes."""
    patterns = {pattern for entry in TEACHERS.values() for pattern in entry.writes.values()}
    strings = {
        node.value
        for path in (ROOT / "teachercache" / "teachers").rglob("*.py")
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    return {text for text in strings if any(re.fullmatch(pattern, text) for pattern in patterns)}


NAMES = field_names() | {*RECIPES, *TEACHERS, *TASKS, *QUESTION_TASKS}
PARTIES = ("student", "teacher", "task", "recipe", "constants")
# These folders are where the parties live: a teacher may look at its own module, a recipe at its own constants
HOMES = ("teachercache/teachers/", "student/recipes/", "student/models/", "evaluation/tasks/")
CORE = [path for path in SOURCES if not path.relative_to(ROOT).as_posix().startswith(HOMES)]


def last_name(node: ast.expr) -> str:
    """The last name of an expression such as `engine.module.student`."""
    return getattr(node, "attr", getattr(node, "id", ""))


def literals(node: ast.expr) -> set[str]:
    """Strings in a literal, or in a tuple, list or set of literals."""
    parts = node.elts if isinstance(node, ast.Tuple | ast.List | ast.Set) else [node]
    return {part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)}


def known_parties(module: ast.Module, names: set[str]) -> list[str]:
    """Places where code asks which recipe, teacher, student or task it has."""
    found = []
    for node in ast.walk(module):
        if isinstance(node, ast.Call) and last_name(node.func) in ("hasattr", "getattr", "isinstance"):
            if node.args and last_name(node.args[0]) in PARTIES:
                found.append(ast.unparse(node))
        elif isinstance(node, ast.Call) and last_name(node.func) == "startswith":
            prefixes = set().union(*map(literals, node.args))
            found += [ast.unparse(node)] * any(
                name.startswith(prefix) for prefix in prefixes for name in names if prefix and "_" in prefix
            )
        elif isinstance(node, ast.Compare):
            compared = set().union(*map(literals, [node.left, *node.comparators]))
            found += [ast.unparse(node)] if compared & names else []
        elif isinstance(node, ast.Attribute) and last_name(node.value) == "constants":
            found += [] if node.attr in ("items", "get") else [ast.unparse(node)]
    return found


@pytest.mark.parametrize("path", CORE, ids=lambda path: str(path.relative_to(ROOT)))
def test_core_names_no_recipe_teacher_student_or_task(path):
    assert known_parties(tree(path), NAMES) == []


@pytest.mark.parametrize(
    "line",
    [
        "hasattr(student, 'choose_rows')",
        "isinstance(step.student, TwoTower)",
        "getattr(teacher, 'tokens', None)",
        "recipe.constants.regime",
        "name == 'word_index'",
        "name in ('diffusion_score', 'x')",
        "name.startswith('region_')",
        "task.name == 'vcr'",
    ],
)
def test_the_check_of_names_can_say_no(line):
    assert known_parties(ast.parse(line), NAMES) != []


def test_the_check_of_names_knows_names():
    assert {"image_emb", "word_index", "clip_td", "regions-lite", "vcr", "zeroshot_classification"} <= NAMES


# ----------------------------------------------------------------------------------------------------
# Law 5: losses know torch alone


def test_losses_import_torch_alone():
    found = {
        target if target in MODULES else target.split(".")[0]
        for source, target in EDGES
        if source.startswith("student.losses")
    }
    ours = {target for target in found if target.split(".")[0] in TOWER}
    assert all(target.startswith("student.losses") for target in ours)
    assert found - ours - set(sys.stdlib_module_names) <= {"torch", "jaxtyping"}


# ----------------------------------------------------------------------------------------------------
# Law 6: __init__.py files hold no logic


def logic(module: ast.Module) -> list[str]:
    """Statements that are neither a docstring, an import, `__all__` nor `__version__`."""
    found = []
    for node in module.body:
        plain = isinstance(node, ast.Import | ast.ImportFrom)
        plain |= isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if isinstance(node, ast.Assign):
            plain |= {getattr(target, "id", "") for target in node.targets} <= {"__all__", "__version__"}
        found += [] if plain else [ast.unparse(node)[:60]]
    return found


@pytest.mark.parametrize(
    "path",
    [path for path in [*SOURCES, *SCRIPTS] if path.name == "__init__.py"],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_packages_hold_no_logic(path):
    assert logic(tree(path)) == []


def test_the_check_of_logic_can_say_no():
    assert logic(ast.parse('"""A doc."""\nfrom a import b\nX = {}\n')) == ["X = {}"]


# ----------------------------------------------------------------------------------------------------
# Size and habits


@pytest.mark.parametrize(
    "folder",
    sorted({path.parent for path in [*SOURCES, *SCRIPTS]}),
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_a_folder_fits_into_one_look(folder):
    assert len([path for path in folder.glob("*.py") if path.name != "__init__.py"]) <= MAX_SIBLINGS


def test_every_folder_of_tests_is_searched(pytestconfig):
    """By default pytest leaves out folders named build or dist."""
    patterns = pytestconfig.getini("norecursedirs")
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "tests").rglob("test_*.py")}
    names = {name for folder in folders for name in folder.parts}
    assert "build" in names
    assert [name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)] == []


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
    [*SOURCES, *SCRIPTS],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_files_and_functions_are_short(path):
    lines = path.read_text(encoding="utf-8").count("\n")
    assert lines <= MAX_FILE
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno + 1 <= MAX_FUNCTION, node.name


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """How many parameters a function has, besides self, cls and an autograd context."""
    names = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    return len([name for name in names if name.arg not in ("self", "cls", "ctx")])


@pytest.mark.parametrize("path", [*SOURCES, *SCRIPTS], ids=lambda path: str(path.relative_to(ROOT)))
def test_signatures_are_narrow(path):
    wide = [
        node.name
        for node in ast.walk(tree(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and parameters(node) > MAX_PARAMETERS
    ]
    assert wide == []


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
# Law 7: generated lists


def test_the_map_of_files_is_up_to_date():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert replaced(text) == text, "run `python -m scripts.tree`"


def test_the_map_names_every_module():
    text = map_of_files()
    for path in [*SOURCES, *SCRIPTS]:
        if path.name not in ("__init__.py", "__main__.py"):
            assert f" {path.name} " in text, path


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
    known = functions(ROOT / "tests" / "helpers" / "small.py") | functions(path)
    empty = [
        name for name, node in functions(path).items() if name.startswith("test_") and not checks(node, known)
    ]
    assert empty == []
