"""Distill a teacher into a small CLIP, measure both, and export the student: four calls.

python examples/train_a_student.py data/demo --steps 450
"""

import argparse

from student.api import evaluate, export, train
from teachercache.api import build


def main() -> None:
    """Build, train, evaluate and export."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", help="captioned pictures, with the splits train and test")
    parser.add_argument("--teacher", default="clip-lite", help="a name of `tc teachers`")
    parser.add_argument("--steps", type=int, default=450)
    parser.add_argument("--batch-size", type=int, default=128)
    options = parser.parse_args()

    cache = build(options.teacher, options.data).cache
    trained = train(
        "clip_kd",
        options.data,
        cache=cache,
        settings={"fd": 1000, "optim.lr": 1e-3},  # the names of `student train --set`
        steps=options.steps,
        batch_size=options.batch_size,
    )
    print(f"{trained.run}: loss {trained.metrics['loss']:.3f} after {trained.steps} steps")

    for result in evaluate([options.teacher, trained.run], "retrieval", options.data):
        print(f"{result['model']}: text to image R@1 {result['metrics']['image_retrieval_recall@1']:.3f}")

    exported = export(trained.run, "open_clip")
    print(f"{exported.folder}: {exported.load}")


if __name__ == "__main__":
    main()
