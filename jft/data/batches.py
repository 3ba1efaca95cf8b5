# SPDX-License-Identifier: Apache-2.0
"""Rows of tokens to batches of fixed shape.

The batch at a step is a pure function of the rows, the settings, the seed and the step, so a
resumed run needs the step's number and nothing else. Every example stands in every epoch exactly
once: the last batch of an epoch is filled with empty rows instead of being dropped, and losses are
sums over weights, for which an empty row counts nothing.

An example of n tokens takes n - 1 positions: its last token is only ever a target.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence

import numpy as np

from jft import errors
from jft.data import chat, packing

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Fit:
    """What `fit` did to the rows."""

    rows: int  # given
    kept: int
    untrained: int  # left out: no token to train on
    dropped: int  # left out: too long
    truncated: int  # kept with a shorter prompt
    truncated_tokens: int  # taken out of prompts
    longest: int  # positions that the longest row given takes
    untrained_turns: int  # assistant turns in kept rows that the template keeps from training


def fit(
    rows: Sequence[chat.Row], length: int, overlength: str = "error"
) -> tuple[list[chat.Row], Fit]:
    """Makes every row fit into `length` positions and leaves out rows with nothing to train.

    Args:
        rows: as encoded.
        length: positions in a batch's row (`data.max_length`).
        overlength: "error", "drop" or "truncate_prompt". The last takes tokens out of the prompt
            from the left, after the first token (BOS or the mark of the first turn); every response
            stays whole.

    Raises:
        errors.UserError: a row is too long and `overlength` is "error"; a response is too long to
            keep whole; rows were given and none is left.
    """
    if overlength not in ("error", "drop", "truncate_prompt"):
        raise errors.UserError(
            f"data.overlength={overlength}: unknown; known are error, drop and truncate_prompt"
        )
    trained = [row for row in rows if row.trained[1:].any()]
    long = [row for row in trained if len(row.tokens) - 1 > length]
    if long and overlength == "error":
        worst = max(long, key=lambda row: len(row.tokens))
        raise errors.UserError(
            f"{len(long)} of {len(rows)} rows are longer than data.max_length={length}; the "
            f"longest ({worst.source}) needs {len(worst.tokens) - 1}; raise data.max_length, or "
            "set data.overlength to drop or truncate_prompt"
        )
    if overlength == "drop":
        kept = [row for row in trained if len(row.tokens) - 1 <= length]
    else:
        kept = [_truncate(row, length) for row in trained]
    if rows and not kept:
        raise errors.UserError(
            f"no row is left to train on: of {len(rows)}, {len(rows) - len(trained)} have no "
            f"trained token and {len(trained)} are longer than data.max_length={length}"
        )
    cut = sum(len(row.tokens) for row in trained) - sum(len(row.tokens) for row in kept)
    return kept, Fit(
        rows=len(rows),
        kept=len(kept),
        untrained=len(rows) - len(trained),
        dropped=len(trained) - len(kept),
        truncated=len(long) if overlength == "truncate_prompt" else 0,
        truncated_tokens=cut if overlength == "truncate_prompt" else 0,
        longest=max((len(row.tokens) - 1 for row in rows), default=0),
        untrained_turns=sum(row.untrained_turns for row in kept),
    )


def _truncate(row: chat.Row, length: int) -> chat.Row:
    excess = len(row.tokens) - 1 - length
    if excess <= 0:
        return row
    prompt = int(row.trained.argmax())
    if excess > prompt - 1:
        raise errors.UserError(
            f"{row.source}: takes {len(row.tokens) - prompt} positions even without its prompt, "
            f"more than data.max_length={length}; raise it, or set data.overlength=drop"
        )
    keep = np.r_[0, 1 + excess : len(row.tokens)]
    return dataclasses.replace(row, tokens=row.tokens[keep], trained=row.trained[keep])


class Batches:
    """Training batches of `batch_size` rows of `length` positions.

    With packing the bins' lengths are the same in every epoch, since best fit decreasing looks at
    lengths alone; which of the examples of equal length stands where, and the order of the bins,
    are drawn per epoch. So every epoch has the same number of steps, and a step's epoch follows by
    division.

    Attributes:
        length: positions in a row: the `length` given, or less where no row (with packing: not all
            of them together) needs that much, in multiples of 8.
        steps_per_epoch: batches in one epoch.
    """

    def __init__(
        self,
        rows: Sequence[chat.Row],
        *,
        batch_size: int,
        length: int,
        seed: int,
        packing: bool = True,
    ) -> None:
        if batch_size < 1:
            raise errors.UserError(f"batch_size={batch_size}; it must be at least 1")
        if seed < 0:
            raise errors.UserError(f"seed={seed}; it must not be negative")
        _check_rows(rows, length)
        self.rows = list(rows)
        self.batch_size = batch_size
        self.seed = seed
        self._lengths = np.array([len(row.tokens) - 1 for row in rows])
        self.length = _row_length(self._lengths, length, packing)
        self._slots = _slots(self._lengths, self.length, packing)
        self.steps_per_epoch = -(-len(self._slots) // batch_size)
        self._cached: tuple[int, list[list[int]]] = (-1, [])

    @property
    def trained_tokens(self) -> int:
        """Per epoch; equals the sum of the epoch's weights."""
        return sum(int(row.trained[1:].sum()) for row in self.rows)

    @property
    def padding(self) -> float:
        """The fraction of an epoch's positions that hold no example."""
        return 1 - int(self._lengths.sum()) / (self.steps_per_epoch * self.batch_size * self.length)

    def total_steps(self, epochs: float) -> int:
        """Steps in so many epochs, a started one counted to its next whole step."""
        return math.ceil(epochs * self.steps_per_epoch)

    def members(self, step: int) -> list[list[int]]:
        """The indices of the examples in each row of a batch; fewer rows at an epoch's end."""
        epoch, index = divmod(step, self.steps_per_epoch)
        return self._epoch(epoch)[index * self.batch_size : (index + 1) * self.batch_size]

    def batch(self, step: int) -> Batch:
        """The batch at a step, counted from 0 over all epochs.

        Returns:
            tokens, targets, segments, positions int32 [B, T] and weights float32 [B, T]. Segments
            count an example's place in its row from 1; everything is 0 in padding.
        """
        return _fill(self.rows, self.members(step), self.batch_size, self.length)

    def _epoch(self, epoch: int) -> list[list[int]]:
        if self._cached[0] != epoch:
            rng = np.random.default_rng([self.seed, epoch])
            order = rng.permutation(len(self.rows))
            order = order[np.argsort(-self._lengths[order], kind="stable")]
            bins = [[int(order[slot]) for slot in slots] for slots in self._slots]
            self._cached = (epoch, [bins[i] for i in rng.permutation(len(bins))])
        return self._cached[1]


def evaluation(
    rows: Sequence[chat.Row], *, batch_size: int, length: int, packing: bool = True
) -> Iterator[Batch]:
    """Batches in a fixed order that hold each example exactly once, shaped like training's."""
    _check_rows(rows, length)
    lengths = np.array([len(row.tokens) - 1 for row in rows])
    length = _row_length(lengths, length, packing)
    order = np.argsort(-lengths, kind="stable")
    bins = [[int(order[slot]) for slot in slots] for slots in _slots(lengths, length, packing)]
    for start in range(0, len(bins), batch_size):
        yield _fill(rows, bins[start : start + batch_size], batch_size, length)


def _check_rows(rows: Sequence[chat.Row], length: int) -> None:
    if not rows:
        raise errors.UserError("there are no rows to make batches of")
    for row in rows:
        if not row.trained[1:].any():
            raise errors.UserError(f"{row.source}: has no token to train on")
        if len(row.tokens) - 1 > length:
            raise errors.UserError(
                f"{row.source}: takes {len(row.tokens) - 1} positions, more than "
                f"data.max_length={length}; raise it, or set data.overlength to drop or "
                "truncate_prompt"
            )


def _row_length(lengths: np.ndarray, limit: int, packed: bool) -> int:
    needed = int(lengths.sum()) if packed else int(lengths.max())
    return min(limit, -(-needed // 8) * 8)


def _slots(lengths: np.ndarray, capacity: int, packed: bool) -> list[list[int]]:
    """Bins of places in the order of decreasing length, however equal lengths are ordered."""
    if not packed:
        return [[place] for place in range(len(lengths))]
    return packing.pack(-np.sort(-lengths), capacity)


def _fill(
    rows: Sequence[chat.Row], members: list[list[int]], batch_size: int, length: int
) -> Batch:
    names = ("tokens", "targets", "segments", "positions")
    batch: Batch = {name: np.zeros((batch_size, length), np.int32) for name in names}
    batch["weights"] = np.zeros((batch_size, length), np.float32)
    for b, indices in enumerate(members):
        at = 0
        for segment, index in enumerate(indices, start=1):
            row = rows[index]
            n = len(row.tokens) - 1
            place = (b, slice(at, at + n))
            batch["tokens"][place] = row.tokens[:-1]
            batch["targets"][place] = row.tokens[1:]
            batch["weights"][place] = row.trained[1:]
            batch["segments"][place] = segment
            batch["positions"][place] = np.arange(n)
            at += n
    return batch
