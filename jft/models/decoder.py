# SPDX-License-Identifier: Apache-2.0
"""The decoder of every family: pure functions of parameters that scan one layer over the stack.

NNX says what a layer is; `nnx.split` happens once, here. From then on a model is a nested dict of arrays in
which the layers' parameters are stacked on a leading axis L, and `hidden` is a pure function of it that runs
`jax.lax.scan` over the stack: one layer is traced and compiled however deep the model is. Where layers differ (windows,
rotary bases) the scan also goes over the number of each layer's kind. Decoding with a cache is in `decoding`.

Letters in names: see `architecture`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jft import matmul
from jft.models import architecture, experts, layers, rope

Params = dict[str, Any]

REMAT_POLICIES: dict[str, Any] = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def init(c: architecture.Config, *, key: jax.Array, dtype: Any = jnp.float32) -> Params:
    """Random parameters of the right shapes; use inside `jax.eval_shape` for the shapes alone."""
    embed_key, position_key, layer_key, head_key = jax.random.split(key, 4)

    def layer(key: jax.Array) -> Params:
        return nnx.to_pure_dict(nnx.state(layers.Block(c, rngs=nnx.Rngs(params=key))))

    def embedding(rows: int, key: jax.Array) -> Params:
        return {"embedding": 0.02 * jax.random.normal(key, (rows, c.d_model))}

    params = {
        "embed": embedding(c.vocab_size, embed_key),
        "layers": jax.vmap(layer)(jax.random.split(layer_key, c.num_layers)),
        "final_norm": nnx.to_pure_dict(nnx.state(_final_norm(c))),
    }
    if c.learned_positions:
        params["positions"] = embedding(c.max_length, position_key)
    if not c.tie_embeddings:
        kernel = jax.random.normal(head_key, (c.d_model, c.vocab_size)) * c.d_model**-0.5
        params["head"] = {"kernel": kernel}
    return jax.tree.map(lambda x: x.astype(dtype), params)


@functools.cache
def shapes(c: architecture.Config) -> Params:
    """The parameters' shapes, float32, without making any."""
    return jax.eval_shape(lambda: init(c, key=jax.random.key(0)))


def _final_norm(c: architecture.Config) -> layers.Norm:
    return layers.Norm((c.d_model,), c.norm, c.norm_eps)


@functools.cache
def block(c: architecture.Config) -> nnx.GraphDef:
    """The definition of one layer, to be merged with a layer's parameters."""
    return nnx.split(nnx.eval_shape(lambda: layers.Block(c, rngs=nnx.Rngs(0))))[0]


def hidden(
    c: architecture.Config,
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
    return hidden_and_load(
        c, params, tokens_BT, positions_BT, segments_BT, remat=remat, einsum=einsum
    )[0]


def hidden_and_load(
    c: architecture.Config,
    params: Params,
    tokens_BT: jax.Array,
    positions_BT: jax.Array | None = None,
    segments_BT: jax.Array | None = None,
    counted_BT: jax.Array | None = None,
    *,
    remat: str = "none",
    einsum: matmul.Einsum = jnp.einsum,
) -> tuple[jax.Array, experts.Load | None]:
    """As `hidden`, and each layer's load of the experts over the tokens that `counted_BT` weighs, stacked on L."""
    B, T = tokens_BT.shape
    if positions_BT is None:
        positions_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
    if segments_BT is None:
        segments_BT = jnp.ones((B, T), jnp.int32)
    if counted_BT is not None and not c.experts:
        raise ValueError("a model without experts has no load")
    x_BTD = embed(c, params, tokens_BT, positions_BT)
    wide = jnp.promote_types(x_BTD.dtype, jnp.float32)
    stretched_BT = None
    if rope.needs_lengths(c):
        stretched_BT = lengths(positions_BT, segments_BT) > rope.original_length(c)
    kinds = [
        (*tables(c, kind, positions_BT, stretched_BT, wide), mask(kind, positions_BT, segments_BT))
        for kind in c.kinds
    ]
    of_kind = _chooser(kinds)
    definition = block(c)

    def layer(x_BTD: jax.Array, scanned: tuple[Params, jax.Array]) -> tuple[jax.Array, Any]:
        layer_params, kind = scanned
        sin_BTR, cos_BTR, mask_BTS = of_kind(kind)

        def attend(q: Any, k: Any, v: Any, sinks: Any) -> tuple[jax.Array, None]:
            return layers.attend(c, q, k, v, mask_BTS, sinks), None

        context = layers.Context(sin_BTR, cos_BTR, counted_BT, einsum)
        x_BTD, _, load = nnx.merge(definition, layer_params)(x_BTD, context, attend)
        return x_BTD, load

    if remat != "none":
        layer = jax.checkpoint(layer, policy=REMAT_POLICIES[remat], prevent_cse=False)
    kind_L = jnp.array([c.kind(i) for i in range(c.num_layers)], jnp.int32)
    x_BTD, load = jax.lax.scan(layer, x_BTD, (params["layers"], kind_L))
    return final_norm(c, params, x_BTD), load


def _chooser(kinds: list[Any]) -> Any:
    """kind number -> its arrays; with one kind no choice is made."""
    if len(kinds) == 1:
        return lambda kind: kinds[0]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *kinds)
    return lambda kind: jax.tree.map(
        lambda x: jax.lax.dynamic_index_in_dim(x, kind, keepdims=False), stacked
    )


def tables(
    c: architecture.Config,
    kind: architecture.Layer,
    positions_BT: jax.Array,
    stretched_BT: jax.Array | None,
    dtype: Any,
) -> tuple[jax.Array, jax.Array]:
    """sin_BTR and cos_BTR of the layers of a kind."""
    return rope.tables(kind.rope, c.rotary_dim or c.head_dim, positions_BT, stretched_BT, dtype)


def mask(kind: architecture.Layer, positions_BT: jax.Array, segments_BT: jax.Array) -> jax.Array:
    """[B, T, T]: causal, only within one segment, and only within the window."""
    T = segments_BT.shape[1]
    seen = jnp.tril(jnp.ones((T, T), bool)) & (segments_BT[:, :, None] == segments_BT[:, None, :])
    if kind.window is not None and kind.window < T:
        seen &= positions_BT[:, :, None] - positions_BT[:, None, :] < kind.window
    return seen


def lengths(positions_BT: jax.Array, segments_BT: jax.Array) -> jax.Array:
    """[B, T]: the length of each token's own segment, whatever else is in its row or batch. Segments are 0..T."""
    T = segments_BT.shape[1]
    last = jax.vmap(functools.partial(jax.ops.segment_max, num_segments=T + 1))
    return jnp.take_along_axis(last(positions_BT, segments_BT), segments_BT, axis=1) + 1


def embed(
    c: architecture.Config, params: Params, tokens_BT: jax.Array, positions_BT: jax.Array
) -> jax.Array:
    x_BTD = jnp.take(params["embed"]["embedding"], tokens_BT, axis=0)
    if c.embedding_scale != 1.0:
        # Rounded to the dtype of the weights, as Gemma's was in training.
        x_BTD = x_BTD * jnp.asarray(c.embedding_scale, x_BTD.dtype)
    if c.learned_positions:
        x_BTD = x_BTD + jnp.take(params["positions"]["embedding"], positions_BT, axis=0)
    return x_BTD


def final_norm(c: architecture.Config, params: Params, x_BTD: jax.Array) -> jax.Array:
    norm = nnx.eval_shape(lambda: _final_norm(c))
    return nnx.merge(nnx.split(norm)[0], params["final_norm"])(x_BTD)


def head(c: architecture.Config, params: Params, x: jax.Array, *, few: bool = False) -> jax.Array:
    """Logits [..., V] of hidden states [..., D], accumulated in at least float32.

    `few` rows [B, D] meet a tied embedding from its other side, which XLA on CPU does in two thirds of the time.
    """
    wide = jnp.promote_types(x.dtype, jnp.float32)
    if "head" in params:
        kernel = params["head"]["kernel"].astype(x.dtype)
        logits = jnp.einsum("...D,DV->...V", x, kernel, preferred_element_type=wide)
    else:
        embedding = params["embed"]["embedding"].astype(x.dtype)
        if few:
            logits = jnp.einsum("VD,BD->VB", embedding, x, preferred_element_type=wide).T
        else:
            logits = jnp.einsum("...D,VD->...V", x, embedding, preferred_element_type=wide)
    if c.logits_divisor != 1.0:
        logits = logits / c.logits_divisor
    if c.logits_softcap:
        logits = c.logits_softcap * jnp.tanh(logits / c.logits_softcap)
    return logits


def apply(
    c: architecture.Config,
    params: Params,
    tokens_BT: jax.Array,
    positions_BT: jax.Array | None = None,
    segments_BT: jax.Array | None = None,
) -> jax.Array:
    """Logits_BTV of whole sequences; see `hidden`."""
    return head(c, params, hidden(c, params, tokens_BT, positions_BT, segments_BT))
