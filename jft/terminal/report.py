# SPDX-License-Identifier: Apache-2.0
"""A check's report for a person: what was read, how long rows are, what was found and what to do about it."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jft.data import findings
from jft.terminal import visible

if TYPE_CHECKING:
    from rich import console as rich_console
    from rich import text as rich_text

Place = tuple[str, int]

SHOWN_ROWS = 10  # row numbers of a finding
_STYLES = {"error": "bold red", "warning": "yellow", "note": "cyan"}
_SIGNS = {"error": "✗", "warning": "!", "note": "·"}
_NAMES = {
    "characters": "characters",
    "words": "words",
    "answer_words": "words of answers",
    "turns": "turns",
    "tokens": "tokens",
    "trained_tokens": "trained tokens",
}
_BAR = 32  # columns of the longest bar
_EIGHTHS = " ▏▎▍▌▋▊▉█"


def print_report(
    console: "rich_console.Console",
    report: findings.Report,
    files: Sequence[str],
    unused: Sequence[str],
    quotes: Mapping[Place, Sequence[str]],
) -> None:
    _print_title(console, report, files, unused)
    _print_lengths(console, report.statistics)
    _print_histogram(console, report.statistics)
    _print_findings(console, report.findings, files, quotes)
    console.print(closing(report))


def closing(report: findings.Report) -> "rich_text.Text":
    """One line: how many findings of each severity, and how many rows are trained on."""
    from rich import text

    counts = {
        severity: sum(finding.severity == severity for finding in report.findings)
        for severity in findings.SEVERITIES
    }
    line = text.Text()
    if not any(counts.values()):
        line.append("nothing found", "green")
    for severity, number in counts.items():
        if number:
            line.append(", " if line.plain else "")
            line.append(visible.plural(number, severity), _STYLES[severity])
    line.append(f"; {report.trained_rows:,} of {visible.plural(report.rows, 'row')}")
    line.append(" would be trained on")
    return line


def _print_title(
    console: "rich_console.Console",
    report: findings.Report,
    files: Sequence[str],
    unused: Sequence[str],
) -> None:
    from rich import text

    folder, short = _short(files)
    names = ", ".join(short[:4])
    names += f" and {len(files) - 4} more" if len(files) > 4 else ""
    names = f"{folder} ({len(files)} files: {names})" if folder else names
    console.print(
        text.Text.assemble(
            (names, "bold"),
            f": {visible.plural(report.rows, 'row')}, read as {visible.escape(report.shape)}",
        ),
        highlight=False,
    )
    if unused:
        columns = ", ".join(map(visible.escape, unused[:8]))
        columns += f" and {len(unused) - 8} more" if len(unused) > 8 else ""
        console.print(text.Text(f"columns that nothing reads: {columns}", "dim"))
    console.print()


def _short(files: Sequence[str]) -> tuple[str, list[str]]:
    """The folder that several files share, and their names without it; made visible."""
    names = [visible.escape(file) for file in files]
    parents = {pathlib.PurePath(name).parent for name in names}
    if len(files) == 1 or len(parents) > 1 or parents == {pathlib.PurePath(".")}:
        return "", names
    return str(parents.pop()), [pathlib.PurePath(name).name for name in names]


def _print_lengths(console: "rich_console.Console", statistics: Mapping[str, Any]) -> None:
    from rich import table

    found = {name: statistics[key] for key, name in _NAMES.items() if statistics.get(key)}
    if not found:
        return
    made = table.Table.grid(padding=(0, 3, 0, 0), pad_edge=False)
    made.add_column()
    for _ in range(5):
        made.add_column(justify="right")
    made.add_row("in a row", "min", "median", "95 %", "max", "in all", style="dim")
    for name, numbers in found.items():
        cells = [visible.count(numbers[k]) for k in ("min", "median", "p95", "max", "total")]
        made.add_row(name, *cells)
    console.print(made)
    console.print()


def _print_histogram(console: "rich_console.Console", statistics: Mapping[str, Any]) -> None:
    from rich import text

    found = statistics.get("histogram", {"bins": []})
    bins, limit = found["bins"], statistics.get("max_length", 0)
    if len(bins) < 2:
        return
    most = max(entry["rows"] for entry in bins)
    bins = [entry for entry in bins if entry["rows"]]
    labels = [_range(entry) for entry in bins]
    width, bar = max(map(len, labels)), min(_BAR, max(8, console.width - 40))
    console.print(text.Text(f"rows by {found['of']}", "dim"))
    for label, entry in zip(labels, bins, strict=True):
        blocks = _blocks(entry["rows"] / most * bar)
        line = text.Text.assemble(f"{label:>{width}} ", (blocks, "blue"), f" {entry['rows']:,}")
        if limit and found["of"] == "tokens" and entry["from"] - 1 > limit:
            line.append(f"  over max_length={limit}", "yellow")
        console.print(line, no_wrap=True)
    console.print()


def _range(entry: Mapping[str, int]) -> str:
    start, end = entry["from"], entry["to"]
    return f"{start:,}" if start == end else f"{start:,} – {end:,}"


def _blocks(length: float) -> str:
    """A bar in eighths of a column; what is not nothing can be seen."""
    eighths = max(round(8 * length), 1 if length else 0)
    return "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()


def _print_findings(
    console: "rich_console.Console",
    found: Sequence[findings.Finding],
    files: Sequence[str],
    quotes: Mapping[Place, Sequence[str]],
) -> None:
    """One line or more for what was found, its rows, the beginning of the first of them, and what to do."""
    from rich import table, text

    for severity in findings.SEVERITIES:
        these = [finding for finding in found if finding.severity == severity]
        if not these:
            continue
        style = _STYLES[severity]
        console.print(text.Text(f"{severity.capitalize()}s", style))
        grid = table.Table.grid(padding=(0, 2, 0, 0))
        width = max(len(finding.kind) for finding in found)
        grid.add_column(width=width + 2)
        grid.add_column(overflow="fold")
        for finding in these:
            room = console.width - width - 4
            grid.add_row(
                text.Text(f"{_SIGNS[severity]} {finding.kind}", style),
                _told(finding, files, quotes, room),
            )
        console.print(grid)
        console.print()


def _told(
    finding: findings.Finding,
    files: Sequence[str],
    quotes: Mapping[Place, Sequence[str]],
    width: int,
) -> "rich_text.Text":
    from rich import text

    told = text.Text(visible.escape(finding.message))
    if finding.places:
        rows = rows_line(finding.places, files)
        turns = quotes.get(finding.places[0], ())
        if turns and turns[0] in finding.message:  # why a row can't be used
            turns = ()
        alone = len(finding.places) == 1
        label = f"{rows}: " if alone else f"row {finding.places[0][1]}: "
        quote = visible.conversation(turns, max(20, width - len(label))) if turns else ""
        if not (alone and quote):
            told.append(f"\n{rows}", "dim")
        if quote:
            told.append(f"\n{label}{quote}", "dim")
    return told.append(f"\n→ {visible.escape(finding.advice)}")


def rows_line(places: Sequence[Place], files: Sequence[str]) -> str:
    """The first rows' numbers and how many more there are; with their files where there are several."""
    shown = places[:SHOWN_ROWS]
    more = f" and {len(places) - SHOWN_ROWS:,} more" if len(places) > SHOWN_ROWS else ""
    if len(files) == 1 and {path for path, _ in shown} == {*files}:
        noun = "row" if len(places) == 1 else "rows"
        return f"{noun} {', '.join(str(number) for _, number in shown)}{more}"
    short = dict(zip(files, _short(files)[1], strict=True))
    by_file: dict[str, list[str]] = {}
    for path, number in shown:
        by_file.setdefault(short.get(path, visible.escape(path)), []).append(str(number))
    parts = [
        f"{path} {'row' if len(rows) == 1 else 'rows'} {', '.join(rows)}"
        for path, rows in by_file.items()
    ]
    return f"{'; '.join(parts)}{more}"


def print_fixed(console: "rich_console.Console", fixed: Mapping[str, Any]) -> None:
    """What was written and what was changed in it."""
    from rich import text

    console.print(text.Text(visible.escape(fixed["message"])))
