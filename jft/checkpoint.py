# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a run: the trainable tree, the optimizer's state and the step, by orbax.

The frozen base is not copied: the run's configuration and fingerprint name it. The data's position is the step.
Of several processes each writes what lies on its devices, into one folder that all see; every process makes the same calls.
"""

import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp

from jft import errors, step


class Checkpoints:
    """The checkpoints of one run folder; saving is asynchronous, at most one save at a time."""

    def __init__(self, folder: str | pathlib.Path, keep: int):
        if keep < 1:
            raise errors.UserError(f"checkpoint.keep={keep}: it must be 1 or more")
        options = ocp.CheckpointManagerOptions(max_to_keep=keep)
        self.manager = ocp.CheckpointManager(pathlib.Path(folder).absolute(), options=options)

    @property
    def latest(self) -> int | None:
        """The step of the newest complete checkpoint."""
        return self.manager.latest_step()

    def save(self, state: step.State, extra: dict[str, Any]) -> None:
        """Saves the state and some JSON (best score so far, say) under the state's step."""
        number = int(state.step)
        if number == self.latest:
            return
        self.manager.save(
            number,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), extra=ocp.args.JsonSave(extra)
            ),
        )

    def restore(self, like: step.State) -> tuple[step.State, dict[str, Any]]:
        """The newest state, with the shapes, dtypes and shardings of `like`, and its JSON.

        Whatever mesh and processes it was written by; without shardings it goes to the default device.
        """
        # Where none is named orbax takes those that were saved, whose devices need not be here.
        alone = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        target = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or alone), like
        )
        restored = self.manager.restore(
            self.latest,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(target), extra=ocp.args.JsonRestore()
            ),
        )
        return restored.state, restored.extra

    def close(self) -> None:
        """Waits for the save under way."""
        self.manager.wait_until_finished()
        self.manager.close()
