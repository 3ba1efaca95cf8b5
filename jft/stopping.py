# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C and SIGTERM: the first one asks the run to stop after its step, the second one ends it at once."""

import os
import signal
import socket
import threading
from typing import Any

from jft import hosts

INTERRUPTED = 130  # exit code: what shells report for a program that Ctrl-C ended


class Interrupted(Exception):
    """Ctrl-C or SIGTERM: the state is saved, and the same command goes on from there."""


class Signals:
    """Remembers the first signal, in `received`.

    Python runs handlers between the main thread's instructions, which may wait for the device for minutes. So a second
    signal is seen by a thread of its own, which is told by the interpreter's signal handler through a socket.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __enter__(self) -> "Signals":
        self.received: int | None = None
        self._before: dict[int, Any] = {}
        if threading.current_thread() is not threading.main_thread():
            return self  # signals are the main thread's; who runs us elsewhere takes care of them
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._watch, daemon=True).start()
        self._before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def _note(self, number: int, _: Any) -> None:
        self.received = number

    def _watch(self) -> None:
        seen = 0
        while numbers := self._reader.recv(64):
            for number in numbers:
                if number not in self.SIGNALS:
                    continue
                seen += 1
                if seen == 1:
                    _say("\nfinishing this step and saving; once more to stop at once")
                else:
                    hosts.end_now(INTERRUPTED, "stopped at once")
        self._reader.close()

    def __exit__(self, *_: object) -> None:
        if not self._before:
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._fd)
        self._writer.close()  # ends the thread


def _say(text: str) -> None:
    # Not by print: its lock may be held by the thread that is being interrupted.
    os.write(2, f"{text}\n".encode())
