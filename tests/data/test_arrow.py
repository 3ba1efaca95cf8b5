# SPDX-License-Identifier: Apache-2.0
"""Columns of Parquet and Arrow: what is text stays it, what has no one spelling is never given one."""

import datetime
import decimal
import io
import pathlib

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest

from jft.data import examples, formats, readers


def test_columns_of_arrow(tmp_path: pathlib.Path) -> None:
    day, price = datetime.date(2024, 1, 2), decimal.Decimal("1.10")
    table = pyarrow.table(
        {
            "text": ["a", None],
            "list": pyarrow.array([["b"], []], pyarrow.large_list(pyarrow.string())),
            "turns": [[{"role": "user", "content": "u", "name": None}], None],
            "day": [day, None],
            "price": [price, price],
            "bytes": [b"x", None],
            "time": pyarrow.array([1, None], pyarrow.timestamp("ns", "UTC")),
            "flag": [True, False],
            "broken": pyarrow.array([b"ok", b"\xff"]).view(pyarrow.string()),
        }
    )
    path = str(tmp_path / "a.parquet")
    pyarrow.parquet.write_table(table, path, store_schema=False)
    first, second = (row.value for row in readers.stream(path))  # type: ignore[union-attr]
    assert (first["text"], first["list"], first["flag"]) == ("a", ["b"], True)
    assert first["turns"] == [{"role": "user", "content": "u"}]  # a null field is an absent one
    assert [second[name] for name in ("text", "list", "turns", "day", "time")] == [
        None,
        [],
        None,
        None,
        None,
    ]
    assert readers.kind(first["day"]) == "a date or time (date32[day])"
    assert readers.kind(first["price"]) == "a decimal number (decimal128(3, 2))"
    assert readers.kind(first["bytes"]) == "bytes (binary)"
    assert first["broken"] == "ok"
    assert readers.kind(second["broken"]) == "not UTF-8 (invalid start byte at byte 0)"
    for name, told in (("day", "a date or time"), ("price", "a decimal"), ("broken", None)):
        reading = formats.Reading({"prompt": name, "response": "flag"})
        message = next(
            row.message for row in formats.Table(path, reading) if isinstance(row, examples.Fault)
        )
        assert f"the prompt (column {name!r}) is {told}" in message or told is None


@pytest.mark.parametrize("stream", [True, False])
def test_damaged_arrow_ends_in_a_line(tmp_path: pathlib.Path, stream: bool) -> None:
    """Found by fuzzing: pyarrow follows a damaged file's lengths and offsets out of its memory."""
    table = pyarrow.table({"prompt": pyarrow.array(["", "p", "pp"], pyarrow.large_string())})
    out = io.BytesIO()
    make = pyarrow.ipc.new_stream if stream else pyarrow.ipc.new_file
    with make(out, table.schema) as writer:
        writer.write_table(table)
    whole = out.getvalue()
    offsets = b"".join(at.to_bytes(8, "little") for at in (0, 0, 1, 3))
    length = (3).to_bytes(8, "little")
    for good, bad in (
        (offsets, offsets[:8] + b"\xff\xff\xff\x7f\0\0\0\0" + offsets[16:]),
        (offsets, offsets[:24] + b"\0\0\0\0\0\0\0\x80"),
        (length, b"\xff\xff\xff\xff\0\0\0\0"),
        (length, b"\0\0\0\0\0\0\0\xe2"),
    ):
        assert good in whole
        path = tmp_path / "a.arrow"
        path.write_bytes(whole.replace(good, bad))
        (fault,) = readers.stream(str(path))
        assert isinstance(fault, examples.Fault)
        assert fault.message.startswith(f"{path}: not Arrow data as it should be: ")
