# SPDX-License-Identifier: Apache-2.0
"""How `fuzz` spoils what is valid: bytes, and JSON by its structure."""

import copy
import json
import math
import random
from typing import Any

NUMBERS = (
    *(0, 1, 2, 3, 7, 8, 127, 128, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1),
    *(2**53, 2**60, 2**63 - 1, 2**63, 2**64 - 1),
)
_DEEP: Any = 1
for _ in range(60):
    _DEEP = [_DEEP]
ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 64, 2**31, 2**63, 10**30, 10**400, 0.5, -0.0, 1e308),
    *(math.nan, math.inf, -math.inf, "", "x", "a\nb", "\x1b[31m", "\ud800", "\u202e", "a" * 5000),
    *("../x", "/etc/passwd", "a/../../x", ".", "..", "\0", "0", "true", "F32", "..\\x"),
    *([], {}, [[]], [None], ["x"], {"x": 1}, _DEEP, [0] * 2000, {str(i): i for i in range(500)}),
)
PIECES = (
    *(b"\0", b"\xff", b"\n", b'"', b"\\", b"{", b"}", b"[", b"]", b",", b":", b"NaN", b"9" * 5000),
    *(b"[" * 100_000, b'{"a":' * 2000, b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\xff\xfe", b"\\ud800"),
    *(b"\0" * 64, b"x" * 70_000, b'"a":1,', b"1e999", b"-1", b"null", b"../"),
)


def spoil_bytes(source: random.Random, data: bytes) -> bytes:
    """Cuts, repeats, moves or changes a stretch, or writes a number over it."""
    at = source.randint(0, len(data))
    to = min(len(data), at + source.choice((1, 2, 4, 8, 64, 1000)))
    match source.randint(0, 8):
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
        case 5 if data:
            at = min(at, len(data) - 1)
            return data[:at] + bytes([data[at] ^ (1 << source.randint(0, 7))]) + data[at + 1 :]
        case 6:
            size = source.choice((1, 2, 4, 8))
            number = source.choice(NUMBERS) % (1 << 8 * size)
            return data[:at] + number.to_bytes(size, "little") + data[at + size :]
        case _:
            return data[:at] + source.choice(PIECES) + data[at:]


def spoil(source: random.Random, value: Any, words: tuple[str, ...] = ()) -> Any:
    """A JSON value with one place in it changed.

    Args:
      source: of random numbers.
      value: is changed in place, where it is a list or an object.
      words: keys and texts that mean something to the reader.
    """
    holder = value
    while isinstance(holder, dict | list) and holder:
        key = source.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
        if isinstance(holder[key], dict | list) and holder[key] and source.random() < 0.8:
            holder = holder[key]
            continue
        _change(source, holder, key, words)
        return value
    return _odd(source)


def _odd(source: random.Random) -> Any:
    return copy.deepcopy(source.choice(ODD))


def _change(source: random.Random, holder: Any, key: Any, words: tuple[str, ...]) -> None:
    match source.randint(0, 6):
        case 0:
            del holder[key]
        case 1 if isinstance(holder, dict):
            holder[source.choice((*words, "x", ""))] = holder.pop(key)
        case 1 | 2 if isinstance(holder, list):
            holder.insert(key, copy.deepcopy(holder[key]))
        case 2:
            holder[source.choice((*words, "x"))] = _odd(source)
        case 3 if type(holder[key]) in (int, float):
            holder[key] = source.choice(
                (holder[key] + 1, holder[key] - 1, holder[key] * 2, -holder[key])
            )
        case 4 if words:
            holder[key] = source.choice(words)
        case 5 if type(holder[key]) is int:
            holder[key] = source.choice(NUMBERS)
        case _:
            holder[key] = _odd(source)


def text(source: random.Random, value: Any) -> bytes:
    """A value as JSON, seldom spoilt as bytes."""
    written = json.dumps(value).encode()
    return spoil_bytes(source, written) if source.random() < 0.1 else written
