# SPDX-License-Identifier: Apache-2.0
"""Several sources by weight: how often each one's rows stand in an epoch, as streams of bins (see `order`)."""

import math
from collections.abc import Sequence

import numpy as np

from jft import errors
from jft.data import order
from jft.data import packing as bins_of
from jft.data import rows as rows_of

MOST_BINS = 2**31  # in an epoch: a weight beyond it is a mistake


def streams(
    sources: Sequence[rows_of.Rows], weights: Sequence[float], length: int, packing: bool
) -> list[order.Stream]:
    """Sources of one whole weight together, the others each by itself.

    A whole weight puts every row into every epoch equally often, whatever it is packed with. Fractions of several
    sources together would give an epoch more of one source and less of another by chance.

    Args:
        sources: none is empty.
        weights: one for each source, or none where all are 1.
        length: positions in a row of a batch.
        packing: whether several rows may share one.

    Raises:
        errors.UserError: a weight can't be used.
    """
    together: dict[tuple[float, int], list[int]] = {}
    for number, weight in enumerate(_checked(weights, len(sources))):
        key = (weight, 0 if weight.is_integer() else number)
        together.setdefault(key, []).append(number)
    starts = np.cumsum([0] + [len(source) for source in sources])
    made = []
    for (weight, _), numbers in together.items():
        rows = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in numbers])
        lengths = np.concatenate([sources[i].lengths for i in numbers])
        bins = _bins(lengths, length, packing)
        taken = _taken(weight, numbers, bins)
        made.append(order.Stream(tuple(numbers), rows, lengths, bins, taken))
    return made


def _bins(lengths: np.ndarray, length: int, packing: bool) -> bins_of.Bins:
    """Of places in the order of decreasing length."""
    return bins_of.pack(-np.sort(-lengths), length) if packing else bins_of.singles(len(lengths))


def _taken(weight: float, numbers: Sequence[int], bins: bins_of.Bins) -> int:
    taken = round(weight * len(bins))
    if not 1 <= taken < MOST_BINS:
        bound = (
            f"at least {1 / len(bins):.2g}" if taken < 1 else f"at most {MOST_BINS // len(bins)}"
        )
        raise errors.UserError(
            f"data.weights: {weight:g} for source {numbers[0]} takes {taken:.3g} of its {len(bins)} "
            f"rows of a batch in an epoch: give {bound}"
        )
    return taken


def _checked(weights: Sequence[float], sources: int) -> list[float]:
    if not weights:
        return [1.0] * sources
    if len(weights) != sources:
        raise errors.UserError(
            f"data.weights has {len(weights)} numbers for {sources} sources: give one for each, or none"
        )
    for number, weight in enumerate(weights):
        if not (math.isfinite(weight) and weight > 0):
            raise errors.UserError(
                f"data.weights: {weight:g} for source {number}: give a number above 0, or leave the"
                " source out"
            )
    return [float(weight) for weight in weights]
