"""Winoground, ARO and SugarCrepe as they are published: pictures, right and wrong texts. Not for scores.

Pictures are read where they lie and nothing is unpacked: no name in a data set reaches out of its folder or archive.
"""

import dataclasses
import functools
import io
import json
import math
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from teachercache.core.errors import UserError
from teachercache.data.columns import open_parquet
from teachercache.data.pictures import decode_image
from teachercache.data.sample import BadSample

if TYPE_CHECKING:
    from PIL import Image

WINOGROUND = ("caption_0", "caption_1", "image_0", "image_1", "collapsed_tag", "num_main_preds")
TEXTS = {
    "caption_0",
    "caption_1",
    "collapsed_tag",
    "true_caption",
    "false_caption",
    "negative_caption",
    "image_path",
    "filename",
    "relation_name",
    "image",
}
ENDINGS = ("", ".png", ".jpg", ".jpeg")  # Winoground leaves the ending away
LARGEST = 256 << 20  # bytes of a picture inside an archive, unpacked
Read = Callable[[], "Image.Image"]


@dataclasses.dataclass(frozen=True)
class Example:
    """Winoground's: caption k belongs to picture k."""

    captions: tuple[str, str]
    pictures: tuple[Read, Read]
    tag: str  # Object, Relation or Both
    predicates: int
    note: str = ""  # its secondary tag


@dataclasses.dataclass(frozen=True)
class Case:
    """A picture with a right and a wrong caption, of a group whose mean counts: a relation, a pair of attributes."""

    picture: Read
    true: str
    false: str
    group: str


# ----------------------------------------------------------------------------------------------------
# Winoground


def read_winoground(data: Path) -> list[Example]:
    """`data/examples.jsonl` with `images.zip` or `images/` beside it, or the hub's newer `data/test-*.parquet`."""
    for folder in (data, data / "data"):
        if (folder / "examples.jsonl").is_file():
            return _from_lines(folder / "examples.jsonl")
        if found := sorted(folder.glob("test-*.parquet")):
            return [example for path in found for example in _from_parquet(path)]
    wanted = "data/examples.jsonl with images.zip beside it, or data/test-*.parquet"
    raise UserError(f"no Winoground in {data}: it has {wanted}")


def _from_lines(path: Path) -> list[Example]:
    if (path.parent / "images.zip").is_file():
        find = _members(path.parent / "images.zip")
    elif (path.parent / "images").is_dir():
        find = functools.partial(_beside, path.parent / "images")
    else:
        raise UserError(f"neither images.zip nor images/ beside {path}: put Winoground's pictures there")
    examples = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            try:
                content = json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}, line {number}: not JSON: {error}") from error
            examples.append(_example(content, [find], f"{path}, line {number}"))
    if not examples:
        raise UserError(f"{path} has no examples")
    return examples


def _example(line: Any, find: Sequence[Callable[[Any], bytes]], place: str) -> Example:
    """One row of either layout; `find` gives the bytes of what `image_0` and `image_1` hold."""
    check_keys(line, WINOGROUND, place)
    if str(line["num_main_preds"]) not in ("1", "2"):
        raise UserError(f"{place}: num_main_preds is {line['num_main_preds']!r}, and not 1 or 2")
    readers = [functools.partial(_decoded, find[k % len(find)], line[f"image_{k}"]) for k in (0, 1)]
    return Example(
        (line["caption_0"], line["caption_1"]),
        (readers[0], readers[1]),
        line["collapsed_tag"],
        int(line["num_main_preds"]),
        line.get("secondary_tag") or "",
    )


def _decoded(find: Callable[[Any], bytes], name: Any) -> "Image.Image":
    return decode_image(find(name))


def _members(path: Path) -> Callable[[str], bytes]:
    """Reads a picture of an archive by its name without folder and ending."""
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError) as error:
        raise UserError(f"{path} is not a readable zip archive: {error}") from error
    members = {Path(member.filename).name: member for member in archive.infolist() if not member.is_dir()}

    def read(name: str) -> bytes:
        found = next((members[f"{name}{ending}"] for ending in ENDINGS if f"{name}{ending}" in members), None)
        if found is None:
            raise BadSample(f"no {name}.png in {path}")
        if found.file_size > LARGEST:
            raise BadSample(f"{found.filename} in {path} unpacks to {found.file_size:,} bytes")
        try:
            return archive.read(found)
        except (zipfile.BadZipFile, RuntimeError, NotImplementedError, OSError, EOFError) as error:
            raise BadSample(f"cannot read {found.filename} in {path}: {error}") from error

    return read


def _from_parquet(path: Path) -> Iterator[Example]:
    """Rows with pictures as Hugging Face's structs of bytes and path; pictures are held as their compressed bytes."""
    import pyarrow as pa

    try:
        rows = open_parquet(path).read().to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a readable Parquet file: {error}") from error
    for number, row in enumerate(rows):
        yield _example(row, [_cell], f"{path}, row {number}")


def _cell(value: Any) -> bytes:
    content = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(content, bytes):
        raise BadSample("the row has no picture")
    return content


# ----------------------------------------------------------------------------------------------------
# ARO and SugarCrepe


def read_relations(path: Path) -> list[Case]:
    """`visual_genome_relation.json`: crops of `images/`, grouped by relation."""
    return [
        _case(path, i, line, line["relation_name"]) for i, line in _listed(path, (*CASE, "relation_name"))
    ]


def read_attributions(path: Path) -> list[Case]:
    """`visual_genome_attribution.json`: crops of `images/`, grouped by the ordered pair of attributes."""
    cases = []
    for i, line in _listed(path, (*CASE, "attributes")):
        if not isinstance(line["attributes"], list) or len(line["attributes"]) != 2:
            raise UserError(f"{path}, item {i}: attributes are a list of two")
        cases.append(_case(path, i, line, "_".join(map(str, line["attributes"]))))
    return cases


CASE = ("image_path", "true_caption", "false_caption", "bbox_x", "bbox_y", "bbox_w", "bbox_h")


def _case(path: Path, number: int, line: dict[str, Any], group: str) -> Case:
    x, y, width, height = box = [line[f"bbox_{key}"] for key in "xywh"]
    if (
        not all(isinstance(value, int | float) and math.isfinite(value) for value in box)
        or min(width, height) <= 0
    ):
        raise UserError(f"{path}, item {number}: bbox_x, _y, _w, _h are {box}, and no box in pixels")
    read = functools.partial(_crop, path.parent / "images", line["image_path"], (x, y, x + width, y + height))
    return Case(read, line["true_caption"], line["false_caption"], group)


def _crop(folder: Path, name: str, box: tuple[float, float, float, float]) -> "Image.Image":
    """The part of a picture that ARO asks about; black where the box leaves the picture, as PIL has it."""
    return decode_image(_beside(folder, name)).crop(box)


def read_captioned(path: Path) -> list[tuple[Read, list[str]]]:
    """`coco_karpathy_test.json` or `flickr30k_test.json`: pictures below its folder, their captions."""
    found: list[tuple[Read, list[str]]] = []
    for i, line in _listed(path, ("image", "caption")):
        captions = [line["caption"]] if isinstance(line["caption"], str) else line["caption"]
        if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
            raise UserError(f"{path}, item {i}: caption is a list of texts")
        found.append((functools.partial(_picture, path.parent, line["image"]), captions))
    return found


def read_sugar_crepe(path: Path, pictures: Path) -> list[Case]:
    """One of its seven files: an object of numbered items, or a list of them; pictures are COCO's val2017."""
    cases = []
    for i, line in _listed(path, ("filename", "caption", "negative_caption")):
        if not isinstance(line["caption"], str):
            raise UserError(f"{path}, item {i}: 'caption' is not a text")
        read = functools.partial(_picture, pictures, line["filename"])
        cases.append(Case(read, line["caption"], line["negative_caption"], path.stem))
    return cases


def _picture(folder: Path, name: str) -> "Image.Image":
    return decode_image(_beside(folder, name))


def _beside(folder: Path, name: str) -> bytes:
    """The bytes of a picture below a folder; BadSample where there is none, or its name leads elsewhere."""
    for ending in ENDINGS:
        path = (folder / f"{name}{ending}").resolve()
        if not path.is_relative_to(folder.resolve()):
            raise BadSample(f"the name {name!r} leads out of {folder}")
        if path.is_file():
            return path.read_bytes()
    raise BadSample(f"there is no {folder / name}")


def _listed(path: Path, keys: Sequence[str]) -> list[tuple[Any, dict[str, Any]]]:
    """The items of a JSON list, or of an object of items, each with its number; all have the keys."""
    try:
        content = json.load(io.BytesIO(path.read_bytes()))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict | list):
        raise UserError(f"{path} is neither a list nor an object of items")
    items = list(content.items()) if isinstance(content, dict) else list(enumerate(content))
    if not items:
        raise UserError(f"{path} has no items")
    for number, item in items:
        check_keys(item, keys, f"{path}, item {number}")
    return items


def check_keys(item: Any, keys: Sequence[str], place: str) -> None:
    """UserError names the first key that an item lacks, or that holds no text where there should be one."""
    if not isinstance(item, dict):
        raise UserError(f"{place}: not an object with {', '.join(keys)}")
    for key in keys:
        if key not in item:
            raise UserError(f"{place}: no '{key}'")
        if key in TEXTS and not isinstance(item[key], str):
            raise UserError(f"{place}: '{key}' is {item[key]!r:.40}, and not a text")
