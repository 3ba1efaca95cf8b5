# SPDX-License-Identifier: Apache-2.0
"""One process at a time trains in a run's folder.

The holder has a lock of the operating system (flock) on a file there, which ends with the process, however it ends. On
file systems that know no such locks, or keep them on each machine for itself (mounted buckets), there is the file's
text: the holder writes a new one every few seconds, and who finds one that changes is not alone.
"""

import errno
import fcntl
import json
import os
import pathlib
import socket
import sys
import threading
import time

from jft import errors

FILE = ".lock"
# Seconds between two texts, and how many of them a newcomer watches: longer than the minute for which a mounted bucket
# may show what it showed before.
BEAT, WATCHED = 30.0, 3


class Lock:
    """Holds the folder until `release`, or until this process ends.

    Args:
      folder: exists.
      beat: seconds between two texts.

    Raises:
      UserError: another process holds it; it is named.
    """

    def __init__(self, folder: pathlib.Path, beat: float = BEAT):
        self._beat, self._count = beat, 0
        self._released = threading.Event()
        self._path = folder / FILE
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if not self._locked() or self._watched(folder):
                raise errors.UserError(
                    f"run_dir={folder}: {_who(self._text())} is training there; end it, or give --config.run_dir=NEW"
                )
        except BaseException:
            os.close(self._file)
            raise
        self._write()
        self._thread = threading.Thread(target=self._write_again, daemon=True)
        self._thread.start()

    def _locked(self) -> bool:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
        return True

    def _watched(self, folder: pathlib.Path) -> bool:
        """Whether the text of a process elsewhere still changes. One of this machine would have its lock."""
        before = self._text()
        if not before or _read(before).get("host") == socket.gethostname():
            return False
        seconds = WATCHED * self._beat
        print(
            f"{folder} was last held by {_who(before)}: waiting {seconds:.0f} s to see whether it still is",
            file=sys.stderr,
        )
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            time.sleep(self._beat / 10)
            if self._text() != before:
                return True
        return False

    def _text(self) -> bytes:
        return (
            self._path.read_bytes()
        )  # opened anew: an open file may show what it held when it was opened

    def _write(self) -> None:
        self._count += 1
        said = {"host": socket.gethostname(), "pid": os.getpid(), "count": self._count}
        text = json.dumps(said).encode()
        os.pwrite(self._file, text, 0)
        os.ftruncate(self._file, len(text))
        os.fsync(self._file)  # network file systems keep it to themselves until then

    def _write_again(self) -> None:
        while not self._released.wait(self._beat):
            try:
                self._write()
            except OSError:
                pass  # a full disk: the run itself will say so

    def release(self) -> None:
        """Lets the next one in at once. The file stays: to remove it would let two in."""
        self._released.set()
        self._thread.join()
        os.ftruncate(self._file, 0)
        os.close(self._file)


def _read(text: bytes) -> dict[str, object]:
    try:
        said = json.loads(text)
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}


def _who(text: bytes) -> str:
    said = _read(text)
    return f"process {said.get('pid')} on {said.get('host')}" if said else "another process"
