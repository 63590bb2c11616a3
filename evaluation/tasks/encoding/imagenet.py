"""Zero-shot ImageNet and its variants by their folders (CLIP, section 3.1): 80 prompts, logits of the classes present.

| data | folders | classes |
|---|---|---|
| ImageNet, -Sketch | `val/<wnid>/` or `<wnid>/` | 1,000 |
| ImageNet-A, -R | `<wnid>/` | the 200 that have a folder: their logits alone compete |
| ImageNetV2 | `<0 .. 999>/`, places in the sorted wnids | 1,000 |

Class names are CLIP's own, which open_clip ships, in the order of the sorted wnids, which timm ships. Two pairs of
them are the same words (missile, sunglasses), and classes of one name tie in every picture: there each class takes
the first of WordNet's words (projectile, sunglass). Not for other folders: see `zeroshot.py`.
"""

from typing import Any

from evaluation.data.imagenet_classes import class_places, class_words
from evaluation.models.encoder import Encoder
from evaluation.tasks.encoding.zeroshot import classify, given_names
from teachercache.core.errors import UserError
from teachercache.core.progress import say
from teachercache.data.manifest import Manifest

SPLITS = ("val", "validation", "test")  # ImageNet's own test pictures have no labels


def evaluate(encoder: Encoder, manifest: Manifest) -> dict[str, Any]:
    """acc1, acc5, mean_per_class_recall of the validation split, or of everything where there are no splits."""
    from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES

    labels = manifest.column("label")
    rows = _labelled_rows(manifest, labels)
    places = class_places({labels[row] for row in rows}, manifest.data)
    classes = sorted(places, key=places.__getitem__)
    if len(classes) < 1000:
        say(f"{len(classes)} of ImageNet's 1,000 classes have a folder: their logits alone compete")
    words = class_words()
    names = {label: words[place] for label, place in places.items()} | given_names(manifest, places)
    templates = [template("{}") for template in OPENAI_IMAGENET_TEMPLATES]
    return classify(encoder, manifest, rows, {label: names[label] for label in classes}, templates)


def _labelled_rows(manifest: Manifest, labels: list[str]) -> list[int]:
    """Rows with a label of the first split that has some."""
    for split in SPLITS:
        rows = [row for row in manifest.rows_of_split(split).tolist() if labels[row]]
        if rows:
            return rows
    raise UserError(
        f"{manifest.data} has no validation or test rows with labels: pass the folder that holds `val`, or "
        "one whose folders are wnids (n01440764) or 0 to 999"
    )
