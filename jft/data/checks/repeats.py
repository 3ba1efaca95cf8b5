# SPDX-License-Identifier: Apache-2.0
"""What rows have in common: duplicates, near duplicates, leaks, prompts with several answers."""

from typing import Any

import numpy as np

from jft.data import findings
from jft.data.checks import found, hashes

LEAK = 0.05  # of the validation rows: above it, what validation measures is memory


def told(rows: hashes.Columns, places: found.Places) -> list[findings.Finding]:
    """All findings about rows together; training and validation rows are each compared among themselves."""
    if not len(rows.row):
        return []
    kinds = (_duplicates, _near, _conflicts, _contradictions, _leaks)
    return [finding for kind in kinds for finding in kind(rows, places)]


def _duplicates(rows: hashes.Columns, places: found.Places) -> list[findings.Finding]:
    names = _within(rows.whole, rows.valid)
    later = np.flatnonzero(names != np.arange(len(names)))
    if not len(later):
        return []
    sets = len(np.unique(names[later]))
    return [
        findings.Finding(
            "duplicate",
            "warning",
            len(later),
            places.at(rows.row[later].tolist()),
            f"{found.plural(len(later), 'row')} equal to an earlier one (of {sets:,} different)",
            "take the repeats out (--fix does), unless a row shall count more often",
            {"sets": sets, "fix": "remove"},
        )
    ]


def _near(rows: hashes.Columns, places: found.Places) -> list[findings.Finding]:
    names = _within(rows.groups, rows.valid)
    distinct = _within(rows.whole, rows.valid) == np.arange(len(names))
    sizes = np.bincount(names[distinct], minlength=len(names))
    members = np.flatnonzero(distinct & (sizes[names] > 1))
    if not len(members):
        return []
    members = members[np.argsort(names[members], kind="stable")]
    parted = np.split(members, np.flatnonzero(np.diff(names[members])) + 1)
    parted.sort(key=lambda group: -len(group))
    later = np.sort(np.concatenate([group[1:] for group in parted]))
    return [
        findings.Finding(
            "near_duplicate",
            "warning",
            len(later),
            places.at(rows.row[later].tolist()),
            f"{found.plural(len(later), 'row')} nearly equal to an earlier one "
            f"({found.plural(len(parted), 'group')}, the largest of {len(parted[0]):,} rows)",
            "keep the best of each group, unless the small differences are what is to be learnt",
            {"groups": [_short(places, rows.row[group]) for group in parted[: found.LISTED]]},
        )
    ]


def _conflicts(rows: hashes.Columns, places: found.Places) -> list[findings.Finding]:
    """Prompts with several answers. Of judged answers there are several by nature."""
    prompts = _within(rows.prompt, rows.valid)
    plain = np.flatnonzero((rows.judged == hashes.PLAIN) & (rows.answer != 0))
    concerned = plain[_several(prompts[plain], rows.answer[plain])]
    if not len(concerned):
        return []
    count = len(np.unique(prompts[concerned]))
    repeats = len(concerned) - count
    return [
        findings.Finding(
            "conflict",
            "warning",
            count,
            places.at(rows.row[concerned].tolist()),
            f"{found.plural(count, 'prompt')} with several answers "
            f"({len(concerned):,} rows, {repeats:,} of them beyond the first of its prompt)",
            "keep them if several answers are right (references, samples); else keep the right one",
            {"prompts": count, "repeats": repeats, "rows": len(concerned)},
        )
    ]


def _contradictions(rows: hashes.Columns, places: found.Places) -> list[findings.Finding]:
    """Rows whose answer to a prompt is good in one row and bad in another."""
    prompts = _within(rows.prompt, rows.valid)
    pair = rows.judged == hashes.PAIR
    good = np.flatnonzero(pair | (rows.judged == hashes.GOOD))
    bad = np.flatnonzero(pair | (rows.judged == hashes.BAD))
    told = _joined(prompts[good], rows.answer[good])
    against = _joined(prompts[bad], np.where(pair[bad], rows.rejected[bad], rows.answer[bad]))
    both = np.intersect1d(told, against)
    concerned = np.union1d(good[np.isin(told, both)], bad[np.isin(against, both)])
    if not len(concerned):
        return []
    return [
        findings.Finding(
            "conflict",
            "warning",
            len(concerned),
            places.at(rows.row[concerned].tolist()),
            f"{found.plural(len(concerned), 'row')} with an answer that is judged both good and bad",
            "decide for one judgement and take the other rows out: together they teach nothing",
        )
    ]


def _leaks(rows: hashes.Columns, places: found.Places) -> list[findings.Finding]:
    """Validation prompts whose words are a training prompt's: punctuation does not hide them."""
    valid, words, groups = rows.valid, rows.words, rows.groups
    if not valid.any() or valid.all():
        return []
    leaked = valid & np.isin(words, words[~valid])
    near_too = valid & ~leaked & np.isin(groups, groups[~valid])
    counts = {
        "valid_rows": _short(places, rows.row[leaked], leaked.sum()),
        "near_valid_rows": _short(places, rows.row[near_too], near_too.sum()),
    }
    if not leaked.any():
        return [_tell_near_leak(int(near_too.sum()), counts)] if near_too.any() else []
    sources = ~valid & np.isin(words, words[leaked])
    share = leaked.sum() / valid.sum()
    beside = f"; {near_too.sum():,} more nearly equal to a training row" if near_too.any() else ""
    return [
        findings.Finding(
            "leak",
            "error" if share >= LEAK else "warning",
            int(leaked.sum()),
            places.at(rows.row[sources].tolist()),
            f"{leaked.sum():,} of {valid.sum():,} validation rows ({share:.1%}) with a prompt of the training "
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
        f"{found.plural(count, 'validation row')} nearly equal to a training row",
        "look at a few: where they are the same question, validation measures memory",
        counts,
    )


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


def _joined(prompts: np.ndarray, answers: np.ndarray) -> np.ndarray:
    """One number for a prompt and an answer."""
    return prompts.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) ^ answers


def _short(places: found.Places, rows: np.ndarray, limit: int = 20) -> list[list[Any]]:
    return [list(place) for place in places.at(rows[:limit].tolist())]
