# SPDX-License-Identifier: Apache-2.0
"""What makes a step that does not fit take less memory, the cheapest first.

Changes are tried one upon the other: what keeps less is computed again, and rows of one forward pass are fewer. Each takes
no more memory than the one before, so that the first that fits is found by bisection, with a few compilations.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

from ml_collections import config_dict

from jft import sharding

# Policies by how much they keep, the most first.
POLICIES = ("none", "dots", "products", "attention", "offload_attention", "full", "offload")
# Those that compute products again, or wait for the host.
_DEAR = ("attention", "full", "offload")
Changes = Mapping[str, str]


def chain(
    config: config_dict.ConfigDict, rows: int, micro_batch: int, *, offload: bool
) -> list[dict[str, str]]:
    """Changes of a training step, each with those before it.

    First the policy that costs next to nothing; then fewer rows at a time, which gathers weights more often; then the
    policies that compute products again.

    Args:
      config: as it is.
      rows: over how many devices the rows of a batch are split.
      micro_batch: rows of a forward pass now.
      offload: whether the host has a memory of its own.
    """
    now = POLICIES.index(config.remat)
    steps: list[dict[str, str]] = [{"remat": "products"}] if config.remat == "none" else []
    steps += [{"micro_batch": str(size)} for size in _halves(config.batch_size, rows, micro_batch)]
    steps += [
        {"remat": policy}
        for policy in _DEAR
        if POLICIES.index(policy) > now and (offload or policy != "offload")
    ]
    found, before = [], {}
    for step in steps:
        before = before | step
        found.append(before)
    return found


def _halves(batch_size: int, rows: int, micro_batch: int) -> Iterator[int]:
    """Smaller micro-batches: divisors of the batch, each about half of the one before, down to a row a device."""
    each = micro_batch // rows
    whole = batch_size // rows
    while each > 1:
        each = max(n for n in range(1, each // 2 + 1) if whole % n == 0)
        yield each * rows


def eval_chain(rows: int, eval_batch: int) -> list[dict[str, str]]:
    """Changes of an evaluation step: fewer rows."""
    sizes = []
    while eval_batch // rows > 1:
        eval_batch = eval_batch // rows // 2 * rows
        sizes.append({"eval_batch_size": str(eval_batch)})
    return sizes


def meshes(sizes: sharding.Sizes) -> list[dict[str, str]]:
    """Meshes of as many devices that store less on each: weights split where they were copied, else rows cut in two."""
    if sizes.data > 1:
        return [{"mesh.data": "1", "mesh.fsdp": str(sizes.fsdp * sizes.data)}]
    if sizes.fsdp % 2 == 0:
        half = str(sizes.fsdp // 2)
        return [
            {"mesh.fsdp": half, axis: str(2 * size)}
            for axis, size in (("mesh.tensor", sizes.tensor), ("mesh.context", sizes.context))
        ]
    return []


def first_that_fits(chain: Sequence[Changes], fits: Callable[[Changes], bool]) -> Changes | None:
    """The earliest of changes, each taking no more memory than the one before; None if the last does not fit either."""
    low, high, found = 0, len(chain) - 1, None
    if not chain or not fits(chain[high]):
        return None
    found = chain[high]
    while low < high:
        middle = (low + high) // 2
        if fits(chain[middle]):
            high, found = middle, chain[middle]
        else:
            low = middle + 1
    return found
