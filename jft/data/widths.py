# SPDX-License-Identifier: Apache-2.0
"""Row widths for batches that are not packed: few, since each is a program to compile, and as tight as few can be."""

from collections.abc import Sequence

import numpy as np

# At most so many, and one more only where it saves so much of the positions: dolly has 28, 24 and 20 % padding with five,
# six and seven widths, GSM8K 14, 11 and 10 %.
MOST, SAVING = 6, 0.02
MULTIPLE = 8  # of positions


def up(length: int, limit: int) -> int:
    """The width of a row for so many positions."""
    return min(limit, -(-length // MULTIPLE) * MULTIPLE)


def longest_of_batches(
    lengths: Sequence[np.ndarray], repeats: Sequence[float], batch_size: int
) -> np.ndarray:
    """The longest row of each batch of an epoch, where batches are cut from the rows in order of length.

    Args:
        lengths: of the rows of each stream.
        repeats: how often each stream's rows stand in an epoch; with fractions, the result is the mean epoch's.
        batch_size: rows.
    """
    all_lengths = np.concatenate(list(lengths))
    times = np.repeat(repeats, [len(values) for values in lengths])
    order = np.argsort(-all_lengths.astype(np.int64), kind="stable")
    before = np.cumsum(times[order])  # rows of the epoch up to and with each
    starts = np.arange(0, before[-1], batch_size)
    return all_lengths[order[np.searchsorted(before, starts, side="right")]]


def choose(longest: np.ndarray, limit: int, most: int = MOST) -> np.ndarray:
    """The widths, at most `most`, with which batches take the fewest positions, each in the least that holds it.

    Exact, by dynamic programming over the multiples of 8 that occur.

    Args:
        longest: the longest row of each batch.
        limit: the largest width there may be.
        most: widths.

    Returns:
        int64, ascending.
    """
    found, counts = np.unique(-(-longest // MULTIPLE), return_counts=True)
    widths = np.minimum(found.astype(np.int64) * MULTIPLE, limit)
    before = np.concatenate([[0], np.cumsum(counts)])  # batches narrower than width i
    cost = (
        before[1:] * widths
    )  # positions of the batches of widths 0 to i, where i is the last of those chosen
    below = []
    for _ in range(min(most, len(widths)) - 1):
        less, last = _one_more(cost, before, widths)
        if less[-1] > (1 - SAVING) * cost[-1]:
            break
        cost = less
        below.append(last)
    chosen = [len(widths) - 1]
    for last in reversed(below):
        if last[chosen[-1]] >= 0:
            chosen.append(int(last[chosen[-1]]))
    return widths[chosen[::-1]]


def _one_more(
    cost: np.ndarray, before: np.ndarray, widths: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Costs with one width more at most, and the width below the last; -1 where one more saves nothing."""
    least, last = cost.copy(), np.full(len(widths), -1)
    for i in range(1, len(widths)):
        found = cost[:i] + (before[i + 1] - before[1 : i + 1]) * widths[i]
        j = int(found.argmin())
        if found[j] < least[i]:
            least[i], last[i] = found[j], j
    return least, last
