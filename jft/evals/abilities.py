# SPDX-License-Identifier: Apache-2.0
"""Abilities before and after: multiple choice by likelihood, and last words.

Files hold one item a line, in the forms of llm-foundry's evaluation sets: `query`, `choices` and `gold` (PIQA, ARC, COPA);
`context_options`, `continuation` and `gold` (WinoGrande, WSC), where the options are what goes before; `context` and
`continuation` (LAMBADA), a text and its last word.

The right choice is the likeliest (`accuracy`), or the likeliest for its length: in characters (`accuracy_norm`, what the LM
evaluation harness calls acc_norm), in bytes (its acc_bytes), or in tokens.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jft import errors
from jft.data import examples, readers
from jft.evals import likelihood, result

QUESTION, ANSWER = "Question:", "\nAnswer:"


@dataclasses.dataclass(frozen=True)
class Item:
    """Contexts and continuations pair by pair; the right pair is `gold`. One pair alone is a last word to guess."""

    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    gold: int = 0


def read(source: str) -> list[Item]:
    """The items of a file.

    Raises:
      UserError: it cannot be read, or a line is no item.
    """
    items = []
    for row in readers.stream(source):
        if isinstance(row, examples.Fault):
            raise errors.UserError(row.message)
        place = f"{row.path}: item {row.number}"
        if not isinstance(row.value, dict):
            raise errors.UserError(f"{place}: is {readers.kind(row.value)}, no object")
        items.append(_item(row.value, place))
    return items


def _item(row: Mapping[str, Any], place: str) -> Item:
    if "choices" in row and "query" in row:
        choices = _texts(row["choices"], "choices", place)
        context = question(_text(row["query"], "query", place))
        pairs = [context] * len(choices), [f" {choice}" for choice in choices]
    elif "context_options" in row and "continuation" in row:
        contexts = _texts(row["context_options"], "context_options", place)
        word = _text(row["continuation"], "continuation", place)
        pairs = contexts, [f" {word}"] * len(contexts)
    elif "context" in row and "continuation" in row:
        context = _text(row["context"], "context", place)
        return Item((context,), (f" {_text(row['continuation'], 'continuation', place)}",))
    else:
        raise errors.UserError(
            f"{place}: has {', '.join(row) or 'no column'}; wanted are query, choices, gold or context_options,"
            " continuation, gold or context, continuation"
        )
    gold = row.get("gold")
    if type(gold) is not int or not 0 <= gold < len(pairs[0]):
        raise errors.UserError(f"{place}: gold is {gold!r}; write 0 to {len(pairs[0]) - 1}")
    return Item(tuple(pairs[0]), tuple(pairs[1]), gold)


def _texts(value: Any, name: str, place: str) -> list[str]:
    if not isinstance(value, list) or len(value) < 2:
        raise errors.UserError(f"{place}: {name} is no list of two texts or more")
    return [_text(v, name, place) for v in value]


def _text(value: Any, name: str, place: str) -> str:
    if not isinstance(value, str) or not value:
        raise errors.UserError(f"{place}: {name} is {value!r:.40}, no text")
    return value


def question(query: str) -> str:
    """The context of a query: what begins with "Question:" ends with "Answer:", as in the harness's PIQA and ARC."""
    return query.rstrip() + ANSWER if query.startswith(QUESTION) else query.rstrip()


def requests(tokenizer: Any, items: Sequence[Item]) -> list[likelihood.Request]:
    """Those of all items' pairs, one after the other."""
    pairs = [p for item in items for p in zip(item.contexts, item.continuations, strict=True)]
    return likelihood.requests(tokenizer, pairs)


def judge(items: Sequence[Item], found: Sequence[likelihood.Likelihood]) -> list[result.Result]:
    """Scores of items whose pairs have these likelihoods: of choices, of last words, or of both.

    Raises:
      UserError: there is no item.
    """
    if not items:
        raise errors.UserError("there is no item to judge")
    each = iter(found)
    rows = [(item, list(itertools.islice(each, len(item.contexts)))) for item in items]
    choices = [row for row in rows if len(row[1]) > 1]
    words = [row[1][0] for row in rows if len(row[1]) == 1]
    return (_choices(choices) if choices else []) + (_words(words) if words else [])


def _choices(
    rows: Sequence[tuple[Item, list[likelihood.Likelihood]]],
) -> list[result.Result]:
    right: dict[str, list[bool]] = {}
    for item, found in rows:
        logprobs = np.array([f.logprob for f in found])
        texts = [text[1:] for text in item.continuations]  # without the space before
        lengths = {
            "accuracy": [1] * len(found),
            "accuracy_norm": [len(text) for text in texts],
            "accuracy_bytes": [len(text.encode()) for text in texts],
            "accuracy_tokens": [f.tokens for f in found],
        }
        for name, own in lengths.items():
            chosen = int(np.argmax(logprobs / np.array(own, np.float64)))
            right.setdefault(name, []).append(chosen == item.gold)
    return [result.mean(name, values) for name, values in right.items()]


def _words(found: Sequence[likelihood.Likelihood]) -> list[result.Result]:
    """Whether the likeliest tokens are the word, and the perplexity of words, as LAMBADA has it."""
    nats = np.array([-f.logprob for f in found])
    return [
        result.mean("last_word", [f.greedy for f in found]),
        result.ratio("word_perplexity", nats, np.ones_like(nats), np.exp, unit="", better=-1),
    ]
