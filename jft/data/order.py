# SPDX-License-Identifier: Apache-2.0
"""Which rows stand at which step: a pure function of lengths, weights, seed and step.

A stream goes through cycles. A cycle holds each of its bins once, in an order of its own, and each of its rows once:
bins are places in the order of decreasing length, and which of equally long rows stands in which place is drawn for each
cycle. An epoch takes the same number of bins from each stream, from where the epoch before ended, so a step's epoch
follows by division, and an epoch's part of a stream by multiplication. Nothing earlier is replayed.
"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from jft.data import packing

# What a draw is for. Part of its key, so that no two draws share random numbers.
COMPANY, CYCLE, SPREAD, COMPOSE, STEPS = range(5)


def draw(count: int, seed: int, purpose: int, *key: int) -> np.ndarray:
    """uint64 [count] random numbers.

    The raw numbers of a bit generator stay the same from one numpy to the next, which `Generator.permutation` does not
    promise. The key is a spawn key: as entropy, [1, 2] and [1, 2, 0] give the same numbers.
    """
    sequence = np.random.SeedSequence(seed, spawn_key=(purpose, *key))
    return np.random.PCG64(sequence).random_raw(count)


def permutation(count: int, seed: int, purpose: int, *key: int) -> np.ndarray:
    """The numbers below `count` in a random order; the sort is stable, so also equal draws have one order."""
    return np.argsort(draw(count, seed, purpose, *key), kind="stable")


@dataclasses.dataclass(frozen=True)
class Stream:
    """Rows that are drawn together.

    Attributes:
        sources: whose rows these are.
        rows: int64 [n], their numbers among all rows.
        lengths: int32 [n].
        bins: of places in the order of decreasing length.
        taken: bins in an epoch.
    """

    sources: tuple[int, ...]
    rows: np.ndarray
    lengths: np.ndarray
    bins: packing.Bins
    taken: int

    @property
    def repeats(self) -> float:
        """How often each row stands in an epoch, in the mean over epochs."""
        return self.taken / len(self.bins)

    @property
    def number(self) -> int:
        """Of the stream, for its draws."""
        return self.sources[0]

    @functools.cached_property
    def sizes(self) -> np.ndarray:
        """int64 [bins]: positions in use in each bin; equal in all cycles."""
        return self.bins.sizes(-np.sort(-self.lengths))

    def placed(self, seed: int, cycle: int) -> np.ndarray:
        """The rows of a cycle by place: by decreasing length, equally long ones in random order."""
        # One sort of one key; a length takes up to 31 bits.
        chance = draw(len(self.rows), seed, COMPANY, self.number, cycle) >> np.uint64(32)
        shortness = (2**31 - self.lengths.astype(np.int64)).astype(np.uint64)
        return self.rows[np.argsort(shortness << np.uint64(32) | chance, kind="stable")]


@dataclasses.dataclass(frozen=True)
class Piece:
    """What an epoch takes of one cycle: bins in the cycle's order, and the cycle's rows by place."""

    stream: Stream
    bins: np.ndarray
    placed: np.ndarray


class Epoch:
    """The bins of an epoch, numbered from 0, and the batches that they make."""

    def __init__(
        self, streams: Sequence[Stream], seed: int, number: int, widths: np.ndarray, batch_size: int
    ) -> None:
        self._pieces = [p for stream in streams for p in _pieces(stream, seed, number)]
        self._ends = np.cumsum([len(piece.bins) for piece in self._pieces])
        self.sizes = np.concatenate([piece.stream.sizes[piece.bins] for piece in self._pieces])
        self.bins, self.widths = _batches(self.sizes, seed, number, widths, batch_size)

    def rows(self, entry: int) -> np.ndarray:
        """The rows in one of the epoch's bins; none in bin -1."""
        if entry < 0:
            return np.zeros(0, np.int64)
        at = int(np.searchsorted(self._ends, entry, side="right"))
        piece = self._pieces[at]
        chosen = int(piece.bins[entry - self._ends[at] + len(piece.bins)])
        return piece.placed[piece.stream.bins[chosen]]


def _pieces(stream: Stream, seed: int, epoch: int) -> list[Piece]:
    count, start = len(stream.bins), epoch * stream.taken
    stop = start + stream.taken
    pieces = []
    for cycle in range(start // count, -(-stop // count)):
        bins = permutation(count, seed, CYCLE, stream.number, cycle)
        part = slice(max(start - cycle * count, 0), stop - cycle * count)
        pieces.append(Piece(stream, bins[part], stream.placed(seed, cycle)))
    return pieces


def _batches(
    sizes: np.ndarray, seed: int, epoch: int, widths: np.ndarray, batch_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """The bins of each batch, int64 [steps, batch_size], -1 for an empty row, and its width, int64 [steps].

    Batches are cut from the bins in order of size, which gives each batch its width: the least that holds the largest of
    its bins. Then bins are mixed among batches of one width, and batches with each other. So only one batch of the epoch is
    not full, the last, and with one width this is a random order.
    """
    bins = permutation(len(sizes), seed, SPREAD, epoch)
    bins = bins[np.argsort(-sizes[bins], kind="stable")]
    width = widths[np.searchsorted(widths, sizes[bins[::batch_size]])]
    of_bin = np.repeat(width, batch_size)[: len(bins)]
    bins = bins[np.lexsort((draw(len(bins), seed, COMPOSE, epoch), -of_bin))]
    full = len(bins) // batch_size
    steps = np.append(permutation(full, seed, STEPS, epoch), np.arange(full, len(width)))
    padded = np.full(len(width) * batch_size, -1)
    padded[: len(bins)] = bins
    return padded.reshape(-1, batch_size)[steps], width[steps]
