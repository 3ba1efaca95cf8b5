# SPDX-License-Identifier: Apache-2.0
"""Rows of JSON lines and of JSON lists, one at a time, exactly.

Python's json keeps the last of two equal keys and takes NaN for a number; here both are faults of their row. Lines
are split as bytes, at b"\\n" alone: str.splitlines() would also split inside strings, at U+0085 and U+2028.
"""

import codecs
import collections
import functools
import io
import json
from collections.abc import Generator, Iterator
from typing import Any

from jft.data import examples, files, records

Rows = Iterator[records.Record | examples.Fault]

_BOM = b"\xef\xbb\xbf"
_BLANK = " \t\r\n"
_CHUNK = 1 << 16
_SPREAD = {  # how JSON begins that is written over several lines
    b"[": "its first line is [ alone: this is a list, not JSON lines; give its name the ending .json",
    b"{": "its first line is { alone, and a row is one line here; write each object in one line",
}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        counts = collections.Counter(key for key, _ in pairs)
        twice = next(key for key, count in counts.items() if count > 1)
        raise ValueError(f"key {twice!r} stands twice; keep one of them")
    return value


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON; write null or a number")


# Made once: json.loads with a hook makes a decoder for every call, which takes longer than a small row does.
_STRICT = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse)
# Finds where a value ends that the strict one refuses.
_LENIENT = json.JSONDecoder(parse_int=str)


def decode(text: str) -> Any:
    """The one value that a text holds.

    Raises:
        ValueError: it is not JSON, or holds a key twice, NaN or Infinity.
        RecursionError: it is nested too deeply.
    """
    return _STRICT.decode(text)


def explain(error: Exception) -> str:
    """What is wrong with a text that `decode` refused, in one line."""
    if isinstance(error, RecursionError):
        return "bad JSON: nested too deeply; take the value out"
    if not isinstance(error, json.JSONDecodeError):
        if "integer string conversion" in str(error):
            return "bad JSON: a number has over 4,300 digits; write it as text"
        return f"bad JSON: {records.one_line(error)}"
    if "\0" in error.doc:
        return "bad JSON: the row holds NUL bytes, so the file is damaged; take the row out"
    return f"bad JSON at column {error.colno}: {_told(error)}; {_advice(error)}"


def _told(error: json.JSONDecodeError) -> str:
    return error.msg.removesuffix(" at").removesuffix(" starting")


def _advice(error: json.JSONDecodeError) -> str:
    """What to do about a line that is not one value."""
    doc, at = error.doc, error.pos
    if "\r" in (doc[at : at + 1], doc[at - 1 : at]) and doc[at:].strip(_BLANK):
        return "a line ends with CR alone: save the file with LF line ends"
    if error.msg == "Extra data":
        return "a line holds one object and nothing else"
    if error.msg.startswith("Unterminated") or at >= len(doc.rstrip(_BLANK)):
        return "the value does not end in its line: write each object in one line"
    if error.msg.startswith("Invalid control character"):
        return "inside a text write a tab as \\t and a line end as \\n"
    return "mend it there"


def read_lines(path: str, file: io.BufferedReader) -> Rows:
    """JSON lines; a row's number is its line, and blank lines count."""
    first = True
    lines = iter(functools.partial(file.readline, files.LONGEST), b"")
    for number, line in enumerate(lines, start=1):
        if len(line) == files.LONGEST:
            told = f"a line has {files.LONGEST:,} bytes and does not end"
            yield records.rest(path, number, told, "write each row in one line")
            return
        if line.startswith(_BOM):  # also in the middle, where files were joined
            line = line[3:]
        if not line or line.isspace():
            continue
        if first and line.strip() in (b"[", b"{"):
            yield records.whole(path, _SPREAD[line.strip()])
            return
        first = False
        try:
            yield records.Record(path, number, _STRICT.decode(str(line, "utf-8")))
        except UnicodeDecodeError as error:
            what = f"not UTF-8 ({error.reason} at byte {error.start} of the line)"
            yield records.fault(path, number, f"{what}; save the file as UTF-8")
        except (ValueError, RecursionError) as error:
            yield records.fault(path, number, explain(error))


def read_file(path: str, file: io.BufferedReader) -> Rows:
    """A .json file: a list of rows, or JSON lines under another name."""
    text = _Text(file)
    first = text.next_character()
    if first == "[":
        yield from _read_list(path, text)
    elif first:
        yield from _read_others(path, text)


class _Text:
    """A file's text from a place on; what is held grows only as far as one value needs.

    Bytes that are not UTF-8 become halves of surrogate pairs, which no UTF-8 text has: they spoil one row, not the file.
    """

    def __init__(self, file: io.BufferedReader) -> None:
        self._file = file
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self.held, self.at, self.ended = "", 0, False
        self.line, self._column = 1, 0  # where `held` begins
        while not self.held and not self.ended:
            self.more()
        self.at = int(self.held.startswith("\ufeff"))

    def more(self) -> None:
        """Reads on, as much again as is held: a long value is tried a few times only.

        Raises:
            json.JSONDecodeError: a value is longer than any row.
        """
        if len(self.held) - self.at > files.LONGEST:
            raise json.JSONDecodeError(
                f"a value of over {files.LONGEST:,} characters", self.held, self.at
            )
        data = self._file.read1(max(_CHUNK, len(self.held) - self.at))
        self.ended = not data
        done = self.held[: self.at]
        self.line += done.count("\n")
        self._column = (self._column if "\n" not in done else 0) + len(done.rpartition("\n")[2])
        self.held = self.held[self.at :] + self._decoder.decode(data, final=self.ended)
        self.at = 0

    def next_character(self) -> str:
        """The next character that is not blank, at which `at` is left; empty at the end."""
        while True:
            while self.at < len(self.held):
                if self.held[self.at] not in _BLANK:
                    return self.held[self.at]
                self.at += 1
            if self.ended:
                return ""
            self.more()

    def value(self, decoder: json.JSONDecoder) -> tuple[Any, int]:
        """The value at `at`, and where it ends; raises what `decode` does."""
        while True:
            try:
                value, end = decoder.raw_decode(self.held, self.at)
                # What follows tells whether a number such as 1 goes on, as in 1.5 or 1e5.
                after = self.held[end : end + 4]
                if self.ended or len(after) == 4 or after[:1] in (*_BLANK, ",", "]", "}"):
                    return value, end
            except json.JSONDecodeError as error:
                # Only a value cut off by the end of what is held may get better by reading on.
                cut = error.msg.startswith("Unterminated") or error.pos + 16 > len(self.held)
                if self.ended or not cut:
                    raise
            self.more()

    def place(self, position: int) -> str:
        """A position in `held` as line and column."""
        before = self.held[:position]
        column = len(before.rpartition("\n")[2]) + (0 if "\n" in before else self._column)
        return f"line {self.line + before.count(chr(10))}, column {column + 1}"


def _read_list(path: str, text: _Text) -> Rows:
    text.at += 1
    count: int | None = 0
    if text.next_character() != "]":
        count = yield from _elements(path, text)
    if count is None:
        return
    text.at += 1
    if text.next_character():
        told = f"text follows the list at {text.place(text.at)}"
        yield records.rest(path, count + 1, told, "write one list and nothing after it")


def _elements(
    path: str, text: _Text
) -> Generator[records.Record | examples.Fault, None, int | None]:
    """The rows of a list; returns their count at its closing bracket, None where it can't be read on."""
    number = 1
    while True:
        if text.next_character() == "]":
            told = f"bad JSON at {text.place(text.at)}: a comma stands before ]"
            break
        try:
            row, end = _element(path, number, text)
        except json.JSONDecodeError as error:
            told = f"bad JSON at {text.place(error.pos)}: {_told(error)}"
            break
        except RecursionError as error:
            told = explain(error)
            break
        yield row
        text.at = end
        found = text.next_character()
        if found == "]":
            return number
        number += 1
        if found != ",":
            why = "a comma or ] is missing" if found else "the list does not end"
            told = f"bad JSON at {text.place(text.at)}: {why}"
            break
        text.at += 1
    yield records.rest(path, number, told, "mend it there")
    return None


def _element(path: str, number: int, text: _Text) -> tuple[records.Record | examples.Fault, int]:
    try:
        value, end = text.value(_STRICT)
    except json.JSONDecodeError:
        raise
    except ValueError as error:  # a key that stands twice, NaN: the value's end can still be found
        _, end = text.value(_LENIENT)
        return records.fault(path, number, explain(error)), end
    held = text.held[text.at : end]
    try:
        if not held.isascii():
            held.encode()
    except UnicodeEncodeError as error:
        where = text.place(text.at + error.start)
        return records.fault(path, number, f"not UTF-8 at {where}; save the file as UTF-8"), end
    return records.Record(path, number, value), end


def _read_others(path: str, text: _Text) -> Rows:
    """A file that is no list: JSON lines, or one object."""
    while "\n" not in text.held[text.at :].rstrip(_BLANK) and not text.ended:
        text.more()
    first, _, others = text.held[text.at :].partition("\n")
    if first.rstrip(_BLANK).endswith("}") and others.strip(_BLANK):
        with files.open_bytes(path) as again:
            yield from read_lines(path, again)
        return
    yield records.whole(path, _not_a_list(text))


def _not_a_list(text: _Text) -> str:
    try:
        while not text.ended:
            text.more()
        value, end = text.value(_STRICT)
    except json.JSONDecodeError as error:
        return f"bad JSON at {text.place(error.pos)}: {error.msg}; mend it there"
    except (ValueError, RecursionError) as error:
        return explain(error)
    if text.held[end:].strip(_BLANK):
        return f"text follows the first value at {text.place(end)}; write a list: [{{...}}, ...]"
    lists = (
        [key for key, held in value.items() if isinstance(held, list)]
        if isinstance(value, dict)
        else []
    )
    advice = f"save its list {lists[0]!r} alone" if len(lists) == 1 else "write [{...}, ...]"
    return f"holds {records.kind(value)}, not a list of rows; {advice}"
