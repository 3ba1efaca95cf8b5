# SPDX-License-Identifier: Apache-2.0
"""Which rows a check has found, in little memory, and the finding made of them."""

import array
import dataclasses
from collections.abc import Iterable
from typing import Any

from jft.data import findings
from jft.data.checks import parts

LISTED = 100  # groups or classes in `details`, which people read; `places` always holds every row


class Places:
    """Where each row stands, 13 bytes a row; rows are numbered as they come."""

    def __init__(self) -> None:
        self._paths: dict[str, int] = {}
        self._path = array.array("i")
        self._number = array.array("q")
        self.valid = bytearray()  # 1 for rows of the validation set

    def __len__(self) -> int:
        return len(self._path)

    def add(self, path: str, number: int, *, valid: bool) -> int:
        self._path.append(self._paths.setdefault(path, len(self._paths)))
        self._number.append(number)
        self.valid.append(valid)
        return len(self._path) - 1

    def at(self, rows: Iterable[int]) -> tuple[tuple[str, int], ...]:
        names = list(self._paths)
        return tuple((names[self._path[row]], self._number[row]) for row in rows)


class Found:
    """Rows by the pattern that was found in them and the part of the row that held it."""

    def __init__(self) -> None:
        self._rows: dict[tuple[str, str], array.array] = {}

    def __bool__(self) -> bool:
        return bool(self._rows)

    def add(self, row: int, pattern: str, part: str) -> None:
        rows = self._rows.setdefault((pattern, part), array.array("i"))
        if not rows or rows[-1] != row:
            rows.append(row)

    def rows(self, *, pattern: str = "", part: str = "") -> list[int]:
        """Rows in order, each once; of one pattern or part where given."""
        wanted = (
            rows
            for (its_pattern, its_part), rows in self._rows.items()
            if pattern in ("", its_pattern) and part in ("", its_part)
        )
        return sorted(set().union(*wanted))

    def patterns(self) -> dict[str, int]:
        """Rows of each pattern, the most frequent first."""
        names = dict.fromkeys(pattern for pattern, _ in self._rows)
        counts = {name: len(self.rows(pattern=name)) for name in names}
        return dict(sorted(counts.items(), key=lambda item: -item[1]))

    def details(self) -> dict[str, Any]:
        """Rows by pattern and by part, for --json."""
        by_part = {part: len(self.rows(part=part)) for part in parts.PARTS}
        return {"patterns": self.patterns(), "parts": {k: v for k, v in by_part.items() if v}}


@dataclasses.dataclass(frozen=True)
class Words:
    """How a finding of row patterns is told.

    `fix` says what `--fix` does with the rows: "remove", "repair", or nothing.
    """

    kind: str
    severity: str
    what: str  # "with a secret": the message is "3 rows with a secret (...)"
    advice: str
    fix: str = ""


def tell(words: Words, found: Found, places: Places) -> list[findings.Finding]:
    """The finding of these rows, or none."""
    if not found:
        return []
    rows = found.rows()
    counts = ", ".join(f"{name}: {number}" for name, number in found.patterns().items())
    context = len(rows) - len(found.rows(part=parts.ANSWER))
    beside = f"; {context} not in an answer" if context else ""
    return [
        findings.Finding(
            words.kind,
            words.severity,
            len(rows),
            places.at(rows),
            f"{plural(len(rows), 'row')} {words.what} ({counts}){beside}",
            words.advice,
            found.details() | ({"fix": words.fix} if words.fix else {}),
        )
    ]


def plural(count: int, noun: str) -> str:
    """ "1 row", "2 rows", "12,000 rows"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
