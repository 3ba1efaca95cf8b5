# SPDX-License-Identifier: Apache-2.0
"""What the transform cannot do is refused by name."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from jft import lora


def _double(x_ref: Any, w_ref: Any, y_ref: Any) -> None:
    y_ref[...] = x_ref[...] @ (2 * w_ref[...])


def kernel(params: Any, x: jax.Array) -> jax.Array:
    """A product written as a Pallas kernel; interpreted, so that it runs anywhere."""
    w = params["layer"]["w"]
    shape = jax.ShapeDtypeStruct((x.shape[0], w.shape[1]), x.dtype)
    return pl.pallas_call(_double, out_shape=shape, interpret=True)(x, w)


def make() -> tuple[Any, lora.Adapters, jax.Array]:
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    factors = lora.Factors(normal(8, 2), normal(2, 16), 0.5, "io")
    return {"layer": {"w": normal(8, 16)}}, {"layer/w": factors}, normal(4, 8)


def test_28_a_pallas_call_is_refused_by_name() -> None:
    params, adapters, x = make()
    with pytest.raises(lora.MaterializeError) as caught:
        lora.transform(kernel)(params, adapters, x)
    message = str(caught.value)
    assert message.startswith("layer/w is used by pallas_call at ")
    assert "test_refusals.py" in message
    assert "materialize=" in message
    allowed = lora.transform(kernel, materialize=("layer/.*",))
    got = allowed(params, adapters, x)
    np.testing.assert_array_equal(got, kernel(lora.add(params, adapters), x))
    (use,) = lora.explain(kernel, params, adapters, x)
    assert not use.factored


@pytest.mark.parametrize("mode", ["hidden", "merged"])
def test_25_modes_without_a_forward_derivative_say_so(mode: str) -> None:
    params, adapters, x = make()
    g = lora.transform(lambda p, x: x @ p["layer"]["w"], mode=mode)
    with pytest.raises(TypeError, match="forward-mode.*custom_vjp"):
        jax.jvp(lambda a: g(params, a, x), (adapters,), (adapters,))
