# SPDX-License-Identifier: Apache-2.0
"""Attention of one layer in training: by the layer's kind, and on a mesh by each device's rows, heads and positions."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from jft import sharding
from jft.models import architecture, attention


def attend(
    c: architecture.Config,
    kind: jax.Array,
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segments_BT: jax.Array,
    sinks_N: jax.Array | None,
    *,
    implementation: str,
    layout: sharding.Layout | None,
) -> jax.Array:
    """attended_BTNH.

    Args:
      c: the configuration.
      kind: the number of the layer's kind.
      q_BTNH, k_BTKH, v_BTKH: heads, rotated.
      segments_BT: attention stays within one.
      sinks_N: see `attention.attend`.
      implementation: see `attention.choose`.
      layout: of the mesh; None on one device.
    """
    windows = list(dict.fromkeys(layer.window for layer in c.kinds))
    branches = [
        functools.partial(_windowed, c, window, implementation, layout) for window in windows
    ]
    inputs = (q_BTNH, k_BTKH, v_BTKH, segments_BT, sinks_N)
    if len(branches) == 1:
        return branches[0](*inputs)
    # A window is part of a kernel's program: each has its own branch.
    of_kind = jnp.array([windows.index(layer.window) for layer in c.kinds])
    return lax.switch(of_kind[kind], branches, *inputs)


def _windowed(
    c: architecture.Config,
    window: int | None,
    implementation: str,
    layout: sharding.Layout | None,
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segments_BT: jax.Array,
    sinks_N: jax.Array | None,
) -> jax.Array:
    run = functools.partial(attention.attend, c, window=window, implementation=implementation)
    if layout is None:
        return run(q_BTNH, k_BTKH, v_BTKH, segments_BT, segments_BT, sinks_N=sinks_N)
    rows, along = layout.used(sharding.ROWS), layout.used(("context",))
    heads = layout.used(("tensor",))

    def local(q: Any, k: Any, v: Any, segments: Any, sinks: Any) -> jax.Array:
        """Of this device's queries, to the keys of the whole row."""
        if not along:
            return run(q, k, v, segments, segments, sinks_N=sinks)
        k, v, whole = (lax.all_gather(x, along, axis=1, tiled=True) for x in (k, v, segments))
        start = lax.axis_index(along) * q.shape[1]
        return run(q, k, v, segments, whole, start=start, sinks_N=sinks)

    split = P(rows, along, heads, None)
    return jax.shard_map(
        local,
        mesh=layout.mesh,
        in_specs=(split, split, split, P(rows, along), P(heads)),
        out_specs=split,
        check_vma=False,  # Pallas calls don't say over which axes their results vary
    )(q_BTNH, k_BTKH, v_BTKH, segments_BT, sinks_N)
