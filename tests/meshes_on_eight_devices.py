# SPDX-License-Identifier: Apache-2.0
"""Training on a mesh equals training on one device: losses and weights after ten steps, on packed rows."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jft import config as configuration
from jft import errors, program, sharding, step
from jft.models import architecture, decoder

assert jax.device_count() == 8
pytestmark = pytest.mark.usefixtures("quick_compiles")
STEPS, ROWS, T, V = 10, 8, 32, 64

DENSE = architecture.Config(
    vocab_size=V,
    d_model=32,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    d_ff=48,
    max_length=T,
)
CONFIGS = {
    "dense": DENSE,
    "tied": dataclasses.replace(DENSE, tie_embeddings=True),
    # A vocabulary that nothing divides, biases, learned positions, fused projections.
    "gpt2": dataclasses.replace(
        DENSE,
        vocab_size=61,
        num_kv_heads=4,
        pattern=(architecture.Layer(rope=None),),
        norm="layer",
        fused=True,
        gated=False,
        activation="gelu_tanh",
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        learned_positions=True,
        tie_embeddings=True,
    ),
    "windows": dataclasses.replace(
        DENSE, pattern=(architecture.Layer(window=5), architecture.Layer()), attention_softcap=5.0
    ),
    "experts": dataclasses.replace(
        DENSE, experts=architecture.Experts(count=4, top_k=2), mlp_bias=True, sinks=True
    ),
}
MESHES = {
    "data 8": {"data": 8, "fsdp": 1},
    "fsdp 8": {},
    "fsdp 4 x tensor 2": {"tensor": 2},
    "data 2 x fsdp 2 x tensor 2": {"data": 2, "tensor": 2},
    "context 4": {"context": 4},
    "slice 2 x fsdp 2 x context 2": {"slice": 2, "context": 2},
    "fsdp 2 x expert 4": {"expert": 4},
    "expert 2 x tensor 2": {"expert": 2, "tensor": 2},
}


def make_config(rank: int, **changes: Any) -> Any:
    c = configuration.base()
    c.lora.rank = rank
    c.batch_size, c.optim.learning_rate, c.optim.schedule = ROWS, 1e-3, "constant"
    # Gradients that are zero but for rounding (of biases of keys, say) stay small beside this.
    c.optim.eps = 1e-4
    c.remat = "products"
    for key, value in changes.items():
        c.mesh[key] = value
    return c


def batch(number: int, vocab_size: int) -> dict[str, np.ndarray]:
    """Rows of several segments of any length, with padding; some tokens are not trained, in some rows most."""
    rng = np.random.default_rng(number)
    tokens, targets = rng.integers(0, vocab_size, (2, ROWS, T)).astype(np.int32)
    segments, positions = np.zeros((2, ROWS, T), np.int32)
    for row in range(ROWS):
        at = 0
        for segment in range(1, 5):
            n = min(int(rng.integers(1, 14)), T - at)
            segments[row, at : at + n], positions[row, at : at + n] = segment, range(n)
            at += n
    weights = rng.random((ROWS, T)) < np.linspace(0.1, 0.9, ROWS)[:, None]
    weights = (weights & (segments > 0)).astype(np.float32)
    return dict(
        tokens=tokens, targets=targets, segments=segments, positions=positions, weights=weights
    )


@functools.cache
def params(name: str) -> Any:
    made = jax.jit(lambda: decoder.init(CONFIGS[name], key=jax.random.key(0)))()
    # Biases begin at zero, where some faults would not be seen.
    noise = lambda x: x + 0.05 * np.random.default_rng(x.size).normal(size=x.shape).astype("f4")  # noqa: E731
    return jax.tree.map(np.asarray, jax.tree.map(noise, made))


def train(name: str, c: Any, layout: sharding.Layout | None) -> tuple[list[float], Any]:
    """Losses of ten steps and an evaluation, and the trained tree."""
    arch = CONFIGS[name]
    built = program.build(c, arch, layout=layout, backend="cpu", length=T, steps=STEPS)
    mine = jax.tree.map(jnp.array, params(name))
    if layout is not None:
        mine = jax.tree.map(jax.device_put, mine, layout.weights(mine))
    trainable, frozen = (program.init_adapters(c, mine), mine) if c.lora.rank else (mine, {})
    make = functools.partial(step.init_state, optimizer=built.optimizer)
    state = jax.jit(make, out_shardings=jax.tree.map(lambda x: x.sharding, built.state))(trainable)
    losses = []
    for number in range(STEPS):
        rows = batch(number, arch.vocab_size)
        rows = rows if layout is None else layout.put(rows, 0, ROWS)
        state, metrics = built.train_step(state, frozen, rows)
        losses.append(float(metrics["loss"]))
    total, weight = built.eval_step(state.trainable, frozen, rows)
    return [*losses, float(total / weight)], state.trainable


@functools.cache
def alone(name: str, rank: int, router_loss: float) -> tuple[list[float], Any]:
    c = make_config(rank)
    c.router_loss = router_loss
    return train(name, c, None)


CASES = [
    *(("dense", mesh, rank) for mesh in list(MESHES)[:6] for rank in (0, 4)),
    ("tied", "data 2 x fsdp 2 x tensor 2", 0),
    *(("gpt2", "fsdp 4 x tensor 2", rank) for rank in (0, 4)),
    *(("windows", mesh, 4) for mesh in ("context 4", "fsdp 4 x tensor 2")),
    *(("experts", mesh, 4) for mesh in list(MESHES)[5:]),
    ("experts", "expert 2 x tensor 2", 0),
]
# Each takes some seconds to compile: the others are slow tests.
QUICK = [
    ("dense", "fsdp 4 x tensor 2", 4),
    ("dense", "data 2 x fsdp 2 x tensor 2", 0),
    ("experts", "expert 2 x tensor 2", 4),
]


def marked(case: tuple[str, str, int]) -> Any:
    return case if case in QUICK else pytest.param(*case, marks=pytest.mark.slow)


@pytest.mark.parametrize(("name", "mesh", "rank"), map(marked, CASES))
def test_a_mesh_is_one_device(name: str, mesh: str, rank: int) -> None:
    check(name, rank, make_config(rank, **MESHES[mesh]))


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 4])
def test_micro_batches_on_a_mesh_are_one_batch(rank: int) -> None:
    c = make_config(rank, data=2, fsdp=2, tensor=2)
    c.micro_batch = ROWS // 2
    check("dense", rank, c)


def check(name: str, rank: int, c: Any) -> None:
    router_loss = 0.1 if name == "experts" else 0.0
    c.router_loss = router_loss
    layout = sharding.Layout(sharding.mesh(sharding.Sizes(**c.mesh), jax.devices()))
    want, trained = alone(name, rank, router_loss)
    got, sharded = train(name, c, layout)
    # float32 sums in another order differ by some units in the last place (6e-8); ten steps and Adam's division add up some
    # tens of them.
    np.testing.assert_allclose(got, want, rtol=1e-5)
    for leaf, whole in zip(jax.tree.leaves(sharded), jax.tree.leaves(trained), strict=True):
        np.testing.assert_allclose(leaf, whole, rtol=1e-5, atol=1e-5)


def test_weights_lie_in_parts() -> None:
    """A device of eight holds an eighth of what `fsdp` stores, of adapters and moments too; copies with `data`."""
    for sizes, parts in (({}, 8), ({"data": 8, "fsdp": 1}, 1)):
        c = make_config(4, **sizes)
        layout = sharding.Layout(sharding.mesh(sharding.Sizes(**c.mesh), jax.devices()))
        built = program.build(c, DENSE, layout=layout, backend="cpu", length=T, steps=STEPS)
        for leaf in jax.tree.leaves((built.frozen["layers"]["mlp"], built.state.trainable)):
            held = np.prod(leaf.sharding.shard_shape(leaf.shape))
            # Factors of few numbers may have no dimension that eight devices divide.
            assert leaf.size // held in (parts, 1) and (held < 1000 or leaf.size // held == parts)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"fsdp": 3}, "mesh .fsdp 3. does not fit 8 devices"),
        ({"data": -1}, "mesh.data and mesh.fsdp are -1"),
        ({"tensor": 0}, "mesh.tensor=0: 1 or more"),
        ({"tensor": 4}, "mesh.tensor=4 does not divide num_kv_heads=2"),
        ({"expert": 2}, "mesh.expert=2 does not divide the model's 0 experts"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, int], said: str) -> None:
    c = make_config(4)
    with pytest.raises(errors.UserError, match=said):
        sizes = sharding.Sizes(**{**c.mesh, **changes})
        layout = sharding.Layout(sharding.mesh(sizes, jax.devices()))
        program.build(c, DENSE, layout=layout, backend="cpu", length=T, steps=STEPS)


def test_rows_that_the_devices_do_not_divide_are_refused() -> None:
    c = make_config(4)
    layout = sharding.Layout(sharding.mesh(sharding.Sizes(), jax.devices()))
    for key in ("batch_size", "eval_batch_size"):
        with pytest.raises(
            errors.UserError, match=f"{key}=12 is not divisible by the 8 .*: use 16"
        ):
            c = make_config(4)
            c[key] = 12
            program.build(c, DENSE, layout=layout, backend="cpu", length=T, steps=STEPS)
