# SPDX-License-Identifier: Apache-2.0
"""Stand-ins for the rooms that `jft check` composes, where they are not there yet: `install` puts them in place."""

import importlib
import sys
import types
from collections.abc import Sequence
from typing import Any

import numpy as np

from jft import config, errors
from jft.data import chat, examples, findings, rows


class Examination:
    """Faults, exact duplicates and what leaks."""

    def __init__(self, *, near: bool = True, languages: bool = True) -> None:
        self._places: dict[str, list[tuple[str, int]]] = {}
        self._seen: set[str] = set()

    def add(self, item: examples.Example | examples.Fault, *, valid: bool = False) -> None:
        kind = item.kind if isinstance(item, examples.Fault) else ""
        if isinstance(item, examples.Example):
            text = repr(item.messages)
            kind = ("leak" if valid else "duplicate") if text in self._seen else ""
            if not valid:
                self._seen.add(text)
        if kind:
            self._places.setdefault(kind, []).append((item.path, item.number))

    def findings(self) -> "list[findings.Finding]":
        severity = {"malformed": "error", "leak": "error"}
        return [
            findings.Finding(
                kind, severity.get(kind, "warning"), len(p), tuple(p), f"{kind} they are", "look"
            )
            for kind, p in self._places.items()
        ]


class Encoder:
    def __init__(self, tokenizer: Any, *, train_on: str = "assistant", system: str = "") -> None:
        self._tokenizer, self._system = tokenizer, system or None

    def encode(self, batch: Sequence[examples.Example]) -> list[list[rows.Row] | examples.Fault]:
        return [self._one(example) for example in batch]

    def _one(self, example: examples.Example) -> list[rows.Row] | examples.Fault:
        if example.text:
            ids = np.array(self._tokenizer(example.text)["input_ids"], np.int32)
            return [rows.Row(ids, np.ones(len(ids), bool), example.source)]
        try:
            made = chat.encode(
                self._tokenizer,
                example,
                system=self._system,
            )
        except errors.UserError as error:
            return examples.Fault("template", str(error), example.path, example.number)
        return [rows.Row(made.tokens, made.trained, made.source)]


def base() -> Any:
    """The configuration with the keys that it is to have."""
    c = _base().unlock()
    for name, value in (("train_on", "assistant"), ("header", True), ("separator", "")):
        c.data[name] = value
    return c.lock()


_base = config.base


def install() -> None:
    if "train_on" not in config.base().data:
        config.base = base
    fakes = {
        "checks": {"Examination": Examination},
        "encoding": {"Encoder": Encoder},
        "fixing": {"fix": lambda source, reading, found, out: {"written": out}},
    }
    for name, contents in fakes.items():
        try:
            importlib.import_module(f"jft.data.{name}")
        except ModuleNotFoundError:
            module = types.ModuleType(f"jft.data.{name}")
            vars(module).update(contents)
            sys.modules[f"jft.data.{name}"] = module
            setattr(sys.modules["jft.data"], name, module)
