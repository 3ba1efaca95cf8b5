# SPDX-License-Identifier: Apache-2.0
"""A check's report as one JSON object, for `--json`."""

from collections.abc import Sequence
from typing import Any

from jft.data import findings
from jft.terminal import pieces, showing


def report(
    made: findings.Report,
    files: Sequence[str],
    unused: Sequence[str],
    shown: Sequence[showing.Shown] = (),
    tokenizer: Any = None,
) -> dict[str, Any]:
    """What `jft check --json` prints."""
    found: dict[str, Any] = {
        "rows": made.rows,
        "trained_rows": made.trained_rows,
        "shape": made.shape,
        "files": list(files),
        "unused_columns": list(unused),
        "findings": [_finding(finding, files) for finding in made.findings],
        "statistics": made.statistics,
    }
    if shown:
        spelled = pieces.Pieces(tokenizer)
        found["shown"] = [_shown(row, spelled) for row in shown]
    return found


def _finding(finding: findings.Finding, files: Sequence[str]) -> dict[str, Any]:
    """Rows are numbers where one file is checked; those of several, and of held-out ones, "path:row"."""
    alone = files[0] if len(files) == 1 else None
    return {
        "kind": finding.kind,
        "severity": finding.severity,
        "count": finding.count,
        "left_out": finding.left_out,
        "rows": [
            number if path == alone else f"{path}:{number}" for path, number in finding.places
        ],
        "message": finding.message,
        "advice": finding.advice,
        "details": finding.details,
    }


def _shown(shown: showing.Shown, spelled: pieces.Pieces) -> dict[str, Any]:
    """A row with its tokens; a list of such lists where it was split."""
    described: dict[str, Any] = {"file": shown.path, "row": shown.number}
    if shown.fault:
        return described | {"fault": shown.fault}
    made = [
        [
            {"id": t.id, "text": t.text, "trained": t.trained, "control": t.control}
            for t in showing.tokens(row, spelled)
        ]
        for row in shown.rows
    ]
    return described | {"tokens": made[0] if len(made) == 1 else made}
