# SPDX-License-Identifier: Apache-2.0
"""Balance of answers: of the classes where answers are a closed set, and of labels of preferences."""

import array
import collections

from jft.data import examples, findings, near
from jft.data.checks import found

CHARACTERS = 60  # of an answer that can be a class
CLASSES = 2000  # more different answers than these are no classes
ROWS = 30  # fewer rows say nothing about balance
PER_CLASS = 5  # rows, on average, that a class has at least
SHORT = 0.98  # of the rows have short answers where these are classes
LARGEST = 0.6  # of the rows in one class
TINY = 10  # rows of a class that is hard to learn
TINY_SHARE = 0.2  # of the classes are tiny
LABEL = 0.8  # of the rows have one label


class Answers:
    """8 bytes a row: its number, and which of the short answers it gives."""

    def __init__(self) -> None:
        self._classes: dict[str, int] = {}
        self._class = array.array("i")  # -1: no short answer
        self._row = array.array("i")
        self._labels: collections.Counter[bool] = collections.Counter()

    def add(self, row: int, example: examples.Example) -> None:
        if example.label is not None:
            self._labels[example.label] += 1
        elif example.messages and not example.rejected:
            answer = near.said(example.messages[-1]).strip()
            short = len(answer) <= CHARACTERS and "\n" not in answer
            number = self._number(answer) if short else -1
            self._class.append(number)
            self._row.append(row)

    def _number(self, answer: str) -> int:
        if len(self._classes) > CLASSES:
            return -1
        return self._classes.setdefault(answer, len(self._classes))

    def told(self, places: found.Places) -> list[findings.Finding]:
        return self._of_labels() + self._of_classes(places)

    def _of_labels(self) -> list[findings.Finding]:
        total = self._labels.total()
        if total < ROWS:
            return []
        label, count = self._labels.most_common(1)[0]
        if count < LABEL * total:
            return []
        word = "good" if label else "bad"
        return [
            findings.Finding(
                "imbalance",
                "warning",
                count,
                (),
                f"{count:,} of {total:,} rows ({count / total:.0%}) are labelled {word}",
                "add rows with the other label, or weigh the two in the loss",
                {"labels": {str(name).lower(): n for name, n in sorted(self._labels.items())}},
            )
        ]

    def _of_classes(self, places: found.Places) -> list[findings.Finding]:
        total = len(self._class)
        counts = collections.Counter(self._class)
        others = counts.pop(-1, 0)
        if (
            total < ROWS
            or others > (1 - SHORT) * total
            or not 2 <= len(counts) <= total / PER_CLASS
        ):
            return []
        names = list(self._classes)
        number, largest = counts.most_common(1)[0]
        tiny = {one for one, rows in counts.items() if rows < TINY}
        rows = [row for one, row in zip(self._class, self._row, strict=True) if one in tiny]
        uneven = largest > LARGEST * total
        warned = uneven or len(tiny) >= max(2, TINY_SHARE * len(counts))
        message = (
            f"the answers are {len(counts)} classes: {names[number]!r} has {largest / total:.1%} of the rows, "
            f"{len(tiny)} have fewer than {TINY} rows"
        )
        return [
            findings.Finding(
                "imbalance",
                "warning" if warned else "note",
                len(counts),
                places.at(rows),
                message,
                "add rows of the rare classes, or take rows of the frequent ones out; judge by each class's accuracy"
                if warned
                else "nothing to do; judge by accuracy, since the answers are a closed set",
                {
                    "classes": {names[one]: n for one, n in counts.most_common(found.LISTED)},
                    "smallest": min(counts.values()),
                    "tiny": len(tiny),
                },
            )
        ]
