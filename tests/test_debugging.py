# SPDX-License-Identifier: Apache-2.0
"""The first operation that is not finite: each fault is put somewhere on purpose, and must be found there."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jft import debugging, lora

WORDS = (("layers/", "layer"), ("rows", "micro-batch"))
REMAT = {
    "none": lambda f: f,
    "full": functools.partial(jax.checkpoint, prevent_cse=False),
    "dots": functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_saveable),
}


def line_of(f: Callable, text: str) -> str:
    """Where the source of f has a text, as "file.py:line"."""
    lines, first = inspect.getsourcelines(f)
    (found,) = (i for i, line in enumerate(lines) if text in line)
    return f"{inspect.getsourcefile(f)}:{first + found}"


def first(f: Callable, *args: Any) -> Any:
    found = debugging.find(f, *args, words=WORDS)
    assert found is not None
    return found.operations[0]


def layer(x: jax.Array, own: dict[str, jax.Array]) -> tuple[jax.Array, None]:
    y = jnp.maximum(x @ own["kernel"], 0)
    y = jnp.exp(y)
    return x + y / y.sum(), None


def rooted(x: jax.Array, own: dict[str, jax.Array]) -> tuple[jax.Array, None]:
    y = jnp.maximum(x @ own["kernel"], 0)
    return x + jnp.sqrt(y), None


def stack(
    params: Any, x: jax.Array, step: Callable = layer, remat: Callable = REMAT["none"]
) -> jax.Array:
    return jax.lax.scan(remat(step), x, params["layers"])[0].sum()


def params_of(*scales: float) -> Any:
    """Layers that multiply by these."""
    return {"layers": {"kernel": jnp.stack([s * jnp.eye(3) for s in scales])}}


X = jnp.ones((2, 3))


@pytest.mark.parametrize("remat", REMAT)
def test_an_overflow_is_found_in_its_layer(remat: str) -> None:
    wrong = params_of(1, 1, 90, 1)  # e^120 is more than float32 holds: the layers before give 4/3
    grad = jax.value_and_grad(functools.partial(stack, remat=REMAT[remat]))
    found = first(lambda p, x: grad(p, x), wrong, X)
    assert found.eqn.primitive.name == "exp"
    assert found.places == ("layer 2",)
    assert found.source.startswith(line_of(layer, "jnp.exp"))
    assert [str(x) for x in found.inputs] == ["float32[2, 3], 120"]
    assert [str(x) for x in found.outputs] == ["float32[2, 3], 6 of 6 inf"]
    assert debugging.find(grad, params_of(1, 1, 1, 1), X) is None


@pytest.mark.parametrize("remat", REMAT)
def test_what_is_wrong_in_the_gradient_alone_is_found_in_its_layer(remat: str) -> None:
    run = functools.partial(stack, step=rooted, remat=REMAT[remat])
    loss, _ = jax.value_and_grad(run)(params_of(1, 1, 0, 1), X)
    assert np.isfinite(loss)
    found = debugging.find(jax.value_and_grad(run), params_of(1, 1, 0, 1), X, words=WORDS)
    assert found is not None and found.result == "1/layers/kernel"
    origin = found.operations[0]
    assert origin.eqn.primitive.name == "div"  # 1 / (2 sqrt(0)) times the gradient
    assert "layer 2" in origin.places
    assert origin.source.startswith(line_of(rooted, "jnp.sqrt"))


@pytest.mark.parametrize("mode", lora.MODES)
def test_a_weight_that_holds_an_infinity_is_named(mode: str) -> None:
    params = params_of(1, 1, 1, 1)
    spec = lora.Spec(rank=1, alpha=1.0, targets="layers/kernel", layouts=((".*", "bio"),))
    adapters = lora.init(spec, params, key=jax.random.key(0))
    params["layers"]["kernel"] = params["layers"]["kernel"].at[1, 0, 2].set(jnp.inf)
    run = lora.transform(stack, mode=mode)
    grad = jax.value_and_grad(lambda adapters, params, x: run(params, adapters, x))
    found = first(grad, adapters, params, X)
    # The first to use it: the product, or the sum W + AB where that is formed.
    assert found.eqn.primitive.name == ("add" if mode == "merged" else "dot_general")
    assert found.places == ("layer 1",)
    assert "layers/kernel" in [x.name for x in found.inputs if x.inf]


def test_what_has_no_part_in_the_result_is_not_blamed() -> None:
    def masked(x: jax.Array) -> jax.Array:
        scores = jnp.where(x > 0, x, -jnp.inf)
        return jnp.where(x > 0, jnp.log(x), 0).sum() + jax.nn.softmax(scores).sum()

    def unmasked(x: jax.Array) -> jax.Array:
        return masked(x) + jnp.log(jnp.min(x))

    x = jnp.array([1.0, 0.0, 2.0])
    assert debugging.find(masked, x) is None
    found = first(jax.jit(unmasked), x)
    assert found.eqn.primitive.name == "log"
    assert found.source.startswith(line_of(unmasked, "jnp.log"))


def test_an_infinity_that_becomes_nan_is_told_with_what_made_it() -> None:
    def softmax(x: jax.Array) -> jax.Array:
        e = jnp.exp(x)
        return (e / e.sum()).max()

    found = debugging.find(jax.jit(softmax), jnp.array([1.0, 100.0]))
    assert found is not None
    assert [origin.eqn.primitive.name for origin in found.operations] == ["exp", "div"]
    assert "1 of 2 inf" in "".join(found.lines) and "1 of 2 nan" in "".join(found.lines)


@jax.custom_vjp
def doubled(x: jax.Array) -> jax.Array:
    return 2 * x


doubled.defvjp(lambda x: (2 * x, x), lambda x, g: (g / (x - 1),))


def test_the_rule_of_a_custom_gradient_is_looked_into() -> None:
    found = first(jax.value_and_grad(lambda x: doubled(x).sum()), X)
    assert found.eqn.primitive.name == "div"
    assert found.places == ("backward pass",)


def test_loops_of_unknown_length_and_branches_are_looked_into() -> None:
    def shrinking(x: jax.Array) -> jax.Array:
        def body(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            i, x = state
            return i + 1, jax.lax.cond(i == 3, lambda x: x / (i - 3), lambda x: x + 1, x)

        return jax.lax.while_loop(lambda state: state[0] < 6, body, (jnp.float32(0), x))[1]

    found = first(shrinking, jnp.float32(1))
    assert found.eqn.primitive.name == "div"
    (place,) = found.places
    assert place.startswith("step 3 of the loop at ")


def test_micro_batches_are_counted_apart_from_layers() -> None:
    rows = jnp.ones((4, 2, 3)).at[2, 1, 1].set(jnp.nan)

    def accumulated(params: Any, batch: Any) -> jax.Array:
        def add(total: jax.Array, x: jax.Array) -> tuple[jax.Array, None]:
            return total + stack(params, x), None

        return jax.lax.scan(add, jnp.float32(0), batch["rows"])[0]

    found = first(accumulated, params_of(1, 1), {"rows": rows})
    assert found.places == ("micro-batch 2", "layer 0")
    assert [x.name for x in found.inputs if x.nan] == ["rows"]
