# SPDX-License-Identifier: Apache-2.0
"""MXFP4, in which gpt-oss publishes its experts: 4-bit floats in blocks of 32 that share a power of two.

The format is that of the OCP Microscaling specification 1.0: values E2M1, scales E8M0 (a biased exponent alone).
"""

import numpy as np

BLOCK = 32
_VALUES = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float32)
_TABLE = np.concatenate([_VALUES, -_VALUES])  # by the code's four bits, the sign first
_BIAS = 127


def dequantise(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The values, exactly.

    Args:
      blocks: uint8 [..., blocks, 16]; a byte's low four bits come first.
      scales: uint8 [..., blocks]; 2 ** (scale - 127). 255 is the format's not-a-number.

    Returns:
      float32 [..., blocks * 32].
    """
    codes = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*blocks.shape[:-1], BLOCK)
    power = np.ldexp(np.float32(1), np.minimum(scales, 254).astype(int) - _BIAS)
    power = np.where(scales == 255, np.float32(np.nan), power)
    values = _TABLE[codes] * power[..., None]
    return values.reshape(*blocks.shape[:-2], -1)


def experts(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Kernels of experts, one at a time: [E, out, blocks, 16] and [E, out, blocks] to float32 [E, in, out]."""
    count, outputs, blocks_per_row, _ = blocks.shape
    values = np.empty((count, blocks_per_row * BLOCK, outputs), np.float32)
    for own, packed, scale in zip(values, blocks, scales, strict=True):
        own[...] = dequantise(packed, scale).T
    return values
