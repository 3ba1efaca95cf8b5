# SPDX-License-Identifier: Apache-2.0
"""An array kept in 4 or 8 bits: codes, and a scale for each block along the last dimension.

Every array inside has the dimensions of the whole, but for the last, which is shorter: so indexing, scanning and
sharding any dimension is the same operation on each of them, and nothing is unpacked for it.

`nf4`   16 levels at the quantiles of a normal distribution, two codes a byte, a block's scale its largest magnitude
        (QLoRA, https://arxiv.org/abs/2305.14314, appendix E). Bit-compatible with bitsandbytes on flattened arrays.
`int8`  -127..127, symmetric, a block's scale its largest magnitude / 127.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from jft import errors

KINDS = ("nf4", "int8")
BLOCK = 64

# The levels of bitsandbytes, in float32.
NF4_LEVELS = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    np.float32,
)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "scales"],
    meta_fields=["kind", "block", "dtype"],
)
@dataclasses.dataclass(frozen=True)
class QArray:
    """A quantised array.

    Attributes:
      codes: int8 [..., n], or uint8 [..., n / 2] with the even element in the high half.
      scales: float32 [..., n / block].
      kind: one of KINDS.
      block: elements that share a scale.
      dtype: of `dequantize()`.
    """

    codes: jax.Array
    scales: jax.Array
    kind: str
    block: int
    dtype: jnp.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        *rest, n = self.codes.shape
        return (*rest, 2 * n if self.kind == "nf4" else n)

    @property
    def ndim(self) -> int:
        return self.codes.ndim

    @property
    def size(self) -> int:
        return self.codes.size * (2 if self.kind == "nf4" else 1)

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes

    @property
    def sharding(self) -> jax.sharding.Sharding:
        """Of the codes, whose dimensions are the array's but for a shorter last one."""
        return self.codes.sharding

    def dequantize(self) -> jax.Array:
        """The values, in `dtype`."""
        if self.kind == "nf4":
            nibbles = jnp.stack([self.codes >> 4, self.codes & 15], axis=-1)
            units = jnp.asarray(NF4_LEVELS)[nibbles]
        else:
            units = self.codes.astype(jnp.float32)
        blocks = units.reshape(*self.scales.shape, self.block)
        return (blocks * self.scales[..., None]).reshape(self.shape).astype(self.dtype)


def quantize(x: jax.Array, kind: str, *, block: int = BLOCK) -> QArray:
    """x in blocks of `block` elements along its last dimension.

    Raises:
      UserError: the last dimension is no multiple of the block, or the kind is unknown.
    """
    if kind not in KINDS:
        raise errors.UserError(f"quantize to {kind!r}: one of {', '.join(KINDS)}")
    if x.shape[-1] % block or block % 2:
        raise errors.UserError(
            f"quantize: a last dimension of {x.shape[-1]} is no multiple of the block of {block} elements"
        )
    blocks = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, block)
    largest = jnp.abs(blocks).max(-1)
    if kind == "int8":
        scales = largest / 127
        codes = jnp.round(blocks / jnp.where(scales == 0, 1, scales)[..., None]).astype(jnp.int8)
        return QArray(codes.reshape(x.shape), scales, kind, block, x.dtype)
    units = blocks * (1 / jnp.where(largest == 0, 1, largest))[..., None]
    middles = jnp.asarray((NF4_LEVELS[1:] + NF4_LEVELS[:-1]) / 2)
    # Ties go down, as in bitsandbytes.
    codes = jnp.searchsorted(middles, units, side="left").astype(jnp.uint8).reshape(x.shape)
    pairs = codes.reshape(*x.shape[:-1], -1, 2)
    return QArray((pairs[..., 0] << 4) | pairs[..., 1], largest, kind, block, x.dtype)
