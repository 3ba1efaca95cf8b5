# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a run: the trainable tree, the optimizer's state and the step, by orbax; and a record, as JSON.

The frozen base is not copied: the record names it by its fingerprint. The data's position is the step, and so are the
keys of dropout. A checkpoint is complete or has no name; what it holds is checked when it is read back, and a damaged
one is moved aside and the one before it used.

Of several processes each writes what lies on its devices, into one folder that all see; every process makes the same
calls. The folder may be a bucket's (gs://...).
"""

import json
import logging
import os
import re
import shutil
import sys
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from jft import errors, hosts, step, tree
from jft.checkpoints import digests, sums
from jft.checkpoints.digests import Damaged as Damaged

Record = dict[str, Any]

# How the storage says that it can't be used now, which is no damage.
_AWAY = re.compile("PERMISSION_DENIED|UNAVAILABLE|DEADLINE_EXCEEDED|UNAUTHENTICATED|ABORTED")

# Seconds that a save may take. Orbax measures them by the date, so its own limit of 20 minutes falls when the clock is
# set; a process that is lost is noticed by `hosts`.
_NEVER = 10**8


class _Kept(ocp.checkpoint_managers.PreservationPolicy):
    """The newest n checkpoints stay, and the best one."""

    def __init__(self, newest: int):
        self.newest, self.best = newest, -1

    def should_preserve(self, checkpoints: Any, *, context: Any) -> list[bool]:
        first = len(checkpoints) - self.newest
        return [i >= first or c.step == self.best for i, c in enumerate(checkpoints)]


class Checkpoints:
    """The checkpoints in one folder; saving is asynchronous, at most one save at a time.

    Args:
      folder: is made.
      keep: that many of the newest stay, beside the best.
      read_only: change nothing, as where another process may be saving.

    Raises:
      UserError: the folder can't be used.
    """

    def __init__(self, folder: str | os.PathLike[str], keep: int = 1, *, read_only: bool = False):
        if keep < 1:
            raise errors.UserError(f"checkpoint.keep={keep}: it must be 1 or more")
        # Orbax logs an error with its stack, over pages, before it raises it.
        for name in ("absl", "asyncio"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        self.folder = epath.Path(folder)
        if "://" not in str(folder):
            self.folder = epath.Path(os.path.abspath(folder))
        self._kept, self._saving = _Kept(keep), -1
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self._kept,
            read_only=read_only,
            cleanup_tmp_directories=not read_only,  # of saves that were killed
            create=not read_only,
            async_options=ocp.AsyncOptions(
                timeout_secs=_NEVER, post_finalization_callback=self._list_files
            ),
        )
        try:
            self._manager = ocp.CheckpointManager(self.folder, options=options)
        except OSError as error:
            raise errors.UserError(
                f"{self.folder}: can't be used: {error.strerror or error}"
            ) from error

    @property
    def steps(self) -> list[int]:
        """Those of the complete checkpoints, in order."""
        return sorted(step for step in self._manager.all_steps() if step != self._saving)

    @property
    def latest(self) -> int | None:
        """The step of the newest checkpoint, the one under way included."""
        return self._manager.latest_step()

    def save(self, state: step.State, record: Record, *, best: int = -1) -> None:
        """Begins to save the state and its record under the state's step; waits for the save before it.

        Args:
          state: is copied before this returns.
          record: JSON. `step` and `arrays` are added.
          best: the step whose checkpoint stays, however old.

        Raises:
          UserError: this save or the one before it failed.
        """
        number = int(state.step)
        self.wait()
        if number in self._manager.all_steps():
            return
        self._kept.best = best
        record = record | {"step": number, "arrays": _described(state)}
        self._saving = number
        try:
            self._manager.save(
                number,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    record=ocp.args.JsonSave(digests.seal(record)),
                ),
            )
        except (OSError, ValueError) as error:
            raise self._failed(number, error) from error

    def poll(self) -> None:
        """Returns at once, or raises UserError where the save that was under way has failed."""
        if self._saving >= 0 and not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Waits for the save under way; raises UserError where it failed."""
        if self._saving < 0:
            return
        number = self._saving
        try:
            self._manager.wait_until_finished()
        except (OSError, ValueError) as error:
            raise self._failed(number, error) from error
        self._saving = -1

    def restore(self, like: step.State) -> tuple[step.State, Record] | None:
        """The newest sound checkpoint: its state, as `restore_step` gives it, and its record; None where none was made.

        Damaged ones are told and moved to damaged-STEP.

        Raises:
          UserError: all are damaged; the storage can't be read; or they are of a state with other arrays.
        """
        steps, damaged = self.steps[::-1], 0
        hosts.agree("the checkpoints", steps)
        for number, before in zip(steps, [*steps[1:], None], strict=True):
            try:
                return self.restore_step(number, like)
            except Damaged as error:
                self._move_aside(number, f"{error}", before)
                damaged += 1
        if damaged:
            raise errors.UserError(
                f"{self.folder}: all {damaged} checkpoints are damaged; they are in damaged-*, and --fresh"
                " starts again"
            )
        return None

    def restore_step(self, number: int, like: step.State) -> tuple[step.State, Record]:
        """The state of a step, with the shapes, dtypes and shardings of `like`, and its record, both checked.

        Whatever mesh and processes it was written by; without shardings it goes to the default device.

        Raises:
          Damaged: something is not as it was written.
          UserError: the storage can't be read, or the state has other arrays than `like`.
        """
        self._check_files(number)
        sealed = self._read(number, record=ocp.args.JsonRestore()).record
        record = digests.unseal(sealed)
        self._check_arrays(number, record["arrays"], like)
        # Where none is named orbax takes those that were saved, whose devices need not be here.
        alone = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        target = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or alone), like
        )
        state = self._read(number, state=ocp.args.StandardRestore(target)).state
        expected = {path: told for path, (_, _, told) in record["arrays"].items()}
        if wrong := sums.differing(state, expected):
            more = f" and {len(wrong) - 1} more arrays are" if len(wrong) > 1 else " is"
            raise Damaged(f"{wrong[0]}{more} not as saved")
        return state, record

    def _read(self, number: int, **what: Any) -> Any:
        try:
            return self._manager.restore(number, args=ocp.args.Composite(**what))
        except PermissionError as error:
            raise errors.UserError(f"{self.folder}/{number}: {error.strerror}") from error
        except Exception as error:  # of any kind: what parses the files did not expect them damaged
            reason = _line(error)
            if hosts.several() or _AWAY.search(reason):
                raise errors.UserError(
                    f"{self.folder}/{number}: can't be read: {reason}"
                ) from error
            raise Damaged(reason) from error

    def _check_files(self, number: int) -> None:
        """The first process reads them, and all raise what it finds."""
        fault = ""
        if hosts.lead():
            try:
                digests.check(self.folder / str(number))
            except Damaged as error:
                fault = str(error)
        if fault := hosts.said_by_lead(fault):
            raise Damaged(fault)

    def _check_arrays(self, number: int, saved: dict[str, Any], like: step.State) -> None:
        want = {path: [list(x.shape), str(x.dtype)] for path, x in tree.flatten(like).items()}
        found = {path: [shape, dtype] for path, (shape, dtype, _) in saved.items()}
        for path in sorted(want.keys() | found.keys()):
            if want.get(path) != found.get(path):
                raise errors.UserError(
                    f"{self.folder}/{number}: {path} is {_array(found.get(path))} there and"
                    f" {_array(want.get(path))} in this run: give --config.run_dir=NEW, or --fresh"
                )

    def _move_aside(self, number: int, fault: str, before: int | None) -> None:
        if hosts.lead():
            name = next(n for n in _names(f"damaged-{number}") if not (self.folder / n).exists())
            (self.folder / str(number)).rename(self.folder / name)
            instead = "none is left" if before is None else f"step {before} is used instead"
            print(
                f"checkpoint {number} is damaged ({fault}), and now in {self.folder / name}: {instead}",
                file=sys.stderr,
            )
        hosts.barrier(f"checkpoint {number} is moved")
        self._manager.reload()

    def _failed(self, number: int, error: Exception) -> errors.UserError:
        """What to say of a save that failed. The state on the devices is lost with the run; checkpoints are not."""
        self._saving = -1
        self._manager.reload()
        left = self._manager.latest_step()
        again = "from the beginning" if left is None else f"from step {left}"
        free = ""
        if "://" not in str(self.folder):
            free = f"; {shutil.disk_usage(self.folder).free:,} bytes are free"
        return errors.UserError(
            f"{self.folder}: the checkpoint of step {number} could not be saved ({_line(error)}{free});"
            f" the same command goes on {again}"
        )

    def _list_files(self) -> None:
        """Called by orbax on the first process when all files are written, before the folder gets its name."""
        number = str(self._saving)
        # On a bucket the folder has its name from the beginning, and a file at the end says that it is complete.
        (made,) = [
            path
            for path in self.folder.iterdir()
            if path.name == number or path.name.startswith(f"{number}.orbax")
        ]
        digests.write(made)

    def close(self) -> None:
        """Waits for the save under way."""
        self.wait()
        self._manager.close()


def _described(state: step.State) -> dict[str, Any]:
    found = sums.of(state)
    return {p: [list(x.shape), str(x.dtype), found[p]] for p, x in tree.flatten(state).items()}


def _array(described: Any) -> str:
    return "missing" if described is None else f"{described[1]} {tuple(described[0])}"


def _names(name: str) -> Any:
    yield name
    yield from (f"{name}.{n}" for n in range(1, 10**6))


def _line(error: Exception) -> str:
    """What went wrong, without the storage library's context, which goes over pages."""
    text = getattr(error, "strerror", None) or str(error).split("\n")[0] or type(error).__name__
    reasons = re.findall(r"(No space left on device|Read-only file system|Permission denied)", text)
    if reasons:
        return reasons[0]
    if isinstance(error, json.JSONDecodeError):
        return f"no JSON: {text}"
    return text if len(text) <= 160 else f"{text[:157]}..."
