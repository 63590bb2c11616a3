"""Named random streams: every random draw is a function of its name, the seed and its place, so it can be replayed."""

import numpy as np

# The number that sets a stream apart from the others with the same key
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
    """Return the generator of a named stream at a place, such as (seed, epoch, row)."""
    return np.random.default_rng([*key, *STREAMS[name]])
