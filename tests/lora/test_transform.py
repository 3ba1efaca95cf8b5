# SPDX-License-Identifier: Apache-2.0
"""The transform equals the function of merged weights, in value and gradients, and never forms them.

Every case runs in float64, in each mode. Where it says so, W + A B may not appear: no equation adds arrays of W's
shape, and no product in the gradient has it. Sizes within a case differ, so that a shape tells what it is.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest
from jax import lax

from jft import errors, lora

# Both sides are double-precision sums of tens of terms of order 1, in another order.
RTOL = ATOL = 1e-11


def normal(seed: int, *shape: int, dtype: Any = None) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def random_adapters(
    params: Any, targets: str = ".*", layouts: Any = (), rank: int = 2
) -> lora.Adapters:
    """Neither factor is zero."""
    spec = lora.Spec(rank=rank, alpha=3.0, targets=targets, layouts=tuple(layouts))
    shapes = jax.eval_shape(functools.partial(lora.init, spec, key=jax.random.key(0)), params)
    leaves, structure = jax.tree.flatten(shapes)
    filled = [normal(7 + i, *x.shape) for i, x in enumerate(leaves)]
    return jax.tree.unflatten(structure, filled)


def summed(f: Callable, *args: Any) -> jax.Array:
    """A scalar in which every output has its own slope."""
    return sum(jnp.sum(jnp.sin(y + 0.1 * i)) for i, y in enumerate(jax.tree.leaves(f(*args))))


@dataclasses.dataclass(frozen=True)
class Case:
    """f(params, x); `layouts` for leaves of more than two dimensions."""

    f: Callable
    params: dict[str, tuple[int, ...]]
    x: tuple[int, ...]
    layouts: tuple[tuple[str, str], ...] = ()
    dtype: str = "float64"
    reverse: bool = True  # a while loop has no reverse derivative

    def make(self) -> tuple[dict[str, jax.Array], lora.Adapters, jax.Array]:
        params = {
            k: normal(i, *shape, dtype=self.dtype)
            for i, (k, shape) in enumerate(self.params.items())
        }
        return params, random_adapters(params, layouts=self.layouts), normal(99, *self.x)


def tied(params: Any, x: jax.Array) -> jax.Array:
    tokens = jnp.arange(6).reshape(2, 3) % 5
    h = jnp.take(params["w"], tokens, axis=0) * x
    return jnp.tanh(h) @ params["w"].T


def stacked(params: Any, x: jax.Array) -> jax.Array:
    @jax.checkpoint
    def layer(x: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
        return jnp.tanh(jnp.einsum("td,dhk->thk", x, w.astype(x.dtype)).reshape(x.shape)), None

    return lax.scan(layer, x, params["w"])[0]


def returned(params: Any, x: jax.Array) -> jax.Array:
    """As NNX does: whatever goes into a transform comes out of it too, here through a remat and a jit."""

    @jax.checkpoint
    @jax.jit
    def layer(x: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.tanh(x @ w) @ jnp.ones((7, 5)), w

    x, w = lax.scan(layer, x, params["w"])
    return x @ w[1]


def scan_carry(params: Any, x: jax.Array) -> jax.Array:
    def body(carry: Any, _: None) -> tuple[Any, None]:
        w, x = carry
        return (w, jnp.tanh(x @ w) @ jnp.ones((7, 5))), None

    return lax.scan(body, (params["w"], x), length=3)[0][1]


def while_carry(params: Any, x: jax.Array) -> jax.Array:
    def body(carry: Any) -> Any:
        i, w, x = carry
        return i + 1, w, jnp.tanh(x @ w) @ jnp.ones((7, 5))

    return lax.while_loop(lambda carry: carry[0] < 3, body, (0, params["w"], x))[2]


def vocabulary_chunks(params: Any, x: jax.Array) -> jax.Array:
    chunks = jnp.moveaxis(params["w"].reshape(5, 3, 4), 1, 0)

    def body(total: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
        return jnp.logaddexp(total, jax.nn.logsumexp(x @ w, axis=-1)), None

    return lax.scan(body, jnp.full(x.shape[0], -jnp.inf), chunks)[0]


def indexed(params: Any, x: jax.Array) -> jax.Array:
    def body(i: jax.Array, x: jax.Array) -> jax.Array:
        w = lax.dynamic_index_in_dim(params["w"], i, keepdims=False)
        return jnp.tanh(x @ w) @ jnp.ones((7, 5))

    return lax.fori_loop(0, 3, body, x)


def conditional(params: Any, x: jax.Array) -> jax.Array:
    w = params["w"]
    return lax.cond(x[0, 0] > 0, lambda w: x @ w, lambda w: jnp.tanh(x @ (2 * w)), w)


def fused(params: Any, x: jax.Array) -> jax.Array:
    q, k, v = jnp.split(params["w"], (3, 5), axis=1)
    return jnp.concatenate([x @ q, jnp.sin(x @ k), (x @ v) ** 2], axis=1)


def sliced(params: Any, x: jax.Array) -> tuple[jax.Array, ...]:
    w = params["w"]
    return x[:, :3] @ w[:3], x @ w[:, 2:5], x[:, ::2] @ w[::2], x[:, 1:3] @ w[1:3, ::3]


@jax.custom_vjp
def crooked(x: jax.Array) -> jax.Array:
    """A derivative that is wrong by 3: seen only if the rule is kept."""
    return jnp.sin(x)


crooked.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (3 * g * jnp.cos(x),))


FACTORED: dict[str, Case] = {
    "1 product": Case(lambda p, x: x @ p["w"], {"w": (5, 7)}, (3, 5)),
    "2 transposed on the left": Case(lambda p, x: p["w"].T @ x.T, {"w": (5, 7)}, (3, 5)),
    "3 heads": Case(
        lambda p, x: jnp.einsum("btd,dhk->bhtk", x, p["w"]),
        {"w": (5, 2, 7)},
        (3, 4, 5),
        (("w", "ioo"),),
    ),
    "4 output projection": Case(
        lambda p, x: jnp.einsum("bthk,hkd->btd", x, p["w"]),
        {"w": (2, 7, 5)},
        (3, 4, 2, 7),
        (("w", "iio"),),
    ),
    "5 outputs split": Case(
        lambda p, x: jnp.einsum("td,dhk->thk", x, p["w"].reshape(5, 2, 4)), {"w": (5, 8)}, (3, 5)
    ),
    "5 inputs split": Case(
        lambda p, x: jnp.einsum("thk,hkd->td", x, p["w"].reshape(2, 4, 5)),
        {"w": (8, 5)},
        (3, 2, 4),
    ),
    "7 tied embedding": Case(tied, {"w": (11, 5)}, (2, 3, 5)),
    "7 rows under vmap": Case(
        lambda p, x: x * jax.vmap(lambda i: p["w"][i])(jnp.array([3, 0, 3, 10])),
        {"w": (11, 5)},
        (2, 4, 5),
    ),
    "7 rows of experts under vmap": Case(
        lambda p, x: x * jax.vmap(lambda w, i: w[i])(p["w"], jnp.array([4, 0, 6])),
        {"w": (3, 7, 5)},
        (2, 3, 5),
        (("w", "bio"),),
    ),
    "7 rows, some out of bounds": Case(
        lambda p, x: x * jnp.take(p["w"], jnp.array([3, 99]), axis=0, mode="fill", fill_value=1),
        {"w": (11, 5)},
        (2, 2, 5),
    ),
    "8 fused kernels": Case(fused, {"w": (5, 9)}, (3, 5)),
    "9 slices": Case(sliced, {"w": (5, 7)}, (3, 5)),
    "10 scan, remat, cast": Case(
        stacked, {"w": (3, 8, 2, 4)}, (5, 8), (("w", "bioo"),), dtype="float32"
    ),
    "10 scan that returns its kernels": Case(returned, {"w": (3, 5, 7)}, (2, 5), (("w", "bio"),)),
    "11 scan carry": Case(scan_carry, {"w": (5, 7)}, (3, 5)),
    "11 while carry": Case(while_carry, {"w": (5, 7)}, (3, 5), reverse=False),
    "12 vocabulary chunks": Case(vocabulary_chunks, {"w": (5, 12)}, (7, 5)),
    "13 dynamic index": Case(indexed, {"w": (3, 5, 7)}, (2, 5), (("w", "bio"),)),
    "13 an index for each example": Case(
        lambda p, x: jax.vmap(lambda x, i: x @ p["w"][i])(x, jnp.array([2, 0, 2])),
        {"w": (3, 5, 7)},
        (3, 5),
        (("w", "bio"),),
    ),
    "14 cond, one branch": Case(conditional, {"w": (5, 7)}, (3, 5)),
    "14 cond, the other": Case(lambda p, x: conditional(p, -x), {"w": (5, 7)}, (3, 5)),
    "17 custom_vjp over activations": Case(lambda p, x: crooked(x @ p["w"]), {"w": (5, 7)}, (3, 5)),
    "jit within": Case(lambda p, x: jax.jit(jnp.matmul)(x, p["w"]), {"w": (5, 7)}, (3, 5)),
    "negated and scaled": Case(lambda p, x: x @ (-0.5 * p["w"]), {"w": (5, 7)}, (3, 5)),
    "used twice": Case(lambda p, x: jnp.sin(x @ p["w"]) @ p["w"].T, {"w": (5, 7)}, (3, 5)),
}


def check_equal(case: Case, materialize: tuple[str, ...] = ()) -> None:
    """Outputs, and gradients by adapters and inputs, in each mode against f of the merged parameters."""
    params, adapters, x = case.make()
    wide = jax.tree.map(lambda w: w.astype("float64"), params)
    modes = [lora.transform(case.f, mode=mode, materialize=materialize) for mode in lora.MODES]

    def outputs_and_gradients(f: Callable, *given: Any) -> Any:
        gradients = jax.grad(functools.partial(summed, f), (0, 1))
        return f(*given), gradients(*given) if case.reverse else ()

    @jax.jit  # as one program: what they share is compiled once
    def run(params: Any, wide: Any, adapters: Any, x: jax.Array) -> list[Any]:
        merged = lambda adapters, x: case.f(lora.add(wide, adapters), x)  # noqa: E731
        mine = [lambda adapters, x, g=g: g(params, adapters, x) for g in modes]
        return [outputs_and_gradients(f, adapters, x) for f in (merged, *mine)]

    want, *found = run(params, wide, adapters, x)
    for mode, got in zip(lora.MODES, found, strict=True):
        close = functools.partial(np.testing.assert_allclose, rtol=RTOL, atol=ATOL, err_msg=mode)
        jax.tree.map(close, got, want)
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(want[1])), "gradients are seen"


@pytest.mark.parametrize("name", FACTORED)
def test_equals_the_merged_function(name: str, x64: None) -> None:
    check_equal(FACTORED[name])


@pytest.mark.parametrize("name", FACTORED)
def test_never_forms_the_merged_weight(name: str, x64: None) -> None:
    case = FACTORED[name]
    params, adapters, x = case.make()
    g = lora.transform(case.f)
    shapes = jaxprs.forbidden(params, adapters)
    assert not jaxprs.formed(jax.make_jaxpr(g)(params, adapters, x).jaxpr, shapes, "add", "add_any")
    uses = lora.explain(case.f, params, adapters, x)
    assert uses and all(use.factored for use in uses)


@pytest.mark.parametrize("name", [n for n, case in FACTORED.items() if case.reverse])
def test_20_no_gradient_of_the_weights_shape(name: str, x64: None) -> None:
    case = FACTORED[name]
    params, adapters, x = case.make()
    shapes = jaxprs.forbidden(params, adapters)

    def products(loss: Callable) -> list[str]:
        jaxpr = jax.make_jaxpr(jax.grad(loss))(adapters)
        return jaxprs.formed(jaxpr.jaxpr, shapes, "dot_general", "add", "add_any")

    g = lora.transform(case.f)
    assert not products(lambda a: summed(g, params, a, x))
    assert products(lambda a: summed(case.f, lora.add(params, a), x)), "merged, there is one"


def test_merged_mode_has_no_gradient_of_the_weights_shape(x64: None) -> None:
    """W + A B itself is a product of rank r with W's shape; x^T dy, which sums over tokens, must be absent."""
    params, adapters, x = {"w": normal(0, 5, 7)}, None, normal(1, 3, 5)
    adapters = random_adapters(params)
    g = lora.transform(lambda p, x: x @ p["w"], mode="merged")
    jaxpr = jax.make_jaxpr(jax.grad(lambda a: summed(g, params, a, x)))(adapters).jaxpr
    for eqn in jaxprs.equations(jaxpr):
        if eqn.primitive.name == "dot_general" and jaxprs.size(eqn.outvars[0].aval.shape) == (5, 7):
            assert all(2 in v.aval.shape for v in eqn.invars), f"not of rank 2: {eqn}"


def test_hessian_vector_product_of_the_factored_mode(x64: None) -> None:
    params, adapters, x = FACTORED["13 dynamic index"].make()
    g = lora.transform(indexed)

    def hvp(loss: Callable) -> Any:
        return jax.jvp(jax.grad(loss), (adapters,), (jax.tree.map(jnp.cos, adapters),))[1]

    got = jax.jit(lambda: hvp(lambda a: summed(g, params, a, x)))()
    want = jax.jit(lambda: hvp(lambda a: summed(indexed, lora.add(params, a), x)))()
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-10), got, want)


def test_while_carry_has_a_forward_derivative(x64: None) -> None:
    params, adapters, x = FACTORED["11 while carry"].make()
    g = lora.transform(while_carry)
    tangent = (jax.tree.map(jnp.cos, adapters),)
    mine = lambda a: summed(g, params, a, x)  # noqa: E731
    merged = lambda a: summed(while_carry, lora.add(params, a), x)  # noqa: E731
    got, want = (
        jax.jit(lambda t, f=f: jax.jvp(f, (adapters,), t))(tangent) for f in (mine, merged)
    )
    np.testing.assert_allclose(got, want, rtol=RTOL)


@jax.custom_vjp
def special_product(x: jax.Array, w: jax.Array) -> jax.Array:
    return x @ w


def _special_backward(saved: Any, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, w = saved
    return 3 * g @ w.T, 2 * x.T @ g


special_product.defvjp(lambda x, w: (x @ w, (x, w)), _special_backward)


def convolution(params: Any, x: jax.Array) -> jax.Array:
    return lax.conv_general_dilated(
        x, params["w"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    )


REFUSED: dict[str, tuple[str, Case]] = {
    "6 reshape that mixes": (
        "reshape",
        Case(lambda p, x: x @ p["w"].reshape(5, 8), {"w": (4, 10)}, (3, 5)),
    ),
    "17 custom_vjp of W": (
        "custom_vjp_call",
        Case(lambda p, x: special_product(x, p["w"]), {"w": (5, 7)}, (3, 5)),
    ),
    "28 convolution": (
        "conv_general_dilated",
        Case(convolution, {"w": (3, 5, 7)}, (2, 6, 5), (("w", "iio"),)),
    ),
    "nonlinear": ("tanh", Case(lambda p, x: x @ jnp.tanh(p["w"]), {"w": (5, 7)}, (3, 5))),
    "norm of rows": (
        "mul|square|integer_pow",
        Case(lambda p, x: x * jnp.sum(p["w"] ** 2, axis=1), {"w": (5, 7)}, (3, 5)),
    ),
    "branches that differ": (
        "cond",
        Case(
            lambda p, x: x @ lax.cond(x[0, 0] > 0, lambda w, v: w, lambda w, v: v, p["w"], x.T @ x),
            {"w": (5, 5)},
            (3, 5),
        ),
    ),
    "views made in branches": (
        "cond",
        Case(
            lambda p, x: (
                lax.cond(
                    x[0, 0] > 0,
                    lambda w: w.reshape(5, 2, 4),
                    lambda w: 2 * w.reshape(5, 2, 4),
                    p["w"],
                )[:, 1].T
                @ x.T
            ),
            {"w": (5, 8)},
            (3, 5),
        ),
    ),
    "carry that changes": (
        "scan",
        Case(
            lambda p, x: lax.scan(lambda w, _: (0.5 * w, x @ w), p["w"], length=2)[1],
            {"w": (5, 7)},
            (3, 5),
        ),
    ),
}


@pytest.mark.parametrize("mode", lora.MODES)
@pytest.mark.parametrize("name", REFUSED)
def test_what_needs_the_merged_weight_is_refused(name: str, mode: str, x64: None) -> None:
    primitive, case = REFUSED[name]
    params, adapters, x = case.make()
    with pytest.raises(lora.MaterializeError, match=rf"^w is used by ({primitive})\b") as caught:
        lora.transform(case.f, mode=mode)(params, adapters, x)
    assert "test_transform.py" in str(caught.value)


@pytest.mark.parametrize("name", REFUSED)
def test_materialising_when_allowed_is_exact(name: str, x64: None) -> None:
    _, case = REFUSED[name]
    check_equal(case, materialize=("w",))
    params, adapters, x = case.make()
    assert not all(use.factored for use in lora.explain(case.f, params, adapters, x))


def test_allowing_one_leaf_does_not_allow_another(x64: None) -> None:
    params = {"w": normal(0, 5, 7), "v": normal(1, 5, 7)}
    g = lora.transform(lambda p, x: x @ jnp.tanh(p["w"]) + x @ p["v"], materialize=("v",))
    with pytest.raises(lora.MaterializeError, match="^w is"):
        g(params, random_adapters(params), normal(2, 3, 5))


def test_a_weight_that_is_returned_is_refused(x64: None) -> None:
    params = {"w": normal(0, 5, 7)}
    with pytest.raises(lora.MaterializeError, match="w is returned"):
        lora.transform(lambda p: p["w"])(params, random_adapters(params))


@pytest.mark.parametrize("mode", lora.MODES)
def test_16_vmap_over_adapters_leaves_the_base_unbatched(mode: str, x64: None) -> None:
    f = lambda p, x: jnp.tanh(x @ p["w"])  # noqa: E731
    params, x = {"w": normal(0, 5, 7)}, normal(1, 4, 5)
    some = [jax.tree.map(lambda a, i=i: np.array(a) + i, random_adapters(params)) for i in range(3)]
    stack = jax.tree.map(lambda *a: np.stack(a), *some)
    g = jax.vmap(lora.transform(f, mode=mode), in_axes=(None, 0, None))
    merged = jax.jit(lambda a, x: f(lora.add(params, a), x))
    want = np.stack([merged(a, x) for a in some])
    np.testing.assert_allclose(jax.jit(g)(params, stack, x), want, rtol=RTOL)
    if mode == "factored":
        jaxpr = jax.make_jaxpr(g)(params, stack, x).jaxpr
        shapes = [v.aval.shape for eqn in jaxprs.equations(jaxpr) for v in eqn.outvars]
        assert not [s for s in shapes if jaxprs.size(s) == (3, 5, 7)]


def test_18_stop_gradient(x64: None) -> None:
    params, x = {"w": normal(0, 5, 7)}, normal(1, 4, 5)
    adapters = random_adapters(params)
    f = lambda p, x: x @ lax.stop_gradient(p["w"])  # noqa: E731
    g = lora.transform(f)
    np.testing.assert_allclose(g(params, adapters, x), f(lora.add(params, adapters), x), rtol=RTOL)
    grads = jax.grad(lambda a: summed(g, params, a, x))(adapters)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(grads))


@pytest.mark.parametrize("mode", lora.MODES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_24_a_fresh_adapter_changes_no_bit(dtype: str, mode: str, optimised: None) -> None:
    params = {"w": normal(0, 3, 8, 2, 4, dtype=dtype)}
    x = normal(1, 5, 8, dtype=dtype)
    spec = lora.Spec(rank=2, targets="w", layouts=(("w", "bioo"),))
    adapters = jax.jit(lambda params: lora.init(spec, params, key=jax.random.key(0)))(params)
    assert adapters["w"].a.dtype == jnp.float32 and jnp.any(adapters["w"].a)
    got = jax.jit(lora.transform(stacked, mode=mode))(params, adapters, x)
    assert got.dtype == dtype
    np.testing.assert_array_equal(got, jax.jit(stacked)(params, x))


def test_24_an_unknown_path_names_near_ones() -> None:
    params = {"layer": {"kernel": jnp.ones((5, 7))}}
    adapters = {"layer/kernal": lora.Factors(jnp.ones((5, 2)), jnp.ones((2, 7)), 1.0, "io")}
    with pytest.raises(errors.UserError, match="layer/kernal.*layer/kernel"):
        lora.transform(lambda p: p["layer"]["kernel"] @ jnp.ones(7))(params, adapters)


def test_24_an_adapter_that_nothing_uses_is_an_error() -> None:
    params = {"w": jnp.ones((5, 7)), "v": jnp.ones((5, 7))}
    spec = lora.Spec(rank=2, targets="w|v")
    adapters = lora.init(spec, params, key=jax.random.key(0))
    with pytest.raises(errors.UserError, match="^v: .*never uses"):
        lora.transform(lambda p, x: x @ p["w"])(params, adapters, jnp.ones((3, 5)))


def test_factors_of_another_shape_are_refused() -> None:
    adapters = {"w": lora.Factors(jnp.ones((4, 2)), jnp.ones((2, 7)), 1.0, "io")}
    with pytest.raises(errors.UserError, match=r"w: shapes .*\(4, 2\)"):
        lora.transform(lambda p, x: x @ p["w"])({"w": jnp.ones((5, 7))}, adapters, jnp.ones(5))


def test_a_pattern_without_leaves_and_an_unknown_mode_are_refused() -> None:
    with pytest.raises(errors.UserError, match="lora.targets='v' matches no parameter.*w"):
        lora.init(lora.Spec(targets="v"), {"w": jnp.ones((5, 7))}, key=jax.random.key(0))
    with pytest.raises(errors.UserError, match="factored, hidden, merged"):
        lora.transform(lambda p: p, mode="fast")


def test_bfloat16_weights_are_never_merged() -> None:
    """In bfloat16 the sum W + A B would lose most of a small update."""
    params = {"w": normal(0, 5, 7, dtype="bfloat16")}
    adapters = random_adapters(params)
    g = lora.transform(lambda p, x: x @ p["w"], mode="merged")
    jaxpr = jax.make_jaxpr(g)(params, adapters, jnp.ones((3, 5), jnp.bfloat16)).jaxpr
    assert not jaxprs.formed(jaxpr, {(5, 7)}, "add", "add_any")


def test_the_merged_mode_refuses_to_differentiate_the_base() -> None:
    """Its backward pass has no gradient of W; zeros in its place would be wrong in silence."""
    params = {"w": jnp.ones((4, 3))}
    adapters = lora.init(lora.Spec(rank=2, targets="w"), params, key=jax.random.key(0))
    x = jnp.ones((2, 4))

    def value(params: Any, mode: str) -> jax.Array:
        return lora.transform(lambda p, x: (x @ p["w"]).sum(), mode=mode)(params, adapters, x)

    with pytest.raises(errors.UserError, match="w is differentiated"):
        jax.grad(value)(params, "merged")
    np.testing.assert_allclose(jax.grad(value)(params, "factored")["w"], 2 * np.ones((4, 3)))
