# SPDX-License-Identifier: Apache-2.0
"""Row widths for batches that are not packed: few, since each is a program to compile, and as tight as few can be."""

from collections.abc import Sequence

import numpy as np

# At most so many, and one more only where it saves so much of the positions: measured on dolly and GSM8K, rows take 28 %
# and 14 % padding with five widths, 24 % and 11 % with six, 20 % and 10 % with seven.
MOST, SAVING = 6, 0.02
MULTIPLE = 8  # of positions


def up(length: int, limit: int) -> int:
    """The width of a row for so many positions."""
    return min(limit, -(-length // MULTIPLE) * MULTIPLE)


def choose(
    lengths: Sequence[np.ndarray], repeats: Sequence[float], limit: int, most: int = MOST
) -> np.ndarray:
    """The widths, at most `most`, with which rows take the fewest positions, each in the least that holds it.

    By dynamic programming over the multiples of 8 that occur, so exactly, but for rows that a batch of longer ones takes
    in to be full.

    Args:
        lengths: of the rows of each stream.
        repeats: how often each stream's rows stand in an epoch.
        limit: the largest width there may be.
        most: widths.

    Returns:
        int64, ascending.
    """
    rows = np.zeros(-(-limit // MULTIPLE) + 1)
    for values, times in zip(lengths, repeats, strict=True):
        rows += times * np.bincount(-(-values // MULTIPLE), minlength=len(rows))
    occurring = np.flatnonzero(rows)
    widths = np.minimum(occurring * MULTIPLE, limit)
    before = np.concatenate([[0], np.cumsum(rows[occurring])])  # rows narrower than width i
    cost = before[1:] * widths  # positions for the rows of widths 0 to i, where i is the last of k
    back = []
    for _ in range(min(most, len(widths)) - 1):
        more, last = _one_more(cost, before, widths)
        if more[-1] > (1 - SAVING) * cost[-1]:
            break
        cost = more
        back.append(last)
    chosen = [len(widths) - 1]
    for last in reversed(back):
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
