"""Other libraries run our encoders: mteb on a local task, where it is installed."""

import numpy as np
import pytest
import torch
from own_encoder import ENCODER, slow_image, slow_text
from PIL import Image
from small import make_folder

from evaluation.models.mteb import MtebModel, as_mteb

pytestmark = pytest.mark.filterwarnings("ignore")  # mteb's own imports warn of much
CLASSES = [f"class{i}" for i in range(3)]


def test_batches_of_pictures_texts_and_both(tmp_path):
    """mteb's protocol without mteb: batches are dictionaries of columns."""
    paths = sorted(make_folder(tmp_path / "squares", 6).rglob("*.png"))
    pictures, texts = [Image.open(path) for path in paths], [f"text {i}" for i in range(6)]
    model = MtebModel(ENCODER, None, torch.matmul, torch.mul)
    images, words = (
        np.stack([slow_image(path) for path in paths]),
        np.stack([slow_text(text) for text in texts]),
    )
    batches = [{"image": pictures[:4]}, {"image": pictures[4:]}]
    assert model.encode(batches) == pytest.approx(images, abs=1e-5)
    assert model.encode([{"text": texts}], task_metadata=None) == pytest.approx(words, abs=1e-5)
    both = (images + words) / np.linalg.norm(images + words, axis=1, keepdims=True)
    assert model.encode([{"image": pictures, "text": texts}]) == pytest.approx(both, abs=1e-5)


def test_mteb_finds_the_accuracy_of_a_slow_loop(tmp_path):
    mteb = pytest.importorskip("mteb", reason="mteb is not installed")
    from datasets import ClassLabel, Dataset, DatasetDict, Features
    from datasets import Image as ImageColumn
    from mteb.abstasks.task_metadata import TaskMetadata
    from mteb.abstasks.zeroshot_classification import AbsTaskZeroShotClassification

    paths = sorted(make_folder(tmp_path / "squares", 20).rglob("*.png"))
    labels = [CLASSES.index(path.parent.name) for path in paths]

    class Local(AbsTaskZeroShotClassification):
        metadata = TaskMetadata(
            name="Local",
            description="Squares.",
            reference=None,
            dataset={"path": "local", "revision": "1"},
            type="ZeroShotClassification",
            category="i2t",
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            main_score="accuracy",
            date=("2020-01-01", "2021-01-01"),
            domains=["Web"],
            task_subtypes=[],
            license="not specified",
            annotations_creators="derived",
            dialect=[],
            modalities=["image", "text"],
            sample_creation="created",
            bibtex_citation="",
        )

        def load_data(self, *words, **more):
            columns = Features({"image": ImageColumn(), "label": ClassLabel(names=CLASSES)})
            rows = {"image": [str(path) for path in paths], "label": labels}
            self.dataset = DatasetDict({"test": Dataset.from_dict(rows, features=columns)})
            self.data_loaded = True

        def get_candidate_labels(self):
            return [f"a photo of a {name}." for name in CLASSES]

    weights = np.stack([slow_text(f"a photo of a {name}.") for name in CLASSES])
    guesses = [int((weights @ slow_image(path)).argmax()) for path in paths]
    result = mteb.evaluate(as_mteb(ENCODER), Local(), cache=None, show_progress_bar=False)
    found = result.task_results[0].scores["test"][0]["accuracy"]
    assert found == pytest.approx(np.mean(np.array(guesses) == np.array(labels)))
    assert 0 < found < 1
