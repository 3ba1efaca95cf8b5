# SPDX-License-Identifier: Apache-2.0
"""From the configuration's `data` to rows that can be trained on, with a count of everything on the way."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jft import errors
from jft.data import (
    encoding,
    examined,
    examples,
    fitting,
    formats,
    rows,
    split,
    store,
    template,
    tokenising,
)
from jft.data import tokenised as cache


@dataclasses.dataclass(frozen=True)
class Source:
    """Where examples come from and how they become rows; the keys of the configuration's `data`."""

    train: str
    weights: str = ""
    valid: str = ""
    valid_fraction: float = 0.1
    test: str = ""
    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)
    header: bool = True
    separator: str = ""
    system: str = ""
    chat_template: str = ""
    train_on: str = "assistant"
    max_length: int = 1024
    overlength: str = "error"
    packing: bool = True
    allow: str = ""

    @property
    def reading(self) -> formats.Reading:
        return formats.Reading(self.columns, self.header, self.separator)

    @property
    def trains(self) -> list[str]:
        """The sources of `train`, which commas separate.

        Raises:
            errors.UserError: there is none.
        """
        found = [name.strip() for name in self.train.split(",") if name.strip()]
        if not found:
            raise errors.UserError(
                "data.train is not set: name a file (.jsonl, .json, .csv, .tsv, .parquet, .arrow, .txt), a folder of "
                "them, or a dataset of the Hub"
            )
        return found

    @property
    def times(self) -> list[float]:
        """How many times each source stands in an epoch.

        Raises:
            errors.UserError: `weights` holds something else than numbers.
        """
        try:
            found = [float(text) for text in self.weights.split(",") if text.strip()]
        except ValueError:
            raise errors.UserError(
                f"data.weights={self.weights}: numbers wanted, separated by commas, as in 1,0.5"
            ) from None
        return found


@dataclasses.dataclass(frozen=True)
class Data:
    """Rows to train (of each source) and to validate on, examples to answer at the end, and what was read."""

    train: list[rows.Rows]
    valid: rows.Rows
    test: Sequence[examples.Example]
    test_rows: rows.Rows
    report: dict[str, Any]


def load(source: Source, tokenizer: Any, *, seed: int, vocab_size: int) -> Data:
    """Reads, checks, splits, encodes and fits all sets.

    Args:
        source: where from and how.
        tokenizer: of the model.
        seed: of the split.
        vocab_size: rows of the model's embedding.

    Raises:
        errors.UserError: a file or row can't be used, the check found an error, or nothing is left to train on.
    """
    encoder = encoding.Encoder(tokenizer, train_on=source.train_on, system=source.system)
    settings = {"train_on": source.train_on, "system": source.system}

    def tokenise(name: str) -> store.Stored:
        found = cache.tokenised(name, source.reading, encoder, settings)
        _check_kind(found, name)
        return found

    trains = [tokenise(name) for name in source.trains]
    valids = [tokenise(source.valid)] if source.valid else []
    found = examined.examine(trains, valids, grouped=not source.valid and source.valid_fraction > 0)
    found.check(source.allow)
    held = np.zeros(sum(one.meta["examples"] for one in trains), bool)
    if not valids:
        held = split.held_out(found.keys, found.groups, source.valid_fraction, seed)
    sets = _Sets(source.max_length, source.overlength, vocab_size, tokenizer)
    train, valid, at = [], [], 0
    for one in trains:
        mine = held[at : (at := at + one.meta["examples"])]
        train.append(sets.add("train", one, ~mine))
        valid.append(sets.add("valid", one, mine))
    if valids:
        valid = [sets.add("valid", one) for one in valids]
    test = [sets.add("test", tokenise(source.test))] if source.test else valid
    sets.report.setdefault("test", sets.report["valid"])
    if not any(len(one) for one in train):
        raise errors.UserError(
            f"{source.train}: no row is left to train on: {json.dumps(sets.report['train'])}"
        )
    report = _described(trains, found) | sets.report
    return Data(train, rows.Joined(valid), Answers(test), rows.Joined(test), report)


class Answers(Sequence[examples.Example]):
    """The examples of some rows that end with an answer, read one at a time: what a model can be asked."""

    def __init__(self, parts: Sequence[fitting.Fitted[store.Stored]]) -> None:
        self._places = [
            (part.source, int(i))
            for part in parts
            if part.source.meta["shape"] != "text"
            for i in np.unique(part.source.example_of[part.of])
        ]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        source, place = self._places[index]
        return source.example(place)


class _Sets:
    """Fits the sets and adds up, for each, what was kept and left out."""

    def __init__(self, length: int, overlength: str, vocab_size: int, tokenizer: Any) -> None:
        self._length, self._overlength = length, overlength
        self._vocab_size, self._tokenizer = vocab_size, tokenizer
        self.report: dict[str, dict[str, int]] = {}

    def add(
        self, name: str, source: store.Stored, some: np.ndarray | None = None
    ) -> fitting.Fitted[store.Stored]:
        """The rows of some of a source's examples; `some` is a mask, None = all."""
        chosen = np.ones(source.meta["examples"], bool) if some is None else some
        here = np.flatnonzero(chosen[source.example_of])
        found, fit = fitting.fit(source, self._length, self._overlength, some=here)
        if source.meta["largest_token"] >= self._vocab_size:  # maybe in a row that stays
            for row in (found[i] for i in range(len(found))):
                tokenising.check_ids(row.tokens, self._vocab_size, self._tokenizer, row.source)
        # Conversations in which nothing is to be trained have no row at all.
        without = int(chosen.sum()) - len(np.unique(source.example_of[here]))
        counts = dataclasses.asdict(fit) | {
            "examples": int(chosen.sum()),
            "rows": fit.rows + without,
            "untrained": fit.untrained + without,
            "tokens": int(found.lengths.sum(dtype=np.int64)) + len(found),
            "trained_tokens": int(found.trained.sum(dtype=np.int64)),
        }
        before = self.report.get(name, {})
        longest = max(before.get("longest", 0), fit.longest)
        added = {key: value + before.get(key, 0) for key, value in counts.items()}
        self.report[name] = added | {"longest": longest}
        return found


def lines(report: Mapping[str, Any]) -> list[str]:
    """What a person should know of a run's data: how it was read, what was left out, what the check found."""
    train = report["train"]
    found = []
    for source in report["sources"]:
        unused = ", ".join(source["unused_columns"])
        beside = f" (not read: {unused})" if unused else ""
        found.append(f"{', '.join(source['files'][:3])}: {source['description']}{beside}")
    left = {
        "too long": train["dropped"],
        "without anything to train": train["untrained"],
        "prompts cut": train["truncated"],
        "split in pieces": train["split"],
    }
    told = "; ".join(f"{count:,} {what}" for what, count in left.items() if count)
    found.append(
        f"{train['kept']:,} rows to train on ({train['trained_tokens']:,} trained tokens), "
        f"{report['valid']['kept']:,} to validate, {report['test']['kept']:,} to test"
        + (f"; {told}" if told else "")
    )
    for each in report["findings"]:
        if each["severity"] != "note":
            found.append(f"{each['severity']}: {each['kind']}: {each['message']}; {each['advice']}")
    return found


def use_template(tokenizer: Any, chosen: str) -> None:
    """Sets the tokenizer's chat template: a file's path, a template's text, or "plain"; "" changes nothing."""
    if not chosen:
        return
    if chosen == "plain":
        chosen = template.PLAIN
    elif "{" not in chosen:
        try:
            chosen = pathlib.Path(chosen).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
            raise errors.UserError(f"data.chat_template={chosen}: {reason}") from error
    tokenizer.chat_template = chosen


def _check_kind(found: store.Stored, name: str) -> None:
    shape = found.meta["shape"]
    if shape == "preference":
        raise errors.UserError(
            f"{name}: holds {found.meta['description']}, and this training is on one answer a row: "
            "data.columns.response=chosen (with data.columns.prompt) trains on the chosen ones"
        )
    if shape == "unpaired":
        raise errors.UserError(
            f"{name}: holds {found.meta['description']}, of which some are labelled bad: data.columns.messages=NAME "
            "(or .prompt and .response) trains on all of them; leave out the rows that should not be learnt"
        )


def _described(trains: Sequence[store.Stored], found: examined.Examined) -> dict[str, Any]:
    fingerprints = [one.meta["fingerprint"] for one in trains]
    keys = (
        "shape",
        "description",
        "unused_columns",
        "turns",
        "untrained_turns",
        "expanded",
    )
    return {
        "sources": [{"files": one.files} | {key: one.meta[key] for key in keys} for one in trains],
        "fingerprint": fingerprints[0]
        if len(trains) == 1
        else f"sha256:{cache.hash_of(fingerprints)}",
        "findings": [dataclasses.asdict(finding) for finding in found.findings],
    }
