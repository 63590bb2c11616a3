"""The model card of an exported student: a README.md that says what the run recorded and what was measured.

Names and paths are the user's and are escaped; of a local path the last part alone is shown, since cards are published.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from student.contract import Exported
from student.recipes.registry import RECIPES
from teachercache.core.errors import UserError


def model_card(facts: Mapping[str, Any], results: Sequence[Mapping[str, Any]], exported: Exported) -> str:
    """Return the card of a run: its run.json, the results that `student eval` wrote, and how the folder is loaded."""
    recipe, run = facts["recipe"], facts["run"]
    shown = {
        name: value for name, value in recipe["constants"].items() if name not in ("model", "init") or value
    }
    lines = [
        *_front_matter(exported.library, recipe["name"], exported.pipeline),
        f"# {plain(recipe['constants'].get('model', 'student'))} trained by `{recipe['name']}`",
        "",
        f"- Recipe: {plain(recipe['paper'])}",
        f"- Constants: {_settings(shown)}",
        f"- Teacher: {'; '.join(map(_teacher, facts['teachers'])) or 'none'}",
        f"- Data: {', '.join(plain(place(part)) for part in run['data'].split(','))}; {_rows(facts)}",
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
    """What `student eval` kept in <run>/eval, in the order of the file names."""
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


def plain(text: Any) -> str:
    """Any text as one line of Markdown that shows just that text, in a table too."""
    escaped = re.sub(r"[\\`*|<>\[\]&~]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\\g<0>", str(text))
    return " ".join(escaped.split())


def place(text: str) -> str:
    """Where something lay, without the folders of this machine: an absolute path's last part; URLs and names whole."""
    return Path(text).name if Path(text).is_absolute() else text


def fenced(code: str, language: str = "") -> list[str]:
    """The lines of a code block; its fence is longer than any in the code."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", code)), default=0))
    return [fence + language, *code.strip("\n").splitlines(), fence, ""]


def _front_matter(library: str, recipe: str, pipeline: str) -> list[str]:
    """YAML that the Hugging Face hub reads; JSON strings are YAML strings."""
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


def _settings(values: Mapping[str, Any]) -> str:
    """`name=value` with commas between."""
    return ", ".join(f"{name}={plain(place(str(value)))}" for name, value in values.items()) or "none"


def _teacher(teacher: Mapping[str, Any]) -> str:
    name, weights = plain(place(teacher["name"])), plain(place(teacher["weights"]))
    return f"{name}, weights {weights}, sha256 {teacher['digest'][:12]}"


def _rows(facts: Mapping[str, Any]) -> str:
    """How many rows, where the run recorded it, and their fingerprint."""
    count = f"{facts['num_rows']:,} rows, " if "num_rows" in facts else "rows "
    return f"{count}fingerprint {facts['rows']}"


def _equations(recipe: Mapping[str, Any]) -> str:
    """The recipe's own page where the run's recipe is one of ours."""
    import sys

    known = RECIPES.get(recipe["name"])
    if known is None or known.paper != recipe["paper"]:
        return ""
    return (sys.modules[known.loss.__module__].__doc__ or known.doc).strip()


def _table(metrics: Mapping[str, Any]) -> list[str]:
    rows = [(plain(name), "-" if value is None else plain(value)) for name, value in metrics.items()]
    return ["| metric | value |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]
