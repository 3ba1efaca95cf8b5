# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy that forms logits only where something is trained, a chunk of positions at a time.

With a vocabulary of 50,000 to 250,000 the logits are the largest array of a step. Here trained positions are brought
to the front, and a loop over chunks of them forms logits, their loss and, in the same pass, the gradients: the
chunk's logits are never stored and never recomputed, and prompts and padding cost nothing.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

# Positions whose logits exist at a time: enough rows for efficient matrix products, 12 MB at 49,152 tokens in float32.
CHUNK = 64

Head = Callable[[Any, Any, jax.Array], jax.Array]


def cross_entropy(
    head: Head,
    trainable: Any,
    frozen: Any,
    x_BTD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    *,
    chunk: int = CHUNK,
) -> tuple[jax.Array, jax.Array]:
    """Sum of weighted negative log-likelihoods in nats, and the sum of weights.

    Args:
      head: head(trainable, frozen, x [M, D]) -> logits [M, V].
      trainable: the head's parameters that get a gradient; may be empty.
      frozen: the head's other parameters.
      x_BTD: hidden states.
      targets_BT: int32 ids of the tokens to predict.
      weights_BT: 0 where nothing is trained: no logits are formed there.
      chunk: positions at a time.

    Returns:
      (sum, weight) scalars; only the sum is differentiable, once (reverse mode), in `trainable` and `x_BTD`.
    """
    D = x_BTD.shape[-1]
    x_MD, targets_M = x_BTD.reshape(-1, D), jnp.ravel(targets_BT)
    weights_M = jnp.ravel(weights_BT).astype(jnp.promote_types(x_BTD.dtype, jnp.float32))
    total: Any = _summed(
        head, min(chunk, x_MD.shape[0]), trainable, frozen, x_MD, targets_M, weights_M
    )
    return total, weights_M.sum()


def load_balance(chosen_LE: jax.Array, probability_LE: jax.Array, tokens_L: jax.Array) -> jax.Array:
    """The router's load-balance loss: E times the sum over experts of share times probability; top_k when even.

    Equations 4 to 6 of https://arxiv.org/abs/2101.03961, with the shares and the probabilities taken over all layers
    together, as transformers does.

    Args:
      chosen_LE: how often each expert of each layer was chosen.
      probability_LE: sums of the router's probabilities over the same tokens; what the gradient goes through.
      tokens_L: how many tokens that were.
    """
    tokens = jnp.sum(tokens_L)
    share_E, mean_E = (jnp.sum(x, axis=0) / tokens for x in (chosen_LE, probability_LE))
    return chosen_LE.shape[-1] * jnp.sum(share_E * mean_E)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _summed(
    head: Head,
    chunk: int,
    trainable: Any,
    frozen: Any,
    x_MD: jax.Array,
    targets_M: jax.Array,
    weights_M: jax.Array,
) -> jax.Array:
    def body(i: jax.Array, total: jax.Array) -> jax.Array:
        x, targets, weights = parts(i)
        return total + _nll(head(trainable, frozen, x), targets, weights)

    count, parts, _ = _chunks(chunk, x_MD, targets_M, weights_M)
    return lax.fori_loop(0, count, body, jnp.zeros((), weights_M.dtype))


def _summed_fwd(
    head: Head,
    chunk: int,
    trainable: Any,
    frozen: Any,
    x_MD: jax.Array,
    targets_M: jax.Array,
    weights_M: jax.Array,
) -> tuple[jax.Array, Any]:
    count, parts, order_M = _chunks(chunk, x_MD, targets_M, weights_M)

    def body(i: jax.Array, carry: Any) -> Any:
        total, grads, dx_MD = carry
        x, targets, weights = parts(i)
        loss, pull = jax.vjp(lambda t, x: _nll(head(t, frozen, x), targets, weights), trainable, x)
        dtrainable, dx = pull(jnp.ones_like(loss))
        dx_MD = lax.dynamic_update_slice_in_dim(dx_MD, dx, i * chunk, axis=0)
        return total + loss, jax.tree.map(jnp.add, grads, dtrainable), dx_MD

    padded = jnp.zeros((order_M.shape[0], x_MD.shape[1]), x_MD.dtype)
    zeros = jax.tree.map(jnp.zeros_like, trainable)
    start = (jnp.zeros((), weights_M.dtype), zeros, padded)
    total, grads, dx_MD = lax.fori_loop(0, count, body, start)
    # Undo the ordering. Padding positions all point at row 0, whose own gradient they must not overwrite: drop them.
    M = x_MD.shape[0]
    dx_MD = jnp.zeros_like(x_MD).at[order_M[:M]].set(dx_MD[:M], unique_indices=True)
    return total, (grads, dx_MD)


def _summed_bwd(head: Head, chunk: int, saved: Any, g: jax.Array) -> tuple[Any, ...]:
    grads, dx_MD = jax.tree.map(lambda x: (g * x).astype(x.dtype), saved)
    return grads, None, dx_MD, None, None


_summed.defvjp(_summed_fwd, _summed_bwd)


def _chunks(
    chunk: int, x_MD: jax.Array, targets_M: jax.Array, weights_M: jax.Array
) -> tuple[jax.Array, Callable[[jax.Array], tuple[jax.Array, ...]], jax.Array]:
    """Number of chunks that hold a trained position, a reader of the i-th, and the order (trained first)."""
    M = weights_M.shape[0]
    order_M = jnp.argsort(weights_M == 0, stable=True)
    order_M = jnp.pad(order_M, (0, -M % chunk))
    weights_sorted = jnp.pad(weights_M[order_M[:M]], (0, -M % chunk))
    count = (jnp.sum(weights_M != 0) + chunk - 1) // chunk

    def part(i: jax.Array) -> tuple[jax.Array, ...]:
        at = lax.dynamic_slice_in_dim(order_M, i * chunk, chunk)
        return x_MD[at], targets_M[at], lax.dynamic_slice_in_dim(weights_sorted, i * chunk, chunk)

    return count, part, order_M


def _nll(logits_MV: jax.Array, targets_M: jax.Array, weights_M: jax.Array) -> jax.Array:
    wide = logits_MV.astype(weights_M.dtype)
    # A comparison, not a gather: its gradient is a comparison too, where a gather's would be a slow scatter.
    chosen = jnp.arange(wide.shape[-1]) == targets_M[:, None]
    picked_M = jnp.sum(jnp.where(chosen, wide, 0), axis=-1)
    return jnp.sum(weights_M * (jax.nn.logsumexp(wide, axis=-1) - picked_M))
