# SPDX-License-Identifier: Apache-2.0
"""Mixtures of experts: a router sends each token to its best experts, and `ragged_dot` computes them.

Rows are sorted by expert, so that each expert's tokens lie together; no capacity, no token is dropped. On a mesh:
`experts_on_mesh`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jft.models import architecture


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["chosen_E", "probability_E", "tokens"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Load:
    """How a router has spread tokens, as sums over them: times each expert was chosen, and its probability."""

    chosen_E: jax.Array
    probability_E: jax.Array
    tokens: jax.Array


class Router(nnx.Module):
    """Logits of the experts."""

    def __init__(self, c: architecture.Config, experts: architecture.Experts, *, rngs: nnx.Rngs):
        shape = (c.d_model, experts.count)
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), shape) * c.d_model**-0.5)
        if experts.router_bias:
            self.bias = nnx.Param(jnp.zeros(experts.count))

    def __call__(self, x_MD: jax.Array) -> jax.Array:
        logits_ME = jnp.einsum("MD,DE->ME", x_MD, self.kernel[...].astype(x_MD.dtype))
        return logits_ME + self.bias[...].astype(x_MD.dtype) if hasattr(self, "bias") else logits_ME


class Grouped(nnx.Module):
    """One kernel per expert."""

    def __init__(
        self, count: int, inputs: int, outputs: tuple[int, ...], bias: bool, *, rngs: nnx.Rngs
    ):
        draw = jax.random.normal(rngs.params(), (count, inputs, *outputs))
        self.kernel = nnx.Param(draw * inputs**-0.5)
        if bias:
            self.bias = nnx.Param(jnp.zeros((count, *outputs)))

    def __call__(self, x_MI: jax.Array, expert_M: jax.Array, sizes_E: jax.Array) -> jax.Array:
        """Rows [M, I], sorted by expert, to [M, *outputs]."""
        kernel = self.kernel[...].astype(x_MI.dtype)
        E, inputs, *outputs = kernel.shape
        y = lax.ragged_dot(x_MI, kernel.reshape(E, inputs, -1), sizes_E)
        y = y.reshape(-1, *outputs)
        return y + self.bias[...].astype(y.dtype)[expert_M] if hasattr(self, "bias") else y


class Experts(nnx.Module):
    """The experts' MLPs."""

    def __init__(self, c: architecture.Config, experts: architecture.Experts, *, rngs: nnx.Rngs):
        E, D, F = experts.count, c.d_model, c.d_ff
        if experts.fused:
            self.gate_up = Grouped(E, D, (F, 2), c.mlp_bias, rngs=rngs)
        else:
            self.gate = Grouped(E, D, (F,), c.mlp_bias, rngs=rngs)
            self.up = Grouped(E, D, (F,), c.mlp_bias, rngs=rngs)
        self.down = Grouped(E, F, (D,), c.mlp_bias, rngs=rngs)
        self.experts = experts

    def __call__(
        self,
        x_BTD: jax.Array,
        logits_ME: jax.Array,
        activate: Callable[[jax.Array, jax.Array], jax.Array],
    ) -> jax.Array:
        """What the chosen experts make of each token, weighted.

        Args:
          x_BTD: normed hidden states.
          logits_ME: the router's, for the B * T tokens.
          activate: (gate, up) -> the input of `down`.
        """
        x_MD = x_BTD.reshape(-1, x_BTD.shape[-1])
        weight_MK, chosen_MK = choice(self.experts, logits_ME)[1:]
        y_MD = self.here(x_MD, weight_MK, chosen_MK, 0, self.experts.count, activate)
        return y_MD.reshape(x_BTD.shape)

    def here(
        self,
        x_MD: jax.Array,
        weight_MK: jax.Array,
        chosen_MK: jax.Array,
        first: jax.Array | int,
        count: int,
        activate: Callable[[jax.Array, jax.Array], jax.Array],
    ) -> jax.Array:
        """The weighted sum of what `count` experts from `first` on, whose kernels these are, make of each token."""
        M, top_k = chosen_MK.shape
        expert = chosen_MK.reshape(-1) - first
        ours = (expert >= 0) & (expert < count)
        # Tokens of other devices' experts come last, after all groups.
        order = jnp.argsort(jnp.where(ours, expert, count), stable=True)
        sizes_E = jnp.bincount(jnp.where(ours, expert, count), length=count + 1)[:count]
        y = self._mlp(
            x_MD[order // top_k],
            jnp.clip(expert[order], 0, count - 1),
            sizes_E.astype(jnp.int32),
            activate,
        )
        y = jnp.where(ours[order, None], y, 0)  # rows after the groups are not defined
        y_MKD = y[jnp.argsort(order)].reshape(M, top_k, -1)
        return jnp.einsum("MKD,MK->MD", y_MKD, weight_MK.astype(y.dtype))

    def _mlp(self, x: jax.Array, expert: jax.Array, sizes_E: jax.Array, activate: Any) -> jax.Array:
        if self.experts.fused:
            both = checkpoint_name(self.gate_up(x, expert, sizes_E), "gate_up")
            gate, up = both[..., 0], both[..., 1]
        else:
            gate = checkpoint_name(self.gate(x, expert, sizes_E), "gate")
            up = checkpoint_name(self.up(x, expert, sizes_E), "up")
        return self.down(activate(gate, up), expert, sizes_E)


def choice(
    experts: architecture.Experts, logits_ME: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Probabilities of all experts; weights and numbers of the chosen ones."""
    wide = jnp.promote_types(logits_ME.dtype, jnp.float32)
    probability_ME = jax.nn.softmax(logits_ME.astype(wide), axis=-1)
    weight_MK, chosen_MK = lax.top_k(probability_ME, experts.top_k)
    if experts.normalise:
        weight_MK = weight_MK / jnp.sum(weight_MK, axis=-1, keepdims=True)
    return probability_ME, weight_MK, chosen_MK


def load(experts: architecture.Experts, logits_ME: jax.Array, counted_BT: jax.Array) -> Load:
    """How a router spreads tokens, each counted with its weight."""
    probability_ME, _, chosen_MK = choice(experts, logits_ME)
    counted_M = counted_BT.reshape(-1).astype(probability_ME.dtype)
    times_ME = jnp.sum(jax.nn.one_hot(chosen_MK, experts.count, dtype=counted_M.dtype), axis=1)
    return Load(counted_M @ times_ME, counted_M @ probability_ME, jnp.sum(counted_M))
