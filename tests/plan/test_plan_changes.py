# SPDX-License-Identifier: Apache-2.0
"""Which changes are tried where a step does not fit, and that the first that fits is found. Nothing is compiled."""

import pytest

from jft import config, sharding
from jft.models import remat
from jft.plan import changes


def chain(policy: str, batch_size: int, rows: int, micro: int, offload: bool = True) -> list[str]:
    c = config.base()
    c.remat, c.batch_size = policy, batch_size
    found = changes.chain(c, rows, micro, offload=offload)
    return [" ".join(f"{key}={text}" for key, text in one.items()) for one in found]


def test_every_policy_has_its_place() -> None:
    assert set(changes.POLICIES) == set(remat.POLICIES)


def test_what_costs_least_comes_first_and_each_change_is_on_top_of_those_before() -> None:
    assert chain("none", 48, 4, 48) == [
        "remat=products",
        "remat=products micro_batch=24",
        "remat=products micro_batch=12",
        "remat=products micro_batch=4",
        "remat=attention micro_batch=4",
        "remat=full micro_batch=4",
        "remat=offload micro_batch=4",
    ]
    assert chain("attention", 8, 8, 8) == ["remat=full", "remat=offload"]
    assert chain("attention", 8, 8, 8, offload=False) == ["remat=full"]
    assert chain("offload", 1, 1, 1) == []


@pytest.mark.parametrize("batch_size", [1, 6, 7, 30, 64])
def test_micro_batches_divide_the_batch_and_the_rows(batch_size: int) -> None:
    c = config.base()
    c.remat, c.batch_size = "full", 2 * batch_size
    sizes = [
        int(one["micro_batch"])
        for one in changes.chain(c, 2, 2 * batch_size, offload=True)
        if "micro_batch" in one
    ]
    assert all(c.batch_size % size == 0 and size % 2 == 0 for size in sizes)
    assert all(
        2 * after <= before
        for before, after in zip(sizes, sizes[1:], strict=False)
        if after != before
    )
    assert batch_size == 1 or sizes[-1] == 2


@pytest.mark.parametrize("count", range(8))
def test_the_first_that_fits_is_found_with_few_trials(count: int) -> None:
    steps = [{"remat": str(i)} for i in range(count)]
    for first in range(count + 1):
        asked: list[int] = []

        def fits(change: changes.Changes, first: int = first, asked: list[int] = asked) -> bool:
            asked.append(int(change["remat"]))
            return asked[-1] >= first

        found = changes.first_that_fits(steps, fits)
        assert found == (steps[first] if first < count else None)
        assert len(asked) <= 4 and len(set(asked)) == len(asked)


def test_smaller_evaluations_are_of_whole_rows() -> None:
    assert changes.eval_chain(4, 24) == [{"eval_batch_size": "12"}, {"eval_batch_size": "4"}]
    assert changes.eval_chain(4, 4) == []


def test_meshes_that_store_less_keep_their_devices() -> None:
    assert changes.meshes(sharding.Sizes(data=4, fsdp=2)) == [{"mesh.data": "1", "mesh.fsdp": "8"}]
    halved = changes.meshes(sharding.Sizes(fsdp=8, tensor=2))
    assert halved == [
        {"mesh.fsdp": "4", "mesh.tensor": "4"},
        {"mesh.fsdp": "4", "mesh.context": "2"},
    ]
    assert changes.meshes(sharding.Sizes(fsdp=1)) == []
