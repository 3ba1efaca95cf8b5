# SPDX-License-Identifier: Apache-2.0
"""Attention as it is written down: all scores at once. What the other implementations are tested against.

Works in any dtype, float64 included. Letters as in `architecture`; S counts keys.
"""

import jax
import jax.numpy as jnp

from jft.models import architecture


def attend(
    c: architecture.Config,
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask_BTS: jax.Array,
    sinks_N: jax.Array | None = None,
) -> jax.Array:
    """Softmax attention; the softmax in at least float32. Rows whose mask is empty give finite garbage.

    Args:
      c: for the scale of the scores and their soft cap.
      q_BTNH, k_BSKH, v_BSKH: heads; N is a multiple of K.
      mask_BTS: what each query sees.
      sinks_N: a logit per head whose weight goes to nothing (https://arxiv.org/abs/2309.17453).
    """
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKGH = scaled(c, q_BTNH).reshape(B, T, K, N // K, H)
    wide = jnp.promote_types(q_BTNH.dtype, jnp.float32)
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=wide)
    sinks = None if sinks_N is None else sinks_N.reshape(K, N // K, 1, 1)
    weights = _weights(c, scores, mask_BTS[:, None, None], sinks).astype(v_BSKH.dtype)
    return jnp.einsum("BKGTS,BSKH->BTKGH", weights, v_BSKH).reshape(B, T, N, H)


def attend_to_cache(
    c: architecture.Config,
    q_BNH: jax.Array,
    k_BKHS: jax.Array,
    v_BKSH: jax.Array,
    mask_BS: jax.Array,
    sinks_N: jax.Array | None = None,
) -> jax.Array:
    """`attend` of one query per row, to keys and values as a cache holds them: [B, N, H].

    With an axis of one query XLA on CPU would turn the cache: 76 ms instead of 51 a token for 8 rows of SmolLM2-135M.
    """
    B, N, H = q_BNH.shape
    K = k_BKHS.shape[1]
    q_BKGH = scaled(c, q_BNH).reshape(B, K, N // K, H)
    wide = jnp.promote_types(q_BNH.dtype, jnp.float32)
    scores = jnp.einsum("BKGH,BKHS->BKGS", q_BKGH, k_BKHS, preferred_element_type=wide)
    sinks = None if sinks_N is None else sinks_N.reshape(K, N // K, 1)
    weights = _weights(c, scores, mask_BS[:, None, None], sinks).astype(v_BKSH.dtype)
    return jnp.einsum("BKGS,BKSH->BKGH", weights, v_BKSH).reshape(B, N, H)


def visible(
    segments_BT: jax.Array,
    segments_BS: jax.Array,
    positions_T: jax.Array,
    positions_S: jax.Array,
    window: int | None,
) -> jax.Array:
    """mask_BTS: keys of the query's own segment that stand no later than it, and within the window.

    Positions are indices in the row: within a segment they differ as those in the segment do.
    """
    age_TS = positions_T[:, None] - positions_S[None, :]
    seen_TS = age_TS >= 0 if window is None else (age_TS >= 0) & (age_TS < window)
    return seen_TS & (segments_BT[:, :, None] == segments_BS[:, None, :])


def scale(c: architecture.Config) -> float:
    """What the scores are multiplied by."""
    return c.head_dim**-0.5 if c.attention_scale is None else c.attention_scale


def scaled(c: architecture.Config, q: jax.Array) -> jax.Array:
    """Queries that carry the scale of the scores."""
    return q * scale(c)


def _weights(
    c: architecture.Config, scores: jax.Array, mask: jax.Array, sinks: jax.Array | None
) -> jax.Array:
    """The softmax of capped and masked scores over their last axis, beside the sinks."""
    if c.attention_softcap:
        scores = c.attention_softcap * jnp.tanh(scores / c.attention_softcap)
    scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
    if sinks is None:
        return jax.nn.softmax(scores, axis=-1)
    sinks = jnp.broadcast_to(sinks.astype(scores.dtype), (*scores.shape[:-1], 1))
    return jax.nn.softmax(jnp.concatenate([scores, sinks], axis=-1), axis=-1)[..., :-1]
