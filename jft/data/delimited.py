# SPDX-License-Identifier: Apache-2.0
"""Rows of CSV and TSV files: every field as it stands, every row as wide as the header.

A reader that infers types turns the id "007" into 7 and a "NA" into nothing; here all values are text.
"""

import csv
import functools
import io
from collections.abc import Iterator, Sequence

from jft.data import examples, files, records

Rows = Iterator[records.Record | examples.Fault]


def read_csv(path: str, file: io.BufferedReader, *, header: bool) -> Rows:
    """Comma-separated fields, quoted where they hold commas, quotes or line ends."""
    return _read(path, file, ",", header)


def read_tsv(path: str, file: io.BufferedReader, *, header: bool) -> Rows:
    """Tab-separated fields; a quote is a character like others.

    With the csv module's default one bare quote would swallow the rows that follow it.
    """
    return _read(path, file, "\t", header)


def _read(path: str, file: io.BufferedReader, separator: str, header: bool) -> Rows:
    csv.field_size_limit(files.LONGEST)  # of the process; its 131,072 would refuse long texts
    # Bytes that are not UTF-8 become halves of surrogate pairs: they spoil their row, not the file.
    text = io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline="")
    quoting = csv.QUOTE_MINIMAL if separator == "," else csv.QUOTE_NONE
    lines = iter(functools.partial(text.readline, files.LONGEST + 1), "")
    reader = csv.reader(lines, delimiter=separator, quoting=quoting, strict=True)
    names: list[str] = []
    number, line = 1, 1
    try:
        for fields in reader:
            if fields and not names:
                if problem := _check_names(fields, separator, header):
                    yield records.whole(path, problem)
                    return
                names = fields if header else [str(i) for i in range(len(fields))]
                fields = [] if header else fields
            if fields:
                problem = _check(fields, names, line, quoting, header)
                yield (
                    records.fault(path, number, problem)
                    if problem
                    else records.Record(path, number, dict(zip(names, fields, strict=True)))
                )
                number += 1
            line = reader.line_num + 1
    except csv.Error as error:
        # Where a quote is missing, what follows may look like rows that were never written.
        told = f"bad quoting in the row that begins in line {line}: {error}"
        if "field limit" in str(error):
            told = f"a field of over {files.LONGEST:,} characters in the row that begins in line {line}"
        yield records.rest(path, number, told, 'write a quote inside a quoted field as ""')


def _check_names(fields: Sequence[str], separator: str, header: bool) -> str:
    """What is wrong with the first line, with what to do; empty if nothing is."""
    if not header:
        return ""
    if len(fields) == 1:
        other = next((mark for mark in "\t;,|" if mark != separator and mark in fields[0]), None)
        if other == "\t":
            return "the first line has tabs and no comma; give the file's name the ending .tsv"
        if other:
            return (
                f"the first line is one column that holds {other!r}; "
                f"save it with {'commas' if separator == ',' else 'tabs'} between the columns"
            )
    if problem := _not_utf8(fields):
        return f"the header is {problem}"
    twice = sorted({name for name in fields if fields.count(name) > 1})
    if twice:
        return f"column {twice[0]!r} stands twice in the header; rename one"
    return ""


def _check(
    fields: Sequence[str], names: Sequence[str], line: int, quoting: int, header: bool
) -> str:
    """What is wrong with a row, with what to do; empty if nothing is."""
    if len(fields) != len(names):
        return (
            f"has {len(fields)} field{'s' * (len(fields) > 1)}, the {'header' if header else 'first row'} has {len(names)} "
            f"(line {line}); "
            + (
                "quote a field that holds a comma or a line end"
                if quoting == csv.QUOTE_MINIMAL
                else "a field can't hold a tab or a line end"
            )
        )
    if quoting == csv.QUOTE_NONE:
        for name, field in zip(names, fields, strict=True):
            if field[:1] == '"' == field[-1:] and '""' in field[1:-1]:
                return (
                    f"column {name!r} is quoted as in CSV, and a TSV has no quoting (line {line}); "
                    "save it as CSV"
                )
    return _not_utf8(fields)


def _not_utf8(fields: Sequence[str]) -> str:
    try:
        for field in fields:
            if not field.isascii():
                field.encode()
    except UnicodeEncodeError as error:
        byte = ord(error.object[error.start]) - 0xDC00
        return f"not UTF-8 (byte 0x{byte:02x}); save the file as UTF-8"
    return ""
