"""Named random streams, so that every random draw can be replayed.

A draw depends only on the name of its stream and a key: the seed and a position such as epoch and row.
"""

import numpy as np

# Name -> numbers appended to the key, which separate streams that share a key. The comment names the key.
STREAMS: dict[str, tuple[int, ...]] = {
    "row_order": (),  # seed, epoch
    "text_choice": (),  # seed, epoch, row
    "first_view": (),  # seed, row
    "mask_noise": (1,),  # seed, epoch, row
    "sample_noise": (2,),  # seed, epoch, row
    "text_masking": (3,),  # seed, epoch, row
    "masked_words": (2,),  # seed, step, row
    "labels": (5,),  # subset
    "data_share": (),  # 0
    "anchor_rows": (),  # 0
}


def stream(name: str, *key: int) -> np.random.Generator:
    """Return the random generator of a named stream for a key such as (seed, epoch, row)."""
    return np.random.default_rng([*key, *STREAMS[name]])
