# SPDX-License-Identifier: Apache-2.0
"""A quantised base stays packed until a product, and gives what the dequantised one gives."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jft import lora, quant, tree

# Both sides are double-precision sums of tens of terms of order 1, in another order.
close = functools.partial(np.testing.assert_allclose, rtol=1e-11, atol=1e-11)

L, D, F, V = 3, 64, 128, 70
# Blocks along the outputs or along the inputs, and scales that are packed too. The table's run along its rows: others would
# not be whole.
WAYS: dict[str, dict[str, Any]] = {
    "nf4": {"kind": "nf4"},
    "nf4, double": {"kind": "nf4", "axis": -2, "double": True, "stacked": 1},
    "int4": {"kind": "int4", "axis": -2, "block": 32},
    "int8": {"kind": "int8"},
}


def model(params: Any, tokens: jax.Array) -> jax.Array:
    """A lookup, stacked layers under remat with casts inside, an indexed loop, a split, and a tied head."""
    x = jnp.take(params["table"], tokens, axis=0)

    @jax.checkpoint
    def layer(x: jax.Array, w: Any) -> tuple[jax.Array, None]:
        gate, up = jnp.split(w["up"].astype(x.dtype), 2, axis=1)
        h = jnp.tanh(x @ gate) * (x @ up)
        return x + h @ w["down"].astype(x.dtype).T, None

    x, _ = lax.scan(layer, x, params["layers"])

    def body(i: jax.Array, x: jax.Array) -> jax.Array:
        return x + jnp.tanh(x @ lax.dynamic_index_in_dim(params["mix"], i, keepdims=False))

    x = lax.fori_loop(0, L, body, x)
    return x @ params["table"].T


def make(way: str, use_dora: bool = False) -> tuple[Any, Any, lora.Adapters, jax.Array]:
    """The quantised base, the same dequantised, adapters for part of it, tokens."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape) * D**-0.5)  # noqa: E731
    dense = {
        "table": normal(V, D),
        "layers": {"up": normal(L, D, F), "down": normal(L, D, F // 2)},
        "mix": normal(L, D, D),
    }
    packed = {
        name: jax.tree.map(lambda w: quant.quantize(w, **WAYS[way]), part)
        for name, part in dense.items()
        if name != "table"
    }
    packed["table"] = quant.quantize(dense["table"], WAYS[way]["kind"])
    values = jax.tree.map(lambda q: q.dequantize(), packed, is_leaf=tree.is_quantized)
    spec = lora.Spec(
        rank=2,
        alpha=3.0,
        targets="table|layers/.*",  # mix is quantised and has no adapter
        layouts=(("layers/up", "bio"), ("layers/down", "boi")),
        use_dora=use_dora,
    )
    adapters = lora.init(spec, packed, key=jax.random.key(0))
    adapters = jax.tree.map(lambda x: x + normal(*x.shape), adapters)
    return packed, values, adapters, jnp.arange(6)


def loss(f: Callable, mode: str) -> Callable:
    g = lora.transform(f, mode=mode)
    return lambda adapters, params, x: jnp.sin(g(params, adapters, x)).sum()


@pytest.mark.usefixtures("quick_compiles")
@pytest.mark.parametrize(
    ("mode", "use_dora"), [*((mode, False) for mode in lora.MODES), ("factored", True)]
)
@pytest.mark.parametrize("way", WAYS)
def test_19_equals_the_merge_of_the_dequantised(
    way: str, mode: str, use_dora: bool, x64: None
) -> None:
    packed, values, adapters, tokens = make(way, use_dora)
    got = jax.value_and_grad(loss(model, mode))(adapters, packed, tokens)
    merged = lambda a: jnp.sin(model(lora.add(values, a), tokens)).sum()  # noqa: E731
    want = jax.value_and_grad(merged)(adapters)
    jax.tree.map(close, got, want)
    assert all(use.factored for use in lora.explain(model, packed, adapters, tokens))
    close(lora.transform(model)(packed, {}, tokens), model(values, tokens))  # no adapter at all


def shapes(jaxpr: Any) -> Iterator[tuple[tuple[int, ...], Any]]:
    for eqn in jaxpr.eqns:
        yield from ((v.aval.shape, v.aval.dtype) for v in eqn.outvars)
        for value in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from shapes(inner)


@pytest.mark.parametrize("way", ["nf4", "nf4, double"])
@pytest.mark.parametrize("mode", lora.MODES)
def test_19_no_dense_stack_is_formed(mode: str, way: str) -> None:
    """Nor a dense table for a lookup, nor anywhere in the gradient."""
    packed, _, adapters, tokens = make(way)
    jaxpr = jax.make_jaxpr(jax.grad(loss(model, mode)))(adapters, packed, tokens).jaxpr
    stacks = {(L, D, F), (L, D, F // 2), (L, D, D)}
    floats = [s for s, dtype in shapes(jaxpr) if jnp.issubdtype(dtype, jnp.floating)]
    assert not stacks & set(floats)
    lookup = jax.make_jaxpr(
        lora.transform(lambda p, x: jnp.take(p["table"], x, axis=0, mode="clip"))
    )
    found = [s for s, _ in shapes(lookup(packed, {"table": adapters["table"]}, tokens).jaxpr)]
    assert (V, D) not in found


@pytest.mark.parametrize("way", ["nf4", "nf4, double"])
@pytest.mark.parametrize("mode", lora.MODES)
def test_23_no_dense_weight_is_kept_without_remat(mode: str, way: str) -> None:
    """QLoRA needs no remat here: the backward pass dequantises again."""
    packed, _, adapters, _ = make(way)
    w, factors = (
        packed["mix"],
        {"mix": lora.Factors(jnp.ones((L, D, 2)), jnp.ones((L, 2, D)), 1.0, "bio")},
    )

    def f(params: Any, x: jax.Array) -> jax.Array:
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["mix"])[0]

    g = lora.transform(f, mode=mode)
    x = jnp.ones((4, D))
    _, pull = jax.eval_shape(functools.partial(jax.vjp, lambda a: g({"mix": w}, a, x)), factors)
    kept = [
        leaf.shape for leaf in jax.tree.leaves(pull) if jnp.issubdtype(leaf.dtype, jnp.floating)
    ]
    assert (L, D, D) not in kept
    assert (D, D) not in kept


def test_a_cast_before_a_step_comes_before_it(x64: None) -> None:
    """bfloat16 first and halved then, or the other way round, differ in no bit from the dense program."""
    q = quant.quantize(jax.random.normal(jax.random.key(0), (D, F), "float32"), "int8")
    x = jax.random.normal(jax.random.key(1), (2, D), jnp.bfloat16)

    def f(params: Any, x: jax.Array) -> jax.Array:
        w = params["w"].astype(jnp.bfloat16) * jnp.bfloat16(0.3)
        return x @ (w.astype(jnp.float32) + 0).astype(jnp.bfloat16)

    def only_views(params: Any, x: jax.Array) -> jax.Array:
        return x @ (params["w"].astype(jnp.bfloat16) * jnp.bfloat16(0.3)).T.T

    for program in (f, only_views):
        got = jax.jit(lora.transform(program))({"w": q}, {}, x)
        np.testing.assert_array_equal(got, jax.jit(program)({"w": q.dequantize()}, x))


def test_merging_into_a_quantised_base_gives_a_dense_leaf(x64: None) -> None:
    packed, values, adapters, _ = make("int8")
    merged = lora.merge(packed, adapters, dtype=jnp.float64)
    close(merged.params["table"], lora.add(values, adapters)["table"])
    assert tree.is_quantized(lora.unmerge(merged)["table"])
