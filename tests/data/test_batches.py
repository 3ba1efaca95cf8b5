# SPDX-License-Identifier: Apache-2.0
"""Batches: every example whole and once per epoch, and a step is all that resuming needs."""

import collections
import dataclasses

import numpy as np
import pytest

from jft import errors
from jft.data import batches, chat


def make_rows(count: int, seed: int = 0, longest: int = 40) -> list[chat.Row]:
    """Rows of random tokens from 1; each row is unlike every other."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        n = int(rng.integers(4, longest))
        tokens = rng.integers(1, 1000, size=n).astype(np.int32)
        trained = np.arange(n) >= rng.integers(2, n)
        trained[-1] = True
        rows.append(chat.Row(tokens, trained, f"row {i}"))
    return rows


Piece = tuple[bytes, bytes, bytes, bytes]


def pieces(batch: batches.Batch) -> list[Piece]:
    """The examples in a batch, taken apart by segment."""
    found = []
    for b in range(len(batch["tokens"])):
        for segment in range(1, batch["segments"][b].max() + 1):
            at = batch["segments"][b] == segment
            names = ("tokens", "targets", "weights", "positions")
            found.append(tuple(batch[name][b][at].tobytes() for name in names))
    return found


def piece(row: chat.Row) -> Piece:
    positions = np.arange(len(row.tokens) - 1, dtype=np.int32)
    weights = row.trained[1:].astype(np.float32)
    parts = (row.tokens[:-1], row.tokens[1:], weights, positions)
    return tuple(part.tobytes() for part in parts)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_an_epoch_holds_every_example_whole_and_once(packing: bool, batch_size: int) -> None:
    rows = make_rows(101)
    made = batches.Batches(rows, batch_size=batch_size, length=64, seed=3, packing=packing)
    expected = collections.Counter(map(piece, rows))
    for epoch in (0, 1, 5):
        steps = range(epoch * made.steps_per_epoch, (epoch + 1) * made.steps_per_epoch)
        epoch_batches = [made.batch(step) for step in steps]
        assert collections.Counter(p for b in epoch_batches for p in pieces(b)) == expected
        weights = sum(float(b["weights"].sum()) for b in epoch_batches)
        assert weights == sum(int(row.trained.sum()) for row in rows) == made.trained_tokens
        for batch in epoch_batches:
            assert {array.shape for array in batch.values()} == {(batch_size, made.length)}
            empty = batch["segments"] == 0
            assert all(not array[empty].any() for array in batch.values())
        filled = sum(int((b["segments"] > 0).sum()) for b in epoch_batches)
        total = made.steps_per_epoch * batch_size * made.length
        assert made.padding == pytest.approx(1 - filled / total)


def test_packing_saves_rows() -> None:
    rows = make_rows(200)
    packed, plain = (
        batches.Batches(rows, batch_size=4, length=64, seed=0, packing=p) for p in (True, False)
    )
    assert packed.steps_per_epoch < 0.5 * plain.steps_per_epoch
    assert packed.padding < 0.05 < plain.padding


def test_a_step_is_all_that_resuming_needs() -> None:
    rows = make_rows(50)
    settings = {"batch_size": 4, "length": 48, "seed": 7}
    straight = batches.Batches(rows, **settings)
    walked = [straight.batch(step) for step in range(3 * straight.steps_per_epoch)]
    for step in (0, 5, 2 * straight.steps_per_epoch + 1, 3, len(walked) - 1):
        jumped = batches.Batches(rows, **settings).batch(step)
        assert all(np.array_equal(jumped[name], walked[step][name]) for name in jumped)
    other = batches.Batches(rows, **{**settings, "seed": 8})
    assert not np.array_equal(other.batch(0)["tokens"], walked[0]["tokens"])


def test_epochs_differ_in_order_and_in_company() -> None:
    made = batches.Batches(make_rows(200, longest=12), batch_size=1, length=32, seed=0)
    epochs = [
        [
            tuple(sorted(made.members(step)[0]))
            for step in range(start, start + made.steps_per_epoch)
        ]
        for start in (0, made.steps_per_epoch)
    ]
    assert epochs[0] != epochs[1]
    assert set(epochs[0]) != set(epochs[1])
    assert made.total_steps(2.5) == -(-5 * made.steps_per_epoch // 2)


def test_rows_are_no_longer_than_needed() -> None:
    rows = [row for row in make_rows(3, longest=20)]
    need = [len(row.tokens) - 1 for row in rows]

    def length(limit: int, packing: bool) -> int:
        return batches.Batches(rows, batch_size=1, length=limit, seed=0, packing=packing).length

    assert length(4096, True) == -(-sum(need) // 8) * 8
    assert length(4096, False) == -(-max(need) // 8) * 8
    assert length(max(need), False) == max(need)


@pytest.mark.parametrize("packing", [True, False])
def test_evaluation_is_fixed_and_complete(packing: bool) -> None:
    rows = make_rows(37)
    first, second = (
        list(batches.evaluation(rows, batch_size=4, length=64, packing=packing)) for _ in range(2)
    )
    assert collections.Counter(p for b in first for p in pieces(b)) == collections.Counter(
        map(piece, rows)
    )
    for one, other in zip(first, second, strict=True):
        assert all(np.array_equal(one[name], other[name]) for name in one)


def row_of(prompt: int, response: int, source: str = "row") -> chat.Row:
    n = prompt + response
    return chat.Row(np.arange(1, n + 1, dtype=np.int32), np.arange(n) >= prompt, source)


def test_too_long_is_an_error_with_the_numbers() -> None:
    rows = [row_of(5, 5), row_of(10, 30, "f:row 2"), row_of(10, 20)]
    with pytest.raises(
        errors.UserError, match=r"2 of 3 rows .*=16; the longest \(f:row 2\) needs 39"
    ):
        batches.fit(rows, 16)
    # n tokens take n - 1 positions: at 39 nothing is too long.
    kept, report = batches.fit(rows, 39)
    assert len(kept) == 3 and report.longest == 39
    with pytest.raises(errors.UserError, match="needs 39"):
        batches.fit(rows, 38)


def test_drop_counts() -> None:
    rows = [row_of(5, 5), row_of(10, 30), row_of(8, 0)]
    kept, report = batches.fit(rows, 16, "drop")
    assert kept == rows[:1]
    assert (report.rows, report.kept, report.dropped, report.untrained) == (3, 1, 1, 1)
    with pytest.raises(errors.UserError, match="no row is left.*2 have no trained.*1 are longer"):
        batches.fit([row_of(8, 0), row_of(1, 0), row_of(10, 30)], 16, "drop")


def test_truncation_keeps_the_response_and_the_first_token() -> None:
    rows = [row_of(20, 6), row_of(3, 3)]
    kept, report = batches.fit(rows, 10, "truncate_prompt")
    assert kept[0].tokens.tolist() == [1, *range(17, 27)]
    assert kept[0].tokens[kept[0].trained].tolist() == rows[0].tokens[rows[0].trained].tolist()
    assert kept[1] is rows[1]
    assert (report.truncated, report.truncated_tokens, report.dropped) == (1, 15, 0)
    with pytest.raises(
        errors.UserError, match="f:row 9: takes 12 positions even without its prompt"
    ):
        batches.fit([row_of(20, 12, "f:row 9")], 11, "truncate_prompt")
    kept, _ = batches.fit([row_of(20, 12)], 12, "truncate_prompt")
    assert kept[0].tokens.tolist() == [1, *range(21, 33)]


def test_no_rows_fit_and_untrained_turns_are_counted() -> None:
    kept, report = batches.fit([], 16)
    assert (kept, report.rows, report.kept, report.longest) == ([], 0, 0, 0)
    turns = [dataclasses.replace(row_of(5, 5), untrained_turns=n) for n in (2, 1)]
    assert batches.fit(turns, 16)[1].untrained_turns == 3


def test_refusals() -> None:
    with pytest.raises(errors.UserError, match="row: has no token to train on"):
        batches.Batches([row_of(5, 0)], batch_size=1, length=8, seed=0)
    with pytest.raises(errors.UserError, match="row: takes 9 positions, more than .*=8"):
        batches.Batches([row_of(5, 5)], batch_size=1, length=8, seed=0)
    with pytest.raises(errors.UserError, match="no rows"):
        list(batches.evaluation([], batch_size=1, length=8))
    with pytest.raises(errors.UserError, match="batch_size=0"):
        batches.Batches([row_of(2, 2)], batch_size=0, length=8, seed=0)
    with pytest.raises(errors.UserError, match="data.overlength=cut"):
        batches.fit([row_of(2, 2)], 8, "cut")
