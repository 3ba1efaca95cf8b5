# SPDX-License-Identifier: Apache-2.0
"""The only jitted updates: one training step and one evaluation step, for LoRA and full fine-tuning alike.

The trainable tree and the frozen tree are two arguments; gradients and optimizer state exist for the first alone.
With LoRA the trainable tree holds the adapters and the frozen one the base; with full fine-tuning the trainable
tree is the model and the frozen one is empty.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import PartitionSpec as P

from jft import lora, losses, matmul, optim, sharding, tree
from jft.models import architecture, decoder, experts

Batch = dict[str, jax.Array]
Loss = Callable[[Any, Any, Batch], tuple[jax.Array, jax.Array]]
Metrics = dict[str, jax.Array]


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["step", "trainable", "opt_state"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class State:
    """What a step changes: the number of steps done, the trainable tree, the optimizer's state."""

    step: jax.Array
    trainable: Any
    opt_state: Any


def init_state(trainable: Any, optimizer: optax.GradientTransformation) -> State:
    return State(jnp.zeros((), jnp.int32), trainable, optimizer.init(trainable))


def head_part(tree: Any) -> Any:
    """The part of a model (or of its adapters, by path) that makes logits: the head, or a tied embedding."""
    if any("/" in key for key in tree):
        return {k: v for k, v in tree.items() if k in ("head/kernel", "embed/embedding")}
    return {"head": tree["head"]} if "head" in tree else {"embed": tree["embed"]}


def lora_loss(
    c: architecture.Config,
    *,
    how: decoder.Execution = decoder.SIMPLE,
    mode: str = "factored",
    router_loss: float = 0.0,
    chunk: int = losses.CHUNK,
) -> Loss:
    """loss(adapters, params, batch) -> (sum of nats, number of trained tokens).

    Where the batch holds a `dropout_key`, the adapters' dropout is on. `router_loss` weighs the load-balance loss of a
    model with experts (`losses.load_balance`), over all tokens that are not padding. `chunk` as in `losses.cross_entropy`.
    """
    hidden = lora.transform(functools.partial(decoder.hidden_and_load, c, how=how), mode=mode)
    adapted_head = lora.transform(functools.partial(decoder.head, c))
    plain_head = functools.partial(decoder.head, c, einsum=matmul.wide_narrow_gradient)

    def head(adapters: Any, params: Any, x: jax.Array) -> jax.Array:
        return adapted_head(params, adapters, x) if adapters else plain_head(params, x)

    def loss(adapters: Any, params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        body = {k: v for k, v in adapters.items() if k != "head/kernel"}
        inputs = _inputs(batch, router_loss)
        x_BTD, load = hidden(params, body, *inputs, dropout_key=batch.get("dropout_key"))
        part = head_part(params)
        mine = {k: v for k, v in head_part(adapters).items() if k.split("/")[0] in part}
        total, weight = _cross_entropy(c, head, mine, part, x_BTD, batch, chunk, how.layout)
        return total + _balance(load, router_loss) * weight, weight

    return loss


def full_loss(
    c: architecture.Config,
    *,
    how: decoder.Execution = decoder.SIMPLE,
    router_loss: float = 0.0,
    chunk: int = losses.CHUNK,
) -> Loss:
    """loss(params, {}, batch) -> (sum of nats, number of trained tokens).

    `how.dtype` is that of the computation, where it is not the parameters' own: weights that train stay float32, since in
    bfloat16 most updates at usual learning rates are smaller than half a unit in a weight's last place and are lost.
    `router_loss` and `chunk` as in `lora_loss`.
    """
    if how.layout is not None:
        how = dataclasses.replace(how, layout=dataclasses.replace(how.layout, trained=True))
    plain_head = functools.partial(decoder.head, c, einsum=matmul.wide_narrow_gradient)

    def head(params: Any, _: Any, x: jax.Array) -> jax.Array:
        return plain_head(params, x)

    def loss(params: Any, frozen: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        inputs = _inputs(batch, router_loss)
        x_BTD, load = decoder.hidden_and_load(c, params, *inputs, how=how)
        part = head_part(params)
        total, weight = _cross_entropy(c, head, part, {}, x_BTD, batch, chunk, how.layout)
        return total + _balance(load, router_loss) * weight, weight

    return loss


def _cross_entropy(
    c: architecture.Config,
    head: losses.Head,
    trainable: Any,
    frozen: Any,
    x_BTD: jax.Array,
    batch: Batch,
    chunk: int,
    layout: sharding.Layout | None,
) -> tuple[jax.Array, jax.Array]:
    shards = None if layout is None else _shards(c, layout, trainable, frozen, x_BTD.shape)
    targets, weights = batch["targets"], batch["weights"]
    return losses.cross_entropy(
        head, trainable, frozen, x_BTD, targets, weights, chunk=chunk, shards=shards
    )


def _shards(
    c: architecture.Config,
    layout: sharding.Layout,
    trainable: Any,
    frozen: Any,
    shape: tuple[int, ...],
) -> losses.Shards:
    """The head split by vocabulary, whether it is a kernel [D, V], an embedding [V, D] or adapters of one."""
    along = layout.along(shape[1])
    positions = shape[0] * shape[1] // (layout.rows * layout.size(*along))
    axes = losses.vocabulary_axes(layout, c.vocab_size, positions)
    leaf = {"head/kernel": P(None, axes), "embed/embedding": P(axes, None)}
    if sharding.is_adapters(trainable):
        of_trainable = {k: lora.partition_spec(f, leaf[k]) for k, f in trainable.items()}
    else:
        of_trainable = tree.unflatten({k: leaf[k] for k in tree.flatten(trainable)})
    of_frozen = tree.unflatten({k: leaf[k] for k in tree.flatten(frozen)})
    return losses.Shards(layout, axes, along, of_trainable, of_frozen)


def _inputs(batch: Batch, router_loss: float) -> tuple[jax.Array, ...]:
    """The decoder's arguments; the last, which tokens count in the experts' load, only where it is asked for."""
    inputs = (batch["tokens"], batch["positions"], batch["segments"])
    return (*inputs, batch["segments"] > 0) if router_loss else inputs


def _balance(load: experts.Load | None, router_loss: float) -> jax.Array | float:
    if load is None:
        return 0.0
    found = losses.load_balance(load.chosen_E, load.probability_E, load.tokens)
    return router_loss * found


def micro_batches(batch: Batch, count: int) -> Batch:
    """[B, T] -> [count, B / count, T]; each device's rows of a mesh stay its own."""

    def split(x: jax.Array) -> jax.Array:
        return x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(split, batch)


def gradients(
    loss: Loss, trainable: Any, frozen: Any, batch: Batch, accumulate: int
) -> tuple[jax.Array, jax.Array, Any]:
    """(sum of losses, sum of weights, gradient of the sum), over `accumulate` micro-batches of equal rows.

    Sums and weights are added and divided once, by the caller: micro-batches with different numbers of trained
    tokens must not be averaged (https://github.com/pytorch/torchtune/issues/2307).
    """
    grad = jax.value_and_grad(loss, has_aux=True)
    if accumulate == 1:
        (total, weight), grads = grad(trainable, frozen, batch)
        return total, weight, grads

    def add(carry: Any, micro: Batch) -> tuple[Any, None]:
        (total, weight), grads = grad(trainable, frozen, micro)
        return jax.tree.map(jnp.add, carry, (total, weight, grads)), None

    shapes = jax.eval_shape(grad, trainable, frozen, jax.tree.map(lambda x: x[0], batch))
    (total, weight), grads = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return lax.scan(add, (total, weight, grads), batch)[0]


def measured(
    loss: Loss,
    *,
    accumulate: int = 1,
    dropout_key: jax.Array | None = None,
    shardings: Any = None,
) -> Callable[[State, Any, Batch], tuple[Any, Metrics]]:
    """A step up to its update: (state, frozen, batch [B, T]) -> (gradient of the mean, metrics); as `train_step`."""

    def measure(state: State, frozen: Any, batch: Batch) -> tuple[Any, Metrics]:
        if accumulate > 1:
            batch = micro_batches(batch, accumulate)
        if dropout_key is not None:
            key = jax.random.fold_in(dropout_key, state.step)
            keys = key if accumulate == 1 else jax.random.split(key, accumulate)
            batch = batch | {"dropout_key": keys}
        total, weight, grads = gradients(loss, state.trainable, frozen, batch, accumulate)
        if shardings is not None:
            grads = lax.with_sharding_constraint(grads, shardings.trainable)
        grads = jax.tree.map(lambda g: (g / weight).astype(g.dtype), grads)
        return grads, {
            "loss": total / weight,
            "grad_norm": optax.tree.norm(grads),
            "tokens": weight,
            "positions": jnp.sum(batch["segments"] > 0),
        }

    return measure


def train_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    dropout_key: jax.Array | None = None,
    shardings: Any = None,
) -> Any:
    """The jitted update: (state, frozen, batch [B, T]) -> (state, metrics). The state is donated.

    With a `dropout_key`, each step and micro-batch has a key of its own, the same in a resumed run. `shardings` are those of
    the state on a mesh, a `State` of them.
    Metrics: `loss` in nats per trained token, `grad_norm` before clipping, `tokens` trained, `positions` that hold a token,
    `skipped`: 1 where loss or norm is not finite. Such a step only counts: it leaves weights and moments as they are.
    """
    measure = measured(loss, accumulate=accumulate, dropout_key=dropout_key, shardings=shardings)

    def step(state: State, frozen: Any, batch: Batch) -> tuple[State, Metrics]:
        grads, metrics = measure(state, frozen, batch)
        # Two numbers that are the same on every device, so that all decide alike.
        good = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
        updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        trainable = optim.choose(good, trainable, state.trainable)
        opt_state = optim.choose(good, opt_state, state.opt_state)
        metrics["skipped"] = jnp.logical_not(good).astype(jnp.int32)
        return State(state.step + 1, trainable, opt_state), metrics

    if shardings is None:
        return jax.jit(step, donate_argnums=0)
    everywhere = jax.NamedSharding(shardings.step.mesh, P())
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, everywhere))


def eval_step(loss: Loss, layout: sharding.Layout | None = None) -> Any:
    """The jitted loss: (trainable, frozen, batch) -> (sum of nats, number of trained tokens), on every device."""
    return jax.jit(loss, out_shardings=None if layout is None else layout.replicated)
