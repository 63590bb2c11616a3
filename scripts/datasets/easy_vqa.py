"""The pictures and questions of the PyPI package easy-vqa in VQA v2's own files. Not for its answers' captions.

    pip install easy-vqa
    python -m scripts.datasets.easy_vqa --out data/easy_vqa

Its train becomes train2014 and its test val2014. All ten annotators give its one answer; questions follow the order
of their pictures.
"""

import argparse
import importlib.util
import json
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from PIL import Image
from rich.progress import track

SPLITS = {"train2014": ("train", 1), "val2014": ("test", 100_001)}  # its folder, and where image ids start
# VQA v2's question types that its questions have; the longest that begins a question is its type
QUESTION_TYPES = (
    "what color is the",
    "what color",
    "what shape is",
    "what is the",
    "what is",
    "what",
    "is there a",
    "is there",
    "is the",
    "is a",
    "is",
    "does the",
    "does",
)


def write_vqa(out: Path, package: Path, *, limit: int | None = None) -> Counter:
    """Writes VQA v2's layout below `out`, whole or not at all; returns the number of questions per split."""
    counts: Counter = Counter()
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    for subset, (folder, start) in SPLITS.items():
        source = package / "data" / folder
        entries = json.loads((source / "questions.json").read_text(encoding="utf-8"))
        images = sorted({image for _, _, image in entries})[:limit]
        (partial / subset).mkdir(parents=True)
        for image in track(images, f"writing {subset}"):
            with Image.open(source / "images" / f"{image}.png") as picture:
                picture.convert("RGB").save(
                    partial / subset / f"COCO_{subset}_{start + image:012d}.jpg", quality=95
                )
        questions, annotations = questions_and_annotations(entries, set(images), start)
        head = {
            "info": {"description": "easy-vqa"},
            "data_type": "mscoco",
            "data_subtype": subset,
            "license": {},
        }
        write(
            partial / f"v2_OpenEnded_mscoco_{subset}_questions.json",
            head | {"task_type": "Open-Ended", "questions": questions},
        )
        write(partial / f"v2_mscoco_{subset}_annotations.json", head | {"annotations": annotations})
        counts[subset] = len(questions)
    partial.rename(out)
    return counts


def write(path: Path, values: dict[str, Any]) -> None:
    """A JSON file."""
    path.write_text(json.dumps(values), encoding="utf-8")


def questions_and_annotations(entries: list, images: set[int], start: int) -> tuple[list[dict], list[dict]]:
    """VQA's two lists, in the order of the pictures; a question's number is a thousand times its picture's and on."""
    questions, annotations, asked = [], [], Counter()
    for question, answer, image in sorted(entries, key=lambda entry: entry[2]):
        if image not in images:
            continue
        number = (start + image) * 1000 + asked[image]
        asked[image] += 1
        questions.append({"image_id": start + image, "question": question, "question_id": number})
        annotations.append(
            {
                "question_type": question_type(question),
                "multiple_choice_answer": answer,
                "answers": [
                    {"answer": answer, "answer_confidence": "yes", "answer_id": k + 1} for k in range(10)
                ],
                "image_id": start + image,
                "answer_type": answer_type(answer),
                "question_id": number,
            }
        )
    return questions, annotations


def answer_type(answer: str) -> str:
    """VQA's three kinds."""
    return "yes/no" if answer in ("yes", "no") else "number" if answer.isdigit() else "other"


def question_type(question: str) -> str:
    """The longest of the types that the question begins with, as whole words."""
    words = f"{question.lower()} "
    found = [name for name in QUESTION_TYPES if words.startswith(f"{name} ")]
    return max(found, key=len, default="none of the above")


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    parser.add_argument("--limit", type=int, help="pictures per split (default: all)")
    options = parser.parse_args()
    spec = importlib.util.find_spec("easy_vqa")
    if spec is None or spec.origin is None:
        print("error: the package easy-vqa is not installed; try `pip install easy-vqa`", file=sys.stderr)
        return 2
    if options.out.exists():
        print(f"error: {options.out} exists; give another --out or remove it", file=sys.stderr)
        return 2
    if options.limit is not None and options.limit < 1:
        print("error: give --limit 1 or more", file=sys.stderr)
        return 2
    for subset, count in write_vqa(options.out, Path(spec.origin).parent, limit=options.limit).items():
        print(f"{options.out}: {count} questions in {subset}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
