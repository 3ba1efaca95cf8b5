# SPDX-License-Identifier: Apache-2.0
"""What one call of a compiled program takes on one device, read from its optimised HLO (`compiled.as_text()`).

found = hlo.analyse(compiled.as_text(), mesh.shape)
found.flops.total, found.flops.uncounted, found.collectives, found.peak.buffers, found.traffic
"""

import dataclasses
from collections.abc import Mapping, Sequence

from jft.plan import hlo_collectives, hlo_flops, hlo_memory, hlo_text, hlo_traffic


@dataclasses.dataclass(frozen=True)
class Analysis:
    """All per device and call."""

    flops: hlo_flops.Flops
    collectives: tuple[hlo_collectives.Collective, ...]
    peak: hlo_memory.Peak  # its size is an estimate: `memory_analysis()` has the compiler's own
    traffic: float  # bytes to and from device memory, roughly

    def findings(self) -> tuple[str, ...]:
        """What makes the figures less than sure, one line each."""
        return self.flops.uncounted + self.flops.stated


def analyse(
    text: str,
    mesh: Mapping[str, int],
    *,
    kernels: Mapping[str, hlo_flops.Formula] | None = None,
    branches: Mapping[str, Sequence[float]] | None = None,
    arguments: Sequence[str] = (),
) -> Analysis:
    """Counts a program.

    Args:
      text: `compiled.as_text()`.
      mesh: size of each axis, in order (`jax.sharding.Mesh.shape`).
      kernels: pattern of a kernel's name -> (shapes of its operands, op_name) -> its flops; for those that state none in
        their name scope (see `hlo_flops`).
      branches: pattern of a conditional's op_name -> the share of its executions that takes each branch; without one the
        dearest branch is taken always.
      arguments: names of the flattened arguments, in order; without them those that JAX wrote.

    Raises:
      ValueError: the text is not that of a compiled program.
    """
    module = hlo_text.parse(text)
    walk = hlo_flops.Walk(module, kernels, branches)
    return Analysis(
        flops=hlo_flops.count(walk),
        collectives=hlo_collectives.collect(walk, mesh),
        peak=hlo_memory.Liveness(module, arguments).peak(),
        traffic=hlo_traffic.count(walk),
    )
