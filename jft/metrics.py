# SPDX-License-Identifier: Apache-2.0
"""Files of a run that grow by lines: metrics.jsonl (what was computed) and timing.jsonl (what it took).

What was computed is the same, bit for bit, however often a run was interrupted: the lines up to a checkpoint are part of
it, and a run that goes on writes them anew. Times are in a file of their own, for they never come again.
"""

import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any


class Lines:
    """A file of JSON objects, one a line, that is appended to; a reader sees what is flushed, in whole lines.

    Args:
      path: is replaced; None = no file (of several processes the first one writes).
      before: the lines that it begins with.
    """

    def __init__(self, path: pathlib.Path | None, before: str = ""):
        self._lines = before.splitlines(keepends=True)
        self._file = None
        if path is not None:
            part = path.with_name(f".{path.name}.part")
            part.write_text(before, encoding="utf-8")
            os.replace(part, path)
            # Without a buffer: on a full disk a write fails where it is made, and not again when the file is closed.
            self._file = path.open("ab", buffering=0)

    def write(self, **record: Any) -> None:
        line = json.dumps(record) + "\n"
        self._lines.append(line)
        if self._file is not None:
            data = line.encode()
            while data:
                data = data[self._file.write(data) :]

    @property
    def text(self) -> str:
        return "".join(self._lines)

    def has(self, **wanted: Any) -> bool:
        """Whether some line has all of these; None stands for any value."""
        return any(
            all(k in record and v in (None, record[k]) for k, v in wanted.items())
            for record in map(json.loads, self._lines)
        )

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def read(path: pathlib.Path) -> list[dict[str, Any]]:
    """The whole lines of a file, which may be growing or cut off; [] where there is none."""
    return [record for _, record in _whole_lines(path)]


def up_to(path: pathlib.Path, step: int) -> str:
    """The text of the whole lines that belong to steps up to this one."""
    return "".join(
        line + "\n" for line, record in _whole_lines(path) if record.get("step", step + 1) <= step
    )


def _whole_lines(path: pathlib.Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            record = json.loads(line)
        except ValueError:  # empty, or cut off by a crash
            continue
        if isinstance(record, dict):
            yield line, record
