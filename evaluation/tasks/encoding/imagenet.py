"""Zero-shot ImageNet and its variants by their folders (CLIP, section 3.1), with CLIP's 80 prompts.

| data | folders | classes |
|---|---|---|
| ImageNet, -Sketch | `val/<wnid>/` or `<wnid>/` | 1,000 |
| ImageNet-A, -R | `<wnid>/` | the 200 that have a folder; only their logits compete |
| ImageNetV2 | `<0 .. 999>/`, positions in the sorted wnids | 1,000 |

The class names are CLIP's, shipped with open_clip, in the order of the sorted wnids, shipped with timm. Two pairs of
classes share a name (missile, sunglasses) and would tie on every image: these classes take the first of their WordNet
words (projectile, sunglass). For other folders see `zeroshot.py`.
"""

from collections.abc import Sequence

from evaluation.data.imagenet_classes import class_places, class_words
from evaluation.data.splits import VAL_FIRST, rows_in
from evaluation.models.encoder import Encoder
from evaluation.tasks.encoding.zeroshot import classify, names_beside_data
from evaluation.tasks.task import Metrics
from teachercache.core.errors import UserError
from teachercache.core.progress import say
from teachercache.data.manifest import Manifest


def evaluate(encoder: Encoder, manifest: Manifest) -> Metrics:
    """Compute acc1, acc5 and mean_per_class_recall of the validation split, or of all rows if there are no splits.

    Raises:
        UserError: If no split has labels, or a label is not a class of ImageNet.
    """
    from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES

    labels = manifest.column("label")
    rows = _labeled_rows(manifest, labels)
    places = class_places({labels[row] for row in rows}, manifest.data)
    classes = sorted(places, key=places.__getitem__)
    if len(classes) < 1000:
        say(f"{len(classes)} of ImageNet's 1,000 classes have a folder: only their logits compete")
    words = class_words()
    names = {label: words[place] for label, place in places.items()} | names_beside_data(manifest, places)
    templates = [template("{}") for template in OPENAI_IMAGENET_TEMPLATES]
    return classify(encoder, manifest, rows, {label: names[label] for label in classes}, templates)


def _labeled_rows(manifest: Manifest, labels: Sequence[str]) -> list[int]:
    """Labeled rows of the first split that has any."""
    for split in VAL_FIRST:  # ImageNet's test images have no labels
        rows = [row for row in rows_in(manifest, split).tolist() if labels[row]]
        if rows:
            return rows
    raise UserError(
        f"{manifest.data} has no validation or test rows with labels: pass the folder that holds `val`, or "
        "one whose folders are wnids (n01440764) or 0 to 999"
    )
