# SPDX-License-Identifier: Apache-2.0
"""Generation: rows together as each alone, with an adapter and without, whichever way the layers are computed."""

import pathlib
from typing import Any

import jax
import pytest

import jft
from jft import generate, lora
from jft.models import architecture

PROMPTS = [[1, 5, 9, 40, 2, 7], [8, 3], [30, 31, 32, 33, 34, 35, 36, 37, 38, 39, 41]]


@pytest.fixture(scope="module")
def model(tiny_model: pathlib.Path) -> Any:
    return jft.load(str(tiny_model))


def adapters_of(model: Any) -> lora.Adapters:
    """On kernels of the layers and on the embedding, large enough to change the answers."""
    targets = r"layers/.*/kernel|embed/embedding"
    spec = lora.Spec(rank=2, targets=targets, layouts=architecture.LAYOUTS)
    draw = lambda x: x + 0.3 * jax.random.normal(jax.random.key(1), x.shape)  # noqa: E731
    init = lambda params: lora.init(spec, params, key=jax.random.key(0))  # noqa: E731
    return jax.jit(lambda params: jax.tree.map(draw, init(params)))(model.params)


@pytest.mark.parametrize("adapted", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_rows_together_are_each_row_alone(model: Any, adapted: bool) -> None:
    generator = generate.Generator(model, adapters_of(model) if adapted else None)
    generator.stop = frozenset()
    sampling = generate.Sampling(max_new_tokens=21)  # a stride, and a part of one
    together = generator.batch(PROMPTS, sampling)
    alone = [list(generator.stream(prompt, sampling)) for prompt in PROMPTS]
    assert together == alone
    assert [len(row) for row in together] == [21] * 3
    if adapted:
        plain = generate.Generator(model)
        plain.stop = frozenset()
        assert together != plain.batch(PROMPTS, sampling)


def test_a_stop_token_ends_its_row_alone(model: Any) -> None:
    generator = generate.Generator(model)
    generator.stop = frozenset()
    sampling = generate.Sampling(max_new_tokens=40)
    free = generator.batch(PROMPTS, sampling)
    stop = free[0][18]
    generator.stop = frozenset([stop])
    for row, stopped in zip(free, generator.batch(PROMPTS, sampling), strict=True):
        assert stopped == (row[: row.index(stop) + 1] if stop in row else row)
