"""ImageNet's classes: their WordNet ids, their order and their names."""

from collections import Counter
from collections.abc import Collection

from teachercache.core.errors import UserError


def class_places(labels: Collection[str], data: str) -> dict[str, int]:
    """Return the position of each folder among ImageNet's 1,000 sorted wnids.

    Args:
        labels: Names of folders: wnids, or all of them numbers from 0 to 999 (ImageNetV2).
        data: The data's name, for errors.

    Raises:
        UserError: If a folder is neither.
    """
    by_wnid = {wnid: place for place, wnid in enumerate(wnids())}
    by_number = {str(place): place for place in by_wnid.values()}
    place_of = by_number if all(label in by_number for label in labels) else by_wnid
    unknown = sorted(label for label in labels if label not in place_of)
    if unknown:
        raise UserError(
            f"{data}: folder '{unknown[0]}' is not one of ImageNet's 1,000 wnids (n01440764) or numbers 0 "
            "to 999; for classes of your own `--task zeroshot`"
        )
    return {label: place_of[label] for label in labels}


def wnids() -> list[str]:
    """Return the 1,000 WordNet ids in sorted order, which is the order of ImageNet's classes."""
    from timm.data import ImageNetInfo

    return list(ImageNetInfo().label_names())


def class_words() -> list[str]:
    """Return a name for each class; no two are equal."""
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES
    from timm.data import ImageNetInfo

    counts, wordnet = Counter(IMAGENET_CLASSNAMES), ImageNetInfo()
    return [
        name if counts[name] == 1 else wordnet.index_to_description(place).split(",")[0]
        for place, name in enumerate(IMAGENET_CLASSNAMES)
    ]
