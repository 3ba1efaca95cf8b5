# SPDX-License-Identifier: Apache-2.0
"""Flax NNX definitions of one layer and its parts, for every family; the letters are those of `architecture`.

A module's attributes are its parameters' names: `layers/attention/query/kernel`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jft import matmul, sharding
from jft.models import architecture, experts, experts_on_mesh, rope

# attention(q_BTNH, k_BTKH, v_BTKH, sinks_N or None) -> (attended_BTNH, what the caller keeps, such as a cache)
Attend = Callable[[jax.Array, jax.Array, jax.Array, jax.Array | None], tuple[jax.Array, Any]]


_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["sin_BTR", "cos_BTR", "counted_BT"],
    meta_fields=["einsum", "layout"],
)
@dataclasses.dataclass(frozen=True)
class Context:
    """What the layers of one kind share in one call.

    Attributes:
      sin_BTR, cos_BTR: of the rotary angles; R is half the dimensions that turn.
      counted_BT: weights of the tokens in the experts' load; None for no load.
      einsum: how activations meet kernels.
      layout: of the mesh; None on one device.
    """

    sin_BTR: jax.Array
    cos_BTR: jax.Array
    counted_BT: jax.Array | None = None
    einsum: matmul.Einsum = jnp.einsum
    layout: sharding.Layout | None = None


class Projection(nnx.Module):
    """A kernel, and perhaps a bias, applied by an einsum."""

    def __init__(
        self,
        equation: str,
        shape: tuple[int, ...],
        inputs: int = 1,
        bias: bool = False,
        *,
        rngs: nnx.Rngs,
    ):
        """`inputs`: how many of the shape's first dimensions are contracted."""
        fan_in = 1
        for size in shape[:inputs]:
            fan_in *= size
        self.equation = equation
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), shape) * fan_in**-0.5)
        if bias:
            self.bias = nnx.Param(jnp.zeros(shape[inputs:]))

    def __call__(self, x: jax.Array, context: Context) -> jax.Array:
        y = context.einsum(self.equation, x, self.kernel[...].astype(x.dtype))
        return y + self.bias[...].astype(x.dtype) if hasattr(self, "bias") else y


class Norm(nnx.Module):
    """RMSNorm (https://arxiv.org/abs/1910.07467) or LayerNorm over the scale's dimensions, in at least float32."""

    def __init__(self, shape: tuple[int, ...], kind: str, eps: float):
        self.scale = nnx.Param(jnp.zeros(shape) if kind == "rms_plus_one" else jnp.ones(shape))
        if kind == "layer":
            self.bias = nnx.Param(jnp.zeros(shape))
        self.kind, self.eps, self.axes = kind, eps, tuple(range(-len(shape), 0))

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        if self.kind == "layer":
            wide = wide - jnp.mean(wide, axis=self.axes, keepdims=True)
        normed = wide * jax.lax.rsqrt(
            jnp.mean(wide * wide, axis=self.axes, keepdims=True) + self.eps
        )
        if self.kind == "rms":  # rounded before the scale, as the families that have it do
            return normed.astype(x.dtype) * self.scale[...].astype(x.dtype)
        scale = self.scale[...].astype(wide.dtype)
        if self.kind == "rms_plus_one":
            return (normed * (1 + scale)).astype(x.dtype)
        return (normed * scale + self.bias[...].astype(wide.dtype)).astype(x.dtype)


class Attention(nnx.Module):
    """Grouped-query attention (https://arxiv.org/abs/2305.13245): projections, their norms and the rotation."""

    def __init__(self, c: architecture.Config, *, rngs: nnx.Rngs):
        D, N, K, H = c.d_model, c.num_heads, c.num_kv_heads, c.head_dim
        if c.fused:
            shape = (D, N + 2 * K, H)
            self.qkv = Projection("BTD,DXH->BTXH", shape, bias=c.qkv_bias, rngs=rngs)
        else:
            self.query = Projection("BTD,DNH->BTNH", (D, N, H), bias=c.qkv_bias, rngs=rngs)
            self.key = Projection("BTD,DKH->BTKH", (D, K, H), bias=c.qkv_bias, rngs=rngs)
            self.value = Projection("BTD,DKH->BTKH", (D, K, H), bias=c.qkv_bias, rngs=rngs)
        self.out = Projection("BTNH,NHD->BTD", (N, H, D), 2, c.out_bias, rngs=rngs)
        if c.qk_norm:
            whole = c.qk_norm == "all"
            self.query_norm = Norm((N, H) if whole else (H,), c.norm, c.norm_eps)
            self.key_norm = Norm((K, H) if whole else (H,), c.norm, c.norm_eps)
        if c.sinks:
            self.sinks = nnx.Param(jnp.zeros(N))
        self.config = c

    def __call__(self, x_BTD: jax.Array, context: Context, attend: Attend) -> tuple[jax.Array, Any]:
        q_BTNH, k_BTKH, v_BTKH = self._heads(x_BTD, context)
        if self.config.qk_norm:
            q_BTNH, k_BTKH = self.query_norm(q_BTNH), self.key_norm(k_BTKH)
        q_BTNH = rope.rotate(q_BTNH, context.sin_BTR, context.cos_BTR)
        k_BTKH = rope.rotate(k_BTKH, context.sin_BTR, context.cos_BTR)
        # The names say what a policy of `remat` can keep.
        q_BTNH, k_BTKH = checkpoint_name(q_BTNH, "query"), checkpoint_name(k_BTKH, "key")
        v_BTKH = checkpoint_name(v_BTKH, "value")
        sinks_N = self.sinks[...] if self.config.sinks else None
        attended_BTNH, kept = attend(q_BTNH, k_BTKH, v_BTKH, sinks_N)
        return self.out(attended_BTNH, context), kept

    def _heads(self, x_BTD: jax.Array, context: Context) -> tuple[jax.Array, jax.Array, jax.Array]:
        if not self.config.fused:
            return self.query(x_BTD, context), self.key(x_BTD, context), self.value(x_BTD, context)
        N, K = self.config.num_heads, self.config.num_kv_heads
        q, k, v = jnp.split(self.qkv(x_BTD, context), [N, N + K], axis=2)
        return q, k, v


class Mlp(nnx.Module):
    """The feed-forward part, gated (https://arxiv.org/abs/2002.05202) or not."""

    def __init__(self, c: architecture.Config, *, rngs: nnx.Rngs):
        D, F, bias = c.d_model, c.d_ff, c.mlp_bias
        if c.fused and c.gated:
            self.gate_up = Projection("BTD,DZF->BTZF", (D, 2, F), bias=bias, rngs=rngs)
        else:
            if c.gated:
                self.gate = Projection("BTD,DF->BTF", (D, F), bias=bias, rngs=rngs)
            self.up = Projection("BTD,DF->BTF", (D, F), bias=bias, rngs=rngs)
        self.down = Projection("BTF,FD->BTD", (F, D), bias=bias, rngs=rngs)
        self.config = c

    def __call__(self, x_BTD: jax.Array, context: Context) -> jax.Array:
        c = self.config
        if not c.gated:
            up_BTF = checkpoint_name(self.up(x_BTD, context), "up")
            return self.down(activate(c, up_BTF), context)
        if c.fused:
            both_BTZF = checkpoint_name(self.gate_up(x_BTD, context), "gate_up")
            gate_BTF, up_BTF = both_BTZF[:, :, 0], both_BTZF[:, :, 1]
        else:
            gate_BTF = checkpoint_name(self.gate(x_BTD, context), "gate")
            up_BTF = checkpoint_name(self.up(x_BTD, context), "up")
        return self.down(activate(c, gate_BTF, up_BTF), context)


def activate(c: architecture.Config, gate: jax.Array, up: jax.Array | None = None) -> jax.Array:
    """The activation of `gate`, times `up` in a gated MLP."""
    if isinstance(c.activation, architecture.ClampedSwiglu):
        alpha, limit = c.activation.alpha, c.activation.limit
        gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
        return (up + 1) * (gate * jax.nn.sigmoid(gate * alpha))
    active = _ACTIVATIONS[c.activation](gate)
    return active if up is None else active * up


class Block(nnx.Module):
    """One layer: attention and MLP (or experts), each with its norms, around a residual stream."""

    def __init__(self, c: architecture.Config, *, rngs: nnx.Rngs):
        def norm() -> Norm:
            return Norm((c.d_model,), c.norm, c.norm_eps)

        self.attention = Attention(c, rngs=rngs)
        if c.experts:
            self.router = experts.Router(c, c.experts, rngs=rngs)
            self.experts = experts.Experts(c, c.experts, rngs=rngs)
        else:
            self.mlp = Mlp(c, rngs=rngs)
        if c.norms in ("pre", "both"):
            self.attention_norm, self.mlp_norm = norm(), norm()
        if c.norms in ("post", "both"):
            self.attention_post_norm, self.mlp_post_norm = norm(), norm()
        self.config = c

    def __call__(
        self, x_BTD: jax.Array, context: Context, attend: Attend
    ) -> tuple[jax.Array, Any, experts.Load | None]:
        """The stream after this layer, what `attend` wants kept, and the experts' load."""
        c, load = self.config, None
        pre, post = c.norms in ("pre", "both"), c.norms in ("post", "both")
        y_BTD = self.attention_norm(x_BTD) if pre else x_BTD
        y_BTD, kept = self.attention(y_BTD, context, attend)
        y_BTD = self.attention_post_norm(y_BTD) if post else y_BTD
        x_BTD = checkpoint_name(x_BTD + _scaled(y_BTD, c.residual_scale), "middle")
        if context.layout is not None:
            x_BTD = context.layout.stream(x_BTD)
        y_BTD = self.mlp_norm(x_BTD) if pre else x_BTD
        if c.experts:
            logits_ME = self.router(y_BTD.reshape(-1, c.d_model))
            if context.counted_BT is not None:
                load = experts.load(c.experts, logits_ME, context.counted_BT)
            y_BTD = self._experts(y_BTD, logits_ME, context)
        else:
            y_BTD = self.mlp(y_BTD, context)
        y_BTD = self.mlp_post_norm(y_BTD) if post else y_BTD
        return x_BTD + _scaled(y_BTD, c.residual_scale), kept, load

    def _experts(self, y_BTD: jax.Array, logits_ME: jax.Array, context: Context) -> jax.Array:
        activation = functools.partial(activate, self.config)
        if context.layout is None:
            return self.experts(y_BTD, logits_ME, activation)
        return experts_on_mesh.run(self.experts, y_BTD, logits_ME, activation, context.layout)


def _scaled(x: jax.Array, scale: float) -> jax.Array:
    return x if scale == 1.0 else x * scale
