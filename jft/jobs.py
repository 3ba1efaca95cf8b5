# SPDX-License-Identifier: Apache-2.0
"""A run made ready: model, data, batches and programs, on one device or on the mesh of all."""

import dataclasses
import functools
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import config_dict

from jft import errors, hosts, lora, measure, models, plan, program, sharding, step, transfer, tree
from jft.data import batches, load
from jft.data import rows as rows_of
from jft.models import architecture, decoder, families
from jft.plan import chips, fit


@dataclasses.dataclass(frozen=True)
class Job:
    """Everything that a run needs and that does not change while it runs."""

    config: config_dict.ConfigDict
    folder: pathlib.Path
    model: models.Model
    data: load.Data
    batches: batches.Batches
    steps: int
    trainable: Any  # as it is before step 1
    frozen: Any
    program: program.Program

    @property
    def layout(self) -> sharding.Layout | None:
        return self.program.layout

    def batch(self, step: int) -> batches.Batch:
        """The batch of a step, on its devices."""
        own = self.batches.batch(step)
        if self.layout is None:
            return own
        rows, (part, parts) = self.config.batch_size, self.layout.host_rows(self.config.batch_size)
        return self.layout.put(own, part * rows // parts, rows)

    def mean_loss(self, rows: rows_of.Rows, trainable: Any) -> float:
        """Nats per trained token over all rows, each exactly once; the same on every process."""
        size = self.program.eval_batch
        parts = batches.evaluation(
            rows,
            batch_size=size,
            length=self.config.data.max_length,
            packing=self.config.data.packing,
        )
        if self.layout is not None:
            parts = (self.layout.put(batch, 0, size) for batch in parts)
        sums = [self.program.eval_step(trainable, self.frozen, batch) for batch in parts]
        return sum(float(total) for total, _ in sums) / sum(float(weight) for _, weight in sums)

    def first_state(self) -> step.State:
        """The state before step 1; it holds `trainable` itself, which the first step is given to write to."""
        optimizer = self.program.optimizer
        if self.layout is None:
            return step.init_state(self.trainable, optimizer)
        placed = jax.tree.map(lambda x: x.sharding, self.program.state.opt_state)
        moments = jax.jit(optimizer.init, out_shardings=placed)(self.trainable)
        zero = transfer.to_devices(np.zeros((), np.int32), self.layout.replicated)
        return step.State(zero, self.trainable, moments)

    def load_adapter(self, folder: pathlib.Path) -> lora.Adapters:
        """An adapter of this run's base, where those that are trained lie."""
        found = self.model.load_adapter(folder)
        if self.layout is None:
            return found
        return transfer.to_devices(found, self.layout.trainable(found, self.frozen))

    @property
    def shardings(self) -> Any:
        """What `models.load` takes."""
        return _weights(self.layout)

    def meter(self) -> measure.Meter:
        """Of this run's steps; with utilisation where the device's peak is known in the computation's dtype."""
        chip = chips.of_kind(jax.devices()[0].device_kind)
        each = (4 if self.config.lora.rank else 6) * matmul_parameters(self.model.config)
        known = chip is not None and self.config.model.dtype == "bfloat16"
        return measure.Meter(
            jax.device_count(), flops_per_token=each, peak_flops=chip.flops if known else 0.0
        )


def matmul_parameters(model: architecture.Config) -> int:
    """Parameters that a token is multiplied with: neither a table that it looks up, nor experts it does not go to."""
    total = 0
    for path, leaf in tree.flatten(decoder.shapes(model)).items():
        if path == "embed/embedding" and not model.tie_embeddings or path.startswith("positions/"):
            continue
        chosen = model.experts if "/experts/" in path else None
        total += leaf.size * chosen.top_k // chosen.count if chosen else leaf.size
    return total


def prepare(config: config_dict.ConfigDict, folder: pathlib.Path) -> Job:
    """Reads the data, builds the programs and loads the model; nothing is written.

    The weights come last, for what else can be wrong is found sooner without them.

    Raises:
      UserError: something can't be used, or several processes do not have the same.
    """
    c = config
    models.check_dtype(c.model.dtype)
    program.check_quantisation(c)
    layout = make_layout(c, jax.devices())
    revision = c.model.revision or None
    tokenizer = models.load_tokenizer(c.model.path, revision)
    arch = plan.read_config(c.model.path, revision)
    load.use_template(tokenizer, c.data.chat_template)
    source = load.Source(**{**c.data, "columns": dict(c.data.columns)})
    if source.max_length > arch.max_length:
        raise errors.UserError(
            f"data.max_length={source.max_length}: the model has {arch.max_length} positions"
        )
    data = load.load(source, tokenizer, seed=c.seed, vocab_size=arch.vocab_size)
    packed = _batches(c, source, data, layout)
    steps = c.steps or packed.total_steps(c.epochs)
    if steps < 1:
        raise errors.UserError(f"steps={c.steps}, epochs={c.epochs}: nothing to do")
    # Before anything is computed together: programs that differ would wait for each other for ever.
    hosts.agree("the training data", data.report["fingerprint"])
    hosts.agree("the number of steps", steps)
    eval_length = _evaluation_width(c, source, data, layout, packed.length)
    devices = jax.devices() if layout is not None else jax.devices()[:1]
    stored = models.shapes(
        c.model.path,
        dtype=program.stored_dtype(c),
        revision=revision,
        quantize=program.quantisation(c),
    )
    built = _programs(c, arch, stored, devices, packed.length, eval_length, steps)
    model = models.load(
        c.model.path,
        dtype=program.stored_dtype(c),
        revision=revision,
        shardings=_weights(layout),
        quantize=program.quantisation(c),
    )
    hosts.agree("the base model", model.fingerprint)
    model = dataclasses.replace(model, tokenizer=tokenizer)
    if c.lora.rank:
        trainable, frozen = _adapters(c, model.params, built), model.params
    else:
        # A loaded array may be a view of numpy's memory, which a step that is given it can't write to: it would be
        # there twice (4.99 GB instead of 4.53 for SmolLM2-135M on a CPU).
        model = dataclasses.replace(model, params=jax.tree.map(jnp.copy, model.params))
        trainable, frozen = model.params, {}
    return Job(
        config=c,
        folder=folder,
        model=model,
        data=data,
        batches=packed,
        steps=steps,
        trainable=trainable,
        frozen=frozen,
        program=built,
    )


def _evaluation_width(
    c: config_dict.ConfigDict,
    source: load.Source,
    data: load.Data,
    layout: sharding.Layout | None,
    length: int,
) -> int:
    """Positions of the widest batch of the validation rows, or without them of the test rows; 0 without any."""
    rows = data.valid if len(data.valid) else data.test_rows
    if not len(rows):
        return 0
    size = c.eval_batch_size or program.choose_micro_batch(c, layout, jax.default_backend(), length)
    return batches.evaluation_width(
        rows, batch_size=size, length=source.max_length, packing=source.packing
    )


def _programs(
    c: config_dict.ConfigDict,
    model: architecture.Config,
    stored: decoder.Params,
    devices: Sequence[Any],
    length: int,
    eval_length: int,
    steps: int,
) -> program.Program:
    """The training and the evaluation step; no weights are there yet, so what does not fit can be refused here."""
    if c.lora.rank:
        adapters, _ = program.split(c, stored)
        lora.peft.check_writable(adapters, families.modules(model))
        if c.lora.dropout and "head/kernel" in adapters:
            raise errors.UserError(
                f"lora.dropout={c.lora.dropout} with an adapter of head/kernel: take it out of lora.targets"
            )
    return fit.check(
        c,
        model,
        devices,
        length=length,
        eval_length=eval_length,
        steps=steps,
        params=stored,
    )


def make_layout(c: config_dict.ConfigDict, devices: Sequence[Any]) -> sharding.Layout | None:
    """Of the mesh that `mesh.*` asks for; None on one device."""
    return sharding.layout(sharding.Sizes(**c.mesh), devices)


def _weights(layout: sharding.Layout | None) -> Any:
    return None if layout is None else layout.weight


def _batches(
    c: config_dict.ConfigDict, source: load.Source, data: load.Data, layout: sharding.Layout | None
) -> batches.Batches:
    """The training batches, of which this process makes its devices' rows."""
    part, parts = (0, 1) if layout is None else layout.host_rows(c.batch_size)
    return batches.Batches(
        data.train,
        batch_size=c.batch_size,
        length=source.max_length,
        seed=c.seed,
        weights=source.times,
        packing=source.packing,
        host=part,
        hosts=parts,
    )


def _adapters(c: config_dict.ConfigDict, params: Any, built: program.Program) -> lora.Adapters:
    """Fresh adapters, where their program wants them."""
    make = functools.partial(program.init_adapters, c)
    if built.layout is None:
        return make(params)
    placed = jax.tree.map(lambda x: x.sharding, built.state.trainable)
    return jax.jit(make, out_shardings=placed)(params)
