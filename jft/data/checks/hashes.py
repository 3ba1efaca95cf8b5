# SPDX-License-Identifier: Apache-2.0
"""Rows as hashes: what two million of them have in common can be seen without keeping a text.

A hash has 8 bytes; of two million rows two meet by chance in one set of ten million.
"""

import array
import dataclasses
import hashlib
import json
from typing import Any

import numpy as np

from jft.data import examples, near
from jft.data.checks import found

# How a row's answer is judged.
PLAIN, PAIR, BAD, GOOD = 0, 1, 2, 3

_encode = json.JSONEncoder(ensure_ascii=False, sort_keys=True, default=str).encode


@dataclasses.dataclass(frozen=True)
class Columns:
    """What is known of the rows, an array of [n] each; views, so that nothing can be added while they live."""

    row: np.ndarray  # the row's number
    valid: np.ndarray  # whether it is of the validation set
    whole: np.ndarray  # hashes of all of the row,
    prompt: np.ndarray  # of what it answers,
    words: np.ndarray  # of the words of that,
    answer: np.ndarray  # of the answer,
    rejected: np.ndarray  # and of the rejected answer
    judged: np.ndarray  # PLAIN, PAIR, BAD or GOOD
    groups: np.ndarray  # of near duplicates, as `near.Signatures.groups` has them


class Hashes:
    """Of each row: all of it, its prompt, the prompt's words, its answer and its rejected answer.

    The words are what `split.prompt_key` looks at: rows that it keeps on one side can't leak.
    """

    def __init__(self, *, near_too: bool) -> None:
        self._row = array.array("i")
        self._whole, self._prompt, self._words = (array.array("Q") for _ in range(3))
        self._answer, self._rejected = array.array("Q"), array.array("Q")
        self._judged = bytearray()
        self._signatures = near.Signatures() if near_too else None

    def add(self, row: int, example: examples.Example) -> int:
        """Adds a row; returns the hash of all of it."""
        turns = [_trimmed(turn) for turn in example.messages]
        rejected = [_trimmed(turn) for turn in example.rejected]
        tools = _encode(example.tools) if example.tools else ""
        whole = _hash(_encode([turns, rejected, example.text.strip(), example.label]) + tools)
        self._row.append(row)
        self._whole.append(whole)
        self._prompt.append(_hash(_plain(turns[:-1] or turns) + tools))
        self._answer.append(_hash(_encode(turns[-1])) if turns else 0)
        self._rejected.append(_hash(_encode(rejected[-1])) if rejected else 0)
        self._judged.append(_judged(example))
        self._add_words(example)
        return whole

    def _add_words(self, example: examples.Example) -> None:
        words = near.turn_words(example)
        self._words.append(_hash("\n".join(" ".join(one) for one in words[:-1] or words)))
        if self._signatures is None:
            return
        if example.rejected or not example.messages:
            self._signatures.add(near.text(example))
        else:  # the same, with the words that are there already
            turns = zip(example.messages, words, strict=True)
            shown = [one for turn, one in turns if turn["role"] != "system"]
            self._signatures.add_words([word for one in shown for word in one])

    def columns(self, places: found.Places) -> Columns:
        """What was added so far."""
        row = np.frombuffer(self._row, np.int32)
        hashes = (self._whole, self._prompt, self._words, self._answer, self._rejected)
        return Columns(
            row,
            np.frombuffer(places.valid, bool)[row],
            *(np.frombuffer(one, np.uint64) for one in hashes),
            np.frombuffer(self._judged, np.uint8),
            np.arange(len(row)) if self._signatures is None else self._signatures.groups(),
        )


def _trimmed(turn: examples.Turn) -> dict[str, Any]:
    return {
        name: value.strip() if isinstance(value, str) else value for name, value in turn.items()
    }


def _plain(turns: list[dict[str, Any]]) -> str:
    """Turns without what does not tell two questions apart: case and spacing."""
    return "\n".join(
        f"{turn['role']} {' '.join(near.said(turn).split()).casefold()}" for turn in turns
    )


def _hash(text: str) -> int:
    said = text.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(said, digest_size=8).digest(), "little")


def _judged(example: examples.Example) -> int:
    if example.rejected:
        return PAIR
    return PLAIN if example.label is None else GOOD if example.label else BAD
