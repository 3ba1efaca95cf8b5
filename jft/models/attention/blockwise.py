# SPDX-License-Identifier: Apache-2.0
"""Attention in blocks of queries and keys, in plain XLA: memory grows with T, not with T x S, on every backend.

The method is FlashAttention's (https://arxiv.org/abs/2205.14135): a running maximum and sum per query, and a backward
pass that computes the weights again from the saved log-sum-exp. One scan goes over the pairs of blocks that causality
and the window leave; a pair in which no query sees a key (packed rows: most of them) is skipped as it runs.

In names I and J count the blocks; T and S are then the places within one.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import ad_checkpoint, lax

from jft.models import architecture
from jft.models.attention import plain

SMALLEST, LARGEST = 128, 1024  # of a block's length


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is known when the program is traced: `start` is None where it is not."""

    window: int | None
    softcap: float | None
    start: int | None
    block_T: int
    block_S: int


def attend(
    c: architecture.Config,
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    segments_BT: jax.Array,
    segments_BS: jax.Array,
    *,
    window: int | None,
    start: jax.Array | int,
    sinks_N: jax.Array | None,
) -> jax.Array:
    """As `attention.attend`. A row that sees no key at all gives zeros."""
    plan = _Plan(
        window,
        c.attention_softcap,
        start if isinstance(start, int) else None,
        *block_sizes(q_BTNH.shape[1], k_BSKH.shape[1]),
    )
    offset = jnp.asarray(start, jnp.int32)
    q_BTNH = plain.scaled(c, q_BTNH)
    return _attend(plan, q_BTNH, k_BSKH, v_BSKH, segments_BT, segments_BS, offset, sinks_N)


def pairs(plan: _Plan, queries: int, keys: int) -> np.ndarray:
    """[P, 2]: the pairs of blocks (i, j) that may hold a visible key, those of one i together."""
    I, J = -(-queries // plan.block_T), -(-keys // plan.block_S)
    if plan.start is None:
        return np.argwhere(np.ones((I, J), bool))
    first_I = plan.start + np.arange(I) * plan.block_T
    last_I = np.minimum(first_I + plan.block_T, plan.start + queries) - 1
    first_J = np.arange(J) * plan.block_S
    needed_IJ = first_J <= last_I[:, None]
    if plan.window is not None:
        needed_IJ &= first_I[:, None] - (first_J + plan.block_S - 1) < plan.window
    return np.argwhere(needed_IJ)


def block_sizes(queries: int, keys: int) -> tuple[int, int]:
    """The lengths of a block of queries and of one of keys.

    A sixteenth of the row: at most 136 pairs up to rows of 16,384, which an accelerator has to start one by one, and an
    excess of a sixteenth over the triangle. Shorter than 128 the products become thin. On CPU short blocks
    are also the faster ones for packed rows (tools/bench_attention.py).
    """
    size = min(max(-(-keys // 16), SMALLEST), LARGEST)

    def equal(length: int) -> int:  # blocks with the least filling, in whole vectors
        blocks = -(-length // size)
        return -(-length // (16 * blocks)) * 16

    return equal(queries), equal(keys)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    plan: _Plan,
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    segments_BT: jax.Array,
    segments_BS: jax.Array,
    start: jax.Array,
    sinks_N: jax.Array | None,
) -> jax.Array:
    return _forward(plan, q_BTNH, k_BSKH, v_BSKH, segments_BT, segments_BS, start, sinks_N)[0]


def _forward(plan: _Plan, q, k, v, segments_BT, segments_BS, start, sinks_N) -> Any:
    """out_BTNH and lse_BNT."""
    B, T, N, H = q.shape
    K = k.shape[2]
    G = N // K
    wide = jnp.promote_types(q.dtype, jnp.float32)
    blocks = _Blocks(plan, q, k, v, segments_BT, segments_BS, start)
    shape = (B, K, G, plan.block_T)
    # Above the lowest number, so that a masked score's weight is 0 before any score is seen.
    m_BKGT, l_BKGT = jnp.full(shape, jnp.finfo(wide).min / 2, wide), jnp.zeros(shape, wide)
    if sinks_N is not None:
        m_BKGT = jnp.broadcast_to(sinks_N.astype(wide).reshape(1, K, G, 1), shape)
        l_BKGT = jnp.ones(shape, wide)
    fresh = (jnp.zeros((*shape, H), wide), m_BKGT, l_BKGT)

    def absorb(i: jax.Array, j: jax.Array, mask_BTS: jax.Array, state: Any) -> Any:
        acc, m, l = state
        scores = blocks.scores(i, j, mask_BTS)[0]
        m_next = jnp.maximum(m, jnp.max(scores, axis=-1))
        weights = jnp.exp(scores - m_next[..., None])
        shrink = jnp.exp(m - m_next)
        seen = _einsum("BKGTS,BKSH->BKGTH", weights.astype(v.dtype), blocks.v_J[j], wide)
        return acc * shrink[..., None] + seen, m_next, l * shrink + jnp.sum(weights, axis=-1)

    def step(carry: Any, pair: tuple[jax.Array, ...]) -> tuple[Any, None]:
        state, out_I, lse_I = carry
        i, j, first = pair
        state = jax.tree.map(lambda new, old: jnp.where(first, new, old), fresh, state)
        mask_BTS = blocks.mask(i, j)
        keep = functools.partial(absorb, i, j, mask_BTS)
        acc, m, l = state = lax.cond(jnp.any(mask_BTS), keep, lambda state: state, state)
        l = jnp.where(l == 0, 1, l)
        out_I = out_I.at[i].set((acc / l[..., None]).astype(out_I.dtype))
        return (state, out_I, lse_I.at[i].set(m + jnp.log(l))), None

    I = blocks.q_I.shape[0]
    empty = (fresh, jnp.zeros((I, *shape, H), q.dtype), jnp.zeros((I, *shape), wide))
    (_, out_I, lse_I), _ = lax.scan(step, empty, blocks.pairs)
    lse_BNT = jnp.moveaxis(lse_I, 0, 3).reshape(B, N, -1)[:, :, :T]
    return _rows(out_I)[:, :T], lse_BNT


def _attend_forward(plan: _Plan, q, k, v, segments_BT, segments_BS, start, sinks_N) -> Any:
    out, lse = _forward(plan, q, k, v, segments_BT, segments_BS, start, sinks_N)
    # Named here, so that a policy which saves both spares the backward pass the forward one.
    out = ad_checkpoint.checkpoint_name(out, "attended")
    lse = ad_checkpoint.checkpoint_name(lse, "attention_lse")
    return out, (q, k, v, segments_BT, segments_BS, start, sinks_N, out, lse)


def _attend_backward(plan: _Plan, kept: Any, d_out: jax.Array) -> Any:
    q, k, v, segments_BT, segments_BS, start, sinks_N, out, lse = kept
    B, T, N, H = q.shape
    K = k.shape[2]
    wide = jnp.promote_types(q.dtype, jnp.float32)
    blocks = _Blocks(plan, q, k, v, segments_BT, segments_BS, start)
    delta_BTN = jnp.sum(out.astype(wide) * d_out.astype(wide), axis=-1)
    d_out_I = _blocks(d_out, K, plan.block_T)
    per_query_I = _blocks(jnp.stack([jnp.swapaxes(lse, 1, 2), delta_BTN], -1), K, plan.block_T)

    def spread(i: jax.Array, j: jax.Array, mask_BTS: jax.Array, state: Any) -> Any:
        dq, dk_J, dv_J = state
        scores, slope = blocks.scores(i, j, mask_BTS)
        lse, delta = per_query_I[i, ..., :1], per_query_I[i, ..., 1:]
        weights = jnp.exp(scores - lse)
        dv = _einsum("BKGTS,BKGTH->BKSH", weights.astype(v.dtype), d_out_I[i], wide)
        d_weights = _einsum("BKGTH,BKSH->BKGTS", d_out_I[i], blocks.v_J[j], wide)
        d_scores = (weights * (d_weights - delta) * slope).astype(q.dtype)
        dq = dq + _einsum("BKGTS,BKSH->BKGTH", d_scores, blocks.k_J[j], wide)
        dk = _einsum("BKGTS,BKGTH->BKSH", d_scores, blocks.q_I[i], wide)
        return dq, dk_J.at[j].add(dk), dv_J.at[j].add(dv)

    def step(carry: Any, pair: tuple[jax.Array, ...]) -> tuple[Any, None]:
        (dq, dk_J, dv_J), dq_I = carry
        i, j, first = pair
        state = jnp.where(first, 0, dq), dk_J, dv_J
        mask_BTS = blocks.mask(i, j)
        keep = functools.partial(spread, i, j, mask_BTS)
        state = lax.cond(jnp.any(mask_BTS), keep, lambda state: state, state)
        return (state, dq_I.at[i].set(state[0].astype(dq_I.dtype))), None

    zeros = [jnp.zeros(x.shape, wide) for x in (blocks.q_I[0], blocks.k_J, blocks.v_J)]
    carry = (tuple(zeros), jnp.zeros_like(blocks.q_I))
    ((_, dk_J, dv_J), dq_I), _ = lax.scan(step, carry, blocks.pairs)
    dq, dk, dv = _rows(dq_I)[:, :T], _rows(dk_J)[:, : k.shape[1]], _rows(dv_J)[:, : k.shape[1]]
    d_sinks = None
    if sinks_N is not None:
        taken_BTN = jnp.exp(sinks_N.astype(wide) - jnp.swapaxes(lse, 1, 2))
        d_sinks = -jnp.sum(taken_BTN * delta_BTN, axis=(0, 1)).astype(sinks_N.dtype)
    return dq, dk.astype(k.dtype), dv.astype(v.dtype), None, None, None, d_sinks


_attend.defvjp(_attend_forward, _attend_backward)


class _Blocks:
    """Queries, keys and values cut into blocks, and what pairs of them share in both passes."""

    def __init__(self, plan: _Plan, q, k, v, segments_BT, segments_BS, start):
        K = k.shape[2]
        self.plan, self.start = plan, start
        self.q_I = _blocks(q, K, plan.block_T)
        self.k_J, self.v_J = (_blocks(x, K, plan.block_S)[:, :, :, 0] for x in (k, v))
        # What is added to fill the last block is of two segments that see nothing and are seen by none.
        self.segments_I = _cut(segments_BT, plan.block_T, -1)
        self.segments_J = _cut(segments_BS, plan.block_S, -2)
        i, j = pairs(plan, q.shape[1], k.shape[1]).T.astype(np.int32)
        self.pairs = (jnp.asarray(i), jnp.asarray(j), jnp.asarray(np.diff(i, prepend=-1) != 0))

    def mask(self, i: jax.Array, j: jax.Array) -> jax.Array:
        plan = self.plan
        positions_T = self.start + i * plan.block_T + jnp.arange(plan.block_T)
        positions_S = j * plan.block_S + jnp.arange(plan.block_S)
        segments = self.segments_I[i], self.segments_J[j]
        return plain.visible(*segments, positions_T, positions_S, plan.window)

    def scores(self, i: jax.Array, j: jax.Array, mask_BTS: jax.Array) -> tuple[jax.Array, Any]:
        """scores_BKGTS, capped and masked, and the cap's slope there."""
        q, k = self.q_I[i], self.k_J[j]
        wide = jnp.promote_types(q.dtype, jnp.float32)
        scores, slope = _einsum("BKGTH,BKSH->BKGTS", q, k, wide), 1.0
        if self.plan.softcap:
            bent = jnp.tanh(scores / self.plan.softcap)
            scores, slope = self.plan.softcap * bent, 1 - bent * bent
        return jnp.where(mask_BTS[:, None, None], scores, jnp.finfo(wide).min), slope


def _einsum(equation: str, x: jax.Array, y: jax.Array, dtype: Any) -> jax.Array:
    return jnp.einsum(equation, x, y, preferred_element_type=dtype)


def _cut(x: jax.Array, size: int, fill: int) -> jax.Array:
    """[B, length, ...] as [blocks, B, size, ...]."""
    blocks = -(-x.shape[1] // size)
    widths = [(0, 0)] * x.ndim
    widths[1] = (0, blocks * size - x.shape[1])
    x = jnp.pad(x, widths, constant_values=fill)
    return jnp.moveaxis(x.reshape(x.shape[0], blocks, size, *x.shape[2:]), 1, 0)


def _blocks(x_BTNH: jax.Array, K: int, size: int) -> jax.Array:
    """[blocks, B, K, G, size, H]: each block as the products read it, heads outside."""
    x = _cut(x_BTNH, size, 0)
    I, B, T, N, H = x.shape
    return jnp.moveaxis(x.reshape(I, B, T, K, N // K, H), 2, 4)


def _rows(x: jax.Array) -> jax.Array:
    """[B, blocks * size, N, H] of [blocks, B, ..heads, size, H]."""
    x = jnp.moveaxis(x, 0, -3)
    B, *heads, I, T, H = x.shape
    return jnp.moveaxis(x.reshape(B, -1, I * T, H), 1, 2)
