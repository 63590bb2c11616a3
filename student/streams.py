"""Named random streams, so that every random draw can be replayed.

A draw depends only on the name of its stream and a key: the seed and a position such as epoch and row.
"""

import zlib

import numpy as np

# Name of a stream -> the key of one draw
STREAMS = {
    "row_order": "seed, epoch",
    "text_choice": "seed, epoch, row",
    "first_view": "seed, row",
    "mask_noise": "seed, epoch, row",
    "sample_noise": "seed, epoch, row",  # one stream per array of a recipe: sample_noise.NAME
    "text_masking": "seed, epoch, row",
    "masked_words": "seed, step, row",
    "unlabeled_order": "seed, epoch",
    "labels": "subset",
    "data_share": "",
    "anchor_rows": "",
}


def stream(name: str, *key: int) -> np.random.Generator:
    """Return the random generator of a named stream for a key.

    Args:
        name: A name of STREAMS, optionally followed by a dot and the name of one of several streams of this kind.
        key: Numbers that identify the draw, such as (seed, epoch, row).

    Raises:
        KeyError: There is no such stream.
        ValueError: The key has the wrong number of entries.
    """
    kind = name.partition(".")[0]
    if len(key) != len([part for part in STREAMS[kind].split(", ") if part]):
        raise ValueError(f"stream {kind} takes ({STREAMS[kind]}), not {key}")
    return np.random.default_rng([zlib.crc32(name.encode()), *key])
