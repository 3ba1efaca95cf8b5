# SPDX-License-Identifier: Apache-2.0
"""The compiled programs that read a model's probabilities of given tokens.

As in training, logits exist for a chunk of positions at a time, and only where the batch has a weight. What is read of a
chunk's log-probabilities is a function, so that likelihoods and the distance from the base share one program's shape.

Letters in names: see `jft.models.architecture`; M positions of a chunk.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jft import lora, losses
from jft.models import architecture, decoder

Batch = dict[str, Any]
# (log-probabilities [M, V], of each position what the batch's other arrays hold) -> arrays [M, ...]
Read = Callable[..., Any]


def reader(
    c: architecture.Config,
    read: Read,
    *,
    how: decoder.Execution = decoder.SIMPLE,
    chunk: int = losses.CHUNK,
    mode: str = "factored",
) -> Any:
    """The jitted program: (params, adapters, batch, *extras [B, T, ...]) -> what `read` gives, [B, T, ...].

    Args:
      c: of the decoder.
      read: read(logprobs_MV, targets_M, *extras) -> a tree of arrays [M, ...]; 0 where the batch's weight is 0.
      how: it is computed.
      chunk: positions at a time, see `losses.chunk_size`.
      mode: of the adapters' products, see `lora.MODES`.
    """

    def run(params: decoder.Params, batch: Batch, *extras: jax.Array) -> Any:
        inputs = (batch["tokens"], batch["positions"], batch["segments"])
        x_BTD = decoder.hidden(c, params, *inputs, how=how)
        logits = functools.partial(decoder.head, c, params)
        return _over_chunks(
            logits, read, x_BTD, batch["weights"], (batch["targets"], *extras), chunk
        )

    # Every process reads all of it.
    everywhere = None if how.layout is None else how.layout.replicated
    return jax.jit(lora.transform(run, mode=mode), out_shardings=everywhere)


def _over_chunks(
    logits: Callable[[jax.Array], jax.Array],
    read: Read,
    x_BTD: jax.Array,
    weights_BT: jax.Array,
    given: tuple[jax.Array, ...],
    chunk: int,
) -> Any:
    """What `read` gives at positions with a weight, zeros elsewhere."""
    B, T, D = x_BTD.shape
    chunk = min(chunk, B * T)
    x_MD = x_BTD.reshape(B * T, D)
    given = tuple(g.reshape(B * T, *g.shape[2:]) for g in given)
    # Those with a weight first; what fills the last chunk up is the first position, read again to the same end.
    order = jnp.pad(jnp.argsort(weights_BT.reshape(-1) == 0, stable=True), (0, -B * T % chunk))
    count = (jnp.sum(weights_BT != 0) + chunk - 1) // chunk

    def at(i: jax.Array) -> tuple[jax.Array, Any]:
        places = lax.dynamic_slice_in_dim(order, i * chunk, chunk)
        wide = logits(x_MD[places])
        wide = wide.astype(jnp.promote_types(wide.dtype, jnp.float32))
        return places, read(jax.nn.log_softmax(wide, axis=-1), *(g[places] for g in given))

    def body(i: jax.Array, found: Any) -> Any:
        places, new = at(i)
        return jax.tree.map(lambda all_, some: all_.at[places].set(some), found, new)

    shapes = jax.eval_shape(at, jnp.zeros((), jnp.int32))[1]
    empty = jax.tree.map(lambda s: jnp.zeros((B * T, *s.shape[1:]), s.dtype), shapes)
    found = lax.fori_loop(0, count, body, empty)
    there = (weights_BT != 0).reshape(-1)
    return jax.tree.map(
        lambda f: jnp.where(there.reshape(-1, *(1,) * (f.ndim - 1)), f, 0).reshape(
            B, T, *f.shape[1:]
        ),
        found,
    )


def of_targets(logprobs_MV: jax.Array, targets_M: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Log-probability of each target, and whether none is likelier."""
    own_M = jnp.take_along_axis(logprobs_MV, targets_M[:, None], axis=-1)[:, 0]
    return own_M, jnp.argmax(logprobs_MV, axis=-1) == targets_M


def likeliest(
    count: int, logprobs_MV: jax.Array, targets_M: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log-probability of each target, and those and the ids of the `count` likeliest tokens."""
    values_MK, ids_MK = lax.top_k(logprobs_MV, count)
    return of_targets(logprobs_MV, targets_M)[0], values_MK, ids_MK


def of_ids(
    logprobs_MV: jax.Array, targets_M: jax.Array, ids_MK: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Log-probability of each target, and those of given tokens."""
    return of_targets(logprobs_MV, targets_M)[0], jnp.take_along_axis(logprobs_MV, ids_MK, axis=-1)
