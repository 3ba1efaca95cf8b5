# SPDX-License-Identifier: Apache-2.0
"""Likelihoods on a mesh are those on one device, with an adapter too."""

import functools
from typing import Any

import jax
import numpy as np
import pytest

from jft import lora, sharding, transfer
from jft.evals import likelihood, program
from jft.models import architecture, decoder

assert jax.device_count() == 8
pytestmark = pytest.mark.usefixtures("quick_compiles")
C = architecture.Config(
    vocab_size=64,
    d_model=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    d_ff=48,
    max_length=64,
)


def requests() -> list[likelihood.Request]:
    rng = np.random.default_rng(0)
    made = [tuple(rng.integers(3, C.vocab_size, n).tolist()) for n in rng.integers(2, 30, 40)]
    return [likelihood.Request(tokens, 1 + len(tokens) // 3) for tokens in made]


@pytest.mark.parametrize("sizes", [{}, {"tensor": 2}, {"data": 2, "context": 2}])
def test_likelihoods(sizes: dict[str, int], x64: Any) -> None:
    """In float64, where only sums in another order differ."""
    params = decoder.init(C, key=jax.random.key(0), dtype=np.float64)
    spec = lora.Spec(rank=2, targets="layers/.*/kernel", layouts=architecture.LAYOUTS)
    adapters = lora.init(spec, params, key=jax.random.key(1))
    adapters = jax.tree.map(lambda x: x + 0.1, adapters)
    run = functools.partial(program.reader(C, program.of_targets, chunk=16), params, adapters)
    want = likelihood.measure(run, requests(), batch_size=8, length=32)

    layout = sharding.layout(sharding.Sizes(**sizes), jax.devices())
    assert layout is not None
    placed = transfer.to_devices(params, layout.weights(params))
    spread = transfer.to_devices(adapters, layout.trainable(adapters, params))
    how = decoder.Execution(layout=layout)
    reader = program.reader(C, program.of_targets, how=how, chunk=16)

    def on_mesh(batch: likelihood.Batch) -> Any:
        return reader(placed, spread, layout.put(batch, 0, 8))

    got = likelihood.measure(on_mesh, requests(), batch_size=8, length=32)
    for one, other in zip(want, got, strict=True):
        assert one.greedy == other.greedy and one.tokens == other.tokens
        assert one.logprob == pytest.approx(other.logprob, rel=1e-9)
