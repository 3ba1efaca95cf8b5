# SPDX-License-Identifier: Apache-2.0
"""From files to rows that can be trained on, with a count of everything on the way."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from jft import errors
from jft.data import batches, chat, formats, split


@dataclasses.dataclass(frozen=True)
class Source:
    """Where examples come from and how they become rows; the keys of the configuration's `data`."""

    train: str
    valid: str = ""
    valid_fraction: float = 0.1
    test: str = ""
    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)
    system: str = ""
    chat_template: str = ""
    max_length: int = 1024
    overlength: str = "error"
    packing: bool = True


@dataclasses.dataclass(frozen=True)
class Data:
    """Rows to train and validate on, examples to answer at the end, and the report of what was read."""

    train: list[chat.Row]
    valid: list[chat.Row]
    test: list[formats.Example]
    test_rows: list[chat.Row]
    report: dict[str, Any]


def load(source: Source, tokenizer: Any, *, seed: int, vocab_size: int) -> Data:
    """Reads, splits, encodes and fits all sets.

    Args:
      source: where from and how.
      tokenizer: of the model.
      seed: of the split.
      vocab_size: rows of the model's embedding.

    Raises:
      UserError: a file or row cannot be used, or nothing is left to train on.
    """
    if not source.train:
        raise errors.UserError(
            "data.train is not set: name a .jsonl, .json, .csv, .tsv or .parquet file"
        )
    table = formats.read_table(source.train, source.columns)
    train, valid = list(table.examples), []
    if source.valid:
        valid = formats.read(source.valid, source.columns)
    elif source.valid_fraction:
        train, valid = split.split(train, source.valid_fraction, seed)
    test = formats.read(source.test, source.columns) if source.test else valid
    report: dict[str, Any] = {
        "shape": dataclasses.asdict(table.shape),
        "unused_columns": list(table.extra),
        "fingerprint": fingerprint(train),
    }
    sets = {}
    for name, examples in (("train", train), ("valid", valid), ("test", test)):
        rows = [chat.encode(tokenizer, e, system=source.system or None) for e in examples]
        sets[name], fitted = batches.fit(rows, source.max_length, source.overlength)
        for row in sets[name]:
            chat.check_ids(row.tokens, vocab_size, tokenizer, row.source)
        report[name] = dataclasses.asdict(fitted) | _tokens(sets[name])
    if not sets["train"]:
        raise errors.UserError(f"{source.train}: no row is left to train on: {report['train']}")
    return Data(sets["train"], sets["valid"], test, sets["test"], report)


def use_template(tokenizer: Any, template: str) -> None:
    """Sets the tokenizer's chat template from a file's path or a template's text; "" changes nothing."""
    if not template:
        return
    if "{" not in template:
        try:
            template = pathlib.Path(template).read_text(encoding="utf-8")
        except OSError as error:
            raise errors.UserError(f"data.chat_template={template}: {error.strerror}") from error
    tokenizer.chat_template = template


def fingerprint(examples: Sequence[formats.Example]) -> str:
    """sha256 of the conversations in their order."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps(example.messages, sort_keys=True).encode())
    return f"sha256:{digest.hexdigest()[:32]}"


def _tokens(rows: Sequence[chat.Row]) -> dict[str, int]:
    return {
        "tokens": sum(len(row.tokens) for row in rows),
        "trained_tokens": sum(int(row.trained[1:].sum()) for row in rows),
    }
