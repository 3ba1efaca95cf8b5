# SPDX-License-Identifier: Apache-2.0
"""The one training loop, for LoRA and full fine-tuning: read it from top to bottom."""

import dataclasses
import functools
import math
import pathlib
import signal
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import tqdm
from ml_collections import config_dict

from jft import checkpoint, errors, lora, models, program, runs, sharding, step, summary, tree
from jft import config as configuration
from jft.data import batches, load
from jft.data import rows as rows_of


class Interrupted(Exception):
    """Ctrl-C or SIGTERM: the state is saved, and the same command goes on from there."""


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
        rows, (host, hosts) = self.config.batch_size, self.layout.host_rows(self.config.batch_size)
        return self.layout.put(own, host * rows // hosts, rows)

    def mean_loss(self, rows: rows_of.Rows, trainable: Any) -> float:
        """Nats per trained token over all rows, each exactly once."""
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


def train(config: config_dict.ConfigDict, *, fresh: bool = False) -> dict[str, Any]:
    """Runs, or resumes, the training that the configuration describes.

    Args:
      config: complete and valid, see `jft.config`.
      fresh: move an existing run out of the way instead of resuming it.

    Returns:
      The summary: scores of base and tuned model, sizes, times, where everything lies.

    Raises:
      UserError: bad input, or a loss that is not finite.
      Interrupted: by a signal; the state is saved.
    """
    configuration.check_complete(config, "config")
    folder = pathlib.Path(config.run_dir)
    _claim(folder, config, fresh)
    if (folder / "summary.json").exists():
        return summary.read(folder)
    job = prepare(config, folder)
    runs.write_json(folder / "config.json", _described(config))
    runs.write_json(folder / "environment.json", runs.environment())
    runs.write_json(folder / "data_report.json", job.data.report)
    _announce(job)
    saved = checkpoint.Checkpoints(folder / "checkpoints", config.checkpoint.keep)
    state, best, before = _start(job, saved)
    metrics = runs.Metrics(folder / "metrics.jsonl", int(state.step))
    try:
        state, best, seconds = loop(job, state, best, before, saved, metrics)
    finally:
        saved.close()
        metrics.close()
    _save_result(job, state.trainable, "last", int(state.step), best)
    return summary.make(job, state, best, seconds)


def prepare(config: config_dict.ConfigDict, folder: pathlib.Path) -> Job:
    """Loads the model and the data, and builds the step; nothing is written."""
    c = config
    models.check_dtype(c.model.dtype)
    layout = make_layout(c, jax.devices())
    model = models.load(
        c.model.path,
        dtype=program.stored_dtype(c),
        revision=c.model.revision or None,
        shardings=None if layout is None else layout.weight,
    )
    load.use_template(model.tokenizer, c.data.chat_template)
    source = load.Source(**{**c.data, "columns": dict(c.data.columns)})
    data = load.load(source, model.tokenizer, seed=c.seed, vocab_size=model.config.vocab_size)
    if source.max_length > model.config.max_length:
        raise errors.UserError(
            f"data.max_length={source.max_length}: the model has {model.config.max_length} positions"
        )
    host, hosts = (0, 1) if layout is None else layout.host_rows(c.batch_size)
    packed = batches.Batches(
        data.train,
        batch_size=c.batch_size,
        length=source.max_length,
        seed=c.seed,
        weights=source.times,
        packing=source.packing,
        host=host,
        hosts=hosts,
    )
    steps = c.steps or packed.total_steps(c.epochs)
    if steps < 1:
        raise errors.UserError(f"steps={c.steps}, epochs={c.epochs}: nothing to do")
    built = program.build(
        c,
        model.config,
        layout=layout,
        backend=jax.default_backend(),
        length=packed.length,
        steps=steps,
    )
    if c.lora.rank:
        trainable, frozen = program.init_adapters(c, model.params), model.params
        lora.peft.check_writable(trainable, model.module_names)
        if c.lora.dropout and "head/kernel" in trainable:
            raise errors.UserError(
                f"lora.dropout={c.lora.dropout} with an adapter of head/kernel: take it out of lora.targets"
            )
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


def make_layout(c: config_dict.ConfigDict, devices: Sequence[Any]) -> sharding.Layout | None:
    """Of the mesh that `mesh.*` asks for; None on one device."""
    sizes = sharding.Sizes(**c.mesh)
    if len(devices) == 1 and dataclasses.astuple(sizes.over(1)) == (1,) * len(sharding.AXES):
        return None
    return sharding.Layout(sharding.mesh(sizes, devices))


def _claim(folder: pathlib.Path, config: config_dict.ConfigDict, fresh: bool) -> None:
    """Makes the run's folder; an existing one must hold the same run, or moves aside."""
    if fresh and folder.exists():
        aside = next(
            p for n in range(1, 10**6) if not (p := folder.with_name(f"{folder.name}.{n}")).exists()
        )
        folder.rename(aside)
        print(f"the run that was in {folder} is now in {aside}", file=sys.stderr)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise errors.UserError(f"run_dir={folder}: {error.strerror}") from error
    described = folder / "config.json"
    if not described.exists():
        return
    before = runs.read_json(described)["resolved"]
    changed = {
        key: values
        for key, values in configuration.difference(config.to_dict(), before).items()
        if not key.startswith(configuration.NOT_MATHEMATICS)
    }
    if changed:
        told = "; ".join(f"{key} is {new!r}, was {old!r}" for key, (new, old) in changed.items())
        raise errors.UserError(
            f"{folder} holds a run with other settings ({told}): give --config.run_dir=NEW, or --fresh"
            " to start again there"
        )


def _described(config: config_dict.ConfigDict) -> dict[str, Any]:
    changes = configuration.difference(config, configuration.base())
    return {
        "resolved": config.to_dict(),
        "difference": {key: {"here": a, "base": b} for key, (a, b) in changes.items()},
    }


def _announce(job: Job) -> None:
    trained, total = tree.size(job.trainable), tree.size(job.model.params)
    print(
        f"{job.model.name}: {total:,} parameters, {trained:,} trained ({100 * trained / total:.2f} %)",
        *load.lines(job.data.report),
        f"{job.steps} steps of {job.config.batch_size} rows x {job.batches.length} tokens"
        f" ({100 * job.batches.padding:.0f} % padding), {job.program.micro_batch} rows at a time",
        sep="\n",
        file=sys.stderr,
    )


def _start(job: Job, saved: checkpoint.Checkpoints) -> tuple[step.State, dict[str, Any], float]:
    """The state to begin with, the best validation and the seconds so far: fresh, or the newest checkpoint's."""
    state = _fresh_state(job)
    if saved.latest is None:
        return state, {}, 0.0
    state, extra = saved.restore(state)
    if extra["base"] != job.model.fingerprint or extra["data"] != job.data.report["fingerprint"]:
        raise errors.UserError(
            f"{job.folder}: the base model or the training data is not what its checkpoint was made"
            " with: give --config.run_dir=NEW, or --fresh"
        )
    print(f"resuming after step {int(state.step)} of {job.steps}", file=sys.stderr)
    return state, extra["best"], extra["seconds"]


def _fresh_state(job: Job) -> step.State:
    if job.layout is None:
        return step.init_state(job.trainable, job.program.optimizer)
    placed = jax.tree.map(lambda x: x.sharding, job.program.state)
    make = functools.partial(step.init_state, optimizer=job.program.optimizer)
    return jax.jit(make, out_shardings=placed)(job.trainable)


class _Signals:
    """Remembers the first Ctrl-C or SIGTERM; the second one acts at once."""

    def __enter__(self) -> "_Signals":
        self.received: int | None = None
        self._before = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _note(self, number: int, _: Any) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = number
        print("\nfinishing this step and saving; once more to stop at once", file=sys.stderr)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def loop(
    job: Job,
    state: step.State,
    best: dict[str, Any],
    before: float,
    saved: checkpoint.Checkpoints,
    metrics: runs.Metrics,
) -> tuple[step.State, dict[str, Any], float]:
    """Trains to the last step. Returns the state, the best validation, and the seconds it took with those `before`.

    The device never waits: step n is dispatched before the metrics of step n - 1 are read.
    """
    c, start = job.config, int(state.step)
    validate_every = c.validate.every_steps or max(1, math.ceil(job.steps / 4))
    began = last = time.perf_counter()
    pending: tuple[int, dict[str, jax.Array]] | None = None
    interactive = sys.stderr.isatty()

    def settle() -> None:
        """Reads and reports the step that was dispatched last."""
        nonlocal pending, last
        if pending is None:
            return
        number, values = pending
        pending = None
        values = {k: float(v) for k, v in values.items()}
        now = time.perf_counter()
        speed, last = values.pop("positions") / (now - last), now
        if not math.isfinite(values["loss"]) or not math.isfinite(values["grad_norm"]):
            raise errors.UserError(
                f"step {number}: loss {values['loss']}, gradient norm {values['grad_norm']}: not finite;"
                " lower optim.learning_rate, or look at the data of that step"
            )
        metrics.write(step=number, **values, tokens_per_second=round(speed, 1))
        bar.set_postfix_str(f"loss {values['loss']:.3f}, {speed:.0f} tokens/s", refresh=False)
        bar.update()

    def validate(number: int) -> None:
        nonlocal best, last
        settle()
        if not len(job.data.valid):
            return
        value = job.mean_loss(job.data.valid, state.trainable)
        metrics.write(step=number, valid_loss=value)
        bar.write(f"step {number}: validation loss {value:.4f}", file=sys.stderr)
        if number and value < best.get("loss", math.inf):
            best = {"step": number, "loss": value}
            _save_result(job, state.trainable, "best", number, best)
        last = time.perf_counter()

    def save() -> None:
        extra = {
            "best": best,
            "base": job.model.fingerprint,
            "data": job.data.report["fingerprint"],
            "seconds": before + time.perf_counter() - began,
        }
        saved.save(state, extra)

    with (
        _Signals() as signals,
        tqdm.tqdm(
            total=job.steps,
            initial=start,
            unit="step",
            file=sys.stderr,
            mininterval=0.1 if interactive else 15,
            dynamic_ncols=interactive,
            smoothing=0.1,
        ) as bar,
    ):
        if start == 0:
            validate(0)
        for number in range(start + 1, job.steps + 1):
            batch = job.batch(number - 1)
            state, values = job.program.train_step(state, job.frozen, batch)
            settle()
            pending = (number, values)
            if number % validate_every == 0 or number == job.steps:
                validate(number)
            every = c.checkpoint.every_steps
            if number == job.steps or (every and number % every == 0) or signals.received:
                settle()
                save()
            if signals.received and number < job.steps:
                raise Interrupted(
                    f"stopped after step {number} of {job.steps}; the same command goes on"
                )
    return state, best, before + time.perf_counter() - began


def _save_result(job: Job, trainable: Any, name: str, number: int, scores: dict[str, Any]) -> None:
    c = job.config
    template, tokenizer = runs.tokenizer_hashes(job.model.tokenizer)
    sidecar = runs.Sidecar(
        kind="lora" if c.lora.rank else "full",
        base=c.model.path,
        revision=job.model.revision,
        dtype=c.model.dtype,
        fingerprint=job.model.fingerprint,
        system=c.data.system,
        chat_template=job.model.tokenizer.chat_template if c.data.chat_template else "",
        template_sha256=template,
        tokenizer_sha256=tokenizer,
        step=number,
        scores={k: v for k, v in scores.items() if k != "step"},
        training=c.to_dict(),
    )
    runs.save_result(job.folder / name, job.model, trainable, sidecar)
