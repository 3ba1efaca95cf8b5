# SPDX-License-Identifier: Apache-2.0
"""Holding out rows for validation, by content.

Rows with the same prompt, or that are near duplicates, stay together, so that no validation prompt
was seen in training. The choice depends on the prompts and the seed alone: shuffling the file does
not change it.
"""

import hashlib
from collections.abc import Sequence

import numpy as np

from jft import errors
from jft.data import examples, near


def prompt_key(example: examples.Example, seed: int) -> bytes:
    """16 bytes for what the answer answers; case, spacing and punctuation do not tell two prompts apart.

    That is all but the last turn, and of a plain text, which has no answer, all of it.
    """
    words = near.turn_words(example)
    said = "\n".join([str(seed), *(" ".join(turn) for turn in words[:-1] or words)])
    return hashlib.blake2b(said.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def held_out(keys: Sequence[bytes], groups: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Which rows are for validation.

    Args:
        keys: of the rows' prompts.
        groups: int64 [n], of the rows' near duplicates.
        fraction: of the rows to hold out, at most and as nearly as whole groups allow; at least one
            group where there are two or more and the fraction is not 0.

    Returns:
        bool [n].

    Raises:
        errors.UserError: the fraction is not in [0, 1), or all rows belong together.
    """
    if not 0 <= fraction < 1:
        raise errors.UserError(
            f"the validation fraction is {fraction}; it must be at least 0 and below 1"
        )
    if fraction == 0 or len(keys) < 2:
        return np.zeros(len(keys), bool)
    together = _together(keys, np.asarray(groups))
    sizes = np.bincount(together)
    if len(sizes) == 1:
        same = "have the same prompt" if len(set(keys)) == 1 else "are near duplicates"
        raise errors.UserError(
            f"all {len(keys)} rows {same}, so none can be held out; "
            "give a validation file with data.valid=FILE"
        )
    order = _order(keys, together, len(sizes), seed)
    return _choose(sizes, order, max(1, round(fraction * len(keys))))[together]


def _together(keys: Sequence[bytes], groups: np.ndarray) -> np.ndarray:
    """int [n]: a number for each set of rows that equal keys or groups join, directly or by others."""
    import scipy.sparse

    numbers: dict[bytes, int] = {}
    of_key = np.array([numbers.setdefault(key, len(numbers)) for key in keys])
    _, of_group = np.unique(groups, return_inverse=True)
    nodes = len(numbers) + int(of_group.max()) + 1
    ends = (of_key, len(numbers) + of_group)
    graph = scipy.sparse.coo_array((np.ones(len(keys), bool), ends), shape=(nodes, nodes))
    _, component = scipy.sparse.csgraph.connected_components(graph, directed=False)
    return component[of_key]


def _order(keys: Sequence[bytes], together: np.ndarray, count: int, seed: int) -> list[int]:
    """The sets in random order: by the hash of their least key, which no order of rows changes."""
    least: list[bytes | None] = [None] * count
    for key, number in zip(keys, together.tolist(), strict=True):
        known = least[number]
        least[number] = key if known is None else min(known, key)
    hashes = [hashlib.sha256(b"%d %s" % (seed, key or b"")).digest() for key in least]
    return sorted(range(count), key=hashes.__getitem__)


def _choose(sizes: np.ndarray, order: list[int], target: int) -> np.ndarray:
    """Which sets are held out: in their order, those that still fit, but never all of them."""
    held = np.zeros(len(sizes), bool)
    room, left = target, len(sizes)
    for number in order:
        if sizes[number] <= room and left > 1:
            held[number] = True
            room -= sizes[number]
            left -= 1
    if not held.any():
        held[min(order, key=sizes.__getitem__)] = True
    return held
