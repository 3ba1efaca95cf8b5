# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy that forms logits only where something is trained, a chunk of positions at a time.

With a vocabulary of 50,000 to 250,000 the logits are the largest array of a step. Here trained positions are brought
to the front, and a loop over chunks of them forms logits, their loss and, in the same pass, the gradients: the
chunk's logits are never stored and never recomputed, and prompts and padding cost nothing.

On a mesh the head stays where it is stored, split by vocabulary: the devices that share it bring a chunk of their
hidden states together, each forms the logits of its part, and sums over the parts give the loss (Megatron-LM's
vocabulary-parallel cross-entropy, https://arxiv.org/abs/1909.08053, section 3).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from jft import sharding

# Positions whose logits exist at a time: enough rows for efficient matrix products, 12 MB at 49,152 tokens in float32.
CHUNK = 64
# On an accelerator: as many as have about 2^25 logits (128 MB) over all devices' parts of the vocabulary. A chunk reads
# the head once, so that too few would wait for memory.
LOGITS = 1 << 25

Head = Callable[[Any, Any, jax.Array], jax.Array]


def chunk_size(backend: str, vocab_size: int) -> int:
    """Positions at a time on this backend."""
    if backend == "cpu":
        return CHUNK
    return max(CHUNK, 1 << (LOGITS // vocab_size).bit_length() - 1)


@dataclasses.dataclass(frozen=True)
class Shards:
    """How the head lies on a mesh.

    Attributes:
      layout: of the mesh.
      vocabulary: axes over which the logits' last dimension is split.
      along: axes over which a row's positions are split.
      trainable, frozen: PartitionSpecs of the head's parameters.
    """

    layout: sharding.Layout
    vocabulary: tuple[str, ...]
    along: tuple[str, ...]
    trainable: Any
    frozen: Any


def vocabulary_axes(layout: sharding.Layout, vocab_size: int, positions: int) -> tuple[str, ...]:
    """Over which axes to split the vocabulary: all that store the head, unless bringing positions together costs more.

    A device receives and sends the hidden states of every device it shares the vocabulary with; instead it could
    gather the head. The first may cost four times the second: it also saves the gathered head's memory.

    Args:
      layout: of the mesh.
      vocab_size: of the head.
      positions: that a device has.
    """
    for axes in (layout.used(sharding.WIDE), layout.used(("tensor",))):
        n = layout.size(*axes)
        if axes and vocab_size % n == 0 and n * positions <= 2 * vocab_size:
            return axes
    return ()


def cross_entropy(
    head: Head,
    trainable: Any,
    frozen: Any,
    x_BTD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    *,
    chunk: int = CHUNK,
    shards: Shards | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Sum of weighted negative log-likelihoods in nats, and the sum of weights.

    Args:
      head: head(trainable, frozen, x [M, D]) -> logits [M, V]; on a mesh, of this device's part of V.
      trainable: the head's parameters that get a gradient; may be empty.
      frozen: the head's other parameters.
      x_BTD: hidden states.
      targets_BT: int32 ids of the tokens to predict.
      weights_BT: 0 where nothing is trained: no logits are formed there.
      chunk: positions at a time; on a mesh, of each device.
      shards: how the head lies on a mesh; None on one device.

    Returns:
      (sum, weight) scalars; only the sum is differentiable, once (reverse mode), in `trainable` and `x_BTD`.
    """
    weights_BT = weights_BT.astype(jnp.promote_types(x_BTD.dtype, jnp.float32))
    total: Any = _summed(head, chunk, shards, trainable, frozen, x_BTD, targets_BT, weights_BT)
    return total, weights_BT.sum()


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _summed(
    head: Head,
    chunk: int,
    shards: Shards | None,
    trainable: Any,
    frozen: Any,
    x_BTD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
) -> jax.Array:
    run = functools.partial(_local, head, chunk, shards, False)
    return _mapped(run, shards, trainable, frozen, x_BTD, targets_BT, weights_BT)[0]


def _summed_fwd(
    head: Head,
    chunk: int,
    shards: Shards | None,
    trainable: Any,
    frozen: Any,
    x_BTD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
) -> tuple[jax.Array, Any]:
    run = functools.partial(_local, head, chunk, shards, True)
    total, grads, dx_BTD = _mapped(run, shards, trainable, frozen, x_BTD, targets_BT, weights_BT)
    return total, (grads, dx_BTD)


def _summed_bwd(
    head: Head, chunk: int, shards: Shards | None, saved: Any, g: jax.Array
) -> tuple[Any, ...]:
    grads, dx_BTD = jax.tree.map(lambda x: (g * x).astype(x.dtype), saved)
    return grads, None, dx_BTD, None, None


_summed.defvjp(_summed_fwd, _summed_bwd)


def _mapped(
    run: Callable[..., Any], shards: Shards | None, trainable: Any, frozen: Any, *arrays: jax.Array
) -> Any:
    """`run` on each device's part of everything."""
    if shards is None:
        return run(trainable, frozen, *arrays)
    rows, along = shards.layout.used(sharding.ROWS), shards.along
    flat = P(rows, along)
    return jax.shard_map(
        run,
        mesh=shards.layout.mesh,
        in_specs=(shards.trainable, shards.frozen, P(rows, along, None), flat, flat),
        out_specs=(P(), shards.trainable, P(rows, along, None)),
        check_vma=False,  # no gradient goes through it: sums are written out
    )(trainable, frozen, *arrays)


def _local(
    head: Head,
    chunk: int,
    shards: Shards | None,
    differentiate: bool,
    trainable: Any,
    frozen: Any,
    x_BTD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
) -> tuple[jax.Array, Any, jax.Array]:
    """(sum, gradients of `trainable`, gradient of x); the gradients are zeros where they are not asked for."""
    over = _Over.of(shards)
    x_MD = x_BTD.reshape(-1, x_BTD.shape[-1])
    targets_M, weights_M = jnp.ravel(targets_BT), jnp.ravel(weights_BT)
    chunk = min(chunk, x_MD.shape[0])
    count, parts, order_M = _chunks(chunk, x_MD, targets_M, weights_M)

    def body(i: jax.Array, carry: Any) -> Any:
        total, grads, dx_MD = carry
        x, targets, weights = map(over.gather, parts(i))
        if not differentiate:
            logits = head(trainable, frozen, x)
            return total + over.nll(logits, targets, weights)[0], grads, dx_MD
        logits, pull = jax.vjp(lambda t, x: head(t, frozen, x), trainable, x)
        loss, dlogits = over.nll(logits, targets, weights)
        dtrainable, dx = pull(dlogits.astype(logits.dtype))
        dx_MD = lax.dynamic_update_slice_in_dim(dx_MD, over.scatter(dx), i * chunk, axis=0)
        return total + loss, jax.tree.map(jnp.add, grads, dtrainable), dx_MD

    wanted = order_M.shape[0] if differentiate else 0
    start = (
        jnp.zeros((), weights_M.dtype),
        jax.tree.map(jnp.zeros_like, trainable),
        jnp.zeros((wanted, x_MD.shape[1]), x_MD.dtype),
    )
    # The loop's length is known when it runs; the name says its bound to who counts operations.
    with jax.named_scope(f"at_most_{order_M.shape[0] // chunk}_trips"):
        total, grads, dx_MD = lax.fori_loop(0, over.most(count), body, start)
    if shards is not None:
        total = over.total(total)
        grads = over.summed(grads, shards.trainable)
    if not differentiate:
        return total, grads, jnp.zeros_like(x_BTD)
    # Undo the ordering. Padding positions all point at row 0, whose own gradient they must not overwrite: drop them.
    M = x_MD.shape[0]
    dx_MD = jnp.zeros_like(x_MD).at[order_M[:M]].set(dx_MD[:M], unique_indices=True)
    return total, grads, dx_MD.reshape(x_BTD.shape)


@dataclasses.dataclass(frozen=True)
class _Over:
    """Sums over the devices of a mesh; of one device's, nothing.

    Attributes:
      vocabulary: axes over which the vocabulary is split.
      together: those of them over which positions are split too, and have to be brought together.
      positions: all axes over which positions are split.
    """

    vocabulary: tuple[str, ...] = ()
    together: tuple[str, ...] = ()
    positions: tuple[str, ...] = ()

    @classmethod
    def of(cls, shards: Shards | None) -> "_Over":
        if shards is None:
            return cls()
        positions = (*shards.layout.used(sharding.ROWS), *shards.along)
        together = tuple(axis for axis in shards.vocabulary if axis in positions)
        return cls(shards.vocabulary, together, positions)

    def gather(self, x: jax.Array) -> jax.Array:
        return lax.all_gather(x, self.together, tiled=True) if self.together else x

    def scatter(self, dx: jax.Array) -> jax.Array:
        """The sum over parts of the vocabulary, of this device's own positions."""
        rest = tuple(axis for axis in self.vocabulary if axis not in self.together)
        if rest:
            dx = lax.psum(dx, rest)
        return lax.psum_scatter(dx, self.together, tiled=True) if self.together else dx

    def most(self, count: jax.Array) -> jax.Array:
        """Devices that exchange anything in a loop go round it equally often."""
        return lax.pmax(count, self.vocabulary) if self.vocabulary else count

    def total(self, x: jax.Array) -> jax.Array:
        rest = tuple(axis for axis in self.positions if axis not in self.together)
        return lax.psum(x, rest) if rest else x

    def summed(self, grads: Any, specs: Any) -> Any:
        """Gradients over all positions, and over the parts of the vocabulary that a parameter is the same for."""

        def one(spec: P, g: jax.Array) -> jax.Array:
            own = {
                name for axes in spec for name in ((axes,) if isinstance(axes, str) else axes or ())
            }
            rest = dict.fromkeys((*self.positions, *self.vocabulary))
            rest = tuple(axis for axis in rest if axis not in own)
            return lax.psum(g, rest) if rest else g

        return jax.tree.map(one, specs, grads, is_leaf=lambda x: isinstance(x, P))

    def nll(
        self, logits_MV: jax.Array, targets_M: jax.Array, weights_M: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Sum of weighted negative log-likelihoods, and its gradient in the logits."""
        wide = logits_MV.astype(weights_M.dtype)
        V = wide.shape[-1]
        first = lax.axis_index(self.vocabulary) * V if self.vocabulary else 0
        # A comparison, not a gather: its sum needs no exchange of indices, and no scatter follows.
        chosen = first + jnp.arange(V) == targets_M[:, None]
        most_M1 = jnp.max(wide, axis=-1, keepdims=True)
        if self.vocabulary:
            most_M1 = lax.pmax(most_M1, self.vocabulary)
        part_M = jnp.sum(jnp.exp(wide - most_M1), axis=-1)
        picked_M = jnp.sum(jnp.where(chosen, wide, 0), axis=-1)
        if self.vocabulary:
            part_M, picked_M = lax.psum((part_M, picked_M), self.vocabulary)
        log_M = jnp.log(part_M) + most_M1[:, 0]
        dlogits = weights_M[:, None] * (jnp.exp(wide - log_M[:, None]) - chosen)
        return jnp.sum(weights_M * (log_M - picked_M)), dlogits


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
