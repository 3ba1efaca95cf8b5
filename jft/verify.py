# SPDX-License-Identifier: Apache-2.0
"""Whether a run is sound: what lies in its folder is as it was written, and going on from there is what it would be.

Nothing in the run's folder is changed, and it may be training meanwhile.
"""

import dataclasses
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from jft import checkpoints, claims, errors, jobs, metrics, runs, step
from jft import config as configuration
from jft.checkpoints import digests, sums


@dataclasses.dataclass(frozen=True)
class Finding:
    """What was looked at; what is wrong with it, or "" and what was found."""

    what: str
    fault: str = ""
    note: str = ""


class Gone(Exception):
    """The run that trains meanwhile has replaced it."""


def verify(run_dir: str | pathlib.Path, steps: int = 2) -> list[Finding]:
    """Looks at everything.

    Args:
      run_dir: a run's folder.
      steps: to go on, before the stop and after it.

    Raises:
      UserError: it is no run's folder.
    """
    if steps < 1:
        raise errors.UserError(f"--steps={steps}: it must be 1 or more")
    folder = pathlib.Path(run_dir)
    config = _config(folder / "config.json")
    place = config.checkpoint.folder or folder / "checkpoints"
    saved = checkpoints.Checkpoints(place, read_only=True)
    try:
        return list(_look(folder, config, saved, steps))
    finally:
        saved.close()


def _config(path: pathlib.Path) -> Any:
    """The settings of the run; keys that are newer than it have their defaults."""
    config = configuration.base()
    try:
        config.update(runs.read_json(path)["resolved"])
    except (AttributeError, KeyError, TypeError) as error:
        raise errors.UserError(f"{path}: not as this jft writes it: {error}") from error
    return config


def _look(
    folder: pathlib.Path, config: Any, saved: checkpoints.Checkpoints, steps: int
) -> Iterator[Finding]:
    try:
        job = jobs.prepare(config, folder)
    except errors.UserError as error:
        yield Finding("base model and data", str(error))
        for number in saved.steps:
            yield _told(f"checkpoint {number}", lambda n=number: _files(saved, n))
        return
    like, sound, records = job.program.state, [], {}
    for number in saved.steps:

        def read(number: int = number) -> str:
            records[number] = _read(saved, number, like)
            return f"{len(records[number]['arrays'])} arrays are as they were saved"

        yield _told(f"checkpoint {number}", read)
        if number in records:
            sound.append(number)
    if not saved.steps:
        yield Finding("checkpoints", note="there is none yet")
    for name in claims.RESULTS:
        if (folder / name).exists():
            yield _told(f"{name}/", lambda name=name: _result(job, folder / name))
    if sound:
        try:
            yield from _goes_on(job, saved, sound, records, steps)
        except checkpoints.Damaged:  # it was sound a moment ago
            yield Finding("going on", note="its checkpoint has gone meanwhile: try again")


def _told(what: str, look: Callable[[], str]) -> Finding:
    try:
        return Finding(what, note=look())
    except Gone:
        return Finding(what, note="has gone meanwhile: the run is training, and keeps newer ones")
    except (checkpoints.Damaged, errors.UserError) as error:
        return Finding(what, fault=str(error))


def _files(saved: checkpoints.Checkpoints, number: int) -> str:
    digests.check(saved.folder / str(number))
    return "its files are as they were written; its arrays were not read"


def _read(saved: checkpoints.Checkpoints, number: int, like: step.State) -> dict[str, Any]:
    try:
        state, record = saved.restore_step(number, like)
    except checkpoints.Damaged as error:
        if (saved.folder / str(number)).exists():
            raise
        raise Gone from error
    for leaf in jax.tree.leaves(state):
        leaf.delete()
    return record


def _result(job: jobs.Job, folder: pathlib.Path) -> str:
    """Raises UserError for a result that is not as it was written, or can't be read."""
    while True:
        sidecar, found = runs.read_sidecar(folder), runs.file_digests(folder)
        if runs.read_sidecar(folder) == sidecar:  # not replaced meanwhile
            break
    for name, told in sidecar.files.items():
        if found.get(name) != told:
            fault = "is not as it was written" if name in found else "is missing"
            raise errors.UserError(f"{folder / name} {fault}")
    if sidecar.kind == "lora":
        job.load_adapter(folder)
    return f"of step {sidecar.step}: {len(sidecar.files)} files are as they were written"


def _goes_on(
    job: jobs.Job,
    saved: checkpoints.Checkpoints,
    sound: Sequence[int],
    records: dict[int, dict[str, Any]],
    steps: int,
) -> Iterator[Finding]:
    """From the newest checkpoint after which there are steps to do."""
    what = "going on"
    able = [number for number in sound if job.steps - number >= 2]
    if not able:
        yield Finding(what, note="not tried: no checkpoint has two steps of the run after it")
        return
    first = able[-1]
    part = min(steps, (job.steps - first) // 2)
    state, _ = saved.restore_step(first, job.program.state)
    straight, losses = _steps(job, state, 2 * part)
    state, _ = saved.restore_step(first, job.program.state)
    state, before = _steps(job, state, part)
    with tempfile.TemporaryDirectory(prefix="jft-verify-") as scratch:
        kept = checkpoints.Checkpoints(scratch)
        kept.save(state, records[first])
        kept.close()
        again = checkpoints.Checkpoints(scratch)
        found = again.restore(job.program.state)
        again.close()
    assert found is not None
    resumed, after = _steps(job, found[0], part)
    differing = sums.differing(resumed, sums.of(straight))
    told = f"steps {first + 1} to {first + 2 * part}, with a stop after {first + part}"
    if differing or before + after != losses:
        named = ", ".join(differing[:3]) or "the losses"
        yield Finding(what, f"{told}: {named} differ from those without a stop")
    else:
        yield Finding(what, note=f"{told}: equal to those without a stop, bit for bit")
    yield _as_recorded(job, first, losses)


def _steps(job: jobs.Job, state: step.State, count: int) -> tuple[step.State, list[float]]:
    begun, losses = int(state.step), []
    for number in range(begun, begun + count):
        state, values = job.program.train_step(state, job.frozen, job.batch(number))
        losses.append(float(values["loss"]))
    return state, losses


def _as_recorded(job: jobs.Job, first: int, losses: list[float]) -> Finding:
    """The run's own losses of these steps, which are the same on the same devices."""
    what = "metrics.jsonl"
    recorded = metrics.read(job.folder / what)
    known = {one["step"]: one["loss"] for one in recorded if "loss" in one}
    pairs = [(n, x, known[n]) for n, x in enumerate(losses, first + 1) if n in known]
    if not pairs:
        return Finding(what, note=f"has no step after {first}")
    there = runs.read_json(job.folder / "environment.json")
    here = runs.environment(job.layout)
    if any(here[key] != there[key] for key in ("devices", "processes", "mesh", "packages")):
        far = max(abs(x - y) for _, x, y in pairs)
        return Finding(
            what, note=f"was written on other devices or versions: losses within {far:.1e}"
        )
    for number, loss, before in pairs:
        if loss != before and not np.isnan(loss):
            return Finding(what, f"step {number} has loss {before}, and now gives {loss}")
    return Finding(what, note=f"the losses of steps {pairs[0][0]} to {pairs[-1][0]} come again")


def described(found: Sequence[Finding]) -> dict[str, Any]:
    """For --json."""
    return {
        "sound": not any(one.fault for one in found),
        "findings": [dataclasses.asdict(one) for one in found],
    }


def render(found: Sequence[Finding]) -> str:
    """For a person."""
    faults = sum(bool(one.fault) for one in found)
    lines = [
        f"{'WRONG' if one.fault else 'ok':<6} {one.what:<16} {one.fault or one.note}"
        for one in found
    ]
    return "\n".join([*lines, f"{faults} of {len(found)} are wrong" if faults else "all is sound"])
