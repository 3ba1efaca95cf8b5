# SPDX-License-Identifier: Apache-2.0
"""Gives back the memory of mapped files that has been read.

Pages of a memory map count as this process's resident memory until they are released. A model read through one map
would be there twice, once as pages and once as parameters.
"""

import mmap
from typing import Any

import numpy as np


def release(array: np.ndarray) -> None:
    """Drops the resident pages under a view of a read-only memory map; they are read again when touched.

    An array that owns its memory, or has it from elsewhere, is left alone.
    """
    mapped, start = _mapping(array)
    if mapped is None or not hasattr(mmap, "MADV_DONTNEED"):  # Windows has no madvise
        return
    low, high = np.lib.array_utils.byte_bounds(array)
    first = (low - start) // mmap.PAGESIZE * mmap.PAGESIZE
    mapped.madvise(mmap.MADV_DONTNEED, first, high - start - first)


def _mapping(array: np.ndarray) -> tuple[mmap.mmap | None, int]:
    """The read-only map that an array is a view of, and the address where it begins."""
    base: Any = array
    while isinstance(base, np.ndarray):
        root, base = base, base.base
    if isinstance(base, memoryview):
        base = base.obj
    # Unwritten changes would be lost; a root that is not the whole map would give a wrong address.
    if not isinstance(base, mmap.mmap) or root.flags.writeable or root.nbytes != len(base):
        return None, 0
    return base, root.ctypes.data
