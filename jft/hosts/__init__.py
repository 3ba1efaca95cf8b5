# SPDX-License-Identifier: Apache-2.0
"""Several processes that train together: how they start, agree, and end.

One process alone: everything here does nothing or answers at once. Which processes there are is told by flags
(--coordinator, --processes, --process), by the same in the environment (JFT_COORDINATOR, ...), or found by jax itself
(TPU pods, GKE, Slurm, Open MPI).
"""

import contextlib
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any

from jft import errors, secrets
from jft.hosts import clusters, meeting, watch
from jft.hosts.agreement import Flag as Flag
from jft.hosts.agreement import agree as agree
from jft.hosts.agreement import any as any
from jft.hosts.agreement import barrier as barrier
from jft.hosts.agreement import gather as gather
from jft.hosts.agreement import said_by_lead as said_by_lead
from jft.hosts.agreement import several as several
from jft.hosts.meeting import Unreachable as Unreachable

RETRY = (
    75  # exit code (EX_TEMPFAIL of sysexits.h): the same command goes on from the last checkpoint
)
TIMEOUT = 300.0  # seconds for all processes to start

# How errors of jax read when another process has gone: gloo's (CPU), NCCL's, and the coordination service's.
_LOST = re.compile(
    "gloo|nccl|connection (reset|closed)|heartbeat|coordination service", re.IGNORECASE
)


_watch = watch.Watch()


@contextlib.contextmanager
def joined(
    coordinator: str = "", processes: str = "", process: str = "", *, timeout: float = TIMEOUT
) -> Iterator[None]:
    """The time in which this process works together with the others; they start and end it together.

    A process of several that fails tells it to the others, and all end at once with the same exit code; so they do when
    one is lost. That goes past jax's own exit, which would wait five minutes for processes that wait for this one.
    """
    try:
        start(coordinator, processes, process, timeout=timeout)
    except meeting.Unreachable as error:
        print(f"jft: {secrets.redacted(str(error))}", file=sys.stderr)
        raise SystemExit(RETRY) from error
    try:
        yield
    except BaseException as error:
        if not several():
            raise
        _end_at_once(error)
    else:
        finish()


def start(
    coordinator: str = "", processes: str = "", process: str = "", *, timeout: float = TIMEOUT
) -> None:
    """Sets up jax.distributed where there are several processes; call it before anything asks jax for devices.

    Raises:
      UserError: flags that make no sense, or differ between processes.
      Unreachable: not all processes came in time.
    """
    import jax

    here = clusters.place(coordinator, processes, process, os.environ)
    arguments: dict[str, Any]
    if here is not None:
        if here.processes == 1:
            return
        meeting.meet(here, _versions(), timeout)
        arguments = {
            "coordinator_address": here.coordinator,
            "num_processes": here.processes,
            "process_id": here.process,
            "cluster_detection_method": "deactivate",
        }
    else:
        kind = clusters.detected(os.environ)
        if not kind:
            return
        arguments = {}
        if kind in ("Slurm", "Open MPI") and clusters.takes_all_devices(os.environ):
            # jax would give each process one GPU, and the rest would idle.
            arguments["local_device_ids"] = []
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # jax's preemption service swallows SIGTERM: a process that is still loading could not be ended. The training loop
    # catches signals itself, and tells them to all by `Flag`.
    jax.config.update("jax_enable_preemption_service", False)
    _initialize(arguments, timeout)
    _watch.open(jax.process_index(), jax.process_count())


def _initialize(arguments: dict[str, Any], timeout: float) -> None:
    """jax.distributed.initialize; where it would abort at its deadline, ends with one line instead."""
    import jax

    def late() -> None:
        print(
            f"jft: not all processes came together within {timeout:.0f} s: look at the others' output, and whether"
            " process 0 can be reached from all hosts",
            file=sys.stderr,
            flush=True,
        )
        os._exit(RETRY)

    timer = threading.Timer(timeout, late)
    timer.daemon = True
    timer.start()
    try:
        # jax aborts the process some time after its deadline; ours comes first.
        jax.distributed.initialize(**arguments, initialization_timeout=int(timeout) + 60)
    except (ValueError, RuntimeError, OSError) as error:
        text = str(error).split("\n")[0]
        raise errors.UserError(
            f"the other processes of this run were not found ({text}): give --coordinator=HOST:PORT,"
            " --processes=N and --process=I"
        ) from error
    finally:
        timer.cancel()


def _versions() -> str:
    import jax

    import jft

    return f"jft {jft.__version__} with jax {jax.__version__}"


def lead() -> bool:
    """Whether this process writes the logs and the files that are written once.

    jax's own number decides: on TPU it can differ from the one that was given at the start.
    """
    import jax

    return jax.process_index() == 0


def finish() -> None:
    """Ends the work together: waits for all, however long one still works, and closes the connections."""
    if several():
        import jax

        barrier("finish")
        _watch.close()
        jax.distributed.shutdown()


def _exit_code(error: BaseException) -> int:
    """What a process ends with: 2 for bad input, RETRY where another process has gone, 130 for Ctrl-C, else 1."""
    import jax

    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    if isinstance(error, meeting.Unreachable):
        return RETRY
    if isinstance(error, errors.UserError):
        return 2
    if isinstance(error, KeyboardInterrupt):
        return 130
    return (
        RETRY if isinstance(error, jax.errors.JaxRuntimeError) and _LOST.search(str(error)) else 1
    )


def _end_at_once(error: BaseException) -> None:
    code = _exit_code(error)
    if code == RETRY:
        time.sleep(2)  # the watch is about to end this process, and knows which other one has gone
    said = str(error).split(chr(10))[0] or type(error).__name__
    fault = secrets.redacted(f"{_watch.who}: {said}")
    if code == 1:
        traceback.print_exception(error)
    print(f"jft: {fault}", file=sys.stderr)
    _watch.tell(code, fault)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def end_now(code: int, why: str) -> None:
    """Ends this process, and the others with it, whatever it is waiting for; any thread may call it."""
    _watch.tell(code, f"{_watch.who}: {why}")
    os.write(2, f"jft: {why}\n".encode())
    os._exit(code)
