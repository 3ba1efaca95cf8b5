# SPDX-License-Identifier: Apache-2.0
"""What one rendering may use: processor time, the size of one value, and the size of everything it makes.

Time is the thread's processor time, so that a machine that is busy with other things does not fail a row. Sizes are
bytes, about. A container counts what is printed of it, so an object that it holds twice counts twice: otherwise
[x, x], done sixty times, is small in memory and 2**60 characters as text.
"""

import contextlib
import contextvars
import sys
import time
from collections import abc
from collections.abc import Iterator
from typing import Any

SECONDS = 2.0
VALUE = 1 << 23  # bytes of one value, and characters of the text
MADE = 1 << 27  # bytes of all values made, whether they are still held or not
_PER_GIVEN = 4, 16  # that many times the conversation's size in addition: long ones may take more
ENTRY = 64  # bytes of an entry in a container, beside what it holds
_DEPTH = 64  # of containers in one another

_CONTAINERS = (list, tuple, set, frozenset, abc.Mapping, abc.MappingView)
_SCALARS = frozenset((str, int, float, bool, bytes, type(None)))


class Exceeded(Exception):
    """A limit is reached; the message continues "the chat template"."""


class Limits:
    """The limits of one rendering and what it has used of them."""

    def __init__(self, given: int) -> None:
        self.value = VALUE + _PER_GIVEN[0] * given
        self._left = MADE + _PER_GIVEN[1] * given
        self._known: dict[int, tuple[Any, int]] = {}  # holds the values, whose ids are the keys
        self._began = time.thread_time()
        self._look = time.monotonic() + SECONDS

    def tick(self) -> None:
        """Looks at the clock: by turns at one that is quick to read, and near the limit at the processor's."""
        if time.monotonic() >= self._look:
            left = SECONDS - (time.thread_time() - self._began)
            if left <= 0:
                raise Exceeded(f"ran for more than {SECONDS:g} s")
            self._look = time.monotonic() + left

    def allow(self, size: int) -> None:
        """Refuses a value of this size; to be called before it is made."""
        if size > self.value:
            raise Exceeded(f"makes a value of more than {self.value:,} bytes")

    def charge(self, size: int) -> None:
        """Counts a value that was made."""
        if size > self.value:
            self.allow(size)
        self._left -= size
        if self._left < 0:
            raise Exceeded("makes too many values: they take more memory than a rendering may use")

    def weigh(self, value: Any, depth: int = 0) -> int:
        """The size of a value as text; refuses one that is too large or too deep before it has gone through it."""
        if type(value) in _SCALARS or not isinstance(value, _CONTAINERS):
            return sys.getsizeof(value)
        found = self._known.get(id(value))
        if found is None:
            found = self._known[id(value)] = (value, self._weigh(value, depth))
        return found[1]

    def _weigh(self, value: Any, depth: int) -> int:
        if depth > _DEPTH:
            raise Exceeded(f"makes a value with more than {_DEPTH} containers in one another")
        size = ENTRY * (len(value) + 1)
        self.allow(size)
        parts = (
            (part for item in value.items() for part in item)
            if isinstance(value, abc.Mapping)
            else value
        )
        for part in parts:
            size += self.weigh(part, depth + 1)
            self.allow(size)
        return size

    def made(self, value: Any) -> Any:
        """Counts a new value, and returns it."""
        if type(value) in _SCALARS:
            self.charge(sys.getsizeof(value))
        elif isinstance(value, _CONTAINERS):
            self.allow(self.weigh(value))
            self.charge(sys.getsizeof(value))
        return value


_LIMITS: contextvars.ContextVar[Limits] = contextvars.ContextVar("limits")
now = _LIMITS.get  # those of the rendering that is going on


@contextlib.contextmanager
def limits(given: int = 0) -> Iterator[Limits]:
    """Begins a rendering of a conversation of a given size."""
    token = _LIMITS.set(Limits(given))
    try:
        yield _LIMITS.get()
    finally:
        _LIMITS.reset(token)


def size_of(value: Any) -> int:
    """The characters of a conversation, without limits: it is the user's own."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, abc.Mapping):
        return sum(len(str(key)) + size_of(item) for key, item in value.items())
    return sum(map(size_of, value)) if isinstance(value, list | tuple) else 8
