"""Summarize a manifest for `tc manifest`."""

import collections
import dataclasses
from typing import Any

from teachercache.data.manifest import Manifest
from teachercache.data.read import Source


def describe(sources: list[Source], manifest: Manifest) -> dict[str, Any]:
    """Return formats, rows, texts per row, splits, labels, the first rows, what was not used and problems, as JSON."""
    table = manifest.table
    texts = [len(row) for row in manifest.column("texts")]
    problems = collections.Counter(name for name in manifest.column("problem") if name)
    whole = [offset < 0 for offset in manifest.column("offset")]
    empty = sum(
        bool(image) and alone and not size and not problem
        for image, alone, size, problem in zip(
            table["image"].to_pylist(),
            whole,
            manifest.column("size"),
            manifest.column("problem"),
            strict=True,
        )
    )
    if empty:
        problems["the picture is missing or empty"] = empty
    return {
        "data": manifest.data,
        "formats": {str(source.path): source.kind for source in sources},
        "root": str(manifest.root),
        "digest": manifest.digest,
        "rows": len(manifest),
        "pictures": sum(map(bool, manifest.column("image"))),
        "texts": [min(texts), max(texts)],
        "tasks": sum(map(bool, manifest.column("task"))),
        "splits": dict(collections.Counter(manifest.column("split"))),
        "labels": dict(collections.Counter(name for name in manifest.column("label") if name).most_common()),
        "first": [dataclasses.asdict(manifest.row(i)) for i in range(min(3, len(manifest)))],
        "unused": manifest.unused.as_json(),
        "unusable": problems.total(),
        "problems": dict(problems.most_common(5)),
    }
