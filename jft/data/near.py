# SPDX-License-Identifier: Apache-2.0
"""Near duplicates: texts that share most of their pairs of neighbouring words.

MinHash (Broder, 1997) over word pairs, banded to find candidates, each candidate verified by its
estimated Jaccard similarity. What one row in ten shares (an instruction that stands in front of
every question) does not count: with it, all short questions under a long instruction would be one
group. The groups depend on the texts alone, never on their order.

Memory is 9 bytes a row, and some ten times as much while groups are made; signatures lie in a temporary file, 256 bytes a row.
"""

import hashlib
import json
import re
import tempfile
from collections.abc import Iterator
from typing import IO

import numpy as np

from jft.data import examples

COLUMNS = 126  # hash functions
BAND = 6  # columns compared at once: a pair of similarity 0.8 is missed once in 550, of 0.75 in 60
THRESHOLD = 0.8  # similarity of near duplicates
WORDS = 8  # shorter texts are near duplicates only if their words are equal
CHARACTERS = 100_000  # of a text that are compared
COMMON = 0.1  # of the rows share it: it says nothing about two of them
COMMON_ROWS = 20  # ... but at least so many, or every word were common in a small set
INFORMATIVE = 24  # columns a verdict needs beside the common ones
WINDOW = 32  # steps between rows of a run that are compared
_CHUNK = 1 << 14  # rows read at once
_WIDTH = 2 * COLUMNS  # bytes of a signature
_SEED = 20

# Chinese and Japanese have no spaces: each character is a word. So is each sign that is no
# punctuation: an operator tells two sums apart, and a smiley two moods. Of dashes only minus signs.
_UNSPACED = r"\u3040-\u30ff\u3400-\u9fff"
_SIGN = r"(?<!\w)-(?=\d)|[^\w\s.,;:!?'\"()\[\]{}`’‘“”…–—-]"
_WORD = re.compile(rf"[^\W{_UNSPACED}]+|[{_UNSPACED}]|{_SIGN}")
_ASCII_WORD = re.compile(rf"[a-z0-9_]+|{_SIGN}")  # the same, faster


def said(turn: examples.Turn) -> str:
    """All that a turn says: its reasoning, its content and its tool calls."""
    texts = [turn.get("reasoning_content"), turn.get("content")]
    if turn.get("tool_calls"):
        texts.append(json.dumps(turn["tool_calls"], ensure_ascii=False))
    return "\n".join(text for text in texts if text)


def text(example: examples.Example) -> str:
    """What of an example is compared: its turns but the system's, which whole files share."""
    turns = [t for t in (*example.messages, *example.rejected) if t["role"] != "system"]
    return "\n".join(map(said, turns)) if example.messages else example.text


def words(text: str) -> list[str]:
    """What of a text tells it apart from others: words and signs, without case and punctuation."""
    return (_ASCII_WORD if text.isascii() else _WORD).findall(text.casefold())


def turn_words(example: examples.Example) -> list[list[str]]:
    """The words of each turn, or of the plain text; a turn without words is one word as it stands."""
    texts = list(map(said, example.messages)) or [example.text]
    return [words(text[:CHARACTERS]) or [text] for text in texts]


class Signatures:
    """Texts as signatures, one after the other, and their groups."""

    def __init__(self) -> None:
        self._hashes = bytearray()  # 8 bytes of each text's words: two texts of equal words are one
        self._short = bytearray()
        self._waiting: list[list[str]] = []
        self._file = tempfile.TemporaryFile(prefix="jft-near-")

    def __len__(self) -> int:
        return len(self._short)

    def add(self, text: str) -> None:
        self.add_words(words(text[:CHARACTERS]) or [text])

    def add_words(self, found: list[str]) -> None:
        """Adds a text of these words."""
        joined = " ".join(found).encode("utf-8", "surrogatepass")
        self._hashes += hashlib.blake2b(joined, digest_size=8).digest()
        self._short.append(len(found) < WORDS)
        # A pair that stands twice has the same minima as one that stands once.
        self._waiting.append(list(map(" ".join, zip(found, found[1:], strict=False))))
        if len(self._waiting) >= 1024:
            self._write()

    def groups(self, threshold: float = THRESHOLD) -> np.ndarray:
        """int64 [n]: the index of the first member of each row's group, itself if alone."""
        self._write()
        if not self._short:
            return np.zeros(0, np.int64)
        hashes = np.frombuffer(bytes(self._hashes), np.uint64)
        # One row for each different text, in the order of their hashes, which is no order of rows.
        _, rows, text_of_row = np.unique(hashes, return_index=True, return_inverse=True)
        long = np.flatnonzero(~np.frombuffer(bytes(self._short), bool)[rows])
        labels = np.arange(len(rows), dtype=np.int32)
        if len(long) > 1:
            labels[long] = long[_cluster(self._file, rows[long], threshold)]
        labels = labels[text_of_row]
        _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
        return first[inverse].astype(np.int64)

    def _write(self) -> None:
        if self._waiting:
            self._file.seek(0, 2)
            self._file.write(_signatures(self._waiting).tobytes())
            self._file.flush()
            self._waiting = []


def _signatures(pairs: list[list[str]]) -> np.ndarray:
    """uint16 [len(pairs), COLUMNS]: the low halves of the minima, which differ when the minima do."""
    import rensa

    digests = rensa.RMinHash.digest_matrix_from_token_sets(pairs, COLUMNS, _SEED).to_rows()
    return np.array(digests, np.uint32).astype(np.uint16)


def _cluster(file: IO[bytes], rows: np.ndarray, threshold: float) -> np.ndarray:
    """int32 [n]: for each of these rows of the file, the position of its group's first member."""
    common = _common(file, rows)
    labels = np.arange(len(rows), dtype=np.int32)
    for band in range(0, COLUMNS, BAND):
        keys, telling = _keys(file, common, band)
        # First each row with the first of its run: where many rows are alike, that leaves hardly any other pair.
        for steps in (range(1), range(1, WINDOW)):
            pairs = _candidates(keys[rows], telling[rows], labels, steps)
            if len(pairs):
                labels = _join(labels, pairs[_similar(file, rows[pairs], common) >= threshold])
    return labels


def _chunks(file: IO[bytes]) -> Iterator[tuple[slice, np.ndarray]]:
    """All signatures of the file in turn: where they stand, and uint16 [m, COLUMNS].

    Read, not mapped: what a map has touched counts as this process's memory.
    """
    file.seek(0)
    start = 0
    while len(chunk := np.frombuffer(file.read(_CHUNK * _WIDTH), np.uint16).reshape(-1, COLUMNS)):
        yield slice(start, start + len(chunk)), chunk
        start += len(chunk)


def _common(file: IO[bytes], rows: np.ndarray) -> np.ndarray:
    """bool [COLUMNS, 65536]: the values that so many of these rows have that they tell none apart."""
    counts = np.zeros((COLUMNS, 1 << 16), np.int32)
    wanted = np.zeros(file.seek(0, 2) // _WIDTH, bool)
    wanted[rows] = True
    for place, chunk in _chunks(file):
        chosen = chunk[wanted[place]]
        for column in range(COLUMNS):
            values, times = np.unique(chosen[:, column], return_counts=True)
            counts[column, values] += times.astype(np.int32)
    return counts > max(COMMON_ROWS, COMMON * len(rows))


def _keys(file: IO[bytes], common: np.ndarray, band: int) -> tuple[np.ndarray, np.ndarray]:
    """Each row's values in one band as one number, and whether not all of them are common."""
    multipliers = np.random.default_rng(_SEED).integers(1, 1 << 63, BAND, np.uint64) | np.uint64(1)
    columns = np.arange(band, band + BAND)
    keys: list[np.ndarray] = []
    telling: list[np.ndarray] = []
    for _, chunk in _chunks(file):
        values = chunk[:, columns]
        keys.append((values.astype(np.uint64) * multipliers).sum(1, dtype=np.uint64))
        telling.append(np.logical_not(common[columns, values].all(1)))
    return np.concatenate(keys), np.concatenate(telling)


def _candidates(
    keys: np.ndarray, telling: np.ndarray, labels: np.ndarray, steps: range
) -> np.ndarray:
    """int64 [m, 2]: pairs of rows with equal keys that are in no group together.

    Of the rows in order of their keys, those so many steps apart; 0 stands for each row and its run's first.
    """
    order = np.flatnonzero(telling)
    order = order[np.argsort(keys[order], kind="stable")]
    keys = keys[order]
    found = [np.zeros(0, np.int64)]
    for step in steps:
        if step:
            later = np.flatnonzero(keys[step:] == keys[:-step]) + step
            first = order[later - step]
        else:
            starts = np.searchsorted(keys, keys)  # where the run of equal keys starts
            later = np.flatnonzero(starts != np.arange(len(keys)))
            first = order[starts[later]]
        if not len(later):
            break
        second = order[later]
        apart = labels[first] != labels[second]
        found.append(first[apart] * len(labels) + second[apart])
    pairs = np.unique(np.concatenate(found))
    return np.stack(np.divmod(pairs, len(labels)), axis=1)


def _similar(file: IO[bytes], pairs: np.ndarray, common: np.ndarray) -> np.ndarray:
    """float64 [m]: the estimated Jaccard similarity of each pair of rows, common values apart."""
    estimates = np.zeros(len(pairs))
    columns = np.arange(COLUMNS)
    for start in range(0, len(pairs), _CHUNK):
        place = slice(start, start + _CHUNK)
        chosen, where = np.unique(pairs[place], return_inverse=True)
        left, right = np.moveaxis(_fetch(file, chosen)[where.reshape(-1, 2)], 1, 0)
        same = left == right
        shared = same & common[columns, left]
        informative = COLUMNS - shared.sum(1)
        share = (same & ~shared).sum(1) / np.maximum(informative, 1)
        estimates[place] = np.where(informative >= INFORMATIVE, share, 0.0)
    return estimates


def _fetch(file: IO[bytes], rows: np.ndarray) -> np.ndarray:
    """uint16 [n, COLUMNS]: the signatures of some rows."""
    found = bytearray()
    for row in rows.tolist():
        file.seek(row * _WIDTH)
        found += file.read(_WIDTH)
    return np.frombuffer(bytes(found), np.uint16).reshape(-1, COLUMNS)


def _join(labels: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Labels after these pairs were joined: the least position of each connected group."""
    import scipy.sparse

    n = len(labels)
    ends = labels[pairs]
    graph = scipy.sparse.coo_array(
        (np.ones(len(ends), bool), (ends[:, 0], ends[:, 1])), shape=(n, n)
    )
    _, component = scipy.sparse.csgraph.connected_components(graph, directed=False)
    component = component[labels]
    _, first, inverse = np.unique(component, return_index=True, return_inverse=True)
    return first[inverse].astype(np.int32)
