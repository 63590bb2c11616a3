"""Files that a release needs: one version everywhere, a citation, a changelog, a workflow and templates that parse."""

import configparser
import re
import subprocess
from pathlib import Path

import pytest
import yaml

import teachercache
from scripts.lowest import read_setup
from student.recipes.registry import RECIPES

ROOT = Path(__file__).parent.parent
WORKFLOW = ROOT / ".github" / "workflows" / "test.yml"
HEADING = re.compile(r"^## (\d+\.\d+\.\d+) - (\d{4}-\d{2}-\d{2})$", re.MULTILINE)


def setup_cfg() -> configparser.ConfigParser:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    return config


def load(path: Path) -> dict:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def test_one_version_and_one_date():
    version, date = HEADING.findall((ROOT / "CHANGELOG.md").read_text(encoding="utf-8"))[0]
    citation = load(ROOT / "CITATION.cff")
    assert version == teachercache.__version__ == citation["version"]
    assert date == citation["date-released"]
    assert setup_cfg()["metadata"]["license"] == citation["license"]


def test_the_changelog_has_the_sections_of_keep_a_changelog():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = re.findall(r"^##+ .*$", text, re.MULTILINE)
    kinds = {"### " + kind for kind in ("Added", "Changed", "Deprecated", "Removed", "Fixed", "Security")}
    assert headings[0] == "## Unreleased"
    assert {line for line in headings if line not in kinds} == {
        "## Unreleased",
        *(f"## {version} - {date}" for version, date in HEADING.findall(text)),
    }


def test_the_citation_has_the_paper_of_every_recipe():
    """By the title that the recipe itself has. The keys are those that the schema requires."""
    citation = load(ROOT / "CITATION.cff")
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["cff-version"] == "1.2.0"
    papers = {recipe.paper.lower() for name, recipe in RECIPES.items() if name != "clip"}
    cited = {f"{paper['title']} ({paper['year']})".lower() for paper in citation["references"]}
    assert cited == papers
    for paper in citation["references"]:
        assert {"type", "title", "year", "authors"} <= paper.keys()
        assert all({"given-names", "family-names"} == author.keys() for author in paper["authors"])
        assert len(paper["authors"]) >= 3
        assert ("name" in paper["conference"]) if paper["type"] == "conference-paper" else paper["journal"]


# ----------------------------------------------------------------------------------------------------
# The workflow and the templates


def steps() -> list[dict]:
    return [step for job in load(WORKFLOW)["jobs"].values() for step in job["steps"]]


def test_the_workflow_has_the_keys_of_a_workflow():
    workflow = load(WORKFLOW)
    assert workflow.keys() == {
        "name",
        True,
        "permissions",
        "concurrency",
        "jobs",
    }  # YAML 1.1 reads `on` as true
    assert workflow[True].keys() == {"push", "pull_request"}
    for job in workflow["jobs"].values():
        assert job.keys() <= {"name", "runs-on", "timeout-minutes", "strategy", "steps"}
        assert {"runs-on", "timeout-minutes", "steps"} <= job.keys()
    for step in steps():
        assert len({"uses", "run"} & step.keys()) == 1
        assert step.keys() <= {"name", "uses", "run", "with", "env", "if"}
        assert re.fullmatch(r"[\w-]+/[\w-]+@v\d+", step.get("uses", "actions/checkout@v4"))


def test_the_workflow_runs_every_python_of_setup_with_lowest_and_newest_dependencies():
    matrix = load(WORKFLOW)["jobs"]["tests"]["strategy"]["matrix"]["include"]
    classifiers = setup_cfg()["metadata"]["classifiers"]
    pythons = re.findall(r"Python :: (3\.\d+)", classifiers)
    assert [entry["python"] for entry in matrix if entry["dependencies"] == "newest"] == pythons
    assert [entry["python"] for entry in matrix if entry["dependencies"] == "lowest"] == pythons[:1]
    assert setup_cfg()["options"]["python_requires"] == f">={pythons[0]}"
    accepted = re.search(r"not \((3, \d+)\) <= .* < \((3, \d+)\)", (ROOT / "scripts" / "env").read_text())
    assert accepted.groups() == (pythons[0].replace(".", ", "), f"3, {int(pythons[-1][2:]) + 1}")


def test_the_commands_of_the_workflow_exist():
    lines = "\n".join(step.get("run", "") for step in steps())
    assert "bash scripts/test" in lines
    assert subprocess.run(["bash", "-n", "-c", lines], check=False).returncode == 0
    for module in re.findall(r"-m (scripts\.\w+)", lines):
        assert (ROOT / f"{module.replace('.', '/')}.py").exists()
    for script in re.findall(r"bash (\S+)", lines):
        assert (ROOT / script).exists()
    expressions = re.findall(r"\$\{\{ ([\w.]+) \}\}", WORKFLOW.read_text())
    assert WORKFLOW.read_text().count("${{") == len(expressions)
    assert {name.split(".")[0] for name in expressions} <= {"matrix", "github"}


def test_the_extras_of_the_workflow_exist():
    texts = [step.get("run", "") for step in steps()] + [(ROOT / "scripts" / "env").read_text()]
    named = {
        name
        for text in texts
        for found in re.findall(r"\.\[([\w,]+)\]|install\.py ([\w,]+)", text)
        for name in "".join(found).split(",")
    }
    assert {"dev", "cpu"} <= named
    assert named <= read_setup().keys()


@pytest.mark.parametrize("name", ["bug.yml", "request.yml"])
def test_a_template_is_a_form(name):
    form = load(ROOT / ".github" / "ISSUE_TEMPLATE" / name)
    assert {"name", "description", "body"} <= form.keys()
    for field in form["body"]:
        assert field["type"] in ("markdown", "textarea", "input")
        assert ("value" if field["type"] == "markdown" else "label") in field["attributes"]
    ids = [field["id"] for field in form["body"] if field["type"] != "markdown"]
    assert len(ids) == len(set(ids))
    assert any(field.get("validations", {}).get("required") for field in form["body"])


def test_the_templates_name_files_and_commands_that_exist():
    for path in (ROOT / ".github").rglob("*"):
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        for name in re.findall(r"[A-Z]{5,}\.md|scripts/[\w/]+|setup\.cfg", text):
            assert (ROOT / name).exists(), f"{path} names {name}"
        for module in re.findall(r"python -m (scripts\.\w+)", text):
            assert any(
                (ROOT / f"{module.replace('.', '/')}{ending}").exists() for ending in (".py", "/__main__.py")
            )
