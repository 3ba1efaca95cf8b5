# SPDX-License-Identifier: Apache-2.0
"""A row as it stands in its file, and what is said of rows that do not."""

import dataclasses
from typing import Any

from jft.data import examples


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """A row: its file, its number there (the line in JSON lines, else its place from 1), its value."""

    path: str
    number: int
    value: Any


@dataclasses.dataclass(frozen=True, slots=True)
class Unread:
    """A value of a type that has no one spelling as text, such as a date; an error only where it is used."""

    kind: str  # "a date (date32[day])"


def fault(path: str, number: int, what: str, *, kind: str = "malformed") -> examples.Fault:
    """One row that can't be read."""
    return examples.Fault(kind, f"{path}:row {number}: {cut(what)}", path, number)


def whole(path: str, what: str, *, kind: str = "malformed") -> examples.Fault:
    """A file of which no row can be read; its number is 0."""
    return examples.Fault(kind, f"{path}: {cut(what)}", path, 0)


def rest(path: str, number: int, what: str, advice: str) -> examples.Fault:
    """The end of reading: from row `number` on nothing can be had."""
    if number <= 1:
        return whole(path, f"{what}; {advice}")
    return fault(path, number, f"{what}; nothing from row {number} on could be read; {advice}")


def kind(value: Any) -> str:
    """A value's kind in words, for messages."""
    if isinstance(value, Unread):
        return value.kind
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"a number ({value:.10g})" if abs(value) < 1e300 else "a number"
    names = {dict: "an object", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), f"no text but a {type(value).__name__}")


def one_line(error: BaseException | str) -> str:
    """Another library's message in one line."""
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:299] + "…"


def cut(message: str) -> str:
    """Our own, which may quote a name or a value of any length and with line ends in it."""
    if not message.isprintable():
        message = " ".join(message.split())
    return message if len(message) <= 1000 else message[:999] + "…"
