# SPDX-License-Identifier: Apache-2.0
"""cuDNN's attention: on a GPU equal to plain attention; elsewhere what is asked of it is what plain attention does."""

import functools

import attention_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jft.models.attention import cudnn, plain


def has_gpu() -> bool:
    return jax.default_backend() == "gpu"


@pytest.mark.parametrize("start, T", [(0, 77), (30, 40)])
@jax.default_matmul_precision("highest")  # a GPU's default for float32 keeps 10 bits
def test_what_is_asked_is_plain_attention(start: int, T: int) -> None:
    """JAX's own XLA implementation, given the same arguments."""
    case = cases.Case(T, 77, start=start, window=20, dtype=jnp.float32)
    q, k, v = case.heads()
    queries, keys = case.segments()
    q, k, v, even_queries, even_keys = (
        cudnn.even(x, fill)
        for x, fill in zip((q, k, v, queries, keys), (0, 0, 0, -1, -1), strict=True)
    )
    assert q.shape[1] % 2 == k.shape[1] % 2 == 0
    options = cudnn.arguments(case.config, even_queries, even_keys, window=20, start=start)
    assert options["is_causal"] == (start == 0)
    scale, causal = options.pop("scale"), options.pop("is_causal")
    run = functools.partial(jax.nn.dot_product_attention, scale=scale, is_causal=causal)
    got = jax.jit(functools.partial(run, implementation="xla"))(q, k, v, **options)[:, :T]
    positions = start + jnp.arange(T), jnp.arange(77)
    mask = plain.visible(queries, keys, *positions, 20)
    wanted = plain.attend(case.config, *case.heads(), mask)
    # Scores up to 30 are off by 2e-6 in float32, a weight by as much of itself, and values are up to 10.
    np.testing.assert_allclose(got, wanted, rtol=0, atol=4e-5)


def test_no_query_is_left_without_a_key() -> None:
    """A row of the bias that masks all would be a softmax over nothing."""
    queries, keys = cases.Case(77, 77).segments()
    segments = cudnn.even(queries, -1), cudnn.even(keys, -1)
    options = cudnn.arguments(cases.config(), *segments, window=5, start=0)
    assert np.asarray(options["mask"]).any(axis=-1).all()


@pytest.mark.skipif("not has_gpu()", reason="cuDNN needs a GPU")
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("T", [128, 77])
def test_is_as_near_to_float32_as_plain_attention(T: int, window: int | None) -> None:
    """In bfloat16: its output and gradients, as parts of the largest number."""
    run = functools.partial(cases.Case, T, T, window=window)
    with jax.default_matmul_precision("highest"):
        exact = cases.value_and_gradients(run(dtype=jnp.float32), implementation="plain")
    mine, plainly = (
        cases.value_and_gradients(run(dtype=jnp.bfloat16), implementation=kind)
        for kind in ("cudnn", "plain")
    )
    for a, b, wanted in zip(mine, plainly, exact, strict=True):
        off, usual = (np.abs(np.asarray(x, np.float64) - wanted).max() for x in (a, b))
        # Both round weights and scores' gradients to 8 bits, not alike: on an H100 0.6 to 1.3 times as far off.
        assert off < 2 * usual < 0.1 * np.abs(wanted).max()
