# SPDX-License-Identifier: Apache-2.0
"""Mixtures of experts: a router sends each token to its best experts, and `ragged_dot` computes them.

Rows are sorted by expert, so that each expert's tokens lie together; no capacity, no token is dropped.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

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
        counted_BT: jax.Array | None,
    ) -> tuple[jax.Array, Load | None]:
        """What the chosen experts make of each token, weighted; and the load over the counted tokens.

        Args:
          x_BTD: normed hidden states.
          logits_ME: the router's, for the B * T tokens.
          activate: (gate, up) -> the input of `down`.
          counted_BT: weights of the tokens in the load; None for no load.
        """
        e, x_MD = self.experts, x_BTD.reshape(-1, x_BTD.shape[-1])
        M = x_MD.shape[0]
        wide = jnp.promote_types(x_BTD.dtype, jnp.float32)
        probability_ME = jax.nn.softmax(logits_ME.astype(wide), axis=-1)
        weight_MK, chosen_MK = lax.top_k(probability_ME, e.top_k)
        if e.normalise:
            weight_MK = weight_MK / jnp.sum(weight_MK, axis=-1, keepdims=True)
        order = jnp.argsort(chosen_MK.reshape(-1), stable=True)
        expert, sizes_E = (
            chosen_MK.reshape(-1)[order],
            jnp.bincount(chosen_MK.ravel(), length=e.count),
        )
        y = self._mlp(x_MD[order // e.top_k], expert, sizes_E.astype(jnp.int32), activate)
        y_MKD = y[jnp.argsort(order)].reshape(M, e.top_k, -1)
        y_MD = jnp.einsum("MKD,MK->MD", y_MKD, weight_MK.astype(y.dtype))
        load = None
        if counted_BT is not None:
            load = _load(probability_ME, chosen_MK, counted_BT.reshape(-1))
        return y_MD.reshape(x_BTD.shape), load

    def _mlp(self, x: jax.Array, expert: jax.Array, sizes_E: jax.Array, activate: Any) -> jax.Array:
        if self.experts.fused:
            both = self.gate_up(x, expert, sizes_E)
            gate, up = both[..., 0], both[..., 1]
        else:
            gate, up = self.gate(x, expert, sizes_E), self.up(x, expert, sizes_E)
        return self.down(activate(gate, up), expert, sizes_E)


def _load(probability_ME: jax.Array, chosen_MK: jax.Array, counted_M: jax.Array) -> Load:
    E = probability_ME.shape[-1]
    counted_M = counted_M.astype(probability_ME.dtype)
    times_ME = jnp.sum(jax.nn.one_hot(chosen_MK, E, dtype=counted_M.dtype), axis=1)
    return Load(counted_M @ times_ME, counted_M @ probability_ME, jnp.sum(counted_M))
