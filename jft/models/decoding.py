# SPDX-License-Identifier: Apache-2.0
"""Decoding with a cache of keys and values: `prefill` reads prompts, `step` adds one token to each row.

Layers that see a window keep a window: their part of the cache is a ring in which position p lies in slot p modulo
its length. Rows are told apart by positions alone, so prompts may be padded on either side. Weights stay stacked and
are read in place, one layer at a time.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jft.models import architecture, attention, decoder, layers, rope


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["keys", "values"],
    meta_fields=["stretched"],
)
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values so far.

    Attributes:
      keys: [layers of the kind, B, K, H, slots] for each of the model's kinds of layers.
      values: likewise [.., B, K, slots, H]. So each product reads them as they lie: in another order XLA on CPU turns
        the whole cache at every token (38 ms instead of 7.5 for 8 rows of 256 slots of SmolLM2-135M).
      stretched: whether LongRoPE's divisors for long sequences hold: decided once for prompt and answer together, for
        keys in the cache cannot be turned again.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    stretched: bool


def init_cache(
    c: architecture.Config, batch: int, slots: int, dtype: Any, *, length: int | None = None
) -> Cache:
    """A cache of nothing yet.

    Args:
      c: the model.
      batch: rows.
      slots: the most positions that a row can get to; layers with a window keep no more than it.
      dtype: of keys and values: that of the activations.
      length: how many positions the longest row will read, where `slots` is more than that.
    """
    counts = [0] * len(c.kinds)
    for index in range(c.num_layers):
        counts[c.kind(index)] += 1
    K, H = c.num_kv_heads, c.head_dim
    kept = [min(slots, kind.window or slots) for kind in c.kinds]
    sizes = list(zip(counts, kept, strict=True))
    long = rope.needs_lengths(c) and (length or slots) > rope.original_length(c)
    return Cache(
        tuple(jnp.zeros((count, batch, K, H, S), dtype) for count, S in sizes),
        tuple(jnp.zeros((count, batch, K, S, H), dtype) for count, S in sizes),
        long,
    )


def prefill(
    c: architecture.Config,
    params: decoder.Params,
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    valid_BT: jax.Array,
    cache: Cache,
) -> tuple[jax.Array, Cache]:
    """Reads prompts into an empty cache.

    Args:
      c, params: the model.
      tokens_BT: prompts, padded on either side.
      positions_BT: 0, 1, ... over each row's tokens; whatever in padding.
      valid_BT: where there is a token.
      cache: empty.

    Returns:
      Hidden states x_BTD, after the last norm, and the cache.
    """
    length_B1 = jnp.sum(valid_BT, axis=1, keepdims=True)
    segments_BT = valid_BT.astype(jnp.int32)

    def attend(kind: int, index: Any, cache: Cache, q: Any, k: Any, v: Any, sinks: Any) -> Any:
        slots = cache.values[kind].shape[3]
        kept_BT = valid_BT & (positions_BT >= length_B1 - slots)
        slot_BT = jnp.where(kept_BT, positions_BT % slots, slots)  # beyond the end: dropped
        cache = _put(cache, kind, index, slot_BT, k, v)
        heads = q, k, v, segments_BT, segments_BT
        window = c.kinds[kind].window
        return attention.attend(c, *heads, window=window, sinks_N=sinks), cache

    return _layers(c, params, tokens_BT, positions_BT, cache, attend)


def step(
    c: architecture.Config,
    params: decoder.Params,
    token_B: jax.Array,
    position_B: jax.Array,
    cache: Cache,
) -> tuple[jax.Array, Cache]:
    """Hidden states x_BD of one new token per row, which sees the cache and itself; the cache with it in."""

    def attend(kind: int, index: Any, cache: Cache, q: Any, k: Any, v: Any, sinks: Any) -> Any:
        slots = cache.values[kind].shape[3]
        cache = _put(cache, kind, index, position_B[:, None] % slots, k, v)
        # A slot holds the last position that falls on it: none before the first round is over.
        age_BS = (position_B[:, None] - jnp.arange(slots)) % slots
        seen_BS = age_BS <= position_B[:, None]
        keys, values = (
            lax.dynamic_index_in_dim(part[kind], index, keepdims=False)
            for part in (cache.keys, cache.values)
        )
        attended_BNH = attention.plain.attend_to_cache(c, q[:, 0], keys, values, seen_BS, sinks)
        return attended_BNH[:, None], cache

    x_BTD, cache = _layers(c, params, token_B[:, None], position_B[:, None], cache, attend)
    return x_BTD[:, 0], cache


def _put(
    cache: Cache, kind: int, index: Any, slot_BT: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array
) -> Cache:
    """The cache with new keys and values in the given slots of one layer."""
    keys, values = cache.keys[kind], cache.values[kind]
    B, _, K, _ = k_BTKH.shape
    # Every index is given, heads too: as a slice they would make XLA on CPU copy the whole cache at batch 1.
    row, head, slot = jnp.arange(B)[:, None, None], jnp.arange(K), slot_BT[..., None]
    keys = keys.at[index, row, head, :, slot].set(k_BTKH.astype(keys.dtype), mode="drop")
    values = values.at[index, row, head, slot].set(v_BTKH.astype(values.dtype), mode="drop")

    def replaced(parts: tuple[jax.Array, ...], new: jax.Array) -> tuple[jax.Array, ...]:
        return (*parts[:kind], new, *parts[kind + 1 :])

    return dataclasses.replace(
        cache, keys=replaced(cache.keys, keys), values=replaced(cache.values, values)
    )


def _layers(
    c: architecture.Config,
    params: decoder.Params,
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    cache: Cache,
    attend: Any,
) -> tuple[jax.Array, Cache]:
    """All layers, each with its own part of the cache.

    The loop goes over whole rounds of the pattern, so that within it each layer's kind, and with it the size of its
    cache, is known to the compiler; what is left of the pattern follows the loop.
    """
    x_BTD = decoder.embed(c, params, tokens_BT, positions_BT)
    wide = jnp.promote_types(x_BTD.dtype, jnp.float32)
    stretched_BT = jnp.full(tokens_BT.shape, cache.stretched)
    contexts = [
        layers.Context(*decoder.tables(c, kind, positions_BT, stretched_BT, wide))
        for kind in c.kinds
    ]
    definition = decoder.block(c)
    period = len(c.pattern)
    kinds = [c.kind(place) for place in range(period)]

    def layer(carry: Any, index: Any, place: int, round_: Any) -> Any:
        x_BTD, cache = carry
        kind = kinds[place]
        mine = round_ * kinds.count(kind) + kinds[:place].count(kind)
        own = jax.tree.map(
            lambda w: lax.dynamic_index_in_dim(w, index, keepdims=False), params["layers"]
        )
        keep = functools.partial(attend, kind, mine, cache)
        x_BTD, cache, _ = nnx.merge(definition, own)(x_BTD, contexts[kind], keep)
        return x_BTD, cache

    def whole(carry: Any, round_: jax.Array) -> tuple[Any, None]:
        for place in range(period):
            carry = layer(carry, round_ * period + place, place, round_)
        return carry, None

    rounds, rest = divmod(c.num_layers, period)
    carry = (x_BTD, cache)
    if rounds:
        carry, _ = lax.scan(whole, carry, jnp.arange(rounds))
    for place in range(rest):
        carry = layer(carry, rounds * period + place, place, rounds)
    x_BTD, cache = carry
    return decoder.final_norm(c, params, x_BTD), cache
