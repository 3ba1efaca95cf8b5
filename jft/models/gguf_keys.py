# SPDX-License-Identifier: Apache-2.0
"""The metadata of one architecture, read key by key, each value checked; in the end nothing may be left unread."""

import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from jft import errors
from jft.models import gguf_file


class Keys:
    """The keys below an architecture's prefix, without it."""

    def __init__(self, file: gguf_file.File, arch: str):
        self.file, self.arch = file, arch
        self._values: dict[str, Any] = {}
        for key, value in file.metadata.items():
            if key.startswith(arch + "."):
                self._values[key.removeprefix(arch + ".")] = _plain(value)
        self._read: set[str] = set()

    def refuse(self, why: str) -> errors.UserError:
        return errors.UserError(f"{self.file.path}: {why}")

    def get(self, key: str, default: Any = None) -> Any:
        self._read.add(key)
        return self._values.get(key, default)

    def need(self, key: str, default: Any = None) -> Any:
        value = self.get(key, default)
        if value is None:
            raise self.refuse(f"{self.arch}.{key} is missing")
        return value

    def count(self, key: str, default: int | None = None, least: int = 1) -> int:
        value = self._single(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            what = "positive integer" if least == 1 else f"integer of at least {least}"
            raise self.refuse(f"{self.arch}.{key} is {shown(value)}, not a {what}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._single(key, default)
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not 0 < value < math.inf
        ):
            raise self.refuse(f"{self.arch}.{key} is {shown(value)}, not a positive number")
        return shortest(value)

    def scale(self, key: str) -> float | None:
        """A number of which llama.cpp takes 0 for none."""
        return self.number(key) if self.get(key) not in (None, 0.0) else None

    def only(self, key: str, allowed: Collection[Any]) -> None:
        """Refuses a value that changes the numbers in a way that is not implemented."""
        value = self.get(key)
        if value is not None and value not in allowed:
            raise self.refuse(f"{self.arch}.{key} is {shown(value)}: not implemented")

    def done(self, neutral: Mapping[str, Collection[Any] | None]) -> None:
        """Refuses a key that nothing has read, unless its value changes nothing; None: no value does."""
        for key in sorted(set(self._values) - self._read):
            allowed = neutral.get(key, ())
            if allowed is not None:
                self.only(key, allowed)

    def _single(self, key: str, default: Any) -> Any:
        """A value of which there may be one for each layer, if they are all the same: others can't be stacked."""
        value = self.need(key, default)
        return value[0] if isinstance(value, list) and len(set(map(str, value))) == 1 else value


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value


def shown(value: Any) -> str:
    """A value on one line, a long list cut."""
    return " ".join(repr(value).split())[:80]


def shortest(value: float) -> float:
    """A float32 of the file as the decimal it was written from: 1e-05, not 9.99999974e-06."""
    with np.errstate(over="ignore"):
        narrow = np.float32(value)
    return float(str(narrow)) if float(narrow) == value else float(value)
