"""Write the page report.html: one self-contained file.

Data is embedded as JSON without `<`, and the script sets texts by textContent: a caption cannot become
markup.
"""

import base64
import html
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from teachercache.analysis.report.as_json import as_json
from teachercache.analysis.report.rows import Shown, as_category
from teachercache.analysis.report.thumbnails import ACROSS, Thumbnails
from teachercache.core.errors import UserError

HOME = Path(__file__).parent


def plotly_source() -> str:
    """Return the source of plotly.js to embed; raise UserError if plotly is not installed."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise UserError("the report needs plotly: pip install 'teachercache[analyze]'") from error
    return get_plotlyjs()


def make_page(
    report: dict[str, Any], shown: Shown, thumbnails: Thumbnails, sheets: Sequence[bytes], *, note: str
) -> str:
    """Return the page as text."""
    tags = [
        f'<script type="text/plain" id="sheet-{i}">{base64.b64encode(sheet).decode()}</script>'
        for i, sheet in enumerate(sheets)
    ]
    slots = {
        "title": html.escape(report["title"]),
        "css": (HOME / "page.css").read_text(),
        "report": _embedded(as_json(report)),
        "points": _embedded(json.dumps(_points(shown, thumbnails, note))),
        "sheets": "\n".join(tags),
        "plotly": plotly_source(),
        "js": (HOME / "page.js").read_text() + (HOME / "sections.js").read_text(),
    }
    template = (HOME / "page.html").read_text()
    return re.sub(r"\{\{(\w+)\}\}", lambda slot: slots[slot[1]], template)


def _embedded(text: str) -> str:
    """Return JSON that cannot end the surrounding script element."""
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _packed(values: np.ndarray, dtype: str) -> dict[str, Any]:
    """Return an array for the script of the page: little-endian bytes in base64."""
    content = np.ascontiguousarray(values, np.dtype(dtype).newbyteorder("<")).tobytes()
    return {"dtype": dtype, "base64": base64.b64encode(content).decode()}


def _points(shown: Shown, thumbnails: Thumbnails, note: str) -> dict[str, Any]:
    """Return the data of each row for the page."""
    labels = shown.columns.get("label")
    number = "int16" if len(shown.rows) < 1 << 15 else "int32"
    return {
        "rows": shown.rows.tolist(),
        "keys": shown.keys,
        "texts": shown.texts,
        "note": note,
        "labels": labels if isinstance(labels, list) else [""] * len(shown.keys),
        "thumbs": {
            "edge": thumbnails.edge,
            "across": ACROSS,
            "any": bool(thumbnails.pictures),
            "count": len(thumbnails.pictures),
            "number": _packed(thumbnails.number, number),
        },
        "columns": [_column(name, values) for name, values in shown.columns.items()],
        "maps": [
            {
                "title": each["title"],
                "parts": [
                    {"what": part["what"], "packed": _packed(part["xy"], "float32")} for part in each["parts"]
                ],
            }
            for each in shown.maps
        ],
        "lists": [
            {
                "title": each["title"],
                "k": each["at"].shape[1],
                "at": _packed(each["at"], number),
                "cosine": _packed(np.round(127 * np.clip(each["cosine"], -1, 1)), "int8"),
            }
            for each in shown.lists
        ],
    }


def _column(name: str, values: list[str] | np.ndarray) -> dict[str, Any]:
    if isinstance(values, np.ndarray):
        return {"name": name, "kind": "number", "packed": _packed(values, "float32")}
    names, which, rest = as_category(values)
    return {"name": name, "kind": "category", "values": names, "rest": rest, "packed": _packed(which, "int8")}
