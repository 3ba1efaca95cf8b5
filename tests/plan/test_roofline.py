# SPDX-License-Identifier: Apache-2.0
"""The roofline's formula, by hand."""

import math

import pytest

from jft.plan import chips, hlo_collectives, roofline, topology


def place(name: str) -> topology.Topology:
    """As `topology.parse`, without a compiler: the roofline only counts devices."""
    several, _, rest = name.rpartition("*")
    chip, _, shape = rest.partition(":")
    own, sizes = chips.CHIPS[chip], tuple(map(int, shape.split("x")))
    slices = int(several or 1)
    devices = range(slices * math.prod(sizes) * own.devices_per_chip)
    return topology.Topology(name, own, slices, sizes, tuple(devices))


def exchange(
    axes: tuple[str, ...], group: int, wire: float, times: float = 1
) -> hlo_collectives.Collective:
    return hlo_collectives.Collective("all-gather", axes, group, (), 0, wire, times, "", "", "")


def estimate(
    name: str, *own: hlo_collectives.Collective, flops: float = 0, traffic: float = 0
) -> roofline.Estimate:
    return roofline.estimate(
        flops=flops,
        traffic=traffic,
        collectives=own,
        on=place(name),
        tokens=1024,
        network_axes=("slice",),
    )


def test_the_slower_of_computing_and_reading_bounds_a_lone_chip() -> None:
    second = 197e12 * roofline.EFFICIENCY["tpu"]
    found = estimate("v5e:1x1", flops=2 * second, traffic=819e9 * roofline.MEMORY_EFFICIENCY)
    assert (found.step_seconds, found.bound) == (pytest.approx(2), "compute")
    assert found.tokens_per_second_per_device == pytest.approx(512)
    found = estimate("v5e:1x1", flops=second, traffic=3 * 819e9 * roofline.MEMORY_EFFICIENCY)
    assert (found.step_seconds, found.bound) == (pytest.approx(3), "memory")


def test_exchanging_hides_but_for_a_share() -> None:
    flops = 197e12 * roofline.EFFICIENCY["tpu"]
    found = estimate("v5e:4x4", exchange(("fsdp",), 4, 45e9, times=3), flops=flops)
    assert found.step_seconds == pytest.approx(3 + (1 - roofline.OVERLAP) * 1)
    assert found.exchange_seconds == {"fsdp": pytest.approx(3)}


@pytest.mark.parametrize(
    ("name", "axes", "group", "links"),
    [
        ("v5e:4x4", ("tensor",), 4, 1),  # a line of four: its ends are not joined
        ("v5e:4x4", ("fsdp",), 16, 2),  # the whole slice: both dimensions
        ("v5e:16x16", ("tensor",), 16, 2),  # a ring sends both ways
        ("v5p:4x4x4", ("fsdp",), 64, 6),
        ("2*v5e:4x4", ("fsdp",), 16, 2),  # of its slice
        ("h100:8", ("fsdp",), 8, 1),  # all of a GPU's links are one figure
    ],
)
def test_links_of_an_axis(name: str, axes: tuple[str, ...], group: int, links: int) -> None:
    found = roofline.bandwidth(exchange(axes, group, 1), place(name), ())
    assert found == links * place(name).chip.link_bandwidth


def test_between_slices_the_network_counts() -> None:
    found = roofline.bandwidth(exchange(("slice",), 2, 1), place("2*v5e:4x4"), ("slice",))
    assert found == chips.CHIPS["v5e"].network_bandwidth


def test_cost_is_of_chips_not_of_devices() -> None:
    on = place("tpu7x:2x2x1")
    found = roofline.estimate(flops=1e15, traffic=0, collectives=(), on=on, tokens=8000)
    hours = found.step_seconds * (1e9 / 8000) / 3600
    assert roofline.cost(found, on, price=12.0, tokens=1e9) == pytest.approx(12.0 * 4 * hours)
