# SPDX-License-Identifier: Apache-2.0
"""A fingerprint of a model's weights: the same for the same tensors, however they lie in files.

An adapter remembers the fingerprint of the base it was trained on. Hashing every byte of a 100 GB
model would take minutes at each start, so up to 64 blocks of 4 KiB are hashed per tensor, evenly
spaced: 256 KiB a tensor, whatever its size. Training moves nearly every weight of a tensor that it
touches, so any retrained tensor is caught; a single flipped bit in a large tensor may not be. It
identifies a model; it is no checksum against damage and no signature.
"""

import hashlib
from collections.abc import Mapping

import numpy as np

from jft.models import pages

_BLOCKS, _BLOCK = 64, 4096


def compute(tensors: Mapping[str, tuple[str, tuple[int, ...], np.ndarray]]) -> str:
    """The fingerprint of a set of tensors.

    Args:
      tensors: by name: the dtype as the file spells it, the shape, and the stored bytes as a flat
        uint8 array (a memory map will do: only the hashed blocks are read).

    Returns:
      "sha256:" and the first 32 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        dtype, shape, raw = tensors[name]
        # Lengths go in too, so that no two lists of tensors give the same stream of bytes.
        header = f"{name}\n{dtype}\n{','.join(map(str, shape))}\n{raw.size}\n".encode()
        digest.update(len(header).to_bytes(8, "little") + header)
        for start in _starts(raw.size):
            digest.update(raw[start : start + _BLOCK])
        pages.release(raw)
    return f"sha256:{digest.hexdigest()[:32]}"


def _starts(size: int) -> list[int]:
    """Where the hashed blocks begin; the first and the last byte are always in one."""
    if size <= _BLOCKS * _BLOCK:
        return list(range(0, size, _BLOCK))
    return [block * (size - _BLOCK) // (_BLOCKS - 1) for block in range(_BLOCKS)]
