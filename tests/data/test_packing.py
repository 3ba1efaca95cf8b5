# SPDX-License-Identifier: Apache-2.0
"""Packing: nothing lost, nothing over, and as full as best fit should be."""

import numpy as np
import pytest

from jft import errors
from jft.data import packing


@pytest.mark.parametrize("seed", range(5))
def test_every_item_once_and_no_bin_over(seed: int) -> None:
    lengths = np.random.default_rng(seed).integers(1, 101, size=500).tolist()
    bins = packing.pack(lengths, 100)
    assert sorted(index for chosen in bins for index in chosen) == list(range(500))
    assert max(sum(lengths[index] for index in chosen) for chosen in bins) <= 100


def test_same_as_searching_all_bins() -> None:
    # The bitmask finds what a plain search over all bins finds: the fullest bin that still fits.
    lengths = np.random.default_rng(1).integers(1, 60, size=400).tolist()
    free: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [space for space in free if space >= length]
        space = min(fitting, default=64)
        if fitting:
            free.remove(space)
        free.append(space - length)
    bins = packing.pack(lengths, 64)
    assert sorted(64 - sum(lengths[index] for index in chosen) for chosen in bins) == sorted(free)


def test_bins_depend_on_lengths_alone() -> None:
    rng = np.random.default_rng(2)
    lengths = rng.integers(1, 50, size=300)
    other = rng.permutation(lengths)

    def shape(values: np.ndarray) -> list[list[int]]:
        return [[int(values[index]) for index in chosen] for chosen in packing.pack(values, 50)]

    assert shape(lengths) == shape(other)
    assert packing.pack(lengths, 50) == packing.pack(lengths, 50)


def test_exact_fits_and_edges() -> None:
    assert packing.pack([], 10) == []
    assert packing.pack([10, 10], 10) == [[0], [1]]
    assert packing.pack([3, 7, 4, 6], 10) == [[1, 0], [3, 2]]


@pytest.mark.parametrize("length", [11, 0])
def test_a_length_that_does_not_fit_is_an_error(length: int) -> None:
    with pytest.raises(errors.UserError, match=f"example 1 takes {length} positions.*1 to 10"):
        packing.pack([5, length], 10)
