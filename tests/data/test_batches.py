# SPDX-License-Identifier: Apache-2.0
"""Batches: every example whole and once per epoch, and a step is all that resuming needs."""

import collections
import itertools

import numpy as np
import pytest
import random_rows

from jft import errors
from jft.data import batches, order, rows, widths


def make(given: list[rows.Row], **settings: object) -> batches.Batches:
    return batches.Batches([rows.InMemory(given)], **{"seed": 0, "length": 64} | settings)


def epoch_of(made: batches.Batches, epoch: int) -> list[batches.Batch]:
    return [made.batch(epoch * made.steps_per_epoch + i) for i in range(made.steps_per_epoch)]


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_an_epoch_holds_every_example_whole_and_once(packing: bool, batch_size: int) -> None:
    given = random_rows.some(101)
    made = make(given, batch_size=batch_size, seed=3, packing=packing)
    expected = collections.Counter(map(random_rows.piece, given))
    for epoch in (0, 1, 5):
        found = epoch_of(made, epoch)
        assert collections.Counter(p for b in found for p in random_rows.pieces(b)) == expected
        weights = sum(float(b["weights"].sum()) for b in found)
        assert weights == sum(int(row.trained.sum()) for row in given) == made.trained_tokens
        for batch in found:
            (shape,) = {array.shape for array in batch.values()}
            assert shape[0] == batch_size and shape[1] in made.widths
            empty = batch["segments"] == 0
            assert all(not array[empty].any() for array in batch.values())
        assert all(batch["segments"].any(axis=1).all() for batch in found[:-1])
        filled = sum(int((b["segments"] > 0).sum()) for b in found)
        total = sum(batch["segments"].size for batch in found)
        assert made.padding == pytest.approx(1 - filled / total)


def test_members_are_what_the_batch_holds() -> None:
    given = random_rows.some(60)
    for packing in (True, False):
        made = make(given, batch_size=7, packing=packing)
        for step in range(made.steps_per_epoch + 2):
            members = made.members(step)
            assert len(members) == 7
            held = [random_rows.piece(given[row]) for part in members for _, row in part]
            assert held == random_rows.pieces(made.batch(step))


def test_packing_saves_rows() -> None:
    given = random_rows.some(200)
    packed, plain = (make(given, batch_size=4, packing=p) for p in (True, False))
    assert packed.steps_per_epoch < 0.5 * plain.steps_per_epoch
    assert packed.padding < 0.05 < plain.padding


@pytest.mark.parametrize("packing", [True, False])
def test_a_far_step_costs_no_more_than_the_first(
    packing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw, drawn = order.draw, []

    def noted(count: int, *key: int) -> np.ndarray:
        drawn.append(count)
        return draw(count, *key)

    monkeypatch.setattr(order, "draw", noted)
    given = random_rows.Noted(random_rows.some(100))
    costs = []
    for step in (0, 10**9):
        drawn.clear()
        given.read.clear()
        made = batches.Batches([given], batch_size=4, length=64, seed=0, packing=packing)
        made.batch(step)
        assert len(given.read) == sum(map(len, made.members(step)))
        costs.append(list(drawn))
    assert costs[0] == costs[1]


def test_epochs_differ_in_order_and_in_company() -> None:
    made = make(random_rows.some(200, longest=12), batch_size=1, length=32)
    epochs = [
        [tuple(sorted(made.members(start + i)[0])) for i in range(made.steps_per_epoch)]
        for start in (0, made.steps_per_epoch)
    ]
    assert epochs[0] != epochs[1]
    assert set(epochs[0]) != set(epochs[1])
    assert made.total_steps(2.5) == -(-5 * made.steps_per_epoch // 2)
    seeds = [make(random_rows.some(200), batch_size=4, seed=seed).batch(0) for seed in (0, 1)]
    assert not random_rows.same(*seeds)


@pytest.mark.parametrize(
    ("lengths", "batch_size"),
    [
        ([60, 60, 60, 60], 1),
        ([60, 60, 8, 8], 1),  # two widths
        ([60, 59, 58, 57], 2),  # one width, and no two rows alike that could stand for each other
    ],
)
def test_every_order_is_as_likely(lengths: list[int], batch_size: int) -> None:
    made = make(random_rows.make(lengths), batch_size=batch_size, packing=False)
    steps = made.steps_per_epoch
    found = collections.Counter(
        tuple(held[0] for i in range(steps) for held in made.members(steps * epoch + i))
        for epoch in range(1200)
    )
    assert len(found) == 24  # 50 each; 7 is the standard deviation
    assert 22 < min(found.values()) and max(found.values()) < 85


def test_draws_are_those_of_every_numpy_and_are_unlike_each_other() -> None:
    # If this fails, numpy's PCG64 or SeedSequence have changed, and a resumed run would go on in another order.
    drawn = [12721991996166300958, 907113913811308879]
    assert order.draw(2, 7, order.CYCLE, 0, 3).tolist() == drawn
    keys = [(0, 0), (0, 0, 0), (1, 0), (0, 1), (0,)]
    found = {order.draw(1, 7, *key)[0] for key in keys}
    assert len(found) == len(keys)


def test_rows_are_no_wider_than_needed() -> None:
    given = random_rows.some(3, longest=20)
    need = [len(row.tokens) - 1 for row in given]

    def length(limit: int, packing: bool) -> int:
        return make(given, batch_size=1, length=limit, packing=packing).length

    assert length(4096, True) == -(-sum(need) // 8) * 8
    assert length(4096, False) == -(-max(need) // 8) * 8
    assert length(max(need), False) == max(need)


def test_batches_without_packing_are_as_narrow_as_few_widths_allow() -> None:
    rng = np.random.default_rng(0)
    given = random_rows.make(np.clip(rng.lognormal(4, 1, 600), 1, 1000).astype(int).tolist())
    made = make(given, batch_size=4, length=1000, packing=False)
    assert 2 <= len(made.widths) <= widths.MOST and made.length == max(made.widths)
    lengths = np.array([len(row.tokens) - 1 for row in given])
    one_width = 1 - lengths.sum() / (made.steps_per_epoch * 4 * made.length)
    assert made.padding < 0.3 < 0.8 < one_width
    used = set()
    for batch in epoch_of(made, 0):
        longest = int((batch["segments"] > 0).sum(axis=1).max())
        fitting = [width for width in made.widths if width >= longest]
        assert batch["tokens"].shape[1] == min(fitting)
        used.add(min(fitting))
    assert used == set(made.widths.tolist())


@pytest.mark.parametrize("most", [1, 2, 3, 4])
def test_widths_are_the_best_there_are(most: int) -> None:
    longest = np.random.default_rng(most).integers(1, 90, size=40)
    got = widths.choose(longest, 90, most)
    highest = min(90, -(-int(longest.max()) // 8) * 8)

    def positions(chosen: np.ndarray) -> int:
        return int(chosen[np.searchsorted(chosen, longest)].sum())

    every = (
        np.array([*some, highest])
        for count in range(most)
        for some in itertools.combinations(range(8, highest, 8), count)
    )
    assert got[-1] == highest and len(got) <= most
    assert positions(got) == min(map(positions, every))


@pytest.mark.parametrize("weights", [(1, 1), (2, 1), (3, 5)])
def test_widths_are_chosen_for_the_batches_that_come(weights: tuple[int, int]) -> None:
    sources = [random_rows.some(n, seed=n) for n in (31, 50)]
    parts = [rows.InMemory(given) for given in sources]
    settings = {"batch_size": 4, "length": 64, "seed": 0, "weights": weights}
    made = batches.Batches(parts, packing=False, **settings)
    longest = [
        max(
            len(sources[source][row].tokens) - 1
            for held in made.members(step)
            for source, row in held
        )
        for step in range(made.steps_per_epoch)
    ]
    lengths, times = [part.lengths for part in parts], [float(weight) for weight in weights]
    foreseen = widths.longest_of_batches(lengths, times, 4)
    # Rows move among batches of one width, so the lengths differ below it, and the widths do not.
    at = [np.sort(np.searchsorted(made.widths, values)) for values in (longest, foreseen)]
    assert np.array_equal(*at)


def test_a_width_that_saves_little_is_not_compiled() -> None:
    assert widths.choose(np.full(100, 60), 64).tolist() == [64]
    assert widths.choose(np.r_[np.full(1000, 60), 50], 64).tolist() == [64]
    assert widths.choose(np.r_[np.full(1000, 60), 65], 4096).tolist() == [64, 72]


@pytest.mark.parametrize("packing", [True, False])
def test_evaluation_is_fixed_and_complete(packing: bool) -> None:
    given = random_rows.some(37)
    first, second = (
        list(batches.evaluation(rows.InMemory(r), batch_size=4, length=64, packing=packing))
        for r in (given, given)
    )
    found = [piece for batch in first for piece in random_rows.pieces(batch)]
    assert collections.Counter(found) == collections.Counter(map(random_rows.piece, given))
    assert all(random_rows.same(*both) for both in zip(first, second, strict=True))
    trained = make(given, batch_size=4, packing=packing)
    assert {batch["tokens"].shape for batch in first} <= {(4, width) for width in trained.widths}
    assert len(first) == trained.steps_per_epoch


def untrained(length: int) -> rows.Row:
    return rows.Row(np.ones(length + 1, np.int32), np.zeros(length + 1, bool), "f:row 3")


@pytest.mark.parametrize(
    ("given", "settings", "message"),
    [
        ([untrained(4)], {}, r"f:row 3: has no token to train on.*1 of 1 rows"),
        (random_rows.make([3, 65]), {}, "row 1: takes 65 positions, more than data.max_length=64"),
        ([], {}, "source 1 of 1 has no rows"),
        (random_rows.make([3]), {"batch_size": 0}, "batch_size=0"),
        (random_rows.make([3]), {"seed": -1}, "seed=-1"),
        (random_rows.make([3]), {"batch_size": 6, "hosts": 4}, "batch_size=6 .* 4 hosts: use 8"),
        (random_rows.make([3]), {"host": 2, "hosts": 2}, "host 2 of 2"),
    ],
)
def test_refusals(given: list[rows.Row], settings: dict[str, int], message: str) -> None:
    with pytest.raises(errors.UserError, match=message) as caught:
        make(given, **{"batch_size": 2} | settings)
    assert "\n" not in str(caught.value)
    if not settings:
        with pytest.raises(errors.UserError, match=message):
            list(batches.evaluation(rows.InMemory(given), batch_size=2, length=64))
