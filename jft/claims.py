# SPDX-License-Identifier: Apache-2.0
"""The beginning of a run in its folder: one process at a time, the same run as before, no leftovers.

Of several processes the first one does it, and the others check that they see the same folder.
"""

import json
import pathlib
import sys
import time
from typing import Any

from ml_collections import config_dict

from jft import config as configuration
from jft import errors, hosts, lock, runs, secrets, swap

FORCED = "forced.jsonl"  # what --force let pass, and after which step
RESULTS = ("best", "last")


class Claim:
    """A run's folder, held until `release`.

    Args:
      folder: is made where it is not there.
      config: must be that of the run which is there, but for what changes no mathematics.
      fresh: move that run aside instead.
      force: let other settings pass.

    Raises:
      UserError: another process or another run has it, it can't be made, or is not one folder for all processes.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        config: config_dict.ConfigDict,
        *,
        fresh: bool = False,
        force: bool = False,
    ):
        self._lock = None
        if hosts.lead():
            if fresh:
                _check_no_other(config.checkpoint.folder)
            self._lock = _take(folder, fresh)
            try:
                _clear(folder)
                _compare(folder, config, force)
            except BaseException:
                self.release()
                raise
        _check_seen_by_all(folder)

    def release(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None


def _take(folder: pathlib.Path, fresh: bool) -> lock.Lock:
    if "://" in str(folder) or ":/" in str(folder):
        raise errors.UserError(
            f"run_dir={folder}: it must be a local or mounted folder; --config.checkpoint.folder=gs://... puts the"
            " checkpoints into a bucket"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = lock.Lock(folder)
        if fresh and [path for path in folder.iterdir() if path.name != lock.FILE]:
            held.release()
            _move_aside(folder)
            folder.mkdir()
            held = lock.Lock(folder)
        return held
    except OSError as error:
        raise errors.UserError(f"run_dir={folder}: {error.strerror}") from error


def _check_no_other(checkpoints: str) -> None:
    """Raises UserError for a folder of checkpoints outside the run's that is in use: a fresh run would go on from there."""
    from etils import epath

    place = epath.Path(checkpoints) if checkpoints else None
    if place is not None and place.exists() and any(p.name.isdecimal() for p in place.iterdir()):
        raise errors.UserError(
            f"checkpoint.folder={checkpoints}: holds checkpoints, and --fresh moves run_dir alone: name another folder"
        )


def _move_aside(folder: pathlib.Path) -> None:
    names = (folder.with_name(f"{folder.name}.{n}") for n in range(1, 10**6))
    aside = next(path for path in names if not path.exists())
    folder.rename(aside)
    print(f"the run that was in {folder} is now in {aside}", file=sys.stderr)


def _clear(folder: pathlib.Path) -> None:
    """What a killed process may have left."""
    for name in RESULTS:
        swap.recover(folder / name)
    for part in folder.glob(".*.json*.part"):
        part.unlink()


def _compare(folder: pathlib.Path, config: config_dict.ConfigDict, force: bool) -> None:
    """Raises UserError for settings other than those of the run which is there, if it has come to anything."""
    described, finished = folder / "config.json", folder / "summary.json"
    made = any((folder / "checkpoints").glob("[0-9]*")) or finished.exists()
    if not described.exists() or not made:
        return
    changed = changes(config.to_dict(), runs.read_json(described)["resolved"])
    if changed and not force:
        raise errors.UserError(
            f"{folder} holds a run with other settings ({'; '.join(changed)}): give"
            " --config.run_dir=NEW, --fresh to start again there, or --force to go on with them"
        )
    if changed:
        finished.unlink(missing_ok=True)


def changes(now: dict[str, Any], before: dict[str, Any]) -> list[str]:
    """Settings that change what is computed: "KEY is NEW, was OLD"; `before` as a run keeps them, without secrets."""
    return [
        f"{key} is {new!r}, was {old!r}"
        for key, (new, old) in configuration.difference(secrets.redacted(now), before).items()
        if not key.startswith(configuration.NOT_MATHEMATICS)
    ]


def _check_seen_by_all(folder: pathlib.Path) -> None:
    """Raises UserError where the lead's folder is not there for the others: each would find only its own files."""
    if not hosts.several():
        return
    mark = folder / ".claimed"
    if hosts.lead():
        mark.write_text(str(time.time_ns()))
    hosts.barrier("run_dir is claimed")
    seen = mark.read_text() if mark.exists() else "no such folder"
    hosts.agree(f"run_dir={folder} (a mounted bucket or a shared file system is needed)", seen)
    if hosts.lead():
        mark.unlink()


def record_forced(folder: pathlib.Path, step: int, changed: list[str]) -> None:
    """Writes down, and prints, what was forced and after which step."""
    if not hosts.lead() or not changed:
        return
    with (folder / FORCED).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"after_step": step, "changed": changed}, ensure_ascii=False) + "\n")
    print(f"--force: after step {step} {'; '.join(changed)}", file=sys.stderr)
