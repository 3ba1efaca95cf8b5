# SPDX-License-Identifier: Apache-2.0
"""A source's rows, streamed: files of every kind, a folder of them, or a Hub data set.

Each row is yielded once, as a `Record` or as the `Fault` that says why it can't be read. What makes the rest of a
file unreadable is one fault, which says from which row on.
"""

import io
import pathlib
from collections.abc import Iterator

from jft.data import arrow_rows, delimited, examples, hub, json_rows, records
from jft.data import files as found

Record = records.Record
kind = records.kind
Rows = Iterator[records.Record | examples.Fault]


def files(source: str) -> tuple[str, ...]:
    """The files that a source names; of a Hub data set, its name.

    Raises:
        errors.UserError: there is no such file, or a folder leaves open what is meant.
    """
    return (source,) if hub.is_name(source) else found.find(source)


def stream(source: str, *, header: bool = True) -> Rows:
    """All rows of a source, in order.

    Args:
        source: a file, a folder of files, or a Hub data set: owner/name, name:split or owner/name:subset:split.
        header: CSV and TSV files begin with a line of names; without one, columns are called "0", "1", ...

    Raises:
        errors.UserError: the source can't be found; faults inside it are yielded.
    """
    if hub.is_name(source):
        return hub.stream(source)
    return _of_files(files(source), header)


def _of_files(paths: tuple[str, ...], header: bool) -> Rows:
    for path in paths:
        empty = True
        for row in _of_file(path, header):
            empty = False
            yield row
        if empty:
            size = pathlib.Path(path).stat().st_size
            told = f"holds no rows ({size} bytes); fill it or leave it out"
            yield records.whole(path, told, kind="empty")


def _of_file(path: str, header: bool) -> Rows:
    """The rows of one file. Data that ends early comes here as an exception, after the good rows."""
    number = 0
    try:
        with found.open_bytes(path) as file:
            kind = found.kind(path)
            if told := found.foreign(file, str(kind)):
                yield records.whole(path, told)
                return
            for row in _rows(path, str(kind), file, header):
                number = row.number
                yield row
    except found.DAMAGE as error:
        advice = "fetch or write the file again"
        yield records.rest(path, number + 1, found.damage(error), advice)


def _rows(path: str, kind: str, file: io.BufferedReader, header: bool) -> Rows:
    match kind:
        case "jsonl":
            return json_rows.read_lines(path, file)
        case "json":
            return json_rows.read_file(path, file)
        case "csv":
            return delimited.read_csv(path, file, header=header)
        case "tsv":
            return delimited.read_tsv(path, file, header=header)
        case "parquet":
            return arrow_rows.read_parquet(path, file)
        case "arrow":
            return arrow_rows.read_arrow(path, file)
    return _read_text(path, file)


def _read_text(path: str, file: io.BufferedReader) -> Rows:
    """A text file: one row, whose column is called "text"."""
    try:
        text = file.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        told = f"not UTF-8 ({error.reason} at byte {error.start}); save the file as UTF-8"
        yield records.whole(path, told)
        return
    if text:
        yield records.Record(path, 1, {"text": text})
