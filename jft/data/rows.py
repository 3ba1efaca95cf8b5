# SPDX-License-Identifier: Apache-2.0
"""Rows of tokens: one in memory, or millions behind a memory map, read one at a time."""

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import numpy as np


@dataclasses.dataclass(frozen=True)
class Row:
    """A conversation or a text as tokens, and which of them are trained.

    A row of n tokens takes n - 1 positions of a batch: its last token is only ever a target.
    """

    tokens: np.ndarray  # int32 [n], ends with the last response's stop token
    trained: np.ndarray  # bool [n]
    source: str


class Rows(Protocol):
    """What batches need to know of rows without reading them, and a reader."""

    @property
    def lengths(self) -> np.ndarray:
        """int32 [len(self)]: positions that each row takes."""
        ...

    @property
    def trained(self) -> np.ndarray:
        """int32 [len(self)]: trained targets in each row."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Row: ...


class InMemory:
    """Rows of a list."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = list(rows)
        self.lengths = np.array([len(row.tokens) - 1 for row in self._rows], np.int32)
        self.trained = np.array([row.trained[1:].sum() for row in self._rows], np.int32)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Row:
        return self._rows[index]


class Joined:
    """Rows of several sources, one after the other."""

    def __init__(self, parts: Sequence[Rows]) -> None:
        self._parts = list(parts)
        self._ends = np.cumsum([len(part) for part in parts])
        self.lengths = np.concatenate([np.zeros(0, np.int32), *(part.lengths for part in parts)])
        self.trained = np.concatenate([np.zeros(0, np.int32), *(part.trained for part in parts)])

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Row:
        part = int(np.searchsorted(self._ends, index, side="right"))
        return self._parts[part][index - (int(self._ends[part - 1]) if part else 0)]
