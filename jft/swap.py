# SPDX-License-Identifier: Apache-2.0
"""Folders that are replaced whole: a reader finds the old one or the new one, never a mixture and never half."""

import ctypes
import os
import pathlib
import shutil

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def beside(place: pathlib.Path) -> pathlib.Path:
    """A name next to a folder, free, where the new one is made."""
    part = place.with_name(f".{place.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    return part


def replace(place: pathlib.Path, part: pathlib.Path) -> None:
    """Puts the folder `part` in the place of another, which is deleted, or of none."""
    if not place.exists():
        os.rename(part, place)
        return
    old = _old(place)
    shutil.rmtree(old, ignore_errors=True)
    if _exchange(part, place):
        os.rename(part, old)
    else:  # for a moment there is none; `recover` puts the old one back if this process ends right here
        os.rename(place, old)
        os.rename(part, place)
    shutil.rmtree(old)


def recover(place: pathlib.Path) -> None:
    """Clears up after a process that ended while it made or replaced the folder."""
    if not place.exists() and _old(place).exists():
        os.rename(_old(place), place)
    for left in (_old(place), beside(place)):
        shutil.rmtree(left, ignore_errors=True)


def _old(place: pathlib.Path) -> pathlib.Path:
    return place.with_name(f".{place.name}.old")


def _exchange(one: pathlib.Path, other: pathlib.Path) -> bool:
    """Swaps two names in one instant, where the system (Linux) and the file system can."""
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError):
        return False
    names = (os.fsencode(one), os.fsencode(other))
    return renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0
