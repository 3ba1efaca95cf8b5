# SPDX-License-Identifier: Apache-2.0
"""Target of `fuzz`: data files. Valid ones of every format, mutated, must give examples and faults and nothing else.

tests/data/test_fuzz.py runs a few of the same.
"""

import bz2
import collections
import csv
import dataclasses
import gzip
import io
import json
import lzma
import pathlib
import random
from collections.abc import Callable
from typing import Any

from jft import errors
from jft.data import examples, formats, readers

TEXTS = (
    "a",
    "B c",
    " ",
    "",
    "007",
    "NA",
    'say "x"',
    "two\nlines",
    "a\r\nb",
    "é\u2028\u0085",
    "\U0001f600",
    "\t",
    "{x}",
)
PIECES = (
    *(b'"', b"'", b",", b";", b"\n", b"\r", b"\r\n", b"\t", b"\0", b"\\", b"{", b"}", b"[", b"]"),
    *(b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\xff\xfe", b"\xe2\x80\xa8", b"\xc2\x85", b"\\ud800", b"\\u0000"),
    *(b"NaN", b"null", b"-Infinity", b"1e999", b"9" * 5000, b"[" * 100_000, b'{"a":' * 2000, b'"prompt": "x", '),
    *(b"PAR1", b"ARROW1", b"\x1f\x8b", b"true", b"    ", b"\n\n\n", b'""', b"x" * 70_000),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Case:
    """A file: its name, its bytes, and, where they are known, what they unpack to and how many rows were written."""

    name: str
    data: bytes
    content: bytes | None
    rows: int | None
    reading: formats.Reading

    @property
    def kind(self) -> str:
        return self.name.split(".")[1]


def make(source: random.Random) -> Case:
    """A case from a source of random numbers."""
    rows = _rows(source)
    for _ in range(source.choice((0, 0, 1, 3))):
        _spoil(source, rows)
    kind = source.choice(list(WRITERS))
    try:
        content = WRITERS[kind](rows)
    except Exception:  # what a format can't hold, such as columns of several types in Arrow's
        kind, content = "jsonl", WRITERS["jsonl"](rows)
    count: int | None = len(rows)
    for _ in range(source.choice((0, 1, 1, 2, 5))):
        content, count = _mutate(source, content), None
    ending = source.choice(("", "", "", ".gz", ".bz2", ".xz"))
    data = PACKERS[ending](content)
    known: bytes | None = content
    if ending and source.random() < 0.5:
        data, known, count = _mutate(source, data), None, None
    return Case(f"data.{kind}{ending}", data, known, count, _reading(source, rows))


def check(case: Case, folder: pathlib.Path) -> collections.Counter[str]:
    """Reads a case and counts what came of it.

    Raises:
        AssertionError: a promise of the reading does not hold.
    """
    path = folder / case.name
    path.write_bytes(case.data)
    found = collections.Counter[str]()
    try:
        table = formats.Table(str(path), case.reading)
        rows = list(table)
    except errors.UserError as error:
        _check_line(str(error), str(path))
        return collections.Counter({"refused": 1})
    assert rows == list(formats.Table(str(path), case.reading)), "read twice, it differs"
    for row in rows:
        found[type(row).__name__] += 1
        if isinstance(row, examples.Fault):
            _check_line(row.message, str(path))
            assert row.kind in ("malformed", "empty"), row
        else:
            _check_example(row)
    numbers = [row.number for row in rows]
    assert numbers == sorted(set(numbers)), f"rows are numbered {numbers}"
    if case.rows is not None and not _broken_off(rows):
        names = not case.reading.header and case.kind in ("csv", "tsv")  # are read as a row
        assert len(rows) == case.rows + names, f"{case.rows} rows written, {len(rows)} told of"
    if case.content is not None and case.kind in ORACLES:
        values = list(readers.stream(str(path), header=case.reading.header))
        ORACLES[case.kind](case.content, values)
    return found


def _broken_off(rows: list[Any]) -> bool:
    last = rows[-1]
    return isinstance(last, examples.Fault) and (
        last.number == 0 or "nothing from row" in last.message
    )


def _check_line(message: str, path: str) -> None:
    assert "\n" not in message and "\r" not in message, f"several lines: {message!r}"
    assert message.startswith((path, "data.")), f"no place: {message!r}"
    assert len(message) < 2000, f"{len(message)} characters: {message[:300]!r}"


def _check_example(example: examples.Example) -> None:
    json.dumps(dataclasses.asdict(example)).encode()
    assert (example.text != "") != bool(example.messages), example
    for turns in (example.messages, example.messages[:-1] + example.rejected):
        for turn in turns:
            turn["content"].encode()
            assert turn["role"] in ("system", "user", "assistant", "tool"), turn
    if example.messages:
        assert example.messages[-1]["role"] == "assistant", example
    if example.rejected:
        assert example.rejected[-1]["role"] == "assistant", example


def _strict(text: str) -> Any:
    """A value by json itself; refuses what our decoder must."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        assert len({key for key, _ in pairs}) == len(pairs)
        return dict(pairs)

    def refuse(name: str) -> Any:
        raise AssertionError(name)

    return json.loads(text, object_pairs_hook=unique, parse_constant=refuse)


def _values(rows: list[Any]) -> list[Any]:
    return [row.value for row in rows if isinstance(row, readers.Record)]


def _compare_lines(content: bytes, rows: list[Any]) -> None:
    if _broken_off(rows):
        return
    lines = [(i, line) for i, line in enumerate(content.split(b"\n"), 1)]
    lines = [(i, line.removeprefix(b"\xef\xbb\xbf")) for i, line in lines]
    lines = [(i, line) for i, line in lines if line.strip()]
    assert [row.number for row in rows] == [i for i, _ in lines], "lines and rows differ"
    for row, (_, line) in zip(rows, lines, strict=True):
        try:
            value = _strict(line.decode())
        except (ValueError, AssertionError, RecursionError):
            assert isinstance(row, examples.Fault), f"json refuses {line[:200]!r}"
        else:
            assert isinstance(row, readers.Record) and row.value == value, f"{line[:200]!r}"


def _compare_list(content: bytes, rows: list[Any]) -> None:
    try:
        value = _strict(content.decode("utf-8-sig"))
    except (ValueError, AssertionError, RecursionError):
        value = None
    if isinstance(value, list) and value:
        assert _values(rows) == value, "json reads another list"
    elif content.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"[":
        assert any(isinstance(row, examples.Fault) for row in rows), "json refuses it"


def _compare_csv(content: bytes, rows: list[Any]) -> None:
    if any(isinstance(row, examples.Fault) for row in rows):
        return
    text = content.decode("utf-8-sig")
    fields = [row for row in csv.reader(io.StringIO(text, newline="")) if row]
    values = [list(value.values()) for value in _values(rows)]
    assert values in (fields, fields[1:]), "csv reads other fields"


def _rows(source: random.Random) -> list[dict[str, Any]]:
    """Rows of one shape."""
    text = lambda: "".join(source.choice(TEXTS) for _ in range(source.randint(1, 3)))  # noqa: E731
    turn = lambda role: {"role": role, "content": text()}  # noqa: E731
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": "{}"}]}
    makers: tuple[Callable[[], dict[str, Any]], ...] = (
        lambda: {"prompt": text(), "response": text()},
        lambda: {"instruction": text(), "input": text(), "output": text(), "id": text()},
        lambda: {"messages": [turn("user"), turn("assistant")] * source.randint(1, 2)},
        lambda: {"messages": [turn("system"), turn("user"), call, turn("tool"), turn("assistant")]},
        lambda: {"conversations": [{"from": who, "value": text()} for who in ("human", "gpt")], "tools": "[]"},
        lambda: {"text": text()},
        lambda: {"prompt": text(), "chosen": text(), "rejected": text()},
        lambda: {key: [turn("user") | {"content": "u"}, turn("assistant")] for key in ("chosen", "rejected")},
        lambda: {"prompt": text(), "completion": text(), "label": source.random() < 0.5},
        lambda: {"query": text(), "choices": [text(), text()], "gold": source.randint(0, 1)},
    )  # fmt: skip
    maker = source.choice(makers)
    return [maker() for _ in range(source.randint(1, 6))]


def _spoil(source: random.Random, rows: list[dict[str, Any]]) -> None:
    """Changes one value, key or turn somewhere in the rows."""
    odd = source.choice(
        (None, 0, 1.5, True, "", "x", [], {}, [[]], ["a"], {"role": "user"}, "\ud800", "\0", 10**30)
    )
    holder: Any = source.choice(rows)
    while True:
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        if not keys:
            return
        key = source.choice(keys)
        if isinstance(holder[key], dict | list) and source.random() < 0.7:
            holder = holder[key]
            continue
        break
    match source.randint(0, 3):
        case 0:
            del holder[key]
        case 1 if isinstance(holder, dict):
            holder[
                source.choice(("response", "messages", "role", "weight", "label", "system", "name"))
            ] = odd
        case 2 if isinstance(holder, list):
            holder.insert(key, holder[key])
        case _:
            holder[key] = odd


def _mutate(source: random.Random, data: bytes) -> bytes:
    at = source.randint(0, len(data))
    to = min(len(data), at + source.choice((1, 2, 8, 64)))
    match source.randint(0, 6):
        case 0:
            return data[:at]
        case 1:
            return data[:at] + data[to:]
        case 2:
            return data[:to] + data[at:]
        case 3:
            return data[:at] + bytes([source.randint(0, 255)]) + data[at + 1 :]
        case 4:
            return data[at:] + data[:at]
        case _:
            return data[:at] + source.choice(PIECES) + data[at:]


def _reading(source: random.Random, rows: list[dict[str, Any]]) -> formats.Reading:
    if source.random() < 0.7:
        return formats.Reading()
    names = [*(list(rows[0]) or ["a"]), "0", "1", "nope", ""]
    roles = source.sample(
        ("prompt", "response", "messages", "text", "chosen", "label", "tools", "bad"), 2
    )
    columns = {role: source.choice(names) for role in roles}
    return formats.Reading(columns, source.random() < 0.8, source.choice(("", "", " ", "x")))


def _table(rows: list[dict[str, Any]]) -> Any:
    import pyarrow

    for row in rows:
        json.dumps(row, ensure_ascii=False).encode()  # Arrow holds no halves of surrogate pairs
    return pyarrow.Table.from_pylist(rows)


def _parquet(rows: list[dict[str, Any]]) -> bytes:
    import pyarrow.parquet

    out = io.BytesIO()
    pyarrow.parquet.write_table(_table(rows), out, row_group_size=2)
    return out.getvalue()


def _arrow(rows: list[dict[str, Any]]) -> bytes:
    import pyarrow.ipc

    out, table = io.BytesIO(), _table(rows)
    make = pyarrow.ipc.new_stream if len(rows) % 2 else pyarrow.ipc.new_file
    with make(out, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return out.getvalue()


def _delimited(rows: list[dict[str, Any]], *, tabs: bool = False) -> bytes:
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, *([row.get(name, "") for name in names] for row in rows)]
    texts = [[v if isinstance(v, str) else json.dumps(v) for v in line] for line in lines]
    if not names or any(not any(line) for line in texts):
        raise ValueError("an empty line is no row")
    out = io.StringIO(newline="")
    if tabs:
        flat = [[" ".join(field.split()).strip('"') or "-" for field in line] for line in texts]
        out.writelines("\t".join(line) + "\n" for line in flat)
    else:
        csv.writer(out).writerows(texts)
    return out.getvalue().encode()


WRITERS: dict[str, Callable[[list[dict[str, Any]]], bytes]] = {
    "jsonl": lambda rows: "".join(json.dumps(row) + "\n" for row in rows).encode(),
    "ndjson": lambda rows: "".join(
        json.dumps(row, ensure_ascii=False) + "\r\n" for row in rows
    ).encode("utf-8", "surrogatepass"),
    "json": lambda rows: json.dumps(rows, indent=len(rows) % 3 or None).encode(),
    "csv": _delimited,
    "tsv": lambda rows: _delimited(rows, tabs=True),
    "parquet": _parquet,
    "arrow": _arrow,
}
PACKERS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
ORACLES: dict[str, Callable[[bytes, list[Any]], None]] = {
    "jsonl": _compare_lines,
    "ndjson": _compare_lines,
    "json": _compare_list,
    "csv": _compare_csv,
}


class Data:
    """The target. Beside the data file lie what it was made of and how it is read."""

    def seeds(self) -> tuple[dict[str, bytes], ...]:
        return ()

    def make(self, source: random.Random) -> dict[str, bytes]:
        case = make(source)
        reading = dataclasses.asdict(case.reading)
        files = {
            case.name: case.data,
            "case.json": json.dumps([case.name, case.rows, reading]).encode(),
        }
        return files | ({} if case.content is None else {"content": case.content})

    def read(self, folder: pathlib.Path) -> str:
        name, rows, reading = json.loads((folder / "case.json").read_bytes())
        content = folder / "content"
        known = content.read_bytes() if content.exists() else None
        case = Case(name, (folder / name).read_bytes(), known, rows, formats.Reading(**reading))
        found = check(case, folder)
        return "+".join(sorted(found)) or "empty"
