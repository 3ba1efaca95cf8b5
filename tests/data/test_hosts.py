# SPDX-License-Identifier: Apache-2.0
"""Hosts and resuming: the parts of all hosts are the batch of one, wherever a run goes on, and each reads its own rows."""

from collections.abc import Sequence
from typing import Any

import hypothesis
import numpy as np
import pytest
import random_rows
from hypothesis import strategies

from jft.data import batches


@strategies.composite
def cases(draw: strategies.DrawFn) -> tuple[list[list[int]], dict[str, Any]]:
    """Lengths of the rows of one to three sources, and settings for one host."""
    lengths = strategies.lists(strategies.integers(1, 48), min_size=2, max_size=20)
    sources = draw(strategies.lists(lengths, min_size=1, max_size=3))
    weight = strategies.sampled_from([0.5, 0.75, 1, 1.3, 2])
    weights = strategies.lists(weight, min_size=len(sources), max_size=len(sources))
    settings = {
        "batch_size": draw(strategies.sampled_from([4, 8, 12])),
        "length": draw(strategies.sampled_from([48, 64, 250])),
        "seed": draw(strategies.integers(0, 2**70)),
        "packing": draw(strategies.booleans()),
        "weights": draw(strategies.one_of(strategies.just([]), weights)),
    }
    return sources, settings


def build(sources: Sequence[Sequence[int]], settings: dict[str, Any]) -> tuple[Any, Any]:
    """Batches of rows made anew, and the rows."""
    given = [random_rows.Noted(random_rows.make(part, i)) for i, part in enumerate(sources)]
    # A bin may hold a whole source, of which half would be none.
    if min(settings["weights"], default=1) < 1:
        given = [
            random_rows.Noted(random_rows.make([*p, 48, 48], i)) for i, p in enumerate(sources)
        ]
        settings = settings | {"length": 48}
    return batches.Batches(given, **settings), given


@hypothesis.given(
    case=cases(), k=strategies.integers(0, 60), hosts=strategies.sampled_from([1, 2, 4])
)
@hypothesis.settings(max_examples=80, deadline=None)
def test_from_any_step_the_hosts_go_on_as_one_that_walked(
    case: tuple[list[list[int]], dict[str, Any]], k: int, hosts: int
) -> None:
    sources, settings = case
    walked, _ = build(sources, settings)
    before = [walked.batch(step) for step in range(k + 4)]
    resumed = [build(sources, settings | {"host": h, "hosts": hosts})[0] for h in range(hosts)]
    for step in range(k, k + 4):
        parts = [made.batch(step) for made in resumed]
        assert {len(part["tokens"]) for part in parts} == {settings["batch_size"] // hosts}
        joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        assert random_rows.same(joined, before[step])
        assert all(made.members(step) == walked.members(step) for made in resumed)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_a_host_reads_its_own_rows_and_no_others(packing: bool, hosts: int) -> None:
    sources = [np.random.default_rng(i).integers(1, 40, 30 + i).tolist() for i in range(2)]
    settings = {"batch_size": 8, "length": 48, "seed": 0, "packing": packing, "weights": [1, 0.5]}
    for host in range(hosts):
        made, given = build(sources, settings | {"host": host, "hosts": hosts})
        assert not any(part.read for part in given)  # lengths are known without reading
        for step in range(2 * made.steps_per_epoch):
            for part in given:
                part.read.clear()
            made.batch(step)
            rows = 8 // hosts
            mine = [m for held in made.members(step)[host * rows : (host + 1) * rows] for m in held]
            read = [(source, row) for source, part in enumerate(given) for row in part.read]
            assert sorted(read) == sorted(mine)


def test_a_run_goes_on_in_the_middle_of_an_epoch_and_after_many() -> None:
    given = random_rows.some(50)
    settings = {"batch_size": 4, "length": 48, "seed": 7}
    straight = batches.Batches([random_rows.Noted(given)], **settings)
    walked = [straight.batch(step) for step in range(3 * straight.steps_per_epoch)]
    for step in (0, 5, 2 * straight.steps_per_epoch + 1, 3, len(walked) - 1):
        fresh = batches.Batches([random_rows.Noted(given)], **settings)
        assert random_rows.same(fresh.batch(step), walked[step])
        assert random_rows.same(straight.batch(step), walked[step])  # also backwards
