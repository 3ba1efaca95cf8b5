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
from jft.models.attention import blocks, plain

SMALLEST, LARGEST = 64, 1024  # of a block's length

# What the two passes carry over the pairs of one block of queries.
_Running = tuple[jax.Array, jax.Array, jax.Array]


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
    """As `attention.attend`."""
    known = start if isinstance(start, int) else None
    sizes = block_sizes(q_BTNH.shape[1], k_BSKH.shape[1])
    plan = _Plan(window, c.attention_softcap, known, *sizes)
    segments = segments_BT, segments_BS, jnp.asarray(start, jnp.int32)
    return _attend(plan, plain.scaled(c, q_BTNH), k_BSKH, v_BSKH, segments, sinks_N)


def block_sizes(queries: int, keys: int) -> tuple[int, int]:
    """The lengths of a block of queries and of one of keys.

    A sixteenth of the row: 136 pairs at most up to rows of 16,384, which an accelerator has to start one by one, and an
    excess of a sixteenth over the triangle. Long blocks leave a CPU's caches and skip less of packed rows: at 512, eight
    examples a row, blocks of 64 take half the time of 128 (tools/bench_attention.py).
    """
    size = min(max(-(-keys // 16), SMALLEST), LARGEST)

    def equal(length: int) -> int:  # blocks with the least filling, in whole vectors
        count = -(-length // size)
        return -(-length // (16 * count)) * 16

    return equal(queries), equal(keys)


def flops(
    B: int, T: int, S: int, N: int, H: int, window: int | None, start: jax.Array | int | None = 0
) -> tuple[int, int]:
    """Executed forward and backward, 2 and 5 products, if no pair of blocks is skipped as it runs."""
    known = start if isinstance(start, int) else None
    plan = _Plan(window, None, known, *block_sizes(T, S))
    area = len(_pairs(plan, T, S)) * plan.block_T * plan.block_S
    return 4 * B * N * H * area, 10 * B * N * H * area


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    plan: _Plan,
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    segments: tuple[jax.Array, jax.Array, jax.Array],
    sinks_N: jax.Array | None,
) -> jax.Array:
    """`segments`: of queries, of keys, and the index of the first query."""
    return _attend_forward(plan, q_BTNH, k_BSKH, v_BSKH, segments, sinks_N)[0]


def _attend_forward(
    plan: _Plan,
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    segments: tuple[jax.Array, jax.Array, jax.Array],
    sinks_N: jax.Array | None,
) -> tuple[jax.Array, Any]:
    B, T, N, H = q_BTNH.shape
    cut = _Cut(plan, q_BTNH, k_BSKH, v_BSKH, segments)
    fresh = _nothing_seen(cut, sinks_N)

    def step(carry: Any, pair: tuple[jax.Array, ...]) -> tuple[Any, None]:
        running, out_I, lse_I = carry
        i, j, first = pair
        running = jax.tree.map(lambda new, old: jnp.where(first, new, old), fresh, running)
        running = cut.if_seen(i, j, _absorb, running)
        sum_BKGTH, max_BKGT, weight_BKGT = running
        weight_BKGT = jnp.where(weight_BKGT == 0, 1, weight_BKGT)  # of a query that sees nothing
        out_I = out_I.at[i].set((sum_BKGTH / weight_BKGT[..., None]).astype(out_I.dtype))
        lse_I = lse_I.at[i].set(max_BKGT + jnp.log(weight_BKGT))
        return (running, out_I, lse_I), None

    empty = jnp.zeros_like(cut.q_I), jnp.zeros(cut.q_I.shape[:-1], cut.wide)
    (_, out_I, lse_I), _ = lax.scan(step, (fresh, *empty), cut.pairs)
    out_BTNH = _rows(out_I)[:, :T]
    lse_BTN = _rows(lse_I[..., None])[:, :T, :, 0]
    # Named here, so that a policy which saves both spares the backward pass the forward one.
    out_BTNH = ad_checkpoint.checkpoint_name(out_BTNH, "attended")
    lse_BTN = ad_checkpoint.checkpoint_name(lse_BTN, "attention_lse")
    return out_BTNH, (q_BTNH, k_BSKH, v_BSKH, segments, sinks_N, out_BTNH, lse_BTN)


def _nothing_seen(cut: "_Cut", sinks_N: jax.Array | None) -> _Running:
    """The sum of values, the highest score and the weights' sum of queries before any key."""
    B, K, G, T, H = cut.q_I.shape[1:]
    shape, wide = (B, K, G, T), cut.wide
    if sinks_N is None:
        # Above a masked score, whose weight is so 0 before any other is seen.
        highest, weight = jnp.full(shape, jnp.finfo(wide).min / 2, wide), jnp.zeros(shape, wide)
    else:
        highest = jnp.broadcast_to(sinks_N.astype(wide).reshape(1, K, G, 1), shape)
        weight = jnp.ones(shape, wide)
    return jnp.zeros((*shape, H), wide), highest, weight


def _absorb(cut: "_Cut", i: Any, j: Any, mask_BTS: jax.Array, running: _Running) -> _Running:
    sum_BKGTH, max_BKGT, weight_BKGT = running
    scores, _ = cut.scores(i, j, mask_BTS)
    higher_BKGT = jnp.maximum(max_BKGT, jnp.max(scores, axis=-1))
    weights = jnp.exp(scores - higher_BKGT[..., None])
    shrink_BKGT = jnp.exp(max_BKGT - higher_BKGT)
    seen_BKGTH = cut.einsum("BKGTS,BKSH->BKGTH", weights.astype(cut.v_J.dtype), cut.v_J[j])
    weight_BKGT = weight_BKGT * shrink_BKGT + jnp.sum(weights, axis=-1)
    return sum_BKGTH * shrink_BKGT[..., None] + seen_BKGTH, higher_BKGT, weight_BKGT


def _attend_backward(plan: _Plan, kept: Any, d_out_BTNH: jax.Array) -> tuple[Any, ...]:
    q_BTNH, k_BSKH, v_BSKH, segments, sinks_N, out_BTNH, lse_BTN = kept
    T, S, K = q_BTNH.shape[1], k_BSKH.shape[1], k_BSKH.shape[2]
    cut = _Cut(plan, q_BTNH, k_BSKH, v_BSKH, segments)
    delta_BTN = jnp.sum(out_BTNH.astype(cut.wide) * d_out_BTNH.astype(cut.wide), axis=-1)
    d_out_I = _heads_outside(d_out_BTNH, K, plan.block_T)
    both_I = _heads_outside(jnp.stack([lse_BTN, delta_BTN], axis=-1), K, plan.block_T)
    spread = functools.partial(_spread, d_out_I, both_I)

    def step(carry: Any, pair: tuple[jax.Array, ...]) -> tuple[Any, None]:
        (dq, dk_J, dv_J), dq_I = carry
        i, j, first = pair
        running = cut.if_seen(i, j, spread, (jnp.where(first, 0, dq), dk_J, dv_J))
        return (running, dq_I.at[i].set(running[0].astype(dq_I.dtype))), None

    zeros = tuple(jnp.zeros(x.shape, cut.wide) for x in (cut.q_I[0], cut.k_J, cut.v_J))
    ((_, dk_J, dv_J), dq_I), _ = lax.scan(step, (zeros, jnp.zeros_like(cut.q_I)), cut.pairs)
    d_sinks_N = None
    if sinks_N is not None:
        weight_BTN = jnp.exp(sinks_N.astype(cut.wide) - lse_BTN)
        d_sinks_N = -jnp.sum(weight_BTN * delta_BTN, axis=(0, 1)).astype(sinks_N.dtype)
    dk_BSKH = _rows(dk_J)[:, :S].astype(k_BSKH.dtype)
    dv_BSKH = _rows(dv_J)[:, :S].astype(v_BSKH.dtype)
    return _rows(dq_I)[:, :T], dk_BSKH, dv_BSKH, None, d_sinks_N


def _spread(
    d_out_I: jax.Array,
    both_I: jax.Array,
    cut: "_Cut",
    i: Any,
    j: Any,
    mask_BTS: jax.Array,
    running: _Running,
) -> _Running:
    """Gradients of one block of queries and of all keys and values, with those of a pair added.

    `both_I`: each query's log-sum-exp, and the product of its output and the output's gradient.
    """
    dq_BKGTH, dk_J, dv_J = running
    scores, slope = cut.scores(i, j, mask_BTS)
    lse, delta = both_I[i, ..., :1], both_I[i, ..., 1:]
    weights = jnp.exp(scores - lse)
    dv_BKSH = cut.einsum("BKGTS,BKGTH->BKSH", weights.astype(cut.v_J.dtype), d_out_I[i])
    d_weights = cut.einsum("BKGTH,BKSH->BKGTS", d_out_I[i], cut.v_J[j])
    d_scores = (weights * (d_weights - delta) * slope).astype(cut.q_I.dtype)
    dq_BKGTH = dq_BKGTH + cut.einsum("BKGTS,BKSH->BKGTH", d_scores, cut.k_J[j])
    dk_BKSH = cut.einsum("BKGTS,BKGTH->BKSH", d_scores, cut.q_I[i])
    return dq_BKGTH, dk_J.at[j].add(dk_BKSH), dv_J.at[j].add(dv_BKSH)


_attend.defvjp(_attend_forward, _attend_backward)


class _Cut:
    """Queries, keys and values in blocks, and what both passes do with a pair of them."""

    def __init__(
        self,
        plan: _Plan,
        q_BTNH: jax.Array,
        k_BSKH: jax.Array,
        v_BSKH: jax.Array,
        segments: tuple[jax.Array, jax.Array, jax.Array],
    ):
        (_, T, _, _), (_, S, K, _) = q_BTNH.shape, k_BSKH.shape
        self.plan, self.wide = plan, jnp.promote_types(q_BTNH.dtype, jnp.float32)
        # The masks hang on the queries from here on. Else `grad` of a scan over layers takes all of them, T x S, out
        # of the loop: they are the same in every layer.
        q_BTNH, segments = lax.optimization_barrier((q_BTNH, segments))
        self.q_I = _heads_outside(q_BTNH, K, plan.block_T)
        self.k_J = _heads_outside(k_BSKH, K, plan.block_S)[:, :, :, 0]
        self.v_J = _heads_outside(v_BSKH, K, plan.block_S)[:, :, :, 0]
        # What fills the last blocks is of two segments that see nothing and are seen by none.
        self.segments_I = _cut(segments[0], plan.block_T, -1)
        self.segments_J = _cut(segments[1], plan.block_S, -2)
        self.start = segments[2]
        i, j = _pairs(plan, T, S).T.astype(np.int32)
        self.pairs = (jnp.asarray(i), jnp.asarray(j), jnp.asarray(np.diff(i, prepend=-1) != 0))

    def if_seen(self, i: Any, j: Any, work: Any, running: _Running) -> _Running:
        """`work` of a pair in which any query sees any key; else what there was."""
        plan = self.plan
        positions_T = self.start + i * plan.block_T + jnp.arange(plan.block_T)
        positions_S = j * plan.block_S + jnp.arange(plan.block_S)
        segments = self.segments_I[i], self.segments_J[j]
        mask_BTS = plain.visible(*segments, positions_T, positions_S, plan.window)
        work = functools.partial(work, self, i, j, mask_BTS)
        return lax.cond(jnp.any(mask_BTS), work, lambda running: running, running)

    def scores(self, i: Any, j: Any, mask_BTS: jax.Array) -> tuple[jax.Array, Any]:
        """scores_BKGTS, capped and masked, and the cap's slope there."""
        scores, slope = self.einsum("BKGTH,BKSH->BKGTS", self.q_I[i], self.k_J[j]), 1.0
        if self.plan.softcap:
            bent = jnp.tanh(scores / self.plan.softcap)
            scores, slope = self.plan.softcap * bent, 1 - bent * bent
        return jnp.where(mask_BTS[:, None, None], scores, jnp.finfo(self.wide).min), slope

    def einsum(self, equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.einsum(equation, x, y, preferred_element_type=self.wide)


def _pairs(plan: _Plan, queries: int, keys: int) -> np.ndarray:
    if plan.start is None:  # any part of the row: whether a pair is needed shows as it runs
        return np.argwhere(np.ones((-(-queries // plan.block_T), -(-keys // plan.block_S)), bool))
    return blocks.pairs(queries, keys, plan.block_T, plan.block_S, plan.start, plan.window)


def _cut(x: jax.Array, size: int, fill: int) -> jax.Array:
    """[blocks, B, size, ...] of [B, length, ...]."""
    widths = [(0, 0)] * x.ndim
    widths[1] = (0, -x.shape[1] % size)
    x = jnp.pad(x, widths, constant_values=fill)
    return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)


def _heads_outside(x_BTNH: jax.Array, K: int, size: int) -> jax.Array:
    """[blocks, B, K, G, size, H]: each block as the products read it."""
    x = _cut(x_BTNH, size, 0)
    x = x.reshape(*x.shape[:3], K, -1, x.shape[-1])
    return jnp.moveaxis(x, 2, 4)


def _rows(x: jax.Array) -> jax.Array:
    """[B, blocks * size, N, H] of [blocks, B, (heads), size, H]."""
    x = jnp.moveaxis(x, 0, -3)
    x = x.reshape(x.shape[0], -1, x.shape[-3] * x.shape[-2], x.shape[-1])
    return jnp.moveaxis(x, 1, 2)
