"""Draw the main figures as PNG files for papers and slides; the page draws its own."""

import io
from pathlib import Path
from typing import Any

import numpy as np

from teachercache.analysis.report.rows import Shown, as_category
from teachercache.core.paths import write_whole

PALETTE = (
    "#4c78a8",
    "#f58518",
    "#3f9a57",
    "#e45756",
    "#8e6bbf",
    "#9d6b4f",
    "#e377c2",
    "#17a2b8",
    "#b5a21c",
    "#6f7fe0",
    "#a83a6b",
    "#5aae9c",
)


def draw_figures(report: dict[str, Any], shown: Shown, folder: Path) -> list[Path]:
    """Draw every figure that the report has numbers for, and return the files."""
    from matplotlib.figure import Figure

    files = []
    for name, (draw, needed) in FIGURES.items():
        if needed and needed not in report:
            continue
        figure = Figure(figsize=(7, 5), layout="constrained")
        draw(figure.subplots(), report, shown)
        content = io.BytesIO()
        figure.savefig(content, format="png", dpi=130)
        write_whole(folder / name, content.getvalue())
        files.append(folder / name)
    return files


def _map(axis: Any, report: dict[str, Any], shown: Shown) -> None:
    """Draw the first map, colored by its first column of names."""
    xy = shown.maps[0]["parts"][0]["xy"]
    column = next((name for name, values in shown.columns.items() if isinstance(values, list)), "")
    names, which, rest = (
        as_category(list(shown.columns[column])) if column else ([""], np.zeros(len(xy), int), False)
    )
    for number, name in enumerate(names):
        mine = which == number
        color = "0.7" if rest and number == len(names) - 1 else PALETTE[number % len(PALETTE)]
        axis.scatter(
            *xy[mine].T,
            s=40_000 / (2000 + len(xy)),
            color=color,
            alpha=0.7,
            linewidths=0,
            label=name[:24].replace("$", r"\$"),
            zorder=1 if color == "0.7" else 2,
        )
    if len(names) > 1:
        axis.legend(frameon=False, fontsize=7, markerscale=1.5, loc="center left", bbox_to_anchor=(1, 0.5))
    axis.set(title=shown.maps[0]["title"].replace("$", r"\$"), xticks=[], yticks=[], aspect="equal")


def _similarity(axis: Any, report: dict[str, Any], shown: Shown) -> None:
    """Draw the cosines of images to their own texts and to those of others."""
    histogram = report["pairs"]["histogram"]
    for name, label in (("own", "own text"), ("others", "another row's text")):
        axis.stairs(histogram[name], histogram["edges"], fill=True, alpha=0.6, label=label)
    axis.legend(frameon=False)
    axis.set(xlabel="cosine of picture and text", ylabel="pairs")


def _matrix(axis: Any, report: dict[str, Any], shown: Shown) -> None:
    """Draw the similarity matrix of some images and texts."""
    drawn = axis.imshow(report["matrix"]["values"], cmap="viridis")
    axis.figure.colorbar(drawn, label="cosine")
    axis.set(xlabel="texts", ylabel="pictures", xticks=[], yticks=[])


def _spectrum(axis: Any, report: dict[str, Any], shown: Shown) -> None:
    """Draw the share of the variance along each principal axis."""
    for name in ("pictures", "texts"):
        if name in report["space"]:
            values = report["space"][name]
            axis.semilogy(
                np.maximum(values["spectrum"], 1e-9),
                label=f"{name}, effective rank {values['effective_rank']:.1f}",
            )
    axis.legend(frameon=False)
    axis.grid(alpha=0.2)
    axis.set(xlabel="principal axis", ylabel="share of the variance")


def _overlap(axis: Any, report: dict[str, Any], shown: Shown) -> None:
    """Draw the share of the k nearest neighbors that both caches agree on."""
    values = report["against"].get("neighbourhoods")
    if values is None:
        axis.set_axis_off()
        return
    names = [f"@{k}" for k in values["overlap"]]
    places = np.arange(len(names))
    axis.bar(places - 0.2, values["overlap"].values(), 0.4, label="both caches")
    axis.bar(places + 0.2, values["by_chance"].values(), 0.4, label="by chance")
    axis.legend(frameon=False)
    axis.set(xticks=places, xticklabels=names, ylim=(0, 1), ylabel="nearest in common")


FIGURES: dict[str, tuple[Any, str]] = {  # file -> the function that draws it, and the section that it needs
    "map.png": (_map, ""),
    "similarity.png": (_similarity, "pairs"),
    "matrix.png": (_matrix, "matrix"),
    "spectrum.png": (_spectrum, "space"),
    "overlap.png": (_overlap, "against"),
}
