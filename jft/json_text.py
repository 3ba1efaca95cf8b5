# SPDX-License-Identifier: Apache-2.0
"""JSON of files that others wrote: what can't be read is told in one line, and nothing nests so deep as to break readers.

Python's parser stops at about a thousand levels, and what it lets through breaks the next function that goes through
it: repr, json.dumps or a comparison. No file that is read here needs more than ten.
"""

import collections
import json
import os
import pathlib
from collections.abc import Iterable
from typing import Any

from jft import errors

DEEPEST = 48  # levels
LARGEST = 1 << 28  # bytes of a file; the largest tokenizers have 35 million
_SHOWN = 120  # characters of a value in a message


def read(path: pathlib.Path, *, unique: bool = False) -> Any:
    """A file's value; as `loads`.

    Raises:
      errors.UserError: it can't be read, or is not JSON.
    """
    try:
        with path.open("rb") as file:
            # Not the limit: a buffer of as many bytes as may come is allocated before any does.
            text = file.read(min(os.fstat(file.fileno()).st_size, LARGEST) + 1)
    except OSError as error:
        raise errors.UserError(f"{path}: {error.strerror or error}") from error
    if len(text) > LARGEST:
        raise errors.UserError(f"{path}: has more than {LARGEST:,} bytes, too many for JSON")
    return loads(text, f"{path}:", unique=unique)


def loads(text: bytes | str, what: str, *, unique: bool = False, finite: bool = False) -> Any:
    """The one value of a text.

    Args:
      text: bytes are UTF-8.
      what: begins the message, which goes on "not JSON: ...".
      unique: refuse an object that has a key twice, of which Python takes the last.
      finite: refuse NaN and Infinity, which are not JSON and which Python takes.

    Raises:
      errors.UserError: it is not JSON, or too deep.
    """

    def checked(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        held = dict(pairs)
        if len(held) < len(pairs):
            counts = collections.Counter(key for key, _ in pairs)
            twice = next(key for key, count in counts.items() if count > 1)
            raise ValueError(f"{twice!r:.{_SHOWN}} is there twice")
        return held

    def constant(name: str) -> Any:
        raise ValueError(f"{name} is no number")

    hooks: dict[str, Any] = {"object_pairs_hook": checked} if unique else {}
    hooks |= {"parse_constant": constant} if finite else {}
    try:
        value = json.loads(text.decode("utf-8-sig") if isinstance(text, bytes) else text, **hooks)
    except (ValueError, RecursionError) as error:
        raise errors.UserError(f"{what} not JSON: {_cause(error)}") from None
    if too_deep(value):
        raise errors.UserError(f"{what} not JSON that is read here: more than {DEEPEST} levels")
    return value


def too_deep(value: Any, deepest: int = DEEPEST) -> bool:
    """Whether lists and objects nest too deep."""
    level: list[Any] = [value]
    for _ in range(deepest + 1):
        level = [part for held in level for part in _parts(held) if type(part) in (dict, list)]
        if not level:
            return False
    return True


def _parts(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _cause(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if "integer string conversion" in str(error):
        return "a number has more than 4,300 digits"
    return str(error)


def shown(value: Any) -> str:
    """A value of a file in a message: one line, not long, and nothing that a terminal would obey."""
    text = value if isinstance(value, str) and value.isprintable() else repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]} ..."
