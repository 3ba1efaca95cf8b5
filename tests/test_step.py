# SPDX-License-Identifier: Apache-2.0
"""Identities of the loss and the step: chunked = plain, micro-batches = one batch, packed = unpacked, frozen = frozen."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jft import lora, losses, matmul, optim, step
from jft.models import architecture, decoder
from jft.models import remat as remat_policies

CONFIG = architecture.Config(
    vocab_size=61,
    d_model=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    d_ff=48,
    max_length=64,
    tie_embeddings=True,
)
SPEC = lora.Spec(rank=3, alpha=6, targets=r"layers/.*kernel", layouts=architecture.LAYOUTS)
# float64 sums in another order differ in the last digits only.
EXACT = 1e-12

pytestmark = pytest.mark.usefixtures("x64")


def make_batch(B: int = 4, T: int = 24) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    weights = (rng.random((B, T)) < np.linspace(0.1, 0.9, B)[:, None]).astype(np.float32)
    return {
        "tokens": rng.integers(0, CONFIG.vocab_size, (B, T)),
        "targets": rng.integers(0, CONFIG.vocab_size, (B, T)),
        "weights": weights,  # rows differ in their number of trained tokens
        "segments": np.ones((B, T), np.int32),
        "positions": np.tile(np.arange(T), (B, 1)),
    }


# Each function is compiled as a whole: operation by operation it is hundreds of programs.
@functools.cache
def _params(c: architecture.Config) -> Any:
    make = functools.partial(decoder.init, c, dtype=jnp.float64)
    return jax.tree.map(np.asarray, jax.jit(lambda: make(key=jax.random.key(0)))())


def make_params(c: architecture.Config = CONFIG) -> Any:
    """Arrays of their own: a step may take them over."""
    return jax.tree.map(jnp.array, _params(c))


@jax.jit
def make_adapters(params: Any) -> lora.Adapters:
    adapters = lora.init(SPEC, params, key=jax.random.key(1))
    return jax.tree.map(
        lambda x: x + 0.03 * jax.random.normal(jax.random.key(2), x.shape), adapters
    )


def plain_loss(params: Any, batch: Any) -> jax.Array:
    """All logits at once, and the textbook formula."""
    logits = decoder.apply(CONFIG, params, batch["tokens"], batch["positions"], batch["segments"])
    log_p = jax.nn.log_softmax(logits)
    picked = jnp.take_along_axis(log_p, batch["targets"][..., None], axis=-1)[..., 0]
    return -(picked * batch["weights"]).sum()


def gradients(loss: step.Loss, trainable: Any, frozen: Any, batch: Any, count: int = 1) -> Any:
    return jax.jit(lambda *given: step.gradients(loss, *given, count))(trainable, frozen, batch)


@functools.cache
def plain_gradients() -> Any:
    return jax.jit(jax.grad(plain_loss))(make_params(), make_batch())


@functools.cache
def lora_gradients() -> Any:
    """Of the merged model: the loss, and the adapters' gradients."""
    params = make_params()
    merged = lambda a, params: plain_loss(lora.add(params, a), make_batch())  # noqa: E731
    return jax.jit(jax.value_and_grad(merged))(make_adapters(params), params)


def assert_close(got: Any, want: Any, rtol: float = EXACT) -> None:
    scale = max(float(np.abs(x).max()) for x in jax.tree.leaves(want))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * scale)


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_chunked_cross_entropy_is_the_plain_one(chunk: int) -> None:
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(3, 11, 8)))
    kernel = jnp.asarray(rng.normal(size=(8, 19)))
    targets = rng.integers(0, 19, (3, 11))
    weights = rng.random((3, 11)) * (rng.random((3, 11)) < 0.5)

    def plain(kernel: jax.Array, x: jax.Array) -> jax.Array:
        log_p = jax.nn.log_softmax(x @ kernel)
        return -(jnp.take_along_axis(log_p, targets[..., None], -1)[..., 0] * weights).sum()

    def chunked(kernel: jax.Array, x: jax.Array) -> jax.Array:
        head = lambda kernel, _, x: x @ kernel  # noqa: E731
        return losses.cross_entropy(head, kernel, {}, x, targets, weights, chunk=chunk)[0]

    got, want = (jax.jit(jax.value_and_grad(f, (0, 1)))(kernel, x) for f in (chunked, plain))
    assert_close(got[0], want[0])
    assert_close(got[1], want[1])


def test_nothing_trained_gives_zero_loss_and_gradient() -> None:
    x = jnp.ones((2, 5, 4))
    head = lambda kernel, _, x: x @ kernel  # noqa: E731
    call = lambda kernel: losses.cross_entropy(  # noqa: E731
        head, kernel, {}, x, np.zeros((2, 5), int), np.zeros((2, 5))
    )
    total, weight = call(jnp.ones((4, 9)))
    assert total == 0 and weight == 0
    assert not jax.grad(lambda kernel: call(kernel)[0])(jnp.ones((4, 9))).any()


@pytest.mark.parametrize("mode", lora.MODES)
def test_lora_gradients_are_those_of_the_merged_model(mode: str) -> None:
    params, batch = make_params(), make_batch()
    loss = step.lora_loss(CONFIG, mode=mode)
    total, weight, grads = gradients(loss, make_adapters(params), params, batch)
    assert weight == batch["weights"].sum()
    assert_close((total, grads), lora_gradients())


@pytest.mark.parametrize("einsum", [jnp.einsum, matmul.cpu_einsum])
@pytest.mark.parametrize("count", [2, 4])
def test_micro_batches_are_one_batch(count: int, einsum: matmul.Einsum) -> None:
    params, batch = make_params(), make_batch()
    loss = step.full_loss(CONFIG, how=decoder.Execution(einsum=einsum))
    want = gradients(loss, params, {}, batch)
    got = gradients(loss, params, {}, step.micro_batches(batch, count), count)
    assert_close(got, want)
    assert_close(got[2], plain_gradients())


@pytest.mark.parametrize("remat", [name for name in remat_policies.POLICIES if name != "none"])
def test_remat_changes_nothing(remat: str) -> None:
    params = make_params()
    loss = step.lora_loss(CONFIG, how=decoder.Execution(remat=remat))
    total, _, grads = gradients(loss, make_adapters(params), params, make_batch())
    assert_close((total, grads), lora_gradients())


def test_packed_is_unpacked() -> None:
    """Two examples in one row, apart by segment, against one per row; per token."""
    params = make_params()
    rng = np.random.default_rng(3)
    first, second = rng.integers(0, CONFIG.vocab_size, 9), rng.integers(0, CONFIG.vocab_size, 5)
    packed = np.concatenate([first, second, [0, 0]])[None]
    segments = np.array([[1] * 9 + [2] * 5 + [0] * 2])
    positions = np.array([[*range(9), *range(5), 0, 0]])
    apply = jax.jit(functools.partial(decoder.apply, CONFIG))
    together = apply(params, packed, positions, segments)[0]
    alone = [apply(params, x[None])[0] for x in (first, second)]
    assert_close(together[:14], np.concatenate(alone))


def test_training_moves_the_adapters_and_leaves_the_base_bit_for_bit() -> None:
    params, batch = make_params(), make_batch()
    before = jax.tree.map(np.array, params)
    optimizer = optim.optimizer(optim.Optim(learning_rate=1e-2), 3)
    adapters = jax.jit(lambda params: lora.init(SPEC, params, key=jax.random.key(1)))(params)
    start = jax.tree.map(np.array, adapters)
    state = step.init_state(adapters, optimizer)
    update = step.train_step(step.lora_loss(CONFIG), optimizer, accumulate=2)
    values = []
    for _ in range(3):
        state, metrics = update(state, params, batch)
        values.append(float(metrics["loss"]))
    assert values[2] < values[0]
    moved = jax.tree.map(lambda a, b: bool((np.array(a) != b).any()), state.trainable, start)
    assert all(jax.tree.leaves(moved))
    jax.tree.map(np.testing.assert_array_equal, params, before)


def test_full_fine_tuning_in_bfloat16_keeps_its_weights_in_float32() -> None:
    """At 1e-5 an update is far below bfloat16's last place (2^-9 of a weight), yet the weights move."""
    params = jax.tree.map(lambda x: jnp.array(x, jnp.float32), _params(CONFIG))
    before = jax.tree.map(np.array, params)
    optimizer = optim.optimizer(optim.Optim(learning_rate=1e-5, warmup_fraction=0.0), 2)
    loss = step.full_loss(CONFIG, how=decoder.Execution(dtype=jnp.dtype(jnp.bfloat16)))
    x, _ = jax.jit(loss)(params, {}, make_batch())
    # The computation is in bfloat16: it differs from float32's by its rounding, which is about 2^-9.
    exact, _ = jax.jit(step.full_loss(CONFIG))(params, {}, make_batch())
    assert 1e-7 < abs(x - exact) / exact < 2e-2
    state, _ = step.train_step(loss, optimizer)(
        step.init_state(params, optimizer), {}, make_batch()
    )
    kernel, old = (t["layers"]["mlp"]["up"]["kernel"] for t in (state.trainable, before))
    assert kernel.dtype == jnp.float32
    assert (kernel != old).mean() > 0.99
    assert (kernel.astype(jnp.bfloat16) == old.astype(jnp.bfloat16)).mean() > 0.9


def test_lora_plus_moves_b_further() -> None:
    adapters = make_adapters(make_params())
    grads = jax.tree.map(np.cos, adapters)
    moves = []
    for ratio in (1.0, 16.0):
        settings = optim.Optim(lora_plus_ratio=ratio, warmup_fraction=0.0)
        optimizer = optim.optimizer(settings, 10)
        update = lambda g, a, o=optimizer: o.update(g, o.init(a), a)[0]  # noqa: E731
        moves.append(jax.jit(update)(grads, adapters))
    for path, plain in moves[0].items():
        np.testing.assert_allclose(moves[1][path].a, plain.a, rtol=EXACT)
        np.testing.assert_allclose(moves[1][path].b, 16 * np.asarray(plain.b), rtol=EXACT)


@pytest.mark.parametrize("mode", ["factored", pytest.param("merged", marks=pytest.mark.slow)])
def test_dropout_is_for_training_alone_and_repeats(mode: str) -> None:
    params, batch = make_params(), make_batch()
    adapters = {k: dataclasses.replace(f, dropout=0.5) for k, f in make_adapters(params).items()}
    loss = step.lora_loss(CONFIG, mode=mode)
    optimizer = optim.optimizer(optim.Optim(), 3)

    def two_losses(update: Any) -> list[float]:
        state = step.init_state(jax.tree.map(jnp.copy, adapters), optimizer)
        losses = []
        for _ in range(2):
            state, metrics = update(state, params, batch)
            losses.append(float(metrics["loss"]))
        return losses

    key = jax.random.key(0)
    plain = two_losses(step.train_step(loss, optimizer, accumulate=2))
    update = step.train_step(loss, optimizer, accumulate=2, dropout_key=key)
    first = two_losses(update)
    assert first == two_losses(
        update
    )  # a step's masks follow from its number, as a resumed run needs
    total, weight = step.eval_step(loss)(adapters, params, batch)
    assert plain[0] == pytest.approx(float(total / weight), rel=EXACT)
    assert abs(first[0] - plain[0]) > 1e-3
    # By hand: the micro-batches of step 0 have these two keys.
    keys = jax.random.split(jax.random.fold_in(key, 0), 2)
    halves = step.micro_batches(batch, 2)
    alone = jax.jit(loss)
    parts = [
        alone(adapters, params, {k: v[i] for k, v in halves.items()} | {"dropout_key": keys[i]})
        for i in range(2)
    ]
    assert first[0] == pytest.approx(float(sum(t for t, _ in parts) / weight), rel=EXACT)


@pytest.mark.parametrize("make", [step.full_loss, step.lora_loss])
def test_the_router_loss_is_added_to_the_loss_of_a_token(make: Any) -> None:
    c = dataclasses.replace(CONFIG, experts=architecture.Experts(4, 2))
    params, batch = make_params(c), make_batch()
    for name in ("segments", "weights"):
        batch[name][:, -5:] = 0  # padding
    spec = dataclasses.replace(SPEC, targets=r"layers/experts/.*kernel")
    trainable, frozen = params, {}
    if make is step.lora_loss:
        start = functools.partial(lora.init, spec, key=jax.random.key(1))
        trainable, frozen = jax.jit(start)(params), params
    plain, weight = jax.jit(make(c))(trainable, frozen, batch)
    both, _ = jax.jit(make(c, router_loss=0.5))(trainable, frozen, batch)
    counted = batch["segments"] > 0
    inputs = (batch["tokens"], batch["positions"], batch["segments"], counted)
    _, load = jax.jit(functools.partial(decoder.hidden_and_load, c))(params, *inputs)
    assert load is not None
    # Each token is counted once for each of its experts in each layer.
    np.testing.assert_array_equal(load.chosen_E.sum(axis=-1), 2 * counted.sum())
    extra = losses.load_balance(load.chosen_E, load.probability_E, load.tokens)
    assert extra > 1.9  # top_k when even, and more the less even
    np.testing.assert_allclose((both - plain) / weight, 0.5 * extra, rtol=EXACT)


def rooted(trainable: Any, _: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
    """A loss that is not finite where x is not, and whose gradient alone is not where x is 0."""
    x = batch["x"]
    return jnp.sqrt(trainable["w"] ** 2 * x).sum(), jnp.float64(x.size)


def rows(*values: float) -> dict[str, np.ndarray]:
    return {"x": np.array(values)[:, None], "segments": np.ones((len(values), 1), np.int32)}


GOOD, OTHER = rows(1.0, 2.0, 3.0, 4.0), rows(5.0, 1.0, 1.0, 2.0)
BAD = {"loss": rows(1.0, np.nan, 2.0, 1.0), "gradient": rows(1.0, 2.0, 0.0, 1.0)}


def run(update: Any, optimizer: Any, *batches: Any) -> tuple[step.State, list[Any]]:
    state = step.init_state({"w": jnp.array([0.7])}, optimizer)
    told = []
    for batch in batches:
        state, metrics = update(state, {}, batch)
        told.append(jax.tree.map(float, metrics))
    return state, told


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("bad", BAD)
def test_a_step_that_is_not_finite_changes_nothing(bad: str, accumulate: int) -> None:
    optimizer = optim.optimizer(optim.Optim(schedule="constant", warmup_fraction=0.0), 3)
    update = step.train_step(rooted, optimizer, accumulate=accumulate)
    want, _ = run(update, optimizer, GOOD, OTHER)
    got, told = run(update, optimizer, GOOD, BAD[bad], OTHER)
    assert [metrics["skipped"] for metrics in told] == [0, 1, 0]
    assert np.isfinite(told[1]["loss"]) == (bad == "gradient")
    assert not np.isfinite(told[1]["grad_norm"])
    assert (got.step, want.step) == (3, 2)  # it counts: the data's position is the step
    np.testing.assert_array_equal(got.trainable["w"], want.trainable["w"])
    adam = [
        next(s for s in jax.tree.leaves(x.opt_state, is_leaf=is_adam) if is_adam(s))
        for x in (got, want)
    ]
    jax.tree.map(np.testing.assert_array_equal, *adam)


def is_adam(state: Any) -> bool:
    return hasattr(state, "mu")


def test_the_learning_rate_is_that_of_the_step_after_a_skipped_one_too() -> None:
    settings = optim.Optim(schedule="linear", warmup_fraction=0.0, lora_plus_ratio=1.0)
    rate = optim.schedule(settings, 5)
    got, _ = run(
        step.train_step(rooted, o := optim.optimizer(settings, 5)), o, GOOD, BAD["loss"], OTHER
    )
    # By hand: optax's Adam with the rates of steps 0 and 2.
    by_hand = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(lambda n: rate(2 * n), weight_decay=0.0)
    )
    want, _ = run(step.train_step(rooted, by_hand), by_hand, GOOD, OTHER)
    np.testing.assert_allclose(got.trainable["w"], want.trainable["w"], rtol=EXACT)
