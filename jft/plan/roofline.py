# SPDX-License-Identifier: Apache-2.0
"""How long a step takes at best, what that is in tokens a second, and what it costs: one formula, its constants in sight."""

import dataclasses
from collections.abc import Collection, Iterable

from jft.plan import hlo_collectives, topology

# Share of the peak that matrix products of a training step reach. MaxText reports 0.50 to 0.67 of model flops on v5e
# (github.com/AI-Hypercomputer/maxtext, configs/v5e), of executed flops somewhat more. Measured on one H100, whose clock falls under load: 0.50 (8B LoRA) and
# 0.49 (70B on NF4) of executed flops, remat=full, rows of 2,048 (tools/bench_step.py).
EFFICIENCY = {"tpu": 0.7, "cuda": 0.5}
# Share of the memory's bandwidth that long reads and writes reach; refresh and turning around take the rest.
MEMORY_EFFICIENCY = 0.85
# Share of the shorter of computing and exchanging that runs beside the longer one: gathers of the next layer's weights hide
# behind this layer's products, the first and the last do not.
OVERLAP = 0.8
HOUR = 3600.0


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Seconds of one step, by what takes them, and what follows."""

    compute_seconds: float
    memory_seconds: float
    exchange_seconds: dict[str, float]  # by mesh axes, joined with +
    step_seconds: float
    tokens_per_second_per_device: float
    assumptions: tuple[str, ...]

    @property
    def bound(self) -> str:
        """What the step waits for most."""
        parts = {
            "compute": self.compute_seconds,
            "memory": self.memory_seconds,
            "exchange": sum(self.exchange_seconds.values()),
        }
        return max(parts, key=parts.__getitem__)


def estimate(
    *,
    flops: float,
    traffic: float,
    collectives: Iterable[hlo_collectives.Collective],
    on: topology.Topology,
    tokens: int,
    network_axes: Collection[str] = (),
) -> Estimate:
    """The time of a step.

        busy     = max(flops / (peak * EFFICIENCY), traffic / (memory bandwidth * MEMORY_EFFICIENCY))
        exchange = sum over collectives of bytes sent / bandwidth of their axes
        step     = max(busy, exchange) + (1 - OVERLAP) * min(busy, exchange)

    The bandwidth of axes is that of the links they have: of one dimension of the torus, of all if a group is a whole
    slice; twice it where the ends are joined, since a ring sends both ways; the network's where they cross slices.

    Args:
      flops: executed on one device.
      traffic: bytes to and from its memory.
      collectives: of the program.
      on: where it runs.
      tokens: of a whole step, on all devices.
      network_axes: mesh axes whose devices are in different slices or nodes.
    """
    chip = on.chip
    compute = flops / (chip.flops * EFFICIENCY[chip.platform])
    memory = traffic / (chip.hbm_bandwidth * MEMORY_EFFICIENCY)
    exchange: dict[str, float] = {}
    for own in collectives:
        if own.axes and own.total:
            key = "+".join(own.axes)
            exchange[key] = exchange.get(key, 0.0) + own.total / bandwidth(own, on, network_axes)
    busy, exchanging = max(compute, memory), sum(exchange.values())
    step = max(busy, exchanging) + (1 - OVERLAP) * min(busy, exchanging)
    rate = tokens / (step * len(on.devices)) if step else 0.0
    return Estimate(compute, memory, exchange, step, rate, _assumptions(on))


def bandwidth(
    own: hlo_collectives.Collective, on: topology.Topology, network_axes: Collection[str]
) -> float:
    """Bytes a second that a device sends in a collective."""
    chip = on.chip
    if set(own.axes) & set(network_axes):
        return chip.network_bandwidth
    if chip.platform == "cuda":  # a switch: every GPU sends at the full rate of its links
        return chip.link_bandwidth
    whole = own.group * on.slices >= len(on.devices)
    spanned = [n for n in on.shape if n > 1] if whole else [max(on.shape)]
    return sum(chip.link_bandwidth * (2 if n >= chip.wraps_at else 1) for n in spanned or [1])


def _assumptions(on: topology.Topology) -> tuple[str, ...]:
    chip = on.chip
    return (
        f"matrix products run at {EFFICIENCY[chip.platform]:.0%} of {chip.flops / 1e12:.0f} Tflop/s (bfloat16)",
        f"memory at {MEMORY_EFFICIENCY:.0%} of {chip.hbm_bandwidth / 1e9:,.0f} GB/s, each operand and result moved once",
        f"links at {chip.link_bandwidth / 1e9:.0f} GB/s one way, the network between slices at {chip.network_bandwidth / 1e9:.1f} GB/s a device",
        f"{OVERLAP:.0%} of the shorter of computing and exchanging is hidden behind the longer",
        "no waiting for data, no stragglers; nothing here was measured",
    )


def cost(estimate: Estimate, on: topology.Topology, *, price: float, tokens: float) -> float:
    """What `tokens` cost at `price` for a chip and hour."""
    seconds = tokens / (estimate.tokens_per_second_per_device * len(on.devices))
    return price * on.chips * seconds / HOUR
