# SPDX-License-Identifier: Apache-2.0
"""From a configuration and a model's architecture to the two programs of a run: a training and an evaluation step.

Nothing is loaded and nothing is computed: shapes are enough. `jft train` runs these programs, `jft plan` compiles them for
machines that are not there.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import config_dict

from jft import config as configuration
from jft import errors, lora, losses, matmul, optim, sharding, step
from jft.models import architecture, attention, decoder, quantizing, remat

# Tokens in one forward pass of a CPU device: more costs memory and brings no speed. SmolLM2-135M on 2 cores with 256, 512
# and 1,024 tokens: 216, 220 to 240 and 229 tokens/s in 1.8, 2.4 and 3.5 GB.
CPU_TOKENS = 512
# Policies of remat="auto", the fastest first. Not "none": "products" computes but thin products twice, and keeps less.
AUTO = ("products", "attention", "full", "offload")
BATCH = {"tokens": jnp.int32, "targets": jnp.int32, "segments": jnp.int32, "positions": jnp.int32}


@dataclasses.dataclass(frozen=True)
class Program:
    """The programs of a run, and what they take.

    Attributes:
      layout: of the mesh; None on one device.
      optimizer: over the trainable tree.
      measure: a training step up to its update, see `step.measured`; not jitted.
      train_step: see `step.train_step`.
      eval_step: see `step.eval_step`.
      state: shapes of the state, with its shardings on a mesh.
      frozen: likewise, of the frozen tree.
      batch_size: rows of a step.
      micro_batch: rows of a forward pass.
      eval_batch: rows of an evaluation step.
      length: positions of a row.
      train_bytes, eval_bytes: what the steps take on a device at their peaks; 0 where they are not compiled yet.
    """

    layout: sharding.Layout | None
    optimizer: optax.GradientTransformation
    measure: Any
    train_step: Any
    eval_step: Any
    state: step.State
    frozen: Any
    batch_size: int
    micro_batch: int
    eval_batch: int
    length: int
    train_bytes: int = 0
    eval_bytes: int = 0

    def batch(self, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of a batch of so many rows."""
        placed = None if self.layout is None else self.layout.batch
        kinds = BATCH | {"weights": jnp.float32}
        return {
            name: jax.ShapeDtypeStruct((rows, self.length), dtype, sharding=placed)
            for name, dtype in kinds.items()
        }

    def lower_train(self, device: Any = None) -> jax.stages.Lowered:
        """The training step, ready to be compiled; for a `device` of a topology where there is no mesh."""
        arguments = (self.state, self.frozen, self.batch(self.batch_size))
        return self.train_step.lower(*_on(device, arguments))

    def lower_eval(self, device: Any = None) -> jax.stages.Lowered:
        """The evaluation step, likewise."""
        arguments = (self.state.trainable, self.frozen, self.batch(self.eval_batch))
        return self.eval_step.lower(*_on(device, arguments))


def _on(device: Any, shapes: Any) -> Any:
    if device is None:
        return shapes
    alone = jax.sharding.SingleDeviceSharding(device)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=alone), shapes)


def build(
    config: config_dict.ConfigDict,
    model: architecture.Config,
    *,
    layout: sharding.Layout | None,
    backend: str,
    length: int,
    steps: int,
    params: decoder.Params | None = None,
) -> Program:
    """The programs of a run.

    Args:
      config: complete and valid.
      model: the architecture.
      layout: of the mesh; None for one device.
      backend: "cpu", "gpu" or "tpu".
      length: positions of a row.
      steps: of the run, for the schedule.
      params: shapes of the model's parameters; None for what the configuration says.

    Raises:
      UserError: settings that don't fit each other, the model or the mesh.
    """
    c = config
    check(c, model, layout, length)
    micro_batch = choose_micro_batch(c, layout, backend, length)
    eval_batch = c.eval_batch_size or micro_batch
    if layout is not None:
        layout.check_rows("eval_batch_size", eval_batch)
    optimizer = optim.optimizer(optim.Optim(**c.optim), steps)
    params = shapes(c, model) if params is None else params
    trainable, frozen = split(c, params)
    state = jax.eval_shape(functools.partial(step.init_state, optimizer=optimizer), trainable)
    shardings = None
    if layout is not None:
        placed = layout.trainable(trainable, params)
        moments = layout.moments(optimizer, state.opt_state, placed)
        shardings = step.State(layout.replicated, placed, moments)
        state = _placed(state, shardings)
        frozen = _placed(frozen, layout.weights(frozen))
    policy = policies(c, backend)[0]
    make = functools.partial(_loss, c, model, layout, backend, length, policy)
    # Not the key of `lora.init`.
    dropout_key = jax.random.fold_in(jax.random.key(c.seed), 1) if c.lora.dropout else None
    loss = make(router_loss=c.router_loss)
    how: Any = {
        "accumulate": c.batch_size // micro_batch,
        "dropout_key": dropout_key,
        "shardings": shardings,
    }
    return Program(
        layout=layout,
        optimizer=optimizer,
        measure=step.measured(loss, **how),
        train_step=step.train_step(loss, optimizer, **how),
        eval_step=step.eval_step(make(), layout),
        state=state,
        frozen=frozen,
        batch_size=c.batch_size,
        micro_batch=micro_batch,
        eval_batch=eval_batch,
        length=length,
    )


def policies(c: config_dict.ConfigDict, backend: str) -> tuple[str, ...]:
    """What to try for `remat`, the least recomputation first: the first that fits the device is right."""
    if c.remat != "auto":
        return (c.remat,)
    return ("none",) if backend == "cpu" else AUTO


def _placed(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )


def shapes(c: config_dict.ConfigDict, model: architecture.Config) -> decoder.Params:
    """The parameters' shapes, in the dtype that they are stored in."""
    dtype = stored_dtype(c)
    dense = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype)), decoder.shapes(model)
    )
    return quantizing.shapes(dense, quantisation(c))


def quantisation(c: config_dict.ConfigDict) -> quantizing.Settings:
    """What `model.quantize*` says."""
    return quantizing.Settings(c.model.quantize, c.model.quantize_embeddings)


def check_quantisation(c: config_dict.ConfigDict) -> None:
    """Raises UserError for a kind that there is not, or where there is no adapter to train."""
    settings = quantisation(c)
    settings.check()
    if settings and not c.lora.rank:
        key = next(key for key in quantizing.KEYS if c.model[key] != quantizing.NONE)
        raise errors.UserError(
            f"model.{key}={c.model[key]} keeps the base frozen: it needs an adapter (lora.rank above 0)"
        )


def stored_dtype(c: config_dict.ConfigDict) -> str:
    """Weights that train are float32 whatever the computation's dtype; see step.full_loss."""
    return c.model.dtype if c.lora.rank else "float32"


def adapter_spec(c: config_dict.ConfigDict) -> lora.Spec:
    """What `lora.*` says."""
    keys = ("rank", "alpha", "targets", "exclude", "dropout", "use_rslora", "use_dora")
    return lora.Spec(**{k: c.lora[k] for k in keys}, layouts=architecture.LAYOUTS)


def init_adapters(c: config_dict.ConfigDict, params: Any) -> lora.Adapters:
    """Fresh adapters, on the devices of what they adapt."""
    return lora.init(adapter_spec(c), params, key=jax.random.key(c.seed))


def split(c: config_dict.ConfigDict, params: Any) -> tuple[Any, Any]:
    """Shapes of the trainable and of the frozen tree."""
    if not c.lora.rank:
        return params, {}
    return jax.eval_shape(functools.partial(init_adapters, c), params), params


def _loss(
    c: config_dict.ConfigDict,
    model: architecture.Config,
    layout: sharding.Layout | None,
    backend: str,
    length: int,
    policy: str,
    *,
    router_loss: float = 0.0,
) -> step.Loss:
    context = 1 if layout is None else layout.size("context")
    how = decoder.Execution(
        remat=policy,
        attention=attention.choose(backend, model, length, c.model.dtype, context=context),
        layout=layout,
    )
    chunk = losses.chunk_size(backend, model.vocab_size)
    if c.lora.rank:
        mode = c.lora.mode
        if mode == "auto":
            mode = "merged" if backend == "cpu" else "factored"
        return step.lora_loss(model, how=how, mode=mode, router_loss=router_loss, chunk=chunk)
    einsum = matmul.for_training(backend)
    how = dataclasses.replace(how, dtype=jnp.dtype(c.model.dtype), einsum=einsum)
    return step.full_loss(model, how=how, router_loss=router_loss, chunk=chunk)


def check(
    c: config_dict.ConfigDict,
    model: architecture.Config,
    layout: sharding.Layout | None,
    length: int,
) -> None:
    """Raises UserError for settings that don't fit each other, the model or the mesh."""
    if c.remat not in ("auto", *remat.POLICIES):
        raise errors.UserError(f"remat={c.remat!r}: auto, or one of {', '.join(remat.POLICIES)}")
    check_quantisation(c)
    if c.router_loss < 0 or (c.router_loss and not model.experts):
        raise errors.UserError(
            f"router_loss={c.router_loss}: 0 or more, and 0 for a model without experts"
        )
    if not c.lora.rank:
        _check_no_adapter(c)
    if layout is not None:
        _check_mesh(model, layout, length)


def _check_mesh(model: architecture.Config, layout: sharding.Layout, length: int) -> None:
    tensor, context, expert = (layout.size(axis) for axis in ("tensor", "context", "expert"))
    for name in ("num_heads", "num_kv_heads"):
        if getattr(model, name) % tensor:
            raise errors.UserError(
                f"mesh.tensor={tensor} does not divide {name}={getattr(model, name)}"
            )
    if length % context:
        raise errors.UserError(f"mesh.context={context} does not divide rows of {length} positions")
    count = model.experts.count if model.experts else 0
    if expert > 1 and (not count or count % expert):
        raise errors.UserError(f"mesh.expert={expert} does not divide the model's {count} experts")


def _check_no_adapter(c: config_dict.ConfigDict) -> None:
    """Raises UserError for what is asked of an adapter where every weight is trained."""
    base = configuration.base()
    keys = ("lora.exclude", "lora.dropout", "lora.use_rslora", "lora.use_dora")
    for key in (*keys, "optim.lora_plus_ratio"):
        room, name = key.split(".")
        if c[room][name] != base[room][name]:
            raise errors.UserError(f"{key}={c[room][name]} without an adapter (lora.rank=0)")


def choose_micro_batch(
    c: config_dict.ConfigDict, layout: sharding.Layout | None, backend: str, length: int
) -> int:
    """Rows of one forward pass over all devices; see the configuration's `micro_batch`."""
    asked, batch_size = c.micro_batch, c.batch_size
    if batch_size < 1:
        raise errors.UserError(f"batch_size={batch_size}: it must be 1 or more")
    devices = 1 if layout is None else layout.rows
    if layout is not None:
        layout.check_rows("batch_size", batch_size)
    if asked:
        if asked < 0 or batch_size % asked:
            raise errors.UserError(
                f"batch_size={batch_size} is not a multiple of micro_batch={asked}"
            )
        if layout is not None:
            layout.check_rows("micro_batch", asked)
        return asked
    if backend != "cpu":
        return batch_size
    most = max(1, CPU_TOKENS // length)
    each = batch_size // devices
    return devices * max(n for n in range(1, each + 1) if each % n == 0 and n <= most)
