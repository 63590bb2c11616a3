"""Convert the PyPI package easy-vqa to the file format of VQA v2.

    pip install easy-vqa
    python -m scripts.datasets.easy_vqa --out data/easy_vqa

The train split becomes train2014 and the test split becomes val2014. The package has one answer per question, which is
written as the answer of all ten annotators. Questions are sorted by picture.
"""

import argparse
import importlib.util
import json
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from rich.progress import track

SPLITS = {"train2014": ("train", 1), "val2014": ("test", 100_001)}  # folder in the package, first image id
# The question types of VQA v2 that occur in easy-vqa
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


class Entry(NamedTuple):
    """One line of easy-vqa's questions.json."""

    question: str
    answer: str
    image: int


def write_vqa(out: Path, package: Path, *, limit: int | None = None) -> Counter[str]:
    """Write the layout of VQA v2 below `out` atomically and return the number of questions per split.

    Args:
        out: folder to create.
        package: folder of the installed package easy_vqa.
        limit: number of pictures per split; all if None.
    """
    counts: Counter[str] = Counter()
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    for subset, (folder, start) in SPLITS.items():
        source = package / "data" / folder
        entries = [Entry(*row) for row in json.loads((source / "questions.json").read_text(encoding="utf-8"))]
        images = sorted({entry.image for entry in entries})[:limit]
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
        write_json(
            partial / f"v2_OpenEnded_mscoco_{subset}_questions.json",
            head | {"task_type": "Open-Ended", "questions": questions},
        )
        write_json(partial / f"v2_mscoco_{subset}_annotations.json", head | {"annotations": annotations})
        counts[subset] = len(questions)
    partial.rename(out)
    return counts


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a JSON file."""
    path.write_text(json.dumps(values), encoding="utf-8")


def questions_and_annotations(
    entries: list[Entry], images: set[int], start: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the questions and the annotations of VQA, sorted by picture.

    The id of a question is 1000 times the id of its picture plus a running number.
    """
    questions, annotations = [], []
    num_questions: Counter[int] = Counter()
    for question, answer, image in sorted(entries, key=lambda entry: entry.image):
        if image not in images:
            continue
        number = (start + image) * 1000 + num_questions[image]
        num_questions[image] += 1
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
    """Return the answer type of VQA: yes/no, number or other."""
    return "yes/no" if answer in ("yes", "no") else "number" if answer.isdigit() else "other"


def question_type(question: str) -> str:
    """Return the longest question type that is a prefix of the question, in whole words."""
    words = f"{question.lower()} "
    prefixes = [name for name in QUESTION_TYPES if words.startswith(f"{name} ")]
    return max(prefixes, key=len, default="none of the above")


def main() -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to create")
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
