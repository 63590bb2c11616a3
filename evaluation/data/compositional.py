"""Read Winoground, ARO and SugarCrepe as they are published: images with right and wrong texts.

Images are read in place and nothing is unpacked. A name in a data set never leads out of its folder or archive.
"""

import dataclasses
import functools
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluation.data.files import file_json, file_lines
from teachercache.core.errors import UserError, is_machine
from teachercache.data.columns import open_parquet
from teachercache.data.foreign import Foreign, clean, parse_json
from teachercache.data.pictures import decode_image, read_regular
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
ENDINGS = ("", ".png", ".jpg", ".jpeg")  # Winoground's names have no ending
LARGEST = 256 << 20  # bytes of an unpacked image inside an archive
LARGEST_BOX = 1 << 20  # pixels from the corner; NaN and infinity are not below it
Read = Callable[[], "Image.Image"]


@dataclasses.dataclass(frozen=True)
class Example:
    """An example of Winoground: caption k belongs to image k.

    Attributes:
        captions: The captions.
        pictures: Functions that read the images.
        tag: The collapsed tag: Object, Relation or Both.
        predicates: Number of main predicates, 1 or 2.
        note: The secondary tag, or "".
    """

    captions: tuple[str, str]
    pictures: tuple[Read, Read]
    tag: str
    predicates: int
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Case:
    """An image with a right and a wrong caption, and its group for macro means: a relation, a pair of attributes."""

    picture: Read
    true: str
    false: str
    group: str


# ----------------------------------------------------------------------------------------------------
# Winoground


def read_winoground(data: Path) -> list[Example]:
    """Read `data/examples.jsonl` with `images.zip` or `images/` beside it, or the hub's newer `data/test-*.parquet`.

    Args:
        data: The folder that holds `data`, or that folder itself.

    Raises:
        UserError: If there is no Winoground, or it is malformed.
    """
    for folder in (data, data / "data"):
        if (folder / "examples.jsonl").is_file():
            return _from_lines(folder / "examples.jsonl")
        if paths := sorted(folder.glob("test-*.parquet")):
            return [example for path in paths for example in _from_parquet(path)]
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
    for number, line in enumerate(file_lines(path), 1):
        if line.strip():
            try:
                content = parse_json(line.encode(), what="it")
            except Foreign as error:
                raise UserError(f"{path}, line {number}: not JSON: {error}") from error
            examples.append(_example(content, [find], f"{path}, line {number}"))
    if not examples:
        raise UserError(f"{path} has no examples")
    return examples


def _example(line: Any, find: Sequence[Callable[[Any], bytes]], place: str) -> Example:
    """One row of either layout; `find` returns the bytes of the values of `image_0` and `image_1`."""
    check_keys(line, WINOGROUND, place)
    if str(line["num_main_preds"]) not in ("1", "2"):
        raise UserError(f"{place}: num_main_preds is {line['num_main_preds']!r} instead of 1 or 2")
    readers = [functools.partial(_decoded, find[k % len(find)], line[f"image_{k}"]) for k in (0, 1)]
    return Example(
        (clean(line["caption_0"]), clean(line["caption_1"])),
        (readers[0], readers[1]),
        clean(line["collapsed_tag"]),
        int(line["num_main_preds"]),
        clean(note) if isinstance(note := line.get("secondary_tag"), str) else "",
    )


def _decoded(find: Callable[[Any], bytes], name: Any) -> "Image.Image":
    return decode_image(find(name))


def _members(path: Path) -> Callable[[str], bytes]:
    """Return a function that reads an image of an archive by its name without folder and ending."""
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError) as error:
        raise UserError(f"{path} is not a readable zip archive: {error}") from error
    members = {Path(member.filename).name: member for member in archive.infolist() if not member.is_dir()}

    def read(name: str) -> bytes:
        member = next(
            (members[f"{name}{ending}"] for ending in ENDINGS if f"{name}{ending}" in members), None
        )
        if member is None:
            raise BadSample(f"no {name}.png in {path}")
        if member.file_size > LARGEST:
            raise BadSample(f"{member.filename} in {path} unpacks to {member.file_size:,} bytes")
        try:
            return archive.read(member)
        except (zipfile.BadZipFile, RuntimeError, NotImplementedError, OSError, EOFError) as error:
            if is_machine(error):
                raise
            raise BadSample(f"cannot read {member.filename} in {path}: {error}") from error

    return read


def _from_parquet(path: Path) -> Iterator[Example]:
    """Rows with images as Hugging Face's structs of bytes and path; the compressed bytes stay in memory."""
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
    """Read `visual_genome_relation.json`: crops of `images/`, grouped by relation."""
    return [
        _case(path, i, line, clean(line["relation_name"]))
        for i, line in _listed(path, (*CASE, "relation_name"))
    ]


def read_attributions(path: Path) -> list[Case]:
    """Read `visual_genome_attribution.json`: crops of `images/`, grouped by the ordered pair of attributes."""
    cases = []
    for i, line in _listed(path, (*CASE, "attributes")):
        names = line["attributes"]
        if not isinstance(names, list) or len(names) != 2 or not all(isinstance(name, str) for name in names):
            raise UserError(f"{path}, item {i}: attributes are a list of two names")
        cases.append(_case(path, i, line, "_".join(map(clean, line["attributes"]))))
    return cases


CASE = ("image_path", "true_caption", "false_caption", "bbox_x", "bbox_y", "bbox_w", "bbox_h")


def _case(path: Path, number: int, line: dict[str, Any], group: str) -> Case:
    x, y, width, height = box = [line[f"bbox_{key}"] for key in "xywh"]
    if (
        not all(type(value) in (int, float) and abs(value) < LARGEST_BOX for value in box)
        or min(width, height) <= 0
    ):
        raise UserError(f"{path}, item {number}: bbox_x, _y, _w, _h are {box} instead of a box in pixels")
    read = functools.partial(_crop, path.parent / "images", line["image_path"], (x, y, x + width, y + height))
    return Case(read, clean(line["true_caption"]), clean(line["false_caption"]), group)


def _crop(folder: Path, name: str, box: tuple[float, float, float, float]) -> "Image.Image":
    """The crop of an image, black outside the image, as PIL makes it."""
    return decode_image(_beside(folder, name)).crop(box)


def read_captioned(path: Path) -> list[tuple[Read, list[str]]]:
    """Read `coco_karpathy_test.json` or `flickr30k_test.json`: images below its folder, each with its captions."""
    images: list[tuple[Read, list[str]]] = []
    for i, line in _listed(path, ("image", "caption")):
        captions = [line["caption"]] if isinstance(line["caption"], str) else line["caption"]
        if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
            raise UserError(f"{path}, item {i}: caption is a list of texts")
        images.append((functools.partial(_picture, path.parent, line["image"]), list(map(clean, captions))))
    return images


def read_sugar_crepe(path: Path, pictures: Path) -> list[Case]:
    """Read one of SugarCrepe's seven files.

    Args:
        path: An object of numbered items, or a list of them.
        pictures: COCO's val2017.

    Raises:
        UserError: If the file is malformed.
    """
    cases = []
    for i, line in _listed(path, ("filename", "caption", "negative_caption")):
        if not isinstance(line["caption"], str):
            raise UserError(f"{path}, item {i}: 'caption' is not a text")
        read = functools.partial(_picture, pictures, line["filename"])
        cases.append(Case(read, clean(line["caption"]), clean(line["negative_caption"]), path.stem))
    return cases


def _picture(folder: Path, name: str) -> "Image.Image":
    return decode_image(_beside(folder, name))


def _beside(folder: Path, name: str) -> bytes:
    """The bytes of an image below a folder; BadSample if there is none, or its name leads out of the folder."""
    try:
        for ending in ENDINGS:
            path = (folder / f"{name}{ending}").resolve()
            if not path.is_relative_to(folder.resolve()):
                raise BadSample(f"the name {name!r} leads out of {folder}")
            if path.is_file():
                return read_regular(path)
    except (ValueError, OSError) as error:  # a NUL, a half emoji, or a name too long
        if is_machine(error):
            raise
        raise BadSample(f"cannot open {name[:60]!r} in {folder}: {error}") from error
    raise BadSample(f"there is no {folder / name}")


def _listed(path: Path, keys: Sequence[str]) -> list[tuple[Any, dict[str, Any]]]:
    """The items of a JSON list, or of an object of items, each with its number, checked to have the keys."""
    content = file_json(path)
    if not isinstance(content, dict | list):
        raise UserError(f"{path} is neither a list nor an object of items")
    items = list(content.items()) if isinstance(content, dict) else list(enumerate(content))
    if not items:
        raise UserError(f"{path} has no items")
    for number, item in items:
        check_keys(item, keys, f"{path}, item {number}")
    return items


def check_keys(item: object, keys: Sequence[str], place: str) -> None:
    """Check that an item is an object with some keys.

    Args:
        item: The item.
        keys: Keys that it must have; those in TEXTS must hold texts.
        place: File and line, for errors.

    Raises:
        UserError: If it is not; the error names the first wrong key.
    """
    if not isinstance(item, dict):
        raise UserError(f"{place}: not an object with {', '.join(keys)}")
    for key in keys:
        if key not in item:
            raise UserError(f"{place}: no '{key}'")
        if key in TEXTS and not isinstance(item[key], str):
            raise UserError(f"{place}: '{key}' is {item[key]!r:.40} instead of a text")
