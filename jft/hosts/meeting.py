# SPDX-License-Identifier: Apache-2.0
"""A meeting of all processes before jax starts.

jax's own start ends a process by abort, with a stack trace, when the coordinator can't be reached, a process is missing
or the counts differ. So where the place of process 0 is known, the processes meet there first, over the port that jax
then takes: what is wrong is told in one line, by every process.
"""

import dataclasses
import json
import socket
import time
from collections.abc import Mapping
from typing import Any

from jft import errors


class Unreachable(errors.UserError):
    """Another process is not there (any more): nothing to mend here, the same command goes on later."""


@dataclasses.dataclass(frozen=True)
class Place:
    """This process among all, and where process 0 listens."""

    coordinator: str  # HOST:PORT
    processes: int
    process: int

    def __post_init__(self) -> None:
        host, _, port = self.coordinator.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise errors.UserError(f"--coordinator={self.coordinator}: HOST:PORT is wanted")
        if self.processes < 1 or not 0 <= self.process < self.processes:
            raise errors.UserError(
                f"--process={self.process} with --processes={self.processes}: it must be"
                f" 0 to {max(self.processes, 1) - 1}"
            )

    @property
    def host(self) -> str:
        return self.coordinator.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        return int(self.coordinator.rpartition(":")[2])


def meet(here: Place, versions: str, timeout: float) -> None:
    """Returns when all processes have said the same count and versions, each with a number of its own.

    Raises:
      UserError: they differ.
      Unreachable: not all came in time.
    """
    hello = {
        "process": here.process,
        "processes": here.processes,
        "versions": versions,
        "host": socket.gethostname(),
    }
    until = time.monotonic() + timeout
    if here.process:
        _join(here, hello, until, timeout)
    else:
        _receive(here, hello, until, timeout)


def _join(here: Place, hello: dict[str, Any], until: float, timeout: float) -> None:
    why: Exception | str = "no time"
    while (left := until - time.monotonic()) > 0:
        try:
            with socket.create_connection((here.host, here.port), min(left, 10)) as peer:
                peer.sendall(json.dumps(hello).encode() + b"\n")
                # Process 0 may find out at its own deadline only; it says who is missing.
                peer.settimeout(left + 10)
                answer = _line(peer)
        except (
            OSError
        ) as error:  # not there yet, a name that is not known yet, or ended before its answer
            why = error.strerror or error
            time.sleep(min(0.2, left))
            continue
        if answer is None:
            why = "it ended, or another program listens there"
            time.sleep(min(0.2, left))
        elif answer["ok"]:
            return
        else:
            raise (Unreachable if answer["again"] else errors.UserError)(answer["fault"])
    raise Unreachable(
        f"process {here.process} of {here.processes}: process 0 was not reached at {here.coordinator} within"
        f" {timeout:.0f} s ({why}): was it started with the same --coordinator, and is the port open between the hosts?"
    )


def _receive(here: Place, hello: dict[str, Any], until: float, timeout: float) -> None:
    present, peers, fault, again = {0: hello}, [], "", False
    try:
        server = listen(here.port)
    except OSError as error:
        raise errors.UserError(
            f"process 0 can't listen on port {here.port} ({error.strerror}): is another run using it?"
            " Give all processes another port in --coordinator"
        ) from error
    with server:
        while len(present) < here.processes and not fault:
            server.settimeout(max(until - time.monotonic(), 0.001))
            try:
                peer, _ = server.accept()
            except TimeoutError:
                missing = [i for i in range(here.processes) if i not in present]
                fault, again = _missing(missing, here, timeout), True
                break
            peer.settimeout(10)
            said = _line(peer)
            if said is None or "processes" not in said:
                peer.close()  # a port scanner, say
                continue
            peers.append(peer)
            fault = difference(present, said)
            present[said["process"]] = said
    answer = json.dumps({"ok": not fault, "fault": fault, "again": again}).encode() + b"\n"
    for peer in peers:
        _answer(peer, answer)
    if fault:
        raise (Unreachable if again else errors.UserError)(fault)


def listen(port: int) -> socket.socket:
    """Listens on all addresses of this machine; port 0 = any free one."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def _answer(peer: socket.socket, answer: bytes) -> None:
    """Answers and waits for the other side to close, so that the port is not left in TIME_WAIT here."""
    with peer:
        try:
            peer.sendall(answer)
            peer.recv(1)
        except OSError:
            pass  # it has gone; jax's own start, or the next collective, will notice


def _line(peer: socket.socket) -> dict[str, Any] | None:
    """One line of JSON; None for anything else."""
    try:
        with peer.makefile("rb") as lines:
            said = json.loads(lines.readline(65536))
    except (ValueError, TimeoutError):
        return None
    return said if isinstance(said, dict) else None


def difference(present: Mapping[int, Mapping[str, Any]], said: Mapping[str, Any]) -> str:
    """What is wrong with a newcomer, or ""."""
    first, who = present[0], f"process {said['process']} ({said['host']})"
    if said["processes"] != first["processes"]:
        return (
            f"{who} was started with --processes={said['processes']}, process 0 ({first['host']}) with"
            f" --processes={first['processes']}: give all the same"
        )
    if said["process"] in present:
        return (
            f"two processes say --process={said['process']} (on {present[said['process']]['host']} and on"
            f" {said['host']}): each needs its own, 0 to {first['processes'] - 1}"
        )
    if said["versions"] != first["versions"]:
        return f"{who} has {said['versions']}, process 0 ({first['host']}) has {first['versions']}: install the same"
    return ""


def _missing(missing: list[int], here: Place, timeout: float) -> str:
    shown = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
    return (
        f"{len(missing)} of {here.processes} processes ({shown}) did not come to {here.coordinator} within"
        f" {timeout:.0f} s: were they started with the same --coordinator, and is the port open between the hosts?"
    )
