# SPDX-License-Identifier: Apache-2.0
"""Long rows: refused, left out, cut or split, and every one of them counted."""

import collections

import hypothesis
import numpy as np
import pytest
import random_rows
from hypothesis import strategies as st

from jft import errors
from jft.data import fitting, rows


def row_of(prompt: int, response: int, source: str = "row") -> rows.Row:
    n = prompt + response
    return rows.Row(np.arange(1, n + 1, dtype=np.int32), np.arange(n) >= prompt, source)


def fit(
    some: list[rows.Row], length: int, overlength: str = "error"
) -> tuple[list[rows.Row], fitting.Fit]:
    fitted, report = fitting.fit(rows.InMemory(some), length, overlength)
    found = [fitted[i] for i in range(len(fitted))]
    assert fitted.lengths.tolist() == [len(row.tokens) - 1 for row in found]
    assert fitted.trained.tolist() == [int(row.trained[1:].sum()) for row in found]
    return found, report


def test_too_long_is_an_error_with_the_numbers() -> None:
    some = [row_of(5, 5), row_of(10, 30, "f:row 2"), row_of(10, 20)]
    with pytest.raises(
        errors.UserError, match=r"2 of 3 rows .*=16; the longest \(f:row 2\) needs 39"
    ):
        fit(some, 16)
    # n tokens take n - 1 positions: at 39 nothing is too long.
    kept, report = fit(some, 39)
    assert len(kept) == 3 and report.longest == 39
    with pytest.raises(errors.UserError, match="needs 39"):
        fit(some, 38)
    with pytest.raises(errors.UserError, match="data.overlength=cut: unknown"):
        fit(some, 8, "cut")


def test_drop_counts() -> None:
    some = [row_of(5, 5), row_of(10, 30), row_of(8, 0)]
    kept, report = fit(some, 16, "drop")
    assert [row.tokens.tolist() for row in kept] == [some[0].tokens.tolist()]
    assert (report.rows, report.kept, report.dropped, report.untrained) == (3, 1, 1, 1)


def test_truncation_keeps_the_response_and_the_first_token() -> None:
    some = [row_of(20, 6), row_of(3, 3)]
    kept, report = fit(some, 10, "truncate_prompt")
    assert kept[0].tokens.tolist() == [1, *range(17, 27)]
    assert kept[0].tokens[kept[0].trained].tolist() == some[0].tokens[some[0].trained].tolist()
    assert kept[1].tokens.tolist() == some[1].tokens.tolist()
    assert (report.truncated, report.truncated_tokens, report.dropped) == (1, 15, 0)
    with pytest.raises(
        errors.UserError, match="f:row 9: takes 12 positions even without its prompt"
    ):
        fit([row_of(20, 12, "f:row 9")], 11, "truncate_prompt")
    kept, _ = fit([row_of(20, 12)], 12, "truncate_prompt")
    assert kept[0].tokens.tolist() == [1, *range(21, 33)]


def test_no_rows() -> None:
    kept, report = fit([], 16)
    assert (kept, report.rows, report.kept, report.longest) == ([], 0, 0, 0)


def targets(row: rows.Row) -> list[tuple[int, int]]:
    """Each trained target with the token before it."""
    pairs = zip(row.tokens[:-1].tolist(), row.tokens[1:].tolist(), strict=True)
    return [pair for pair, trained in zip(pairs, row.trained[1:], strict=True) if trained]


@hypothesis.given(st.lists(st.integers(1, 60), max_size=12), st.integers(1, 30), st.integers(0, 9))
@hypothesis.settings(deadline=None)
def test_split_trains_every_target_once(lengths: list[int], length: int, seed: int) -> None:
    some = random_rows.make(lengths, seed)
    pieces, report = fit(some, length, "split")
    assert all(len(piece.tokens) - 1 <= length and piece.trained[1:].any() for piece in pieces)
    expected = collections.Counter(t for row in some for t in targets(row))
    assert collections.Counter(t for piece in pieces for t in targets(piece)) == expected
    long = [row for row in some if len(row.tokens) - 1 > length]
    assert (report.kept, report.split) == (len(some), len(long))
    assert report.pieces == len(pieces) - (len(some) - len(long))


def test_some_of_the_rows() -> None:
    some = rows.InMemory([row_of(2, n) for n in range(1, 9)])
    fitted, report = fitting.fit(some, 6, "drop", some=np.array([1, 3, 7]))
    assert fitted.of.tolist() == [1, 3]
    assert (report.rows, report.kept, report.dropped) == (3, 2, 1)
