# SPDX-License-Identifier: Apache-2.0
"""Files to rows, exactly: every value as it stands in the file, every fault with its line.

Tables are read with the plainest reader there is. A reader that infers types turns the id "007"
into 7 and a "NA" into nothing, and one that splits text lines breaks JSON strings at U+2028.
"""

import csv
import difflib
import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any

from jft import errors

Rows = list[tuple[int, Any]]  # (row number as told to the user, value)


def read_rows(path: str) -> Rows:
    """All rows of a .jsonl, .json, .csv, .tsv or .parquet file.

    A row's number is its line in JSONL (blank lines count) and its place among the rows, from 1,
    elsewhere.
    """
    file = pathlib.Path(path)
    if not file.exists():
        raise errors.UserError(f"{path}: no such file{_near_files(file)}")
    if file.is_dir():
        raise errors.UserError(f"{path}: is a folder; name one of its files")
    reader = _READERS.get(file.suffix.lower())
    if reader is None:
        known = ", ".join(_READERS)
        raise errors.UserError(f"{path}: unknown extension {file.suffix!r}; known are {known}")
    try:
        rows = reader(path)
    except UnicodeDecodeError as error:
        raise errors.UserError(
            f"{path}: not UTF-8 ({error.reason} at byte {error.start}); save the file as UTF-8"
        ) from None
    except OSError as error:
        raise errors.UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    if not rows:
        raise errors.UserError(f"{path}: holds no rows ({file.stat().st_size} bytes)")
    return rows


def _near_files(file: pathlib.Path) -> str:
    """What the user may have meant, as the end of a sentence."""
    if not file.parent.is_dir():
        return f" (nor a folder {str(file.parent)!r})"
    names = [entry.name for entry in file.parent.iterdir() if entry.is_file()]
    near = difflib.get_close_matches(file.name, names, n=3)
    near = near or sorted(name for name in names if pathlib.Path(name).suffix in _READERS)[:3]
    return f"; the folder holds {', '.join(near)}" if near else ""


def _read_jsonl(path: str) -> Rows:
    rows: Rows = []
    # Bytes are split at b"\n" alone; str.splitlines() would also split inside strings, at U+0085
    # and U+2028.
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError as error:
                raise errors.UserError(
                    f"{path}:{number}: not UTF-8 ({error.reason} at byte {error.start} of the "
                    "line); save the file as UTF-8"
                ) from None
            if text:
                rows.append((number, _parse(text, path, number)))
    return rows


def _read_json(path: str) -> Rows:
    with open(path, encoding="utf-8-sig", newline="") as file:
        text = file.read()
    if not text.strip():
        return []
    try:
        # The first value ends before the file does: these are JSON lines under another name.
        value, end = json.JSONDecoder().raw_decode(text.lstrip())
        if isinstance(value, dict) and text.lstrip()[end:].strip():
            return _read_jsonl(path)
    except (ValueError, RecursionError):
        pass  # told below, with its place
    value = _parse(text, path, 1)
    if not isinstance(value, list):
        raise errors.UserError(f"{path}: holds {kind(value)}, not a list of rows: [{{...}}, ...]")
    return list(enumerate(value, start=1))


def _parse(text: str, path: str, line: int) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        place = f"{path}:{line + error.lineno - 1}"
        raise errors.UserError(f"{place}: bad JSON, column {error.colno}: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise errors.UserError(f"{path}:{line}: bad JSON: {error}") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; of two equal keys json would keep the last and say nothing."""
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} stands twice")
    return value


def _read_csv(path: str) -> Rows:
    return _read_delimited(path, delimiter=",", quoting=csv.QUOTE_MINIMAL)


def _read_tsv(path: str) -> Rows:
    # A TSV has no quoting: with the csv module's default one bare quote swallows the rows that
    # follow it.
    return _read_delimited(path, delimiter="\t", quoting=csv.QUOTE_NONE)


def _read_delimited(path: str, *, delimiter: str, quoting: int) -> Rows:
    limit = csv.field_size_limit(sys.maxsize)  # global to the process: put back below
    rows: Rows = []
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter=delimiter, quoting=quoting, strict=True)
            header: list[str] = []
            line = 1
            try:
                for fields in reader:
                    if fields and not header:
                        header = _check_header(fields, path)
                    elif fields:
                        _check_width(fields, header, f"{path}:{line}", len(rows) + 1)
                        rows.append((len(rows) + 1, dict(zip(header, fields, strict=True))))
                    line = reader.line_num + 1
            except csv.Error as error:
                raise errors.UserError(
                    f"{path}:{line}: bad quoting in row {len(rows) + 1}: {error}; "
                    'a quote inside a quoted field is written ""'
                ) from None
    finally:
        csv.field_size_limit(limit)
    return rows


def _check_header(fields: list[str], path: str) -> list[str]:
    twice = sorted({name for name in fields if fields.count(name) > 1})
    if twice:
        raise errors.UserError(f"{path}:1: column {twice[0]!r} stands twice in the header")
    return fields


def _check_width(fields: list[str], header: list[str], place: str, row: int) -> None:
    if len(fields) != len(header):
        raise errors.UserError(
            f"{place}: row {row} has {len(fields)} fields, the header has {len(header)}; "
            "quote a field that holds the separator or a newline"
        )


def _read_parquet(path: str) -> Rows:
    import pyarrow
    import pyarrow.parquet

    try:
        # One file, as it is: read_table would take column values from folder names such as
        # "split=train".
        table = pyarrow.parquet.ParquetFile(path).read()
    except pyarrow.ArrowException as error:
        raise errors.UserError(
            f"{path}: not a Parquet file: {' '.join(str(error).split())}"
        ) from None
    return list(enumerate(table.to_pylist(), start=1))


def kind(value: Any) -> str:
    """A JSON value's kind in words, for messages."""
    if isinstance(value, list):
        return f"a list of {len(value)}"
    names = {dict: "an object", str: "text", bool: "true or false", type(None): "null"}
    return names.get(
        type(value), f"a number ({value})" if isinstance(value, int | float) else "no text"
    )


_READERS: dict[str, Callable[[str], Rows]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
}
