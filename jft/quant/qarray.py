# SPDX-License-Identifier: Apache-2.0
"""An array kept in 4 or 8 bits: codes, and a scale for each block of elements along one dimension.

    value = level(code) * scale (+ offset)

Every array inside has the dimensions of the whole, but for those that blocks run along, which are shorter: so indexing,
scanning, sharding and gathering any other dimension is the same operation on each of them, and nothing is unpacked for it.

`nf4`   16 levels at the quantiles of a normal distribution, a block's scale its largest magnitude (QLoRA,
        https://arxiv.org/abs/2305.14314, section 3)
`int4`  -8..7; what `quantize` makes is symmetric, -7..7, a block's scale its largest magnitude / 7
`uint4`  0..15, with offsets: what GGUF's Q4_1 holds
`int8`  -128..127; likewise, -127..127
`dynamic8`  256 levels, denser towards zero: what double quantisation keeps the scales of NF4 in
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jft.quant import levels

PAIRED = ("nf4", "int4", "uint4")  # two codes in a byte


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "scales", "offsets"],
    meta_fields=["kind", "axis", "block", "dtype"],
)
@dataclasses.dataclass(frozen=True)
class QArray:
    """A quantised array [..., n, ...], n along `axis`.

    Attributes:
      codes: int8 (`int8`), uint8 (`dynamic8`) [..., n, ...], or uint8 [..., n / 2, ...] with two codes in a byte: element i
        of a block's first half in the high bits, element i of its second half in the low ones: unpacked, halves need not be
        interleaved, as neighbours would.
      scales: float [..., n / block, ...], or a QArray of them (double quantisation, section 3 of the paper).
      offsets: float, broadcast over the scales' shape, or None: added to the product (GGUF's Q4_1; the mean of the scales).
      kind: see above.
      axis: the blocks' dimension, a negative number, which stays right when leading dimensions go.
      block: elements that share a scale.
      dtype: of `dequantize()`.
    """

    codes: jax.Array
    scales: "jax.Array | QArray"
    offsets: jax.Array | None
    kind: str
    axis: int
    block: int
    dtype: Any

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.codes.shape)
        shape[self.axis] *= 2 if self.kind in PAIRED else 1
        return tuple(shape)

    @property
    def ndim(self) -> int:
        return self.codes.ndim

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self))

    @property
    def bits_per_weight(self) -> float:
        """Bits of all arrays for each element."""
        return 8 * self.nbytes / self.size

    @property
    def packed_axes(self) -> tuple[int, ...]:
        """The dimensions, as negative numbers, that are shorter in some array than in the whole."""
        inner = self.scales.packed_axes if isinstance(self.scales, QArray) else ()
        return tuple(sorted({self.axis, *inner}))

    @property
    def sharding(self) -> jax.sharding.Sharding:
        """Of the codes, whose dimensions are the array's but for a shorter one."""
        return self.codes.sharding

    def dequantize(self) -> jax.Array:
        """The values, computed in float32, in `dtype`."""
        at = self.codes.ndim + self.axis
        lead, rest = self.codes.shape[:at], self.codes.shape[at + 1 :]
        codes = self.codes
        if self.kind in PAIRED:
            codes = codes.reshape(*lead, -1, self.block // 2, *rest)
            ways = {"cuda": _shifted, "default": _stacked}
            codes = lax.platform_dependent(
                codes, **{k: functools.partial(f, axis=at + 1) for k, f in ways.items()}
            )
        codes = codes.reshape(*lead, -1, self.block, *rest)
        scales = self.scales
        if isinstance(scales, QArray):
            scales = levels.apart(scales.dequantize(), at)
        x = levels.OF[self.kind](codes) * jnp.expand_dims(scales.astype(jnp.float32), at + 1)
        if self.offsets is not None:
            x = x + jnp.expand_dims(self.offsets.astype(jnp.float32), at + 1)
        # Cast first: XLA on TPU would leave the cast to the product, and keep float32 for it.
        return x.astype(self.dtype).reshape(self.shape)


def _stacked(codes: jax.Array, axis: int) -> jax.Array:
    """[..., n / 2, ...] -> [..., n, ...]: the high bits of a block's bytes along the axis, then their low bits.

    Behind the barrier all is one pass from bytes to values; without it XLA on TPU takes the halves apart into float32 first,
    twice the memory and the traffic.
    """
    both = jnp.stack([codes >> 4, codes & 15], axis)
    return lax.optimization_barrier(lax.collapse(both, axis, axis + 2))


def _shifted(codes: jax.Array, axis: int) -> jax.Array:
    """Likewise, without joining two arrays, which on a GPU is a pass of its own.

    On an H100 the values of a kernel of 4096 x 14336 take 97 us instead of 230, a step of an 8B model 0.39 s instead of 0.43.
    """
    shifts = lax.broadcasted_iota(jnp.uint8, (2,) + (1,) * (codes.ndim - axis), 0)
    both = jnp.expand_dims(codes, axis) >> (4 - 4 * shifts) & 15
    return lax.collapse(both, axis, axis + 2)
