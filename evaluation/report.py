"""Results as clip-benchmark writes them, and as a table to read."""

from typing import Any

from evaluation.encoder import Encoder
from evaluation.tasks import find
from teachercache.readers import read_manifest


def run_task(task: str, encoder: Encoder, data: str) -> dict[str, Any]:
    """One result in clip-benchmark's JSON shape."""
    name, evaluate = find(task)
    manifest = read_manifest(data)
    return {
        "dataset": manifest.data.rstrip("/").rsplit("/", 1)[-1],
        "model": encoder.name,
        "pretrained": encoder.pretrained,
        "task": name,
        "language": "en",
        "metrics": evaluate(encoder, manifest),
    }


def table(results: list[dict[str, Any]]) -> str:
    """Metrics as rows, one column per result; a metric that was not computed shows as -."""
    names = list(dict.fromkeys(name for result in results for name in result["metrics"]))
    header = ["metric", *(result["model"] for result in results)]
    lines = [header, *([name, *(_cell(result["metrics"].get(name)) for result in results)] for name in names)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else str(value)
