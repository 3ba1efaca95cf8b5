# SPDX-License-Identifier: Apache-2.0
"""The transform on models as the users of Flax, Equinox, Haiku and plain JAX write them: nothing is materialised.

In float64: the value and the adapters' gradients are those of the function of merged weights.
"""

import functools
import pathlib
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jaxprs
import library_models
import numpy as np
import pytest

from jft import lora

# Two float64 programs that sum in another order: some hundred operations in a row, each with 1e-16, which norms and
# softmax may enlarge (6e-15 was seen). A term that is wrong or missing is of order 1e-2, as the gradients are.
RTOL = 1e-10

pytestmark = pytest.mark.usefixtures("x64", "quick_compiles")


@functools.cache
def make(name: str) -> tuple[library_models.Model, Any, lora.Adapters]:
    """The model, its parameters in float64, and adapters with neither factor zero."""
    model = library_models.MODELS[name]()
    params = jax.tree.map(lambda x: x.astype("float64"), model.params)
    spec = lora.Spec(rank=2, alpha=3.0, targets="|".join(model.targets), layouts=model.layouts)
    shapes = jax.eval_shape(functools.partial(lora.init, spec, key=jax.random.key(0)), params)
    rng = np.random.default_rng(0)
    adapters = jax.tree.map(lambda x: jnp.asarray(0.2 * rng.normal(size=x.shape)), shapes)
    return model, params, adapters


def loss(logits_BTV: jax.Array) -> jax.Array:
    """Cross-entropy of some targets: every logit has a slope."""
    targets_BT = (library_models.tokens() + 1) % library_models.V
    log_p_BTV = jax.nn.log_softmax(logits_BTV)
    return -jnp.take_along_axis(log_p_BTV, targets_BT[..., None], axis=-1).mean()


def merged_loss(model: library_models.Model, params: Any) -> Callable[[lora.Adapters], jax.Array]:
    tokens_BT = library_models.tokens()
    return lambda adapters: loss(model.f(lora.add(params, adapters), tokens_BT))


def lora_loss(
    model: library_models.Model, params: Any, mode: str = "factored"
) -> Callable[[lora.Adapters], jax.Array]:
    g, tokens_BT = lora.transform(model.f, mode=mode), library_models.tokens()
    return lambda adapters: loss(g(params, adapters, tokens_BT))


@pytest.mark.parametrize("name", library_models.MODELS)
def test_every_adapter_is_used_and_none_materialised(name: str) -> None:
    model, params, adapters = make(name)
    for pattern in model.targets:
        assert any(re.fullmatch(pattern, path) for path in adapters), f"{pattern} adapts nothing"
    uses = lora.explain(model.f, params, adapters, library_models.tokens())
    assert {use.path for use in uses} == set(adapters)
    assert not [use for use in uses if not use.factored]


@pytest.mark.parametrize("name", library_models.MODELS)
def test_value_and_gradients_are_those_of_the_merged_model(name: str) -> None:
    model, params, adapters = make(name)
    losses = [merged_loss(model, params), *(lora_loss(model, params, mode) for mode in lora.MODES)]
    # One compilation for all: what they share is compiled once.
    want, *gots = jax.jit(lambda a: [jax.value_and_grad(f)(a) for f in losses])(adapters)
    assert all(np.abs(x).max() > 1e-3 for x in jax.tree.leaves(want)), "gradients are seen"
    for got in gots:
        for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            assert x.dtype == y.dtype == jnp.float64
            # Relative to the largest entry of each array: the small ones are differences of large terms.
            np.testing.assert_allclose(x, y, rtol=0, atol=RTOL * np.abs(y).max())


@pytest.mark.parametrize("name", library_models.MODELS)
def test_no_product_has_the_shape_of_a_weight(name: str) -> None:
    model, params, adapters = make(name)
    shapes = jaxprs.forbidden(params, adapters)

    def products(f: Callable[[lora.Adapters], jax.Array]) -> list[str]:
        jaxpr = jax.make_jaxpr(jax.grad(f))(adapters).jaxpr
        return jaxprs.formed(jaxpr, shapes, "dot_general", "ragged_dot_general", "add", "add_any")

    assert not products(lora_loss(model, params))
    assert products(merged_loss(model, params)), "merged, there is one"


DOCS = pathlib.Path(__file__).parents[2] / "docs" / "lora.md"
# Those that begin with an import are whole programs; others show a few lines.
EXAMPLES = re.findall(
    r"^```python\n((?:import|from) .*?)^```$", DOCS.read_text("utf-8"), re.M | re.S
)


def test_each_library_has_an_example() -> None:
    for word in ("flax import linen", "flax import nnx", "import equinox", "import haiku"):
        assert any(word in example for example in EXAMPLES), word


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_examples_of_the_docs_run(number: int) -> None:
    """Each ends with `grads`, the gradients of its adapters; B is zero at first, and then only B has one."""
    space: dict[str, Any] = {"__name__": "example"}
    with jax.enable_x64(False):
        exec(compile(EXAMPLES[number], f"{DOCS.name}, example {number}", "exec"), space)
    assert set(space["grads"]) == set(space["adapters"])
    for factors in space["grads"].values():
        assert jnp.any(factors.b) and not jnp.any(factors.a)
