# SPDX-License-Identifier: Apache-2.0
"""What a Spec can ask for beyond plain LoRA: DoRA, dropout, patterns, initialisers; and several adapters at once."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jft import errors, lora, quant

# Both sides are double-precision sums of tens of terms of order 1, in another order.
close = functools.partial(np.testing.assert_allclose, rtol=1e-11, atol=1e-11)


def normal(seed: int, *shape: int, dtype: Any = None) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def filled(adapters: lora.Adapters, seed: int = 7) -> lora.Adapters:
    """No factor is zero; magnitudes stay near what they were."""
    leaves, structure = jax.tree.flatten(adapters)
    noise = lambda i, x: 0.3 * np.asarray(normal(seed + i, *x.shape))  # noqa: E731
    moved = [jnp.asarray(np.asarray(x) + noise(i, x)) for i, x in enumerate(leaves)]
    return jax.tree.unflatten(structure, moved)


def tied(params: Any, x: jax.Array) -> jax.Array:
    h = jnp.take(params["w"], jnp.arange(6).reshape(2, 3) % 5, axis=0) * x
    return jnp.tanh(h) @ params["w"].T


def stacked(params: Any, x: jax.Array) -> jax.Array:
    @jax.checkpoint
    def layer(x: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
        return jnp.tanh(jnp.einsum("td,dhk->thk", x, w).reshape(x.shape)), None

    return lax.scan(layer, x, params["w"])[0]


def fused(params: Any, x: jax.Array) -> jax.Array:
    q, k = jnp.split(params["w"], (3,), axis=1)
    return jnp.concatenate([x @ q, jnp.sin(x @ k), (x @ q) ** 2], axis=1)


# name: f, shape of w, its layout, shape of x
MODELS: dict[str, tuple[Callable, tuple[int, ...], str, tuple[int, ...]]] = {
    "dense": (lambda p, x: jnp.sin(x @ p["w"]), (5, 7), "io", (3, 5)),
    "on the left": (lambda p, x: jnp.sin(p["w"].T @ x.T), (5, 7), "io", (3, 5)),
    "[out, in]": (lambda p, x: jnp.sin(x @ p["w"].T), (7, 5), "oi", (3, 5)),
    "two inputs": (lambda p, x: jnp.einsum("thk,hkd->td", x, p["w"]), (2, 4, 5), "iio", (3, 2, 4)),
    "split": (fused, (5, 9), "io", (3, 5)),
    "tied": (tied, (11, 5), "io", (2, 3, 5)),
    "scan, remat": (stacked, (3, 8, 2, 4), "bioo", (5, 8)),
}


def case(name: str, **options: Any) -> tuple[Callable, Any, lora.Adapters, jax.Array]:
    f, shape, layout, x_shape = MODELS[name]
    params = {"w": normal(0, *shape)}
    spec = lora.Spec(rank=2, alpha=3.0, targets="w", layouts=(("w", layout),), **options)
    return f, params, start(spec, params), normal(1, *x_shape)


@functools.partial(jax.jit, static_argnums=0)
def start(spec: lora.Spec, params: Any) -> lora.Adapters:
    return lora.init(spec, params, key=jax.random.key(0))


def dora_by_hand(w: jax.Array, factors: lora.Factors) -> jax.Array:
    """m V / |V| with V = W + s A B formed, the norm over the inputs and detached as in PEFT."""
    direction = w + lora.delta(factors)
    axes = tuple(i for i, kind in enumerate(factors.layout) if kind == "i")
    norm = lax.stop_gradient(jnp.sqrt((direction**2).sum(axes, keepdims=True)))
    return jnp.expand_dims(factors.magnitude, axes) * direction / norm


@pytest.mark.parametrize("name", MODELS)
def test_27_dora(name: str, x64: None) -> None:
    f, params, fresh, x = case(name, use_dora=True)
    adapters = filled(fresh)

    def by_hand(params: Any, adapters: lora.Adapters, x: jax.Array) -> jax.Array:
        return f({"w": dora_by_hand(params["w"], adapters["w"])}, x)

    def gradients(g: Callable, *given: Any) -> Any:
        return jax.value_and_grad(lambda *given: jnp.cos(g(*given)).sum(), (1, 2))(*given)

    @jax.jit  # as one program: what they share is compiled once
    def run(params: Any, fresh: lora.Adapters, adapters: lora.Adapters, x: jax.Array) -> Any:
        modes = [lora.transform(f, mode=mode) for mode in lora.MODES]
        tuned = [gradients(g, params, adapters, x) for g in (by_hand, *modes)]
        return f(params, x), [g(params, fresh, x) for g in modes], tuned

    base, starts, (want, *gots) = run(params, fresh, adapters, x)
    for mode, at_start, got in zip(lora.MODES, starts, gots, strict=True):
        close(at_start, base, err_msg=mode)  # the base, to rounding
        jax.tree.map(functools.partial(close, err_msg=mode), got, want)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(want)), "gradients are seen"
    close(lora.add(params, adapters)["w"], dora_by_hand(params["w"], adapters["w"]))
    assert all(use.factored for use in lora.explain(f, params, adapters, x))


def test_dora_leaves_alone_what_is_out_of_bounds(x64: None) -> None:
    """The fill value stands for rows that are not there: no magnitude multiplies it."""
    params = {"w": normal(0, 11, 5)}
    spec = lora.Spec(rank=2, use_dora=True, targets="w")
    adapters = filled(lora.init(spec, params, key=jax.random.key(0)))

    def rows(fill: float) -> Callable:
        at = jnp.array([3, 99])
        return lambda params: jnp.take(params["w"], at, axis=0, mode="fill", fill_value=fill)

    merged = lora.add(params, adapters)
    with pytest.raises(lora.MaterializeError, match="^w is used by gather"):
        lora.transform(rows(2.0))(params, adapters)
    close(lora.transform(rows(2.0), materialize=("w",))(params, adapters), rows(2.0)(merged))
    for fill in (0.0, np.nan):
        close(lora.transform(rows(fill))(params, adapters), rows(fill)(merged))


def test_dora_norms_of_a_bfloat16_stack_are_exact() -> None:
    """One layer at a time in float32, against numpy in float64."""
    w = normal(0, 3, 40, 30).astype(jnp.bfloat16)
    spec = lora.Spec(rank=2, use_dora=True, targets="w", layouts=(("w", "bio"),))
    fresh = lora.init(spec, {"w": w}, key=jax.random.key(0))["w"]
    want = np.sqrt((np.asarray(w, np.float64) ** 2).sum(1))
    np.testing.assert_allclose(fresh.magnitude, want, rtol=1e-6)  # float32 sums of 40 squares


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_neutral_adapters_are_the_base(name: str, use_dora: bool, x64: None) -> None:
    f, params, fresh, x = case(name, use_dora=use_dora)
    adapters, g = filled(fresh), jax.jit(lora.transform(f))
    got, base = g(params, lora.neutral(adapters, params), x), jax.jit(f)(params, x)
    if use_dora:
        close(got, base)
    else:
        np.testing.assert_array_equal(got, base)
    assert np.abs(np.asarray(g(params, adapters, x)) - base).max() > 1e-3


def test_dora_leaves_an_output_of_zeros_alone() -> None:
    """As of the unused rows of a padded vocabulary."""
    params = {"w": jnp.ones((5, 7)).at[:, 2].set(0)}
    fresh = lora.init(lora.Spec(rank=2, targets="w", use_dora=True), params, key=jax.random.key(0))
    g = lora.transform(lambda p, x: x @ p["w"])
    x = normal(1, 3, 5, dtype="float32")
    np.testing.assert_allclose(g(params, fresh, x), x @ params["w"], rtol=1e-6)  # float32 norms
    grads = jax.jit(jax.grad(lambda a: g(params, a, x).sum()))(fresh)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_dora_needs_values() -> None:
    shapes = {"w": jax.ShapeDtypeStruct((5, 7), jnp.float32)}
    with pytest.raises(errors.UserError, match="w: init needs its values"):
        lora.init(lora.Spec(use_dora=True, targets="w"), shapes, key=jax.random.key(0))


@pytest.mark.parametrize("mode", lora.MODES)
@pytest.mark.parametrize("name", MODELS)
def test_26_dropout(name: str, mode: str, x64: None) -> None:
    f, params, fresh, x = case(name, dropout=0.5)
    g, adapters, key = jax.jit(lora.transform(f, mode=mode)), filled(fresh), jax.random.key(3)
    plain = g(params, adapters, x)
    none = {"w": dataclasses.replace(adapters["w"], dropout=0.0)}
    np.testing.assert_array_equal(g(params, none, x, dropout_key=key), plain)  # a zero rate
    dropped = g(params, adapters, x, dropout_key=key)
    np.testing.assert_array_equal(g(params, adapters, x, dropout_key=key), dropped)
    assert np.abs(dropped - plain).max() > 1e-3
    other = g(params, adapters, x, dropout_key=jax.random.key(4))
    assert np.abs(other - dropped).max() > 1e-3
    gradients = jax.jit(jax.grad(lambda a: g(params, a, x, dropout_key=key).sum()))(adapters)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


def masks(f: Callable, x: jax.Array, layers: int) -> np.ndarray:
    """f sums x w over layers, with w = 0 and A B = identity: the dropped inputs themselves."""
    eye = jnp.broadcast_to(jnp.eye(8), (layers, 8, 8))
    factors = lora.Factors(eye, eye, 1.0, "bio", dropout=0.5)
    run = jax.jit(lora.transform(f))
    return np.asarray(
        run({"w": jnp.zeros((layers, 8, 8))}, {"w": factors}, x, dropout_key=jax.random.key(0))
    )


def test_26_layers_calls_and_rows_have_masks_of_their_own() -> None:
    x = jnp.ones((4, 8))

    def scanned(params: Any, x: jax.Array) -> jax.Array:
        twice = lambda w: jnp.stack([x @ w, x @ w])  # noqa: E731
        return lax.scan(lambda c, w: (c, twice(w)), 0, params["w"])[1]

    def counted(params: Any, x: jax.Array) -> jax.Array:
        def body(i: jax.Array, out: jax.Array) -> jax.Array:
            return out.at[i].set(x @ lax.dynamic_index_in_dim(params["w"], i, keepdims=False))

        return lax.fori_loop(0, 3, body, jnp.zeros((3, 4, 8)))

    for f, count in ((scanned, 3 * 2 * 4), (counted, 3 * 4)):
        rows = masks(f, x, 3).reshape(-1, 8)
        assert len(np.unique(rows, axis=0)) > 0.9 * count  # 256 masks: equal ones are rare
        assert set(np.unique(rows)) == {0.0, 2.0}  # kept ones are divided by 1 - rate


def test_26_the_expectation_is_the_undropped_product(x64: None) -> None:
    f, params, fresh, x = MODELS["two inputs"][0], *case("two inputs", dropout=0.3)[1:]
    g, adapters = lora.transform(f), filled(fresh)
    keys = jax.random.split(jax.random.key(0), 4000)
    some = jax.jit(jax.vmap(lambda key: g(params, adapters, x, dropout_key=key)))(keys)
    spread = np.std(some, 0) / len(keys) ** 0.5
    assert np.all(np.abs(np.mean(some, 0) - jax.jit(g)(params, adapters, x)) < 5 * spread)


def test_patterns_exclusions_and_scales() -> None:
    params = {"a": jnp.ones((6, 4)), "b": jnp.ones((6, 4)), "c": jnp.ones((6, 4))}
    spec = lora.Spec(
        rank=4,
        alpha=8.0,
        targets="a|b|c",
        exclude="c",
        rank_pattern=(("b", 2),),
        alpha_pattern=(("b", 6.0),),
        use_rslora=True,
    )
    adapters = lora.init(spec, params, key=jax.random.key(0))
    assert adapters.keys() == {"a", "b"}
    assert (adapters["a"].rank, adapters["a"].scale) == (4, 4.0)
    assert adapters["b"].rank == 2
    assert adapters["b"].scale == pytest.approx(6.0 / 2**0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "lora.rank=0"),
        ({"rank": 1.5}, "lora.rank=1.5"),
        ({"dropout": 1.0}, "lora.dropout=1.0"),
        ({"initializer": "xavier"}, "lora.initializer='xavier'"),
        ({"targets": "w", "exclude": "w"}, "excludes every target"),
        ({"targets": "w", "exclude": "v"}, "lora.exclude='v' matches no parameter"),
        ({"targets": "w", "rank_pattern": (("v", 2),)}, "lora.rank_pattern='v' matches no"),
        ({"targets": "w", "initializer": (("v", "gaussian"),)}, "no rule matches w"),
        ({"targets": "w", "layouts": (("w", "bo"),)}, "with an i and an o"),
        ({"targets": "w", "layouts": (("w", "bio"),)}, "does not fit w of 2 dimensions"),
        ({"targets": "["}, "not a regular expression"),
    ],
)
def test_a_spec_that_makes_no_sense_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(errors.UserError) as caught:
        lora.init(lora.Spec(**options), {"w": jnp.ones((5, 7))}, key=jax.random.key(0))
    assert message in str(caught.value)


@pytest.mark.parametrize("name", ["kaiming", "gaussian", "embedding"])
def test_initializers(name: str) -> None:
    spec = lora.Spec(rank=8, targets="w", initializer=name)
    fresh = start(spec, {"w": jnp.ones((400, 300))})["w"]
    assert np.all(fresh.b == 0) != np.all(fresh.a == 0)  # exactly one is zero
    if name == "kaiming":
        assert 0.99 < np.abs(fresh.a).max() * 400**0.5 <= 1
    elif name == "gaussian":
        assert fresh.a.std() == pytest.approx(1 / 8, rel=0.1)
    else:
        assert fresh.b.std() == pytest.approx(1, rel=0.1)


def test_several_adapters_over_one_base(x64: None) -> None:
    """Eight adapters, of other ranks and scales; the base stays unbatched and each row is the single run."""
    f, params, _, x = case("scan, remat")
    some = []
    for i in range(8):
        spec = lora.Spec(rank=1 + i % 3, alpha=1.0 + i, targets="w", layouts=(("w", "bioo"),))
        some.append(filled(start(spec, params), seed=i))
    g = jax.jit(lora.transform(f))
    run = jax.jit(jax.vmap(g, in_axes=(None, 0, None)))
    stack = lora.stack(some)
    for row, adapters in zip(run(params, stack, x), some, strict=True):
        close(row, g(params, adapters, x))
    for back, adapters in zip(lora.unstack(stack), some, strict=True):
        close(lora.delta(back["w"]), lora.delta(adapters["w"]))
    program = str(jax.make_jaxpr(run)(params, stack, x))
    assert "f64[8,5,8]" in program  # the activations of eight
    for shape in ("[8,3,8,2,4]", "[3,8,8,2,4]", "[8,8,2,4]"):
        assert shape not in program.replace("[3,8,2,4]", "")


def test_stack_refuses_what_does_not_match() -> None:
    one = {"w": lora.Factors(jnp.ones((5, 2)), jnp.ones((2, 7)), 1.0, "io")}
    with pytest.raises(errors.UserError, match="v is not adapted by both"):
        lora.stack([one, {"v": one["w"]}])
    with pytest.raises(errors.UserError, match="w has layout"):
        lora.stack([one, {"w": dataclasses.replace(one["w"], layout="oi")}])
    with pytest.raises(errors.UserError, match="no adapters"):
        lora.stack([])


def test_split_and_join() -> None:
    params = {"layer": {"kernel": jnp.ones((2, 3)), "scale": jnp.ones(3)}, "norm": jnp.zeros(3)}
    trainable, frozen = lora.split(params, r".*scale|norm")
    assert trainable["layer"]["kernel"] is None
    assert frozen["norm"] is None
    joined = lora.join(trainable, frozen)
    assert jax.tree.structure(joined) == jax.tree.structure(params)
    grads = jax.grad(lambda t: lora.join(t, frozen)["layer"]["scale"].sum())(trainable)
    assert grads["layer"]["kernel"] is None
    with pytest.raises(errors.UserError, match="in 2 of the parts"):
        lora.join(params, frozen)


def test_split_of_a_quantised_base() -> None:
    q = quant.quantize(jnp.ones((2, 64)), "int8")
    params = {"kernel": q, "scale": jnp.ones(3)}
    for back in (
        lora.join(*lora.split(params, "scale")),
        lora.join(*lora.split(params, "scale")[::-1]),
    ):
        assert back["kernel"] is q
    with pytest.raises(errors.UserError, match="kernel is quantised"):
        lora.split(params, ".*")


def test_savings_are_what_init_makes() -> None:
    shapes = {
        "w": jax.ShapeDtypeStruct((3, 8, 2, 4), jnp.bfloat16),
        "v": jax.ShapeDtypeStruct((9, 5), jnp.bfloat16),
    }
    params = jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), shapes)
    for use_dora in (False, True):
        spec = lora.Spec(rank=2, targets="w|v", layouts=(("w", "bioo"),), use_dora=use_dora)
        got = lora.savings(spec, shapes)
        adapters = start(spec, params)
        made = {k: sum(x.size for x in jax.tree.leaves(f)) for k, f in adapters.items()}
        assert got.by_path == made
        assert got.trainable == sum(made.values())
        assert got.total == 3 * 8 * 2 * 4 + 9 * 5
        assert got.adapter_bytes == sum(x.nbytes for x in jax.tree.leaves(adapters))
