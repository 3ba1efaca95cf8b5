# SPDX-License-Identifier: Apache-2.0
"""Rows of tokens to batches of fixed shape.

The batch at a step is a pure function of the rows, the settings, the seed and the step, so a resumed run needs the
step's number and nothing else, and each host makes its own rows of it alone. Every example stands in every epoch as often
as its source's weight says, whole: the last batch of an epoch is filled with empty rows instead of being dropped, and
losses are sums over weights, for which an empty row counts nothing.

An example of n tokens takes n - 1 positions: its last token is only ever a target.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence

import numpy as np

from jft import errors
from jft.data import mixtures, order, widths
from jft.data import rows as rows_of

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Share:
    """A source's part in an epoch, in the mean over epochs."""

    rows: float
    trained_tokens: float
    fraction: float  # of the trained tokens of all sources


class Batches:
    """Training batches of `batch_size` rows, of which this host has its part.

    An epoch has the same number of steps each time. A source of weight 2 stands in it twice; of a source of weight 0.25
    each epoch has another quarter, so that over the epochs all its rows stand there equally often. Sources of one whole
    weight are packed together; a source of a fractional weight is packed by itself, and an epoch takes a whole number of
    its packed rows.

    Attributes:
        widths: of batches, ascending: one with packing; without, a few (see `widths.choose`), and a batch has the least
            that holds its rows.
        length: the largest width: the `length` given, or less where no row (with packing: not all that are packed
            together) needs that much, in multiples of 8.
        steps_per_epoch: batches in one epoch.
        batch_size: rows in the batch of all hosts.
    """

    def __init__(
        self,
        sources: Sequence[rows_of.Rows],
        *,
        batch_size: int,
        length: int,
        seed: int,
        weights: Sequence[float] = (),
        packing: bool = True,
        host: int = 0,
        hosts: int = 1,
    ) -> None:
        _check(sources, length)
        _check_settings(batch_size, seed, host, hosts)
        self.batch_size, self.seed = batch_size, seed
        self._sources = list(sources)
        self._starts = np.cumsum([0] + [len(source) for source in sources])
        self._streams = mixtures.streams(self._sources, weights, length, packing)
        self.widths = _widths(self._streams, batch_size, length, packing)
        self.length = int(self.widths[-1])
        bins = sum(stream.taken for stream in self._streams)
        self.steps_per_epoch = -(-bins // batch_size)
        part = batch_size // hosts
        self._mine = slice(host * part, (host + 1) * part)
        self._cached: tuple[int, order.Epoch] | None = None

    @property
    def trained_tokens(self) -> float:
        """Per epoch, in the mean over epochs; equals the sum of the weights of the epoch's batches."""
        return sum(share.trained_tokens for share in self.shares())

    @property
    def padding(self) -> float:
        """The fraction of the first epoch's positions that hold no example; whole weights have it in every epoch."""
        epoch = self._epoch(0)
        return 1 - int(epoch.sizes.sum()) / (int(epoch.widths.sum()) * self.batch_size)

    def total_steps(self, epochs: float) -> int:
        """Steps in so many epochs, a started one counted to its next whole step."""
        return math.ceil(epochs * self.steps_per_epoch)

    def shares(self) -> list[Share]:
        """Of each source."""
        times = {i: stream.repeats for stream in self._streams for i in stream.sources}
        rows = [times[i] * len(source) for i, source in enumerate(self._sources)]
        tokens = [
            times[i] * int(source.trained.sum(dtype=np.int64))
            for i, source in enumerate(self._sources)
        ]
        return [Share(n, t, t / sum(tokens)) for n, t in zip(rows, tokens, strict=True)]

    def members(self, step: int) -> list[list[tuple[int, int]]]:
        """(source, row) of each example in each row of the batch of all hosts; empty rows hold none."""
        epoch, index = divmod(step, self.steps_per_epoch)
        made = self._epoch(epoch)
        return [self._members(made, entry) for entry in made.bins[index]]

    def batch(self, step: int) -> Batch:
        """This host's rows of the batch at a step, counted from 0 over all epochs; no other rows are read.

        Returns:
            tokens, targets, segments, positions int32 [B / hosts, T] and weights float32 [B / hosts, T], where T is one of
            `widths`. Segments count an example's place in its row from 1; everything is 0 in padding.
        """
        epoch, index = divmod(step, self.steps_per_epoch)
        made = self._epoch(epoch)
        held = [
            [self._sources[source][row] for source, row in self._members(made, entry)]
            for entry in made.bins[index][self._mine]
        ]
        return _fill(held, len(held), int(made.widths[index]))

    def _members(self, made: order.Epoch, entry: int) -> list[tuple[int, int]]:
        rows = made.rows(entry)
        source = np.searchsorted(self._starts, rows, side="right") - 1
        return list(zip(source.tolist(), (rows - self._starts[source]).tolist(), strict=True))

    def _epoch(self, epoch: int) -> order.Epoch:
        if self._cached is None or self._cached[0] != epoch:
            made = order.Epoch(self._streams, self.seed, epoch, self.widths, self.batch_size)
            self._cached = (epoch, made)
        return self._cached[1]


def evaluation(
    rows: rows_of.Rows, *, batch_size: int, length: int, packing: bool = True
) -> Iterator[Batch]:
    """Batches in a fixed order, the fullest rows first, that hold each example exactly once, shaped like training's."""
    stream, choice = _evaluated(rows, batch_size, length, packing)
    by_length = np.argsort(-stream.lengths.astype(np.int64), kind="stable")
    entries = np.argsort(-stream.sizes, kind="stable")
    for start in range(0, len(entries), batch_size):
        chosen = entries[start : start + batch_size]
        held = [[rows[int(i)] for i in by_length[stream.bins[entry]]] for entry in chosen]
        yield _fill(held, batch_size, int(choice[np.searchsorted(choice, stream.sizes[chosen[0]])]))


def evaluation_width(
    rows: rows_of.Rows, *, batch_size: int, length: int, packing: bool = True
) -> int:
    """The largest width of the batches of `evaluation` with the same arguments."""
    return int(_evaluated(rows, batch_size, length, packing)[1][-1])


def _evaluated(
    rows: rows_of.Rows, batch_size: int, length: int, packing: bool
) -> tuple[order.Stream, np.ndarray]:
    """The rows as a stream, and the widths of its batches."""
    _check([rows], length)
    stream = mixtures.streams([rows], (), length, packing)[0]
    return stream, _widths([stream], batch_size, length, packing)


def _check(sources: Sequence[rows_of.Rows], length: int) -> None:
    for number, source in enumerate(sources):
        if not len(source):
            raise errors.UserError(
                f"source {number + 1} of {len(sources)} has no rows left to train on: leave it out of data.train"
            )
        untrained = np.flatnonzero(source.trained < 1)
        if len(untrained):
            row = source[int(untrained[0])]
            raise errors.UserError(
                f"{row.source}: has no token to train on; leave it out ({len(untrained)} of"
                f" {len(source)} rows have none)"
            )
        longest = int(source.lengths.argmax())
        if source.lengths[longest] > length:
            raise errors.UserError(
                f"{source[longest].source}: takes {source.lengths[longest]} positions, more than "
                f"data.max_length={length}; raise it, or set data.overlength to drop or "
                "truncate_prompt"
            )
    if not sources:
        raise errors.UserError("there are no rows to make batches of")


def _check_settings(batch_size: int, seed: int, host: int, hosts: int) -> None:
    if batch_size < 1:
        raise errors.UserError(f"batch_size={batch_size}: it must be at least 1")
    if seed < 0:
        raise errors.UserError(f"seed={seed}: it must not be negative")
    if not 0 <= host < hosts:
        raise errors.UserError(f"host {host} of {hosts}: hosts count from 0")
    if batch_size % hosts:
        raise errors.UserError(
            f"batch_size={batch_size} is not a multiple of the {hosts} hosts: use "
            f"{-(-batch_size // hosts) * hosts}"
        )


def _widths(
    streams: Sequence[order.Stream], batch_size: int, length: int, packing: bool
) -> np.ndarray:
    if packing:
        # A row that holds a whole stream needs no more.
        needed = max(int(stream.lengths.sum(dtype=np.int64)) for stream in streams)
        return np.array([widths.up(needed, length)])
    lengths = [stream.lengths for stream in streams]
    repeats = [stream.repeats for stream in streams]
    return widths.choose(widths.longest_of_batches(lengths, repeats, batch_size), length)


def _fill(held: Sequence[Sequence[rows_of.Row]], batch_size: int, width: int) -> Batch:
    names = ("tokens", "targets", "segments", "positions")
    batch: Batch = {name: np.zeros((batch_size, width), np.int32) for name in names}
    batch["weights"] = np.zeros((batch_size, width), np.float32)
    counted = np.arange(width, dtype=np.int32)
    for b, examples in enumerate(held):
        at = 0
        for segment, row in enumerate(examples, start=1):
            n = len(row.tokens) - 1
            place = (b, slice(at, at + n))
            batch["tokens"][place] = row.tokens[:-1]
            batch["targets"][place] = row.tokens[1:]
            batch["weights"][place] = row.trained[1:]
            batch["segments"][place] = segment
            batch["positions"][place] = counted[:n]
            at += n
    return batch
