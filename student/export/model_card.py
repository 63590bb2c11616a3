"""Write the model card of an exported student, a README.md with the run's record and evaluation results.

Names and paths come from the user, so they are escaped. Local paths are reduced to their last part, because
cards get published.
"""

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from student.contract import Exported
from student.recipes.registry import RECIPES
from teachercache.core.errors import UserError


def model_card(facts: Mapping[str, Any], results: Sequence[Mapping[str, Any]], exported: Exported) -> str:
    """Return the model card of a run, as Markdown.

    Args:
        facts: The content of run.json.
        results: The results that `student eval` wrote, as `read_results` returns them.
        exported: What the export wrote, and how it is loaded.
    """
    recipe, run = facts["recipe"], facts["run"]
    constants = {
        name: value for name, value in recipe["constants"].items() if name not in ("model", "init") or value
    }
    lines = [
        *_front_matter(exported.library, recipe["name"], exported.pipeline),
        f"# {plain(recipe['constants'].get('model', 'student'))} trained by `{recipe['name']}`",
        "",
        f"- Recipe: {plain(recipe['paper'])}",
        f"- Constants: {_settings(constants)}",
        f"- Teacher: {'; '.join(map(_teacher, facts['teachers'])) or 'none'}",
        f"- Data: {', '.join(plain(place(path)) for path in run['data'].split(','))}; {_rows(facts)}",
        f"- Steps: {recipe['steps']}, batch {recipe['batch']}, seed {run['seed']}, {plain(run['precision'])}",
        f"- Optimizer: AdamW, {_settings(recipe['optim'])}",
        f"- Versions: {_settings(facts.get('versions', {}))}",
        "",
        "## Load",
        "",
        *fenced(exported.usage, "python"),
        *(line for note in exported.notes for line in (plain(note), "")),
    ]
    equations = _equations(recipe)
    if equations:
        lines += ["## Equations", "", *fenced(equations)]
    for result in results:
        lines += [
            f"## {plain(result['task'])} on {plain(place(result['dataset']))}",
            "",
            *_table(result["metrics"]),
            "",
        ]
    return "\n".join(lines).rstrip("\n") + "\n"


def read_results(run: Path) -> list[dict[str, Any]]:
    """Return the results that `student eval` kept in <run>/eval, in the order of the file names.

    Raises:
        UserError: A file is not such a result.
    """
    results = []
    for path in sorted((run / "eval").glob("*.json")):
        try:
            result = json.loads(path.read_text())
            results.append({name: result[name] for name in ("dataset", "task", "metrics")})
            result["metrics"].items()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path} is not what `student eval` wrote: remove it, or run `student eval` again"
            ) from error
    return results


def plain(text: object) -> str:
    """Return a text as one escaped line of Markdown, which is safe in tables too."""
    escaped = re.sub(r"[\\`*|<>\[\]&~]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\\g<0>", str(text))
    return " ".join(escaped.split())


def place(text: str) -> str:
    """Return the last part of an absolute path, and any other path, URL or name unchanged."""
    return Path(text).name if Path(text).is_absolute() else text


def fenced(code: str, language: str = "") -> list[str]:
    """Return the lines of a code block, with a fence longer than any run of backticks in the code."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", code)), default=0))
    return [fence + language, *code.strip("\n").splitlines(), fence, ""]


def _front_matter(library: str, recipe: str, pipeline: str) -> list[str]:
    """Return the YAML header for the Hugging Face hub. JSON strings are valid YAML."""
    tags = ["clip", "distillation", "teachercache", recipe]
    return [
        "---",
        f"library_name: {library}",
        f"pipeline_tag: {pipeline}",
        "tags:",
        *(f"- {json.dumps(tag)}" for tag in tags),
        "---",
        "",
    ]


def _settings(values: Mapping[str, object]) -> str:
    """Return `name=value`, separated by commas."""
    return ", ".join(f"{name}={plain(place(str(value)))}" for name, value in values.items()) or "none"


def _teacher(teacher: Mapping[str, str]) -> str:
    name, weights = plain(place(teacher["name"])), plain(place(teacher["weights"]))
    return f"{name}, weights {weights}, sha256 {teacher['digest'][:12]}"


def _rows(facts: Mapping[str, Any]) -> str:
    """Return the number of rows, if the run recorded it, and their fingerprint."""
    count = f"{facts['num_rows']:,} rows, " if "num_rows" in facts else "rows "
    return f"{count}fingerprint {facts['rows']}"


def _equations(recipe: Mapping[str, Any]) -> str:
    """Return the docstring of the recipe's module, or "" if the recipe is not one of this package."""
    listed = RECIPES.get(recipe["name"])
    if listed is None or listed.paper != recipe["paper"]:
        return ""
    return (sys.modules[listed.loss.__module__].__doc__ or listed.doc).strip()


def _table(metrics: Mapping[str, object]) -> list[str]:
    rows = [(plain(name), "-" if value is None else plain(value)) for name, value in metrics.items()]
    return ["| metric | value |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]
