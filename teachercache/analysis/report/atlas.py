"""Write points.parquet, the shown rows as a table for Embedding Atlas."""

from pathlib import Path
from typing import Any

import numpy as np

from teachercache.analysis.report.rows import Shown
from teachercache.analysis.report.thumbnails import Thumbnails, jpeg
from teachercache.core.paths import stream_whole


def write_points(shown: Shown, thumbnails: Thumbnails, path: Path) -> str:
    """Write the table, and return the command that opens it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    xy, near = shown.maps[0]["parts"][0]["xy"], shown.lists[0]
    columns: dict[str, Any] = {
        "key": pa.array(shown.keys),
        "row": pa.array(shown.rows),
        "text": pa.array([" | ".join(texts) for texts in shown.texts]),
        "projection_x": _numbers(xy[:, 0]),
        "projection_y": _numbers(xy[:, 1]),
        "neighbors": pa.array(
            [
                {"ids": at[at >= 0].tolist(), "distances": (1 - cosine[at >= 0]).tolist()}
                for at, cosine in zip(near["at"], near["cosine"], strict=True)
            ]
        ),
    }
    for name, values in shown.columns.items():
        columns[name] = pa.array(values) if isinstance(values, list) else _numbers(values)
    words = f"uvx embedding-atlas {path} --x projection_x --y projection_y --neighbors neighbors --text text"
    if thumbnails.pictures:
        pictures = [thumbnails.get(i) for i in range(len(shown.rows))]
        columns["image"] = pa.array(
            [picture and {"bytes": jpeg(picture), "path": None} for picture in pictures],
            pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
        )
        words += " --image image"
    stream_whole(path, lambda file: pq.write_table(pa.table(columns), file))
    return words


def _numbers(values: np.ndarray) -> Any:
    import pyarrow as pa

    return pa.array(np.asarray(values, np.float32), from_pandas=True)  # nan is null
