# SPDX-License-Identifier: Apache-2.0
"""Digests of a checkpoint's files and of its JSON: damage is found before anything parses it.

The list of files is written into a checkpoint's folder before that gets its name, so it is there or the checkpoint is
not. Files above `WHOLE` bytes are listed by size alone: reading hundreds of gigabytes back would cost more than the
save, and the sums of their arrays (`jft.checkpoints.sums`) are checked after they are restored.
"""

import errno
import hashlib
import json
from typing import Any

from etils import epath

from jft import errors

FILE = "digests.json"
WHOLE = 64 << 20  # bytes
# Orbax writes these at the very end, after the list. What they say is not used.
_LATE = ("_CHECKPOINT_METADATA", "commit_success.txt")


class Damaged(Exception):
    """Something is not as it was written; the text says what."""


def seal(record: dict[str, Any]) -> dict[str, Any]:
    """The record with its own digest."""
    return {"record": record, "sha256": _of_json(record)}


def unseal(sealed: Any) -> dict[str, Any]:
    """The record of `seal`.

    Raises:
      Damaged: it is another one.
    """
    try:
        record, told = sealed["record"], sealed["sha256"]
    except (TypeError, KeyError) as error:
        raise Damaged("its record has no digest") from error
    if _of_json(record) != told:
        raise Damaged("its record is not as it was written")
    return record


def _of_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write(folder: epath.Path) -> None:
    """Lists the files below the folder in `FILE` there."""
    found = {}
    for path in _files(folder):
        size = path.stat().length
        found[str(path.relative_to(folder))] = [size, _sha256(path, size)]
    (folder / FILE).write_text(json.dumps(seal(found), indent=0))


def check(folder: epath.Path) -> None:
    """Compares the files below the folder with their list. A folder without one passes: the arrays' sums remain.

    Raises:
      Damaged: a file is missing, or not as it was written.
      UserError: a file can't be read now, which says nothing about it.
    """
    try:
        if not (folder / FILE).exists():
            return
        listed = unseal(json.loads((folder / FILE).read_bytes()))
        for name, (size, told) in listed.items():
            _check_file(folder / name, name, size, told)
    except ValueError as error:
        if isinstance(error, errors.UserError):
            raise
        raise Damaged(f"{FILE} is not as it was written") from error
    except OSError as error:
        if error.errno == errno.EIO:  # what a bad sector gives
            raise Damaged(str(error)) from error
        raise errors.UserError(f"{folder}: can't be read: {error.strerror or error}") from error


def _check_file(path: epath.Path, name: str, size: int, told: str | None) -> None:
    if not path.exists():
        raise Damaged(f"{name} is missing")
    found = path.stat().length
    if found != size:
        raise Damaged(f"{name} has {found} bytes of {size}")
    if _sha256(path, size) != told:
        raise Damaged(f"{name} is not as it was written")


def _files(folder: epath.Path) -> list[epath.Path]:
    found = []
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            found += _files(path)
        elif path.name not in (*_LATE, FILE):
            found.append(path)
    return found


def _sha256(path: epath.Path, size: int) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if size <= WHOLE else None
