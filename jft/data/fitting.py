# SPDX-License-Identifier: Apache-2.0
"""Rows that are longer than a batch's row, and rows with nothing to train: what is done with them is counted.

A row is not copied: what stays of it is noted, and cut out when it is read.
"""

import dataclasses
from typing import Generic, TypeVar

import numpy as np

from jft import errors
from jft.data import rows

Source = TypeVar("Source", bound=rows.Rows)

OVERLENGTH = ("error", "drop", "truncate_prompt", "split")


@dataclasses.dataclass(frozen=True)
class Fit:
    """What `fit` did."""

    rows: int  # given
    kept: int  # of those given
    untrained: int  # left out: no token to train on
    dropped: int  # left out: too long
    truncated: int  # kept with a shorter prompt
    truncated_tokens: int  # taken out of prompts
    split: int  # kept in pieces
    pieces: int  # of those; pieces with nothing to train apart
    longest: int  # positions that the longest row given takes


class Fitted(Generic[Source]):
    """Rows as they stay: of the source's row `of[i]` its first `head[i]` tokens, and those from `start[i]` to `stop[i]`."""

    def __init__(
        self, source: Source, of: np.ndarray, head: np.ndarray, start: np.ndarray, stop: np.ndarray
    ) -> None:
        self.source, self.of = source, of
        self._head, self._start, self._stop = head, start, stop
        self.lengths = (head + stop - start - 1).astype(np.int32)
        self.trained = np.asarray(source.trained)[of].astype(np.int32)
        for i in np.flatnonzero(stop - start - 1 < np.asarray(source.lengths)[of] - head):
            self.trained[i] = np.count_nonzero(self[int(i)].trained[1:])

    def __len__(self) -> int:
        return len(self.of)

    def __getitem__(self, index: int) -> rows.Row:
        row = self.source[int(self.of[index])]
        head, start, stop = (int(x[index]) for x in (self._head, self._start, self._stop))
        if head:
            tokens, trained = (np.r_[x[:head], x[start:stop]] for x in (row.tokens, row.trained))
        else:
            tokens, trained = row.tokens[start:stop], row.trained[start:stop]
        return rows.Row(tokens, trained, row.source)


def fit(
    source: Source, length: int, overlength: str = "error", *, some: np.ndarray | None = None
) -> tuple[Fitted[Source], Fit]:
    """Makes every row fit into `length` positions and leaves out rows with nothing to train.

    Args:
        source: as encoded.
        length: positions in a batch's row (`data.max_length`).
        overlength: "error"; "drop"; "truncate_prompt" takes tokens out of the prompt from the left, after the first
            token (BOS or the mark of the first turn), and every response stays whole; "split" cuts a row into pieces of
            `length` positions, each of which is trained without what was before it.
        some: indices of the rows to take; None = all.

    Raises:
        errors.UserError: a row is too long and `overlength` is "error"; a response is too long to keep whole.
    """
    if overlength not in OVERLENGTH:
        raise errors.UserError(
            f"data.overlength={overlength}: unknown; known are {', '.join(OVERLENGTH)}"
        )
    given = np.arange(len(source)) if some is None else np.asarray(some)
    lengths = np.asarray(source.lengths)[given]
    of = given[np.asarray(source.trained)[given] > 0]
    needed = np.asarray(source.lengths)[of]
    long = of[needed > length]
    if len(long) and overlength == "error":
        raise errors.UserError(_too_long(source, long, len(given), length))
    short = of[needed <= length]
    pieces = {
        "error": _none,
        "drop": _none,
        "truncate_prompt": _without_prompt,
        "split": _pieces,
    }[overlength](source, long, length)
    parts = np.concatenate([_whole(source, short), pieces])
    parts = parts[np.argsort(parts[:, 0], kind="stable")]
    cut = np.asarray(source.lengths)[long].sum() - length * len(long)
    truncating = overlength == "truncate_prompt"
    return Fitted(source, *parts.T), Fit(
        rows=len(given),
        kept=len(short) + (0 if overlength == "drop" else len(long)),
        untrained=len(given) - len(of),
        dropped=len(long) if overlength == "drop" else 0,
        truncated=len(long) if truncating else 0,
        truncated_tokens=int(cut) if truncating else 0,
        split=len(long) if overlength == "split" else 0,
        pieces=len(pieces) if overlength == "split" else 0,
        longest=int(lengths.max(initial=0)),
    )


def _whole(source: rows.Rows, some: np.ndarray) -> np.ndarray:
    """[n, 4]: row, head, start, stop."""
    stop = np.asarray(source.lengths)[some].astype(np.int64) + 1
    return np.stack([some.astype(np.int64), np.zeros_like(stop), np.zeros_like(stop), stop], axis=1)


def _none(source: rows.Rows, long: np.ndarray, length: int) -> np.ndarray:
    return np.zeros((0, 4), np.int64)


def _without_prompt(source: rows.Rows, long: np.ndarray, length: int) -> np.ndarray:
    parts = []
    for index in long:
        row = source[int(index)]
        excess = len(row.tokens) - 1 - length
        prompt = int(row.trained.argmax())
        if excess > prompt - 1:
            raise errors.UserError(
                f"{row.source}: takes {len(row.tokens) - max(prompt, 1)} positions even without its prompt, more than "
                f"data.max_length={length}; raise it, or set data.overlength to drop or split"
            )
        parts.append((index, 1, 1 + excess, len(row.tokens)))
    return np.array(parts, np.int64).reshape(-1, 4)


def _pieces(source: rows.Rows, long: np.ndarray, length: int) -> np.ndarray:
    """Each target stands in one piece: a piece's first token is the last target of the one before it."""
    parts = []
    for index in long:
        row = source[int(index)]
        for start in range(0, len(row.tokens) - 1, length):
            stop = min(start + length + 1, len(row.tokens))
            if row.trained[start + 1 : stop].any():
                parts.append((index, 0, start, stop))
    return np.array(parts, np.int64).reshape(-1, 4)


def _too_long(source: rows.Rows, long: np.ndarray, count: int, length: int) -> str:
    worst = source[int(long[np.asarray(source.lengths)[long].argmax()])]
    return (
        f"{len(long)} of {count} rows are longer than data.max_length={length}; the longest ({worst.source}) needs "
        f"{len(worst.tokens) - 1}; raise data.max_length, or set data.overlength to drop, truncate_prompt or split"
    )
