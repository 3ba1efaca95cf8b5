# SPDX-License-Identifier: Apache-2.0
"""What a check of data says: findings, each with its severity, its rows and what to do."""

import dataclasses
from typing import Any

# Errors stop a run: what is trained would be wrong or can't be read. Warnings deserve a look; notes are only told.
SEVERITIES = ("error", "warning", "note")
KINDS = (
    "malformed",
    "empty",
    "template",
    "truncated",
    "dropped",
    "leak",
    "conflict",
    "duplicate",
    "near_duplicate",
    "placeholder",
    "control_token",
    "encoding",
    "repetition",
    "secret",
    "personal_data",
    "imbalance",
    "language",
    "outlier",
)


@dataclasses.dataclass(frozen=True)
class Finding:
    """One kind of thing found.

    `count` is in units of what the message names, mostly rows; `places` are (file, row number) of the rows concerned,
    in order; `details` has further numbers for --json.
    """

    kind: str
    severity: str
    count: int
    places: tuple[tuple[str, int], ...]
    message: str  # what was found, with its numbers, one line
    advice: str  # what to do, one line
    details: dict[str, Any] = dataclasses.field(default_factory=dict)
    left_out: int = 0  # rows of these that training does not use; a row is counted by one finding


@dataclasses.dataclass(frozen=True)
class Report:
    """All that a check found. `rows` = `trained_rows` + the findings' `left_out`."""

    rows: int  # in the files, blank lines apart
    trained_rows: int  # that training would use
    findings: tuple[Finding, ...]
    shape: str  # how the columns were understood, in words
    statistics: dict[str, Any] = dataclasses.field(default_factory=dict)
