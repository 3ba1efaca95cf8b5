# SPDX-License-Identifier: Apache-2.0
"""The decoder of every family: pure functions of parameters that scan one layer over the stack.

NNX says what a layer is; `nnx.split` happens once, here. From then on a model is a nested dict of arrays in
which the layers' parameters are stacked on a leading axis L, and `hidden` is a pure function of it that runs
`jax.lax.scan` over the stack: one layer is traced and compiled however deep the model is. Where layers differ (windows,
rotary bases) the scan also goes over the number of each layer's kind. Decoding with a cache is in `decoding`.

Letters in names: see `architecture`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jft import matmul, sharding, tree
from jft.models import architecture, attending, experts, layers, remat, rope

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Execution:
    """How a decoder is computed; the result is the same up to rounding.

    Attributes:
      dtype: of the computation, where it is not that of the parameters; each layer's are cast when it runs.
      remat: a key of `remat.POLICIES`: what the backward pass keeps.
      attention: which implementation, see `attention.choose`.
      einsum: how activations meet kernels.
      layout: of the mesh; None on one device.
    """

    dtype: Any = None
    remat: str = "none"
    attention: str = "plain"
    einsum: matmul.Einsum = jnp.einsum
    layout: sharding.Layout | None = None


HEAD_PARTS = 16  # at most: of 128,256 tokens' head 66 MB are dense at a time
SIMPLE = Execution()  # on one device, as it is written down


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
    how: Execution = SIMPLE,
) -> jax.Array:
    """Final hidden states, after the last norm.

    Args:
      c: the configuration.
      params: nested dict, layers stacked on a leading axis L.
      tokens_BT: token ids.
      positions_BT: positions within each example, counted up from token to token; 0..T-1 when not given.
      segments_BT: example numbers in packed rows; attention stays within one. One segment when not given.
      how: it is computed.

    Returns:
      x_BTD in the dtype of the embedding, or that of the computation.
    """
    return hidden_and_load(c, params, tokens_BT, positions_BT, segments_BT, how=how)[0]


def hidden_and_load(
    c: architecture.Config,
    params: Params,
    tokens_BT: jax.Array,
    positions_BT: jax.Array | None = None,
    segments_BT: jax.Array | None = None,
    counted_BT: jax.Array | None = None,
    *,
    how: Execution = SIMPLE,
) -> tuple[jax.Array, experts.Load | None]:
    """As `hidden`, and each layer's load of the experts over the tokens that `counted_BT` weighs, stacked on L."""
    B, T = tokens_BT.shape
    if positions_BT is None:
        positions_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
    if segments_BT is None:
        segments_BT = jnp.ones((B, T), jnp.int32)
    if counted_BT is not None and not c.experts:
        raise ValueError("a model without experts has no load")
    x_BTD = embed(c, params, tokens_BT, positions_BT, how)
    wide = jnp.promote_types(x_BTD.dtype, jnp.float32)
    stretched_BT = None
    if rope.needs_lengths(c):
        stretched_BT = lengths(positions_BT, segments_BT) > rope.original_length(c)
    of_kind = _chooser([tables(c, kind, positions_BT, stretched_BT, wide) for kind in c.kinds])
    definition = block(c)

    def layer(x_BTD: jax.Array, scanned: tuple[Params, jax.Array]) -> tuple[jax.Array, Any]:
        own, kind = scanned
        x_BTD = checkpoint_name(x_BTD, "stream")

        def attend(q: Any, k: Any, v: Any, sinks: Any) -> tuple[jax.Array, None]:
            attended = attending.attend(
                c,
                kind,
                q,
                k,
                v,
                segments_BT,
                sinks,
                implementation=how.attention,
                layout=how.layout,
            )
            return attended, None

        context = layers.Context(*of_kind(kind), counted_BT, how.einsum, how.layout)
        x_BTD, _, load = nnx.merge(definition, ready(own, x_BTD, how))(x_BTD, context, attend)
        return _stream(x_BTD, how), load

    kind_L = jnp.array([c.kind(i) for i in range(c.num_layers)], jnp.int32)
    x_BTD, load = jax.lax.scan(
        remat.layer(layer, how.remat), _stream(x_BTD, how), (params["layers"], kind_L)
    )
    return final_norm(c, params, x_BTD), load


def _stream(x_BTD: jax.Array, how: Execution) -> jax.Array:
    return x_BTD if how.layout is None else how.layout.stream(x_BTD)


def ready(layer: Params, x_BTD: jax.Array, how: Execution) -> Params:
    """One layer's parameters as it computes with them: in the computation's dtype, and on a mesh gathered.

    Cast first: what is gathered has the narrower dtype.
    """
    layer = jax.tree.map(tree.dense, layer, is_leaf=tree.is_quantized)
    if how.dtype is not None:
        layer = jax.tree.map(functools.partial(_cast, x_BTD, how.dtype), layer)
    if how.layout is None:
        return layer
    layout = how.layout
    gathered = {path: layout.gather(w, f"layers/{path}") for path, w in tree.flatten(layer).items()}
    return tree.unflatten(gathered)


def _cast(x_BTD: jax.Array, dtype: Any, w: jax.Array) -> jax.Array:
    """A layer's weight in another dtype, cast where the layer runs.

    XLA takes a cast of what a loop reads out of the loop, past a barrier too, and then holds all layers twice: 0.65 GB more
    of an 8B model on 16 devices. A factor of one that comes from the loop keeps it in.
    """
    if w.dtype == dtype:
        return w
    one = 1 + 0 * jax.lax.stop_gradient(x_BTD[0, 0, 0]).astype(w.dtype)
    return (w * one).astype(dtype)


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


def lengths(positions_BT: jax.Array, segments_BT: jax.Array) -> jax.Array:
    """[B, T]: the length of each token's own segment, whatever else is in its row or batch. Segments are 0..T."""
    T = segments_BT.shape[1]
    last = jax.vmap(functools.partial(jax.ops.segment_max, num_segments=T + 1))
    return jnp.take_along_axis(last(positions_BT, segments_BT), segments_BT, axis=1) + 1


def embed(
    c: architecture.Config,
    params: Params,
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    how: Execution = SIMPLE,
) -> jax.Array:
    x_BTD = _looked_up(params["embed"]["embedding"], tokens_BT, how)
    if c.embedding_scale != 1.0:
        # Rounded to the dtype of the weights, as Gemma's was in training.
        x_BTD = x_BTD * jnp.asarray(c.embedding_scale, x_BTD.dtype)
    if c.learned_positions:
        x_BTD = x_BTD + _looked_up(params["positions"]["embedding"], positions_BT, how)
    return x_BTD


def _looked_up(table: Any, at_BT: jax.Array, how: Execution) -> jax.Array:
    """Rows of a table. On a mesh each device looks up its part of the dimension for the rows of all, and they swap."""
    layout = how.layout
    if layout is not None:
        at_BT = layout.constrain(at_BT, ("slice", "data"), "context")
    if tree.is_quantized(table) and -table.ndim not in table.packed_axes:
        x_BTD = jax.tree.map(lambda x: jnp.take(x, at_BT, axis=0), table).dequantize()
    else:
        x_BTD = jnp.take(tree.dense(table), at_BT, axis=0)
    if how.dtype is not None:
        x_BTD = x_BTD.astype(how.dtype)
    if layout is None:
        return x_BTD
    x_BTD = layout.constrain(x_BTD, ("slice", "data"), "context", sharding.WIDE)
    return layout.constrain(x_BTD, sharding.ROWS, "context", "tensor")


def final_norm(c: architecture.Config, params: Params, x_BTD: jax.Array) -> jax.Array:
    norm = nnx.eval_shape(lambda: _final_norm(c))
    return nnx.merge(nnx.split(norm)[0], params["final_norm"])(x_BTD)


def head(
    c: architecture.Config,
    params: Params,
    x: jax.Array,
    *,
    few: bool = False,
    einsum: matmul.Einsum = matmul.wide,
) -> jax.Array:
    """Logits [..., V] of hidden states [..., D], accumulated in at least float32.

    `few` rows [B, D] meet a tied embedding from its other side, which XLA on CPU does in two thirds of the time.
    """
    if "head" in params:
        logits = _logits(functools.partial(einsum, "...D,DV->...V"), x, params["head"]["kernel"], 1)
    else:
        embedding = params["embed"]["embedding"]
        if few and not tree.is_quantized(embedding):
            logits = einsum("VD,BD->VB", embedding.astype(x.dtype), x).T
        else:
            logits = _logits(functools.partial(einsum, "...D,VD->...V"), x, embedding, 0)
    if c.logits_divisor != 1.0:
        logits = logits / c.logits_divisor
    if c.logits_softcap:
        logits = c.logits_softcap * jnp.tanh(logits / c.logits_softcap)
    return logits


def _logits(product: Callable[..., jax.Array], x: jax.Array, w: Any, axis: int) -> jax.Array:
    """Of a quantised weight, a part of the vocabulary (that dimension of w) after the other: no more of it is ever dense."""
    if not tree.is_quantized(w) or axis - w.ndim in w.packed_axes:
        return product(x, tree.dense(w).astype(x.dtype))
    V = w.shape[axis]
    count = next(n for n in range(HEAD_PARTS, 0, -1) if V % n == 0)
    cut = functools.partial(jax.lax.dynamic_slice_in_dim, slice_size=V // count, axis=axis)

    @jax.checkpoint
    def part(x: jax.Array, i: jax.Array) -> jax.Array:
        own = jax.tree.map(lambda array: cut(array, i * (V // count)), w)
        return product(x, own.dequantize().astype(x.dtype))

    parts = jax.lax.map(functools.partial(part, x), jnp.arange(count))
    return jnp.moveaxis(parts, 0, -2).reshape(*x.shape[:-1], V)


def apply(
    c: architecture.Config,
    params: Params,
    tokens_BT: jax.Array,
    positions_BT: jax.Array | None = None,
    segments_BT: jax.Array | None = None,
) -> jax.Array:
    """Logits_BTV of whole sequences; see `hidden`."""
    x_BTD = hidden(c, params, tokens_BT, positions_BT, segments_BT)
    return head(c, params, x_BTD)
