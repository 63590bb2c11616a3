"""Gets the three Debian packages of the demo data and reads pictures with class and captions from them.

Installs nothing, needs no rights, and removes no duplicates: scripts/datasets/demo/prepare.py does, which sees all of them.
"""

import hashlib
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator
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

PACKAGES = {  # Debian package -> the part of it that is read
    "tuxpaint-stamps-default": "usr/share/tuxpaint/stamps",
    "openclipart-png": "usr/share/openclipart/png",
    "openclipart-svg": "usr/share/openclipart/svg",
}
SUFFIXES = (".png", ".svg", ".txt")  # most of the stamps' 161 MB are sounds


@dataclass(frozen=True)
class Pair:
    """One picture with its captions; pairs of one `group` must be in one split."""

    name: str
    source: str
    label: str
    picture: Path
    captions: tuple[str, ...]
    group: int = 0


class SourceError(Exception):
    """A source cannot be had on this machine; the text says why and what to do."""


def fetch_packages(downloads: Path) -> dict[str, Path]:
    """Downloads the packages that are not there yet; package -> .deb file."""
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise SourceError(f"{tool} is not installed; this source needs a Debian or Ubuntu system")
    downloads.mkdir(parents=True, exist_ok=True)
    found = {}
    for package in PACKAGES:
        if not list(downloads.glob(f"{package}_*.deb")):
            print(f"downloading {package}", flush=True)
            download(package, downloads)
        found[package] = max(downloads.glob(f"{package}_*.deb"))
    return found


def download(package: str, downloads: Path) -> None:
    """Fetches one .deb beside its final place, so that a file under its own name is complete."""
    with tempfile.TemporaryDirectory(dir=downloads, prefix="partial-") as aside:
        done = subprocess.run(["apt-get", "download", package], cwd=aside, capture_output=True, text=True)
        files = list(Path(aside).glob("*.deb"))
        if done.returncode or not files:
            reason = (re.findall(r"^E: (.*)$", done.stderr, re.MULTILINE) or ["no file came"])[0]
            raise SourceError(f"apt-get download {package}: {reason}; try `apt-get update` first")
        files[0].rename(downloads / files[0].name)


def unpack(deb: Path, inside: str, root: Path) -> None:
    """Writes the plain pictures and texts below `inside` to root; links, and paths that lead out, are not."""
    damaged = SourceError(f"{deb} is damaged; remove it and run this again")
    command = ["dpkg-deb", "--fsys-tarfile", str(deb)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        try:
            with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
                for member in archive:
                    path = PurePosixPath(member.name)
                    wanted = path.suffix in SUFFIXES and path.is_relative_to(inside)
                    if member.isfile() and wanted and ".." not in path.parts:
                        target = root / path
                        target.parent.mkdir(parents=True, exist_ok=True)
                        target.write_bytes(archive.extractfile(member).read())
            process.stdout.read()  # the padding behind the last member, or dpkg-deb ends by a broken pipe
        except tarfile.ReadError as error:
            process.kill()
            raise damaged from error
    if process.returncode:
        raise damaged


def read_packages(debs: dict[str, Path], root: Path) -> list[Pair]:
    """Unpacks the packages below root, which the caller removes, and reads every pair in a fixed order."""
    for package, deb in track(list(debs.items()), description="unpacking"):
        unpack(deb, PACKAGES[package], root)
    share = root / "usr/share"
    return [*read_stamps(share / "tuxpaint/stamps"), *read_clipart(share / "openclipart")]


def package_version(deb: Path) -> str:
    """The version in a .deb file's name, where apt writes a colon as %3a."""
    return deb.name.split("_")[1].replace("%3a", ":")


def read_stamps(root: Path) -> Iterator[Pair]:
    """The tuxpaint stamps below `root` whose folder is wanted and which have an English text."""
    for picture in sorted(root.rglob("*.png")):
        folder = picture.parent.relative_to(root).as_posix()
        text = picture.with_suffix(".txt")
        label = stamp_class(folder)
        if label and text.is_file():
            captions = stamp_captions(text.read_text(encoding="utf-8", errors="replace"))
            if captions[0]:
                yield Pair(pair_name("stamp", folder, picture), "stamps", label, picture, tuple(captions))


def read_clipart(root: Path) -> Iterator[Pair]:
    """The pictures below root/png that have words of their own in the same drawing below root/svg."""
    titles = read_titles()
    records = {}
    for picture in sorted((root / "png").rglob("*.png")):
        inside = picture.relative_to(root / "png")
        drawing = root / "svg" / inside.with_suffix(".svg")
        if drawing.is_file() and not picture.is_symlink():
            tree = ElementTree.parse(drawing)
            if not links_elsewhere(tree):
                records[picture] = read_metadata(tree)
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


def links_elsewhere(tree: ElementTree.ElementTree) -> bool:
    """Whether a drawing shows a picture outside its file: its PNG then reads "Linked Image Not Found"."""
    images = (node for node in tree.iter() if node.tag.endswith("}image"))
    links = (value for node in images for name, value in node.items() if name.endswith("}href"))
    return any(not link.startswith(("data:", "#")) for link in links)


def read_metadata(tree: ElementTree.ElementTree) -> tuple[str, str, list[str]]:
    """(title, description, keywords) of a drawing's RDF block, each empty where it has none."""
    works = (node for node in tree.iter() if node.tag.endswith("}Work"))
    # Direct children only: the creator and the publisher have titles of their own, further down.
    fields = {node.tag.rpartition("}")[2]: node for node in next(works, [])}
    title, description = (
        (fields[name].text or "").strip() if name in fields else "" for name in ("title", "description")
    )
    items = (node.text or "" for node in fields.get("subject", []) for node in node.iter())
    return title, description, [word.strip() for word in items if word.strip()]


def pair_name(source: str, folder: str, picture: Path) -> str:
    """A file name that is unique in the whole data set and plain in every shell."""
    slug = re.sub(r"[^a-z0-9]+", "_", f"{folder}_{picture.stem}".lower()).strip("_")
    digest = hashlib.sha256(f"{folder}/{picture.name}".encode()).hexdigest()[:4]
    return f"{source}_{slug[:60]}_{digest}"
