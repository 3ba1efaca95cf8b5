# SPDX-License-Identifier: Apache-2.0
"""What is wrong with the texts of a data set, seen one row at a time.

Each check has its module. Memory is some hundred bytes a row: hashes, and signatures in a
temporary file; no text is kept.
"""

import numpy as np

from jft.data import examples, findings
from jft.data.checks import (
    answers,
    credentials,
    damage,
    found,
    hashes,
    languages,
    parts,
    personal,
    placeholders,
    repeats,
    templates,
)

_SHOWN = 20  # messages of unusable rows in `details`


class Examination:
    """Text-level checks over a stream of rows."""

    def __init__(self, *, near: bool = True, languages: bool = True) -> None:
        self._places = found.Places()
        self._faults = {"malformed": _Faults(), "empty": _Faults()}
        self._hashes = hashes.Hashes(near_too=near)
        self._answers = answers.Answers()
        self._languages = _languages() if languages else None
        self._texts = (
            placeholders.Placeholders(),
            damage.Damage(),
            credentials.Credentials(),
            personal.Personal(),
            templates.Templates(),
        )

    def add(self, item: examples.Example | examples.Fault, *, valid: bool = False) -> None:
        """Looks at the next row; `valid` ones are of the validation set."""
        row = self._places.add(item.path, item.number, valid=valid)
        if isinstance(item, examples.Fault):
            self._faults[item.kind].add(row, item.message)
            return
        whole = self._hashes.add(row, item)
        if not valid:
            self._answers.add(row, item)
        if self._languages is not None:
            self._languages.add(row, item, whole)
        for text, part in parts.parts(item):
            for check in self._texts:
                check.add(row, text, part)

    def findings(self) -> list[findings.Finding]:
        """What was found: errors first, then in the order of `findings.KINDS`."""
        told = [f for kind, faults in self._faults.items() for f in faults.told(kind, self._places)]
        told += repeats.told(self._hashes.columns(self._places), self._places)
        told += self._answers.told(self._places)
        if self._languages is not None:
            told += self._languages.told(self._places)
        for check in self._texts:
            told += check.told(self._places)
        return sorted(told, key=_order)

    def groups(self) -> np.ndarray:
        """int64 [n]: of each usable row, in their order, the first row of its group of near duplicates."""
        return self._hashes.groups()


class _Faults:
    """Rows that can't be used, and what the first of them were told."""

    def __init__(self) -> None:
        self._rows: list[int] = []
        self._messages: list[str] = []

    def add(self, row: int, message: str) -> None:
        self._rows.append(row)
        if len(self._messages) < _SHOWN:
            self._messages.append(message)

    def told(self, kind: str, places: found.Places) -> list[findings.Finding]:
        if not self._rows:
            return []
        more = f" (and {len(self._rows) - 1:,} more)" if len(self._rows) > 1 else ""
        return [
            findings.Finding(
                kind,
                "error",
                len(self._rows),
                places.at(self._rows),
                f"{found.plural(len(self._rows), 'row')} can't be used: {self._messages[0]}{more}",
                "mend the rows, or take them out (--fix does)",
                {"messages": self._messages, "fix": "remove"},
                left_out=len(self._rows),
            )
        ]


def _languages() -> languages.Languages:
    return languages.Languages()


def _order(finding: findings.Finding) -> tuple[bool, int, int]:
    return (
        finding.severity != "error",
        findings.KINDS.index(finding.kind),
        findings.SEVERITIES.index(finding.severity),
    )
