# SPDX-License-Identifier: Apache-2.0
"""Language models as the users of each library write them, and which of their weights to adapt.

Nothing here is written for LoRA. Sizes differ from each other, so that a shape tells what it is.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from jft import lora

B, T, V, D, N, H, F, L = 2, 5, 23, 12, 3, 4, 28, 2
E, C = 6, 7  # experts, and the places that each has


@dataclasses.dataclass(frozen=True)
class Model:
    """A function of parameters and tokens [B, T], and what to adapt.

    Attributes:
      f: f(params, tokens_BT) -> logits_BTV.
      params: any pytree.
      targets: patterns of paths; each must match something.
      layouts: (pattern, layout) rules.
    """

    f: Callable[[Any, jax.Array], jax.Array]
    params: Any
    targets: tuple[str, ...]
    layouts: lora.layouts.Rules


def tokens() -> jax.Array:
    return jax.random.randint(jax.random.key(1), (B, T), 0, V)


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x_BTD: jax.Array, mask: jax.Array) -> tuple[jax.Array, None]:
        h_BTD = nn.LayerNorm()(x_BTD)
        attention = nn.MultiHeadDotProductAttention(num_heads=N, deterministic=True)
        x_BTD = x_BTD + attention(h_BTD, mask=mask)
        h_BTF = nn.gelu(nn.Dense(F, name="up")(nn.LayerNorm()(x_BTD)))
        return x_BTD + nn.Dense(D, name="down")(h_BTF), None


class LinenTransformer(nn.Module):
    tied: bool

    @nn.compact
    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        embed = nn.Embed(V, D)
        position_TD = self.param("position", nn.initializers.normal(0.02), (T, D))
        layers = nn.scan(
            nn.remat(LinenBlock, prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=L,
        )
        mask = nn.make_causal_mask(tokens_BT)
        x_BTD, _ = layers(name="layers")(embed(tokens_BT) + position_TD, mask)
        x_BTD = nn.LayerNorm()(x_BTD)
        return embed.attend(x_BTD) if self.tied else nn.Dense(V, name="head")(x_BTD)


def linen(tied: bool) -> Model:
    module = LinenTransformer(tied)
    params = jax.jit(module.init)(jax.random.key(0), tokens())
    targets = (r".*/(query|key|value|out)/kernel", r".*/(up|down)/kernel", r".*/embedding")
    head = () if tied else (r".*/head/kernel",)
    return Model(module.apply, params, (*targets, *head), lora.layouts.FLAX)


class NNXBlock(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.norm1 = nnx.LayerNorm(D, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(N, D, decode=False, rngs=rngs)
        self.norm2 = nnx.LayerNorm(D, rngs=rngs)
        self.up = nnx.Linear(D, F, rngs=rngs)
        self.down = nnx.Linear(F, D, rngs=rngs)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        mask = nnx.make_causal_mask(x_BTD[..., 0])
        x_BTD = x_BTD + self.attention(self.norm1(x_BTD), mask=mask)
        return x_BTD + self.down(nnx.gelu(self.up(self.norm2(x_BTD))))


class NNXTransformer(nnx.Module):
    """A list of blocks, an untied head."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.embed = nnx.Embed(V, D, param_dtype=float, rngs=rngs)
        self.blocks = nnx.List([NNXBlock(rngs=rngs) for _ in range(L)])
        self.norm = nnx.LayerNorm(D, rngs=rngs)
        self.head = nnx.Linear(D, V, rngs=rngs)

    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        x_BTD = self.embed(tokens_BT)
        for block in self.blocks:
            x_BTD = block(x_BTD)
        return self.head(self.norm(x_BTD))


class NNXScanned(nnx.Module):
    """Stacked blocks under nnx.scan and nnx.remat, a tied head."""

    def __init__(self, *, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=L)
        @nnx.vmap
        def create(rngs: nnx.Rngs) -> NNXBlock:
            return NNXBlock(rngs=rngs)

        self.embed = nnx.Embed(V, D, param_dtype=float, rngs=rngs)
        self.blocks = create(rngs)
        self.norm = nnx.LayerNorm(D, rngs=rngs)

    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        @nnx.remat
        def forward(x_BTD: jax.Array, block: NNXBlock) -> jax.Array:
            return block(x_BTD)

        return self.embed.attend(self.norm(forward(self.embed(tokens_BT), self.blocks)))


def flax_nnx(module: type[nnx.Module], *head: str) -> Model:
    graph, params, rest = nnx.split(nnx.jit(module)(rngs=nnx.Rngs(0)), nnx.Param, ...)

    def f(params: Any, tokens_BT: jax.Array) -> jax.Array:
        return nnx.merge(graph, params, rest)(tokens_BT)

    targets = (r".*/(query|key|value|out)/kernel", r".*/(up|down)/kernel", r".*/embedding", *head)
    return Model(f, nnx.to_pure_dict(params), targets, lora.layouts.FLAX)


class EquinoxBlock(eqx.Module):
    norm1: eqx.nn.LayerNorm
    attention: eqx.nn.MultiheadAttention
    norm2: eqx.nn.LayerNorm
    mlp: eqx.nn.MLP

    def __init__(self, key: jax.Array):
        attention_key, mlp_key = jax.random.split(key)
        self.norm1 = eqx.nn.LayerNorm(D)
        self.attention = eqx.nn.MultiheadAttention(N, D, key=attention_key)
        self.norm2 = eqx.nn.LayerNorm(D)
        self.mlp = eqx.nn.MLP(D, D, F, depth=1, activation=jax.nn.gelu, key=mlp_key)

    def __call__(self, x_TD: jax.Array) -> jax.Array:
        h_TD = jax.vmap(self.norm1)(x_TD)
        mask = jnp.tril(jnp.ones((T, T), bool))
        x_TD = x_TD + self.attention(h_TD, h_TD, h_TD, mask)
        return x_TD + jax.vmap(self.mlp)(jax.vmap(self.norm2)(x_TD))


class EquinoxTransformer(eqx.Module):
    """Blocks made by vmap and run by scan, of one sequence; an untied head."""

    embed: eqx.nn.Embedding
    blocks: EquinoxBlock
    norm: eqx.nn.LayerNorm
    head: eqx.nn.Linear

    def __init__(self, key: jax.Array):
        embed_key, head_key, blocks_key = jax.random.split(key, 3)
        self.embed = eqx.nn.Embedding(V, D, key=embed_key)
        self.blocks = eqx.filter_vmap(EquinoxBlock)(jax.random.split(blocks_key, L))
        self.norm = eqx.nn.LayerNorm(D)
        self.head = eqx.nn.Linear(D, V, key=head_key)

    def __call__(self, tokens_T: jax.Array) -> jax.Array:
        arrays, static = eqx.partition(self.blocks, eqx.is_array)

        @eqx.filter_checkpoint
        def layer(x_TD: jax.Array, block: Any) -> tuple[jax.Array, None]:
            return eqx.combine(block, static)(x_TD), None

        x_TD, _ = lax.scan(layer, jax.vmap(self.embed)(tokens_T), arrays)
        return jax.vmap(self.head)(jax.vmap(self.norm)(x_TD))


class EquinoxTied(eqx.Module):
    """One block; the head is the embedding, tied as the documentation of `eqx.nn.Shared` does it."""

    shared: eqx.nn.Shared
    block: EquinoxBlock

    def __init__(self, key: jax.Array):
        embed_key, head_key, block_key = jax.random.split(key, 3)
        embed = eqx.nn.Embedding(V, D, key=embed_key)
        head = eqx.nn.Linear(D, V, use_bias=False, key=head_key)
        self.shared = eqx.nn.Shared((embed, head), lambda x: x[1].weight, lambda x: x[0].weight)
        self.block = EquinoxBlock(block_key)

    def __call__(self, tokens_T: jax.Array) -> jax.Array:
        embed, head = self.shared()
        return jax.vmap(head)(self.block(jax.vmap(embed)(tokens_T)))


def equinox(module: type[eqx.Module], *embedding_and_head: str) -> Model:
    params, static = eqx.partition(eqx.filter_jit(module)(jax.random.key(0)), eqx.is_array)

    def f(params: Any, tokens_BT: jax.Array) -> jax.Array:
        return jax.vmap(eqx.combine(params, static))(tokens_BT)

    block = (r".*/(query|key|value|output)_proj/weight", r".*/mlp/layers/\d/weight")
    # Where embedding and head share a weight its path says neither: [V, D] is a table's layout.
    layouts = (("shared/.*", "io"), *lora.layouts.EQUINOX)
    return Model(f, params, (*block, *embedding_and_head), layouts)


def haiku_block(x_BTD: jax.Array) -> jax.Array:
    norm = lambda x: hk.LayerNorm(-1, create_scale=True, create_offset=True)(x)  # noqa: E731
    init = hk.initializers.VarianceScaling()
    mask = jnp.tril(jnp.ones((1, 1, T, T), bool))
    h_BTD = norm(x_BTD)
    attention = hk.MultiHeadAttention(N, H, w_init=init, model_size=D)
    x_BTD = x_BTD + attention(h_BTD, h_BTD, h_BTD, mask=mask)
    h_BTF = jax.nn.gelu(hk.Linear(F, w_init=init, name="up")(norm(x_BTD)))
    return x_BTD + hk.Linear(D, w_init=init, name="down")(h_BTF)


def haiku_transformer(tokens_BT: jax.Array, stacked: bool) -> jax.Array:
    x_BTD = hk.Embed(V, D)(tokens_BT)
    if stacked:
        x_BTD = hk.layer_stack(L)(hk.remat(haiku_block))(x_BTD)
    else:
        for _ in range(L):
            x_BTD = hk.remat(haiku_block)(x_BTD)
    return hk.Linear(V, name="head")(hk.LayerNorm(-1, True, True)(x_BTD))


def haiku(stacked: bool) -> Model:
    call = hk.without_apply_rng(hk.transform(lambda x: haiku_transformer(x, stacked)))
    params = jax.jit(call.init)(jax.random.key(0), tokens())
    targets = (r".*attention.*/w", r".*(up|down)\w*/w", r"embed/embeddings", r"head/w")
    return Model(call.apply, params, targets, lora.layouts.HAIKU)


def normal_init(shapes: dict[str, tuple[int, ...]]) -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    return {
        name: jnp.asarray(rng.normal(size=shape) / shape[-2] ** 0.5)
        for name, shape in shapes.items()
    }


def rms_norm(x: jax.Array) -> jax.Array:
    return x * lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)


def attention(params: dict[str, jax.Array], x_BTD: jax.Array) -> jax.Array:
    """A fused kernel of queries, keys and values."""
    q_BTNH, k_BTNH, v_BTNH = (
        y.reshape(B, T, N, H) for y in jnp.split(x_BTD @ params["qkv"], 3, axis=-1)
    )
    out_BTNH = jax.nn.dot_product_attention(q_BTNH, k_BTNH, v_BTNH, is_causal=True)
    return out_BTNH.reshape(B, T, D) @ params["out"]


def plain() -> Model:
    layers = {"qkv": (L, D, 3 * D), "out": (L, D, D), "up": (L, D, F), "down": (L, F, D)}
    params = {"embed": normal_init({"w": (V, D)})["w"], "layers": normal_init(layers)}

    @jax.checkpoint
    def layer(x_BTD: jax.Array, w: dict[str, jax.Array]) -> tuple[jax.Array, None]:
        x_BTD = x_BTD + attention(w, rms_norm(x_BTD))
        return x_BTD + jax.nn.silu(rms_norm(x_BTD) @ w["up"]) @ w["down"], None

    def f(params: Any, tokens_BT: jax.Array) -> jax.Array:
        x_BTD, _ = lax.scan(layer, params["embed"][tokens_BT], params["layers"])
        return rms_norm(x_BTD) @ params["embed"].T

    return Model(
        f, params, ("layers/(qkv|out)", "layers/(up|down)", "embed"), (("layers/.*", "bio"),)
    )


def einsum_experts(params: dict[str, jax.Array], x_BTD: jax.Array) -> jax.Array:
    """Dispatched by one-hot masks to places, as the Switch Transformer does (arXiv:2101.03961)."""
    x = x_BTD.reshape(B * T, D)
    gates = jax.nn.softmax(x @ params["router"])
    one_hot = jax.nn.one_hot(jnp.argmax(gates, axis=-1), E, dtype=int)
    place = (jnp.cumsum(one_hot, axis=0) * one_hot).sum(axis=-1) - 1
    dispatch = jnp.einsum("te,tc->tec", one_hot, jax.nn.one_hot(place, C))
    combine = dispatch * gates[..., None]
    h = jax.nn.relu(
        jnp.einsum("ecd,edf->ecf", jnp.einsum("tec,td->ecd", dispatch, x), params["up"])
    )
    y = jnp.einsum("tec,ecd->td", combine, jnp.einsum("ecf,efd->ecd", h, params["down"]))
    return y.reshape(B, T, D)


def vmapped_experts(params: dict[str, jax.Array], x_BTD: jax.Array) -> jax.Array:
    """Every expert sees every token; the gates weigh them."""

    def expert(up: jax.Array, down: jax.Array) -> jax.Array:
        return jax.nn.relu(x_BTD @ up) @ down

    gates_BTE = jax.nn.softmax(x_BTD @ params["router"])
    y_EBTD = jax.vmap(expert)(params["up"], params["down"])
    return jnp.einsum("ebtd,bte->btd", y_EBTD, gates_BTE)


def ragged_experts(params: dict[str, jax.Array], x_BTD: jax.Array) -> jax.Array:
    """The two best of each token, sorted by expert, without padding."""
    x = x_BTD.reshape(B * T, D)
    gates, chosen = lax.top_k(jax.nn.softmax(x @ params["router"]), 2)
    order = jnp.argsort(chosen.ravel())
    sizes = jnp.bincount(chosen.ravel(), length=E)
    h = jax.nn.relu(lax.ragged_dot(jnp.repeat(x, 2, axis=0)[order], params["up"], sizes))
    y = lax.ragged_dot(h, params["down"], sizes)
    y = jnp.zeros_like(y).at[order].set(y).reshape(B * T, 2, D)
    return jnp.einsum("tkd,tk->td", y, gates).reshape(B, T, D)


def experts(mixture: Callable[[Any, jax.Array], jax.Array]) -> Model:
    """One layer of attention and experts."""
    shapes = {"embed": (V, D), "qkv": (D, 3 * D), "out": (D, D), "head": (D, V)}
    shapes |= {"router": (D, E), "up": (E, D, F), "down": (E, F, D)}

    def f(params: Any, tokens_BT: jax.Array) -> jax.Array:
        x_BTD = params["embed"][tokens_BT]
        x_BTD = x_BTD + attention(params, rms_norm(x_BTD))
        x_BTD = x_BTD + mixture(params, rms_norm(x_BTD))
        return rms_norm(x_BTD) @ params["head"]

    targets = ("embed", "qkv|out", "router", "up|down", "head")
    return Model(f, normal_init(shapes), targets, (("up|down", "bio"),))


MODELS: dict[str, Callable[[], Model]] = {
    "Linen": lambda: linen(tied=False),
    "Linen, tied": lambda: linen(tied=True),
    "NNX, list": lambda: flax_nnx(NNXTransformer, r"head/kernel"),
    "NNX, scanned and tied": lambda: flax_nnx(NNXScanned),
    "Equinox": lambda: equinox(EquinoxTransformer, r"embed/weight", r"head/weight"),
    "Equinox, tied": lambda: equinox(EquinoxTied, r"shared/pytree/0/weight"),
    "Haiku": lambda: haiku(stacked=False),
    "Haiku, layer_stack": lambda: haiku(stacked=True),
    "plain": plain,
    "experts by einsum": lambda: experts(einsum_experts),
    "experts by vmap": lambda: experts(vmapped_experts),
    "experts by ragged_dot": lambda: experts(ragged_experts),
}
