# SPDX-License-Identifier: Apache-2.0
"""What tests/test_hosts.py runs in each process: `python hosts_script.py CASE [PATH]`."""

import os
import pathlib
import signal
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jft import errors, hosts


def fault(call: object, *arguments: object) -> str:
    try:
        call(*arguments)  # type: ignore[operator]
    except errors.UserError as error:
        return str(error)
    return "no fault"


def agreement() -> None:
    """Everything that processes tell one another, in one start."""
    me = jax.process_index()
    print("lead", hosts.lead(), "several", hosts.several(), len(jax.devices()))
    mesh = Mesh(np.asarray(jax.devices()), ("data",))
    mine = np.full((jax.local_device_count(), 3), me + 1.0, np.float32)
    x = jax.make_array_from_process_local_data(NamedSharding(mesh, P("data")), mine)
    total = jax.jit(jnp.sum, out_shardings=NamedSharding(mesh, P()))(x)
    print("sum", float(total))
    print("any", hosts.any(me == 1), hosts.any(False))
    flag = hosts.Flag()
    print("flag", [bool(flag.up(me == 1 and step == 2)) for step in range(1, 6)])
    hosts.agree("the seed", 7)
    print("agree:", fault(hosts.agree, "the seed", 7 + me))
    settings = {"optim": {"rate": 0.1 * (me + 1), "clip": 1.0}}
    print("agree:", fault(hosts.agree, "the configuration", settings))
    began = time.monotonic()
    time.sleep(0.5 * me)
    hosts.barrier("slow one")
    print("waited", time.monotonic() - began > 0.4)


def until_killed(path: pathlib.Path) -> None:
    """Steps with a collective each; on the first attempt process 1 kills itself at the third."""
    for step in range(1, 7):
        hosts.any(False)
        if step == 3 and jax.process_index() == 1 and not path.exists():
            path.touch()
            os.kill(os.getpid(), signal.SIGKILL)
    print("done")


def until_told() -> None:
    """Steps until a signal has reached one of the processes."""
    told: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: told.append(number))
    flag = hosts.Flag()
    for step in range(1, 2000):
        if step == 20 and jax.process_index() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        if flag.up(bool(told)):
            print("stopped after step", step)
            return
        time.sleep(0.005)


def main(case: str, *rest: str) -> None:
    with hosts.joined(timeout=float(os.environ.get("TEST_TIMEOUT", 60))):
        if case == "agreement":
            agreement()
        elif case == "until_killed":
            until_killed(pathlib.Path(rest[0]))
        elif case == "until_told":
            until_told()
        elif case == "one_fails" and jax.process_index() == 1:
            raise errors.UserError("train.jsonl: no such file")
        elif case == "one_fails":
            hosts.barrier("the other does not come")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except errors.UserError as told:  # as the `jft` command does
        sys.exit(f"jft: {told}")
