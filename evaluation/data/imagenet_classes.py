"""ImageNet's classes: WordNet ids, words, and their order."""

from collections import Counter
from collections.abc import Collection

from teachercache.core.errors import UserError


def class_places(labels: Collection[str], data: str) -> dict[str, int]:
    """Each folder's place among ImageNet's sorted wnids: folders are wnids, or all of them are numbers (V2)."""
    by_wnid = {wnid: place for place, wnid in enumerate(wnids())}
    by_number = {str(place): place for place in by_wnid.values()}
    known = by_number if all(label in by_number for label in labels) else by_wnid
    unknown = sorted(label for label in labels if label not in known)
    if unknown:
        raise UserError(
            f"{data}: folder '{unknown[0]}' is not one of ImageNet's 1,000 wnids (n01440764) or numbers 0 "
            "to 999; for classes of your own `--task zeroshot`"
        )
    return {label: known[label] for label in labels}


def wnids() -> list[str]:
    """The 1,000 WordNet ids in sorted order, which is ImageNet's order of classes."""
    from timm.data import ImageNetInfo

    return list(ImageNetInfo().label_names())


def class_words() -> list[str]:
    """A name for each class, all different."""
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES
    from timm.data import ImageNetInfo

    times, wordnet = Counter(IMAGENET_CLASSNAMES), ImageNetInfo()
    return [
        name if times[name] == 1 else wordnet.index_to_description(place).split(",")[0]
        for place, name in enumerate(IMAGENET_CLASSNAMES)
    ]
