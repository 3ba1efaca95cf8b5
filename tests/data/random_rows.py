# SPDX-License-Identifier: Apache-2.0
"""Rows for the tests of batches: each unlike every other, and a list of them that notes which are read."""

from collections.abc import Sequence

import numpy as np

from jft.data import batches, rows

Piece = tuple[bytes, bytes, bytes, bytes]


def make(lengths: Sequence[int], seed: int = 0) -> list[rows.Row]:
    """Rows that take so many positions."""
    rng = np.random.default_rng([seed, len(lengths)])
    made = []
    for i, n in enumerate(lengths):
        tokens = rng.integers(1, 2**31 - 1, size=n + 1).astype(np.int32)
        trained = np.arange(n + 1) >= rng.integers(1, n + 1)
        made.append(rows.Row(tokens, trained, f"row {i}"))
    return made


def some(count: int, seed: int = 0, longest: int = 40) -> list[rows.Row]:
    """Rows of random lengths."""
    return make(np.random.default_rng(seed).integers(1, longest, size=count).tolist(), seed)


class Noted(rows.InMemory):
    """Rows that note which of them are read."""

    def __init__(self, given: Sequence[rows.Row]) -> None:
        super().__init__(given)
        self.read: list[int] = []

    def __getitem__(self, index: int) -> rows.Row:
        self.read.append(index)
        return super().__getitem__(index)


def same(one: batches.Batch, other: batches.Batch) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and np.array_equal(one[name], other[name])
        for name in one
    )


def pieces(batch: batches.Batch) -> list[Piece]:
    """The examples in a batch, taken apart by segment."""
    found = []
    for b in range(len(batch["tokens"])):
        for segment in range(1, batch["segments"][b].max() + 1):
            at = batch["segments"][b] == segment
            names = ("tokens", "targets", "weights", "positions")
            found.append(tuple(batch[name][b][at].tobytes() for name in names))
    return found


def piece(row: rows.Row) -> Piece:
    """What `pieces` should find of a row."""
    positions = np.arange(len(row.tokens) - 1, dtype=np.int32)
    weights = row.trained[1:].astype(np.float32)
    parts = (row.tokens[:-1], row.tokens[1:], weights, positions)
    return tuple(part.tobytes() for part in parts)
