# SPDX-License-Identifier: Apache-2.0
"""Which blocks of scores hold anything to see: known from lengths, start and window, before any segment is."""

import numpy as np


def pairs(
    queries: int, keys: int, block_q: int, block_k: int, start: int, window: int | None
) -> np.ndarray:
    """[P, 2]: the pairs (block of queries, block of keys) that are not masked throughout, by blocks of queries.

    Args:
      queries, keys: lengths; the last blocks may be shorter.
      block_q, block_k: lengths of blocks.
      start: index of the first query among the keys.
      window: how many keys a query sees, its own included.
    """
    first_I = start + np.arange(0, queries, block_q)
    last_I = np.minimum(first_I + block_q, start + queries) - 1
    first_J = np.arange(0, keys, block_k)
    last_J = np.minimum(first_J + block_k, keys) - 1
    seen_IJ = first_J <= last_I[:, None]
    if window is not None:
        seen_IJ &= first_I[:, None] - last_J < window
    return np.argwhere(seen_IJ)
