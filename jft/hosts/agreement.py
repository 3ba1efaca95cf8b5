# SPDX-License-Identifier: Apache-2.0
"""What all processes say to one another once jax runs: small collectives over all devices."""

import functools
import hashlib
import json
from typing import Any

import numpy as np

from jft import errors


def several() -> bool:
    """Whether this is one of several processes. Does not start the devices, as `jax.process_count()` would."""
    import jax

    return jax.distributed.is_initialized()  # `hosts.start` does it for several only


def barrier(name: str) -> None:
    """Returns when all processes are here."""
    if several():
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def any(flag: bool) -> bool:
    """Whether the flag is up on some process. Waits for all; in the training loop, `Flag` does not."""
    return bool(_highest(flag)) if several() else flag


class Flag:
    """A flag, or a level, that goes up on one process and is then up on all, at the same step, without waiting for it."""

    def __init__(self) -> None:
        self._asked: Any = None

    def up(self, here: int) -> int:
        """Sends `here`, and returns the highest that was sent one call before; call it once in every step.

        The answer was asked for one step ago, so that after that step's metrics were read it is there.
        """
        if not several():
            return here
        before, self._asked = self._asked, _highest(here)
        return 0 if before is None else int(before)


def said_by_lead(text: str) -> str:
    """The first process's text, on all; each calls it with its own."""
    return texts(text)[0] if several() else text


def _highest(flag: int) -> Any:
    """The largest of all processes' flags, as an array that the devices are still working out."""
    import jax

    sharding, largest = _over_all_devices()
    mine = np.full(jax.local_device_count(), flag, np.int32)
    return largest(jax.make_array_from_process_local_data(sharding, mine))


@functools.cache
def _over_all_devices() -> tuple[Any, Any]:
    """A value for each device, and what makes their largest known to all."""
    import jax
    from jax.sharding import Mesh, NamedSharding
    from jax.sharding import PartitionSpec as P

    mesh = Mesh(np.asarray(jax.devices()), ("devices",))
    largest = jax.jit(lambda x: x.max(), out_shardings=NamedSharding(mesh, P()))
    return NamedSharding(mesh, P("devices")), largest


def agree(what: str, value: Any) -> None:
    """Checks that all processes hold the same value: text, numbers, or a mapping of them.

    Raises:
      UserError: on every process; it names the first process that differs from process 0, and in what.
    """
    if not several():
        return
    text = json.dumps(value, sort_keys=True, default=str)
    mark = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
    marks = gather(mark)
    differing = [i for i in range(len(marks)) if (marks[i] != marks[0]).any()]
    if not differing:
        return
    said = texts(text)
    first, other = json.loads(said[0]), json.loads(said[differing[0]])
    raise errors.UserError(
        f"{what} differs between processes: {_difference(first, other, differing[0])}; the same command, files and"
        " versions are needed on all hosts"
    )


def _difference(first: Any, other: Any, process: int) -> str:
    if isinstance(first, dict) and isinstance(other, dict):
        for key in sorted(first.keys() | other.keys()):
            if first.get(key) != other.get(key):
                return f"{key}, {_difference(first.get(key), other.get(key), process)}"
    return f"process 0 has {_short(first)}, process {process} has {_short(other)}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def gather(row: np.ndarray) -> np.ndarray:
    """Every process's row, [processes, ...]."""
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(row))


def texts(text: str) -> list[str]:
    """Every process's text."""
    data = text.encode()
    sizes = gather(np.asarray([len(data)], np.int32))[:, 0]
    padded = np.zeros(max(int(sizes.max()), 1), np.uint8)
    padded[: len(data)] = np.frombuffer(data, np.uint8)
    return [bytes(row[:size]).decode() for row, size in zip(gather(padded), sizes, strict=True)]
