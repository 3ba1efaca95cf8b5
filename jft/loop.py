# SPDX-License-Identifier: Apache-2.0
"""The one training loop, for LoRA and full fine-tuning, one process or many: read it from top to bottom.

Every process runs all of it, and all decide alike: what decisions depend on is the same number on each. The first
process alone writes files and prints.
"""

import dataclasses
import functools
import math
import os
import pathlib
import signal
import sys
import time
from typing import Any

import jax
import tqdm
from ml_collections import config_dict

from jft import (
    checkpoint,
    debugging,
    divergence,
    errors,
    hosts,
    jobs,
    measure,
    runs,
    step,
    summary,
    tree,
)
from jft import config as configuration
from jft.data import load


class Interrupted(Exception):
    """Ctrl-C or SIGTERM: the state is saved, and the same command goes on from there."""


@dataclasses.dataclass
class Progress:
    """How far a run is.

    Attributes:
      state: after the last step.
      watch: over its loss.
      best: step and loss of the best validation; empty before the first.
      seconds: of training, also in earlier attempts.
      speed: of this attempt's median step, see `measure.Meter.summary`.
    """

    state: step.State
    watch: divergence.Watch
    best: dict[str, Any] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    speed: dict[str, float] = dataclasses.field(default_factory=dict)


def train(
    config: config_dict.ConfigDict, *, fresh: bool = False, profile: str = "", debug: bool = False
) -> dict[str, Any]:
    """Runs, or resumes, the training that the configuration describes.

    Args:
      config: complete and valid, see `jft.config`.
      fresh: move an existing run out of the way instead of resuming it.
      profile: steps to trace, "start:stop"; see `measure.Profile`.
      debug: stop at the first step that is not finite, and find the operation; see `debugging`.

    Returns:
      The summary: scores of base and tuned model, sizes, times, where everything lies.

    Raises:
      UserError: bad input, or a loss that stays not finite.
      Interrupted: by a signal; the state is saved.
    """
    configuration.check_complete(config, "config")
    flags = {"fresh": fresh, "profile": profile, "debug": debug}
    hosts.agree("the command", {"config": config.to_dict(), **flags})
    folder = pathlib.Path(config.run_dir)
    runs.claim(folder, config, fresh)
    if hosts.any(hosts.lead() and (folder / "summary.json").exists()):
        return summary.read(folder)
    job = jobs.prepare(config, folder)
    if hosts.lead():
        runs.describe(folder, config, job.data.report, job.layout)
        _announce(job)
    saved = checkpoint.Checkpoints(folder / "checkpoints", config.checkpoint.keep)
    progress = _start(job, saved)
    first = int(progress.state.step) + 1
    metrics = runs.Metrics(_lead_only(folder / "metrics.jsonl"), first - 1)
    # Of all processes alike the first one's trace tells enough.
    asked = profile if hosts.lead() else ""
    trace = measure.Profile(asked, str(folder / "profile"), first=first, last=job.steps)
    try:
        loop(job, progress, saved, metrics, trace, debug)
    finally:
        trace.close()
        saved.close()
        metrics.close()
    _save_result(job, progress.state.trainable, "last", job.steps, progress.best)
    _free(progress.state)  # what follows may load two more models
    hosts.barrier("the result is written")
    return summary.make(job, progress.best, progress.seconds, progress.speed, progress.watch)


def _lead_only(path: pathlib.Path) -> pathlib.Path:
    return path if hosts.lead() else pathlib.Path(os.devnull)


def _announce(job: jobs.Job) -> None:
    trained, total = tree.size(job.trainable), tree.size(job.model.params)
    print(
        f"{job.model.name}: {total:,} parameters, {trained:,} trained ({100 * trained / total:.2f} %)",
        *job.model.notes,
        *load.lines(job.data.report),
        f"{job.steps} steps of {job.config.batch_size} rows x {job.batches.length} tokens"
        f" ({100 * job.batches.padding:.0f} % padding), {job.program.micro_batch} rows at a time",
        *([] if job.layout is None else [_mesh(job)]),
        sep="\n",
        file=sys.stderr,
    )


def _mesh(job: jobs.Job) -> str:
    sizes = " x ".join(f"{name} {size}" for name, size in job.layout.mesh.shape.items() if size > 1)
    count, kind = jax.device_count(), jax.devices()[0].device_kind
    return f"{count} devices ({kind}) of {jax.process_count()} processes: {sizes}"


def _start(job: jobs.Job, saved: checkpoint.Checkpoints) -> Progress:
    """Where to begin: fresh, or at the newest checkpoint."""
    hosts.agree("the newest checkpoint", saved.latest)
    if saved.latest is None:
        return Progress(job.first_state(), divergence.Watch(job.config.optim.max_skipped))
    _free(job.trainable)  # the saved values come in their place
    state, extra = saved.restore(job.program.state)
    if extra["base"] != job.model.fingerprint or extra["data"] != job.data.report["fingerprint"]:
        raise errors.UserError(
            f"{job.folder}: the base model or the training data is not what its checkpoint was made"
            " with: give --config.run_dir=NEW, or --fresh"
        )
    if hosts.lead():
        print(f"resuming after step {int(state.step)} of {job.steps}", file=sys.stderr)
    watch = divergence.Watch.from_state(job.config.optim.max_skipped, extra["watch"])
    return Progress(state, watch, extra["best"], extra["seconds"])


def _free(arrays: Any) -> None:
    """Frees the devices' memory now, whoever still holds the arrays."""
    for leaf in jax.tree.leaves(arrays):
        leaf.delete()


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
    job: jobs.Job,
    progress: Progress,
    saved: checkpoint.Checkpoints,
    metrics: runs.Metrics,
    trace: measure.Profile,
    debug: bool = False,
) -> None:
    """Trains to the last step, and keeps `progress` true.

    The device never waits: step n is dispatched before the metrics of step n - 1 are read; but with `debug`, where what a
    step began with must still be there when it is looked at.
    """
    c, start, before = job.config, int(progress.state.step), progress.seconds
    validate_every = c.validate.every_steps or max(1, math.ceil(job.steps / 4))
    began, meter, stop = time.perf_counter(), job.meter(), hosts.Flag()
    pending: tuple[int, dict[str, jax.Array]] | None = None
    interactive, lead = sys.stderr.isatty(), hosts.lead()

    def settle() -> None:
        """Reads and reports the step that was dispatched last."""
        nonlocal pending
        if pending is None:
            return
        number, values = pending
        pending = None
        values = {k: float(v) for k, v in values.items()}
        measured = meter.step(int(values.pop("positions")))
        metrics.write(step=number, **divergence.record(**values), **measured)
        examine = functools.partial(debugging.explain, job, progress.state, number)
        said = divergence.settle(
            progress.watch, job, number, values, lambda: saved.latest, examine if debug else None
        )
        for line in said if lead else ():
            bar.write(line, file=sys.stderr)
        speed = f"{measured['tokens_per_second']:.0f} tokens/s"
        bar.set_postfix_str(f"loss {values['loss']:.3f}, {speed}", refresh=False)
        bar.update()

    def validate(number: int) -> None:
        settle()
        if not len(job.data.valid):
            return
        value = job.mean_loss(job.data.valid, progress.state.trainable)
        metrics.write(step=number, **divergence.record(valid_loss=value))
        if lead:
            bar.write(f"step {number}: validation loss {value:.4f}", file=sys.stderr)
        if number and value < progress.best.get("loss", math.inf):
            progress.best = {"step": number, "loss": value}
            _save_result(job, progress.state.trainable, "best", number, progress.best)
        meter.restart()

    def save() -> None:
        progress.seconds = before + time.perf_counter() - began
        extra = {
            "best": progress.best,
            "base": job.model.fingerprint,
            "data": job.data.report["fingerprint"],
            "seconds": progress.seconds,
            "watch": progress.watch.state(),
        }
        saved.save(progress.state, extra)
        meter.restart()

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
            disable=not lead,
        ) as bar,
    ):
        if start == 0:
            validate(0)
        for number in range(start + 1, job.steps + 1):
            with meter.waiting():
                batch = job.batch(number - 1)
            with trace.step(number, progress.state):
                progress.state, values = job.program.train_step(progress.state, job.frozen, batch)
            settle()
            pending = (number, values)
            if debug:
                settle()
            stopping = stop.up(signals.received is not None)
            if number % validate_every == 0 or number == job.steps:
                validate(number)
            every = c.checkpoint.every_steps
            if number == job.steps or (every and number % every == 0) or stopping:
                settle()
                save()
            if stopping and number < job.steps:
                raise Interrupted(
                    f"stopped after step {number} of {job.steps}; the same command goes on"
                )
    progress.speed = meter.summary()


def _save_result(
    job: jobs.Job, trainable: Any, name: str, number: int, scores: dict[str, Any]
) -> None:
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
