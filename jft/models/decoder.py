# SPDX-License-Identifier: Apache-2.0
"""The decoder: Flax NNX definitions of one layer, and pure functions that scan it.

NNX says what a layer is; `nnx.split` happens once, here. From then on a model is a nested dict of arrays in
which the layers' parameters are stacked on a leading axis L, and `hidden` is a pure function of it that runs
`jax.lax.scan` over the stack: one layer is traced and compiled however deep the model is.

Letters in names: B batch, T query time, S key time, D model, N heads, K key/value heads, G = N / K,
H head dim, F feed-forward, V vocabulary, L layers.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jft import matmul

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for contexts longer than those of pretraining.

    kind "llama3" is the piecewise rule of Llama 3.1; "linear" divides every frequency by `factor`.
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_length: int = 8192


@dataclasses.dataclass(frozen=True)
class Config:
    """What a decoder is, families apart. Sizes are counts, not bytes."""

    vocab_size: int
    d_model: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    d_ff: int
    max_length: int
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    tie_embeddings: bool = False


# Which dimensions of each kernel are stacked layers (b), inputs (i) and outputs (o): what `jft.lora` needs to know.
LAYOUTS: tuple[tuple[str, str], ...] = (
    (r"embed/embedding", "io"),
    (r"layers/attention/(query|key|value)/kernel", "bioo"),
    (r"layers/attention/out/kernel", "biio"),
    (r"layers/mlp/(gate|up|down)/kernel", "bio"),
    (r"head/kernel", "io"),
)

REMAT_POLICIES: dict[str, Any] = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class Projection(nnx.Module):
    """A kernel applied by an einsum."""

    def __init__(self, equation: str, shape: tuple[int, ...], fan_in: int, *, rngs: nnx.Rngs):
        self.equation = equation
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), shape) * fan_in**-0.5)

    def __call__(self, x: jax.Array, context: "Context") -> jax.Array:
        return context.einsum(self.equation, x, self.kernel[...].astype(x.dtype))


class RMSNorm(nnx.Module):
    """x / rms(x) * scale, the mean in at least float32 (https://arxiv.org/abs/1910.07467)."""

    def __init__(self, size: int, eps: float):
        self.scale = nnx.Param(jnp.ones(size))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return normed.astype(x.dtype) * self.scale[...].astype(x.dtype)


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions (https://arxiv.org/abs/2305.13245)."""

    def __init__(self, c: Config, *, rngs: nnx.Rngs):
        D, N, K, H = c.d_model, c.num_heads, c.num_kv_heads, c.head_dim
        self.query = Projection("BTD,DNH->BTNH", (D, N, H), D, rngs=rngs)
        self.key = Projection("BTD,DKH->BTKH", (D, K, H), D, rngs=rngs)
        self.value = Projection("BTD,DKH->BTKH", (D, K, H), D, rngs=rngs)
        self.out = Projection("BTNH,NHD->BTD", (N, H, D), N * H, rngs=rngs)

    def __call__(self, x_BTD: jax.Array, context: "Context", cache: Any) -> tuple[jax.Array, Any]:
        q_BTNH = rotate(self.query(x_BTD, context), context.sin_BTH, context.cos_BTH)
        k_BTKH = rotate(self.key(x_BTD, context), context.sin_BTH, context.cos_BTH)
        v_BTKH = self.value(x_BTD, context)
        if cache is None:
            k_BSKH, v_BSKH = k_BTKH, v_BTKH
        else:
            row = jnp.arange(x_BTD.shape[0])[:, None]
            k_BSKH = cache[0].at[row, context.positions_BT].set(k_BTKH)
            v_BSKH = cache[1].at[row, context.positions_BT].set(v_BTKH)
            cache = (k_BSKH, v_BSKH)
        attended_BTNH = attend(q_BTNH, k_BSKH, v_BSKH, context.mask_BTS)
        return self.out(attended_BTNH, context), cache


class Mlp(nnx.Module):
    """SwiGLU (https://arxiv.org/abs/2002.05202)."""

    def __init__(self, c: Config, *, rngs: nnx.Rngs):
        D, F = c.d_model, c.d_ff
        self.gate = Projection("BTD,DF->BTF", (D, F), D, rngs=rngs)
        self.up = Projection("BTD,DF->BTF", (D, F), D, rngs=rngs)
        self.down = Projection("BTF,FD->BTD", (F, D), F, rngs=rngs)

    def __call__(self, x_BTD: jax.Array, context: "Context") -> jax.Array:
        gated_BTF = jax.nn.silu(self.gate(x_BTD, context)) * self.up(x_BTD, context)
        return self.down(gated_BTF, context)


class Block(nnx.Module):
    """One pre-norm layer."""

    def __init__(self, c: Config, *, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(c.d_model, c.norm_eps)
        self.attention = Attention(c, rngs=rngs)
        self.mlp_norm = RMSNorm(c.d_model, c.norm_eps)
        self.mlp = Mlp(c, rngs=rngs)

    def __call__(self, x_BTD: jax.Array, context: "Context", cache: Any) -> tuple[jax.Array, Any]:
        attended_BTD, cache = self.attention(self.attention_norm(x_BTD), context, cache)
        x_BTD = x_BTD + attended_BTD
        return x_BTD + self.mlp(self.mlp_norm(x_BTD), context), cache


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["positions_BT", "sin_BTH", "cos_BTH", "mask_BTS"],
    meta_fields=["einsum"],
)
@dataclasses.dataclass(frozen=True)
class Context:
    """What every layer of one call shares."""

    positions_BT: jax.Array
    sin_BTH: jax.Array  # the last axis has H / 2 angles
    cos_BTH: jax.Array
    mask_BTS: jax.Array
    einsum: matmul.Einsum = jnp.einsum


def frequencies(c: Config, dtype: Any) -> jax.Array:
    """Rotary frequencies [H / 2] in radians per position (https://arxiv.org/abs/2104.09864)."""
    exponent = jnp.arange(0, c.head_dim, 2, dtype=dtype) / c.head_dim
    freq = 1.0 / c.rope_theta**exponent
    s = c.rope_scaling
    if s is None:
        return freq
    if s.kind == "linear":
        return freq / s.factor
    # Llama 3.1: long wavelengths are divided by the factor, short ones kept, a linear ramp between.
    wavelength = 2 * jnp.pi / freq
    ramp = (s.original_max_length / wavelength - s.low_freq_factor) / (
        s.high_freq_factor - s.low_freq_factor
    )
    ramp = jnp.clip(ramp, 0.0, 1.0)
    return (1 - ramp) * freq / s.factor + ramp * freq


def rotate(x_BTNH: jax.Array, sin_BTH: jax.Array, cos_BTH: jax.Array) -> jax.Array:
    """Rotates pairs (i, i + H/2), the order of Hugging Face checkpoints."""
    a, b = jnp.split(x_BTNH, 2, axis=-1)
    sin, cos = sin_BTH[:, :, None, :], cos_BTH[:, :, None, :]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTNH.dtype)


def attend(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask_BTS: jax.Array
) -> jax.Array:
    """Softmax attention; the softmax in at least float32. Rows whose mask is empty give finite garbage."""
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    wide = jnp.promote_types(q_BTNH.dtype, jnp.float32)
    q_BTKGH = (q_BTNH * H**-0.5).reshape(B, T, K, N // K, H)
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=wide)
    scores = jnp.where(mask_BTS[:, None, None], scores, jnp.finfo(wide).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BSKH.dtype)
    return jnp.einsum("BKGTS,BSKH->BTKGH", weights, v_BSKH).reshape(B, T, N, H)


def _context(
    c: Config,
    positions_BT: jax.Array,
    mask_BTS: jax.Array,
    dtype: Any,
    einsum: matmul.Einsum = jnp.einsum,
) -> Context:
    wide = jnp.promote_types(dtype, jnp.float32)
    angles_BTH = positions_BT[..., None].astype(wide) * frequencies(c, wide)
    return Context(positions_BT, jnp.sin(angles_BTH), jnp.cos(angles_BTH), mask_BTS, einsum)


def packed_mask(segments_BT: jax.Array) -> jax.Array:
    """[B, T, T]: causal, and only within one segment."""
    T = segments_BT.shape[1]
    causal = jnp.tril(jnp.ones((T, T), bool))
    return causal & (segments_BT[:, :, None] == segments_BT[:, None, :])


def init(c: Config, *, key: jax.Array, dtype: Any = jnp.float32) -> Params:
    """Random parameters of the right shapes; use inside `jax.eval_shape` for the shapes alone."""
    embed_key, layer_key, head_key = jax.random.split(key, 3)

    def layer(key: jax.Array) -> Params:
        return nnx.to_pure_dict(nnx.state(Block(c, rngs=nnx.Rngs(params=key))))

    params = {
        "embed": {"embedding": 0.02 * jax.random.normal(embed_key, (c.vocab_size, c.d_model))},
        "layers": jax.vmap(layer)(jax.random.split(layer_key, c.num_layers)),
        "final_norm": {"scale": jnp.ones(c.d_model)},
    }
    if not c.tie_embeddings:
        kernel = jax.random.normal(head_key, (c.d_model, c.vocab_size)) * c.d_model**-0.5
        params["head"] = {"kernel": kernel}
    return jax.tree.map(lambda x: x.astype(dtype), params)


@functools.cache
def _block(c: Config) -> nnx.GraphDef:
    return nnx.split(nnx.eval_shape(lambda: Block(c, rngs=nnx.Rngs(0))))[0]


def hidden(
    c: Config,
    params: Params,
    tokens_BT: jax.Array,
    positions_BT: jax.Array | None = None,
    segments_BT: jax.Array | None = None,
    *,
    remat: str = "none",
    einsum: matmul.Einsum = jnp.einsum,
) -> jax.Array:
    """Final hidden states, after the last norm.

    Args:
      c: the configuration.
      params: nested dict, layers stacked on a leading axis L.
      tokens_BT: token ids.
      positions_BT: positions within each example; 0..T-1 when not given.
      segments_BT: example numbers in packed rows; attention stays within one. One segment when not given.
      remat: a key of `REMAT_POLICIES`: what the backward pass recomputes.
      einsum: how activations meet kernels.

    Returns:
      x_BTD in the dtype of the embedding.
    """
    B, T = tokens_BT.shape
    if positions_BT is None:
        positions_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
    if segments_BT is None:
        segments_BT = jnp.ones((B, T), jnp.int32)
    x_BTD = embed(params, tokens_BT)
    context = _context(c, positions_BT, packed_mask(segments_BT), x_BTD.dtype, einsum)
    block = _block(c)

    def layer(x_BTD: jax.Array, layer_params: Params) -> tuple[jax.Array, None]:
        return nnx.merge(block, layer_params)(x_BTD, context, None)

    if remat != "none":
        layer = jax.checkpoint(layer, policy=REMAT_POLICIES[remat], prevent_cse=False)
    x_BTD, _ = jax.lax.scan(layer, x_BTD, params["layers"])
    return final_norm(c, params, x_BTD)


def embed(params: Params, tokens_BT: jax.Array) -> jax.Array:
    return jnp.take(params["embed"]["embedding"], tokens_BT, axis=0)


def final_norm(c: Config, params: Params, x_BTD: jax.Array) -> jax.Array:
    norm = nnx.eval_shape(lambda: RMSNorm(c.d_model, c.norm_eps))
    return nnx.merge(nnx.split(norm)[0], params["final_norm"])(x_BTD)


def head(params: Params, x: jax.Array) -> jax.Array:
    """Logits [..., V] of hidden states [..., D], accumulated in at least float32."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    if "head" in params:
        kernel = params["head"]["kernel"].astype(x.dtype)
        return jnp.einsum("...D,DV->...V", x, kernel, preferred_element_type=wide)
    embedding = params["embed"]["embedding"].astype(x.dtype)
    return jnp.einsum("...D,VD->...V", x, embedding, preferred_element_type=wide)


def apply(
    c: Config,
    params: Params,
    tokens_BT: jax.Array,
    positions_BT: jax.Array | None = None,
    segments_BT: jax.Array | None = None,
) -> jax.Array:
    """Logits_BTV of whole sequences; see `hidden`."""
    return head(params, hidden(c, params, tokens_BT, positions_BT, segments_BT))


def init_cache(c: Config, batch: int, length: int, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Keys and values [L, B, S, K, H] of nothing yet."""
    shape = (c.num_layers, batch, length, c.num_kv_heads, c.head_dim)
    return jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)


def decode(
    c: Config,
    params: Params,
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    cache: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Hidden states of new tokens that see the cache and themselves; the cache with them written.

    Row b's token at position p goes to slot p and sees slots 0..p, so rows of different lengths need no left
    padding: what right padding wrote is overwritten before it is ever seen.
    """
    x_BTD = embed(params, tokens_BT)
    slots = jnp.arange(cache[0].shape[2])
    context = _context(c, positions_BT, slots <= positions_BT[..., None], x_BTD.dtype)
    block = _block(c)

    def layer(x_BTD: jax.Array, scanned: tuple[Params, Any]) -> tuple[jax.Array, Any]:
        layer_params, layer_cache = scanned
        return nnx.merge(block, layer_params)(x_BTD, context, layer_cache)

    x_BTD, cache = jax.lax.scan(layer, x_BTD, (params["layers"], cache))
    return final_norm(c, params, x_BTD), cache
