# SPDX-License-Identifier: Apache-2.0
"""On a mesh a step that is not finite on one device is skipped on all of them, and its operation is found."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jft import config as configuration
from jft import debugging, program, sharding, step
from jft.models import architecture, decoder

assert jax.device_count() == 8
pytestmark = pytest.mark.usefixtures("quick_compiles")
ROWS, T, V = 8, 16, 64
MODEL = architecture.Config(
    vocab_size=V,
    d_model=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    d_ff=48,
    max_length=T,
)


def batch(*, bad: bool) -> dict[str, np.ndarray]:
    """A bad one has a weight that is not a number in the last device's row."""
    rng = np.random.default_rng(0)
    tokens, targets = rng.integers(0, V, (2, ROWS, T)).astype(np.int32)
    segments = np.ones((ROWS, T), np.int32)
    weights = np.ones((ROWS, T), np.float32)
    weights[-1, 0] = np.nan if bad else 1
    positions = np.tile(np.arange(T, dtype=np.int32), (ROWS, 1))
    return dict(
        tokens=tokens, targets=targets, segments=segments, positions=positions, weights=weights
    )


@pytest.mark.parametrize("rank", [0, 4])
def test_one_decision_for_all_devices(rank: int) -> None:
    c = configuration.base()
    c.lora.rank, c.batch_size, c.micro_batch = rank, ROWS, ROWS // 2
    c.mesh.data, c.mesh.tensor = 2, 2
    layout = sharding.layout(sharding.Sizes(**c.mesh), jax.devices())
    assert layout is not None
    built = program.build(c, MODEL, layout=layout, backend="cpu", length=T, steps=3)
    params = decoder.init(MODEL, key=jax.random.key(0))
    params = jax.tree.map(jax.device_put, params, layout.weights(params))
    placed = jax.tree.map(lambda x: x.sharding, built.state)
    make = jax.jit(
        functools.partial(step.init_state, optimizer=built.optimizer), out_shardings=placed
    )

    def run(*bad: bool) -> tuple[Any, list[float]]:
        mine = jax.tree.map(jnp.copy, params)
        trainable, frozen = (program.init_adapters(c, mine), mine) if rank else (mine, {})
        state, skipped = make(trainable), []
        for one in bad:
            state, metrics = built.train_step(state, frozen, layout.put(batch(bad=one), 0, ROWS))
            skipped.append(float(metrics["skipped"]))
        return state, skipped

    want, _ = run(False)
    got, skipped = run(False, True)
    assert skipped == [0, 1] and got.step == 2
    for a, b in zip(jax.tree.leaves(got.trainable), jax.tree.leaves(want.trainable), strict=True):
        for here, there in zip(a.addressable_shards, b.addressable_shards, strict=True):
            np.testing.assert_array_equal(here.data, there.data)

    given = {"state": got, "base": params if rank else {}}
    given["batch"] = layout.put(batch(bad=True), 0, ROWS)
    found = debugging.find(
        lambda x: built.measure(x["state"], x["base"], x["batch"])[1]["loss"],
        given,
        words=debugging.WORDS,
    )
    assert found is not None
    first = found.operations[0]
    assert first.places == ("micro-batch 1",)
    assert "batch/weights" in [x.name for x in first.inputs]
