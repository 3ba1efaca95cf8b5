# SPDX-License-Identifier: Apache-2.0
"""Several examples in one row of a batch, so that little of it is padding.

Best fit decreasing: the longest first, each into the fullest bin that still holds it. Items of one length are placed
together, since the fullest bin that holds one of them stays the fullest for the next until it holds no more: so the work
is one step for each length and each group of equally full bins, not one for each item.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from jft import errors

WORD = 9  # log2 of the bits in a word of `_Spaces`: at a capacity of 2^17 both levels have some hundred bits


@dataclasses.dataclass(frozen=True)
class Bins:
    """Bin b holds items[offsets[b] : offsets[b + 1]], the longest first."""

    offsets: np.ndarray  # int64 [bins + 1]
    items: np.ndarray  # int32, each item once

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        return self.items[self.offsets[index] : self.offsets[index + 1]]

    def sizes(self, lengths: np.ndarray) -> np.ndarray:
        """int64 [bins]: what the lengths in each bin add up to."""
        total = np.concatenate([[0], np.cumsum(lengths[self.items], dtype=np.int64)])
        return np.diff(total[self.offsets])


def singles(count: int) -> Bins:
    """A bin for each item."""
    return Bins(np.arange(count + 1), np.arange(count, dtype=np.int32))


def pack(lengths: Sequence[int] | np.ndarray, capacity: int) -> Bins:
    """Assigns each length to a bin.

    Args:
        lengths: at least 1 each.
        capacity: the most that the lengths in a bin may add up to.

    Returns:
        Bins of indices into `lengths`. The lengths in each bin depend only on the lengths as a set with
        repetitions; equal lengths are taken in the order given.

    Raises:
        errors.UserError: a length is below 1 or over the capacity.
    """
    lengths = np.asarray(lengths, np.int64)
    bad = np.flatnonzero((lengths < 1) | (lengths > capacity))
    if len(bad):
        raise errors.UserError(
            f"example {bad[0]} takes {lengths[bad[0]]} positions, but a row holds 1 to {capacity}; "
            "raise data.max_length or set data.overlength"
        )
    order = np.argsort(-lengths, kind="stable").astype(np.int32)
    values, counts = np.unique(lengths, return_counts=True)
    flat = itertools.chain.from_iterable(_place(values[::-1], counts[::-1], capacity))
    bins = _expand(np.fromiter(flat, np.int64).reshape(-1, 3))
    by_bin = np.argsort(bins, kind="stable")
    return Bins(np.concatenate([[0], np.cumsum(np.bincount(bins))]), order[by_bin])


def _place(values: np.ndarray, counts: np.ndarray, capacity: int) -> Iterator[tuple[int, int, int]]:
    """Runs of items, the longest first: (first bin, number of bins, items into each of them)."""
    spaces = _Spaces(capacity)
    opened = 0
    for length, count in zip(values.tolist(), counts.tolist(), strict=True):
        while count:
            space, first, bins = spaces.take(length)
            if not bins:
                space, first, bins = capacity, opened, -(-count // (capacity // length))
                opened += bins
            each = min(space // length, count)
            filled = min(bins, count // each)
            yield first, filled, each
            count -= filled * each
            spaces.give(space - each * length, first, filled)
            spaces.give(space, first + filled, bins - filled)


class _Spaces:
    """Ranges of bins by the space that is left in them.

    Which spaces there are stands in bits, in two levels: words of 2^WORD bits, and one integer that tells which words
    are not 0. So the smallest space from a length up is found by two shifts, however many there are.
    """

    def __init__(self, capacity: int) -> None:
        self._ranges: dict[int, list[tuple[int, int]]] = {}
        self._words = [0] * ((capacity >> WORD) + 1)
        self._used = 0

    def give(self, space: int, first: int, bins: int) -> None:
        if not space or not bins:
            return
        ranges = self._ranges.setdefault(space, [])
        ranges.append((first, bins))
        self._words[space >> WORD] |= 1 << (space & (1 << WORD) - 1)
        self._used |= 1 << (space >> WORD)

    def take(self, length: int) -> tuple[int, int, int]:
        """(space, first bin, bins) with the least space that holds the length; no bins where none does."""
        word = length >> WORD
        fitting = self._words[word] >> (length & (1 << WORD) - 1)
        if fitting:
            space = length + _lowest(fitting)
        else:
            fuller = self._used >> word + 1
            if not fuller:
                return 0, 0, 0
            word += 1 + _lowest(fuller)
            space = (word << WORD) + _lowest(self._words[word])
        ranges = self._ranges[space]
        first, bins = ranges.pop()
        if not ranges:
            self._words[word] ^= 1 << (space & (1 << WORD) - 1)
            if not self._words[word]:
                self._used ^= 1 << word
        return space, first, bins


def _lowest(bits: int) -> int:
    return (bits & -bits).bit_length() - 1


def _expand(runs: np.ndarray) -> np.ndarray:
    """The bin of each item, for runs of (first bin, number of bins, items into each)."""
    first, bins, each = runs.T
    of_run = np.repeat(np.arange(len(runs)), bins * each)
    ends = np.cumsum(bins * each)
    place = np.arange(len(of_run)) - (ends - bins * each)[of_run]
    return (first[of_run] + place // each[of_run]).astype(np.int32)
