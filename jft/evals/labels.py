# SPDX-License-Identifier: Apache-2.0
"""Answers as labels: accuracy, macro F1 and the table of confusions."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from jft.evals import matching, result

OTHER = "(none of the labels)"


def names(answers: matching.Answers) -> list[str]:
    """The labels: what references say, each as first written."""
    found: dict[str, str] = {}
    for a in answers:
        found.setdefault(_key(a.reference), a.reference.strip())
    return sorted(found.values())


def _key(text: str) -> str:
    return matching.normalise(text) or text.strip()


def chosen(text: str, labels: Sequence[str]) -> str:
    """The label that an answer gives: it is one, or it holds one, as whole words, and no other.

    "The category is card arrival." gives `card arrival`, also beside a label `card`; an answer that names two gives none.
    """
    keys = {_key(label): label for label in labels}
    said = _key(text)
    if said in keys:
        return keys[said]
    rest, held = said, []
    for key in sorted(keys, key=len, reverse=True):
        found = re.compile(rf"(?<!\w){re.escape(key)}(?!\w)")
        if found.search(rest):
            held.append(keys[key])
            rest = found.sub("\0", rest)  # a shorter label inside a longer one is not said
    return held[0] if len(held) == 1 else OTHER


def confusion(answers: matching.Answers) -> tuple[list[str], np.ndarray]:
    """(labels, [wanted, given]); the last column counts answers that give no label."""
    labels, wanted, given = _read(answers)
    table = np.zeros((len(labels), len(labels) + 1), np.int64)
    np.add.at(table, (wanted, given), 1)
    return labels, table


def _read(answers: matching.Answers) -> tuple[list[str], np.ndarray, np.ndarray]:
    labels = names(answers)
    at = {label: i for i, label in enumerate([*labels, OTHER])}
    keys = {_key(label): i for label, i in at.items()}
    wanted = [keys[_key(a.reference)] for a in answers]
    given = [at[chosen(a.text, labels)] for a in answers]
    return labels, np.array(wanted, np.int64), np.array(given, np.int64)


def accuracy(answers: matching.Answers) -> result.Result:
    """Answers with the right label; `details` has the table of confusions."""
    labels, wanted, given = _read(answers)
    return result.mean("label", wanted == given, details=_details(answers))


def macro_f1(answers: matching.Answers) -> result.Result:
    """The mean over labels of each one's F1; an example's own value is whether it is right."""
    labels, wanted, given = _read(answers)
    n = len(labels)
    said, right = np.eye(n + 1)[given][:, :n], np.eye(n)[wanted]
    parts = np.concatenate([said * right, said, right], axis=1)

    def finish(sums: np.ndarray) -> np.ndarray:
        hits, given, wanted = (sums[..., i * n : (i + 1) * n] for i in range(3))
        # A label that is neither wanted nor given in a resample has no F1 there.
        there = given + wanted > 0
        each = np.where(there, 2 * hits / np.maximum(given + wanted, 1), 0.0)
        return each.sum(axis=-1) / there.sum(axis=-1)

    values = (wanted == given).astype(np.float64)
    return result.Result("macro_f1", values, parts, finish, details=_details(answers))


def _details(answers: matching.Answers) -> dict[str, Any]:
    labels, table = confusion(answers)
    return {"labels": labels, "confusion": table.tolist()}
