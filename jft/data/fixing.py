# SPDX-License-Identifier: Apache-2.0
"""The cleaned file: the same rows in the same order, without those that a check wants out.

What is done to a row is said by the findings themselves, by `details["fix"]`: "remove" or "repair".
Everything else stays as it was read, columns that training does not use among them.
"""

import collections
import csv
import json
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any

from jft import errors
from jft.data import examples, findings, formats, readers, records
from jft.data.checks import damage, found

Writer = Callable[[IO[str], Iterator[records.Record], formats.Reading], None]


def fix(
    source: str, reading: formats.Reading, told: Iterable[findings.Finding], out: str
) -> dict[str, Any]:
    """Writes the rows of `source` that may stay to `out`, all of them or none.

    Args:
        source: what was checked.
        reading: how it was read.
        told: by the check; of these, those that say how they are mended are.
        out: a .jsonl, .json, .csv or .tsv file.

    Returns:
        rows = kept + the sum of removed (rows by kind, each under the first that names it); repaired
        and left (by kind: rows that were to be repaired and could, or could not); message.

    Raises:
        errors.UserError: `out` can't hold these rows, is the data itself, or no row is left.
    """
    write = _writer(out)
    for path in readers.files(source):
        if os.path.exists(path) and os.path.exists(out) and os.path.samefile(path, out):
            raise errors.UserError(
                f"{out}: is the data itself; name another file for the clean rows"
            )
    mending = _Mending(told)
    target = pathlib.Path(out)
    try:
        with tempfile.TemporaryDirectory(prefix=".jft-", dir=target.parent) as folder:
            whole = pathlib.Path(folder) / target.name
            with open(whole, "w", encoding="utf-8", newline="") as file:
                write(file, mending.rows(readers.stream(source, header=reading.header)), reading)
                file.flush()
                os.fsync(file.fileno())
            if not mending.kept:
                raise errors.UserError(
                    f"{source}: no row would be left: {mending.removed_in_words()}"
                )
            os.replace(whole, target)
    except OSError as error:
        raise errors.UserError(f"{out}: can't be written: {error.strerror or error}") from None
    return mending.report(out)


class _Mending:
    """Which rows go and which are repaired, and the count of it."""

    def __init__(self, told: Iterable[findings.Finding]) -> None:
        self._remove: dict[tuple[str, int], str] = {}
        self._repair: dict[tuple[str, int], str] = {}
        for finding in told:
            fates = {"remove": self._remove, "repair": self._repair}
            wanted = fates.get(finding.details.get("fix", ""), {})
            for place in finding.places:
                wanted.setdefault(place, finding.kind)
        self.kept = 0
        self._removed: collections.Counter[str] = collections.Counter()
        self._repaired: collections.Counter[str] = collections.Counter()
        self._left: collections.Counter[str] = collections.Counter()

    def rows(self, stream: readers.Rows) -> Iterator[records.Record]:
        for row in stream:
            place = row.path, row.number
            if isinstance(row, examples.Fault):
                self._removed[row.kind] += 1
            elif place in self._remove:
                self._removed[self._remove[place]] += 1
            else:
                self.kept += 1
                yield self._repair_row(row, self._repair.get(place, ""))

    def _repair_row(self, row: records.Record, kind: str) -> records.Record:
        if not kind:
            return row
        value = _mapped(row.value, damage.repair)
        (self._repaired if value != row.value else self._left)[kind] += 1
        return records.Record(row.path, row.number, value)

    def removed_in_words(self) -> str:
        gone = [f"{found.plural(n, 'row')} removed as {kind}" for kind, n in self._removed.items()]
        return ", ".join(gone) or "none removed"

    def report(self, out: str) -> dict[str, Any]:
        rows = self.kept + self._removed.total()
        told = [
            f"{out}: {self.kept:,} of {found.plural(rows, 'row')} written",
            self.removed_in_words(),
        ]
        told += [
            f"{found.plural(n, 'row')} repaired ({kind})" for kind, n in self._repaired.items()
        ]
        told += [
            f"{found.plural(n, 'row')} beyond repair ({kind})" for kind, n in self._left.items()
        ]
        return {
            "rows": rows,
            "kept": self.kept,
            "removed": dict(self._removed),
            "repaired": dict(self._repaired),
            "left": dict(self._left),
            "message": "; ".join(told),
        }


def _mapped(value: Any, function: Callable[[str], str]) -> Any:
    """A JSON value with the function applied to its texts, but not to its keys."""
    match value:
        case str():
            return function(value)
        case list():
            return [_mapped(held, function) for held in value]
        case dict():
            return {name: _mapped(held, function) for name, held in value.items()}
    return value


def _writer(out: str) -> Writer:
    ending = pathlib.Path(out).suffix.lower()
    if ending not in _WRITERS:
        raise errors.UserError(
            f"{out}: clean rows are written as {', '.join(_WRITERS)}; give the name one of these endings"
        )
    return _WRITERS[ending]


def _write_jsonl(file: IO[str], rows: Iterator[records.Record], reading: formats.Reading) -> None:
    for row in rows:
        file.write(_json(row) + "\n")


def _write_json(file: IO[str], rows: Iterator[records.Record], reading: formats.Reading) -> None:
    before = "["
    for row in rows:
        file.write(f"{before}\n{_json(row)}")
        before = ","
    file.write("\n]\n")


def _json(row: records.Record) -> str:
    def refuse(value: Any) -> Any:
        raise ValueError(f"holds {records.kind(value)}")

    try:
        return json.dumps(row.value, ensure_ascii=False, allow_nan=False, default=refuse)
    except ValueError as error:
        raise errors.UserError(
            f"{row.path}:row {row.number}: can't be written as JSON ({error}); take the column out"
        ) from None


def _write_csv(file: IO[str], rows: Iterator[records.Record], reading: formats.Reading) -> None:
    writer = csv.writer(file)
    for fields in _table(rows, reading, "CSV"):
        writer.writerow(fields)


def _write_tsv(file: IO[str], rows: Iterator[records.Record], reading: formats.Reading) -> None:
    for fields in _table(rows, reading, "TSV"):
        line = "\t".join(fields)
        # A TSV has no quoting: what a field can't hold would become other fields or rows.
        if line.count("\t") >= len(fields) or any(end in line for end in "\n\r"):
            raise errors.UserError(
                f"a field holds a tab or a line end ({line[:40]!r}...), which a TSV can't; write .csv or .jsonl"
            )
        file.write(line + "\n")


def _table(
    rows: Iterator[records.Record], reading: formats.Reading, form: str
) -> Iterator[list[str]]:
    """The header, if there is one, and each row's texts."""
    names: list[str] | None = None
    for row in rows:
        place = f"{row.path}:row {row.number}"
        if not isinstance(row.value, dict):
            raise errors.UserError(f"{place}: {form} needs columns; write .jsonl")
        if names is None:
            names = list(row.value)
            if reading.header:
                yield names
        if list(row.value) != names:
            raise errors.UserError(f"{place}: has other columns than the first row; write .jsonl")
        for name, value in row.value.items():
            if not isinstance(value, str):
                told = f"column {name!r} is {records.kind(value)}, and {form} has text only"
                raise errors.UserError(f"{place}: {told}; write .jsonl")
        yield list(row.value.values())


_WRITERS: dict[str, Writer] = {
    ".jsonl": _write_jsonl,
    ".json": _write_json,
    ".csv": _write_csv,
    ".tsv": _write_tsv,
}
