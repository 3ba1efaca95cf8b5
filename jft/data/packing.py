# SPDX-License-Identifier: Apache-2.0
"""Several examples in one row of a batch, so that little of it is padding.

Best fit decreasing: the longest first, each into the fullest bin that still holds it.
"""

from collections.abc import Sequence

from jft import errors


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Assigns each length to a bin.

    The free spaces in use are the bits of one integer, so the best bin is found by a shift: n log n
    for the sort and capacity / 64 machine words per item.

    Args:
        lengths: at least 1 each.
        capacity: the most that the lengths in a bin may add up to.

    Returns:
        Bins of indices into `lengths`. The bins' shape depends only on the lengths as a set with
        repetitions; equal lengths are taken in the order given.

    Raises:
        errors.UserError: a length is below 1 or over the capacity.
    """
    for index, length in enumerate(lengths):
        if not 1 <= length <= capacity:
            raise errors.UserError(
                f"example {index} takes {length} positions, but a row holds 1 to {capacity}; "
                "raise data.max_length or set data.overlength"
            )
    bins: list[list[int]] = []
    by_space: dict[int, list[int]] = {}  # free space -> bins with exactly that much
    spaces = 0  # bit s is set while by_space[s] is not empty
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):  # stable
        length = int(lengths[index])
        fitting = spaces >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            chosen = by_space[space].pop()
            if not by_space[space]:
                spaces ^= 1 << space
        else:
            space, chosen = capacity, len(bins)
            bins.append([])
        bins[chosen].append(index)
        left = space - length
        if left:
            by_space.setdefault(left, []).append(chosen)
            spaces |= 1 << left
    return bins
