"""Compare what a disturbed and repeated command leaves with what the undisturbed command leaves."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Tree = Mapping[str, bytes]
# Their bytes are results, whatever another run of the command writes
RESULTS = (".safetensors", ".parquet", ".faiss")
# Times and logs of one process: a resumed run has only those of its own steps, and a build that does not know the time
# of a picture compares it by its digest and remembers the time
TIMES = ("speed.json", "build.log", ".times")


def tree_of(root: Path) -> dict[str, bytes]:
    """Return the content of every file below a folder; a folder is an entry that ends in a slash."""
    return {
        str(path.relative_to(root)) + "/" * path.is_dir(): b"" if path.is_dir() else path.read_bytes()
        for path in sorted(root.rglob("*"))
    }


def losses(lines: bytes) -> dict[int, dict[str, float]]:
    """Return the numbers of each step in metrics.jsonl without its times; the last line of a step counts."""
    steps: dict[int, dict[str, float]] = {}
    for line in lines.splitlines():
        record = json.loads(line)
        steps[record["step"]] = {
            key: value for key, value in record.items() if key.startswith("loss") or key in ("lr", "loss")
        }
    return steps


def proved(content: bytes) -> set[str]:
    """Return the names in a digests.json. A kill may leave the digest of an earlier file beside that of the present."""
    return {name for name in json.loads(content)["files"] if not name.endswith(TIMES)}


def json_keys(content: bytes) -> list[str]:
    """Return the names at the top of a JSON object."""
    record: Any = json.loads(content)
    return sorted(record) if isinstance(record, dict) else []


def differences(tree: Tree, expected: Tree, again: Tree) -> list[str]:
    """List the files that are not what an undisturbed command leaves.

    A file that two undisturbed commands write alike must have the same bytes. One that holds times must exist; a
    JSON object must have the same names, and metrics.jsonl the same losses.

    Args:
        tree: What is to be checked.
        expected: What an undisturbed command leaves.
        again: What a second undisturbed command leaves.
    """
    wrong = []
    for name, content in expected.items():
        if name.endswith(TIMES):
            continue
        if name not in tree:
            wrong.append(f"{name} is missing")
            continue
        found = tree[name]
        try:
            if name.endswith("digests.json"):
                same = proved(found) == proved(content)
            elif name.endswith("metrics.jsonl"):
                same = losses(found) == losses(content)
            elif again.get(name) == content or name.endswith(RESULTS):
                same = found == content
            elif name.endswith(".json"):
                same = json_keys(found) == json_keys(content)
            else:
                same = bool(found) or not content
        except ValueError:
            same = False
        if not same:
            wrong.append(f"{name} differs")
    return wrong


def leftovers(tree: Tree, expected: Tree) -> list[str]:
    """List the files that an undisturbed command does not leave."""
    return sorted(set(tree) - set(expected))
