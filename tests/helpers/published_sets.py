"""Made-up data sets in the layouts of the published ones: few pictures, the true names of files and columns."""

import io
import json
import pickle
import struct
from importlib import resources
from pathlib import Path
from typing import ClassVar

import numpy as np
from PIL import Image

RANDOM = np.random.default_rng(5)
CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
WNIDS = resources.files("timm.data").joinpath("_info", "imagenet_synsets.txt").read_text().split()
IMAGENET = (1, 6, 11, 99, 407, 980)  # places of the classes that have a folder
SHARED = (6, 11, 99, 407)  # which -A, -O and -R have too


def picture(path: Path, size: tuple[int, int] = (14, 11)) -> None:
    """Noise, which no two share."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = RANDOM.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def write_lines(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


class Python2(pickle._Pickler):
    """Strings and bytes as Python 2 wrote both, which has left CIFAR's files; numpy by the name that it had."""

    def save_string(self, value: str | bytes) -> None:
        content = value if isinstance(value, bytes) else value.encode()
        self.write(pickle.BINSTRING + struct.pack("<i", len(content)) + content)
        self.memoize(value)

    dispatch: ClassVar[dict] = {**pickle._Pickler.dispatch, str: save_string, bytes: save_string}


def write_pickle(path: Path, values: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    Python2(buffer, protocol=2).dump(values)
    path.write_bytes(buffer.getvalue().replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))


def batch(count: int, classes: int, name: str) -> dict:
    """Pixels, and labels in which every class has its turn."""
    data = RANDOM.integers(0, 255, (count, 3072), dtype=np.uint8)
    return {"data": data, name: [i % classes for i in range(count)], "batch_label": "batch 1 of 5"}


def cifar(root: Path) -> None:
    folder = root / "cifar-10-batches-py"
    for i in range(1, 6):
        write_pickle(folder / f"data_batch_{i}", batch(20, 10, "labels"))
    write_pickle(folder / "test_batch", batch(30, 10, "labels"))
    write_pickle(folder / "batches.meta", {"label_names": CIFAR10})
    folder = root / "cifar-100-python"
    write_pickle(folder / "train", batch(300, 100, "fine_labels") | {"coarse_labels": [0] * 300})
    write_pickle(folder / "test", batch(100, 100, "fine_labels") | {"coarse_labels": [0] * 100})
    names = [f"thing_{i}" for i in range(100)]
    write_pickle(folder / "meta", {"fine_label_names": names, "coarse_label_names": ["all"]})


def caltech101(root: Path) -> None:
    for label, count in (("BACKGROUND_Google", 3), ("Faces_easy", 33), ("accordion", 32), ("ewer", 35)):
        for i in range(1, count + 1):
            picture(root / "caltech101/101_ObjectCategories" / label / f"image_{i:04d}.jpg")


def food101(root: Path) -> None:
    folder, classes = root / "food-101", ["apple_pie", "baby_back_ribs", "waffles"]
    write_lines(folder / "meta/classes.txt", classes)
    write_lines(folder / "meta/labels.txt", ["Apple pie", "Baby back ribs", "Waffles"])
    for split, count in (("train", 4), ("test", 3)):
        names = [f"{label}/{split == 'test':d}{i}" for label in classes for i in range(count)]
        write_lines(folder / f"meta/{split}.txt", names)
        listed = {label: [name for name in names if name.startswith(label)] for label in classes}
        (folder / f"meta/{split}.json").write_text(json.dumps(listed))
        for name in names:
            picture(folder / "images" / f"{name}.jpg")


def pets(root: Path) -> None:
    folder, breeds = root / "oxford-iiit-pet", ["Abyssinian", "great_pyrenees", "Sphynx"]
    for file, numbers in (("trainval", range(1, 6)), ("test", range(100, 104))):
        listed = [(breed, i) for breed in breeds for i in numbers]
        lines = [f"{breed}_{i} {breeds.index(breed) + 1} 1 1" for breed, i in listed]
        write_lines(folder / f"annotations/{file}.txt", lines)
        for breed, i in listed:
            picture(folder / "images" / f"{breed}_{i}.jpg")


def birdsnap(root: Path) -> None:
    folder, species = root / "birdsnap", ["Blue Jay", "Acadian Flycatcher"]
    directories = [name.replace(" ", "_") for name in species]
    write_lines(
        folder / "species.txt",
        ["id\tcommon\tscientific\tdir"]
        + [
            f"{i}\t{name}\tLatin {i}\t{directory}"
            for i, (name, directory) in enumerate(zip(species, directories, strict=True), start=1)
        ],
    )
    paths = [f"{directory}/{i}.jpg" for directory in directories for i in range(7)]
    header = "url\tmd5\tpath\tspecies_id\tbb_x1\tbb_y1\tbb_x2\tbb_y2\tback_x\tback_y"
    write_lines(
        folder / "images.txt",
        [header]
        + [f"http://a/{i}\t0\t{path}\t{1 + i // 7}\t0\t0\t9\t9\tnull\tnull" for i, path in enumerate(paths)],
    )
    write_lines(folder / "test_images.txt", ["path", *(path for path in paths if path[-5] in "456")])
    for path in paths[:-1]:  # the last one could not be downloaded
        picture(folder / "images" / path)


def places365(root: Path) -> None:
    folder = root / "places365"
    write_lines(
        folder / "categories_places365.txt",
        ["/a/airfield 0", "/a/apartment_building/outdoor 1", "/y/youth_hostel 2"],
    )
    names = [f"Places365_val_{i:08d}.jpg" for i in range(1, 8)]
    write_lines(folder / "places365_val.txt", [f"{name} {i % 3}" for i, name in enumerate(names)])
    for name in names:
        picture(folder / "val_256" / name)


def objectnet(root: Path) -> None:
    folder = root / "objectnet-1.0"
    names = {
        "air_freshener": "Air freshener",
        "alarm_clock": "Alarm clock",
        "backpack": "Backpack",
        "t_shirt": "T-shirt",
    }
    mapped = {
        "Alarm clock": "analog clock; digital clock",
        "Backpack": "backpack, back pack",
        "T-shirt": "jersey",
    }
    for file, values in (("folder_to_objectnet_label", names), ("objectnet_to_imagenet_1k", mapped)):
        (folder / "mappings").mkdir(parents=True, exist_ok=True)
        (folder / "mappings" / f"{file}.json").write_text(json.dumps(values))
    for i, label in enumerate(names):
        for k in range(3 + i):
            path = folder / "images" / label / f"{k:02d}.png"
            picture(path, (16, 14))
            with Image.open(path) as image:
                framed = Image.new("RGB", image.size, "red")
                framed.paste(image.crop((2, 2, 14, 12)), (2, 2))
            framed.save(path)


def imagenets(root: Path) -> None:
    for i, place in enumerate(IMAGENET):
        for k in range(3 + i % 2):
            picture(root / "imagenet/val" / WNIDS[place] / f"ILSVRC2012_val_{place}_{k}.JPEG")
    for name in ("imagenet-a", "imagenet-o", "imagenet-r"):
        for place in SHARED:
            for k in range(4):
                picture(root / name / WNIDS[place] / f"{k}.jpg")
    for place in IMAGENET:
        for k in range(2):
            picture(root / "imagenetv2-matched-frequency-format-val" / str(place) / f"{k}.jpeg")


def captions(root: Path) -> None:
    """Karpathy's COCO with seven captions of some pictures, his Flickr30k, and CC3M's validation with dead links."""

    def entry(i: int, split: str, count: int, **more) -> dict:
        said = [{"raw": f"picture {i} said {k}", "tokens": [], "imgid": i, "sentid": k} for k in range(count)]
        return {"filename": f"{i:012d}.jpg", "imgid": i, "split": split, "sentences": said, **more}

    coco = [
        entry(i, "test" if i % 4 else "restval", 5 + 2 * (i % 2), filepath="val2014", cocoid=i)
        for i in range(12)
    ]
    flickr = [entry(i, "test" if i % 2 else "train", 5) for i in range(10)]
    for name, entries, where in (
        ("coco", coco, "coco/val2014"),
        ("flickr30k", flickr, "flickr30k/flickr30k-images"),
    ):
        for each in entries:
            picture(root / where / each["filename"])
        path = root / where.split("/")[0] / f"dataset_{name}.json"
        path.write_text(json.dumps({"dataset": name, "images": entries}))
    name = "Validation_GCC-1.1.0-Validation"
    write_lines(root / "cc3m" / f"{name}.tsv", [f"text number {i}\thttp://x/{i}.jpg" for i in range(6)])
    for i in (0, 1, 2, 4, 5):  # 3 is a dead link
        picture(root / "cc3m" / name / f"{i:09d}.jpg")


def make_all(root: Path) -> Path:
    for make in (cifar, caltech101, food101, pets, birdsnap, places365, objectnet, imagenets, captions):
        make(root)
    return root
