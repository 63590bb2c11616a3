"""Made-up Winoground, ARO and SugarCrepe in the published layouts, of noise: the true names of files and keys."""

import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

WORDS = [
    "dog",
    "cat",
    "tree",
    "red",
    "old",
    "small",
    "runs",
    "sits",
    "under",
    "over",
    "beside",
    "and",
    "the",
    "a",
]
TAGS = (
    ("Object", "", 1),
    ("Relation", "Series", 2),
    ("Both", "", 1),
    ("Relation", "", 1),
    ("Object", "Symbolic", 2),
)


def noise(random: np.random.Generator, size: tuple[int, int] = (13, 10)) -> Image.Image:
    return Image.fromarray(random.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))


def as_png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def sentence(random: np.random.Generator, num: int = 6) -> str:
    return " ".join(random.choice(WORDS, num)).capitalize() + "."


def winoground_rows(num: int = 24) -> list[dict]:
    """Rows with pictures as PNG bytes in `image_0` and `image_1`."""
    random = np.random.default_rng(1)
    rows = []
    for i in range(num):
        tag, note, predicates = TAGS[i % len(TAGS)]
        caption = sentence(random)
        other = " ".join(reversed(caption.rstrip(".").lower().split())).capitalize() + "."
        row = {
            "id": i,
            "caption_0": caption,
            "caption_1": other,
            "tag": "Noun",
            "secondary_tag": note,
            "num_main_preds": predicates,
            "collapsed_tag": tag,
        }
        rows.append(row | {f"image_{k}": as_png(noise(random)) for k in (0, 1)})
    return rows


def write_winoground(folder: Path, layout: str, num: int = 24) -> Path:
    """`zip` and `folder` are the old layout, `parquet` the hub's."""
    rows, data = winoground_rows(num), folder / "data"
    data.mkdir(parents=True)
    if layout == "parquet":
        columns = {name: [row[name] for row in rows] for name in rows[0] if not name.startswith("image")}
        table = pa.table(columns)
        for name in ("id", "num_main_preds"):
            table = table.set_column(table.column_names.index(name), name, table[name].cast(pa.int32()))
        for k in (0, 1):
            cells = [{"bytes": row[f"image_{k}"], "path": f"ex_{row['id']}_img_{k}.png"} for row in rows]
            table = table.append_column(f"image_{k}", pa.array(cells))
        pq.write_table(table.slice(0, num // 2), data / "test-00000-of-00002.parquet")
        pq.write_table(table.slice(num // 2), data / "test-00001-of-00002.parquet")
        return folder
    pictures = {f"ex_{row['id']}_img_{k}": row[f"image_{k}"] for row in rows for k in (0, 1)}
    lines = [row | {f"image_{k}": f"ex_{row['id']}_img_{k}" for k in (0, 1)} for row in rows]
    (data / "examples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if layout == "zip":
        with zipfile.ZipFile(data / "images.zip", "w") as archive:
            archive.writestr("images/", "")
            for name, content in pictures.items():
                archive.writestr(f"images/{name}.png", content)
    else:
        (data / "images").mkdir()
        for name, content in pictures.items():
            (data / "images" / f"{name}.png").write_bytes(content)
    return folder


def write_aro(folder: Path, num: int = 40) -> Path:
    """All four sets; two relations of three come often, two ordered pairs of attributes of three."""
    random = np.random.default_rng(2)
    (folder / "images").mkdir(parents=True)
    groups = {
        "relation": [["on"], ["near"], ["on"], ["under"]],
        "attribution": [["red", "old"], ["old", "red"], ["red", "old"], ["small", "red"]],
    }
    for name, of in groups.items():
        lines = []
        for i in range(num):
            path = f"{name}{i}.jpg"
            noise(random, (20, 16)).save(folder / "images" / path)
            x, y = (int(value) for value in random.integers(0, 8, 2))
            line = {
                "image_id": i,
                "image_path": path,
                "bbox_x": x,
                "bbox_y": y,
                "bbox_w": 9,
                "bbox_h": 7,
                "true_caption": sentence(random),
                "false_caption": sentence(random),
            }
            group = of[i % 4]
            lines.append(
                line | ({"relation_name": group[0]} if name == "relation" else {"attributes": group})
            )
        (folder / f"visual_genome_{name}.json").write_text(json.dumps(lines))
    for file, pattern in (
        ("coco_karpathy_test.json", "val2014/COCO_val2014_{:012d}.jpg"),
        ("flickr30k_test.json", "flickr30k-images/{}.jpg"),
    ):
        lines = []
        for i in range(num // 8):
            path = folder / pattern.format(i + 100)
            path.parent.mkdir(exist_ok=True)
            noise(random).save(path)
            captions = [sentence(random, 4 + k) for k in range(5)]
            lines.append({"image": pattern.format(i + 100), "caption": captions})
        (folder / file).write_text(json.dumps(lines))
    return folder


def write_sugar_crepe(folder: Path, num: int = 12) -> Path:
    """Three of its files, numbered with gaps."""
    random = np.random.default_rng(3)
    (folder / "val2017").mkdir(parents=True)
    (folder / "data").mkdir()
    for i in range(num):
        noise(random).save(folder / "val2017" / f"{i:012d}.jpg")
    for name in ("add_att", "swap_att", "swap_obj"):
        items = {
            str(3 * i): {
                "filename": f"{i:012d}.jpg",
                "caption": sentence(random),
                "negative_caption": sentence(random, 7),
            }
            for i in range(num)
        }
        (folder / "data" / f"{name}.json").write_text(json.dumps(items))
    return folder
