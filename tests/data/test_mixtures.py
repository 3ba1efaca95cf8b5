# SPDX-License-Identifier: Apache-2.0
"""Sources by weight: whole weights in every epoch, fractions over the epochs, and always the same number of steps."""

import collections
import math
from collections.abc import Sequence

import hypothesis
import pytest
import random_rows
from hypothesis import strategies

from jft import errors
from jft.data import batches, rows

Counts = collections.Counter[tuple[int, int]]


def make(
    sizes: Sequence[int], weights: Sequence[float], batch_size: int = 4, packing: bool = True
) -> batches.Batches:
    sources = [rows.InMemory(random_rows.some(n, seed=i)) for i, n in enumerate(sizes)]
    settings = {"batch_size": batch_size, "length": 64, "seed": 5}
    return batches.Batches(sources, weights=weights, packing=packing, **settings)


def counts(made: batches.Batches, epoch: int) -> Counts:
    """How often each row of each source stands in an epoch."""
    start = epoch * made.steps_per_epoch
    steps = range(start, start + made.steps_per_epoch)
    return collections.Counter(
        member for step in steps for held in made.members(step) for member in held
    )


@pytest.mark.parametrize("packing", [True, False])
def test_a_whole_weight_is_how_often_a_row_stands_in_every_epoch(packing: bool) -> None:
    made = make([30, 50, 20], [1, 3, 2], packing=packing)
    want = {(s, row): w for s, n, w in ((0, 30, 1), (1, 50, 3), (2, 20, 2)) for row in range(n)}
    for epoch in (0, 1, 7):
        assert counts(made, epoch) == want
    assert [share.rows for share in made.shares()] == [30, 150, 40]


@pytest.mark.parametrize("packing", [True, False])
def test_a_quarter_is_another_quarter_in_each_epoch(packing: bool) -> None:
    made = make([64, 30], [0.25, 1], packing=packing)
    quarters = [{row for source, row in counts(made, e) if source == 0} for e in range(4)]
    assert min(map(len, quarters)) > 5
    if not packing:  # 64 rows divide by four; bins need not
        assert [len(part) for part in quarters] == [16] * 4
        assert len(set.union(*quarters)) == 64
    assert all(count == 1 for epoch in range(4) for count in counts(made, epoch).values())


def test_fractions_are_another_choice_in_each_cycle_and_the_same_number_of_each_source() -> None:
    lengths = [
        list(range(1, 21)),
        list(range(21, 51)),
    ]  # no two alike that could stand for each other
    sources = [rows.InMemory(random_rows.make(part)) for part in lengths]
    settings = {"batch_size": 4, "length": 64, "seed": 0, "packing": False}
    made = batches.Batches(sources, weights=[0.5, 0.5], **settings)
    epochs = [counts(made, epoch) for epoch in range(6)]
    for epoch in epochs:
        assert collections.Counter(source for source, _ in epoch) == {0: 10, 1: 15}
    assert len({frozenset(epoch) for epoch in epochs}) == 6


def test_who_fills_a_wider_batch_is_a_matter_of_chance_and_not_of_the_source() -> None:
    sources = [rows.InMemory(random_rows.make(part)) for part in ([60, 8, 8, 8], [8, 8])]
    settings = {"batch_size": 2, "length": 64, "seed": 0, "packing": False}
    made = batches.Batches(sources, weights=[1, 2], **settings)
    assert made.steps_per_epoch == 4
    beside = collections.Counter(
        source
        for step in range(4 * 350)
        if ((0, 0),) in (both := {tuple(held) for held in made.members(step)})
        for ((source, row),) in both
        if (source, row) != (0, 0)
    )
    # 3 of the 7 short rows of an epoch are source 0's; 9 is the standard deviation.
    assert beside.total() == 350 and 115 < beside[0] < 185


@hypothesis.given(
    sizes=strategies.lists(strategies.integers(1, 25), min_size=1, max_size=3),
    weights=strategies.lists(
        strategies.sampled_from([0.3, 0.5, 0.77, 1, 1.5, 2, 2.6]), min_size=3, max_size=3
    ),
    batch_size=strategies.integers(1, 5),
    packing=strategies.booleans(),
)
@hypothesis.settings(max_examples=60, deadline=None)
def test_over_the_epochs_every_row_stands_equally_often(
    sizes: list[int], weights: list[float], batch_size: int, packing: bool
) -> None:
    try:
        made = make(sizes, weights[: len(sizes)], batch_size, packing)
    except errors.UserError as error:
        assert "takes 0 of its" in str(error)
        return
    total: Counts = collections.Counter()
    shares, starts = made.shares(), 0
    for epoch in range(5):
        now = counts(made, epoch)
        assert sum(1 for held in made.members(starts + made.steps_per_epoch - 1) if held) > 0
        starts += made.steps_per_epoch
        total += now
        for source, n in enumerate(sizes):
            so_far = [total[source, row] for row in range(n)]
            assert max(so_far) - min(so_far) <= 1
            # Each row stands there as often as whole cycles have gone by, or once more.
            expected = (epoch + 1) * shares[source].rows / n
            assert {math.floor(expected + 1e-9), math.ceil(expected - 1e-9)} >= set(so_far)


@pytest.mark.parametrize("packing", [True, False])
def test_shares_are_the_mean_over_epochs(packing: bool) -> None:
    made = make([37, 23], [1.5, 0.4], packing=packing)
    sources = [random_rows.some(37, seed=0), random_rows.some(23, seed=1)]
    # After so many epochs both are at the beginning of a cycle.
    taken = [share.rows / n for share, n in zip(made.shares(), (37, 23), strict=True)]
    epochs = next(e for e in range(1, 2000) if all(abs(e * t - round(e * t)) < 1e-9 for t in taken))
    total = sum((counts(made, epoch) for epoch in range(epochs)), collections.Counter())
    tokens = [0, 0]
    for (source, row), count in total.items():
        tokens[source] += count * int(sources[source][row].trained[1:].sum())
    for source, share in enumerate(made.shares()):
        rows_seen = sum(count for (s, _), count in total.items() if s == source)
        assert share.rows == pytest.approx(rows_seen / epochs)
        assert share.trained_tokens == pytest.approx(tokens[source] / epochs)
        assert share.fraction == pytest.approx(tokens[source] / sum(tokens))
    assert made.trained_tokens == pytest.approx(sum(tokens) / epochs)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("weight", [1, 2])
def test_sources_of_one_whole_weight_are_one_source(packing: bool, weight: int) -> None:
    given = random_rows.some(60)
    settings = {"batch_size": 4, "length": 64, "seed": 1, "packing": packing}
    parts = [rows.InMemory(given[:13]), rows.InMemory(given[13:])]
    apart = batches.Batches(parts, weights=[weight] * 2, **settings)
    whole = batches.Batches([rows.InMemory(given)], weights=[weight], **settings)
    assert apart.steps_per_epoch == whole.steps_per_epoch
    for step in range(3 * whole.steps_per_epoch):
        assert random_rows.same(apart.batch(step), whole.batch(step))


def test_another_source_leaves_a_fraction_as_it_is() -> None:
    alone, mixed = make([40], [0.3]), make([40, 25], [0.3, 2])
    for epoch in range(5):
        of_first = {key: n for key, n in counts(mixed, epoch).items() if key[0] == 0}
        assert of_first == counts(alone, epoch)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1], "data.weights has 1 numbers for 2 sources: give one for each, or none"),
        ([1, 2, 3], "data.weights has 3 numbers for 2 sources"),
        ([1, 0], "0 for source 1: give a number above 0"),
        ([-2, 1], "-2 for source 0: give a number above 0"),
        ([1, math.nan], "nan for source 1"),
        ([math.inf, 1], "inf for source 0"),
        ([1, 1e-3], r"0.001 for source 1 takes 0 of its \d+ .*: give at least 0\.\d+"),
        ([1e300, 1], "1e.300 for source 0 takes .*: give at most"),
    ],
)
def test_refusals(weights: list[float], message: str) -> None:
    with pytest.raises(errors.UserError, match=message) as caught:
        make([20, 30], weights)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200
