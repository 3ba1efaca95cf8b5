# SPDX-License-Identifier: Apache-2.0
"""The program that the transform makes is the one that a person would have written by hand."""

import collections
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest
from jax import lax

from jft import lora

LAYERS, D, HEADS, H, F, V, T = 12, 32, 4, 8, 48, 64, 16
KERNELS = {
    "query": ((D, HEADS, H), "bioo"),
    "key": ((D, HEADS, H), "bioo"),
    "value": ((D, HEADS, H), "bioo"),
    "out": ((HEADS, H, D), "biio"),
    "up": ((D, F), "bio"),
    "down": ((F, D), "bio"),
}
SPEC = lora.Spec(
    rank=4,
    alpha=8.0,
    targets="layers/.*|head",
    layouts=tuple((f"layers/{name}", layout) for name, (_, layout) in KERNELS.items()),
)

Dense = Callable[[str, str, jax.Array], jax.Array]


@jax.jit
def init() -> dict[str, Any]:
    keys = iter(jax.random.split(jax.random.key(0), len(KERNELS) + 2))
    layers = {
        name: jax.random.normal(next(keys), (LAYERS, *shape)) * 0.3 * D**-0.5
        for name, (shape, _) in KERNELS.items()
    }
    table, head = (jax.random.normal(next(keys), shape) for shape in ((V, D), (D, V)))
    return {"layers": layers, "embedding": table, "head": head}


def block(x: jax.Array, dense: Dense) -> jax.Array:
    q, k, v = (dense(name, "td,dnh->tnh", x) for name in ("query", "key", "value"))
    scores = jax.nn.softmax(jnp.einsum("tnh,snh->nts", q, k))
    x = x + dense("out", "tnh,nhd->td", jnp.einsum("nts,snh->tnh", scores, v))
    return x + dense("down", "tf,fd->td", jax.nn.silu(dense("up", "td,df->tf", x)))


def model(params: Any, tokens: jax.Array) -> jax.Array:
    @jax.checkpoint
    def layer(x: jax.Array, kernels: Any) -> tuple[jax.Array, None]:
        return block(x, lambda name, equation, x: jnp.einsum(equation, x, kernels[name])), None

    x, _ = lax.scan(layer, params["embedding"][tokens], params["layers"])
    return jax.nn.logsumexp(jnp.einsum("td,dv->tv", x, params["head"]))


# How a person splits each equation: through A, then through B.
BY_HAND = {
    "td,dnh->tnh": ("td,dr->tr", "tr,rnh->tnh"),
    "tnh,nhd->td": ("tnh,nhr->tr", "tr,rd->td"),
    "td,df->tf": ("td,dr->tr", "tr,rf->tf"),
    "tf,fd->td": ("tf,fr->tr", "tr,rd->td"),
}


def model_by_hand(params: Any, adapters: lora.Adapters, tokens: jax.Array) -> jax.Array:
    @jax.checkpoint
    def layer(x: jax.Array, leaves: Any) -> tuple[jax.Array, None]:
        kernels, factors = leaves

        def dense(name: str, equation: str, x: jax.Array) -> jax.Array:
            first, second = BY_HAND[equation]
            a, b, scale = factors[name].a, factors[name].b, factors[name].scale
            thin = scale * jnp.einsum(first, x, a)
            return jnp.einsum(equation, x, kernels[name]) + jnp.einsum(second, thin, b)

        return block(x, dense), None

    factors = {name: adapters[f"layers/{name}"] for name in KERNELS}
    x, _ = lax.scan(layer, params["embedding"][tokens], (params["layers"], factors))
    head = adapters["head"]
    thin = head.scale * jnp.einsum("td,dr->tr", x, head.a)
    logits = jnp.einsum("td,dv->tv", x, params["head"]) + jnp.einsum("tr,rv->tv", thin, head.b)
    return jax.nn.logsumexp(logits)


def histogram(f: Callable, *args: Any) -> collections.Counter[str]:
    """Equations by primitive. Calls count as what is in them: jit wraps whatever a library traced once."""
    names = (eqn.primitive.name for eqn in jaxprs.equations(jax.make_jaxpr(f)(*args).jaxpr))
    return collections.Counter(name for name in names if name != "jit")


def make() -> tuple[Any, lora.Adapters, jax.Array]:
    params = init()
    adapters = jax.jit(lambda params: lora.init(SPEC, params, key=jax.random.key(1)))(params)
    return params, adapters, jnp.arange(T)


def test_as_tight_as_by_hand() -> None:
    params, adapters, tokens = make()
    mine = lora.transform(model)
    got = histogram(jax.value_and_grad(mine, argnums=1), params, adapters, tokens)
    want = histogram(jax.value_and_grad(model_by_hand, argnums=1), params, adapters, tokens)
    assert got == want


def test_by_hand_is_the_same_function(x64: None) -> None:
    params, adapters, tokens = make()
    noise = np.random.default_rng(2).normal(size=10**6)
    params, adapters = jax.tree.map(
        lambda x: np.asarray(x, "float64") + 0.01 * noise[: x.size].reshape(x.shape),
        (params, adapters),
    )
    got, want = (
        jax.jit(jax.value_and_grad(f, argnums=1))(params, adapters, tokens)
        for f in (lora.transform(model), model_by_hand)
    )
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        # float64 sums in another order
        assert np.allclose(x, y, rtol=1e-11, atol=1e-11 * np.abs(y).max())


def saved_bytes(f: Callable, *args: Any) -> int:
    """Bytes that the backward pass of f keeps beside its arguments."""
    _, pull = jax.eval_shape(functools.partial(jax.vjp, f), *args)
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(pull))


@pytest.mark.parametrize("mode", ["hidden", "factored"])
def test_23_residuals_of_the_hidden_mode(mode: str) -> None:
    """With a policy that saves products, `hidden` keeps what the merged function keeps; `factored` keeps more."""
    tokens_TD = jnp.ones((64, D))
    w, shape = {"w": jnp.ones((D, F)), "v": jnp.ones((F, D))}, {"targets": "w|v", "rank": 4}
    adapters = lora.init(lora.Spec(**shape), w, key=jax.random.key(0))
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable

    def f(params: Any, x: jax.Array) -> jax.Array:
        return jnp.sin(jnp.sin(x @ params["w"]) @ params["v"]).sum()

    def residuals(run: Callable) -> int:
        kept = jax.checkpoint(run, policy=policy)
        return saved_bytes(kept, adapters)

    merged = residuals(lambda a: f(lora.add(w, a), tokens_TD))
    mine = residuals(lambda a: lora.transform(f, mode=mode)(w, a, tokens_TD))
    # The base is closed over, so the merged form keeps none of it either; adapters and x stand on both sides.
    if mode == "hidden":
        assert mine <= merged
    else:
        assert mine > merged
