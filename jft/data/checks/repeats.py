# SPDX-License-Identifier: Apache-2.0
"""What rows have in common: duplicates, near duplicates, prompts with several answers, leaks.

Rows are kept as hashes of 8 bytes (in two million rows two of them meet by chance once in ten
million sets), so that a set of any size can be compared.
"""

import array
import hashlib
import itertools
import json
from typing import Any

import numpy as np

from jft.data import examples, findings, near, split
from jft.data.checks import found, parts

LEAK = 0.05  # of the validation rows: above it, what validation measures is memory

_encode = json.JSONEncoder(ensure_ascii=False, sort_keys=True, default=str).encode


class Repeats:
    """Hashes of all rows; training and validation rows are each compared among themselves."""

    def __init__(self, *, near_too: bool) -> None:
        self._row = array.array("q")
        self._whole, self._prompt, self._answer, self._rejected = (
            array.array("Q") for _ in range(4)
        )
        self._words = array.array("Q")  # of the prompt: punctuation does not hide a leak
        self._judged = (
            bytearray()
        )  # 1 for preference pairs, 2 and 3 for unpaired ones, bad and good
        self._signatures = near.Signatures() if near_too else None

    def add(self, row: int, example: examples.Example) -> int:
        """Adds a row; returns the hash of all of it."""
        turns = [_trimmed(turn) for turn in example.messages]
        rejected = [_trimmed(turn) for turn in example.rejected]
        tools = _encode(example.tools) if example.tools else ""
        whole = _hash(_encode([turns, rejected, example.text.strip(), example.label]) + tools)
        prompt = int.from_bytes(split.prompt_key(example, 0)[:8], "little")
        self._row.append(row)
        self._whole.append(whole)
        self._prompt.append(_hash(f"{prompt} {tools}") if tools else prompt)
        self._answer.append(_hash(_encode(turns[-1])) if turns else 0)
        self._rejected.append(_hash(_encode(rejected[-1])) if rejected else 0)
        self._judged.append(_judged(example))
        self._add_words(example)
        return whole

    def _add_words(self, example: examples.Example) -> None:
        texts = [parts.said(turn)[: near.CHARACTERS] for turn in example.messages]
        said = [near.words(text) or [text] for text in texts or [example.text[: near.CHARACTERS]]]
        prompt = said[:-1] or said
        self._words.append(_hash("\n".join(" ".join(words) for words in prompt)))
        if self._signatures is not None and not example.rejected:
            turns = zip(example.messages, said, strict=True) if example.messages else ()
            shown = [words for turn, words in turns if turn["role"] != "system"]
            self._signatures.add_words(list(itertools.chain.from_iterable(shown or said)))
        elif self._signatures is not None:
            self._signatures.add(near.text(example))

    def told(self, places: found.Places) -> list[findings.Finding]:
        if not self._row:
            return []
        rows = np.frombuffer(self._row, np.int64)
        valid = np.frombuffer(places.valid, np.uint8)[rows].astype(bool)
        told = self._duplicates(rows, valid, places)
        groups = np.arange(len(rows)) if self._signatures is None else self._signatures.groups()
        if self._signatures is not None:
            told += self._near(rows, valid, groups, places)
        told += self._conflicts(rows, valid, places)
        return told + self._leaks(rows, valid, groups, places)

    def _duplicates(
        self, rows: np.ndarray, valid: np.ndarray, places: found.Places
    ) -> list[findings.Finding]:
        names = _within(np.frombuffer(self._whole, np.uint64), valid)
        later = np.flatnonzero(names != np.arange(len(names)))
        if not len(later):
            return []
        sets = len(np.unique(names[later]))
        return [
            findings.Finding(
                "duplicate",
                "warning",
                len(later),
                places.at(rows[later].tolist()),
                f"{found.plural(len(later), 'row')} {'is' if len(later) == 1 else 'are'} equal to an earlier one "
                f"({found.plural(sets, 'row')} repeated)",
                "take the repeats out (--fix does), unless a row shall count more often",
                {"sets": sets, "fix": "remove"},
            )
        ]

    def _near(
        self, rows: np.ndarray, valid: np.ndarray, groups: np.ndarray, places: found.Places
    ) -> list[findings.Finding]:
        names = _within(groups, valid)
        distinct = _within(np.frombuffer(self._whole, np.uint64), valid) == np.arange(len(names))
        members = np.flatnonzero(distinct)
        order = members[np.argsort(names[members], kind="stable")]
        parted = np.split(order, np.flatnonzero(np.diff(names[order])) + 1)
        parted = sorted(
            (group for group in parted if len(group) > 1), key=lambda group: -len(group)
        )
        if not parted:
            return []
        later = np.sort(np.concatenate([group[1:] for group in parted]))
        return [
            findings.Finding(
                "near_duplicate",
                "warning",
                len(later),
                places.at(rows[later].tolist()),
                f"{found.plural(len(later), 'row')} nearly {'repeats' if len(later) == 1 else 'repeat'} an earlier one "
                f"({found.plural(len(parted), 'group')}, the largest of {len(parted[0])})",
                "keep the best of each group, unless the small differences are what is to be learnt",
                {"groups": [_short(places, rows[group]) for group in parted[: found.LISTED]]},
            )
        ]

    def _conflicts(
        self, rows: np.ndarray, valid: np.ndarray, places: found.Places
    ) -> list[findings.Finding]:
        judged = np.frombuffer(self._judged, np.uint8)
        answers = np.frombuffer(self._answer, np.uint64)
        prompts = _within(np.frombuffer(self._prompt, np.uint64), valid)
        plain = np.flatnonzero((judged == 0) & (answers != 0))
        several = _several(prompts[plain], answers[plain])
        told = [self._tell_several(rows, plain[several], prompts, places)] if several.any() else []
        opposite = self._opposite(judged, prompts)
        if len(opposite):
            told.append(
                findings.Finding(
                    "conflict",
                    "warning",
                    len(opposite),
                    places.at(rows[opposite].tolist()),
                    f"{found.plural(len(opposite), 'row')} judge one answer as both good and bad",
                    "decide for one judgement and take the other rows out: together they teach nothing",
                )
            )
        return told

    def _tell_several(
        self, rows: np.ndarray, concerned: np.ndarray, prompts: np.ndarray, places: found.Places
    ) -> findings.Finding:
        count = len(np.unique(prompts[concerned]))
        repeats = len(concerned) - count
        return findings.Finding(
            "conflict",
            "warning",
            count,
            places.at(rows[concerned].tolist()),
            f"{found.plural(count, 'prompt')} {'has' if count == 1 else 'have'} several answers "
            f"({found.plural(repeats, 'row')} repeat a prompt, {len(concerned):,} in all)",
            "keep them if several answers are right (references, samples); else keep the right one",
            {"prompts": count, "repeats": repeats, "rows": len(concerned)},
        )

    def _opposite(self, judged: np.ndarray, prompts: np.ndarray) -> np.ndarray:
        """Rows whose answer to a prompt is good in one row and bad in another, or in the same."""
        answers = np.frombuffer(self._answer, np.uint64)
        rejected = np.frombuffer(self._rejected, np.uint64)
        good = np.flatnonzero((judged == 1) | (judged == 3))
        bad = np.flatnonzero((judged == 1) | (judged == 2))
        told = _pairs(prompts[good], answers[good])
        against = _pairs(prompts[bad], np.where(judged[bad] == 1, rejected[bad], answers[bad]))
        both = np.intersect1d(told, against)
        return np.union1d(good[np.isin(told, both)], bad[np.isin(against, both)])

    def _leaks(
        self, rows: np.ndarray, valid: np.ndarray, groups: np.ndarray, places: found.Places
    ) -> list[findings.Finding]:
        if not valid.any() or valid.all():
            return []
        prompts = np.frombuffer(self._words, np.uint64)
        leaked = valid & np.isin(prompts, prompts[~valid])
        near_too = valid & ~leaked & np.isin(groups, groups[~valid])
        counts = {
            "valid_rows": _short(places, rows[leaked], len(rows)),
            "near_valid_rows": _short(places, rows[near_too], len(rows)),
        }
        if not leaked.any():
            return [_tell_near_leak(int(near_too.sum()), counts)] if near_too.any() else []
        sources = ~valid & np.isin(prompts, prompts[leaked])
        share = leaked.sum() / valid.sum()
        beside = f"; {near_too.sum():,} more nearly repeat a training row" if near_too.any() else ""
        return [
            findings.Finding(
                "leak",
                "error" if share >= LEAK else "warning",
                int(leaked.sum()),
                places.at(rows[sources].tolist()),
                f"{leaked.sum():,} of {valid.sum():,} validation rows ({share:.1%}) have a prompt of the training "
                f"data{beside}",
                "take these training rows out (--fix does), or validation measures memory",
                counts | {"fix": "remove"},
            )
        ]


def _tell_near_leak(count: int, counts: dict[str, Any]) -> findings.Finding:
    return findings.Finding(
        "leak",
        "note",
        count,
        (),
        f"{found.plural(count, 'validation row')} nearly repeat a training row",
        "look at a few: where they are the same question, validation measures memory",
        counts,
    )


def _trimmed(turn: examples.Turn) -> dict[str, Any]:
    return {
        name: value.strip() if isinstance(value, str) else value for name, value in turn.items()
    }


def _hash(text: str) -> int:
    said = text.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(said, digest_size=8).digest(), "little")


def _judged(example: examples.Example) -> int:
    if example.rejected:
        return 1
    return 0 if example.label is None else 2 + example.label


def _within(values: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """int64 [n]: the index of the first row of the same set that has the same value."""
    names = np.empty(len(values), np.int64)
    for chosen in (np.flatnonzero(valid), np.flatnonzero(~valid)):
        _, first, inverse = np.unique(values[chosen], return_index=True, return_inverse=True)
        names[chosen] = chosen[first][inverse]
    return names


def _several(prompts: np.ndarray, answers: np.ndarray) -> np.ndarray:
    """bool [n]: rows whose prompt has more than one answer."""
    if not len(prompts):
        return np.zeros(0, bool)
    order = np.lexsort((answers, prompts))
    p, a = prompts[order], answers[order]
    mixed = p[1:][(p[1:] == p[:-1]) & (a[1:] != a[:-1])]
    return np.isin(prompts, mixed)


def _pairs(prompts: np.ndarray, answers: np.ndarray) -> np.ndarray:
    """One number for a prompt and an answer."""
    return prompts.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) ^ answers


def _short(places: found.Places, rows: np.ndarray, limit: int = 20) -> list[list[Any]]:
    return [list(place) for place in places.at(rows[:limit].tolist())]
