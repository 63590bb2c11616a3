"""Random streams: equal for equal names and keys, independent otherwise."""

import itertools

import numpy as np
import pytest

from student.streams import STREAMS, stream

KEYS = {name: (3,) * len([part for part in key.split(", ") if part]) for name, key in STREAMS.items()}


def draws(name: str, *key: int) -> np.ndarray:
    return stream(name, *key).random(1000)


def test_a_draw_can_be_repeated():
    for name, key in KEYS.items():
        np.testing.assert_array_equal(draws(name, *key), draws(name, *key))


def test_streams_with_equal_keys_are_independent():
    arrays = [draws(name, *key) for name, key in KEYS.items()]
    arrays += [draws("sample_noise.t", 3, 3, 3), draws("sample_noise.eps", 3, 3, 3), draws("row_order", 3, 4)]
    for a, b in itertools.combinations(arrays, 2):
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.15


def test_a_wrong_name_or_key_is_an_error():
    with pytest.raises(KeyError):
        stream("no_such_stream", 1)
    with pytest.raises(ValueError, match="seed, epoch"):
        stream("row_order", 1)
