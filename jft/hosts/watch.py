# SPDX-License-Identifier: Apache-2.0
"""The end of one process is the end of all, at once and with its cause.

jax notices a lost process when it has missed its heartbeats for 100 s, then aborts the others with a stack trace; until
then they hang in the collective that the lost one does not join. So each process holds a connection to process 0, which
the operating system closes when a process ends, however it ends; process 0 passes on what it hears.
"""

import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from jft.hosts import agreement, meeting

# Exit code (EX_TEMPFAIL of sysexits.h): the same command goes on from the last checkpoint.
RETRY = 75
OPENING = 10.0  # seconds to connect; where a firewall prevents it, jax's heartbeats remain

Messages = Iterator[dict[str, Any]]


class Watch:
    """The connections of one process; each message is a line of JSON."""

    def __init__(self) -> None:
        self._peers: list[socket.socket] = []
        self._lock = threading.Lock()
        self.who = _who(None)

    def open(self, process: int, processes: int) -> None:
        """Connects all processes with process 0; every process calls it."""
        self.who = _who(process)
        server = meeting.listen(0) if process == 0 else None
        offer = {"hosts": _names(), "token": secrets.token_hex(8)}
        if server is not None:
            offer["port"] = server.getsockname()[1]
        offer = json.loads(agreement.texts(json.dumps(offer))[0])
        if server is not None:
            with server:
                self._accept(server, processes, offer["token"])
        elif peer := _connect(offer):
            _send(peer, {"token": offer["token"], "who": self.who})
            peer.settimeout(OPENING + 5)
            lines = _lines(peer)
            if next(lines, {}).get("open"):
                self._follow(peer, lines, f"process 0 on {offer['hosts'][0]}")

    def _accept(self, server: socket.socket, processes: int, token: str) -> None:
        until, found = time.monotonic() + OPENING, []
        while len(found) < processes - 1 and (left := until - time.monotonic()) > 0:
            server.settimeout(left)
            try:
                peer, _ = server.accept()
            except TimeoutError:
                break
            peer.settimeout(5)
            lines = _lines(peer)
            said = next(lines, {})
            if said.get("token") == token:
                found.append((peer, lines, said["who"]))
        # None goes on before all are followed: a fault could pass by one that is not.
        for peer, lines, who in found:
            self._follow(peer, lines, who)
        for peer in self._peers:
            _send(peer, {"open": True})
        if away := processes - 1 - len(found):
            print(
                f"jft: {away} of {processes} processes can't connect to process 0 (a firewall?): if one is lost, the"
                " others end after 100 s only",
                file=sys.stderr,
            )

    def _follow(self, peer: socket.socket, lines: Messages, who: str) -> None:
        peer.settimeout(None)
        self._peers.append(peer)
        threading.Thread(target=self._listen, args=(lines, who), daemon=True).start()

    def _listen(self, lines: Messages, who: str) -> None:
        for said in lines:
            if not said.get("bye"):
                self._end(said["code"], said["fault"])
            return
        self._end(RETRY, f"{who} has gone without a word (killed, or its machine is lost)")

    def _end(self, code: int, fault: str) -> None:
        """Ends this process for another's fault; process 0 tells it to the rest."""
        with self._lock:
            self.tell(code, fault)
            again = "; the same command goes on from the last checkpoint" if code == RETRY else ""
            print(f"jft: {fault}{again}", file=sys.stderr, flush=True)
            os._exit(code)

    def tell(self, code: int, fault: str) -> None:
        """Tells the others that this process ends, and why; they end with the same code."""
        for peer in self._peers:
            _send(peer, {"code": code, "fault": fault})

    def close(self) -> None:
        """Says goodbye: from now on the end of this process is as it should be."""
        for peer in self._peers:
            _send(peer, {"bye": True})


def _who(process: int | None) -> str:
    return f"{'a process' if process is None else f'process {process}'} on {socket.gethostname()}"


def _names() -> list[str]:
    """What other machines may reach this one by, its name first."""
    names = [socket.gethostname()]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as outward:
        try:
            outward.connect(("10.255.255.255", 1))  # sends nothing: which address would be used?
            names.append(outward.getsockname()[0])
        except OSError:
            pass
    return names


def _connect(offer: dict[str, Any]) -> socket.socket | None:
    names = offer["hosts"]
    if names[0] == socket.gethostname():
        names = ["localhost", *names]
    for name in names:
        try:
            peer = socket.create_connection((name, offer["port"]), OPENING / len(names))
        except OSError:
            continue
        peer.settimeout(None)
        return peer
    return None


def _lines(peer: socket.socket) -> Messages:
    """The peer's messages, to the end of the connection."""
    try:
        with peer.makefile("rb") as lines:
            for line in lines:
                yield json.loads(line)
    except (OSError, ValueError):
        return


def _send(peer: socket.socket, message: dict[str, Any]) -> None:
    try:
        peer.sendall(json.dumps(message).encode() + b"\n")
    except OSError:
        pass  # it has ended already
