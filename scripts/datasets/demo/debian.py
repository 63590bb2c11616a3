"""Download the three Debian packages of the demo data and read pictures with classes and captions from them.

Nothing is installed and no root access is needed. scripts/datasets/demo/prepare.py removes duplicates across packages.
"""

import hashlib
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from xml.etree import ElementTree

from rich.progress import track

from scripts.datasets.demo.rules import (
    clipart_captions,
    clipart_class,
    clipart_title,
    read_titles,
    stamp_captions,
    stamp_class,
)

PACKAGES = {  # Debian package -> folder of the pictures in it
    "tuxpaint-stamps-default": "usr/share/tuxpaint/stamps",
    "openclipart-png": "usr/share/openclipart/png",
    "openclipart-svg": "usr/share/openclipart/svg",
}
SUFFIXES = (".png", ".svg", ".txt")  # most of the stamps' 161 MB are sounds


@dataclass(frozen=True)
class Pair:
    """A picture with its captions. Pairs with the same `group` belong to the same split."""

    name: str
    source: str
    label: str
    picture: Path
    captions: tuple[str, ...]
    group: int = 0


class SourceError(Exception):
    """A data source is unavailable on this machine; the message contains the reason and a remedy."""


def fetch_packages(downloads: Path, root: Path) -> dict[str, Path]:
    """Download the missing packages, unpack all below root side by side, and return {package: .deb file}."""
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise SourceError(f"{tool} is not installed; this source needs a Debian or Ubuntu system")
    downloads.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(len(PACKAGES)) as pool:
        tasks = {pool.submit(fetch, package, downloads, root): package for package in PACKAGES}
        done = track(as_completed(tasks), total=len(tasks), description="downloading")
        files = {tasks[task]: task.result() for task in done}
    return {package: files[package] for package in PACKAGES}


def fetch(package: str, downloads: Path, root: Path) -> Path:
    """Download a package if it is missing, unpack it below root, and return the .deb file."""
    if not list(downloads.glob(f"{package}_*.deb")):
        download(package, downloads)
    deb = max(downloads.glob(f"{package}_*.deb"))
    unpack(deb, PACKAGES[package], root)
    return deb


def download(package: str, downloads: Path) -> None:
    """Download a .deb file to a temporary folder and rename it, so that a file with the final name is complete."""
    with tempfile.TemporaryDirectory(dir=downloads, prefix="partial-") as temporary:
        process = subprocess.run(
            ["apt-get", "download", package], cwd=temporary, capture_output=True, text=True
        )
        files = list(Path(temporary).glob("*.deb"))
        if process.returncode or not files:
            reason = (re.findall(r"^E: (.*)$", process.stderr, re.MULTILINE) or ["no file was downloaded"])[0]
            raise SourceError(f"apt-get download {package}: {reason}; try `apt-get update` first")
        files[0].rename(downloads / files[0].name)


def unpack(deb: Path, inside: str, root: Path) -> None:
    """Extract the regular picture and text files below `inside` to root. Links and paths with ".." are skipped."""
    damaged = SourceError(f"{deb} is damaged; remove it and run this again")
    command = ["dpkg-deb", "--fsys-tarfile", str(deb)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        try:
            with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
                for member in archive:
                    path = PurePosixPath(member.name)
                    wanted = path.suffix in SUFFIXES and path.is_relative_to(inside)
                    content = archive.extractfile(member) if member.isfile() and wanted else None
                    if content is not None and ".." not in path.parts:
                        target = root / path
                        target.parent.mkdir(parents=True, exist_ok=True)
                        target.write_bytes(content.read())
            process.stdout.read()  # read the padding after the last member, or dpkg-deb fails with a broken pipe
        except tarfile.ReadError as error:
            process.kill()
            raise damaged from error
    if process.returncode:
        raise damaged


def read_packages(root: Path) -> list[Pair]:
    """Read every pair of the unpacked packages in a fixed order."""
    share = root / "usr/share"
    return [*read_stamps(share / "tuxpaint/stamps"), *read_clipart(share / "openclipart")]


def package_version(deb: Path) -> str:
    """Return the version in the name of a .deb file, where apt writes a colon as %3a."""
    return deb.name.split("_")[1].replace("%3a", ":")


def read_stamps(root: Path) -> Iterator[Pair]:
    """Yield the tuxpaint stamps below `root` that have a class and an English text."""
    for picture in sorted(root.rglob("*.png")):
        folder = picture.parent.relative_to(root).as_posix()
        text = picture.with_suffix(".txt")
        label = stamp_class(folder)
        if label and text.is_file():
            captions = stamp_captions(text.read_text(encoding="utf-8", errors="replace"))
            if captions[0]:
                yield Pair(pair_name("stamp", folder, picture), "stamps", label, picture, tuple(captions))


def read_clipart(root: Path) -> Iterator[Pair]:
    """Yield the pictures below root/png whose drawing below root/svg has a specific title."""
    titles = read_titles()
    drawings = {}
    for picture in sorted((root / "png").rglob("*.png")):
        drawing = root / "svg" / picture.relative_to(root / "png").with_suffix(".svg")
        if drawing.is_file() and not picture.is_symlink():
            drawings[picture] = drawing
    with ProcessPoolExecutor() as pool:
        found = zip(drawings, pool.map(read_drawing, drawings.values(), chunksize=256), strict=True)
        records = {picture: metadata for picture, metadata in found if metadata is not None}
    counts = Counter(title.lower() for title, _, _ in records.values())
    for picture, (raw_title, description, keywords) in records.items():
        folder = picture.parent.relative_to(root / "png").as_posix()
        title = clipart_title(raw_title, picture.stem, counts)
        label = clipart_class(folder, [*keywords, *title.split()])
        title, fixed_label = titles.get(picture.name) or titles.get(title.lower(), (title, ""))
        label = fixed_label or label
        if title and label:
            captions = clipart_captions(title, description, keywords)
            yield Pair(pair_name("clipart", folder, picture), "clipart", label, picture, tuple(captions))


def read_drawing(drawing: Path) -> tuple[str, str, list[str]] | None:
    """Return the metadata of a drawing, or None if it links to an external picture."""
    svg = ElementTree.fromstring(drawing.read_bytes())
    return None if links_elsewhere(svg) else read_metadata(svg)


def links_elsewhere(root: ElementTree.Element) -> bool:
    """Return whether a drawing links to an external picture: its PNG then shows "Linked Image Not Found"."""
    images = (node for node in root.iter() if node.tag.endswith("}image"))
    links = (value for node in images for name, value in node.items() if name.endswith("}href"))
    return any(not link.startswith(("data:", "#")) for link in links)


def read_metadata(root: ElementTree.Element) -> tuple[str, str, list[str]]:
    """Return (title, description, keywords) of the RDF block of a drawing; missing entries are empty."""
    works = (node for node in root.iter() if node.tag.endswith("}Work"))
    # Direct children only: creator and publisher also contain titles
    fields = {node.tag.rpartition("}")[2]: node for node in next(works, [])}
    title, description = (
        (fields[name].text or "").strip() if name in fields else "" for name in ("title", "description")
    )
    items = (node.text or "" for node in fields.get("subject", []) for node in node.iter())
    return title, description, [word.strip() for word in items if word.strip()]


def pair_name(source: str, folder: str, picture: Path) -> str:
    """Return a file name that is unique in the data set and needs no quotes in a shell."""
    slug = re.sub(r"[^a-z0-9]+", "_", f"{folder}_{picture.stem}".lower()).strip("_")
    digest = hashlib.sha256(f"{folder}/{picture.name}".encode()).hexdigest()[:4]
    return f"{source}_{slug[:60]}_{digest}"
