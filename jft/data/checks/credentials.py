# SPDX-License-Identifier: Apache-2.0
"""Secrets in texts: keys, tokens and passwords of known forms. What was found is never shown."""

import re

from jft import secrets
from jft.data import findings
from jft.data.checks import found

SECRETS = found.Words(
    "secret",
    "warning",
    "with what looks like a secret",
    "take them out (--fix removes the rows) and revoke what is real: a model can be made to recite it",
    fix="remove",
)

_BY_MARK = tuple(
    (mark, name, re.compile(form)) for name, marks, form in secrets.FORMS for mark in marks
)
# What documentation writes in a secret's place.
_STAND_IN = re.compile(
    r"x{4}|\*{3}|\.{3}|0{6}|example|your|here|secret|passw|placeholder|token|dummy|sample|test|changeme|redacted"
    r"|1234567|abcdef|[{}$\[\]()]|^(?:pass|pwd|pw|user|admin|root|key|foo|bar)$",
    re.I,
)


class Credentials:
    def __init__(self) -> None:
        self._found = found.Found()

    def add(self, row: int, text: str, part: str) -> None:
        for mark, name, pattern in _BY_MARK:
            if mark in text and _real(pattern, text):
                self._found.add(row, name, part)

    def told(self, places: found.Places) -> list[findings.Finding]:
        return found.tell(SECRETS, self._found, places)


def _real(pattern: re.Pattern[str], text: str) -> bool:
    return any(not _is_stand_in(match["value"]) for match in pattern.finditer(text))


def _is_stand_in(value: str) -> bool:
    """Long values are random: neither do words stand in them, nor few characters only."""
    return bool(_STAND_IN.search(value)) or (len(value) >= 16 and len(set(value)) < 8)
