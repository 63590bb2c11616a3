"""`tc analyze`: write a report of one cache, or of two, into a folder: page, numbers, figures and a table.

report.json holds every number and is written first.
"""

import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from teachercache.analysis import clusters
from teachercache.analysis.maps import KINDS
from teachercache.analysis.report import maps, slices, thumbnails
from teachercache.analysis.report import one_cache as describe
from teachercache.analysis.report import rows as shown
from teachercache.analysis.report import two_caches as compare
from teachercache.analysis.report.as_json import as_json
from teachercache.analysis.report.atlas import write_points
from teachercache.analysis.report.figures import draw_figures
from teachercache.analysis.report.opened import MAPPED, Subject, open_subject
from teachercache.analysis.report.page import make_page, plotly_source
from teachercache.analysis.report.rows import Shown
from teachercache.cache import store
from teachercache.core.errors import UserError, closest
from teachercache.core.leftovers import is_leftover_name, sweep
from teachercache.core.paths import is_url, write_whole
from teachercache.core.progress import status


def default_out(cache: Path | str, against: Path | str | None = None) -> Path:
    """Return <name>.report beside the cache, or in the current folder for a cache at a URL."""
    name = Path(str(cache)).name.removesuffix(".zarr")
    more = f"-{Path(str(against)).name.removesuffix('.zarr')}" if against else ""
    return (Path() if is_url(cache) else Path(cache).parent) / f"{name}{more}.report"


def analyze(
    cache: Path, *, against: Path | None = None, out: Path, kind: str = "pca", points: int = MAPPED
) -> tuple[dict[str, Any], list[str]]:
    """Write the report of a cache; return its numbers, and a line about each file."""
    if kind not in KINDS:
        raise UserError(f"--map {kind}: {closest(kind, KINDS)}choose from {', '.join(KINDS)}")
    plotly_source()  # raises before anything is computed if it is missing
    if out.exists() and not _may_hold(out):
        raise UserError(f"{out} exists and is not a report: pass another --out")
    first = open_subject(cache)
    second = None if against is None else open_subject(against)
    joined = None if second is None else compare.join(first, second)
    report, per_row, moments = _one(first)
    overlap = np.full(len(first.main), np.nan)
    if second is not None and joined is not None:
        with status("two caches"):
            report["against"], overlap = compare.against(first, second, joined)
        report["against"]["cache"] = describe.head(second)
    columns = {**slices.slice_columns(per_row), **({} if second is None else {"neighbors kept": overlap})}
    report["slices"] = slices.slices(first, columns)
    with status("map"):
        rows = shown.rows_to_show(first, report, points)
        page = _shown(first, second, rows, report, per_row, columns, moments, kind)
    small = thumbnails.make_thumbnails(first.manifest, rows)
    if small.missing:
        report["left_out"]["thumbnails"] = small.missing
    report = shown.name_rows(report, dict(zip(rows.tolist(), page.keys, strict=True)))
    return report, _write(report, page, small, first, kind, out)


def _may_hold(out: Path) -> bool:
    """Return whether a place is a report, or a folder that is empty but for what a killed command left."""
    if not out.is_dir():
        return False
    return (out / "report.json").exists() or all(is_leftover_name(path.name) for path in out.iterdir())


def _one(subject: Subject) -> tuple[dict[str, Any], describe.PerRow, dict[str, Any]]:
    """Compute all sections of one cache; also return the numbers of each row and the moments."""
    per_row = describe.empty_per_row(len(subject.main))
    head = describe.head(subject)
    report: dict[str, Any] = {
        "format": 1,
        "title": f"{head['teacher']} over {head['data']}",
        "cache": head,
        "made": datetime.date.today().isoformat(),
        "left_out": dict(subject.left_out),
        "quarantine": describe.quarantine(subject),
    }
    with status("the space"):
        report["space"], moments = describe.space(subject)
    centers = None
    try:
        with status("clusters"):
            centers = clusters.fit_centers(subject.main)
            report["clusters"] = describe.groups_of_rows(subject, per_row, centers)
    except UserError as error:
        report["left_out"]["clusters"] = str(error)
    sections: dict[str, Callable[[], Any]] = {"duplicates": lambda: describe.duplicates(subject)}
    if subject.both:
        sections |= {
            "pairs": lambda: describe.pairs(subject, per_row),
            "retrieval": lambda: describe.retrieval(subject, per_row),
            "matrix": lambda: describe.matrix(subject, per_row),
        }
    with status("neighbors"):
        report["outliers"], report["hubness"] = describe.crowd(subject, per_row, centers)
    for name, make in sections.items():
        with status(name):
            report[name] = make()
    return report, per_row, moments


def _shown(
    first: Subject,
    second: Subject | None,
    rows: np.ndarray,
    report: dict[str, Any],
    per_row: describe.PerRow,
    columns: dict[str, np.ndarray],
    moments: dict[str, Any],
    kind: str,
) -> Shown:
    """Collect the data of the rows on the page."""
    placed = maps.make_maps(first, rows, moments, kind=kind)
    drawn: list[dict[str, Any]] = [
        {"title": name, "parts": [{"what": name.removesuffix("s"), "xy": placed[name]}]}
        for name in ("pictures", "texts")
        if name in placed
    ]
    if "both" in placed:
        drawn.append(
            {
                "title": "pictures and texts",
                "parts": [
                    {"what": "picture", "xy": placed["both"]},
                    {"what": "text", "xy": placed["both_texts"]},
                ],
            }
        )
    lists = shown.neighbor_lists(first, rows)
    if second is not None:
        second_rows = store.join(second.cache, first.manifest.table["key"].take(rows))
        alike = (first.pictures is None) == (second.pictures is None)
        if alike:
            xy = maps.second_map(drawn[0]["parts"][0]["xy"], second, second_rows, kind=kind)
            drawn.append(
                {
                    "title": f"{drawn[0]['title']}, second cache",
                    "parts": [{"what": drawn[0]["parts"][0]["what"], "xy": xy}],
                }
            )
            lists = shown.neighbor_lists(first, rows, second.main, second_rows)
    colors: dict[str, list[str] | np.ndarray] = {}
    for name in ("label", "split"):
        values = shown.names_of(first, rows, name)
        if len(set(values)) > 1:
            colors[name] = values
    if "clusters" in report:
        words = {
            cluster["number"]: ", ".join(cluster["keywords"]) or str(cluster["number"])
            for cluster in report["clusters"]
        }
        number = shown.at_rows(first, per_row.cluster.astype(float), rows)
        colors["group"] = [words.get(int(i), "(none)") if i == i else "(none)" for i in number]
    colors |= {name: shown.at_rows(first, values, rows) for name, values in columns.items()}
    colors = colors or {"all": ["all"] * len(rows)}
    return Shown(rows, shown.names_of(first, rows, "key"), shown.texts_of(first, rows), colors, drawn, lists)


def _write(
    report: dict[str, Any], page: Shown, small: thumbnails.Thumbnails, first: Subject, kind: str, out: Path
) -> list[str]:
    """Write all files of the folder, report.json first."""
    out.mkdir(parents=True, exist_ok=True)
    sweep(out)
    write_whole(out / "report.json", as_json(report) + "\n")
    how = "PCA of all rows" if kind == "pca" else "UMAP of the rows that are shown"
    note = f"{how}; {len(page.rows):,} of {len(first.main):,} rows. Neighbors are among these."
    with status("page"):
        write_whole(out / "report.html", make_page(report, page, small, thumbnails.sheets(small), note=note))
    figures = draw_figures(report, page, out)
    command = write_points(page, small, out / "points.parquet")
    size = (out / "report.html").stat().st_size
    return [
        f"{out / 'report.html'}  {size / 1e6:.1f} MB, {len(page.rows):,} points: open it in a browser",
        f"{out / 'report.json'}  every number",
        f"{', '.join(path.name for path in figures)}  figures",
        f"{out / 'points.parquet'}  for Embedding Atlas: {command}",
        *(f"left out: {name}: {reason}" for name, reason in report["left_out"].items()),
    ]
