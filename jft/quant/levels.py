# SPDX-License-Identifier: Apache-2.0
"""What the codes of each kind stand for: levels between -1 and 1, and the nearest level of a number.

NF4's levels are chosen by a tree of selects, which fuses with what reads them, on a GPU looked up in a table (a tenth faster); on a CPU a lookup takes the same time
(0.35 ns a weight). The 256 levels of scales are computed on a TPU alone: on a CPU XLA would do it
again for each of a block's weights (13 ns a weight).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# NF4's 16 levels, the quantiles of a normal distribution, as bitsandbytes has them in float32
# (QLoRA, https://arxiv.org/abs/2305.14314, appendix E).
NF4 = np.array(
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


def _dynamic() -> np.ndarray:
    """256 levels, denser towards 0: seven decades with 1, 2, 4 ... 64 even steps each, on both sides.

    bitsandbytes' dynamic map (https://arxiv.org/abs/1511.04561, section 2.2 is its origin), which it keeps the scales of double quantisation in.
    """
    positive = []
    for i in range(7):
        edges = np.linspace(0.1, 1, 2**i + 1, dtype=np.float32)
        positive.append(np.float32(10.0 ** (i - 6)) * (edges[:-1] + edges[1:]) / 2)
    levels = np.concatenate(positive)
    return np.sort(np.concatenate([-levels, [0.0], levels, [1.0]])).astype(np.float32)


DYNAMIC8 = _dynamic()


def nf4(codes: jax.Array) -> jax.Array:
    """Levels in float32 of codes 0..15."""
    looked_up = lambda codes: jnp.asarray(NF4)[codes.astype(jnp.int32)]  # noqa: E731
    return lax.platform_dependent(codes, cuda=looked_up, default=nf4_selected)


def nf4_selected(codes: jax.Array) -> jax.Array:
    """By a tree of selects over the codes' bits."""
    wide = codes.astype(jnp.int32)
    values = [jnp.float32(level) for level in NF4]
    for bit in range(4):
        chosen = (wide >> bit & 1) == 1
        values = [jnp.where(chosen, b, a) for a, b in zip(values[::2], values[1::2], strict=True)]
    return values[0]


def dynamic8(codes: jax.Array) -> jax.Array:
    """Levels in float32 of codes 0..255."""
    looked_up = lambda codes: jnp.asarray(DYNAMIC8)[codes]  # noqa: E731
    return lax.platform_dependent(codes, tpu=dynamic8_computed, default=looked_up)


def dynamic8_computed(codes: jax.Array) -> jax.Array:
    """The n-th level from zero lies on the line of its decade."""
    wide = codes.astype(jnp.int32) - 127
    n = jnp.abs(wide).astype(jnp.float32)
    level = jnp.zeros_like(n)
    for i in range(7):
        decade = 10.0 ** (i - 6)
        line = (n + (0.5 - 2**i)) * (0.9 * decade / 2**i) + 0.1 * decade
        level = jnp.where(n >= 2**i, line, level)
    level = jnp.where(n == 128, 1.0, level)
    return jnp.where(wide < 0, -level, level)


def apart(scales: jax.Array, axis: int) -> jax.Array:
    """The scales, made once. XLA on CPU would make each again for all weights of its block (13 ns a weight; so 0.5).

    It drops barriers before it fuses, but what a gather reads it does not fuse into it.
    """
    each = jnp.arange(scales.shape[axis])
    gathered = functools.partial(jnp.take, indices=each, axis=axis, mode="clip")
    return lax.platform_dependent(scales, cpu=gathered, default=lambda x: x)


def _int4(codes: jax.Array) -> jax.Array:
    return codes.astype(jnp.float32) - 8


def _plain(codes: jax.Array) -> jax.Array:
    return codes.astype(jnp.float32)


# float32 levels of codes (of which two are in a byte: apart, 0..15).
OF = {"nf4": nf4, "int4": _int4, "uint4": _plain, "int8": _plain, "dynamic8": dynamic8}


def nearest(x: jax.Array, kind: str) -> jax.Array:
    """Codes of numbers between -1 and 1; of two equally near levels of NF4, the lower one, as in bitsandbytes."""
    if kind == "int8":
        return jnp.round(x * 127).astype(jnp.int8)
    if kind == "int4":
        return (jnp.round(x * 7) + 8).astype(jnp.uint8)
    table = {"nf4": NF4, "dynamic8": DYNAMIC8}[kind]
    middles = (table[1:] + table[:-1]) / 2
    if kind == "dynamic8":
        return jnp.searchsorted(jnp.asarray(middles), x, side="left").astype(jnp.uint8)
    # Fifteen comparisons that vectorise, instead of a search.
    return sum(
        ((x > middle).astype(jnp.uint8) for middle in middles), jnp.zeros(x.shape, jnp.uint8)
    )
