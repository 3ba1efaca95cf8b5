# SPDX-License-Identifier: Apache-2.0
"""Sums of arrays that tell whether what was restored is what was saved, bit for bit.

Each element's bits, as 32-bit words, are multiplied by an odd number that depends on the element's place, and added up
modulo 2^32; twice, with other numbers. Addition is associative and commutative here, so the sums are the same however
the array lies on devices and processes. A change of one bit changes both with certainty, for an odd number times a power
of two is not 0 modulo 2^32; any other change, exchanged elements too, passes with a probability of about 2^-63.
They find damage; they are no signature.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jft import hosts, tree

_SEEDS = (0x9E3779B9, 0x7F4A7C15)


def of(values: Any) -> dict[str, str]:
    """{path: 16 hexadecimal digits} of a tree of arrays; every process of several calls it, and gets the same.

    Each device adds up what lies on it, without a word to the others: many small programs that wait for each other can
    do so for ever.
    """
    leaves = tree.flatten(values)
    parts = jax.device_get([_of_parts(x) for x in leaves.values()])
    mine = np.array([np.sum(p, axis=0, dtype=np.uint32) for p in parts], np.uint32)
    if hosts.several():
        mine = np.sum(hosts.gather(mine), axis=0, dtype=np.uint32)
    return {p: f"{one:08x}{two:08x}" for p, (one, two) in zip(leaves, mine.tolist(), strict=True)}


def _of_parts(x: jax.Array) -> list[jax.Array]:
    """[2] of each part of the array on this process's devices, each part of the array on one of all."""
    parts = [shard for shard in x.addressable_shards if shard.replica_id == 0]
    nothing = [jnp.zeros(2, jnp.uint32)]
    return nothing + [_sums(s.data, _begin(s.index), x.shape) for s in parts]


def _begin(index: tuple[slice, ...]) -> np.ndarray:
    return np.array([part.start or 0 for part in index], np.uint64).astype(np.uint32)


def differing(values: Any, expected: dict[str, str]) -> list[str]:
    """Paths of arrays whose sums are not those expected."""
    found = of(values)
    return sorted(p for p in found.keys() | expected.keys() if found.get(p) != expected.get(p))


@functools.partial(jax.jit, static_argnames="whole")
def _sums(part: jax.Array, begin: jax.Array, whole: tuple[int, ...]) -> jax.Array:
    """Of a part that begins at this index of an array of that shape."""
    words = _words(part)
    place = _places(part.shape, begin, whole)[..., None] * jnp.uint32(words.shape[-1])
    place += lax.iota(jnp.uint32, words.shape[-1])
    # dtype: jnp.sum of uint32 would be uint64 where that is enabled.
    sums = [jnp.sum(words * (_mixed(place, s) | 1), dtype=jnp.uint32) for s in _SEEDS]
    return jnp.stack(sums)


def _words(x: jax.Array) -> jax.Array:
    """The bits of x as uint32 [..., words of an element]."""
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)[..., None]
    size = x.dtype.itemsize
    if size >= 4:
        words = lax.bitcast_convert_type(x, jnp.uint32)
        return words if size > 4 else words[..., None]
    narrow = lax.bitcast_convert_type(x, jnp.uint8 if size == 1 else jnp.uint16)
    return narrow.astype(jnp.uint32)[..., None]


def _places(shape: tuple[int, ...], begin: jax.Array, whole: tuple[int, ...]) -> jax.Array:
    """The flat index in the whole array of each element of a part, modulo 2^32."""
    place, stride = jnp.zeros(shape, jnp.uint32), 1
    for axis in reversed(range(len(shape))):
        index = lax.broadcasted_iota(jnp.uint32, shape, axis) + begin[axis]
        place, stride = place + index * jnp.uint32(stride % 2**32), stride * whole[axis]
    return place


def _mixed(place: jax.Array, seed: int) -> jax.Array:
    """A bijection of 32-bit numbers that spreads neighbours far apart (the finaliser of MurmurHash3)."""
    h = place ^ jnp.uint32(seed)
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return h ^ (h >> 16)
