# SPDX-License-Identifier: Apache-2.0
"""Trees between a host's memory and devices, also where those belong to several processes."""

import functools
import math
from typing import Any

import jax
import numpy as np
from jax import lax

from jft import hosts

# Of a leaf on its way to the lead's host: so much of it is on every device at once, beside the run's own arrays.
PIECE_BYTES = 1 << 28


def to_lead(tree: Any) -> Any:
    """The tree where process 0 can read it all; every process calls it.

    Leaves that lie on devices of other processes become numpy arrays, one after the other and each in pieces. On other
    processes these are None.
    """
    return jax.tree.map(_to_lead, tree)


def _to_lead(leaf: Any) -> Any:
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
        return leaf
    if leaf.is_fully_replicated or not leaf.ndim:
        return np.asarray(leaf) if hosts.lead() else None
    everywhere = jax.NamedSharding(leaf.sharding.mesh, jax.P())
    size = leaf.shape[0]
    row = math.prod(leaf.shape[1:]) * leaf.dtype.itemsize
    count = min(max(1, PIECE_BYTES // max(row, 1)), size)
    whole = np.empty(leaf.shape, leaf.dtype) if hosts.lead() else None
    for start in range(0, size, count):
        start = min(start, size - count)  # the last piece begins earlier: one program does for all
        piece = jax.block_until_ready(_piece(count, everywhere)(leaf, start))
        if whole is not None:
            whole[start : start + count] = np.asarray(piece)
    return whole


@functools.cache
def _piece(count: int, sharding: jax.sharding.Sharding) -> Any:
    """What takes `count` rows of a leaf and puts them on every device."""

    def cut(x: jax.Array, start: int) -> jax.Array:
        return lax.dynamic_slice_in_dim(x, start, count)

    return jax.jit(cut, out_shardings=sharding)


def to_devices(tree: Any, shardings: Any) -> Any:
    """A tree that every process holds whole, on the devices; each process sends what its own devices need."""

    def place(leaf: Any, sharding: jax.sharding.Sharding) -> jax.Array:
        whole = np.asarray(leaf)
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    return jax.tree.map(place, tree, shardings)
