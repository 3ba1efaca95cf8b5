# SPDX-License-Identifier: Apache-2.0
"""Rows of Parquet and Arrow data, a batch at a time.

A struct's field that is null and one that is absent are the same in Arrow: inside a column's values such fields are
left out. Columns of types that have no one spelling as text (dates, decimals, bytes) are `records.Unread`, so that
they are told of where they are used and nowhere else.
"""

import io
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

from jft.data import examples, files, records

Rows = Iterator[records.Record | examples.Fault]

BATCH = 1000  # rows
_EMPTY = 1_000_000  # values that may take no bytes, such as nulls


def read_parquet(path: str, file: io.BufferedReader) -> Rows:
    """A Parquet file, as it is: read_table would take column values from folder names such as "split=train"."""
    import pyarrow.parquet

    def batches() -> Iterable[Any]:
        opened = pyarrow.parquet.ParquetFile(_seekable(path, file))
        groups = (opened.metadata.row_group(i) for i in range(opened.metadata.num_row_groups))
        unpacked = sum(group.total_byte_size for group in groups)
        _check_count(opened.metadata.num_rows, unpacked)
        if unpacked > max(files.UNPACKED, files.RATIO * pathlib.Path(path).stat().st_size):
            raise ValueError(
                f"unpacks to {unpacked:,} bytes, more than {files.RATIO} times its size"
            )
        return opened.iter_batches(batch_size=BATCH)

    yield from _read(path, "Parquet", batches)


def read_arrow(path: str, file: io.BufferedReader) -> Rows:
    """An Arrow IPC file, or a stream such as datasets writes."""
    import pyarrow.ipc

    def batches() -> Iterable[Any]:
        is_file = file.peek(6)[:6] == b"ARROW1"
        source = _seekable(path, file)
        if not is_file:
            return pyarrow.ipc.open_stream(source)
        opened = pyarrow.ipc.open_file(source)
        return (opened.get_batch(i) for i in range(opened.num_record_batches))

    def checked() -> Iterator[Any]:
        for batch in batches():
            # Offsets are taken from the file as they are: a damaged one would be read past its end.
            batch.validate(full=True)
            yield batch

    yield from _read(path, "Arrow", checked)


def rows_of(path: str, batches: Iterable[Any], first: int = 1) -> Iterator[records.Record]:
    """The rows of record batches or tables, numbered from `first`.

    Raises:
        ValueError: two columns have one name.
    """
    number = first
    for batch in batches:
        names = list(batch.schema.names)
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"column {twice!r} stands twice; rename one")
        _check_count(batch.num_rows, batch.nbytes)
        for start in range(0, batch.num_rows, BATCH):
            part = batch.slice(start, BATCH)
            columns = [_values(part.column(i)) for i in range(len(names))]
            for values in zip(*columns, strict=True):
                yield records.Record(path, number, dict(zip(names, values, strict=True)))
                number += 1


def _check_count(count: int, size: int) -> None:
    """Refuses rows, or values in lists, that are too many to be in so many bytes: each takes a bit or more.

    Raises:
        ValueError: they are.
    """
    if count > _EMPTY and count > 8 * size:
        raise ValueError(f"says that it holds {count:,} values in {size:,} bytes")


def _check_lists(values: Any) -> None:
    """Of lists of any depth: a list of nulls has any length in no bytes at all."""
    import pyarrow

    types = pyarrow.types
    if isinstance(values, pyarrow.ChunkedArray):
        for chunk in values.chunks:
            _check_lists(chunk)
        return
    _check_count(len(values), values.nbytes)
    if types.is_struct(values.type):
        for i in range(values.type.num_fields):
            _check_lists(values.field(i))
    elif types.is_fixed_size_list(values.type):
        _check_count(len(values) * values.type.list_size, values.nbytes)
        _check_lists(values.flatten())
    elif types.is_nested(values.type) and not types.is_union(values.type):
        if types.is_list_view(values.type) or types.is_large_list_view(values.type):
            raise ValueError(f"column of the type {values.type}, which is not read")
        _check_lists(values.values if hasattr(values, "values") else values.flatten())


def _read(path: str, what: str, batches: Any) -> Rows:
    import pyarrow

    number = 0
    try:
        for row in rows_of(path, batches()):
            number = row.number
            yield row
    except (pyarrow.ArrowException, *files.DAMAGE, ValueError) as error:
        told = f"not {what} data as it should be: {records.one_line(error)}"
        yield records.rest(path, number + 1, told, "write the file again")


def _seekable(path: str, file: io.BufferedReader) -> Any:
    import pyarrow

    if isinstance(file.raw, io.FileIO):
        return pyarrow.OSFile(path)  # a map of a file that is cut meanwhile would end the process
    return pyarrow.BufferReader(file.read())


def _values(column: Any) -> list[Any]:
    """A column as Python values."""
    import pyarrow

    types = pyarrow.types
    if types.is_nested(column.type):
        _check_lists(column)
    kind = column.type.value_type if types.is_dictionary(column.type) else column.type
    if types.is_temporal(kind) or types.is_decimal(kind) or _is_binary(kind):
        name = "a decimal number" if types.is_decimal(kind) else "a date or time"
        mark = records.Unread(f"{'bytes' if _is_binary(kind) else name} ({kind})")
        return [mark if held else None for held in column.is_valid().to_pylist()]
    try:
        values = column.to_pylist()
    except (ValueError, ImportError, pyarrow.ArrowException):  # text that is not UTF-8, times in ns
        values = [_value(scalar) for scalar in column]
    return [_filled(value) for value in values] if types.is_nested(kind) else values


def _is_binary(kind: Any) -> bool:
    import pyarrow

    types = pyarrow.types
    return any(
        test(kind) for test in (types.is_binary, types.is_large_binary, types.is_fixed_size_binary)
    )


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return records.Unread(f"not UTF-8 ({error.reason} at byte {error.start})")
    except (ValueError, ImportError) as error:
        return records.Unread(f"of type {scalar.type} ({records.one_line(error)})")


def _filled(value: Any) -> Any:
    """A nested value without the null fields of its structs."""
    if isinstance(value, dict):
        return {key: _filled(held) for key, held in value.items() if held is not None}
    if isinstance(value, list):
        return [_filled(held) for held in value]
    return value
