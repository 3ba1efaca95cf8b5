# SPDX-License-Identifier: Apache-2.0
"""Lengths of rows: their distribution in a few numbers, and in bins for a histogram."""

import array

import numpy as np

from jft.data import examples

_FEW_BINS = 12  # halves of octaves are for fewer
_TAIL = 0.005  # of the values at either end have no bins of their own


class Lengths:
    """One whole number per row: eight bytes each, however many rows there are."""

    def __init__(self) -> None:
        self._values = array.array("q")

    def add(self, value: int) -> None:
        self._values.append(value)

    def __len__(self) -> int:
        return len(self._values)

    @property
    def values(self) -> np.ndarray:
        return np.array(self._values, np.int64)

    def describe(self) -> dict[str, int]:
        """min, median, p95, max and total; nothing without values. Quantiles are values that occur."""
        if not self._values:
            return {}
        low, middle, high, top = (
            int(x) for x in np.quantile(self.values, (0, 0.5, 0.95, 1), method="inverted_cdf")
        )
        total = int(self.values.sum())
        return {"min": low, "median": middle, "p95": high, "max": top, "total": total}

    def bins(self, limit: int = 0) -> list[dict[str, int]]:
        """How many values lie from where to where, in a dozen bins or so.

        Bins are octaves (4 to 7, 8 to 15) or, where those would be few, halves of them. What hardly holds anything at
        either end is part of the next bin. A bin ends at `limit`, if that is given.
        """
        if not self._values:
            return []
        values = self.values
        low, high = np.quantile(values, (_TAIL, 1 - _TAIL), method="inverted_cdf")
        edges = _edges(int(low), int(high))
        if limit and values.min() <= limit < values.max():
            near = limit // 8  # no slivers beside it
            edges = sorted({limit + 1, *(edge for edge in edges if abs(edge - limit) > near)})
        bounds = [int(values.min()), *(e for e in edges if e > values.min()), int(values.max()) + 1]
        counts = np.histogram(values, bounds)[0]
        return [
            {"from": start, "to": end - 1, "rows": int(rows)}
            for start, end, rows in zip(bounds, bounds[1:], counts, strict=False)
        ]


def _edges(low: int, high: int) -> list[int]:
    """Where bins begin between two values."""
    octaves = [2**power for power in range(64) if low < 2**power <= high]
    halves = [3 * 2**power for power in range(64) if low < 3 * 2**power <= high]
    return octaves if len(octaves) + len(halves) > _FEW_BINS else sorted(octaves + halves)


def of_text(example: examples.Example) -> dict[str, int]:
    """Lengths of an example's text: in characters and words, of answers too, and turns of conversations."""
    turns = [(turn["role"], str(turn.get("content") or "")) for turn in example.messages]
    texts = [content for _, content in turns] or [example.text]
    answers = [content for role, content in turns if role == "assistant"]
    found = {
        "characters": sum(map(len, texts)),
        "words": sum(len(text.split()) for text in texts),
    }
    if turns:
        found["answer_words"] = sum(len(text.split()) for text in answers)
        found["turns"] = len([role for role, _ in turns if role != "system"])
    return found
