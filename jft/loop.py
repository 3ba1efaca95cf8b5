# SPDX-License-Identifier: Apache-2.0
"""The one training loop, for LoRA and full fine-tuning, one process or many: read it from top to bottom.

Every process runs all of it, and all decide alike: what decisions depend on is the same number on each. The first
process alone writes files and prints.
"""

import contextlib
import dataclasses
import functools
import math
import pathlib
import sys
import time
from typing import Any

import jax
from ml_collections import config_dict

from jft import (
    checkpoints,
    claims,
    debugging,
    divergence,
    errors,
    hosts,
    jobs,
    journal,
    measure,
    runs,
    secrets,
    step,
    stopping,
    summary,
    tree,
)
from jft import config as configuration
from jft.checkpoints import schedule
from jft.data import load
from jft.stopping import Interrupted as Interrupted

# What processes ask of one another in a step, by urgency.
GO_ON, SAVE, STOP = range(3)


@dataclasses.dataclass
class Progress:
    """How far a run is.

    Attributes:
      state: after the last step.
      watch: over its loss.
      best: step and loss of the best validation; empty before the first.
      seconds: of training, also in earlier attempts.
    """

    state: step.State
    watch: divergence.Watch
    best: dict[str, Any] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0

    def record(self) -> dict[str, Any]:
        """All but the state, as JSON; `Progress.of` has it again."""
        return {"watch": self.watch.state(), "best": self.best, "seconds": self.seconds}

    @classmethod
    def of(cls, state: step.State, record: dict[str, Any], max_skipped: int) -> "Progress":
        watch = divergence.Watch.from_state(max_skipped, record["watch"])
        return cls(state, watch, record["best"], record["seconds"])


def train(
    config: config_dict.ConfigDict,
    *,
    fresh: bool = False,
    force: bool = False,
    profile: str = "",
    debug: bool = False,
) -> dict[str, Any]:
    """Runs, or resumes, the training that the configuration describes.

    Args:
      config: complete and valid, see `jft.config`.
      fresh: move an existing run out of the way instead of resuming it.
      force: go on with an existing run although settings, data or base are others.
      profile: steps to trace, "start:stop"; see `measure.Profile`.
      debug: stop at the first step that is not finite, and find the operation; see `debugging`.

    Returns:
      The summary: scores of base and tuned model, sizes, times, where everything lies.

    Raises:
      UserError: bad input, a loss that stays not finite, or what can't be written.
      Interrupted: by a signal; the state is saved.
    """
    configuration.check_complete(config, "config")
    flags = {"fresh": fresh, "force": force, "profile": profile, "debug": debug}
    hosts.agree("the command", {"config": config.to_dict(), **flags})
    folder = pathlib.Path(config.run_dir)
    claim = claims.Claim(folder, config, fresh=fresh, force=force)
    try:
        if hosts.any(hosts.lead() and (folder / "summary.json").exists()):
            return summary.read(folder)
        return _run(jobs.prepare(config, folder), force, profile, debug)
    finally:
        claim.release()


def _run(job: jobs.Job, force: bool, profile: str, debug: bool) -> dict[str, Any]:
    try:
        return _trained(job, force, profile, debug)
    except OSError as error:  # a full disk, say; what was saved is whole
        raise errors.UserError(
            f"{error.filename or job.folder}: {error.strerror or error}: the run had to stop; the same command goes"
            " on from its newest checkpoint"
        ) from error


def _trained(job: jobs.Job, force: bool, profile: str, debug: bool) -> dict[str, Any]:
    if hosts.lead():
        _announce(job)
    c = job.config.checkpoint
    saved = checkpoints.Checkpoints(c.folder or job.folder / "checkpoints", c.keep)
    with contextlib.ExitStack() as stack:
        stack.callback(saved.close)
        progress, history = _start(job, saved, force)
        if hosts.lead():
            runs.describe(job.folder, job.config, job.data.report, job.layout)
        begun = int(progress.state.step)
        log = journal.Journal(job, begun, history)
        stack.callback(log.close)
        # Of all processes alike the first one's trace tells enough.
        traced, place = profile if hosts.lead() else "", str(job.folder / "profile")
        trace = measure.Profile(traced, place, first=begun + 1, last=job.steps)
        stack.callback(trace.close)
        loop(job, progress, saved, log, trace, debug)
    save_result(job, progress.state.trainable, "last", job.steps, progress.best)
    _free(progress.state)  # what follows may load two more models
    hosts.barrier("the result is written")
    return summary.make(job, progress.best, progress.seconds, log.meter.summary(), progress.watch)


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


def _start(job: jobs.Job, saved: checkpoints.Checkpoints, force: bool) -> tuple[Progress, str]:
    """Where to begin, fresh or at the newest checkpoint, and the lines of metrics.jsonl before it."""
    limit = job.config.optim.max_skipped
    if not saved.steps:
        return Progress(job.first_state(), divergence.Watch(limit)), ""
    _free(job.trainable)  # the saved values come in their place
    found = saved.restore(job.program.state)
    assert found is not None
    state, record = found
    number = int(state.step)
    changed = _changes(job, record)
    if changed and not force:
        raise errors.UserError(
            f"{job.folder}: {'; '.join(changed)} since the checkpoint of step {number}: give --config.run_dir=NEW,"
            " --fresh to start again, or --force to go on with what is there now"
        )
    claims.record_forced(job.folder, number, changed)
    if hosts.lead():
        print(f"resuming after step {number} of {job.steps}", file=sys.stderr)
    return Progress.of(state, record["progress"], limit), record["metrics"]


def _changes(job: jobs.Job, record: dict[str, Any]) -> list[str]:
    """How the run differs from the one that made a checkpoint."""
    now = {"the base model": job.model.fingerprint, "data.train": job.data.report["fingerprint"]}
    before = {"the base model": record["base"], "data.train": record["data"]}
    changed = [
        f"{what} has fingerprint {now[what]}, had {before[what]}"
        for what in now
        if now[what] != before[what]
    ]
    return changed + claims.changes(job.config.to_dict(), record["settings"])


def _record(job: jobs.Job, progress: Progress, log: journal.Journal) -> dict[str, Any]:
    """What a checkpoint holds beside the state."""
    return {
        "progress": progress.record(),
        "base": job.model.fingerprint,
        "data": job.data.report["fingerprint"],
        "settings": secrets.redacted(job.config.to_dict()),
        "metrics": log.metrics.text,
    }


def _free(arrays: Any) -> None:
    """Frees the devices' memory now, whoever still holds the arrays."""
    for leaf in jax.tree.leaves(arrays):
        leaf.delete()


def loop(
    job: jobs.Job,
    progress: Progress,
    saved: checkpoints.Checkpoints,
    log: journal.Journal,
    trace: measure.Profile,
    debug: bool = False,
) -> None:
    """Trains to the last step, and keeps `progress` true.

    The device never waits: step n is dispatched before the metrics of step n - 1 are read; but with `debug`, where what a
    step began with must still be there when it is looked at.
    """
    c, start, before = job.config, int(progress.state.step), progress.seconds
    validate_every = c.validate.every_steps or max(1, math.ceil(job.steps / 4))
    saving = schedule.Schedule(c.checkpoint.every_steps, c.checkpoint.every_minutes)
    began, asked = time.perf_counter(), hosts.Flag()

    def settle() -> None:
        """Reads and reports the step that was dispatched last."""
        read = log.read()
        if read is None:
            return
        number, values = read
        log.step(number, values)
        examine = functools.partial(debugging.explain, job, progress.state, number)
        said = divergence.settle(
            progress.watch, job, number, values, lambda: saved.latest, examine if debug else None
        )
        for line in said:
            log.say(line)

    def validate(number: int) -> bool:
        """Whether this is the best validation so far."""
        settle()
        if not len(job.data.valid):
            return False
        with log.pause():
            value = job.mean_loss(job.data.valid, progress.state.trainable)
            log.validation(number, value)
            better = number > 0 and value < progress.best.get("loss", math.inf)
            if better:
                progress.best = {"step": number, "loss": value}
                save_result(job, progress.state.trainable, "best", number, progress.best)
        return better

    def save() -> None:
        settle()
        progress.seconds = before + time.perf_counter() - began
        with log.pause():
            saved.save(
                progress.state, _record(job, progress, log), best=progress.best.get("step", -1)
            )
        saving.saved()

    with stopping.Signals() as signals:
        # At the start too; and where a run was stopped, its last validation was left out.
        if (start % validate_every == 0 or start == job.steps) and not log.validated(start):
            validate(start)
        for number in range(start + 1, job.steps + 1):
            last = number == job.steps
            with log.meter.waiting():
                batch = job.batch(number - 1)
            with trace.step(number, progress.state):
                progress.state, values = job.program.train_step(progress.state, job.frozen, batch)
            settle()
            log.dispatched(number, values)
            if debug:
                settle()
            saved.poll()
            due = hosts.lead() and saving.overdue()
            level = asked.up(STOP if signals.received else SAVE if due else GO_ON)
            better = level < STOP and (number % validate_every == 0 or last) and validate(number)
            if better or last or level > GO_ON or saving.at(number):
                save()
            if level == STOP:
                raise Interrupted(
                    f"stopped after step {number} of {job.steps}; the same command goes on"
                )


def save_result(
    job: jobs.Job, trainable: Any, name: str, number: int, scores: dict[str, Any]
) -> None:
    """Writes the folder `name` of the run, with what jft.json says of it."""
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
