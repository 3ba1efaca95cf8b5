# SPDX-License-Identifier: Apache-2.0
"""Which attention a run takes, and what all implementations share: blocks that hold anything, lengths of segments."""

import attention_cases as cases
import hypothesis
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies

from jft.models import architecture, attention, decoder
from jft.models.attention import blocks, plain

GPT_OSS = {"head_dim": 64, "sinks": True, "pattern": (architecture.Layer(window=128),)}


@pytest.mark.parametrize(
    "backend, more, T, dtype, context, chosen",
    [
        ("cpu", {}, 256, "float32", 1, "plain"),
        ("cpu", {}, 512, "float32", 1, "blockwise"),
        ("tpu", {"head_dim": 80}, 77, "bfloat16", 1, "splash"),
        ("tpu", GPT_OSS, 8192, "float32", 1, "splash"),
        ("tpu", {}, 8192, "float64", 1, "blockwise"),
        ("tpu", {}, 8192, "bfloat16", 4, "splash"),
        ("tpu", {}, 8000, "bfloat16", 4, "blockwise"),  # parts of 2,000 are not whole blocks
        ("gpu", {"head_dim": 128}, 2048, "bfloat16", 1, "cudnn"),
        ("gpu", {"head_dim": 128}, 2048, "float32", 1, "blockwise"),
        ("gpu", {"head_dim": 256}, 2048, "bfloat16", 1, "blockwise"),
        ("gpu", {"head_dim": 128}, 16384, "bfloat16", 1, "blockwise"),  # its bias would be large
        ("gpu", {"attention_softcap": 50.0}, 2048, "bfloat16", 1, "blockwise"),
        ("gpu", GPT_OSS, 2048, "bfloat16", 1, "blockwise"),
        ("gpu", GPT_OSS, 1024, "bfloat16", 1, "plain"),
        ("gpu", {"head_dim": 128}, 8192, "bfloat16", 4, "blockwise"),
    ],
)
def test_choice(backend: str, more: dict, T: int, dtype: str, context: int, chosen: str) -> None:
    c = cases.config(**more)
    assert attention.choose(backend, c, T, jnp.dtype(dtype), context=context) == chosen


def test_an_implementation_that_cannot_is_an_error() -> None:
    x, segments = jnp.ones((1, 8, 4, 8)), jnp.ones((1, 8), jnp.int32)
    for options in (
        {"implementation": "flash"},
        {"implementation": "cudnn", "sinks_N": x[0, 0, 0]},
    ):
        with pytest.raises(ValueError, match="no attention"):
            attention.attend(cases.config(), x, x, x, segments, segments, window=None, **options)


@hypothesis.settings(deadline=None, max_examples=200)
@hypothesis.given(strategies.data())
def test_blocks_left_out_are_masked_throughout_and_no_others(data: strategies.DataObject) -> None:
    size = strategies.integers(1, 40)
    keys, block_q, block_k = (data.draw(size) for _ in range(3))
    queries = data.draw(strategies.integers(1, keys))
    start = data.draw(strategies.integers(0, keys - queries))
    window = data.draw(strategies.none() | size)
    one = np.ones((1, queries)), np.ones((1, keys))
    seen_TS = plain.visible(*one, start + np.arange(queries), np.arange(keys), window)[0]
    wanted = {(t // block_q, s // block_k) for t, s in np.argwhere(seen_TS)}
    got = blocks.pairs(queries, keys, block_q, block_k, start, window)
    assert [tuple(pair) for pair in got] == sorted(wanted)


def test_lengths_are_those_of_each_tokens_own_segment() -> None:
    random = np.random.default_rng(0)
    for _ in range(20):
        parts = [random.multinomial(20, [0.3, 0.3, 0.3, 0.1]) for _ in range(3)]
        segments = np.array([np.repeat([1, 2, 3, 0], row) for row in parts])
        positions = np.array([np.concatenate([np.arange(n) for n in row]) for row in parts])
        wanted = [np.repeat(row, row) for row in parts]
        got = decoder.lengths(jnp.asarray(positions), jnp.asarray(segments))
        np.testing.assert_array_equal(got, wanted)
