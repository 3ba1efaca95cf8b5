# SPDX-License-Identifier: Apache-2.0
"""From numbers to codes and scales, and how much is lost."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jft import errors
from jft.quant import levels, qarray

KINDS = ("nf4", "int4", "int8")
BLOCK = 64
SCALES = 256  # that share a scale of their own, as in QLoRA
_LARGEST = {"nf4": 1, "int4": 7, "int8": 127, "dynamic8": 1}


def quantize(
    x: jax.Array,
    kind: str,
    *,
    axis: int = -1,
    block: int = BLOCK,
    double: bool = False,
    stacked: int = 0,
) -> qarray.QArray:
    """x in blocks along a dimension.

    Args:
      x: of finite floats.
      kind: one of KINDS.
      axis: the blocks' dimension: a weight's inputs, for figures as bitsandbytes has.
      block: elements that share a scale.
      double: the scales too are quantised, to 8 bits (NF4: 4.127 bits per weight instead of 4.5): less their mean, with
        a scale for up to 256 of them along x's last dimension.
      stacked: so many leading dimensions number arrays of their own, each with its own mean.

    Raises:
      UserError: the dimension is no multiple of the block, or the kind is unknown.
    """
    if kind not in KINDS:
        raise errors.UserError(f"quantize to {kind!r}: one of {', '.join(KINDS)}")
    at = axis % x.ndim
    if block % 2 or x.shape[at] % block:
        raise errors.UserError(
            f"quantize to {kind}: dimension {at} of {list(x.shape)} is no multiple of the block of {block} elements"
        )
    found = _blocks(x, kind, at, block)
    return dataclasses.replace(found, scales=doubled(found.scales, stacked)) if double else found


def doubled(scales: jax.Array, stacked: int = 0) -> qarray.QArray:
    """Scales quantised themselves; `double` and `stacked` of `quantize`."""
    mean = _mean(scales, stacked)
    small = _blocks(scales - mean, "dynamic8", scales.ndim - 1, _group(scales.shape[-1]))
    return dataclasses.replace(small, offsets=mean)


def _mean(x: jax.Array, stacked: int) -> jax.Array:
    """Over all but the leading dimensions, which stay, the others with length 1.

    Halves are added to halves: a reduction's order depends on the program that it is in, and a model quantised tensor by
    tensor would differ from one quantised whole.
    """
    lead, count = x.shape[:stacked], math.prod(x.shape[stacked:])
    sums = x.reshape(*lead, count)
    room = (1 << (count - 1).bit_length()) - count
    sums = jnp.pad(sums, [(0, 0)] * stacked + [(0, room)])
    while sums.shape[-1] > 1:
        half = sums.shape[-1] // 2
        sums = sums[..., :half] + sums[..., half:]
    mean = sums * np.float32(1 / count)  # a quotient is not the same on every backend
    return mean.reshape(*lead, *[1] * (x.ndim - stacked))


def _group(count: int) -> int:
    """The largest divisor of a number of scales that is at most SCALES."""
    return next(n for n in range(min(SCALES, count), 0, -1) if count % n == 0)


def _blocks(x: jax.Array, kind: str, at: int, block: int) -> qarray.QArray:
    lead, rest = x.shape[:at], x.shape[at + 1 :]
    blocks = x.astype(jnp.float32).reshape(*lead, -1, block, *rest)
    largest = jnp.abs(blocks).max(at + 1)
    # A product with the reciprocal, not a quotient: bitsandbytes' bits.
    unit = blocks * (1 / jnp.expand_dims(jnp.where(largest == 0, 1, largest), at + 1))
    codes = levels.nearest(unit, kind)
    if kind in qarray.PAIRED:
        high, low = jnp.split(codes, 2, at + 1)
        codes = high << 4 | low
    scales = largest * np.float32(1 / _LARGEST[kind])
    return qarray.QArray(
        codes.reshape(*lead, -1, *rest), scales, None, kind, at - x.ndim, block, x.dtype
    )


@dataclasses.dataclass(frozen=True)
class Loss:
    """What quantising cost.

    Attributes:
      bits: per weight, of codes and scales.
      relative: root mean square of the error over that of the values.
      largest: error, over the largest value.
      cosine: of the quantised and the true values.
    """

    bits: float
    relative: float
    largest: float
    cosine: float


def loss(x: Any, q: qarray.QArray) -> Loss:
    """How far a quantised array is from what it was made of."""
    want, got = np.asarray(x, np.float64), np.asarray(q.dequantize(), np.float64)
    error, length = got - want, np.linalg.norm(want)
    return Loss(
        bits=q.bits_per_weight,
        relative=float(np.linalg.norm(error) / length),
        largest=float(np.abs(error).max() / np.abs(want).max()),
        cosine=float((got * want).sum() / (length * np.linalg.norm(got))),
    )


def pairs(q: qarray.QArray) -> np.ndarray:
    """4-bit codes as bitsandbytes has them: uint8, neighbours along the blocks' dimension in a byte, the first one high.

    Of a QArray whose blocks run along its last dimension, flattened.
    """
    halves = np.asarray(q.codes).reshape(-1, q.block // 2)
    codes = np.concatenate([halves >> 4, halves & 15], axis=1).reshape(-1, 2)
    return codes[:, 0] << 4 | codes[:, 1]


def from_codes(
    codes: np.ndarray,
    scales: np.ndarray,
    offsets: np.ndarray | None,
    *,
    kind: str,
    axis: int,
    dtype: Any,
) -> qarray.QArray:
    """A QArray of codes that some other program chose, on the host.

    Args:
      codes: [..., n, ...]: uint8 0..15 of the 4-bit kinds, int8 of int8.
      scales, offsets: float [..., n / block, ...].
      kind: one of KINDS.
      axis: of n.
      dtype: of the values.
    """
    at = axis % codes.ndim
    block = codes.shape[at] // scales.shape[at]
    if kind in qarray.PAIRED:
        lead: Sequence[int] = codes.shape[:at]
        apart = codes.reshape(*lead, -1, 2, block // 2, *codes.shape[at + 1 :])
        high, low = np.moveaxis(apart, at + 1, 0)
        codes = (high << 4 | low).reshape(*lead, -1, *codes.shape[at + 1 :])
    return qarray.QArray(codes, scales, offsets, kind, at - codes.ndim, block, dtype)
