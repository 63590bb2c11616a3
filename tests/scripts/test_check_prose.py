"""scripts/check_prose.py: sentences that it rejects and accepts, and the files that are clean."""

import subprocess
import sys
from pathlib import Path

import pytest

from scripts import check_prose

BAD = [
    "What the teacher says of each text.",
    "What is said of each text beside its picture.",
    "The cache knows no other field.",
    "A loss never knows ranks.",
    "Which fields a task asks of a student.",
    "`starts` says which tokens begin a word.",
    "Three words unless told.",
    "The colour of each class.",
    "Embeddings are normalised.",
    "Labelled rows, neighbours and centres.",
    "Optimised for greyscale pictures.",
    "A student knows\nnothing of pictures.",
]
GOOD = [
    "Return the fields that the user asked for.",
    "Tell the user which option to pass.",
    "The paper says that the scale is learned.",
    "The teacher predicts a score for each text; the cache stores it.",
    "The model is known as ViT-B/16.",
    "Known words come first. The row order is unknown.",
    "Print what the recipe needs and how to build it.",
    "The color of each class, normalized, labeled, centered in gray.",
    "Optimistic bounds of an organism; a size of a prism.",
    "Raise an error whose message says what to type next.",
    "The model card describes the training.",
]


@pytest.mark.parametrize("text", BAD)
def test_bad_prose_is_rejected(text):
    assert list(check_prose.problems(text))


@pytest.mark.parametrize("text", GOOD)
def test_good_prose_is_accepted(text):
    assert list(check_prose.problems(text)) == []


SOURCE = '''"""Return the
colour of a row."""

KEY = "one_colour"
HELP = f"what the teacher says of {KEY}"
# The cache
# knows nothing
centre = 1
'''


def test_places_in_python_files(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(SOURCE)
    assert [(line, text) for _, line, _, text in check_prose.findings(path)] == [
        (2, "colour"),
        (5, "teacher says"),
        (6, "cache knows"),
        (7, "knows nothing"),
        (8, "centre"),
    ]


PAGE = """A colour.

    student train --colour

```python
centre = 1
```
<!-- x: made by a script -->
neighbours
<!-- end of x -->
See `grey` and [a page](neighbours.md): the teacher says so.
"""


def test_places_in_pages(tmp_path):
    path = tmp_path / "page.md"
    path.write_text(PAGE)
    places = [(line, text) for _, line, _, text in check_prose.findings(path)]
    assert places == [(1, "colour"), (11, "teacher says")]


def test_the_command_fails_on_a_violation(tmp_path, monkeypatch, capsys):
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "bad.py").write_text('"""The colour."""\n')
    monkeypatch.setattr(check_prose, "ROOT", tmp_path)
    monkeypatch.setattr(check_prose, "PAGES", ())
    monkeypatch.setattr(sys, "argv", ["check_prose"])
    assert check_prose.main() == 1
    assert "bad.py:1: British spelling: colour" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["check_prose", str(tmp_path / "elsewhere.py")])
    assert check_prose.main() == 0  # a file that is not in a clean folder


@pytest.mark.parametrize("folder", [*check_prose.CLEAN, "pages"])
def test_clean_folders_stay_clean(folder):
    root = Path(check_prose.ROOT)
    files = [path for path in check_prose.checked_files() if (path.suffix == ".md") == (folder == "pages")]
    files = [path for path in files if folder == "pages" or path.is_relative_to(root / folder)]
    assert files
    assert [str(finding) for path in files for finding in check_prose.findings(path)] == []


def test_the_hook_is_the_command():
    hooks = (check_prose.ROOT / ".pre-commit-config.yaml").read_text()
    assert "entry: python -m scripts.check_prose" in hooks
    process = subprocess.run(
        [sys.executable, "-m", "scripts.check_prose", __file__], cwd=check_prose.ROOT, capture_output=True
    )
    assert process.returncode == 0  # tests are outside of CLEAN
